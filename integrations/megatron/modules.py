"""Which modules of a Megatron-Core model are covered, by class: what is replaced, what passes, and what each owns.

By allowlist: a module of another class is refused, whether it owns parameters or not; so are buffers, parameters and child modules that
a covered class does not have (a LoRA adapter hung under a linear), hooks that change what a module computes, and methods that somebody has put
in the place of a module's or a class's own. ``accept`` names what the caller has looked at: classes of modules, and functions that are hooks or
methods.
"""

import functools
import types
from collections.abc import Collection

from megatron.core.distributed import DistributedDataParallel
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from tpinv.integrations.megatron import layers, specs, te
from tpinv.integrations.megatron.attention import TPInvariantDotProductAttention
from tpinv.integrations.megatron.lora import LoRAAdapter
from tpinv.tree import ReductionTree

try:  # megatron-core 0.19 and later
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # 0.16 calls it a Mamba model
    from megatron.core.models.mamba import MambaModel as HybridModel

REPLACEMENTS = {
    ColumnParallelLinear: layers.TPInvariantColumnParallelLinear,
    RowParallelLinear: layers.TPInvariantRowParallelLinear,
    VocabParallelEmbedding: layers.TPInvariantVocabParallelEmbedding,
    DotProductAttention: TPInvariantDotProductAttention,
    nn.RMSNorm: layers.TPInvariantRMSNorm,
    nn.LayerNorm: layers.TPInvariantLayerNorm,
    FusedLayerNorm: layers.TPInvariantLayerNorm,
    nn.Embedding: layers.TPInvariantEmbedding,
    **te.replacements(),
}

# Own no parameters, and add nothing up over ranks, heads or tokens by themselves.
PASSING = (
    GPTModel, HybridModel, specs.HybridStack, specs.LocalHybridStack, TransformerBlock, TransformerLayer, MLPLayer, SelfAttention, MLP,
    layers.TPInvariantSwiGLU, LanguageModelEmbedding, RotaryEmbedding, FusedScaleMaskSoftmax, IdentityOp, IdentityFuncOp, nn.ModuleList,
    nn.Dropout, Float16Module, DistributedDataParallel,
)  # fmt: skip

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
TRUSTED = ("megatron.core", "tpinv")  # whose hooks are known: DistributedDataParallel's, and tpinv's own
LIBRARIES = (*TRUSTED, "torch", "transformer_engine", "apex")  # whose classes have methods of their own
ADDED = {"smart_apply": "transformers.modeling_utils"}  # to nn.Module, by who initialises any of transformers' models: in no one's place


def check_modules(plan: list[tuple[str, nn.Module]], tree: ReductionTree, accept: Collection = ()) -> None:
    """ValueError naming every (name, module) of ``plan`` that is not covered, and why."""
    unused = te.unused_modules(plan)
    problems = [problem for name, module in plan if id(module) not in unused for problem in _problems(name, module, tree, accept)]
    if problems:
        raise ValueError("these modules cannot be made invariant:\n" + "\n".join(f"  - {problem}" for problem in problems))


def check_again(model: nn.Module) -> None:
    """The same for a converted model, whenever modules, parameters or a module's own ``forward`` have been added or taken away since the last
    time."""
    size = sum(1 + len(module._parameters) + ("forward" in vars(module)) for module in model.modules())
    if getattr(model, "tpinv_checked_size", None) != size:
        check_modules(list(model.named_modules()), model.tpinv_tree, model.tpinv_accept)
        model.tpinv_checked_size = size


def _problems(name: str, module: nn.Module, tree: ReductionTree, accept: Collection) -> list[str]:
    kind, ours = type(module), isinstance(module, (*REPLACEMENTS.values(), LoRAAdapter))
    path = f"{kind.__module__}.{kind.__name__}"
    covered = ours or kind in REPLACEMENTS
    owned = {key for key, parameter in module.named_parameters(recurse=False)}
    problems = [f"{name}: {problem}" for problem in (*_foreign_hooks(module, accept), *_foreign_methods(module, accept))]
    if ours and (other := getattr(module, "tree", tree)) != tree:
        problems.append(f"{name}: converted with {other.fingerprint} already, not {tree.fingerprint}; build the model anew")
    if covered:
        has_modules = isinstance(module, DotProductAttention) or te.is_attention(module)  # softmax, dropout
        parts = [] if has_modules else layers.foreign_parts(module, REPLACEMENTS.get(kind, kind))
        problems += [f"{name}: {problem}" for problem in parts]
    elif owned and kind not in accept:
        problems.append(f"{name}: {path} owns parameters and is not covered; use the local layer spec or TransformerEngine's")
    elif isinstance(module, tuple(REPLACEMENTS)) and kind not in accept:
        problems.append(f"{name}: {path}, a subclass of a layer that tpinv replaces, is not covered; use its base")
    elif kind not in PASSING and kind not in accept:
        problems.append(
            f"{name}: {path} is not covered: nobody has looked at what it adds up; use the local layer spec or TransformerEngine's, or pass "
            f"accept=[{kind.__name__}] if you have"
        )
    if buffers := [key for key, _ in module.named_buffers(recurse=False)]:
        problems.append(f"{name}: {path} owns buffers that are not covered ({', '.join(buffers)}); build it without")
    if name.endswith("core_attention") and not (isinstance(module, DotProductAttention) or te.is_attention(module)):
        problems.append(f"{name}: {path} is not covered; use the local DotProductAttention, or TEDotProductAttention")
    if isinstance(module, nn.Dropout) and module.p:
        problems.append(f"{name}: its dropout of {module.p} draws from a stream per rank; build it with 0.0")
    if isinstance(module, MLP) and on_cpu(module) and module.config.bias_activation_fusion:
        problems.append(f"{name}: bias_activation_fusion compiles an activation that depends on a shard's width on a CPU; set it to False")
    if kind in (nn.RMSNorm, nn.LayerNorm) and (module.weight is None or module.weight.dim() != 1):
        problems.append(f"{name}: a norm needs a weight of one dimension; use elementwise_affine=True over the hidden size")
    if kind is nn.Embedding and (options := _embedding_options(module)):
        problems.append(f"{name}: an embedding with {', '.join(options)} is not covered; build it without")
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
        problems += _linear_problems(name, module, tree)
    elif covered:
        problems += te.problems(name, module, tree)
    return problems


def _foreign_hooks(module: nn.Module, accept: Collection) -> list[str]:
    found = []
    for where in HOOKS:
        for hook in (getattr(module, where, None) or {}).values():
            while isinstance(hook, functools.partial):
                hook = hook.func
            origin = getattr(hook, "__module__", None) or type(hook).__module__
            if not _is_of(origin, TRUSTED) and hook not in accept and getattr(hook, "__func__", None) not in accept:
                name = getattr(hook, "__qualname__", type(hook).__name__)
                found.append(
                    f"{origin}.{name}, in {where}, may change what {type(module).__name__} computes; remove it, convert first, or pass "
                    f"accept=[{name}] if you have looked at what it adds up"
                )
    return found


def _is_of(origin: str, packages: tuple[str, ...]) -> bool:
    return any(origin == package or origin.startswith(package + ".") for package in packages)


def _foreign_methods(module: nn.Module, accept: Collection) -> list[str]:
    """What would run instead of the method that tpinv knows, or has: an attribute of the module itself goes before its class."""
    kind = type(module)
    own = [(f"{kind.__name__} here", k, v) for k, v in vars(module).items() if callable(v) and callable(getattr(kind, k, None))]
    of_classes = [
        (base.__name__, key, value)
        for base in kind.__mro__
        if _is_of(base.__module__, LIBRARIES)
        for key, value in vars(base).items()
        if isinstance(value, types.FunctionType) and (key == "__call__" or not key.startswith("__"))
    ]
    found = []
    for where, key, method in (*own, *of_classes):
        origin = getattr(method, "__module__", None) or type(method).__module__
        if (
            not _is_of(origin, LIBRARIES)
            and ADDED.get(key) != origin
            and method not in accept
            and getattr(method, "__func__", None) not in accept
        ):
            method_name = getattr(method, "__qualname__", type(method).__name__)
            found.append(
                f"{origin}.{method_name} stands in the place of {key} of {where}, and nobody has looked at what it adds up; take it away, or pass "
                f"accept=[{method_name}] if you have"
            )
    if getattr(module, "_compiled_call_impl", None) is not None:
        found.append(f"{kind.__name__} was compiled ({kind.__name__}.compile()), which is not covered; convert it as it was before")
    return found


def _embedding_options(embedding: nn.Embedding) -> list[str]:
    options = {name: getattr(embedding, name) for name in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")}
    return [f"{name}={value}" for name, value in options.items() if value is not None and value is not False]


def on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def _linear_problems(name: str, module: nn.Module, tree: ReductionTree) -> list[str]:
    problems = []
    column = isinstance(module, ColumnParallelLinear)
    if module.is_expert:
        problems.append(f"{name}: an expert's linear is not covered")
    if getattr(module, "disable_grad_reduce", False):
        problems.append(f"{name}: disable_grad_reduce moves the sum elsewhere; set it to False")
    if not column and not module.input_is_parallel:
        problems.append(f"{name}: input_is_parallel=False is not covered; pass this rank's features")
    unmarked = module.weight is not None and not hasattr(module.weight, "partition_stride")
    if column and unmarked and not hasattr(module, "tpinv_stride"):
        problems.append(
            f"{name}: its weight has no partition_stride, which tells SwiGLU's fc1 from others; build with perform_initialization=True"
        )
    width = module.output_size // layers.stride_of(module) if column else module.input_size
    try:
        tree.leaf_length(width, f"{name}'s {'out' if column else 'in'}put_size")
    except ValueError as error:
        problems.append(str(error))
    return problems

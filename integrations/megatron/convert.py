"""convert: a built Megatron-Core model becomes invariant in place.

Parameters, their names, their attributes and ``sharded_state_dict`` stay as they are: every module that computes with a sharded
sum changes its class to a subclass that overrides ``forward`` (layers.py). So it works before or after loading weights, on a bare
GPTModel or HybridModel or inside Float16Module and DistributedDataParallel, and checkpoints go both ways.

It fails closed: a module that owns parameters and is not one of those below is an error, not left as it is.
"""

import collections
import logging
import types

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import L2Norm
from torch import nn

from tpinv.integrations.megatron import hooks, layers
from tpinv.integrations.megatron.attention import TPInvariantDotProductAttention
from tpinv.integrations.megatron.guard import check_config, check_vocabulary
from tpinv.ops.attention import require_invariant
from tpinv.tree import ReductionTree

logger = logging.getLogger("tpinv")

REPLACEMENTS = {
    ColumnParallelLinear: layers.TPInvariantColumnParallelLinear,
    RowParallelLinear: layers.TPInvariantRowParallelLinear,
    VocabParallelEmbedding: layers.TPInvariantVocabParallelEmbedding,
    DotProductAttention: TPInvariantDotProductAttention,
    nn.RMSNorm: layers.TPInvariantRMSNorm,
    nn.LayerNorm: layers.TPInvariantLayerNorm,
    FusedLayerNorm: layers.TPInvariantLayerNorm,
    nn.Embedding: layers.TPInvariantEmbedding,
}


def convert(
    model: nn.Module | list[nn.Module],
    *,
    tree: ReductionTree,
    tokenizer_vocab_size: int | None = None,
    make_vocab_size_divisible_by: int = 128,
):
    """Makes a Megatron-Core GPTModel or HybridModel invariant to the tensor-parallel size, in place.

    Replaced: every column- and row-parallel linear (the output layer too), the word and position embeddings, every norm (q/k
    norms too), the core attention, the activation (on a CPU; SwiGLU on a GPU), and the loss. Converting twice with one tree changes nothing.

    Args:
        model: the model, wrapped or not, or Megatron's list of model chunks.
        tree: its leaves must be a multiple of every tensor-parallel size to compare, and divide every sharded dimension.
        tokenizer_vocab_size: number of real tokens. If given, the model's (padded) vocabulary is checked not to depend on TP.
        make_vocab_size_divisible_by: what the vocabulary is padded to, beside the leaves, at every TP (see padded_vocab_size).

    Returns:
        ``model``. What was replaced is logged to the logger "tpinv", with the tree's fingerprint.

    Raises:
        ValueError: naming every setting that cannot be invariant (guard.py), modules that are not covered, dimensions without equal
            leaves, or a model that was converted with another tree. Nothing has been changed then.
    """
    chunks = model if isinstance(model, list) else [model]
    plan = [(name, module) for chunk in chunks for name, module in chunk.named_modules()]
    models = [module for _, module in plan if isinstance(module, LanguageModule)]
    if not models:
        raise ValueError(f"{type(chunks[0]).__name__} holds no Megatron-Core LanguageModule (GPTModel, HybridModel); convert those")
    for language_model in models:
        check_config(language_model.config, tree, language_model.pg_collection.tp.size())
        check_vocabulary(language_model.vocab_size, tree, tokenizer_vocab_size, make_vocab_size_divisible_by)
    _check_modules(plan, tree)
    for language_model in models:
        _check_attention(language_model)

    replaced = collections.Counter()
    for name, module in plan:
        stock = type(module)
        if stock in REPLACEMENTS:
            if stock is FusedLayerNorm:  # what torch's class has beside Apex's
                module.normalized_shape, module.elementwise_affine = tuple(module.weight.shape), True
            module.__class__ = REPLACEMENTS[stock]
            module.tree = tree
            replaced[stock.__name__] += 1
        if isinstance(module, layers.TreeBound):
            module.converted = True
        if isinstance(module, ColumnParallelLinear):
            module.tpinv_stride = _stride(module)
        elif isinstance(module, MLP):
            layers.replace_activation(module) if _on_cpu(module) else layers.fuse_swiglu(module)
        elif hasattr(module, "core_attention") and not hasattr(module, "tpinv_hook"):
            module.tpinv_hook = module.register_forward_pre_hook(_no_dynamic_batching, with_kwargs=True)
        if isinstance(module, layers._NormMixin):
            _share_rows(name, module, models[0])
        elif isinstance(module, RowParallelLinear):
            layers.mark_complete(module)
    layers.mark_shared_weights([module for _, module in plan])
    for language_model in models:
        language_model.tpinv_tree = tree
        language_model.compute_language_model_loss = types.MethodType(layers.language_model_loss, language_model)
    hooks.install_finalize_filter()
    if replaced and models[0].pg_collection.tp.rank() == 0:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(replaced.items()))
        logger.info("%s: replaced %s, the loss and the gradient finalisation", tree.fingerprint, listed)
        logger.info("%s: the gradient norm is the optimizer's; pass it through convert_optimizer", tree.fingerprint)
        if tokenizer_vocab_size is None:
            logger.warning("vocab_size=%d is taken as it is; pass tokenizer_vocab_size to check its padding", models[0].vocab_size)
        if models[0].config.perform_initialization and not models[0].config.use_cpu_initialization:
            logger.warning("initial weights were drawn per rank and depend on TP; load a checkpoint, or use_cpu_initialization=True")
    return model


def _check_attention(model: LanguageModule) -> None:
    """On a GPU, that the kernel is invariant on this chip for these heads: now rather than at the first forward."""
    device = next(model.parameters()).device
    if device.type == "cuda" and any(isinstance(module, DotProductAttention) for module in model.modules()):
        require_invariant(device, model.config.params_dtype, model.config.kv_channels)


def _stride(linear: ColumnParallelLinear) -> int:
    if isinstance(linear, layers.TPInvariantColumnParallelLinear) and hasattr(linear, "tpinv_stride"):
        return linear.tpinv_stride
    return getattr(linear.weight, "partition_stride", 1)  # _linear_problems has seen to it that the mark is there


def _on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def _no_dynamic_batching(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Dynamic batching calls flash attention past core_attention."""
    context = kwargs.get("inference_context")
    if context is not None and not context.is_static_batching():
        raise ValueError("dynamic batching is not covered: its flash attention depends on the heads of a rank; use a static context")


def _share_rows(name: str, norm: nn.Module, model: MegatronModule) -> None:
    tp_group = model.pg_collection.tp
    by_heads = name.rsplit(".", 1)[-1] in ("q_layernorm", "k_layernorm")
    by_sequence = model.config.sequence_parallel and tp_group.size() > 1 and not by_heads
    norm.share_rows(tp_group, by_sequence=by_sequence, by_heads=by_heads)


def _check_modules(plan: list[tuple[str, nn.Module]], tree: ReductionTree) -> None:
    ours = tuple(REPLACEMENTS.values())
    problems = []
    for name, module in plan:
        kind = type(module)
        if isinstance(module, ours):
            other = getattr(module, "tree", tree)
            if other != tree:
                problems.append(f"{name}: converted with {other.fingerprint} already, not {tree.fingerprint}; build the model anew")
        elif kind not in REPLACEMENTS and any(True for _ in module.parameters(recurse=False)):
            problems.append(f"{name}: {kind.__module__}.{kind.__name__} owns parameters and is not covered; use the local layer spec")
        elif isinstance(module, tuple(REPLACEMENTS)) and kind not in REPLACEMENTS:
            problems.append(
                f"{name}: {kind.__module__}.{kind.__name__}, a subclass of a layer that tpinv replaces, is not covered; use its base"
            )
        elif name.endswith("core_attention") and kind is not DotProductAttention:
            problems.append(f"{name}: {kind.__module__}.{kind.__name__} is not covered; use the local DotProductAttention")
        elif isinstance(module, L2Norm) or "transformer_engine" in kind.__module__:
            problems.append(f"{name}: {kind.__module__}.{kind.__name__} is not covered; use the local layer spec without it")
        elif isinstance(module, MLP):
            problems += _mlp_problems(name, module)
        elif kind in (nn.RMSNorm, nn.LayerNorm) and (module.weight is None or module.weight.dim() != 1):
            problems.append(f"{name}: a norm needs a weight of one dimension; use elementwise_affine=True over the hidden size")
        elif kind is nn.Embedding and (options := _embedding_options(module)):
            problems.append(f"{name}: an embedding with {', '.join(options)} is not covered; build it without")
        if isinstance(module, DotProductAttention) and module.attention_dropout.p:
            problems.append(f"{name}: its dropout of {module.attention_dropout.p} draws from a stream per rank; build it with 0.0")
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            problems += _linear_problems(name, module, tree)
    if problems:
        raise ValueError("these modules cannot be made invariant:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _embedding_options(embedding: nn.Embedding) -> list[str]:
    options = {name: getattr(embedding, name) for name in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")}
    return [f"{name}={value}" for name, value in options.items() if value is not None and value is not False]


def _mlp_problems(name: str, mlp: MLP) -> list[str]:
    """On a CPU, where an activation's last elements may be computed by another function than the others."""
    config, problems = mlp.config, []
    if not _on_cpu(mlp):
        return problems
    known = {*layers.ACTIVATIONS, *layers.ACTIVATIONS.values(), *layers.EXACT_ACTIVATIONS}
    if config.activation_func not in known:
        problems.append(
            f"{name}: activation_func={config.activation_func} may depend on a shard's width on a CPU; use silu, gelu, relu or squared_relu"
        )
    if config.bias_activation_fusion:
        problems.append(f"{name}: bias_activation_fusion compiles an activation that depends on a shard's width on a CPU; set it to False")
    return problems


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
    stride = _stride(module) if column else 1
    try:
        tree.leaf_length(module.output_size // stride if column else module.input_size, f"{name}'s {'out' if column else 'in'}put_size")
    except ValueError as error:
        problems.append(str(error))
    return problems


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` (wrapped or not) has been through :func:`convert` or was built from tpinv's specs and then converted."""
    return any(isinstance(getattr(m, "tpinv_tree", None), ReductionTree) for m in model.modules())

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
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import L2Norm
from torch import nn

from tpinv.integrations.megatron import hooks, layers
from tpinv.integrations.megatron.attention import TPInvariantDotProductAttention
from tpinv.integrations.megatron.guard import check_config, check_vocabulary
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


def convert(model: nn.Module | list[nn.Module], *, tree: ReductionTree, tokenizer_vocab_size: int | None = None):
    """Makes a Megatron-Core GPTModel or HybridModel invariant to the tensor-parallel size, in place.

    Replaced: every column- and row-parallel linear (the output layer too), the word and position embeddings, every norm (q/k
    norms too), the core attention, and the loss. Converting twice with one tree changes nothing.

    Args:
        model: the model, wrapped or not, or Megatron's list of model chunks.
        tree: its leaves must be a multiple of every tensor-parallel size to compare, and divide every sharded dimension.
        tokenizer_vocab_size: number of real tokens. If given, the model's (padded) vocabulary is checked not to depend on TP.

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
        check_vocabulary(language_model.vocab_size, tree, tokenizer_vocab_size)
    _check_modules(plan, tree)

    replaced = collections.Counter()
    for name, module in plan:
        stock = type(module)
        if stock in REPLACEMENTS:
            if stock is FusedLayerNorm:  # what torch's class has beside Apex's
                module.normalized_shape, module.elementwise_affine = tuple(module.weight.shape), True
            module.__class__ = REPLACEMENTS[stock]
            module.tree = tree
            replaced[stock.__name__] += 1
        if isinstance(module, layers._NormMixin):
            _share_rows(name, module, models[0])
        elif isinstance(module, RowParallelLinear):
            layers.mark_complete(module)
    for language_model in models:
        language_model.tpinv_tree = tree
        language_model.compute_language_model_loss = types.MethodType(layers.language_model_loss, language_model)
    hooks.install_finalize_filter()
    if replaced:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(replaced.items()))
        logger.info("%s: replaced %s, the loss and the gradient finalisation", tree.fingerprint, listed)
    return model


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
        elif isinstance(module, L2Norm) or "transformer_engine" in kind.__module__:
            problems.append(f"{name}: {kind.__module__}.{kind.__name__} is not covered; use the local layer spec without it")
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            problems += _linear_problems(name, module, tree)
    if problems:
        raise ValueError("these modules cannot be made invariant:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _linear_problems(name: str, module: nn.Module, tree: ReductionTree) -> list[str]:
    problems = []
    column = isinstance(module, ColumnParallelLinear)
    if module.is_expert:
        problems.append(f"{name}: an expert's linear is not covered")
    if getattr(module, "disable_grad_reduce", False):
        problems.append(f"{name}: disable_grad_reduce moves the sum elsewhere; set it to False")
    if not column and not module.input_is_parallel:
        problems.append(f"{name}: input_is_parallel=False is not covered; pass this rank's features")
    if module.weight is not None and not hasattr(module.weight, "partition_stride"):
        problems.append(
            f"{name}: its weight has no partition_stride, which tells SwiGLU's fc1 from others; build with perform_initialization=True"
        )
    stride = getattr(module.weight, "partition_stride", 1)
    try:
        tree.leaf_length(module.output_size // stride if column else module.input_size, f"{name}'s {'out' if column else 'in'}put_size")
    except ValueError as error:
        problems.append(str(error))
    return problems


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` (wrapped or not) has been through :func:`convert` or was built from tpinv's specs and then converted."""
    return any(isinstance(getattr(m, "tpinv_tree", None), ReductionTree) for m in model.modules())

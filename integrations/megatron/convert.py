"""convert: a built Megatron-Core model becomes invariant in place.

Parameters, their names, their attributes and ``sharded_state_dict`` stay as they are: every module that computes with a sharded
sum changes its class to a subclass that overrides ``forward`` (layers.py). So it works before or after loading weights, on a bare
GPTModel or HybridModel or inside Float16Module and DistributedDataParallel, and checkpoints go both ways.

It fails closed: settings, modules, parameters and hooks that nobody has looked at are errors (guard.py, modules.py).
"""

import collections
import logging
import types
from collections.abc import Collection

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import nn

from tpinv import sharding
from tpinv.collectives import agree, resolve
from tpinv.integrations.megatron import converted, hooks, layers, loss, te
from tpinv.integrations.megatron.attention import kinds_of_options
from tpinv.integrations.megatron.guard import check_config, check_data_parallel, check_vocabulary
from tpinv.integrations.megatron.modules import REPLACEMENTS, check_modules, on_cpu
from tpinv.ops.attention import require_invariant
from tpinv.tree import ReductionTree

logger = logging.getLogger("tpinv")


def convert(
    model: nn.Module | list[nn.Module],
    *,
    tree: ReductionTree,
    optimizer=None,
    accept: Collection = (),
    tokenizer_vocab_size: int | None = None,
    make_vocab_size_divisible_by: int = 128,
):
    """Makes a Megatron-Core GPTModel or HybridModel invariant to the tensor-parallel size, in place.

    Replaced: every column- and row-parallel linear (the output layer too), the word and position embeddings, every norm (q/k
    norms too), the core attention, the activation (on a CPU; SwiGLU on a GPU), and the loss. Converting twice with one tree changes nothing.

    Args:
        model: the model, wrapped or not, or Megatron's list of model chunks.
        tree: its leaves must be a multiple of every tensor-parallel size to compare, and divide every sharded dimension.
        optimizer: Megatron's optimizer of these parameters, whose gradient norm becomes exact (convert_optimizer). Without it the first step
            that takes the norm is an error, unless convert_optimizer was called.
        accept: what you have looked at yourself and tpinv has not: names of settings, classes of modules, functions that are hooks.
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

    def check() -> None:
        for language_model in models:
            _check_model(language_model, tree, accept)
            check_vocabulary(language_model.vocab_size, tree, tokenizer_vocab_size, make_vocab_size_divisible_by)
        for _, module in plan:
            if hasattr(module, "ddp_config"):
                check_data_parallel(module.ddp_config, accept)
        check_modules(plan, tree, accept)
        for language_model in models:
            _check_attention(language_model)
        if optimizer is not None:
            hooks.check_optimizer(optimizer, accept)

    kinds = collections.Counter(type(module).__name__ for _, module in plan)
    signature = {"tree": tree.fingerprint, "modules": str(sorted(kinds.items())), "vocab_size": models[0].vocab_size}
    agree(resolve(models[0].pg_collection.tp), "megatron.convert", signature, check)
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
            module.tpinv_stride = layers.stride_of(module)
        elif isinstance(module, MLP):
            layers.replace_activation(module) if on_cpu(module) else layers.fuse_swiglu(module)
        elif hasattr(module, "core_attention") and not hasattr(module, "tpinv_hook"):
            module.tpinv_hook = module.register_forward_pre_hook(_no_dynamic_batching, with_kwargs=True)
        if isinstance(module, layers._NormMixin):
            _share_rows(name, module, models[0])
        if isinstance(module, layers.TreeBound):
            module.ranks = resolve(module.tp_group)
            sharding.register(module)
    layers.mark_shared_weights([module for _, module in plan])
    for language_model in models:
        converted.remember(language_model, tree, accept)
        converted.restore_marks(language_model)
        language_model.compute_language_model_loss = types.MethodType(loss.language_model_loss, language_model)
    loss.install()
    hooks.install_finalize_filter()
    hooks.install_guards()
    if optimizer is not None:
        hooks.convert_optimizer(optimizer, accept=accept)
    if replaced and models[0].pg_collection.tp.rank() == 0:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(replaced.items()))
        logger.info("%s: replaced %s, the loss and the gradient finalisation", tree.fingerprint, listed)
        if optimizer is None:
            logger.info("%s: the gradient norm is the optimizer's; pass it to convert, or through convert_optimizer", tree.fingerprint)
        if tokenizer_vocab_size is None:
            logger.warning("vocab_size=%d is taken as it is; pass tokenizer_vocab_size to check its padding", models[0].vocab_size)
        if models[0].config.perform_initialization and not models[0].config.use_cpu_initialization:
            logger.warning("initial weights were drawn per rank and depend on TP; load a checkpoint, or use_cpu_initialization=True")
    return model


def _check_model(model: LanguageModule, tree: ReductionTree, accept: Collection) -> None:
    """The settings of a model and of each of its modules, which may have a config of its own."""
    configs = {id(model.config): model.config}
    configs |= {id(m.config): m.config for m in model.modules() if isinstance(getattr(m, "config", None), type(model.config))}
    for config in configs.values():
        check_config(config, tree, model.pg_collection.tp.size(), accept)
    stages = model.config.pipeline_model_parallel_size
    if stages > 1 and getattr(model, "share_embeddings_and_output_weights", False):
        raise ValueError(
            f"tied embeddings over {stages} pipeline stages are added up by Megatron's finalisation, after main_grad; use "
            "share_embeddings_and_output_weights=False, or one stage"
        )


def _check_attention(model: LanguageModule) -> None:
    """On a GPU, that the kernel is invariant on this chip for these heads: now rather than at the first forward."""
    device = next(model.parameters()).device
    ours = [module for module in model.modules() if isinstance(module, DotProductAttention) or te.is_attention(module)]
    if device.type == "cuda":
        for options in sorted({kinds_of_options(module) for module in ours}):
            given = (True, False, options) if any(options) else ()
            require_invariant(device, model.config.params_dtype, model.config.kv_channels, *given)


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

"""From a stock Config to an invariant one. Fails closed: what is not known to be covered is a ValueError naming it.

The shardings of states stay the stock ones, except that norm weights are invariant (I) over tensor parallelism where stock declares
them replicated (R): their gradients leave backward complete, and FSDP must not add them up once more.
"""

from functools import partial

import spmd_types as spmd
from torchtitan.components import loss as stock_loss
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.configs import CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.override import derive
from torchtitan.distributed import activation_checkpoint
from torchtitan.distributed.parallel_dims import MeshAxisName, SpmdLayout
from torchtitan.distributed.utils import is_in_batch_invariant_mode
from torchtitan.models.common import attention, embedding, feed_forward, linear, nn_modules
from torchtitan.models.common.decoder import TransformerBlock
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig
from torchtitan.tools.logging import logger

from tpinv.integrations.torchtitan import layers
from tpinv.integrations.torchtitan.checkpointing import SelectiveAC
from tpinv.integrations.torchtitan.loss import CrossEntropyLoss
from tpinv.integrations.torchtitan.module import check_parallelism, check_replicas
from tpinv.tree import ReductionTree

TP = MeshAxisName.TP
# RL's output layer, known by its name: importing it needs vLLM. It is a Linear.Config with a compute_dtype, which LMHead has too.
CAST_LINEAR = "torchtitan.experiments.rl.models.cast_linear.CastLinear.Config"
# A generator's own attention, by its name for the same reason.
VLLM_ATTENTION = "torchtitan.experiments.rl.models.attention.VLLMAttentionWrapper.Config"
ELEMENTWISE = ("Adam", "AdamW")  # optimizers that see a parameter's elements one by one
OURS = (layers.LMHead.Config, layers.FinalNorm.Config, layers.RMSNorm.Config, layers.Embedding.Config, CrossEntropyLoss.Config)


def invariant_config(config, tree: ReductionTree, *, forward_only: bool = False):
    """What takes the place of ``config``, a node of the configuration: a module below the model's root, the loss, or settings to check."""
    if isinstance(config, (ParallelismConfig, CompileConfig, DebugConfig, OptimizersContainer.Config)):
        check_settings(config, tree, forward_only)
        return config
    if isinstance(config, TrainingConfig):
        if not config.disable_cuda_graphs:
            logger.info(
                "tpinv: CUDA graphs are off, since a batch's documents are as many as they are; so they are in torchtitan's varlen configs"
            )
        return derive(config, type(config), disable_cuda_graphs=True)
    if isinstance(config, activation_checkpoint.SelectiveAC.Config):
        stock = type(config) is activation_checkpoint.SelectiveAC.Config
        return derive(config, SelectiveAC.Config) if stock else config  # another policy is its author's
    if isinstance(config, TransformerBlock.Config):
        return _block(config, tree, forward_only)
    if type(config) in OURS:
        return config
    known = {
        embedding.Embedding.Config: _embedding,
        nn_modules.RMSNorm.Config: _final_norm,
        linear.Linear.Config: _lm_head,
        stock_loss.CrossEntropyLoss.Config: _loss,
    }
    if _name(config) == CAST_LINEAR:
        return _lm_head(config, tree)
    if type(config) not in known:
        raise ValueError(f"{_name(config)} is not covered; tpinv knows dense decoders with RMSNorm, grouped-query attention and SwiGLU")
    return known[type(config)](config, tree)


def check_settings(config, tree: ReductionTree, forward_only: bool) -> None:
    if isinstance(config, ParallelismConfig):
        check_parallelism(
            tree,
            tp=config.tensor_parallel_degree,
            cp=config.context_parallel_degree,
            ep=config.expert_parallel_degree,
            pp=config.pipeline_parallel_degree,
            backend=config.spmd_backend,
        )
        # -1 shards over the ranks that are left: the modules see how many
        check_replicas(config.data_parallel_replicate_degree * max(1, config.data_parallel_shard_degree), forward_only)
    elif isinstance(config, CompileConfig) and config.enable_async_tensor_parallel:
        raise ValueError("enable_async_tensor_parallel=True splits products and adds the parts as they arrive; set it to False")
    elif isinstance(config, DebugConfig) and config.spmd_typechecking:
        raise ValueError("spmd_typechecking=True does not know the types of tpinv's autograd functions; set it to False")
    elif isinstance(config, OptimizersContainer.Config) and not forward_only:
        _exactly(config, OptimizersContainer.Config)
        names = {group.optimizer_name for group in config.param_groups}
        if unknown := sorted(names - set(ELEMENTWISE)):
            raise ValueError(f"{', '.join(unknown)} may add up elements of a sharded parameter; use {' or '.join(ELEMENTWISE)}")


def _block(config: TransformerBlock.Config, tree: ReductionTree, forward_only: bool) -> TransformerBlock.Config:
    _of_torchtitan(config)
    parts = {name: getattr(config, name) for name in config.__dataclass_fields__ if isinstance(getattr(config, name), Module.Config)}
    if config.moe is not None:
        raise ValueError("mixture of experts is not covered; use a dense model")
    with_attention = partial(_attention, forward_only=forward_only)
    known = {"attention": with_attention, "feed_forward": _feed_forward, "attention_norm": _norm, "ffn_norm": _norm}
    if unknown := parts.keys() - known.keys():
        raise ValueError(f"{_name(config)} has parts that are not covered: {sorted(unknown)}; use a dense decoder without them")
    return derive(config, type(config), **{name: known[name](part, tree) for name, part in parts.items()})


def _attention(config, tree: ReductionTree, forward_only: bool):
    _exactly(config, attention.GQAttention.Config)
    if isinstance(config.qkv_linear, (layers.FusedQKVLinear.Config, layers.QKVLinear.Config)):
        return config
    _of_torchtitan(config.rope)
    enable_sp = _sharded_sequence(config.sharding_config, "x_BLD")
    qkv, qk_norm = config.qkv_linear, config.qk_norm
    fused = isinstance(qkv, attention.FusedQKVLinear.Config)
    _exactly(qkv, attention.FusedQKVLinear.Config if fused else attention.QKVLinear.Config)
    linears = {name: _column(getattr(qkv, name), tree, enable_sp) for name in (("wqkv",) if fused else ("wq", "wkv"))}
    if qk_norm is not None:
        _exactly(qk_norm, nn_modules.RMSNorm.Config)
        qk_norm = _derive(qk_norm, layers.QKNorm.Config, tree, {"weight": spmd.I})
    return derive(
        config,
        type(config),
        sharding_config=None,
        qkv_linear=derive(qkv, layers.FusedQKVLinear.Config if fused else layers.QKVLinear.Config, sharding_config=None, **linears),
        wo=_row(config.wo, tree),
        qk_norm=qk_norm,
        inner_attention=_inner_attention(config.inner_attention, forward_only),
        rope=derive(config.rope, type(config.rope), sharding_config=None),
    )


def _inner_attention(config, forward_only: bool):
    """Attention within a head adds nothing across ranks, but a kernel's schedule must not depend on how many heads a rank holds.

    FlexAttention's mask is the trainer's, causal within documents: what VarlenAttention computes from their lengths, and what its config
    makes the trainer hand over. In batch-invariant mode the stock kernels stay, as the generator uses them; their gradients change with the
    heads of a rank. vLLM's attention is left alone: what it computes is vLLM's promise.
    """
    if type(config) is attention.ScaledDotProductAttention.Config:
        return derive(config, layers.ScaledDotProductAttention.Config, sharding_config=None)
    if type(config) in (attention.FlexAttention.Config, attention.VarlenAttention.Config):
        if is_in_batch_invariant_mode():
            if not forward_only:
                raise ValueError(
                    f"in batch-invariant mode {_name(config)} is stock's, whose gradients depend on the heads of a rank; pass "
                    "forward_only=True to promise log-probabilities alone, or leave that mode"
                )
            options = getattr(config, "kernel_options", {"BACKEND": "TRITON", "BLOCK_M": 0, "BLOCK_N": 0})
            if options.get("BACKEND") != "TRITON" or not {"BLOCK_M", "BLOCK_N"} <= options.keys():
                raise ValueError(
                    f"kernel_options={options} leave the blocks of FlexAttention to timing, on every rank anew; use the RL experiment's "
                    "BatchInvariantFlexConverter, which pins them"
                )
            return derive(config, type(config), sharding_config=None)
        layers.window_of(getattr(config, "window_size", (-1, 0)))  # or refuses it
        return derive(config, layers.VarlenAttention.Config, sharding_config=None)
    if type(config) in (layers.ScaledDotProductAttention.Config, layers.VarlenAttention.Config) or _name(config) == VLLM_ATTENTION:
        return config
    raise ValueError(f"the attention {_name(config)} is not covered; use attn_backend='flex' or 'varlen'")


def _feed_forward(config, tree: ReductionTree):
    if type(config) is layers.FeedForward.Config:
        return config
    _exactly(config, feed_forward.FeedForward.Config)
    enable_sp = _sharded_sequence(config.sharding_config, "x")
    if (config.w1.in_features, config.w1.out_features, config.w1.bias) != (config.w3.in_features, config.w3.out_features, config.w3.bias):
        raise ValueError(f"w1 and w3 must have one shape, to share a tree; got {config.w1} and {config.w3}")
    return _derive(
        config, layers.FeedForward.Config, tree, None, enable_sp=enable_sp,
        w1=_column(config.w1, tree, enable_sp), w2=_row(config.w2, tree), w3=_column(config.w3, tree, enable_sp),
    )  # fmt: skip


def _column(config, tree: ReductionTree, enable_sp: bool):
    _exactly(config, linear.Linear.Config)
    return _column_parallel(config, tree, enable_sp, layers.ColumnParallelLinear.Config)


def _column_parallel(config, tree: ReductionTree, enable_sp: bool, kind: type):
    tree.leaf_length(config.out_features, "out_features")
    return _derive(config, kind, tree, {"weight": spmd.S(0), "bias": spmd.S(0)}, enable_sp=enable_sp)


def _row(config, tree: ReductionTree):
    _exactly(config, linear.Linear.Config)
    tree.leaf_length(config.in_features, "in_features")
    enable_sp = config.sharding_config is not None and _sharded(config.sharding_config.out_dst_shardings)
    return _derive(config, layers.RowParallelLinear.Config, tree, {"weight": spmd.S(1), "bias": spmd.I}, enable_sp=enable_sp)


def _lm_head(config, tree: ReductionTree):
    return _column_parallel(config, tree, False, layers.LMHead.Config)


def _norm(config, tree: ReductionTree, kind: type = layers.RMSNorm.Config):
    if type(config) is kind:
        return config
    _exactly(config, nn_modules.RMSNorm.Config)
    return _derive(config, kind, tree, {"weight": spmd.I}, enable_sp=_sharded_sequence(config.sharding_config, "input"))


def _final_norm(config, tree: ReductionTree):
    return _norm(config, tree, layers.FinalNorm.Config)


def _embedding(config, tree: ReductionTree):
    tree.leaf_length(config.num_embeddings, "num_embeddings (the vocabulary)")
    enable_sp = config.sharding_config is not None and _sharded(config.sharding_config.out_dst_shardings)
    return _derive(config, layers.Embedding.Config, tree, {"weight": spmd.S(0)}, enable_sp=enable_sp)


def _loss(config, tree: ReductionTree):
    return derive(config, CrossEntropyLoss.Config, leaves=tree.leaves)


def _derive(config, kind: type, tree: ReductionTree, states: dict | None, **deltas):
    """``states``: parameter -> how tensor parallelism shards it. Other axes stay as they are declared."""
    stock = config.sharding_config
    sharding = None
    if stock is not None and states is not None:
        layouts = {name: SpmdLayout({**layout.axis_types, TP: states[name]}) for name, layout in stock.state_shardings.items()}
        sharding = ShardingConfig(state_shardings=layouts)
    return derive(config, kind, leaves=tree.leaves, node_dtype=tree.node_dtype, sharding_config=sharding, **deltas)


def _sharded_sequence(sharding: ShardingConfig | None, name: str) -> bool:
    return sharding is not None and _sharded((sharding.in_src_shardings or {}).get(name))


def _sharded(layout: SpmdLayout | None) -> bool:
    """Whether tensor parallelism shards activations of this layout, which is sequence parallelism."""
    return layout is not None and isinstance(layout.per_axis_spmd_types()[TP], spmd.Shard)


def _exactly(config, kind: type) -> None:
    if type(config) is not kind:
        raise ValueError(f"{_name(config)} is not covered where tpinv replaces {kind.__qualname__}; build the model with the stock one")


def _of_torchtitan(config) -> None:
    """Of a block, whose parts may be known while what it does with them is not, and of rope."""
    if not type(config).__module__.startswith(("torchtitan.", "tpinv.")):
        raise ValueError(f"{_name(config)} is not covered: nobody has looked at what its forward adds up; use one of torchtitan's own")


def _name(config) -> str:
    return f"{type(config).__module__}.{type(config).__qualname__}"

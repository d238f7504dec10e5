"""tpinv: tensor-parallel layers and collectives whose results are the same bytes at every tensor-parallel size."""

from tpinv.collectives import tree_all_reduce, tree_reduce_scatter
from tpinv.layers import ColumnParallelLinear, LayerNorm, RMSNorm, RowParallelLinear, VocabParallelEmbedding
from tpinv.ops import (
    append_kv,
    column_parallel_linear,
    core_attention,
    gelu,
    layer_norm,
    packed_attention,
    paged_attention,
    reduce_add_rms_norm,
    rms_norm,
    row_parallel_add_rms_norm,
    row_parallel_linear,
    silu,
    swiglu,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    vocab_parallel_log_probs,
)
from tpinv.optim import clip_grad_norm_, grad_norm
from tpinv.sharding import Sharding
from tpinv.state_dict import ShardedModule
from tpinv.tree import Node, ReductionTree
from tpinv.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "ColumnParallelLinear",
    "LayerNorm",
    "Node",
    "RMSNorm",
    "ReductionTree",
    "RowParallelLinear",
    "ShardedModule",
    "Sharding",
    "VocabParallelEmbedding",
    "append_kv",
    "clip_grad_norm_",
    "column_parallel_linear",
    "core_attention",
    "gelu",
    "grad_norm",
    "layer_norm",
    "packed_attention",
    "paged_attention",
    "reduce_add_rms_norm",
    "rms_norm",
    "row_parallel_add_rms_norm",
    "row_parallel_linear",
    "silu",
    "swiglu",
    "tree_all_reduce",
    "tree_reduce_scatter",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "vocab_parallel_log_probs",
    "warmup",
]

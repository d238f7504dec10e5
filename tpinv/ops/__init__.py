"""Functions with gradients: the only place that knows the tree and the group. Each file names every sum and whether it is cut."""

from tpinv.ops.activation import gelu, silu, swiglu
from tpinv.ops.add_norm import reduce_add_rms_norm, row_parallel_add_rms_norm
from tpinv.ops.attention import core_attention, packed_attention
from tpinv.ops.cross_entropy import vocab_parallel_cross_entropy, vocab_parallel_log_probs
from tpinv.ops.embedding import vocab_parallel_embedding
from tpinv.ops.linear import column_parallel_linear, gather_last_dim, row_parallel_linear
from tpinv.ops.norm import layer_norm, rms_norm
from tpinv.ops.paged_attention import append_kv, paged_attention

__all__ = [
    "append_kv",
    "column_parallel_linear",
    "core_attention",
    "gather_last_dim",
    "gelu",
    "layer_norm",
    "packed_attention",
    "paged_attention",
    "reduce_add_rms_norm",
    "rms_norm",
    "row_parallel_add_rms_norm",
    "row_parallel_linear",
    "silu",
    "swiglu",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "vocab_parallel_log_probs",
]

"""Functions with gradients: the only place that knows the tree and the group. A file for each, which names every sum and whether it is cut;
registry.py makes it a torch operator with its gradient, products.py chooses who computes.

What one rank of a call refuses, all of its ranks do. A call has the ranks of its group. Where none is given and no flag says that ranks share
something (silu, swiglu, gelu, attention, norms of whole rows), it is this rank's own: nothing is sent, and so is its error."""

from tpinv.ops.attention import core_attention, packed_attention
from tpinv.ops.column_parallel_linear import column_parallel_linear
from tpinv.ops.gather_dim import gather_first_dim, gather_last_dim
from tpinv.ops.gelu import gelu
from tpinv.ops.layer_norm import layer_norm
from tpinv.ops.paged_attention import append_kv, paged_attention
from tpinv.ops.reduce_add_rms_norm import reduce_add_rms_norm
from tpinv.ops.rms_norm import rms_norm
from tpinv.ops.row_parallel_add_rms_norm import row_parallel_add_rms_norm
from tpinv.ops.row_parallel_linear import row_parallel_linear
from tpinv.ops.silu import silu
from tpinv.ops.swiglu import swiglu
from tpinv.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from tpinv.ops.vocab_parallel_embedding import vocab_parallel_embedding
from tpinv.ops.vocab_parallel_log_probs import vocab_parallel_log_probs

__all__ = [
    "append_kv",
    "column_parallel_linear",
    "core_attention",
    "gather_first_dim",
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

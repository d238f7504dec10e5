"""The contract on tensors, in plain torch: the oracle for every kernel, and the CPU backend.

    products.py        linears: chains over k, and the values of a rank's subtrees
    sums.py            plain sums, the left-complete tree over rows, and the tree above what ranks hold
    norm.py            RMSNorm and LayerNorm, forward and backward
    cross_entropy.py   softmax statistics over a part of the vocabulary, and their gradient
    embedding.py       the gradient of a table
    activation.py      silu, SwiGLU; gelu.py
    attention.py       attention by leaves of keys
    squares.py         exact sums of squares
    whole.py           a linear's products and sums at once, as one rank sees them: what p ranks must reproduce

Functions have the signatures of their namesakes in tpinv/kernels, so that whoever computes is decided by the device alone (ops/products.py).
"""

from tpinv.contract import COLUMNS, ROWS, STEP
from tpinv.reference.numbers import SUPPORTED_DTYPES, check_dtypes, node_add, torch_node_dtype
from tpinv.reference.products import chain_matmul, join_leaves, local_product, split_leaves, tree_product
from tpinv.reference.sums import column_sum, finish, pairwise_sum, row_sum, tree_sum
from tpinv.reference.whole import bias_grad, linear, linear_dgrad, linear_wgrad, log_sum_exp

__all__ = [
    "COLUMNS",
    "ROWS",
    "STEP",
    "SUPPORTED_DTYPES",
    "bias_grad",
    "chain_matmul",
    "check_dtypes",
    "column_sum",
    "finish",
    "join_leaves",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "local_product",
    "log_sum_exp",
    "node_add",
    "pairwise_sum",
    "row_sum",
    "split_leaves",
    "torch_node_dtype",
    "tree_product",
    "tree_sum",
]

"""The table of sums: which order of additions applies to which sum, as data.

tree.py says what shape a sum over L leaves has; this file says which sums there are, what cuts each of them between ranks, how a leaf
is added up inside, and what the nodes above the leaves are rounded to. Kernels and the reference read their constants here, functions
ask a row of the table for its tree (``sum.tree(tree)``), docs/coverage.md prints the table (:func:`markdown`), and
:func:`fingerprint` is a digest of it: two sides whose fingerprints differ cannot be expected to give the same bytes.

Changing a row or a constant changes bytes. Tile sizes, warps and the number of threads are not here, because no bit depends on them.

Legend: M tokens, N out-features, K in-features, V vocabulary, H hidden, p ranks, L leaves.
"""

import functools
import hashlib
from dataclasses import dataclass

from tpinv.tree import ReductionTree

# -- constants that bits depend on --------------------------------------------------------------------------------------------------

ROWS = 64  # rows of one step of a product on a CPU: a multiple of every micro-tile seen, so that a row's position does not matter
STEP = 128  # k of one step: short enough that no BLAS splits it further
COLUMNS = 16  # columns of one step are filled up to a multiple: with 5, 7 or 9 of them MKL adds a row by its position

# Attention's forward, keys counted from the sequence's first: a softmax is rescaled once a block; a leaf starts anew; leaves of a node are
# merged as a chain, nodes by tree.py. kernels/attention and reference/attention.py say how.
ATTENTION_BLOCK = 64  # keys
ATTENTION_LEAF = 512  # keys
ATTENTION_NODE = 8  # leaves
ATTENTION_ROW = (1, 8, 16, 32, 2, 4)  # the sum over a block's keys: columns in this distance are added, in this order

# tanh of a capped score: t = clamp(t, +-LIMIT), z = t^2, t P(z) / Q(z), clamped to +-1; P and Q by Horner's rule in fma, lowest coefficient
# last. Within 4e-7 of tanh (TANH_P, TANH_Q: a minimax quotient of relative error 2e-8, rounded to float32).
TANH_LIMIT = 9.0
TANH_P = (1.0, 0.1338101327419281, 0.0034955739974975586, 2.0608851627912372e-05, 1.3354352290662064e-08)
TANH_Q = (1.0, 0.46714329719543457, 0.025876928120851517, 0.00032856117468327284, 7.776429242767335e-07)

# Its backward. Bytes of an element -> head width up to -> (queries, keys) of a block of dq, (keys, queries) of one of dk and dv.
ATTENTION_BLOCKS = {
    2: {
        64: ((128, 64), (128, 64)),
        128: ((64, 64), (128, 64)),
        256: ((64, 32), (64, 32)),
    },
    4: {
        128: ((32, 32), (32, 32)),
        256: ((16, 16), (16, 16)),
    },
}


# -- orders inside a leaf -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """How the terms of one leaf (or of a sum without leaves) are added."""

    name: str
    rule: str  # one sentence
    constants: tuple = ()


CHAIN = Order(
    "chain",
    "fp32 from zero in increasing index: tensor-core steps on a GPU, steps of ROWS rows by STEP terms on a CPU",
    (ROWS, STEP, COLUMNS),
)
PAIRS = Order("row tree", "the left-complete binary tree down to single elements, in fp32 additions")
OCCURRENCES = Order("occurrences", "fp32 from zero, one addition for each occurrence in token order")
LEAVES_OF_KEYS = Order(
    "leaves of keys",
    "FlashAttention-2's recurrence in fp32 over blocks of keys, by leaves; leaves of a node in a chain, nodes by the left-complete tree",
    (ATTENTION_BLOCK, ATTENTION_LEAF, ATTENTION_NODE, ATTENTION_ROW),
)
LEAVES_OF_SOME_KEYS = Order(
    "leaves of some keys",
    "leaves of keys at the same places, whatever a sliding window hides; a capped score is cap tanh(score scale / cap), tanh a quotient of "
    "polynomials in fixed IEEE operations; a sink is merged last, as one more key without a value",
    (LEAVES_OF_KEYS.constants, TANH_LIMIT, TANH_P, TANH_Q),
)
BLOCKS = Order(
    "blocks",
    "FlashAttention-2's backward recurrences in fp32 over fixed blocks in increasing order",
    tuple((size, tuple(widths.items())) for size, widths in ATTENTION_BLOCKS.items()),
)
EXACT = Order("exact", "squares as integers: no rounding before the last, hence no order")

# What the nodes above the leaves are rounded to.
BY_TREE = "node_dtype"  # the tree's own: activations, whose bytes on the wire count
FLOAT32 = "float32"  # whatever the tree says: small payloads
NO_TREE = "-"  # no leaves: the whole sum is one order


# -- the table ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """One sum of one function.

    Attributes:
        op: the function (and module) it belongs to.
        result: what it gives.
        over: the dimension summed over.
        cut_by: what shards that dimension between ranks; "-" where every rank has all of it.
        order: inside a leaf.
        nodes: BY_TREE, FLOAT32, or NO_TREE where nothing cuts it and it has no leaves.
    """

    op: str
    result: str
    over: str
    cut_by: str
    order: Order
    nodes: str

    def tree(self, tree: ReductionTree) -> ReductionTree:
        """The tree of this sum, given the tree that a caller passed. ValueError for a sum without leaves."""
        if self.nodes == NO_TREE:
            raise ValueError(f"{self.result} of {self.op} has no leaves; it is one {self.order.name}")
        return tree if self.nodes == BY_TREE else tree.with_float32_nodes()


COLUMN_Y = Sum("column_parallel_linear", "y", "in-features", "-", CHAIN, NO_TREE)
COLUMN_DX = Sum("column_parallel_linear", "dx", "out-features", "tensor parallelism", CHAIN, BY_TREE)
COLUMN_DW = Sum("column_parallel_linear", "dweight (added to main_grad in fp32, not rounded)", "tokens", "-", CHAIN, NO_TREE)
COLUMN_DB = Sum("column_parallel_linear", "dbias", "tokens", "-", PAIRS, FLOAT32)
ROW_Y = Sum("row_parallel_linear", "y", "in-features", "tensor parallelism", CHAIN, BY_TREE)
ROW_DX = Sum("row_parallel_linear", "dx", "out-features", "-", CHAIN, NO_TREE)
ROW_DW = Sum("row_parallel_linear", "dweight (added to main_grad in fp32, not rounded)", "tokens", "-", CHAIN, NO_TREE)
ROW_DB = Sum("row_parallel_linear", "dbias", "tokens", "-", PAIRS, FLOAT32)
NORM_ROW = Sum("rms_norm, layer_norm", "mean, mean square, dx", "hidden", "-", PAIRS, NO_TREE)
NORM_DW = Sum("rms_norm, layer_norm", "dweight, dbias", "tokens, or heads and tokens", "sequence or tensor parallelism", PAIRS, FLOAT32)
EMBEDDING_DW = Sum("vocab_parallel_embedding", "dweight", "tokens of one id", "-", OCCURRENCES, NO_TREE)
VOCABULARY = Sum(
    "vocab_parallel_cross_entropy, vocab_parallel_log_probs",
    "sum of exp, sum of logits",
    "vocabulary",
    "tensor parallelism",
    PAIRS,
    FLOAT32,
)
ATTENTION_OUT = Sum("core_attention, packed_attention, paged_attention", "out", "keys", "-", LEAVES_OF_KEYS, NO_TREE)
ATTENTION_DQ = Sum("core_attention, packed_attention", "dquery", "keys", "-", BLOCKS, NO_TREE)
ATTENTION_DKV = Sum("core_attention, packed_attention", "dkey, dvalue", "queries, then heads of a group", "-", BLOCKS, NO_TREE)
ATTENTION_SOME = Sum(
    "core_attention, packed_attention, paged_attention",
    "out with sliding_window, softcap or sinks",
    "keys, and a sink",
    "-",
    LEAVES_OF_SOME_KEYS,
    NO_TREE,
)
ATTENTION_DSINKS = Sum("core_attention, packed_attention", "dsinks", "queries of the batch", "-", PAIRS, NO_TREE)
COLLECTIVE = Sum("tree_all_reduce, tree_reduce_scatter", "sum", "leaves of the caller's", "the group", CHAIN, BY_TREE)
GRAD_NORM = Sum("grad_norm, clip_grad_norm_", "sum of squares", "all gradients", "any sharding", EXACT, NO_TREE)

SUMS = (
    COLUMN_Y, COLUMN_DX, COLUMN_DW, COLUMN_DB, ROW_Y, ROW_DX, ROW_DW, ROW_DB, NORM_ROW, NORM_DW, EMBEDDING_DW, VOCABULARY,
    ATTENTION_OUT, ATTENTION_DQ, ATTENTION_DKV, ATTENTION_SOME, ATTENTION_DSINKS, COLLECTIVE, GRAD_NORM,
)  # fmt: skip


@functools.cache
def table_digest() -> str:
    """Eight hexadecimal digits of the table and its constants."""
    return hashlib.sha256(repr((SUMS, ROWS, STEP, COLUMNS)).encode()).hexdigest()[:8]


def fingerprint(tree: ReductionTree, **facts: str) -> str:
    """Names every order of additions: the tree's own fingerprint, the digest of the table, and ``facts`` that the bytes depend on too.

    ``fingerprint(ReductionTree(8))`` is "tpinv1-rfc6962-L8-float32-sums.1a2b3c4d"; ``fingerprint(tree, chip="NVIDIA H100", torch="2.13.0")``
    appends "-chip.NVIDIA H100-torch.2.13.0". Two sides that must agree compare the strings and fail closed.
    """
    return "-".join([tree.fingerprint, f"sums.{table_digest()}", *(f"{name}.{value}" for name, value in facts.items())])


def markdown() -> str:
    """The table for documents: one row a sum, then the orders."""
    lines = ["| function | result | sums over | cut by | inside a leaf | nodes |", "|---|---|---|---|---|---|"]
    for row in SUMS:
        functions = ", ".join(f"`{name}`" for name in row.op.split(", "))
        lines.append(f"| {functions} | {row.result} | {row.over} | {row.cut_by} | {row.order.name} | {row.nodes} |")
    lines += ["", *(f"- {order.name}: {order.rule}" for order in dict.fromkeys(row.order for row in SUMS))]
    return "\n".join(lines) + "\n"

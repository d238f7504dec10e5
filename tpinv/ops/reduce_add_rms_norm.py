"""What follows a row-parallel product of a transformer block, in one call: all-reduce, residual add, RMSNorm.

For inference (no gradient). Decode spends its time on launches and on small messages; where the ranks share memory and the message
is small this is one kernel, elsewhere it is the separate operations. The bytes are the same, so that a trainer may use
those and a rollout engine this.
"""

from torch import Tensor

from tpinv import reference
from tpinv.collectives import Ranks, all_reduce_add_norm, chip, ranks_for, sum_over_ranks
from tpinv.collectives.tree_reduce import check_values
from tpinv.ops.arguments import check_eps, problem_of_eps, problem_of_tree, require, tree_of
from tpinv.ops.registry import group_name, ranks_of, register
from tpinv.ops.rms_norm import rms_norm
from tpinv.tree import ReductionTree

NAME = "reduce_add_rms_norm"


def reduce_add_rms_norm(
    values: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, *, tree: ReductionTree, group=None
) -> tuple[Tensor, Tensor]:
    """``hidden = residual + tree_all_reduce(values, out_dtype=residual.dtype)`` and ``rms_norm(hidden, weight, eps)``, bit for bit.

    Args:
        values: [S, ..., H] in the tree's node dtype, this rank's subtree values, as tree_all_reduce takes them.
        residual: [..., H]; weight: [H]. float32, bfloat16 or float16; whole and the same on every rank.

    Returns:
        hidden and its norm, [..., H] in residual's dtype. Neither has a gradient.

    Raises:
        ValueError, on every rank: shapes that do not fit or differ between ranks, a tensor that requires a gradient, or what
            tree_all_reduce raises.
    """
    ranks = ranks_for(NAME, group)
    require(ranks, NAME, problem_of_tree(tree) or problem_of_eps(eps))
    return OPERATOR(values, residual, weight, eps, tree.leaves, tree.node_dtype, group_name(ranks), ranks=ranks)


def _check(values, residual, weight, eps, leaves, node_dtype, group) -> None:
    if values.shape[1:] != residual.shape or residual.dim() < 1 or weight.shape != residual.shape[-1:]:
        raise ValueError(
            f"values {tuple(values.shape)}, residual {tuple(residual.shape)}, weight {tuple(weight.shape)} must be [S, ..., H], [..., H], [H]"
        )
    reference.check_dtypes(residual=residual)
    reference.check_dtypes(weight=weight)
    check_eps(eps)
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    check_values(values, tree, ranks)


def _forward(values, residual, weight, eps, leaves, node_dtype, group) -> tuple[Tensor, Tensor]:
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    return add_norm(values, residual, weight, eps, tree, ranks)


def _settings(_, values, residual, weight, eps, leaves, node_dtype, group) -> tuple:
    """Not the number of values: that of a rank's subtrees is its own."""
    return (
        ("values", values.shape[1:]), ("residual", residual.shape), ("dtype", residual.dtype), ("weight", weight.shape),
        ("dtype of weight", weight.dtype), ("eps", eps), ("leaves", leaves), ("node_dtype", node_dtype), ("chip", chip(values.device)),
    )  # fmt: skip


def add_norm(values: Tensor, residual: Tensor, weight: Tensor, eps: float, tree: ReductionTree, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Fused where the ranks share memory, else one by one."""
    if fused := all_reduce_add_norm(values, residual, weight, eps, tree=tree, ranks=ranks):
        return fused
    hidden = residual + sum_over_ranks(values, tree, ranks, residual.dtype)
    return hidden, rms_norm(hidden, weight, eps, tree=tree)


def fake_hidden(residual: Tensor) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


OPERATOR = register(
    f"{NAME}(Tensor values, Tensor residual, Tensor weight, float eps, int leaves, str node_dtype, str group) -> (Tensor, Tensor)",
    check=_check,
    forward=_forward,
    fake=lambda values, residual, *_: fake_hidden(residual),
    settings=_settings,
)

"""What stands between two linears of a transformer block, in one call, for inference: row-parallel product, all-reduce, residual add, RMSNorm."""

from torch import Tensor

from tpinv import contract, reference
from tpinv.collectives import ranks_for
from tpinv.ops import products
from tpinv.ops.arguments import check_eps, problem_of_eps, problem_of_tree, require, tree_of
from tpinv.ops.reduce_add_rms_norm import add_norm, fake_hidden
from tpinv.ops.registry import group_name, ranks_of, register
from tpinv.ops.shapes import rows
from tpinv.tree import ReductionTree

NAME = "row_parallel_add_rms_norm"


def row_parallel_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float = 1e-5, *, tree: ReductionTree, group=None
) -> tuple[Tensor, Tensor]:
    """``hidden = residual + row_parallel_linear(x, weight)`` and ``rms_norm(hidden, norm_weight, eps)``, bit for bit.

    x [..., K/p], weight [N, K/p] and residual [..., N] share a dtype. Returns and raises as :func:`reduce_add_rms_norm`.
    """
    ranks = ranks_for(NAME, group)
    require(ranks, NAME, problem_of_tree(tree) or problem_of_eps(eps))
    return OPERATOR(x, weight, residual, norm_weight, eps, tree.leaves, tree.node_dtype, group_name(ranks), ranks=ranks)


def _check(x, weight, residual, norm_weight, eps, leaves, node_dtype, group) -> None:
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must both end in this rank's in-features")
    if residual.shape != (*x.shape[:-1], weight.shape[0]) or norm_weight.shape != weight.shape[:1]:
        raise ValueError(
            f"residual {tuple(residual.shape)} and norm_weight {tuple(norm_weight.shape)} must be {(*x.shape[:-1], weight.shape[0])} "
            f"and [{weight.shape[0]}], as x {tuple(x.shape)} and weight {tuple(weight.shape)} are"
        )
    reference.check_dtypes(x=x, weight=weight, residual=residual)
    reference.check_dtypes(norm_weight=norm_weight)
    check_eps(eps)
    tree.owned(ranks.rank, ranks.size)
    tree.leaf_length(weight.shape[1] * ranks.size, "in_features")


def _forward(x, weight, residual, norm_weight, eps, leaves, node_dtype, group) -> tuple[Tensor, Tensor]:
    tree, ranks = contract.ROW_Y.tree(tree_of(leaves, node_dtype)), ranks_of(group)
    values = products.tree_product(rows(x), weight.t(), tree, ranks)
    values = values.view(len(values), *x.shape[:-1], weight.shape[0])
    return add_norm(values, residual, norm_weight, eps, tree, ranks)


OPERATOR = register(
    f"{NAME}(Tensor x, Tensor weight, Tensor residual, Tensor norm_weight, float eps, int leaves, str node_dtype, str group) "
    "-> (Tensor, Tensor)",
    check=_check,
    forward=_forward,
    fake=lambda x, weight, residual, *_: fake_hidden(residual),
)

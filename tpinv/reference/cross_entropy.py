"""Softmax statistics and gradients over a rank's part of the vocabulary. Signatures of kernels/rows/cross_entropy.py."""

from torch import Tensor

from tpinv.reference.sums import tree_sum
from tpinv.tree import ReductionTree


def row_max(x: Tensor) -> Tensor:
    """x [M, V/p], at least one column -> float32 [M]; NaN where a row has one."""
    return x.float().amax(-1)


def vocab_sums(x: Tensor, top: Tensor, tree: ReductionTree, rank: int, ranks: int, shifted: bool) -> list[Tensor]:
    """Values [S, M] of this rank's subtrees: (the sum of x - top if ``shifted``,) the sum of exp(x - top)."""
    below_top = x.float() - top.unsqueeze(-1)
    sums = [tree_sum(below_top, tree, rank, ranks, dim=-1)] if shifted else []
    return [*sums, tree_sum(below_top.exp_(), tree, rank, ranks, dim=-1)]  # in place: logits are large


def vocab_grad(x: Tensor, top: Tensor, total: Tensor, index: Tensor, dloss: Tensor, hit: float, smooth: float) -> Tensor:
    """(exp(x - top) / total - hit [column = index] - smooth) dloss, [M, V/p] in x's dtype.

    index int64 [M]: the target's column here, -1 where it is on another rank, -2 where it is ignored: the gradient is 0 there.
    """
    dx = (x.float() - top.unsqueeze(-1)).exp_().div_(total.unsqueeze(-1))
    at, here = index.clamp(min=0).unsqueeze(-1), (index >= 0).float().unsqueeze(-1)
    dx.scatter_(-1, at, dx.gather(-1, at) - hit * here)
    if smooth:
        dx -= smooth
    dx = dx.mul_(dloss.unsqueeze(-1)).masked_fill_((index == -2).unsqueeze(-1), 0.0)
    return dx.to(x.dtype).contiguous()

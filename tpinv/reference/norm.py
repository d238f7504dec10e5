"""RMSNorm and LayerNorm in fp32, each result rounded once. Signatures and bits, but for rsqrt, of kernels/rows/norm.py.

    norm            y
    norm_backward   dx, and the sums over rows that are the gradients of weight and bias

Sums over a row are row trees; those over rows are the tree over tokens, or heads and tokens, of which a rank gives its subtrees' values.
"""

import torch
from torch import Tensor

from tpinv.reference.sums import column_sum, row_sum
from tpinv.tree import ReductionTree


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    """x [M, H], weight and bias [H] -> y [M, H] in x's dtype. ``center``: LayerNorm, else RMSNorm."""
    normalised, _ = _normalise(x.float(), eps, center)
    y = normalised * weight.float()
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype)


def norm_backward(
    x: Tensor, weight: Tensor, dy: Tensor, eps: float, center: bool, tree: ReductionTree, rank: int, ranks: int,
    *, heads: int = 1, bias: bool = False, terms: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx [M, H] in x's dtype, and the values [S, H] (with ``bias`` [S, 2 H]: weight's, then bias's) of this rank's subtrees.

    x, dy [M, H], rows (token, head) in memory; the sum over rows takes them in the order (head, token), so that a rank's are consecutive.
    Without ``terms`` the second is None.
    """
    normalised, scale = _normalise(x.float(), eps, center)
    dy = dy.float()
    g = dy * weight.float()
    dx = g - normalised * (row_sum(g * normalised) / g.shape[-1]).unsqueeze(-1)
    if center:
        dx = dx - (row_sum(g) / g.shape[-1]).unsqueeze(-1)
    dx = (dx * scale).to(x.dtype)
    if not terms:
        return dx, None
    summed = torch.cat([dy * normalised, dy], dim=-1) if bias else dy * normalised
    if heads > 1:
        summed = summed.view(-1, heads, summed.shape[-1]).transpose(0, 1).reshape(summed.shape)
    return dx, column_sum(summed, tree, rank, ranks)


def _normalise(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """fp32 rows [M, H] -> normalised rows and 1/sqrt(mean square + eps) [M, 1]."""
    if center:
        x = x - (row_sum(x) / x.shape[-1]).unsqueeze(-1)
    scale = torch.rsqrt(row_sum(x * x) / x.shape[-1] + eps).unsqueeze(-1)
    return x * scale, scale

"""RMSNorm and LayerNorm. The rows are local; what crosses ranks is the gradient of the parameters, a sum over all rows.

    rows whole on every rank             tree over tokens, finished locally
    sequence_parallel (tokens sharded)   the same tree over tokens, finished across ranks: the same bits
    heads_parallel (q/k norm)            the rows in the order (head, token): tree over heads, tokens below them

It is finished inside backward, once per micro-batch: adding micro-batches up first and reducing after them, as stock
frameworks do, is another order. Everything is computed in fp32 and each result is rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpinv import reference
from tpinv.collectives import Ranks, resolve, tree_all_reduce
from tpinv.ops import products
from tpinv.ops.shapes import output, rows
from tpinv.tree import ReductionTree


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    tree: ReductionTree,
    group=None,
    sequence_parallel: bool = False,
    heads_parallel: bool = False,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [..., H]; weight: [H], whole on every rank. float32, bfloat16 or float16; the two may differ.
        tree: orders the sum over rows in the gradient of weight.
        group: the ranks that share the rows; only used with one of the two flags.
        sequence_parallel: dimension 0 of x is this rank's p-th part of the tokens.
        heads_parallel: x is [..., heads/p, H] and this rank holds a p-th part of the heads (Megatron's q/k norms).

    Returns [..., H] in x's dtype. dx is local to a row; dweight sums over all rows of all ranks and is full on every rank.

    Raises:
        ValueError: shapes that do not fit, both flags at once, p not dividing the leaves.
    """
    return _norm(x, weight, None, eps, False, tree, group, sequence_parallel, heads_parallel)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    tree: ReductionTree,
    group=None,
    sequence_parallel: bool = False,
    heads_parallel: bool = False,
) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension. Everything else as in :func:`rms_norm`."""
    return _norm(x, weight, bias, eps, True, tree, group, sequence_parallel, heads_parallel)


def _norm(x, weight, bias, eps, center, tree, group, sequence_parallel, heads_parallel) -> Tensor:
    ranks = resolve(group if sequence_parallel or heads_parallel else _ALONE)
    check(x, weight, bias, tree, ranks, sequence_parallel, heads_parallel)
    return _Norm.apply(x, weight, bias, eps, center, tree.with_float32_nodes(), ranks, heads_parallel)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, tree: ReductionTree, ranks: Ranks, sequence_parallel: bool, heads_parallel: bool):
    """The errors of :func:`rms_norm`."""
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.shape[0] or (bias is not None and bias.shape != weight.shape):
        raise ValueError(f"x {tuple(x.shape)} must end in the length of weight {tuple(weight.shape)} and of the bias, if any")
    if sequence_parallel and heads_parallel:
        raise ValueError("rows are sharded either by tokens or by heads; set one of sequence_parallel and heads_parallel")
    if sequence_parallel and x.dim() < 2:
        raise ValueError(f"sequence_parallel needs x [tokens, ..., {weight.shape[0]}], got {tuple(x.shape)}")
    if heads_parallel and x.dim() < 2:
        raise ValueError(f"heads_parallel needs x [..., heads, {weight.shape[0]}], got {tuple(x.shape)}")
    reference.check_dtypes(x=x)
    reference.check_dtypes(weight=weight, bias=bias)
    tree.owned(ranks.rank, ranks.size)


_ALONE = Ranks(None, 0, 1)


def _statistics(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """fp32 rows [M, H] -> normalised rows and 1/sqrt(mean square + eps) [M, 1]."""
    if center:
        x = x - (reference.row_sum(x) / x.shape[-1]).unsqueeze(-1)
    scale = torch.rsqrt(reference.row_sum(x * x) / x.shape[-1] + eps).unsqueeze(-1)
    return x * scale, scale


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    """y in x's shape and dtype; what autograd and the torch operator (operators.py) share, as :func:`backward`."""
    if products.on_gpu(x):
        from tpinv.kernels.rows import norm

        bias = None if bias is None else bias.contiguous()
        return output(norm.norm(rows(x).contiguous(), weight.contiguous(), bias, eps, center), x.shape)
    normalised, _ = _statistics(rows(x).float(), eps, center)
    y = normalised * weight.float()
    y = y if bias is None else y + bias.float()
    return output(y.to(x.dtype), x.shape)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], eps: float, center: bool, tree: ReductionTree, ranks: Ranks,
    heads_parallel: bool, bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dweight and dbias, at least those that ``needs`` names."""
    needs_parameters = needs[1] or needs[2]
    if products.on_gpu(x):
        from tpinv.kernels.rows import norm

        heads = x.shape[-2] if heads_parallel else 1
        dx, values = norm.norm_backward(
            rows(x).contiguous(), weight.contiguous(), rows(dy).contiguous(), eps, center, tree, ranks.rank, ranks.size,
            heads=heads, bias=bias_dtype is not None, terms=needs_parameters,
        )  # fmt: skip
        return dx.view(x.shape), *_parameter_grads(values, weight, bias_dtype, tree, ranks)
    normalised, scale = _statistics(rows(x).float(), eps, center)
    dy = rows(dy).float()
    dx = values = None
    if needs[0]:
        g = dy * weight.float()
        dx = g - normalised * (reference.row_sum(g * normalised) / g.shape[-1]).unsqueeze(-1)
        if center:
            dx = dx - (reference.row_sum(g) / g.shape[-1]).unsqueeze(-1)
        dx = (dx * scale).to(x.dtype).view(x.shape)
    if needs_parameters:
        terms = dy * normalised if bias_dtype is None else torch.cat([dy * normalised, dy], dim=-1)
        if heads_parallel:  # rows in the order (head, token), so that a rank's rows are consecutive
            terms = rows(terms.view(*x.shape[:-1], terms.shape[-1]).movedim(-2, 0))
        values = products.column_sum(terms, tree, ranks)
    return dx, *_parameter_grads(values, weight, bias_dtype, tree, ranks)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, center, tree, ranks, heads_parallel):
        ctx.save_for_backward(x, weight)
        ctx.settings = eps, center, tree, ranks, heads_parallel, None if bias is None else bias.dtype
        return forward(x, weight, bias, eps, center)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *backward(dy, *ctx.saved_tensors, ctx.needs_input_grad, *ctx.settings), *([None] * 5)


def _parameter_grads(values: Tensor | None, weight: Tensor, bias_dtype: torch.dtype | None, tree: ReductionTree, ranks: Ranks):
    """This rank's subtree values [S, H] or, with a bias, [S, 2 H] -> the gradients of weight and bias, full on every rank."""
    if values is None:
        return None, None
    total = tree_all_reduce(values, tree=tree, group=ranks)
    dw = total[: weight.shape[0]].to(weight.dtype)
    return dw, None if bias_dtype is None else total[weight.shape[0] :].to(bias_dtype)

"""What RMSNorm and LayerNorm share. The rows are local; what crosses ranks is the gradient of the parameters, a sum over all rows.

    rows whole on every rank             tree over tokens, finished locally
    sequence_parallel (tokens sharded)   the same tree over tokens, finished across ranks: the same bits
    heads_parallel (q/k norm)            the rows in the order (head, token): tree over heads, tokens below them

It is finished inside backward, once per micro-batch: adding micro-batches up first and reducing after them, as stock
frameworks do, is another order. Everything is computed in fp32 and each result is rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tpinv import contract, reference
from tpinv.collectives import Ranks, ranks_for, sum_over_ranks
from tpinv.ops import products
from tpinv.ops.arguments import check_eps, problem_of_eps, problem_of_tree, require, tree_of
from tpinv.ops.registry import ALONE, agree_backward, group_name, ranks_of
from tpinv.ops.shapes import output, rows
from tpinv.tree import ReductionTree

SETTINGS = "float eps, int leaves, str group, bool sequence_parallel, bool heads_parallel"  # of an operator


def settings_of(name: str, eps: float, tree: ReductionTree, group, sequence_parallel: bool, heads_parallel: bool) -> tuple[Ranks, tuple]:
    """Who makes the call, and the public arguments as an operator takes them. The default group is nobody's business unless it shares the rows; a group that is
    given agrees on the flags even where they are not set, lest one rank alone sets them."""
    ranks = ALONE if group is None and sequence_parallel is False and heads_parallel is False else ranks_for(name, group)
    require(ranks, name, problem_of_tree(tree) or problem_of_eps(eps))
    return ranks, (eps, tree.leaves, group_name(ranks), sequence_parallel, heads_parallel)


def sharing(*arguments) -> Ranks:
    """The ranks that share the rows: those of an operator's ``group``, if it says how. They must hold equally many, which registry.py sees
    to: leaves are counted by that. ``arguments`` end in group, sequence_parallel and heads_parallel."""
    group, sequence_parallel, heads_parallel = arguments[-3:]
    return ranks_of(group) if sequence_parallel or heads_parallel else ALONE


def asked(*arguments) -> Ranks:
    """The ranks that make the call, whether they share the rows or not."""
    return ranks_of(arguments[-3])


def agreed(everything: Sequence[tuple], *arguments) -> Sequence[tuple]:
    """What those must have in common: everything, or the flags alone where none is set."""
    *_, sequence_parallel, heads_parallel = arguments
    flags = ("sequence_parallel", sequence_parallel), ("heads_parallel", heads_parallel)
    return everything if sequence_parallel or heads_parallel else flags


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps, leaves, group, sequence_parallel: bool, heads_parallel: bool) -> None:
    """The errors of both."""
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
    check_eps(eps)
    ranks = sharing(group, sequence_parallel, heads_parallel)
    tree_of(leaves).owned(ranks.rank, ranks.size)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    """y in x's shape and dtype. ``center``: LayerNorm."""
    bias = None if bias is None else bias.contiguous()
    y = products.rows_backend("norm", x).norm(rows(x).contiguous(), weight.contiguous(), bias, eps, center)
    return output(y, x.shape)


def backward(
    name: str, dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], eps: float, leaves: int, group: str, sequence_parallel: bool,
    heads_parallel: bool, center: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dweight and dbias, at least those that ``needs`` names."""
    tree, ranks = contract.NORM_DW.tree(tree_of(leaves)), sharing(group, sequence_parallel, heads_parallel)
    settings = eps, leaves, sequence_parallel, heads_parallel
    agree_backward(ranks, name, needs, settings, dy=dy, x=x)
    bias = len(needs) > 2 and needs[2]
    dx, values = products.rows_backend("norm", x).norm_backward(
        rows(x).contiguous(), weight.contiguous(), rows(dy).contiguous(), eps, center, tree, ranks.rank, ranks.size,
        heads=x.shape[-2] if heads_parallel else 1, bias=bias, terms=needs[1] or bias,
    )  # fmt: skip
    dx = dx.view(x.shape)
    if values is None:
        return dx, None, None
    total = sum_over_ranks(values, tree, ranks)  # [H] or, with a bias, [2 H], full on every rank
    dw = total[: weight.shape[0]].to(weight.dtype)
    return dx, dw, total[weight.shape[0] :].to(weight.dtype) if bias else None


def fake_gradients(dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], *_) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, weight)[: len(needs)]]

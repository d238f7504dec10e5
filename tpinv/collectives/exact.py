"""Collectives that move bits and never add floats: gather, select, maximum. Exact, hence invariant whatever the transport does.

``agreed``: the caller's ranks have agreed on a call that decides all arguments of this one, so that nothing is compared again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tpinv.collectives.agreement import agree, chip
from tpinv.collectives.group import Ranks
from tpinv.collectives.transport import all_gather_single, all_reduce, reduce_scatter_single


def all_gather(x: Tensor, ranks: Ranks, *, dim: int = 0, agreed: bool = False) -> Tensor:
    """Concatenates every rank's ``x`` along ``dim``, in rank order. [.., n, ..] -> [.., p n, ..]; any dtype, one shape on all ranks.

    Raises:
        ValueError: on every rank, as :func:`~tpinv.collectives.agreement.agree` does; ``x`` has no dimension ``dim``, or requires a gradient
            (with gradients enabled), which this collective does not have.
    """
    if not agreed:
        _agree("all_gather", x, ranks, ("dim", dim), check=lambda: _check_dim(x, dim))
    return x if ranks.size == 1 else _gather(x.movedim(dim, 0), ranks).movedim(0, dim)


def all_max(x: Tensor, ranks: Ranks, *, agreed: bool = False) -> Tensor:
    """Elementwise maximum over the ranks; NaN on any rank gives NaN (a MAX all-reduce may lose it, depending on rank order).
    Errors as of :func:`all_gather`."""
    if not agreed:
        _agree("all_max", x, ranks)
    return x if ranks.size == 1 else _gather(x.unsqueeze(0), ranks).amax(0)


def select_all_reduce(x: Tensor, owned: Tensor, ranks: Ranks, *, agreed: bool = False) -> Tensor:
    """Every element of the result is the bit pattern held by the one rank that owns it.

    ``x`` is any float tensor, ``owned`` a bool tensor that broadcasts to it; at most one rank owns an element, and one that
    nobody owns becomes +0.0. The bit patterns are added as integers (all but one are zero), so that -0.0 and NaN payloads
    survive: adding floats would turn -0.0 into +0.0 at every TP above one. The traffic is that of an all-reduce.

    Raises:
        ValueError: on every rank, as of :func:`all_gather`; or ``owned`` is not a bool tensor that broadcasts to ``x``.
    """
    if not agreed:
        _agree("select_all_reduce", x, ranks, check=lambda: _check_owned(x, owned))
    bits = _bits(x, owned)
    if ranks.size > 1:
        all_reduce(bits, ranks)
    return bits.view(x.dtype).view(x.shape)


def select_reduce_scatter(x: Tensor, owned: Tensor, ranks: Ranks, *, agreed: bool = False) -> Tensor:
    """Like :func:`select_all_reduce`, but rank r gets rows [r M/p, (r+1) M/p) of dimension 0: [M, ...] -> [M/p, ...]; p divides M."""

    def check():
        _check_owned(x, owned)
        if x.dim() < 1 or x.shape[0] % ranks.size:
            raise ValueError(f"x of shape {tuple(x.shape)} cannot be scattered: {ranks.size} ranks must divide dimension 0")

    if not agreed:
        _agree("select_reduce_scatter", x, ranks, check=check)
    bits = _bits(x, owned)
    if ranks.size > 1:
        bits, whole = bits.new_empty(bits.numel() // ranks.size), bits
        reduce_scatter_single(bits, whole, ranks)
    return bits.view(x.dtype).view(x.shape[0] // ranks.size, *x.shape[1:])


def _agree(name: str, x: Tensor, ranks: Ranks, *more: tuple, check: Callable[[], None] = lambda: None) -> None:
    def checks():
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"x {tuple(x.shape)} requires a gradient, which {name} does not have; call it under torch.no_grad()")
        check()

    if torch.compiler.is_compiling():  # the dtype and shape of a fake tensor; the graph's ranks compare nothing more
        checks()
        return
    agree(ranks, name, (("shape", x.shape), ("dtype", x.dtype), ("chip", chip(x.device)), *more), checks)


def _check_dim(x: Tensor, dim: int) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"x of shape {tuple(x.shape)} has no dimension {dim} to gather along")


def _check_owned(x: Tensor, owned: Tensor) -> None:
    fits = owned.dim() <= x.dim() and all(n in (1, m) for n, m in zip(owned.shape[::-1], x.shape[::-1], strict=False))
    if owned.dtype != torch.bool or not fits:
        raise ValueError(f"owned {tuple(owned.shape)} of {owned.dtype} must be a bool tensor that broadcasts to x {tuple(x.shape)}")


def _gather(x: Tensor, ranks: Ranks) -> Tensor:
    """[n, ...] -> [p n, ...], as bytes: a backend need not know the dtype."""
    out = x.new_empty((ranks.size * x.shape[0], *x.shape[1:]))
    all_gather_single(out.view(-1).view(torch.uint8), x.contiguous().view(-1).view(torch.uint8), ranks)
    return out


def _bits(x: Tensor, owned: Tensor) -> Tensor:
    """The bytes of ``x`` where it is owned, else zeros, flat: as int32 if every dimension-0 row is a multiple of 4 bytes, else as uint8
    (gloo and NCCL add both)."""
    size = x.element_size()
    bits = x.view(_INTEGERS[size]).masked_fill(~owned, 0)
    row_bytes = size * (x.numel() // max(1, x.shape[0]) if x.dim() else 1)
    return bits.contiguous().view(-1).view(torch.int32 if row_bytes % 4 == 0 else torch.uint8)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

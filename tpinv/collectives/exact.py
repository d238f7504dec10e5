"""Collectives that move bits and never add floats: gather, select, maximum. Exact, hence invariant whatever the transport does."""

import torch
import torch.distributed as dist
from torch import Tensor

from tpinv.collectives.group import Ranks, all_gather_single, reduce_scatter_single


def all_gather(x: Tensor, ranks: Ranks, *, dim: int = 0) -> Tensor:
    """Concatenates every rank's ``x`` along ``dim``, in rank order. [.., n, ..] -> [.., p n, ..]; all ranks pass one shape."""
    if ranks.size == 1:
        return x
    if dim:
        return all_gather(x.movedim(dim, 0), ranks).movedim(0, dim)
    out = x.new_empty((ranks.size * x.shape[0], *x.shape[1:]))
    all_gather_single(out, x.contiguous(), group=ranks.group)
    return out


def all_max(x: Tensor, ranks: Ranks) -> Tensor:
    """Elementwise maximum over the ranks; NaN on any rank gives NaN (a MAX all-reduce may lose it, depending on rank order)."""
    if ranks.size == 1:
        return x
    return all_gather(x.unsqueeze(0), ranks).amax(0)


def select_all_reduce(x: Tensor, owned: Tensor, ranks: Ranks) -> Tensor:
    """Every element of the result is the bit pattern held by the one rank that owns it.

    ``x`` is any float tensor, ``owned`` a bool tensor that broadcasts to it; at most one rank owns an element, and one that
    nobody owns becomes +0.0. The bit patterns are added as integers (all but one are zero), so that -0.0 and NaN payloads
    survive: adding floats would turn -0.0 into +0.0 at every TP above one. The traffic is that of an all-reduce.
    """
    bits = _bits(x.masked_fill(~owned, 0))
    if ranks.size > 1:
        dist.all_reduce(bits, group=ranks.group)
    return bits.view(x.dtype).view(x.shape)


def select_reduce_scatter(x: Tensor, owned: Tensor, ranks: Ranks) -> Tensor:
    """Like :func:`select_all_reduce`, but rank r gets rows [r M/p, (r+1) M/p) of dimension 0: [M, ...] -> [M/p, ...]."""
    bits = _bits(x.masked_fill(~owned, 0))
    if ranks.size == 1:
        return bits.view(x.dtype).view(x.shape)
    out = bits.new_empty(bits.numel() // ranks.size)
    reduce_scatter_single(out, bits, group=ranks.group)
    return out.view(x.dtype).view(x.shape[0] // ranks.size, *x.shape[1:])


def _bits(x: Tensor) -> Tensor:
    """The bytes of ``x``, flat, as int32 if every dimension-0 row is a multiple of 4 bytes, else as uint8 (gloo and NCCL add both)."""
    row_bytes = x.element_size() * (x.numel() // max(1, x.shape[0]) if x.dim() else 1)
    flat = x.contiguous().view(-1)
    return flat.view(torch.int32 if row_bytes % 4 == 0 else torch.uint8)

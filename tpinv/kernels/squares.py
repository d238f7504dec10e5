"""The exact sum of squares of gradients on the GPU: integers, so that no order and no sharding can change it.

The square of a float32 is a float64 without rounding, between 2^-298 and 2^256. That range is cut into bins of 24 bits. Adding
1.5 * 2^52 units of a bin to a float64 and taking them off again rounds it to a multiple of the unit; what is left is exact and
belongs to the bins below. The multiples are below 2^25 units, so a program's sum of them is exact in any order (below 2^53), and is
added to the bin's int64 counter by an integer atomic. Real gradients touch four or five bins.

``total`` carries the counters over to 24 bits each, which makes them the same numbers however the terms were grouped, and only
then adds them up as float64, from the smallest bin to the largest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.kernels.device import on_device_of_first

BINS = 24
_LOWEST = tl.constexpr(-298)
_BITS = tl.constexpr(24)
_BLOCK = 4096
_BLOCKS = 16  # of a program: 2^16 elements of at most 2^25 units
_SIZE = 32  # of the counters: BINS, a last carry, then infinities and NaNs at the end


@triton.jit
def _power(exponent):
    """2^exponent as float64, of an int64 tensor."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def squares_kernel(x_ptr, bins_ptr, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    slots = tl.arange(0, SIZE)
    sums = tl.zeros((SIZE,), tl.int64)
    for i in range(BLOCKS):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        size = tl.abs(x)
        finite = size < float("inf")
        infinities = tl.sum((size == float("inf")).to(tl.int32), 0)
        nans = tl.sum((x != x).to(tl.int32), 0)
        sums += tl.where(slots == SIZE - 2, infinities, 0) + tl.where(slots == SIZE - 1, nans, 0)
        wide = tl.where(finite, x, 0.0).to(tl.float64)
        rest = wide * wide
        largest = tl.max(rest, 0)
        while largest > 0.0:
            exponent = (largest.to(tl.int64, bitcast=True) >> 52) - 1023
            bin = (exponent - _LOWEST) // _BITS
            unit = bin * _BITS + _LOWEST
            anchor = 1.5 * _power(unit + 52)
            multiple = (rest + anchor) - anchor
            rest = rest - multiple
            units = (tl.sum(multiple, 0) * _power(-unit)).to(tl.int64)
            sums += tl.where(slots == bin, units, 0)
            largest = tl.max(tl.abs(rest), 0)
    tl.atomic_add(bins_ptr + slots, sums, mask=sums != 0, sem="relaxed")


@triton.jit
def total_kernel(bins_ptr, out_ptr, BINS: tl.constexpr):
    """One program: the counters as one float64."""
    carry = tl.full((), 0, tl.int64)
    total = tl.full((), 0.0, tl.float64)
    unit = tl.full((), _LOWEST, tl.int64)
    for bin in range(BINS + 1):
        value = tl.load(bins_ptr + bin) + carry
        carry = value >> _BITS
        digit = value - (carry << _BITS)
        total += digit.to(tl.float64) * _power(unit)
        unit += _BITS
    tl.store(out_ptr, total)


def counters(device: torch.device) -> Tensor:
    """Empty counters: int64, to be added up over the ranks as they are."""
    return torch.zeros(_SIZE, dtype=torch.int64, device=device)


@on_device_of_first
def add_squares(bins: Tensor, x: Tensor) -> None:
    """Adds the squares of all elements of ``x`` (float32, bfloat16 or float16) to ``bins``."""
    x = x.contiguous()
    if x.numel():
        squares_kernel[(triton.cdiv(x.numel(), _BLOCK * _BLOCKS),)](
            x, bins, x.numel(), BLOCK=_BLOCK, BLOCKS=_BLOCKS, SIZE=_SIZE, enable_fp_fusion=False
        )


@on_device_of_first
def total(bins: Tensor) -> Tensor:
    """float64 scalar: the sum, rounded where it needs more than 53 bits; NaN if there was one, else inf if there was one."""
    out = torch.empty((), dtype=torch.float64, device=bins.device)
    total_kernel[(1,)](bins, out, BINS=BINS, num_warps=1, enable_fp_fusion=False)
    infinities, nans = bins[-2:].unbind(0)
    return out.masked_fill(infinities > 0, float("inf")).masked_fill(nans > 0, float("nan"))

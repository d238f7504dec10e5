"""The exact sum of squares of gradients on the GPU: integers, so that no order and no sharding can change it.

The square of a float32 is a float64 without rounding, between 2^-298 and 2^256. That range is cut into bins of 20 bits. Adding
1.5 * 2^52 units of a bin to a float64 and taking them off again rounds it to a multiple of the unit; what is left is exact and
belongs to the bins below. A pass takes two bins at once: multiples of up to 2^40 units, of which float64 holds the sum of a block
exactly, in any order. It goes to the int64 counters of both bins by integer atomics. The first pass begins at the largest square
of a block; two passes leave nothing of bfloat16 gradients, four nothing of most others.

``total`` carries the counters over to 20 bits each, which makes them the same numbers however the terms were grouped, and only
then adds them up as float64, from the smallest bin to the largest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry

BINS = 28
_LOWEST = tl.constexpr(-298)
_BITS = tl.constexpr(20)
_INFINITY = tl.constexpr(0x7F800000)  # as bits; those of a NaN are above
_BLOCK = 1024  # times 2^40 is below 2^53
_BLOCKS = 64  # of a program
_SIZE = 32  # of the counters: BINS, a last carry, then infinities and NaNs at the end


@triton.jit
def _power(exponent):
    """2^exponent as float64, of an int64 tensor."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _pass(rest, sums, slots, bin):
    """Moves what ``bin`` and the one above hold of ``rest`` [BLOCK] to ``sums``. Everything is below the end of the one above."""
    unit = bin * _BITS + _LOWEST
    anchor = 1.5 * _power(unit + 52)
    multiple = (rest + anchor) - anchor
    units = (tl.sum(multiple, 0) * _power(-unit)).to(tl.int64)
    above = units >> _BITS
    sums += tl.where(slots == bin, units - (above << _BITS), 0) + tl.where(slots == bin + 1, above, 0)
    return rest - multiple, sums, bin - 2


@entry
@triton.jit
def squares_kernel(x_ptr, bins_ptr, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    lanes, slots = tl.arange(0, BLOCK), tl.arange(0, SIZE)
    sums = tl.zeros((SIZE,), tl.int64)
    for i in range(BLOCKS):
        start = first + i * BLOCK
        left = tl.minimum(count - start, BLOCK).to(tl.int32)
        x = tl.load(x_ptr + start + lanes, mask=lanes < left, other=0.0).to(tl.float32)
        size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # orders as the numbers do
        largest = tl.max(size, 0)
        if largest >= _INFINITY:
            infinities = tl.sum((size == _INFINITY).to(tl.int32), 0)
            nans = tl.sum((size > _INFINITY).to(tl.int32), 0)
            sums += tl.where(slots == SIZE - 2, infinities, 0) + tl.where(slots == SIZE - 1, nans, 0)
            size = tl.where(size < _INFINITY, size, 0)
            largest = tl.max(size, 0)
        wide = size.to(tl.float32, bitcast=True).to(tl.float64)
        rest = wide * wide
        highest = 2 * ((largest >> 23).to(tl.int64) - 127) + 1  # no square has a higher bit
        bin = (highest - _LOWEST) // _BITS - 1
        while largest > 0:
            rest, sums, bin = _pass(rest, sums, slots, bin)
            rest, sums, bin = _pass(rest, sums, slots, bin)
            largest = tl.max((rest.to(tl.int64, bitcast=True) >> 32).to(tl.int32) & 0x7FFFFFFF, 0)  # 0 if nothing is left
    tl.atomic_add(bins_ptr + slots, sums, mask=sums != 0, sem="relaxed")


@entry
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
    tl.store(out_ptr, tl.where(carry > 0, float("inf"), total))  # above 2^282: more than any float32 norm


def counters(device: torch.device) -> Tensor:
    """Empty counters: int64, to be added up over the ranks as they are."""
    return torch.zeros(_SIZE, dtype=torch.int64, device=device)


@on_device_of_first
def add_squares(bins: Tensor, x: Tensor) -> None:
    """Adds the squares of all elements of ``x`` (float32, bfloat16 or float16) to ``bins``."""
    x = x.contiguous()
    if x.numel():
        squares_kernel[(ceil_div(x.numel(), _BLOCK * _BLOCKS),)](
            x, bins, x.numel(), BLOCK=_BLOCK, BLOCKS=_BLOCKS, SIZE=_SIZE, num_warps=2, enable_fp_fusion=False
        )


@on_device_of_first
def total(bins: Tensor) -> Tensor:
    """float64 scalar: the sum, rounded where it needs more than 53 bits; NaN if there was one, else inf if there was one."""
    out = torch.empty((), dtype=torch.float64, device=bins.device)
    total_kernel[(1,)](bins, out, BINS=BINS, num_warps=1, enable_fp_fusion=False)
    infinities, nans = bins[-2:].unbind(0)
    return out.masked_fill(infinities > 0, float("inf")).masked_fill(nans > 0, float("nan"))

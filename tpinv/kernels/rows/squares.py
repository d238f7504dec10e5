"""The exact sum of squares of gradients on the GPU: integers, so that no order and no sharding can change it.

The square of a float32 is a float64 without rounding, between 2^-298 and 2^256. That range is cut into bins of 20 bits. A float64
that is added to 1.5 * 2^52 units of a bin is rounded to a multiple of the unit; what is left is exact and belongs to the bins below.
A pass takes two bins at once, multiples of up to 2^40 units; they go to the int64 counters of both bins by integer atomics.

Every lane keeps the anchors of four passes (three for numbers of 16 bits) and adds one square after the other to them: a sum stays within
2^51 units of its anchor, so it is exact in any order, and what it holds is taken off once, at the end. The first pass begins at the
largest square so far: where a larger one comes, the anchors move up. They leave nothing of numbers that are at least 2^-42 of the largest
of the program; where something is left, its part is added up again by passes that end when nothing is.

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
_BLOCKS = 64  # of a program: even, and times 2^40 below 2^51
_WARPS = 4
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


@triton.jit
def _load(x_ptr, start, lanes, count):
    """float32 [BLOCK] from ``start`` on, zeros after ``count``."""
    return tl.load(x_ptr + start + lanes, mask=lanes < tl.minimum(count - start, lanes.shape[0]).to(tl.int32), other=0.0).to(tl.float32)


@triton.jit
def _size(x):
    """The bits of the magnitude: they order as the numbers do."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _count_wild(x, sums, slots, SIZE: tl.constexpr):
    """Infinities and NaNs of ``x`` are counted, and zero from now on."""
    size = _size(x)
    infinities = tl.sum((size == _INFINITY).to(tl.int32), 0)
    nans = tl.sum((size > _INFINITY).to(tl.int32), 0)
    sums += tl.where(slots == SIZE - 2, infinities, 0) + tl.where(slots == SIZE - 1, nans, 0)
    return tl.where(size < _INFINITY, x, 0.0), sums


@triton.jit
def _bin_of(largest):
    """The lower one of the two bins that the square of ``largest`` (bits) ends in."""
    highest = 2 * ((largest >> 23).to(tl.int64) - 127) + 1  # no square has a higher bit
    return (highest - _LOWEST) // _BITS - 1


@triton.jit
def _until_nothing_is_left(x_ptr, first, count, lanes, slots, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """The counters [SIZE] of a program's part, block by block."""
    sums = tl.zeros((SIZE,), tl.int64)
    for i in range(BLOCKS):
        x = _load(x_ptr, first + i * lanes.shape[0], lanes, count)
        largest = tl.max(_size(x), 0)
        if largest >= _INFINITY:
            x, sums = _count_wild(x, sums, slots, SIZE)
            largest = tl.max(_size(x), 0)
        wide = x.to(tl.float64)
        rest = wide * wide
        bin = _bin_of(largest)
        while largest > 0:
            rest, sums, bin = _pass(rest, sums, slots, bin)
            rest, sums, bin = _pass(rest, sums, slots, bin)
            largest = tl.max((rest.to(tl.int64, bitcast=True) >> 32).to(tl.int32) & 0x7FFFFFFF, 0)  # 0 if nothing is left
    return sums


@triton.jit
def _anchor(like, bin):
    return tl.zeros_like(like) + 1.5 * _power(bin * _BITS + _LOWEST + 52)


@triton.jit
def _take_off(sums, slots, s, bin):
    """``sums`` and what the lanes ``s`` hold above the anchor of ``bin``."""
    units = tl.sum(((s - _anchor(s, bin)) * _power(-(bin * _BITS + _LOWEST))).to(tl.int64), 0)
    above = units >> _BITS
    return sums + tl.where(slots == bin, units - (above << _BITS), 0) + tl.where(slots == bin + 1, above, 0)


@triton.jit
def _add(s, rest):
    """(s + rest, what of ``rest`` that rounded off)."""
    t = s + rest
    return t, rest - (t - s)


@triton.jit
def _add_squares(x, s1, s2, s3, s4, left, FOUR: tl.constexpr):
    wide = x.to(tl.float64)
    t = tl.fma(wide, wide, s1)
    rest = tl.fma(wide, wide, s1 - t)  # exact
    s2, rest = _add(s2, rest)
    s3, rest = _add(s3, rest)
    if FOUR:
        s4, rest = _add(s4, rest)
    return t, s2, s3, s4, left | rest.to(tl.int64, bitcast=True)


@entry
@triton.jit
def squares_kernel(x_ptr, bins_ptr, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    lanes, slots = tl.arange(0, BLOCK), tl.arange(0, SIZE)
    FOUR: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    sums = tl.zeros((SIZE,), tl.int64)
    left = tl.zeros((BLOCK,), tl.int64)
    bin = tl.full((), 1, tl.int64)
    s1 = _anchor(tl.zeros((BLOCK,), tl.float64), bin)
    s2, s3, s4 = _anchor(s1, bin - 2), _anchor(s1, bin - 4), _anchor(s1, bin - 6)
    x0, x1 = _load(x_ptr, first, lanes, count), _load(x_ptr, first + BLOCK, lanes, count)
    for i in range(2, BLOCKS + 2, 2):
        start, end = first + i * BLOCK, tl.where(i < BLOCKS, count, 0)
        next0, next1 = _load(x_ptr, start, lanes, end), _load(x_ptr, start + BLOCK, lanes, end)
        largest = tl.max(tl.maximum(_size(x0), _size(x1)), 0)
        if largest >= _INFINITY:
            x0, sums = _count_wild(x0, sums, slots, SIZE)
            x1, sums = _count_wild(x1, sums, slots, SIZE)
            largest = tl.max(tl.maximum(_size(x0), _size(x1)), 0)
        if largest > 0:
            needed = _bin_of(largest)
            if needed > bin:
                sums = _take_off(_take_off(sums, slots, s1, bin), slots, s2, bin - 2)
                sums = _take_off(_take_off(sums, slots, s3, bin - 4), slots, s4, bin - 6)
                bin = needed
                s1, s2, s3, s4 = _anchor(s1, bin), _anchor(s1, bin - 2), _anchor(s1, bin - 4), _anchor(s1, bin - 6)
            s1, s2, s3, s4, left = _add_squares(x0, s1, s2, s3, s4, left, FOUR)
            s1, s2, s3, s4, left = _add_squares(x1, s1, s2, s3, s4, left, FOUR)
        x0, x1 = next0, next1
    sums = _take_off(_take_off(sums, slots, s1, bin), slots, s2, bin - 2)
    sums = _take_off(_take_off(sums, slots, s3, bin - 4), slots, s4, bin - 6)
    if tl.max((left != 0).to(tl.int32), 0) > 0:
        sums = _until_nothing_is_left(x_ptr, first, count, lanes, slots, BLOCKS, SIZE)
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
            x, bins, x.numel(), BLOCK=_BLOCK, BLOCKS=_BLOCKS, SIZE=_SIZE, num_warps=_WARPS, enable_fp_fusion=False
        )


@on_device_of_first
def total(bins: Tensor) -> Tensor:
    """float64 scalar: the sum, rounded where it needs more than 53 bits; NaN if there was one, else inf if there was one."""
    out = torch.empty((), dtype=torch.float64, device=bins.device)
    total_kernel[(1,)](bins, out, BINS=BINS, num_warps=1, enable_fp_fusion=False)
    infinities, nans = bins[-2:].unbind(0)
    return out.masked_fill(infinities > 0, float("inf")).masked_fill(nans > 0, float("nan"))

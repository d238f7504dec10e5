"""Sums of squares of floats, exact: terms are integers times powers of two, and integers are added.

The square of a float32 has at most 48 significant bits. The terms are added into 39 limbs of 16 bits that span the whole range of float32
squares. Integer addition commutes and associates: any sharding, any order give the same limbs. (A GPU counts in other limbs,
kernels/rows/squares.py: as exact, but the float64 may round differently.)
"""

import torch
from torch import Tensor

LIMB_BITS = 16
LOWEST_EXPONENT = -352  # of limb 0: below 2^-298 * 2^-48, the last bit of the smallest square
LIMBS = 39  # up to 2^(16 * 39 - 352), above the largest square
PIECE = 1 << 22  # elements squared at a time, to bound the scratch memory


def counters(device: torch.device) -> Tensor:
    """Empty limbs [LIMBS + 2], int64, to be added up over the ranks as they are; the last two count infinities and NaNs."""
    return torch.zeros(LIMBS + 2, dtype=torch.int64, device=device)


def add_squares(limbs: Tensor, x: Tensor) -> None:
    """Adds the squares of all elements of ``x`` (float32, bfloat16 or float16) to ``limbs``."""
    for piece in x.reshape(-1).split(PIECE):
        _add_squares(limbs, piece)


def total(limbs: Tensor) -> Tensor:
    """float64 scalar: the sum, rounded where it needs more than 53 bits; NaN if there was one, else inf if there was one."""
    exponents = LOWEST_EXPONENT + LIMB_BITS * torch.arange(LIMBS, dtype=torch.float64, device=limbs.device)
    total = torch.zeros((), dtype=torch.float64, device=limbs.device)
    for term in (limbs[:LIMBS].double() * torch.exp2(exponents)).unbind(0):
        total = total + term  # from the smallest limb up: one fixed order, a rounding only above 53 bits
    infinite, nan = limbs[LIMBS:].unbind(0)
    return total.masked_fill(infinite > 0, float("inf")).masked_fill(nan > 0, float("nan"))


def _add_squares(limbs: Tensor, x: Tensor) -> None:
    square = x.double().square()  # exact: 24 + 24 bits
    finite = square.isfinite()
    limbs[LIMBS] += square.isinf().sum()
    limbs[LIMBS + 1] += square.isnan().sum()
    mantissa, exponent = torch.frexp(square.masked_fill(~finite, 0.0))
    integer = torch.ldexp(mantissa, torch.tensor(48, device=x.device)).long()  # below 2^48, exact
    position = exponent.long() - 48 - LOWEST_EXPONENT
    integer <<= position % LIMB_BITS  # below 2^63
    limb = position // LIMB_BITS
    for i in range(4):
        limbs.index_add_(0, limb + i, (integer >> (LIMB_BITS * i)) & ((1 << LIMB_BITS) - 1))

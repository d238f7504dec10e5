"""Equality of bytes. ``torch.equal`` takes -0.0 for 0.0 and no NaN for itself; an invariance claim is about bytes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """How two tensors of one shape and dtype differ. ``count`` is 0 when they are the same bytes.

    ``max_ulp`` is the largest difference in units of the last place of the tensor's largest magnitude, over elements that are finite in
    both: 1 is the last bit of the largest value, whatever the tensor's scale, so that layers can be ranked by it. (The number of values
    between two elements, :func:`ulp_distance`, ranks nothing: between 1e-9 and -1e-9 there are two thousand million.) ``nonfinite``
    counts the differing elements that are NaN or infinite in one or both.
    """

    count: int
    total: int
    index: tuple[int, ...] | None = None
    actual: float | None = None
    expected: float | None = None
    max_ulp: float = 0.0
    nonfinite: int = 0

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def distance(self) -> str:
        """For tables: "3 ulp", "NaN or inf in 2", or both."""
        nonfinite = f"NaN or inf in {self.nonfinite}" if self.nonfinite else ""
        return ", ".join(filter(None, (nonfinite, f"{self.max_ulp:.3g} ulp" if self.nonfinite < self.count or not nonfinite else "")))

    def __str__(self) -> str:
        if not self:
            return f"the same bytes in all {self.total} elements"
        return (
            f"{self.count} of {self.total} elements differ in their bytes, first at {list(self.index)}: "
            f"{self.actual!r} != {self.expected!r}; at most {self.distance} of the largest value"
        )


def compare(actual: Tensor, expected: Tensor, *, unit: float | None = None) -> Difference:
    """Byte comparison. ``unit``: what an ulp is for ``max_ulp``, where the tensors are parts of larger ones (default: :func:`ulp_of`
    both). ValueError when shape or dtype differ. Tensors may be on different devices."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ValueError(
            f"only tensors of one shape and dtype can be compared: {tuple(actual.shape)} {actual.dtype} and {tuple(expected.shape)} {expected.dtype}"
        )
    if actual.device != expected.device:
        actual, expected = actual.cpu(), expected.cpu()
    actual, expected = actual.detach().contiguous(), expected.detach().contiguous()
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    integer = _INTEGERS[actual.element_size()]
    wrong = actual.view(integer) != expected.view(integer)
    count = int(wrong.sum())
    if not count:
        return Difference(0, actual.numel())
    index = tuple(wrong.nonzero()[0].tolist())
    distances = scaled_distance(actual[wrong], expected[wrong], ulp_of(actual, expected) if unit is None else unit)
    finite = distances[distances.isfinite()]
    largest = float(finite.max()) if len(finite) else 0.0
    return Difference(count, actual.numel(), index, actual[index].item(), expected[index].item(), largest, len(distances) - len(finite))


def ulp_of(*tensors: Tensor) -> float:
    """One unit in the last place of the largest finite magnitude in ``tensors``, which are of one dtype: 2^-23 for float32 values below 2.
    1 for dtypes that are not floating-point."""
    dtype = tensors[0].dtype
    if not dtype.is_floating_point:
        return 1.0
    info, largest = torch.finfo(dtype), 0.0
    for tensor in tensors:
        magnitudes = tensor.detach().double().abs()
        magnitudes = magnitudes[magnitudes.isfinite()]
        largest = max(largest, float(magnitudes.max()) if magnitudes.numel() else 0.0)
    return info.eps * 2.0 ** (math.frexp(max(largest, info.smallest_normal))[1] - 1)


def scaled_distance(a: Tensor, b: Tensor, unit: float) -> Tensor:
    """|a - b| / ``unit``, elementwise, float64; infinite where a or b is NaN or infinite."""
    a, b = (x.detach().double().cpu() for x in (a, b))
    return torch.where(a.isfinite() & b.isfinite(), (a / unit - b / unit).abs(), math.inf)


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """AssertionError unless both are the same bytes, naming the count, the first coordinate, both values and the largest difference."""
    try:
        difference = compare(actual, expected)
    except ValueError as error:
        raise AssertionError(f"{name}: {error}") from None
    if difference:
        raise AssertionError(f"{name}: {difference}")


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """Number of representable values between a and b, elementwise, int64 (-0.0 and +0.0 are one apart). NaN counts as beyond inf."""
    integer = _INTEGERS[a.element_size()]

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(integer).long()
        lowest = -(1 << (8 * x.element_size() - 1))
        return torch.where(bits >= 0, bits, lowest - bits - 1)

    return (ordered(a) - ordered(b)).abs()

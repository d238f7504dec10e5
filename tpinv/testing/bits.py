"""Equality of bytes. ``torch.equal`` takes -0.0 for 0.0 and no NaN for itself; an invariance claim is about bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """How two tensors of one shape and dtype differ. ``count`` is 0 when they are the same bytes."""

    count: int
    total: int
    index: tuple[int, ...] | None = None
    actual: float | None = None
    expected: float | None = None
    max_ulp: int = 0

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        if not self:
            return f"the same bytes in all {self.total} elements"
        return (
            f"{self.count} of {self.total} elements differ in their bytes, first at {list(self.index)}: "
            f"{self.actual!r} != {self.expected!r}; at most {self.max_ulp} ulp"
        )


def compare(actual: Tensor, expected: Tensor) -> Difference:
    """Byte comparison. ValueError when shape or dtype differ. Tensors may be on different devices."""
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
    ulp = int(ulp_distance(actual[wrong], expected[wrong]).max()) if actual.is_floating_point() else 0
    return Difference(count, actual.numel(), index, actual[index].item(), expected[index].item(), ulp)


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """AssertionError unless both are the same bytes, naming the count, the first coordinate, both values and the largest ulp distance."""
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

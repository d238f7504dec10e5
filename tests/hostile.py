"""Inputs meant to break invariance, and what every test on ranks shares: cases, poison, and the comparison with p = 1.

A test file defines ``every_case()``, which runs on p ranks and returns ``{case: {name: this rank's tensor}}``, ours and the stock
twin's. The parent joins the parts and compares bytes with p = 1. Shapes divide by p = 2, 3, 4, 6, 8.
"""

import contextlib
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tpinv.layers import unshard
from tpinv.testing import assert_bitwise_equal, compare
from tpinv.tree import ReductionTree

RANKS = (2, 3, 4, 6, 8)
INEXACT = ("normal", "exponents", "cancellation")  # kinds on which another order of additions shows
KINDS = (*INEXACT, "specials", "nonfinite")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    dtype: str
    kind: str = "normal"
    sp: bool = False
    leaves: int = 24
    node_dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.dtype}-{self.kind}-{'sp' if self.sp else 'nosp'}-L{self.leaves}" + (
            "-bf16nodes" if self.node_dtype == "bfloat16" else ""
        )

    @property
    def tree(self) -> ReductionTree:
        return ReductionTree(self.leaves, self.node_dtype)

    def make(self, name: str, *shape: int) -> Tensor:
        """The whole tensor ``name``, the same on every rank and for SP on and off."""
        return hostile(self.kind, shape, DTYPES[self.dtype], seed=zlib.crc32(f"{name}{self.kind}".encode()))


CASES = [
    *(Case(dtype, kind, sp) for dtype in DTYPES for kind in KINDS for sp in (False, True)),
    *(Case("bf16", "exponents", sp, 24, "bfloat16") for sp in (False, True)),
    *(Case("fp32", "exponents", sp, leaves) for leaves in RANKS for sp in (False, True)),  # L = p among them
]
CASES_ON_RANKS = [(case, p) for case in CASES for p in RANKS if case.leaves % p == 0]


def hostile(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """normal; exponents from 2^-30 to 2^30; cancellation: +-10^4 in two thirds of the places; specials: -0.0, 0.0,
    subnormals among numbers of order 1; nonfinite: a few of inf, -inf and NaN among numbers of order 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "exponents":
        x *= torch.exp2(torch.randint(-30, 31, shape, generator=g).float())
    elif kind == "cancellation":
        x += 1e4 * torch.randint(-1, 2, shape, generator=g)
    elif kind == "specials":
        pool = torch.tensor([-0.0, 0.0, 2.0**-140, -(2.0**-127), 2.0**-149])
        pick = torch.randint(0, 10, shape, generator=g)
        x = torch.where(pick < len(pool), pool[pick.clamp(max=len(pool) - 1)], x)
    elif kind == "nonfinite":
        places = torch.randperm(x.numel(), generator=g)[:4].tolist() if x.numel() > 64 else []
        for place, value in zip(places, (float("inf"), float("-inf"), float("nan"), float("inf")), strict=False):
            x.view(-1)[place] = value
    return x.to(dtype)


@contextlib.contextmanager
def poison(on: bool):
    """While it is on, every torch.empty and new_empty starts as NaN (floats) or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch._C._set_deterministic_algorithms(on)  # the public setter imports all of inductor, seconds in every worker
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before)


def sum_of(x: Tensor) -> Tensor:
    """The stock twin's sum over ranks: gloo's all_reduce."""
    x = x.clone()
    dist.all_reduce(x)
    return x


def one_call(function: Callable, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, needs=(True, True, True)) -> dict[str, Tensor]:
    """y and the gradients dx, dw, db of those inputs that need one; the others get none."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needs, strict=True)]
    y = function(*leaves)
    if any(needs):
        y.backward(dy)
    assert [t.grad is not None for t in leaves] == list(needs)
    return {"y": y.detach(), **{f"d{n}": t.grad for n, t in zip("xwb", leaves, strict=True) if t.grad is not None}}


def join(results: list[Mapping], case, name: str, dim: int | tuple[int, int] | None) -> list[Tensor]:
    """What is to be compared with the whole: every rank's copy where ``dim`` is None, else the one joined tensor.
    ``dim`` may be (dim, stride)."""
    parts = [result[case][name] for result in results]
    return parts if dim is None else [unshard(parts, *(dim if isinstance(dim, tuple) else (dim,)))]


def assert_as_alone(results: list[Mapping], alone: list[Mapping], case, names: Mapping) -> None:
    """Bytes: p ranks' tensors ``names`` (name -> sharded dimension, with its stride, or None) are those of one rank, SP off."""
    expected = alone[0][case._replace(sp=False)]
    for name, dim in names.items():
        for actual in join(results, case, name, dim):
            assert_bitwise_equal(same_nan(actual), same_nan(expected[name]), f"{name} at p={len(results)}, {case}")


def same_nan(x: Tensor) -> Tensor:
    """One bit pattern for every NaN. IEEE 754 leaves sign and payload open, and torch's bf16 additions fill them in one way in
    the vector loop and in another in its tail, so that they depend on an element's address. Where a NaN is does not."""
    return x.masked_fill(x.isnan(), float("nan"))


def assert_twin_differs(results: list[Mapping], alone: list[Mapping], case, name: str, dim: int | None = None) -> None:
    """The stock layers, on the same inputs, do depend on p: without this the test above would prove nothing."""
    differing = [compare(actual, alone[0][case][name]).count for actual in join(results, case, name, dim)]
    assert all(differing), f"stock {name} at p={len(results)} has the bytes of p=1: the input cannot tell one order from another"

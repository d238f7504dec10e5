"""What a call costs the host the second time: a lookup, and its launches. A decode step and a sharded layer are too short to hide more.

Everything that shapes, strides, alignments and the tree decide is found out by the first call and kept (DeviceState.calls): the subtrees,
the configuration of each (tuner.py), and for sm90 kernels all of the launch but its pointers.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor

from tpinv.kernels.gemm import sm90, tuner
from tpinv.kernels.gemm import triton_gemm as gemm
from tpinv.kernels.gemm.problem import Problem, make_problems
from tpinv.runtime.device import on_device_of_first
from tpinv.runtime.state import device_state
from tpinv.tree import ReductionTree

_STATIC = [field.name for field in fields(Problem) if field.name not in ("a", "b", "out", "bias")]


@dataclass(frozen=True)
class _Launch:
    """One subtree of a call: where it begins, and how it is computed."""

    start: int  # along k
    plane: int  # of the output
    config: tuner.Config
    static: dict  # the fields of its Problem that are no tensors
    sm90: Callable | None  # takes the addresses of a, b, out and bias

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> None:
        if self.sm90 is None:
            gemm.run(Problem(a[:, self.start :], b.t()[:, self.start :], out[self.plane], bias, **self.static), self.config)
            return
        self.sm90(
            a.data_ptr() + self.start * a.stride(1) * a.element_size(),
            b.data_ptr() + self.start * b.stride(0) * b.element_size(),
            out.data_ptr() + self.plane * out.stride(0) * out.element_size(),
            None if bias is None else bias.data_ptr(),
        )


@on_device_of_first
def run(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, leaves: int, node_dtype: str, rank: int, ranks: int, pieces: int,
    precision: str, accumulate: bool = False,
) -> None:  # fmt: skip
    """``out`` [S, R, C] = (or, ``accumulate``, +=) the values of rank's subtrees of a [R, k] @ b [k, C]. Nothing in it is empty."""
    key = (
        a.shape, a.stride(), a.data_ptr() % 16, b.shape, b.stride(), b.data_ptr() % 16, out.stride(), out.data_ptr() % 16,
        a.dtype, out.dtype, -1 if bias is None else bias.data_ptr() % 16, leaves, node_dtype, rank, ranks, pieces, precision, accumulate,
    )  # fmt: skip
    launches = device_state(a.device.index).calls.get(key)
    if launches is None:
        launches = _first(
            key, make_problems(a, b.t(), out, bias, ReductionTree(leaves, node_dtype), rank, ranks, pieces, precision), accumulate
        )
        if launches is None:
            return
    for launch in launches:
        launch(a, b, out, bias)


def _first(key: tuple, problems: list[Problem], accumulate: bool) -> list[_Launch] | None:
    """Chooses and keeps the launches of a call. Where the tuner cannot choose, as in the capture of a graph, it computes: None."""
    problems = [replace(problem, accumulate=accumulate) for problem in problems]
    configs = [tuner.choose(problem) for problem in problems]
    if None in configs:
        for problem in problems:
            tuner.run(problem)
        return None
    launches, start = [], 0
    for plane, (problem, config) in enumerate(zip(problems, configs, strict=True)):
        static = {name: getattr(problem, name) for name in _STATIC}
        fast = sm90.launcher(problem, config) if isinstance(config, sm90.Sm90Config) else None
        launches.append(_Launch(start, plane, config, static, fast))
        start += problem.leaves * problem.length
    device_state(problems[0].a.device.index).calls[key] = launches
    return launches

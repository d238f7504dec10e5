"""Whether a configuration gives the canonical bytes: asked of the very kernel that will run, on hostile operands.

There is one truth for every kind of numerics: the canonical configuration, with its loads masked, on dense operands. All other kernels
are held to it, the canonical configuration on other layouts included. What makes two kernels different is ``compiled``: every macro of the
CUDA source, every constant of the Triton kernel, and what Triton makes of an argument (it compiles in a stride of 1, and how well
addresses and strides are aligned). That is in the key of what was verified, and the probe, though small, has all of it in common with the
problem: its strides, lengths and addresses are the problem's modulo 16. Where no small probe can (a stride of 2^31), the problem's own
operands decide as well.
"""

import dataclasses

import torch
from torch import Tensor

from tpinv.kernels.gemm import sm90
from tpinv.kernels.gemm import triton_gemm as gemm
from tpinv.kernels.gemm.problem import Problem
from tpinv.runtime.state import device_state, device_states

Config = gemm.TritonConfig | sm90.Sm90Config

_ROWS, _COLS = 296, 584  # ragged tiles of every width, also for problems with fewer: a configuration must be right for any


def launch(problem: Problem, config: Config, blocks: int | None = None, masked: bool = False) -> None:
    """Fills ``problem.out`` with ``config``, or adds to it. ``blocks`` is for sm90, ``masked`` for Triton."""
    if isinstance(config, sm90.Sm90Config):
        sm90.run(problem, config, blocks)
    else:
        gemm.run(problem, config, masked)


def compiled(problem: Problem, config: Config) -> tuple:
    """All that is compiled into the kernel that computes ``problem`` with ``config``."""
    return (sm90 if isinstance(config, sm90.Sm90Config) else gemm).compiled(problem, config)


def _key(problem: Problem, config: Config) -> tuple:
    return problem.numerics(), config, compiled(problem, config)


def known(problem: Problem, config: Config) -> bool:
    """Whether :func:`verify` has said yes. Launches nothing."""
    return device_state(problem.a.device.index).verified.get(_key(problem, config), False)


def verify(problem: Problem, config: Config) -> bool:
    """Whether the kernel that computes ``problem`` with ``config`` gives the canonical bytes."""
    verified, key = device_state(problem.a.device.index).verified, _key(problem, config)
    if key not in verified:
        probe = make_probe(problem, config)
        truth = _dense(probe)
        launch(truth, gemm.canonical(probe), masked=True)
        # Fewer blocks, so that whole and split tiles both occur.
        good = all(_same(_result(probe, config, blocks), truth.out) for blocks in ((None, 2) if config.parts > 1 else (None,)))
        if good and compiled(probe, config) != key[-1]:
            good = equal(problem, config)
        verified[key] = good
    return verified[key]


def equal(problem: Problem, config: Config) -> bool:
    """Whether ``config`` gives the canonical bytes on the operands of ``problem``, whose output is left alone."""
    truth = _poisoned(problem)
    launch(truth, gemm.canonical(problem), masked=True)
    return _same(_result(problem, config), truth.out)


def struck_off() -> list[str]:
    """Kernels that this process found to disagree with the canonical bytes."""
    every = ((key, good) for state in device_states() for key, good in state.verified.items())
    return [f"{config.name} for {numerics}" for (numerics, config, _), good in every if not good]


def _result(problem: Problem, config: Config, blocks: int | None = None) -> Tensor:
    mine = _poisoned(problem)
    launch(mine, config, blocks)
    return mine.out


def _same(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


# -- tensors of the same kind ----------------------------------------------------------------------------------------------------


def _like(n: int, least: int) -> int:
    """The smallest number from ``least`` on that is n modulo 16, and 1 only if n is."""
    m = least + (n - least) % 16
    return 1 if n == 1 else 17 if m == 1 else m


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    """``values`` [rows, k] in strides and at an address of the kind of ``like``'s; NaN between them."""
    rows, k = values.shape
    s0, s1 = like.stride()
    if s0 == s1 == 1:  # one row seen as columns as well: rows of the probe overlap
        strides = 1, 1
    elif s1 == 1 or (s0 != 1 and s1 <= s0):
        inner = _like(s1, 2)
        strides = _like(s0, inner * (k - 1) + 1), inner
    else:
        inner = _like(s0, 2)
        strides = inner, _like(s1, inner * (rows - 1) + 1)
    size = strides[0] * (rows - 1) + strides[1] * (k - 1) + 1
    start = like.data_ptr() % 16 // like.element_size()
    buffer = torch.full((start + size,), float("nan"), dtype=values.dtype, device=values.device)
    view = buffer.as_strided((rows, k), strides, start)
    if strides == (1, 1):
        buffer[start:] = torch.cat([values[:, 0], values[-1, 1:]])
        return view
    return view.copy_(values)


def empty_output(like: Tensor, cols: int | None = None, rows: int | None = None) -> Tensor:
    """An output of ``like``'s kind, on memory of its own: rows that lie as far apart, modulo 16, and begin at such an address."""
    rows, cols = rows or like.shape[0], cols or like.shape[1]
    start, row = like.data_ptr() % 16 // like.element_size(), _like(like.stride(0), cols)
    buffer = torch.empty(start + rows * row, dtype=like.dtype, device=like.device)
    return buffer.as_strided((rows, cols), (row, 1), start)


def _poisoned(problem: Problem) -> Problem:
    """``problem`` with an output of its own: NaN, since every element must be written, or always the same wild values to add to."""
    out = empty_output(problem.out)
    out.copy_(_before(out) if problem.accumulate else torch.full_like(out, float("nan")))
    return dataclasses.replace(problem, out=out)


def _before(out: Tensor) -> Tensor:
    generator = torch.Generator(out.device).manual_seed(4)
    return torch.empty(out.shape, dtype=out.dtype, device=out.device).log_normal_(0.0, 8.0, generator=generator)


def _hostile(rows: int, k: int, like: Tensor, seed: int, cancel: bool = False) -> Tensor:
    """[rows, k] of wild exponents, finite in every dtype.

    ``cancel``: the second half of k repeats the first, negated in every other row, so that a product of two such operands
    is nothing but rounding errors there and another order of additions shows in full, also in bf16.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    spread = 4 if like.dtype == torch.float16 else 24
    x = torch.randn((rows, k), generator=generator, device=like.device)
    x *= torch.exp2(torch.randint(-spread, spread + 1, (rows, k), generator=generator, device=like.device).float())
    x[:, k - k // 2 :] = x[:, : k // 2]
    if cancel:
        x[1::2, k - k // 2 :] *= -1.0
    x[2::31] = torch.where(x[2::31] > 0, 0.0, -0.0)
    return x.to(like.dtype)


def _length(problem: Problem, step: int) -> int:
    """Of the probe's leaves: several steps, and the problem's modulo 16; a whole number of steps only where the problem's is."""
    least = 256 if problem.leaves == 1 else 128
    return next(n for n in range(least, 4 * least) if n % 16 == problem.length % 16 and (n % step == 0) == (problem.length % step == 0))


def make_probe(problem: Problem, config: Config) -> Problem:
    """A small problem for which ``config`` means the same kernel."""
    step = config.k if isinstance(config, gemm.TritonConfig) else sm90.STEP
    length = 1 if problem.length == 1 else _length(problem, step)
    piece_stride = _like(problem.piece_stride, problem.leaves * length)
    k = problem.pieces * piece_stride
    cols = 1 if problem.out.stride(0) == 1 else _COLS
    a = _laid_out(_hostile(_ROWS, k, problem.a, 1, cancel=True), problem.a)
    b = _laid_out(_hostile(cols, k, problem.b, 2), problem.b)
    bias = None
    if problem.bias is not None:
        start = problem.bias.data_ptr() % 16 // problem.bias.element_size()
        bias = problem.bias.new_empty(start + cols)[start:].copy_(_hostile(1, cols, problem.bias, 3)[0])
    out = empty_output(problem.out, cols, _ROWS)
    return dataclasses.replace(problem, a=a, b=b, out=out, bias=bias, length=length, piece_stride=piece_stride)


def _dense(problem: Problem) -> Problem:
    """``problem`` on dense operands: k contiguous, aligned."""
    a, b = problem.a.clone(memory_format=torch.contiguous_format), problem.b.clone(memory_format=torch.contiguous_format)
    bias = None if problem.bias is None else problem.bias.clone()
    return _poisoned(
        dataclasses.replace(problem, a=a, b=b, bias=bias, out=torch.empty_like(problem.out, memory_format=torch.contiguous_format))
    )

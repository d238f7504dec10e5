"""Chooses a configuration by timing, among those whose bits were verified on this very chip.

What may vary is speed. Before a configuration is used it must give, on hostile inputs, the bytes of the one canonical
configuration; that is asked once per chip, software version and kind of numerics (dtypes, layouts, tree), because another
chip or compiler may round differently inside a matrix instruction. Configurations that disagree are struck off and counted:
``tpinv doctor`` shows them. If all do, the canonical configuration is what runs. The one that wins on a shape is
compared once more on the caller's own operands before it is kept.

Choices are kept on disk (see tpinv.runtime.cuda.cache_dir) under a key that names the chip, the versions and the sources.
TPINV_TUNE=0 takes the first verified candidate without timing.
"""

import dataclasses
import functools
import hashlib
import json
import os
import statistics
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from torch import Tensor

from tpinv.kernels.gemm import sm90
from tpinv.kernels.gemm import triton_gemm as gemm
from tpinv.kernels.gemm.problem import Problem
from tpinv.runtime import cuda

Config = gemm.TritonConfig | sm90.Sm90Config

_LAUNCHES = 3  # of a timed graph
_chosen: dict[tuple, Config] = {}
_verified: dict[tuple, bool] = {}


def launch(problem: Problem, config: Config, blocks: int | None = None) -> None:
    """Fills ``problem.out`` with ``config``, or adds to it."""
    if isinstance(config, sm90.Sm90Config):
        sm90.run(problem, config, blocks)
    else:
        gemm.run(problem, config)


def run(problem: Problem) -> None:
    """Fills ``problem.out``, or adds to it, with the fastest verified configuration; in a capture that meets a new shape, which can
    neither verify nor time, with the canonical one."""
    config = choose(problem)
    if config is None:
        warnings.warn(
            "tpinv meets a new shape while a CUDA graph is captured, where it can neither verify nor time; it uses the slow "
            "canonical kernel. Run the model once before capturing.",
            stacklevel=4,
        )
        config = gemm.canonical(problem)
    launch(problem, config)


def choose(problem: Problem) -> Config | None:
    """The fastest verified configuration for ``problem``; None in a capture that meets a new shape. Works on outputs of its own."""
    key = _shape_class(problem)
    config = _chosen.get(key)
    if config is None and not torch.cuda.is_current_stream_capturing():
        config = _choose(problem, key)
    return config


def choice(problem: Problem) -> Config | None:
    """The configuration chosen for ``problem``, if one was."""
    return _chosen.get(_shape_class(problem))


def choices() -> dict[tuple, Config]:
    """All that were chosen in this process."""
    return _chosen


def _shape_class(problem: Problem) -> tuple:
    """Shapes that share a choice. Rows are rounded up: to a power of two below 256, to three bits above."""
    rows = problem.rows
    step = max(1 << max(rows - 1, 15).bit_length() - 3, 1) if rows > 256 else 1 << max(rows - 1, 15).bit_length()
    rows = -(-rows // step) * step
    # The addresses and strides count too: a kernel that could take one problem must not be handed one it cannot.
    return (problem.a.device.index, problem.numerics(), rows, problem.cols, problem.length, sm90.layout(problem))


# -- choosing --------------------------------------------------------------------------------------------------------------------


def candidates(problem: Problem) -> list[Config]:
    """What may be timed for ``problem``, likely winners first. Not verified yet."""
    found: list[Config] = []
    if sm90.refuses(problem) is None:
        found += sm90.candidates(problem)
    if problem.rows <= 128 or not found:
        found += gemm.candidates(problem)
    return found


def _choose(problem: Problem, key: tuple) -> Config:
    device = problem.a.device.index
    stored = _load(device)
    name = repr(key[1:])
    options = candidates(problem)
    by_name = {c.name: c for c in options}
    known = by_name.get(stored.get(name, {}).get("config", ""))
    if known is not None and verify(problem, known):
        _chosen[key] = known
        return known
    if os.environ.get("TPINV_TUNE", "1") == "0":
        winner = next((c for c in options if verify(problem, c)), gemm.canonical(problem))
        times = {}
    else:
        compile_ahead(problem, options)
        times = _times(problem, [c for c in options if verify(problem, c)])
        ranking = sorted(times, key=times.get)
        winner = next((c for c in ranking if _equal(problem, c)), gemm.canonical(problem))
    _chosen[key] = winner
    row = {"config": winner.name, "microseconds": round(times.get(winner, 0.0), 2), "candidates": len(options)}
    _store(device, name, row)
    return winner


def compile_ahead(problem: Problem, options: list[Config]) -> None:
    """NVRTC works outside the GIL: compiles what will be loaded one by one."""
    jobs = [sm90.macros(problem, c) for c in options if isinstance(c, sm90.Sm90Config)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(sm90.compile_ahead, jobs))


def _times(problem: Problem, configs: list[Config]) -> dict[Config, float]:
    """Median microseconds of each of ``configs`` on the operands of ``problem``, writing to an output of its own.

    Launches are captured into graphs, so that the host's time does not count, and the configurations alternate, so that the
    clock, which follows the load, treats them alike; the first round only warms up. With few rows the weights decide, and in
    a model they are never in the cache when their turn comes: a large buffer is cleared before each launch.
    """
    problem = dataclasses.replace(problem, out=torch.empty_like(problem.out))
    flush = torch.empty(1 << 27 if problem.rows <= 128 else 0, dtype=torch.uint8, device=problem.out.device)
    graphs = {config: _capture(problem, config, flush) for config in configs}
    samples: dict[Config, list[float]] = {config: [] for config in configs}
    for _ in range(6):
        for config, graph in graphs.items():
            replays = max(1, int(2000 / samples[config][-1])) if samples[config] else 1
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            samples[config].append(max(start.elapsed_time(end) * 1e3 / replays / _LAUNCHES, 0.1))
    return {config: statistics.median(values[1:]) for config, values in samples.items()}


def _capture(problem: Problem, config: Config, flush: Tensor) -> torch.cuda.CUDAGraph:
    launch(problem, config)  # compiles and allocates what a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_LAUNCHES):
            flush.zero_()
            launch(problem, config)
    return graph


# -- verifying -------------------------------------------------------------------------------------------------------------------


def verify(problem: Problem, config: Config) -> bool:
    """Whether ``config`` gives the canonical configuration's bytes on hostile operands with the numerics of ``problem``."""
    key = (problem.a.device.index, problem.numerics(), config)
    if key not in _verified:
        probe = _probe(problem)
        _verified[key] = all(_equal(probe, config, blocks) for blocks in ((None, 2) if config.parts > 1 else (None,)))
    return _verified[key]


def _equal(problem: Problem, config: Config, blocks: int | None = None) -> bool:
    """Byte equality with the canonical configuration. ``blocks``: fewer of them, so that whole and split tiles both occur."""
    canonical = _poisoned(problem)
    launch(canonical, gemm.canonical(problem))
    mine = _poisoned(problem)
    launch(mine, config, blocks)
    return torch.equal(_bits(canonical.out), _bits(mine.out))


def _poisoned(problem: Problem) -> Problem:
    """``problem`` with an output of its own: NaN, since every element must be written, or always the same wild values to add to."""
    out = torch.full_like(problem.out, float("nan"))
    if problem.accumulate:
        out.log_normal_(0.0, 8.0, generator=torch.Generator(out.device).manual_seed(4))
    return dataclasses.replace(problem, out=out)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def _hostile(rows: int, k: int, like: Tensor, major: int, seed: int, cancel: bool = False) -> Tensor:
    """[rows, k] of wild exponents, finite in every dtype, with the layout ``major``.

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
    x = x.to(like.dtype)
    return x if major == 0 else x.t().contiguous().t()


def _probe(problem: Problem) -> Problem:
    """A small problem of the same numerics: ragged tiles, leaves that are no multiple of a step."""
    length = 264 if problem.leaves == 1 else 136
    rows, cols = 296, 584  # also for problems with fewer: a configuration must be right for any
    k = problem.leaves * length * problem.pieces
    a = _hostile(rows, k, problem.a, problem.major[0], 1, cancel=True)
    b = _hostile(cols, k, problem.b, problem.major[1], 2)
    bias = None if problem.bias is None else _hostile(1, cols, problem.bias, 0, 3)[0]
    out = torch.empty(rows, cols, dtype=problem.out.dtype, device=a.device)
    return dataclasses.replace(problem, a=a, b=b, out=out, bias=bias, length=length, piece_stride=problem.leaves * length)


# -- the cache on disk -----------------------------------------------------------------------------------------------------------


def _path(device: int) -> Path:
    return cuda.cache_dir() / f"choices-{_fingerprint(device)}.json"


@functools.cache
def _fingerprint(device: int) -> str:
    """Of all that a choice may depend on besides the problem."""
    here = Path(__file__).parent
    sources = [(here / name).read_text() for name in ("triton_gemm.py", "sm90.py", "problem.py")]
    sources.append(cuda.missing(sm90.SOURCE) or cuda.source(sm90.SOURCE))
    versions = [torch.cuda.get_device_name(device), torch.__version__, triton.__version__, str(torch.version.cuda)]
    return hashlib.sha256("\0".join(versions + sources).encode()).hexdigest()[:16]


def _load(device: int) -> dict[str, dict]:
    path = _path(device)
    return json.loads(path.read_text()) if path.is_file() else {}


def _store(device: int, name: str, row: dict) -> None:
    table = _load(device) | {name: row}
    cuda.write_atomically(_path(device), json.dumps(table, indent=1).encode())


def table(device: int = 0) -> dict[str, dict]:
    """The choices on disk for ``device``: shape class -> configuration, microseconds, number of candidates."""
    return _load(device)


def struck_off() -> list[str]:
    """Configurations that this process found to disagree with the canonical one."""
    return [f"{config.name} for {numerics}" for (_, numerics, config), good in _verified.items() if not good]

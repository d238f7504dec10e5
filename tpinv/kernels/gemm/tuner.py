"""Chooses a configuration by timing, among those whose bits were verified on this very chip.

What may vary is speed. Before a configuration is used it must give, on hostile inputs, the bytes of the one canonical
configuration (verification.py); that is asked in every process for every compiled kernel, because another chip or compiler may
round differently inside a matrix instruction. Configurations that disagree are struck off and counted. If all do, the canonical
configuration is what runs. The one that wins on a shape is compared once more on the caller's own operands before it is kept.

Choices are kept on disk (see tpinv.runtime.cuda.cache_dir) under a key that names the chip, the versions and the sources.
TPINV_TUNE=0 takes the first verified candidate without timing. TPINV_TUNE=largest times a shape of many rows only where none of up to four
times as many was: for an engine, which meets its largest batch when it starts, and any smaller one while somebody waits.
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

from tpinv.kernels.gemm import sm90, verification
from tpinv.kernels.gemm import triton_gemm as gemm
from tpinv.kernels.gemm.problem import Problem
from tpinv.kernels.gemm.verification import Config, empty_output
from tpinv.runtime import cuda
from tpinv.runtime.state import device_state

_LAUNCHES = 3  # of a timed graph


def run(problem: Problem) -> None:
    """Fills ``problem.out``, or adds to it, with the fastest verified configuration.

    In the capture of a CUDA graph, where it can neither verify nor time, a new shape gets the first configuration that was verified
    for such a kernel before, and a warning; RuntimeError if none was.
    """
    config = choose(problem)
    if config is None:
        config = next((c for c in (*candidates(problem), gemm.canonical(problem)) if verification.known(problem, c)), None)
        if config is None:
            raise RuntimeError(
                f"a product {problem.rows} x {problem.cols} of {problem.leaves} leaves of {problem.length}, {problem.a.dtype}, is new to tpinv in the "
                "capture of a CUDA graph, where no kernel can be verified; run the model once before capturing, or kernels.warmup"
            )
        warnings.warn(
            "tpinv meets a new shape while a CUDA graph is captured, where it can neither verify nor time; it uses a verified kernel that "
            "may be slow. Run the model once before capturing.",
            stacklevel=4,
        )
    verification.launch(problem, config)


def choose(problem: Problem) -> Config | None:
    """The fastest verified configuration for ``problem``; None in a capture that meets a new shape. Works on outputs of its own."""
    config = choice(problem)
    if config is None and not torch.cuda.is_current_stream_capturing():
        config = _choose(problem)
    return config


def choice(problem: Problem) -> Config | None:
    """The configuration chosen for ``problem``, if one was."""
    return device_state(problem.a.device.index).choices.get(_shape_class(problem))


def _shape_class(problem: Problem) -> tuple:
    """Shapes that share a choice. Rows are rounded up: to a power of two below 256, to three bits above."""
    rows = problem.rows
    step = max(1 << max(rows - 1, 15).bit_length() - 3, 1) if rows > 256 else 1 << max(rows - 1, 15).bit_length()
    rows = -(-rows // step) * step
    # The addresses and strides count too: a kernel that could take one problem must not be handed one it cannot, and Triton compiles
    # another for other alignments.
    return problem.numerics(), rows, problem.cols, problem.length, sm90.layout(problem), gemm.layout(problem)


# -- choosing --------------------------------------------------------------------------------------------------------------------


def candidates(problem: Problem) -> list[Config]:
    """What may be timed for ``problem``, likely winners first. Not verified yet."""
    found: list[Config] = []
    if sm90.refuses(problem) is None:
        found += sm90.candidates(problem)
    if problem.rows <= 128 or not found:
        found += gemm.candidates(problem)
    return found


def _choose(problem: Problem) -> Config:
    device, key = problem.a.device.index, _shape_class(problem)
    choices, stored, name = device_state(device).choices, _load(device), repr(key)
    options = candidates(problem)
    by_name = {c.name: c for c in options}
    config = by_name.get(stored.get(name, {}).get("config", ""))
    if config is not None and verification.verify(problem, config):
        choices[key] = config
        return config
    tune = os.environ.get("TPINV_TUNE", "1")
    if tune == "largest" and (config := _borrowed(problem, key, choices, by_name)):
        return config
    if tune == "0":
        winner, times = next((c for c in options if verification.verify(problem, c)), None), {}
    else:
        compile_ahead(problem, options)
        times = _times(problem, [c for c in options if verification.verify(problem, c)])
        winner = next((c for c in sorted(times, key=times.get) if verification.equal(problem, c)), None)
    choices[key] = winner = winner or _canonical(problem)
    row = {"config": winner.name, "microseconds": round(times.get(winner, 0.0), 2), "candidates": len(options)}
    _store(device, name, row)
    return winner


def _borrowed(problem: Problem, key: tuple, choices: dict[tuple, Config], by_name: dict[str, Config]) -> Config | None:
    """What was chosen for the fewest rows above these, if they are up to four times as many. Not kept as a choice, lest it is lent on."""
    numerics, rows, *same, _ = key  # but for what Triton compiles of the rows
    known = {k[1]: config for k, config in choices.items() if k[0] == numerics and [*k[2:-1]] == same and rows < k[1] <= 4 * rows}
    config = by_name.get(known[min(known)].name) if known and rows > 256 else None
    return config if config is not None and verification.verify(problem, config) else None


def _canonical(problem: Problem) -> Config:
    """The canonical configuration, when all others disagree with it. RuntimeError where it disagrees with itself on dense operands."""
    config = gemm.canonical(problem)
    if not verification.verify(problem, config):
        raise RuntimeError(
            f"no kernel computes {problem.numerics()} with one set of bytes on this GPU with torch {torch.__version__} and Triton "
            f"{triton.__version__}: even {config.name} depends on strides and alignments. Pass contiguous tensors, or use tpinv.reference"
        )
    return config


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
    problem = dataclasses.replace(problem, out=empty_output(problem.out))
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
    verification.launch(problem, config)  # compiles and allocates what a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_LAUNCHES):
            flush.zero_()
            verification.launch(problem, config)
    return graph


# -- the cache on disk -----------------------------------------------------------------------------------------------------------


def _path(device: int) -> Path:
    return cuda.cache_dir() / f"choices-{_fingerprint(device_state(device).name)}.json"


@functools.cache
def _fingerprint(chip: str) -> str:
    """Of all that a choice may depend on besides the problem."""
    here = Path(__file__).parent
    sources = [(here / name).read_text() for name in ("triton_gemm.py", "sm90.py", "problem.py", "verification.py")]
    sources.append(cuda.missing(sm90.SOURCE) or cuda.whole_source(sm90.SOURCE))
    versions = [chip, torch.__version__, triton.__version__, str(torch.version.cuda)]
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

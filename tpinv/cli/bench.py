"""``tpinv bench gemm`` (``bench collectives``, ``step``, ``attention``, ``layer`` and ``serve`` are in files of their own): our products against cuBLAS, alternating in one run, after
the bits were checked; and against the same order of additions at L = 1 in Triton alone, and batch_invariant_ops where it is installed.

Every time is the median over rounds in which both kernels run one after the other for the same few milliseconds, captured in
CUDA graphs: a GPU at its power limit slows down under load, and a ratio is only fair between neighbours. With few tokens the
weights are taken in turn from a set larger than the L2 cache, as they would be in a model. What the host does for a call is timed
apart, on a product so small that nothing else counts. One process, one GPU.
"""

import argparse
import csv
import datetime
import importlib
import itertools
import os
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from tpinv.cli import bench_attention, bench_host, bench_layer, bench_serve, bench_step
from tpinv.harness.outputs import check_outputs
from tpinv.tree import NODE_DTYPES, ReductionTree

# (out-features, in-features) of the four linears of a transformer block; fc1 holds gate and up.
MODELS = {
    "llama3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "fc1": (28672, 4096), "fc2": (4096, 14336)},
    "qwen3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "fc1": (24576, 4096), "fc2": (4096, 12288)},
    "llama3-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "fc1": (57344, 8192), "fc2": (8192, 28672)},
}
SHAPE = ("product", "model", "linear", "M", "N", "K")
COLUMNS = (*SHAPE, "implementation", "leaves", "node_dtype", "kernel", "us", "cublas_us", "ratio", "tflops")
OTHERS = ("Triton", "batch_invariant_ops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["gemm", "collectives", "step", "attention", "layer", "serve", "all", "host"])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama3-8b"])
    parser.add_argument("--linear", nargs="+", choices=["qkv", "o", "fc1", "fc2"], default=["qkv", "o", "fc1", "fc2"])
    parser.add_argument("--product", nargs="+", choices=["forward", "dgrad", "wgrad"], default=["forward", "dgrad", "wgrad"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096, 8192])
    parser.add_argument("--leaves", nargs="+", type=int, default=[1, 2, 4, 8], help="local leaves (wgrad is always one chain)")
    parser.add_argument("--node-dtype", choices=NODE_DTYPES, default="float32", help="gemm, step: of the tree (default float32)")
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=OTHERS, help="gemm: what to time besides cuBLAS (default: all)")
    parser.add_argument("--milliseconds", type=float, default=10.0, help="per kernel and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, help="collectives: one GPU each (default: all GPUs)")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[1 << n for n in range(10, 29)], help="collectives: bytes of the bf16 message"
    )
    parser.add_argument("--csv", help="write every row to this file")
    parser.add_argument("--plot", help="write a picture to this file")
    parser.add_argument("--out", metavar="DIRECTORY", help="all, host: where a directory for this run is made (default docs/benchmarks)")
    bench_step.add_arguments(parser)
    bench_attention.add_arguments(parser)
    bench_layer.add_arguments(parser)
    bench_serve.add_arguments(parser)
    bench_host.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.what == "serve":
        check_outputs(arguments)
        return bench_serve.run(arguments)
    if not torch.cuda.is_available():
        raise ValueError("bench needs a GPU; there is none here")
    _check_numbers(arguments)
    check_outputs(arguments)
    if arguments.what in ("all", "host"):
        from tpinv.cli import bench_all

        return {"all": bench_all, "host": bench_host}[arguments.what].run(arguments)
    if arguments.what == "collectives":
        from tpinv.cli import bench_collectives

        return bench_collectives.run(arguments)
    if arguments.what == "step":
        return bench_step.run(arguments)
    if arguments.what == "layer":
        return bench_layer.run(arguments)
    if arguments.what == "attention":
        return bench_attention.run(arguments)
    import triton

    console = Console(highlight=False, width=150)
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}, bf16, "
        f"{datetime.date.today()}, tpinv bench {' '.join(sys.argv[2:])}"
    )
    ours, torchs = _host_microseconds(arguments.node_dtype)
    console.print(f"host, 16 x 256 x 256: {ours:.1f} us a call, torch.matmul {torchs:.1f} us; {arguments.node_dtype} nodes")
    if OTHERS[1] in arguments.others and _batch_invariant_matmul() is None:
        console.print("batch_invariant_ops is not installed: its column stays empty")
    host = dict.fromkeys(COLUMNS, "") | {"product": "host", "M": 16, "N": 256, "K": 256, "implementation": "tpinv", "leaves": 8}
    host |= {"node_dtype": arguments.node_dtype, "us": round(ours, 2), "cublas_us": round(torchs, 2), "ratio": round(torchs / ours, 3)}
    rows = []
    with open(arguments.csv or os.devnull, "w", newline="") as file:  # as they come: a run may be cut off
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerow(host)
        for shape in itertools.product(arguments.model, arguments.linear, arguments.product, arguments.tokens):
            found = _measure(arguments, *shape)
            writer.writerows(found)
            file.flush()
            rows += found
            console.print(" ".join(_line(rows, arguments.leaves)))
    console.print(_table(rows, arguments.leaves))
    if arguments.plot:
        from tpinv.cli.plot import ratio_lines

        ratio_lines(rows, arguments.plot, f"{torch.cuda.get_device_name()}, bf16, {arguments.node_dtype} nodes")
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    """ValueError naming the option whose number no measurement could have, or that names one twice."""
    of_all = "leaves", "milliseconds", "rounds", "ranks", "sizes", "tp"
    for name in (*of_all, "tokens", "batch", "keys", "shard_of", "num_layers", "steps", "calls", "part_seconds"):
        values = getattr(arguments, name)
        values = values if isinstance(values, list) else [values]
        option = f"--{name.replace('_', '-')}"
        if any(value is not None and not 0 < value < float("inf") for value in values):
            raise ValueError(f"{option} {' '.join(map(str, values))} must be above 0")
        if len(set(values)) < len(values):
            raise ValueError(f"{option} {' '.join(map(str, values))} names a value twice; name each once")


def _operands(product: str, m: int, n: int, k: int):
    """a [R, k], b [k, C] of a product, and its weight-sized operand in as many copies as overflow the L2 cache for few tokens."""
    make = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
    if product == "wgrad":
        return make(m, n).t(), [make(m, k)]
    copies = max(1, -(-200_000_000 // (2 * n * k))) if m <= 128 else 1
    weights = [make(n, k) for _ in range(copies)]
    return (make(m, k), [w.t() for w in weights]) if product == "forward" else (make(m, n), weights)


def _measure(arguments, model: str, linear: str, product: str, m: int) -> list[dict]:
    from tpinv.kernels.gemm import triton_gemm as gemm
    from tpinv.kernels.gemm import tuner, verification
    from tpinv.kernels.gemm.problem import make_problems
    from tpinv.runtime.state import device_states

    for state in device_states():
        state.counters.recycle()  # the graphs of the shape before are gone
    n, k = MODELS[model][linear]
    a, bs = _operands(product, m, n, k)
    stock_out = a.new_empty(a.shape[0], bs[0].shape[1])
    stock = _Timed([lambda b=b: torch.matmul(a, b, out=stock_out) for b in bs])
    rows = []

    def measure(name: str, leaves: int, node_dtype: str, kernel: str, launches: list) -> None:
        timed, times, stock_times = _Timed(launches), [], []
        for _ in range(arguments.rounds):
            stock_times.append(stock(arguments.milliseconds))
            times.append(timed(arguments.milliseconds))
        us, cublas = statistics.median(times), statistics.median(stock_times)
        values = (product, model, linear, m, n, k, name, leaves, node_dtype, kernel, round(us, 2), round(cublas, 2))
        rows.append(dict(zip(COLUMNS, (*values, round(cublas / us, 3), round(2e-6 * m * n * k / us, 1)), strict=True)))

    def problems(tree: ReductionTree) -> list:
        out = stock_out.new_empty(1, *stock_out.shape)
        return [make_problems(a, b.t(), out, None, tree, 0, 1, 1, "ieee")[0] for b in bs]

    for leaves in arguments.leaves if product != "wgrad" else [1]:
        every = problems(ReductionTree(leaves, arguments.node_dtype))
        tuner.run(every[0])  # picks a configuration, whose bits it verifies
        kernel = tuner.choice(every[0])
        if not verification.verify(every[0], kernel):
            raise ValueError(f"{kernel.name} does not have the canonical bits; run tpinv doctor")
        measure("tpinv", leaves, arguments.node_dtype, kernel.name, [lambda problem=problem: tuner.run(problem) for problem in every])

    every = problems(ReductionTree(1)) if "Triton" in arguments.others else []
    run_with = lambda config: [lambda problem=problem: gemm.run(problem, config) for problem in every]  # noqa: E731
    if verified := [config for config in gemm.candidates(every[0]) if verification.verify(every[0], config)] if every else []:
        config = min(verified, key=lambda config: _Timed(run_with(config))(2.0))
        measure("Triton", 1, "float32", config.name, run_with(config))
    if OTHERS[1] in arguments.others and (matmul := _batch_invariant_matmul()):
        measure("batch_invariant_ops", 1, "float32", "matmul_persistent", [lambda b=b: matmul(a, b) for b in bs])
    return rows


def _batch_invariant_matmul():
    """The product of batch_invariant_ops (Thinking Machines), or None where that is not installed. Every size has the same tile."""
    try:
        return importlib.import_module("batch_invariant_ops").matmul_persistent
    except ModuleNotFoundError:
        return None


def _host_microseconds(node_dtype: str) -> tuple[float, float]:
    """What a call costs the host, ours at eight leaves and torch's: medians over bursts short enough never to wait for the GPU."""
    from tpinv import kernels

    tree = ReductionTree(8, node_dtype)
    a, b = torch.randn(16, 256, device="cuda").bfloat16(), torch.randn(256, 256, device="cuda").bfloat16()
    medians = []
    for call in (lambda: kernels.tree_matmul(a, b, tree), lambda: torch.matmul(a, b)):
        bursts = []
        for _ in range(40):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(25):
                call()
            bursts.append((time.perf_counter() - start) / 25 * 1e6)
        medians.append(statistics.median(bursts[5:]))
    return tuple(medians)


class _Timed:
    """A sequence of launches as a graph; a call replays it for some milliseconds and returns microseconds a launch."""

    def __init__(self, launches):
        for launch in launches:
            launch()
        torch.cuda.synchronize()
        self.count = max(len(launches), 4)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.count):
                launches[i % len(launches)]()
        self.estimate = self._replay(2)

    def _replay(self, times: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / times / self.count

    def __call__(self, milliseconds: float) -> float:
        return self._replay(max(1, round(milliseconds * 1e3 / self.estimate / self.count)))


def _label(row: dict) -> str:
    return f"L={row['leaves']}" if row["implementation"] == "tpinv" else row["implementation"]


def _line(rows: list[dict], leaves: list[int]) -> list[str]:
    """The newest shape's rows as the cells of one line."""
    last = rows[-1]
    shape = [last[c] for c in SHAPE]
    ratios = {_label(row): f"{row['ratio']:.2f}" for row in rows if [row[c] for c in SHAPE] == shape}
    return [*map(str, shape), f"{last['cublas_us']:.1f}", *(ratios.get(label, "") for label in (*(f"L={n}" for n in leaves), *OTHERS))]


def _table(rows: list[dict], leaves: list[int]) -> Table:
    table = Table(title="cuBLAS time / time")
    for column in (*SHAPE, "cuBLAS us", *(f"L={n}" for n in leaves), *OTHERS):
        table.add_column(column, justify="right")
    seen: dict[tuple, list[dict]] = {}
    for row in rows:
        seen.setdefault(tuple(row[c] for c in SHAPE), []).append(row)
    for group in seen.values():
        table.add_row(*_line(group, leaves))
    return table

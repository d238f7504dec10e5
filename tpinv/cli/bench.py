"""``tpinv bench gemm`` (``bench collectives`` and ``bench step`` are in files of their own): our products against cuBLAS, alternating in one run, after
the bits were checked.

Every time is the median over rounds in which both kernels run one after the other for the same few milliseconds, captured in
CUDA graphs: a GPU at its power limit slows down under load, and a ratio is only fair between neighbours. With few tokens the
weights are taken in turn from a set larger than the L2 cache, as they would be in a model. One process, one GPU.
"""

import argparse
import csv
import datetime
import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table

from tpinv.cli import bench_step
from tpinv.tree import ReductionTree

# (out-features, in-features) of the four linears of a transformer block; fc1 holds gate and up.
MODELS = {
    "llama3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "fc1": (28672, 4096), "fc2": (4096, 14336)},
    "qwen3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "fc1": (24576, 4096), "fc2": (4096, 12288)},
    "llama3-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "fc1": (57344, 8192), "fc2": (8192, 28672)},
}
COLUMNS = ("product", "model", "linear", "M", "N", "K", "leaves", "kernel", "us", "cublas_us", "ratio", "tflops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["gemm", "collectives", "step"])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama3-8b"])
    parser.add_argument("--linear", nargs="+", choices=["qkv", "o", "fc1", "fc2"], default=["qkv", "o", "fc1", "fc2"])
    parser.add_argument("--product", nargs="+", choices=["forward", "dgrad", "wgrad"], default=["forward", "dgrad", "wgrad"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096, 8192])
    parser.add_argument("--leaves", nargs="+", type=int, default=[1, 2, 4, 8], help="local leaves (wgrad is always one chain)")
    parser.add_argument("--milliseconds", type=float, default=10.0, help="per kernel and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, help="collectives: one GPU each (default: all GPUs)")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[1 << n for n in range(10, 29)], help="collectives: bytes of the bf16 message"
    )
    parser.add_argument("--csv", help="write every row to this file")
    parser.add_argument("--plot", help="collectives: write a picture to this file")
    bench_step.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("bench needs a GPU; there is none here")
    if arguments.what == "collectives":
        from tpinv.cli import bench_collectives

        return bench_collectives.run(arguments)
    if arguments.what == "step":
        return bench_step.run(arguments)
    import triton

    console = Console(highlight=False, width=150)
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}, bf16, "
        f"{datetime.date.today()}, tpinv bench {' '.join(sys.argv[2:])}"
    )
    rows = []
    for model in arguments.model:
        for linear in arguments.linear:
            for product in arguments.product:
                for tokens in arguments.tokens:
                    rows += _measure(arguments, product, model, linear, tokens)
                    console.print(" ".join(f"{value}" for value in _line(rows, arguments.leaves)))
    console.print(_table(rows, arguments.leaves))
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


def _operands(product: str, m: int, n: int, k: int):
    """a [R, k], b [k, C] of a product, and its weight-sized operand in as many copies as overflow the L2 cache for few tokens."""
    make = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
    if product == "wgrad":
        return make(m, n).t(), [make(m, k)]
    copies = max(1, -(-200_000_000 // (2 * n * k))) if m <= 128 else 1
    weights = [make(n, k) for _ in range(copies)]
    return (make(m, k), [w.t() for w in weights]) if product == "forward" else (make(m, n), weights)


def _measure(arguments, product: str, model: str, linear: str, m: int) -> list[dict]:
    from tpinv.kernels import tuner
    from tpinv.kernels.problem import make_problems

    n, k = MODELS[model][linear]
    a, bs = _operands(product, m, n, k)
    stock_out = torch.empty(a.shape[0], bs[0].shape[1], device="cuda", dtype=a.dtype)
    stock = _Timed([lambda b=b: torch.matmul(a, b, out=stock_out) for b in bs])
    rows = []
    for leaves in arguments.leaves if product != "wgrad" else [1]:
        tree, out = ReductionTree(leaves), stock_out.new_empty(1, *stock_out.shape)
        problems = [make_problems(a, b.t(), out, None, tree, 0, 1, 1, "ieee")[0] for b in bs]
        tuner.run(problems[0])  # picks a configuration, whose bits it verifies
        kernel = tuner.choice(problems[0])
        if not tuner.verify(problems[0], kernel):
            raise ValueError(f"{kernel.name} does not have the canonical bits; run tpinv doctor")
        ours = _Timed([lambda problem=problem: tuner.run(problem) for problem in problems])
        times, stock_times = [], []
        for _ in range(arguments.rounds):
            stock_times.append(stock(arguments.milliseconds))
            times.append(ours(arguments.milliseconds))
        us, cublas = statistics.median(times), statistics.median(stock_times)
        values = (product, model, linear, m, n, k, leaves, kernel.name, round(us, 2), round(cublas, 2))
        rows.append(dict(zip(COLUMNS, (*values, round(cublas / us, 3), round(2e-6 * m * n * k / us, 1)), strict=True)))
    return rows


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


def _line(rows: list[dict], leaves: list[int]) -> list[str]:
    """The newest shape's rows as the cells of one line."""
    last = rows[-1]
    name = tuple(last[c] for c in COLUMNS[:6])
    ratios = {row["leaves"]: row["ratio"] for row in rows if tuple(row[c] for c in COLUMNS[:6]) == name}
    return [*map(str, name), f"{last['cublas_us']:.1f}", *(f"{ratios[n]:.2f}" if n in ratios else "" for n in leaves)]


def _table(rows: list[dict], leaves: list[int]) -> Table:
    table = Table(title="cuBLAS time / our time")
    for column in (*COLUMNS[:6], "cuBLAS us", *(f"L={n}" for n in leaves)):
        table.add_column(column, justify="right")
    seen: dict[tuple, list[dict]] = {}
    for row in rows:
        seen.setdefault(tuple(row[c] for c in COLUMNS[:6]), []).append(row)
    for group in seen.values():
        table.add_row(*_line(group, leaves))
    return table

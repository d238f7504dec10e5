"""``tpinv bench collectives``: our all-reduce and reduce-scatter against NCCL's and torch's own over symmetric memory.

One process a GPU. For every size the bits are checked first, against the ProcessGroup path; then all are captured into CUDA graphs of
several calls and replayed in turn, round after round, from a common start. A time is the median over rounds, of the slowest
rank, per call. Sizes are those of the bf16 message: fp32 nodes are twice the bytes for the same number of elements.
"""

import csv
import datetime
import statistics

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from tpinv.collectives import process_group, resolve, symmetric, tree_all_reduce, tree_reduce_scatter
from tpinv.testing import RankPool, compare
from tpinv.tree import ReductionTree

COLUMNS = ("operation", "size", "implementation", "us", "ratio_to_nccl", "gigabytes_per_second")
ALL_REDUCE, REDUCE_SCATTER = "all_reduce", "reduce_scatter"


def run(arguments) -> int:
    ranks = arguments.ranks or torch.cuda.device_count()
    if ranks < 2 or torch.cuda.device_count() < ranks:
        raise ValueError(f"bench collectives needs a GPU per rank and at least two, there are {torch.cuda.device_count()}")
    console = Console(highlight=False, width=150)
    with RankPool() as pool:
        rows, about = pool.run(measure, ranks, tuple(arguments.sizes), arguments.rounds, timeout=1200)[0]
    console.print(f"{about}, {ranks} GPUs, {datetime.date.today()}, tpinv bench collectives --rounds {arguments.rounds}")
    for operation in (ALL_REDUCE, REDUCE_SCATTER):
        console.print(_table(operation, rows))
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if arguments.plot:
        plot(rows, arguments.plot, about)
    return 0


def measure(sizes: tuple[int, ...], rounds: int) -> tuple[list[dict], str]:
    """On every rank. The rows are complete on rank 0."""
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    rows = []
    for size in sizes:
        for operation, calls in _operations(size, group).items():
            times = _times(calls, size, rounds)
            for name, microseconds in times.items():
                rows.append(
                    {
                        "operation": operation, "size": size, "implementation": name, "us": round(microseconds, 2),
                        "ratio_to_nccl": round(times["NCCL"] / microseconds, 3), "gigabytes_per_second": round(size / microseconds / 1e3, 2),
                    }
                )  # fmt: skip
    decision = symmetric.agreement(resolve(group), torch.device("cuda", rank))[1]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return rows, f"{torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {nccl}, {decision.backend} ({decision.reason})"


def _operations(size: int, group) -> dict[str, dict]:
    """Everything that is timed at one size, as functions of nothing that launch one call."""
    import torch.distributed._symmetric_memory as symmetric_memory

    p, count = dist.get_world_size(), size // 2
    x = torch.randn(count, device="cuda").bfloat16()
    shared = symmetric_memory.empty(count, dtype=torch.bfloat16, device="cuda").copy_(x)
    symmetric_memory.rendezvous(shared, group)
    part, out = x.new_empty(count // p), {ALL_REDUCE: {}, REDUCE_SCATTER: {}}
    for node in ("bfloat16", "float32"):
        tree, values = ReductionTree(p, node), x.to(getattr(torch, node)).unsqueeze(0)
        ours = {
            ALL_REDUCE: (tree_all_reduce, process_group.all_reduce),
            REDUCE_SCATTER: (tree_reduce_scatter, process_group.reduce_scatter),
        }
        for operation, (function, reference) in ours.items():
            call = lambda f=function, v=values, t=tree: f(v, tree=t, group=group, out_dtype=torch.bfloat16)  # noqa: E731
            if difference := compare(call(), reference(values, tree, resolve(group), torch.bfloat16)):
                raise ValueError(f"{operation} of {size} bytes, {node} nodes: {difference}")
            out[operation][f"tpinv {node} nodes"] = call
    out[ALL_REDUCE] |= {
        "NCCL": lambda: dist.all_reduce(x, group=group),
        "torch one_shot": lambda: torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", group.group_name),
        "torch two_shot": lambda: torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", group.group_name),
    }
    out[REDUCE_SCATTER]["NCCL"] = lambda: dist.reduce_scatter_tensor(part, x, group=group)
    return out


def _times(calls: dict, size: int, rounds: int) -> dict[str, float]:
    """Microseconds a call: the median over rounds."""
    repeats = 20 if size <= 1 << 20 else 8 if size <= 1 << 25 else 3
    graphs = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        dist.barrier()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(repeats):
                call()
        torch.cuda.synchronize()
        dist.barrier()
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            dist.barrier()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            seen[name].append(begin.elapsed_time(end) * 1e3 / repeats)
    slowest = torch.tensor([seen[name] for name in calls])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {name: statistics.median(row) for name, row in zip(calls, slowest.tolist(), strict=True)}


def _size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def _table(operation: str, rows: list[dict]) -> Table:
    rows = [row for row in rows if row["operation"] == operation]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    table = Table("size", *names, title=f"{operation}: microseconds (NCCL's time over it)")
    for size in dict.fromkeys(row["size"] for row in rows):
        cells = {row["implementation"]: f"{row['us']:.1f} ({row['ratio_to_nccl']:.2f})" for row in rows if row["size"] == size}
        table.add_row(_size(size), *(cells[name] for name in names))
    return table


def plot(rows: list[dict], path: str, title: str) -> None:
    """Time over NCCL's, by size: below 1 is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, operation in zip(axes, (ALL_REDUCE, REDUCE_SCATTER), strict=True):
        for name in dict.fromkeys(row["implementation"] for row in rows if row["operation"] == operation):
            points = [row for row in rows if row["operation"] == operation and row["implementation"] == name]
            sizes = [row["size"] for row in points]
            axis.plot(sizes, [1 / row["ratio_to_nccl"] for row in points], marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes[::3], [_size(size) for size in sizes[::3]])
        axis.set_title(f"{operation}, time over NCCL's bf16", fontsize=10)
        axis.set_ylim(0, 2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

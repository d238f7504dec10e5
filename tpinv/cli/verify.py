"""``tpinv verify``: the claim, checked on this machine. Trains a real model at several tensor-parallel sizes, with the stock layers and
with tpinv, and compares every logit, loss, gradient, gradient norm and final parameter with those of TP = 1, byte for byte.

Exit status 0 only if tpinv differs nowhere and the stock run differs somewhere: a comparison that cannot fail proves nothing.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from tpinv.testing import RankPool, compare
from tpinv.tree import ReductionTree

FRAMEWORKS = {"megatron": "tpinv.harness.megatron.verify", "torchtitan": "tpinv.harness.torchtitan.verify"}
VARIANTS = "llama (default): RMSNorm, SwiGLU, grouped queries, rope; gpt: LayerNorm, GELU, biases, learned positions"
COLUMNS = {"layers": "left", "TP": "right", "SP": "left", "differing": "right", "first that differs": "left", "loss per step": "left"}


@dataclass
class Row:
    """One run, compared with TP = 1 of the same layers."""

    layers: str
    tp: int
    sp: bool
    tensors: int
    differing: int
    first_difference: str | None
    first_ulp: int
    max_ulp: int
    losses: list[float]
    ulps: dict[str, int] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--framework", default="megatron", choices=sorted(FRAMEWORKS), help="whose model and training loop (default megatron)"
    )
    parser.add_argument("--tp", default="1,2,4,8", help="tensor-parallel sizes, compared with 1 (default 1,2,4,8)")
    parser.add_argument("--sequence-parallel", action="store_true", help="run every size above 1 with sequence parallelism as well")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of parameters and activations (default fp32)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default 5)")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step (default 1)")
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cuda: NCCL if every rank has a GPU, else ranks share GPUs over gloo"
    )
    parser.add_argument("--hidden", type=int, default=0, help="hidden size, about, with heads of 128 (default: as small as can be)")
    parser.add_argument("--num-layers", type=int, default=0, help="transformer layers (default 2)")
    parser.add_argument("--leaves", type=int, default=8, help="leaves of the tree, a multiple of every size (default 8; 24 for 3 and 6)")
    parser.add_argument("--variant", default="llama", choices=["llama", "gpt"], help=VARIANTS)
    parser.add_argument("--tied", action="store_true", help="share the embedding with the output layer")
    parser.add_argument("--qk-norm", action="store_true", help="normalise queries and keys")
    parser.add_argument("--recompute", action="store_true", help="recompute every layer's activations in the backward pass")
    parser.add_argument("--distributed-optimizer", action="store_true", help="Megatron's distributed optimizer")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a heat map of all tensors to FILE.png (needs matplotlib)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one run may take (default 600)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    sizes = _sizes(arguments)
    tree = ReductionTree(arguments.leaves)
    for size in sizes:
        tree.owned(0, size)
    check_outputs(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU; there is none here")
    console = Console()
    console.print(
        f"[bold]{tree.fingerprint}[/]  {arguments.framework} {arguments.variant}{' tied' if arguments.tied else ''}"
        f"{' qk-norm' if arguments.qk_norm else ''} {arguments.dtype} on {arguments.device}, {arguments.steps} steps of {arguments.micro_batches} micro-batches"
    )
    rows = _compare_all(arguments, sizes, console)
    console.print(_table(rows))
    ok = _verdict(rows, console)
    if arguments.json:
        listed = [{name: value for name, value in asdict(row).items() if name not in ("ulps", "first_ulp")} for row in rows]
        for row in listed:  # JSON has no NaN
            row["losses"] = [loss if math.isfinite(loss) else None for loss in row["losses"]]
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"fingerprint": tree.fingerprint, "ok": ok, "rows": listed}, file, indent=1)
    if arguments.plot:
        from tpinv.cli.plot import heat_map

        heat_map(rows, arguments.plot, f"{arguments.framework} {arguments.variant} {arguments.dtype}, {tree.fingerprint}")
    return 0 if ok else 1


def _sizes(arguments: argparse.Namespace) -> tuple[int, ...]:
    try:
        sizes = sorted({1, *(int(size) for size in arguments.tp.split(","))})
    except ValueError:
        raise ValueError(f"--tp {arguments.tp!r} must be integers separated by commas, such as 1,2,4,8") from None
    if sizes[0] < 1 or len(sizes) < 2:
        raise ValueError(f"--tp {arguments.tp!r} must name at least one size above 1, such as 1,2,4,8")
    if arguments.steps < 1 or arguments.micro_batches < 1:
        raise ValueError(f"--steps {arguments.steps} and --micro-batches {arguments.micro_batches} must be at least 1")
    return tuple(sizes)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Before the work, not after it."""
    for option, path in ((f"--{name}", getattr(arguments, name, None)) for name in ("json", "csv", "plot")):
        if path and not os.path.isdir(directory := os.path.dirname(path) or "."):
            raise ValueError(f"{option} {path} cannot be written: there is no directory {directory}")
    if arguments.plot:
        try:
            importlib.import_module("matplotlib")
            supported = importlib.import_module("matplotlib.figure").Figure().canvas.get_supported_filetypes()
        except ModuleNotFoundError as error:
            raise ValueError(f"--plot needs matplotlib ({error}); pip install 'tpinv[plot]'") from error
        if os.path.splitext(arguments.plot)[1].lstrip(".") not in supported:
            raise ValueError(f"--plot {arguments.plot} must end in one of {', '.join(sorted(supported))}")


def _compare_all(arguments: argparse.Namespace, sizes: tuple[int, ...], console: Console) -> list[Row]:
    layouts = [(size, sp) for size in sizes for sp in ((False, True) if arguments.sequence_parallel and size > 1 else (False,))]
    module = FRAMEWORKS[arguments.framework]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    rows = []
    # The fork server must not touch CUDA, which whatever a framework imports may do.
    preload = [module] if arguments.device == "cpu" else []
    with warnings.catch_warnings(), bar, _environment_of_workers(arguments.device), RankPool(preload=preload) as pool:
        warnings.simplefilter("ignore")
        task = bar.add_task(f"importing {arguments.framework}", total=2 * len(layouts))
        try:
            framework = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{arguments.framework} cannot be imported ({error}); pip install 'tpinv[{arguments.framework}]'") from error
        for layers in ("stock", "tpinv"):
            for size, sp in layouts:
                bar.update(task, description=f"{layers}  TP={size}{'  SP' if sp else ''}")
                settings = _settings(framework, arguments, sizes, layers, size, sp)
                job = (_train_and_compare, size, framework.train, settings)
                started = time.monotonic()
                rows.append(row := pool.run(*job, timeout=arguments.timeout, device=arguments.device)[0])
                bar.advance(task)
                if not console.is_terminal:  # which shows no bar, and the table comes last
                    found = "trained" if size == 1 else f"{row.differing} of {row.tensors} differ"
                    console.print(f"{layers} TP={size}{' SP' if sp else ''}: {found}, {time.monotonic() - started:.0f} s")
    return rows


@contextlib.contextmanager
def _environment_of_workers(device: str):
    """What workers inherit: no GPUs for a comparison on the CPU, and no warnings, of which Megatron-Core has a lot."""
    saved = dict(os.environ)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.update({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _settings(framework, arguments: argparse.Namespace, sizes: tuple[int, ...], layers: str, size: int, sp: bool):
    given = {name: getattr(arguments, name) for name in ("device", "hidden", "num_layers", "recompute", "distributed_optimizer")}
    given = {name: value for name, value in given.items() if value not in ("cpu", 0)}
    if unknown := given.keys() - framework.Run.__dataclass_fields__.keys():
        raise ValueError(f"{', '.join(sorted(unknown))} cannot be chosen for {arguments.framework}; leave it out")
    return framework.Run(
        layers=layers,
        tp=size,
        sequence_parallel=sp,
        sizes=sizes,
        leaves=arguments.leaves,
        variant=arguments.variant,
        dtype=arguments.dtype,
        steps=arguments.steps,
        micro_batches=arguments.micro_batches,
        tied=arguments.tied,
        qk_norm=arguments.qk_norm,
        **given,
    )


_first: dict[str, Tensor] = {}  # on rank 0: what TP = 1 of the same layers recorded


def _train_and_compare(train, settings) -> Row | None:
    """Trains on this rank. Rank 0, which trains at every size, keeps the recording of TP = 1 and compares the others with it where they are."""
    recording = train(settings)
    if recording is None:
        return None
    if settings.tp == 1:
        _first.clear()
        _first.update(recording)
    return _row(settings.layers, settings.tp, settings.sequence_parallel, recording, _first)


def _row(layers: str, size: int, sp: bool, recording: dict[str, Tensor], reference: dict[str, Tensor]) -> Row:
    """Compares a recording with that of TP = 1. What was drawn before training must be equal, or the comparison would be unfair."""
    if recording.keys() != reference.keys():
        raise RuntimeError(f"{layers} TP={size} recorded other tensors than TP=1: {sorted(recording.keys() ^ reference.keys())}")
    differences = {name: compare(recording[name], reference[name]) for name in reference}
    unfair = [name for name, difference in differences.items() if name.startswith("initial/") and difference]
    if unfair:
        raise RuntimeError(f"{layers} TP={size} did not start from the weights of TP=1: {unfair}")
    computed = {name: difference for name, difference in differences.items() if not name.startswith("initial/")}
    wrong = {name: difference.max_ulp for name, difference in computed.items() if difference}
    first = next(iter(wrong), None)
    losses = [recording[name].item() for name in recording if name.endswith("/loss")]
    return Row(
        layers, size, sp, len(computed), len(wrong), first, wrong.get(first, 0), max(wrong.values(), default=0), losses,
        {name: wrong.get(name, 0) for name in computed},
    )  # fmt: skip


def _table(rows: list[Row]) -> Table:
    table = Table(title="tensors whose bytes differ from TP=1", title_justify="left")
    for name, justify in COLUMNS.items():
        table.add_column(name, justify=justify, overflow="fold")
    previous = None
    for row in rows:
        if previous not in (None, row.layers):
            table.add_section()
        previous = row.layers
        if row.tp == 1:
            found, first = "reference", ""
        else:
            color = "red" if row.differing else "green"
            found = f"[{color}]{row.differing} of {row.tensors}[/]"
            first = f"{row.first_difference}  ({row.first_ulp} ulp; at most {row.max_ulp} anywhere)" if row.differing else ""
        table.add_row(row.layers, str(row.tp), "on" if row.sp else "off", found, first, " ".join(f"{loss:.6f}" for loss in row.losses))
    return table


def _verdict(rows: list[Row], console: Console) -> bool:
    ours = sum(row.differing for row in rows if row.layers == "tpinv")
    stock = sum(row.differing for row in rows if row.layers == "stock")
    if ours:
        console.print("[red]tpinv differs: this is a bug, or a part of the model that tpinv does not cover[/]")
    elif not stock:
        console.print("[red]the stock layers do not differ either, so this run proves nothing; use more steps or larger sizes[/]")
    else:
        count = sum(row.tensors for row in rows if row.layers == "tpinv" and row.tp > 1)
        console.print(f"[green]tpinv: the same bytes in all {count} comparisons[/]; stock layers: {stock} of them differ")
    return not ours and stock > 0

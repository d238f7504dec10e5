"""``tpinv bench step``: a training step of Megatron-Core, stock against tpinv, at the same tensor-parallel size in one run.

A Llama-3-8B-shaped stack of a few layers, with embedding, output layer, loss, clipping and Adam; one micro-batch of one sequence, bf16 with fp32
gradients and master weights. What stock means is in tpinv/harness/megatron/bench.py. Bits are the business of ``tpinv verify``.
"""

import argparse
import csv
import datetime
import importlib
import os
import sys

import torch
from rich.console import Console
from rich.table import Table

from tpinv.testing import RankPool

TIMES = ("forward", "backward", "optimizer", "step")
COLUMNS = ("tp", "sp", "leaves", "node_dtype", "num_layers", "round", "layers", *TIMES, "peak", "loss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tp", nargs="+", type=int, default=[1], help="step, serve: tensor-parallel sizes, a GPU per rank (default 1); host: the sizes"
    )
    parser.add_argument("--num-layers", type=int, default=4, help="step: transformer layers (default 4)")
    parser.add_argument("--sequence", type=int, default=4096, help="step: tokens of the one sequence (default 4096)")
    parser.add_argument("--sequence-parallel", action="store_true", help="step: above TP = 1")
    parser.add_argument(
        "--spec", choices=["local", "te"], default="local", help="step: Megatron's local layers (default) or TransformerEngine's"
    )
    parser.add_argument("--profile", help="step: write the GPU kernels of one step, by time, to this file")


def run(arguments: argparse.Namespace) -> int:
    if max(arguments.tp) > torch.cuda.device_count():
        raise ValueError(f"--tp {max(arguments.tp)} needs a GPU per rank, there are {torch.cuda.device_count()}")
    if unmeasured := [tp for tp in arguments.tp if all(leaves % tp for leaves in arguments.leaves)]:
        raise ValueError(f"--tp {unmeasured} divides none of --leaves {arguments.leaves}; add a multiple of it")
    try:
        bench = importlib.import_module("tpinv.harness.megatron.bench")
    except ModuleNotFoundError as error:
        raise ValueError(f"Megatron-Core cannot be imported ({error}); pip install 'tpinv[megatron]'") from error
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # what Megatron asks for; workers inherit it
    console = Console(highlight=False, width=150)
    rows, kernels = [], []
    with RankPool() as pool:
        for tp in sorted(arguments.tp, reverse=True):  # downwards, as verify's sizes and for their reason
            for leaves in [n for n in arguments.leaves if n % tp == 0]:
                for turn in range(arguments.rounds):
                    for layers in ("stock", "tpinv"):
                        sp, last = arguments.sequence_parallel and tp > 1, turn == arguments.rounds - 1
                        of_row = {"leaves": leaves, "node_dtype": arguments.node_dtype, "num_layers": arguments.num_layers}
                        length, profile = arguments.sequence, bool(arguments.profile) and last
                        step = bench.Step(layers, tp, sp, arguments.spec, **of_row, sequence=length, profile=profile)
                        result = pool.run(bench.measure, tp, step, timeout=600, device="cuda")[0]
                        kernels += [(layers, tp, leaves, *kernel) for kernel in result.pop("kernels", [])]
                        console.print(layers, f"TP={tp}", *(f"{name} {value:.6g}" for name, value in result.items()))
                        rows.append({"tp": tp, "sp": sp, **of_row, "round": turn, "layers": layers} | result)
    rows.sort(key=lambda row: arguments.tp.index(row["tp"]))  # a stable sort: stock stays beside tpinv
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}, tpinv bench {' '.join(sys.argv[2:])}"
    )
    console.print(_table(rows))
    for path, names, lines in (
        (arguments.csv, COLUMNS, [[row[name] for name in COLUMNS] for row in rows]),
        (arguments.profile, ("layers", "tp", "leaves", "kernel", "calls", "milliseconds"), kernels),
    ):
        if path:
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([names, *lines])
    if arguments.plot:
        from tpinv.cli.plot import step_bars

        step_bars(
            rows, TIMES, arguments.plot, f"{torch.cuda.get_device_name()}, {arguments.num_layers} layers of Llama-3-8B's widths, bf16"
        )
    return 0


def _table(rows: list[dict]) -> Table:
    table = Table(title="milliseconds (tpinv / stock)", title_justify="left")
    for column in ("TP", "SP", "leaves", "round", *TIMES, "peak GB"):
        table.add_column(column, justify="right")
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        times = [f"{ours[name]:.1f} / {stock[name]:.1f} = {ours[name] / stock[name]:.3f}" for name in TIMES]
        peak = f"{ours['peak'] / 1e9:.1f} / {stock['peak'] / 1e9:.1f} = {ours['peak'] / stock['peak']:.3f}"
        table.add_row(str(ours["tp"]), "on" if ours["sp"] else "off", str(ours["leaves"]), str(ours["round"]), *times, peak)
    return table

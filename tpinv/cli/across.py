"""``tpinv verify --across transformers,megatron,torchtitan,vllm``: which frameworks agree on a checkpoint's logits and log-probabilities."""

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from tpinv.harness import across
from tpinv.harness.outputs import check_outputs, write_json

PACKAGES = {"transformers": "transformers", "megatron": "megatron.core", "torchtitan": "torchtitan", "vllm": "vllm"}


def run(arguments: argparse.Namespace, sizes: Sequence[int]) -> int:
    """0 if every framework agrees with transformers with tpinv's layers, and stock layers disagree somewhere; 1 if not."""
    frameworks = _frameworks(arguments)
    check_outputs(arguments)
    console, rows = Console(), []
    with tempfile.TemporaryDirectory(prefix="tpinv-") as directory:
        paths = {"checkpoint": arguments.model} if arguments.model else {kind: os.path.join(directory, kind) for kind in across.KINDS}
        for name, path in paths.items():
            if not arguments.model:
                across.make_checkpoint(name, path, arguments.hidden or 128, arguments.num_layers or 2)
            for layers in ("tpinv", "stock"):
                task = across.Task(path, layers, arguments.dtype, arguments.leaves, device=arguments.device)
                found = across.compare_frameworks(
                    frameworks, sizes, task, lambda row, name=name: console.print(_line(name, row)),
                    python=arguments.vllm_python, timeout=arguments.timeout,
                )  # fmt: skip
                rows += [(name, row) for row in found]
    console.print(_table(rows, f"{arguments.dtype} on {arguments.device}"))
    if arguments.json:
        write_json(
            arguments.json,
            {"dtype": arguments.dtype, "device": arguments.device, "rows": [{"model": name, **asdict(row)} for name, row in rows]},
        )
    ours = [row for _, row in rows if row.layers == "tpinv"]
    stock = [row for _, row in rows if row.layers == "stock"]
    agree = all(row.tensors and not row.differing for row in ours)
    console.print(f"tpinv: {sum(row.differing for row in ours)} of {sum(row.tensors for row in ours)} tensors differ from transformers' in one process; "
                  f"stock: {sum(row.differing for row in stock)} of {sum(row.tensors for row in stock)}")  # fmt: skip
    return 0 if agree and any(row.differing for row in stock) else 1


def _frameworks(arguments: argparse.Namespace) -> list[str]:
    """ValueError for a name that is not known, or a framework that is not installed."""
    frameworks = [name.strip() for name in arguments.across.split(",")]
    if arguments.device == "cuda" and arguments.dtype == "fp32" and "vllm" in frameworks:
        raise ValueError(
            "--across vllm --device cuda --dtype fp32: the plugin covers 16-bit models on GPUs; use --dtype bf16, or leave vllm out"
        )
    if arguments.model and (arguments.hidden or arguments.num_layers):
        raise ValueError("--hidden and --num-layers describe random models; leave them out with --model")
    for name in frameworks:
        if name not in across.FRAMEWORKS:
            raise ValueError(f"--across {name}: unknown framework; choose from {', '.join(across.FRAMEWORKS)}")
        if name == "vllm" and arguments.vllm_python:
            if not os.access(arguments.vllm_python, os.X_OK):
                raise ValueError(
                    f"--vllm-python {arguments.vllm_python} cannot be run; name the interpreter of an environment that has vLLM"
                )
            continue
        parts = PACKAGES[name].split(".")
        if any(importlib.util.find_spec(".".join(parts[: i + 1])) is None for i in range(len(parts))):
            fix = "; or name the environment that has it with --vllm-python" if name == "vllm" else ""
            raise ValueError(f"--across {name}: {PACKAGES[name]} is not installed; pip install 'tpinv[{name}]'{fix}")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--across compares with transformers, which is not installed; pip install 'tpinv[transformers]'")
    return frameworks


def _line(name: str, row: across.Row) -> str:
    variant = f" {row.variant}" if row.variant else ""
    return f"{name} {row.layers} {row.framework} TP={row.tp}{variant}: {row.differing} of {row.tensors} differ"


def _table(rows, about: str) -> Table:
    table = Table(title=f"logits and log-probabilities against transformers in one process, {about}", title_justify="left")
    for column in ("model", "framework", "TP", "", "tpinv", "stock"):
        table.add_column(column)
    stock = {(name, row.framework, row.tp, row.variant): row for name, row in rows if row.layers == "stock"}
    for name, row in rows:
        if row.layers == "tpinv":
            twin = stock[name, row.framework, row.tp, row.variant]
            told = [f"{r.differing} of {r.tensors} differ" if r.differing else "the same bytes" for r in (row, twin)]
            table.add_row(name, row.framework, str(row.tp), row.variant, *told)
    return table

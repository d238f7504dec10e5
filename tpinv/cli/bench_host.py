"""``tpinv bench host``: all that depends on how many GPUs one host has, in one run: bytes at every tensor-parallel size, what they cost, faults.

    tpinv bench host --tp 1 2 4 8 --out docs/benchmarks

One directory, DIRECTORY/DATE-GPU-host, of one commit:

    about.json          GPUs, versions, commit; every command with its status and seconds; what was not run, and why
    verify-*.json       tpinv verify on GPUs: Megatron-Core (local spec, TransformerEngine's if it is installed), TorchTitan's Trainer; 20 steps,
                        sequence parallelism off and on; vLLM's tokens, log-probabilities and KV bytes if it is installed
    collectives-P.csv   bench collectives on P GPUs
    step.csv, serve.csv bench step and bench serve, stock beside tpinv
    delays.json         10,000 all-reduces among ranks that are late at random; killed-*.json: a rank killed in training, a worker in serving
    summary.json        a line for each part: what it found

Sizes above the number of GPUs share them where only bytes are compared, and are not timed. A part that cannot be run for want of a package is
listed with its reason; one that fails does not stop the others, and the exit status is then 2 (1 if only bytes differed). ``--parts`` names
those to run, ``--steps``, ``--calls`` and ``--part-seconds`` say how much of each.
"""

import argparse
import csv
import datetime
import importlib.util
import json
import os
import re
from pathlib import Path

import torch
from rich.console import Console

from tpinv.cli.bench_all import ROOT, describe_machine, run_parts
from tpinv.harness.outputs import write_json

PARTS = (
    "verify-megatron", "verify-te", "verify-torchtitan", "delays", "killed-rank", "step", "collectives", "verify-vllm", "serve",
    "killed-server",
)  # fmt: skip
CHECKED = "verify", "delays", "killed"  # parts whose status 1 means: it ran, and what it checks does not hold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"host: of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="host: optimizer steps of what is verified (default 20)")
    parser.add_argument("--calls", type=int, default=10_000, help="host: all-reduces among late ranks (default 10000)")
    parser.add_argument("--part-seconds", type=float, default=3600.0, help="host: a part that takes longer is ended (default 3600)")


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False)
    gpus, sizes = torch.cuda.device_count(), sorted({1, *arguments.tp}) if arguments.tp != [1] else default_sizes(torch.cuda.device_count())
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-")
    out = Path(arguments.out or "docs/benchmarks").resolve() / f"{datetime.date.today()}-{name}-x{gpus}-host"
    out.mkdir(parents=True, exist_ok=True)
    parts, missing = commands(
        os.path.relpath(out, ROOT), gpus, sizes, installed, arguments.steps, arguments.calls, arguments.part_seconds
    )  # fmt: skip
    if arguments.parts:
        parts, missing = ({part: what for part, what in of.items() if _kind(part) in arguments.parts} for of in (parts, missing))
    about = describe_machine() | {"gpu_count": gpus, "sizes": sizes, "not_run": missing}
    console.print(
        f"{about['gpu']} x {gpus}, TP {sizes}, commit {about['commit']}{', changed' if about['changed'] else ''}; writing {out}",
        soft_wrap=True,
    )
    for part, why in missing.items():
        console.print(f"{part}: not run, {why}")
    if max(sizes) > gpus:
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")  # for bytes; torch asks for it in as many words
    failed = run_parts(parts, out, about, console, arguments.part_seconds)
    found = summary(out, about["commands"])
    write_json(str(out / "summary.json"), found)
    for line in found:
        console.print(f"{line['part']}: {line['found']}", soft_wrap=True)
    if not failed:
        return 0
    status = {part["part"]: part["status"] for part in about["commands"]}
    console.print(f"{', '.join(failed)} did not pass; logs are in {out}")
    return 1 if all(status[part] == 1 and part.startswith(CHECKED) for part in failed) else 2


def default_sizes(gpus: int) -> list[int]:
    """Powers of two up to 8, or up to the number of GPUs where there are more."""
    return [1 << n for n in range(max(8, gpus).bit_length())]


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it would be in
        return False


def _kind(part: str) -> str:
    """One of PARTS: collectives-4 is of collectives."""
    return "collectives" if part.startswith("collectives-") else part


def commands(
    out: str, gpus: int, sizes: list[int], installed, steps: int = 20, calls: int = 10_000, seconds: float = 3600.0
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Arguments of python by the name of the part, and the parts that cannot be run with the reason. ``out`` is relative to the repository;
    ``seconds`` is what a part may take: late ranks end their calls before that."""
    tp, timed = ",".join(map(str, sizes)), [str(size) for size in sizes if size <= gpus]
    leaves = str(max(8, *sizes))
    verify = ["-m", "tpinv", "verify", "--device", "cuda", "--tp", tp, "--leaves", leaves, "--dtype", "bf16"]
    trained = [*verify, "--sequence-parallel", "--steps", str(steps), "--timeout", "1200"]
    bench, faults = ["-m", "tpinv", "bench"], ["-m", "tpinv.harness.faults"]
    wide, late = ["--hidden", "1024", "--num-layers", "2"], [*faults, "delays", "--ranks", str(sizes[-1])]
    parts = {
        "verify-megatron": ("megatron.core", [*trained, *wide, "--json", f"{out}/verify-megatron.json"]),
        "verify-te": ("transformer_engine", [*trained, *wide, "--spec", "te", "--json", f"{out}/verify-te.json"]),
        "verify-torchtitan": ("torchtitan", [*trained, "--framework", "torchtitan", "--json", f"{out}/verify-torchtitan.json"]),
        "delays": ("torch", [*late, "--calls", str(calls), "--seconds", f"{0.7 * seconds:g}", "--json", f"{out}/delays.json"]),
        "killed-rank": ("torch", [*faults, "killed-rank", "--ranks", str(sizes[-1]), "--json", f"{out}/killed-rank.json"]),
        "step": ("megatron.core", [*bench, "step", "--tp", *timed, "--leaves", leaves, "--rounds", "2", "--csv", f"{out}/step.csv"]),
    }
    for ranks in [size for size in sizes if 1 < size <= gpus]:
        parts[f"collectives-{ranks}"] = ("torch", [*bench, "collectives", "--ranks", str(ranks), "--csv", f"{out}/collectives-{ranks}.csv"])
    served = ",".join(timed)
    in_engine = ["-m", "tpinv", "verify", "--framework", "vllm", "--device", "cuda", "--tp", served, "--leaves", leaves, "--dtype", "bf16"]
    parts["verify-vllm"] = ("vllm", [*in_engine, "--timeout", "1200", "--json", f"{out}/verify-vllm.json"])
    parts["serve"] = ("vllm", [*bench, "serve", "--tp", *timed, "--leaves", leaves, "--csv", f"{out}/serve.csv"])
    if gpus > 1:
        parts["killed-server"] = ("vllm", [*faults, "killed-server", "--ranks", timed[-1], "--json", f"{out}/killed-server.json"])
    present = {module: installed(module) for module in {module for module, _ in parts.values()}}
    missing = {part: f"{module} is not installed" for part, (module, _) in parts.items() if not present[module]}
    return {part: command for part, (module, command) in parts.items() if present[module]}, missing


def summary(out: Path, ran: list[dict]) -> list[dict]:
    """What each part found, in its own words, from the files that are there."""
    lines = []
    for part in ran:
        name, found = part["part"], f"status {part['status']}"
        if (file := out / f"{name}.json").exists() and isinstance(data := json.loads(file.read_text()), dict):
            rows = [row for row in data.get("rows", ()) if row.get("layers") == "tpinv" and "differing" in row]
            if rows := [row for row in rows if row.get("tp") != 1 or "tensors" not in row]:  # TP = 1 of a training is the reference
                found = f"{sum(row['differing'] for row in rows)} of {sum(row.get('tensors', row.get('tokens', 0)) for row in rows)} differ"
            elif "wrong" in str(data):
                calls, asked = data["ranks"][0]["calls"], data.get("asked")
                found = f"{sum(rank['wrong'] for rank in data['ranks'])} of {sum(rank['calls'] for rank in data['ranks'])} results differ"
                found += f", {calls} of {asked} calls in the time" if asked and calls < asked else ""
            elif "seconds" in str(data):
                seconds = [rank["seconds"] for rank in data.get("ranks", [data])]
                found = f"raised after {seconds} s, limit {data['limit']:g}" if data["ok"] else f"did not raise everywhere: {seconds}"
        elif (file := out / f"{name}.csv").exists():
            with open(file, newline="", encoding="utf-8") as rows:
                found = f"{sum(1 for _ in csv.DictReader(rows))} rows in {file.name}"
        lines.append({"part": name, "status": part["status"], "found": found})
    return lines

"""``tpinv bench all`` (``make bench``): everything that README and docs/benchmarks*.md say about speed, measured anew on this machine in one run.

One directory, DIRECTORY/DATE-GPU, of one commit:

    about.json          GPU and driver, versions, commit, whether the tree was clean, every command with its status and seconds
    gemm.csv, .png      ``bench gemm``: products against cuBLAS
    collectives-P.csv, .png   ``bench collectives``: on P = 2 and all GPUs, where there are two
    step.csv, .png      ``bench step``: Megatron-Core at TP = 1, and at 2 where there are two GPUs; step-kernels.csv: its kernels by time
    torchtitan.log      a step of TorchTitan, bytes compared
    host-time.log       what a call costs the host
    *.log               what each command printed
    summary.json, summary.md   README's tables, each number with the file it is from

A part that fails is told and does not stop the others; the exit status is then 2 in the end. About half an hour on one H100.
"""

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from tpinv.harness.outputs import write_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "megatron-core", "torchtitan", "numpy", "tpinv")


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False)
    gpus = torch.cuda.device_count()
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-")
    out = Path(arguments.out or "docs/benchmarks").resolve() / f"{datetime.date.today()}-{name}"
    out.mkdir(parents=True, exist_ok=True)
    about = describe_machine()
    console.print(f"{about['gpu']} x {gpus}, commit {about['commit']}{', changed' if about['changed'] else ''}; writing {out}")
    failed = run_parts(commands(os.path.relpath(out, ROOT), gpus), out, about, console)
    found = summary(out)
    write_json(str(out / "summary.json"), found)
    text = markdown(found, about)
    (out / "summary.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, soft_wrap=True)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; their logs are in {out}")
    return 0


def run_parts(parts: dict[str, list[str]], out: Path, about: dict, console: Console, timeout: float | None = None) -> list[str]:
    """Runs python with each part's arguments in the repository, one after the other, each into a log of its name; adds status and seconds
    to ``about["commands"]`` and writes that after each. Returns the parts that failed, or took longer than ``timeout`` seconds (status 124)."""
    failed = []
    for part, command in parts.items():
        started = time.monotonic()
        with open(out / f"{part}.log", "w", encoding="utf-8") as log:
            print(f"# {' '.join(command)}", file=log, flush=True)
            process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = 124
            finally:
                _end(process)
        seconds = time.monotonic() - started
        about["commands"].append({"part": part, "command": " ".join(command), "status": status, "seconds": round(seconds, 1)})
        write_json(str(out / "about.json"), about)  # as they come: a run may be cut off
        failed += [part] if status else []
        console.print(f"{part}: {f'failed with status {status}, see {out}/{part}.log' if status else 'done'}, {seconds:.0f} s")
    return failed


def _end(process: subprocess.Popen) -> None:
    """A part that is still there: as by Ctrl-C, so that it ends its ranks, which are process groups of their own; then by force."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def commands(out: str, gpus: int) -> dict[str, list[str]]:
    """Arguments of python, by the name of the part, to be run in the repository. ``out`` is relative to that."""
    bench = ["-m", "tpinv", "bench"]
    parts = {"gemm": [*bench, "gemm", "--rounds", "5", "--csv", f"{out}/gemm.csv", "--plot", f"{out}/gemm.png"]}
    for ranks in sorted({2, gpus}) if gpus > 1 else ():
        files = ["--csv", f"{out}/collectives-{ranks}.csv", "--plot", f"{out}/collectives-{ranks}.png"]
        parts[f"collectives-{ranks}"] = [*bench, "collectives", "--ranks", str(ranks), *files]
    sizes = ["1", "2"] if gpus > 1 else ["1"]
    files = ["--csv", f"{out}/step.csv", "--plot", f"{out}/step.png", "--profile", f"{out}/step-kernels.csv"]
    parts["step"] = [*bench, "step", "--tp", *sizes, "--leaves", "8", "--num-layers", "4", "--rounds", "2", *files]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(min(gpus, 2))]
    parts["torchtitan"] = [*ranks, "-m", "tpinv.harness.torchtitan.bench", "--layers", "4", "--tokens", "4096"]
    if (ROOT / "docs/benchmarks/host_time.py").exists():  # not in an installed package
        parts["host-time"] = [*ranks, "docs/benchmarks/host_time.py"]
    return {name: [str(part) for part in command] for name, command in parts.items()}


def describe_machine() -> dict:
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    query = ("nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader")
    return {
        "date": str(datetime.date.today()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": said(*query).splitlines(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": said("git", "rev-parse", "HEAD") or "unknown",
        "changed": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
        "commands": [],
    }


# -- README's tables ------------------------------------------------------------------------------------------------------------------


def summary(out: Path) -> dict:
    """What README says, of the files that are there: {table: [rows]}, a row with the ``file`` it is from."""
    tables = {"step": _step(out / "step.csv"), "gemm": _gemm(out / "gemm.csv")}
    tables["collectives"] = [row for file in sorted(out.glob("collectives-*.csv")) for row in _collectives(file)]
    return tables


def _rows(file: Path) -> list[dict]:
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _step(file: Path) -> list[dict]:
    """tpinv's time over stock's of a whole step and its parts, and of the peak of memory: medians over rounds."""
    rows, found = _rows(file), []
    for tp, sp, leaves in dict.fromkeys((row["tp"], row["sp"], row["leaves"]) for row in rows):
        here = {
            n: [row for row in rows if (row["tp"], row["sp"], row["leaves"], row["layers"]) == (tp, sp, leaves, n)]
            for n in ("stock", "tpinv")
        }
        if not all(here.values()):
            continue
        ratio = lambda what: round(_median(here["tpinv"], what) / _median(here["stock"], what), 3)  # noqa: B023, E731
        of = {what: ratio(what) for what in ("forward", "backward", "optimizer", "step", "peak")}
        found.append({"tp": int(tp), "sequence_parallel": sp == "True", "leaves": int(leaves), **of, "file": file.name})
    return found


def _median(rows: list[dict], what: str) -> float:
    return statistics.median(float(row[what]) for row in rows)


def _gemm(file: Path) -> list[dict]:
    """cuBLAS's time over tpinv's: medians over linears and numbers of tokens."""
    rows = [row for row in _rows(file) if row.get("implementation", "tpinv") == "tpinv" and row["product"] != "host"]
    found = []
    for product in ("forward", "dgrad", "wgrad"):
        for name, tokens in (("1024 and 4096", {1024, 4096}), ("16", {16})):
            ratios: dict[str, list[float]] = {}
            for row in rows:
                if row["product"] == product and int(row["M"]) in tokens:
                    ratios.setdefault(row["leaves"], []).append(float(row["ratio"]))
            if ratios:
                by_leaves = {leaves: round(statistics.median(values), 3) for leaves, values in ratios.items()}
                found.append({"product": product, "tokens": name, "ratio_by_leaves": by_leaves, "file": file.name})
    return found


def _collectives(file: Path) -> list[dict]:
    rows = [row for row in _rows(file) if row["operation"] == "all_reduce"]
    found = []
    for size in (1 << 15, 1 << 21, 1 << 25):
        here = {row["implementation"]: float(row["us"]) for row in rows if int(row["size"]) == size}
        if here:
            found.append({"ranks": int(file.stem.rpartition("-")[2]), "bytes": size, "microseconds": here, "file": file.name})
    return found


def markdown(found: dict, about: dict) -> str:
    """The same for reading, with the machine and the commit."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [f"{about['gpu']}, {versions}, CUDA {about['cuda']}, commit {about['commit']}, {about['date']}", ""]
    if found["step"]:
        lines += ["| tpinv / stock | forward | backward | optimizer | step | peak memory |", "|---|---|---|---|---|---|"]
        for row in found["step"]:
            name = f"TP = {row['tp']}{', SP' if row['sequence_parallel'] else ''}, L = {row['leaves']}"
            lines.append(f"| {name} | {' | '.join(str(row[what]) for what in ('forward', 'backward', 'optimizer', 'step', 'peak'))} |")
        lines.append("")
    leaves = sorted({int(n) for row in found["gemm"] for n in row["ratio_by_leaves"]})
    if leaves:
        lines += [f"| share of cuBLAS by local leaves | {' | '.join(map(str, leaves))} |", f"|---|{'---|' * len(leaves)}"]
        for row in found["gemm"]:
            cells = " | ".join(str(row["ratio_by_leaves"].get(str(n), "")) for n in leaves)
            lines.append(f"| {row['product']}, {row['tokens']} tokens | {cells} |")
        lines.append("")
    for row in found["collectives"]:
        times = ", ".join(f"{name} {value:g} us" for name, value in row["microseconds"].items())
        lines.append(f"- all-reduce of {row['bytes'] >> 10} KB on {row['ranks']} GPUs: {times}")
    return "\n".join(lines) + "\n"

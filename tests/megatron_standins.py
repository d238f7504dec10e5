"""Runs test files in a process that can import stand-ins for TransformerEngine or Apex, which Megatron looks for when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def environment(standins: list[str]) -> dict:
    path = [*(str(HERE / name) for name in standins), os.environ.get("PYTHONPATH", "")]
    named = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "STANDINS": " ".join(standins)}
    return {**os.environ, **named, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_tests(standins: list[str], *files: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / file) for file in files)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment(standins), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

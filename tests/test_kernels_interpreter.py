"""Runs interpreted_*.py with TRITON_INTERPRET=1, which Triton reads when a kernel is defined: hence a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ["interpreted_step", "interpreted_kernels", "interpreted_attention", "interpreted_attention_options"]


@pytest.fixture(scope="module")
def processes():
    """All at once: an interpreter keeps one core busy."""
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    started = {
        name: subprocess.Popen(
            [*command, str(here / f"{name}.py")],
            cwd=here.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in NAMES
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name, processes):
    pytest.importorskip("triton")
    output, _ = processes[name].communicate(timeout=600)
    assert processes[name].returncode == 0, output[-6000:]

"""TorchTitan's RL controller: upstream's limits are lifted where the override is on both sides, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchtitan")

pytestmark = pytest.mark.torchtitan


def test_controller_config():
    """In a process of its own, whose imports of vLLM and others are stand-ins."""
    script = Path(__file__).with_name("torchtitan_rl.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert "every check passed" in done.stdout, done.stdout + done.stderr

"""Every test module can be collected wherever tests run: on a GPU machine with torch 2.11, with and without the frameworks, and without
CUDA being initialised, after which no forked worker could use it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = """
import os, sys
import torch

hidden = os.environ["HIDDEN"].split(",")


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def initialise():
    raise AssertionError("CUDA is initialised while tests are collected")


sys.meta_path.insert(0, Hide())
torch.__version__ = torch.torch_version.TorchVersion("2.11.0")
torch.cuda.is_available, torch.cuda.device_count, torch.cuda._lazy_init = lambda: True, lambda: 2, initialise
"""


@pytest.mark.parametrize("hidden", ["", "megatron,torchtitan"], ids=["with the frameworks", "without"])
def test_every_module_is_collected(hidden, tmp_path):
    (tmp_path / "pretend.py").write_text(PLUGIN)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "pretend", "-p", "no:cacheprovider", str(here)],
        cwd=here.parent,
        env={**os.environ, "HIDDEN": hidden, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]

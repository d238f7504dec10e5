"""Every test module can be collected wherever tests run: on a GPU machine with torch 2.11, with and without the frameworks, and without
CUDA being initialised, after which no forked worker could use it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import contextlib, importlib, json, os, sys
import pytest, torch, hypothesis

for name in ("triton", "transformers"):  # what both need, once
    with contextlib.suppress(ImportError):
        importlib.import_module(name)


class Hide:
    def __init__(self, hidden):
        self.hidden = hidden

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def initialise():
    raise AssertionError("CUDA is initialised while tests are collected")


torch.__version__ = torch.torch_version.TorchVersion("2.11.0")
torch.cuda.is_available, torch.cuda.device_count, torch.cuda._lazy_init = lambda: True, lambda: 2, initialise
children = {}
for hidden in json.loads(sys.argv[2]):
    if not (child := os.fork()):
        sys.meta_path.insert(0, Hide(hidden.split(",")))
        out = os.open(f"collected-{hidden}", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", sys.argv[1], sys.argv[1] + "/tests"])
        sys.stdout.flush()
        os._exit(status)
    children[child] = hidden
print(json.dumps({children[child]: os.waitstatus_to_exitcode(status) for child, status in (os.wait() for _ in [*children])}))
"""
HIDDEN = {"with the frameworks": "", "without": "megatron,torchtitan"}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """(exit status, output) by what is hidden; both at once, from one process that has imported torch."""
    directory = tmp_path_factory.mktemp("collected")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1]), json.dumps([*HIDDEN.values()])],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {hidden: (status, (directory / f"collected-{hidden}").read_text()) for hidden, status in json.loads(done.stdout).items()}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_every_module_is_collected(hidden, collected):
    status, output = collected[hidden]
    assert status == 0, output[-3000:]
    assert "tests/test_tree.py::" in output
    assert ("tests/test_megatron_model.py::" in output) == (not hidden)

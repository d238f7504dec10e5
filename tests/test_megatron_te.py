"""TransformerEngine under Megatron-Core, by stand-ins (te_standins): in a process of its own, since Megatron looks for it when it is
imported. On a GPU with the real TransformerEngine: ``tpinv verify --framework megatron --spec te``."""

import subprocess
import sys

import pytest

pytest.importorskip("megatron.core")

import import_paths
from megatron_standins import environment, run_tests

pytestmark = pytest.mark.megatron


def test_with_te():
    run_tests(["te_standins"], "import_paths.py", "te_cases.py")


def test_import_paths():
    """tpinv itself imports neither, though they are there; Megatron's integration finds TE where Megatron does."""
    import_paths.test_what_is_found()
    code = "import sys, tpinv, tpinv.layers, tpinv.optim\nassert not {'transformer_engine', 'apex', 'megatron'} & sys.modules.keys()\n"
    both = environment(["te_standins", "apex_standins"])
    done = subprocess.run([sys.executable, "-c", code], env=both, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.one_version  # the cases above train by the same functions
def test_verify_of_te_needs_te_and_finds_nothing_that_differs():
    command = [sys.executable, "-m", "tpinv", "verify", "--framework", "megatron", "--spec", "te", "--tp", "1,2", "--steps", "2"]
    done = subprocess.run(command, env=environment(["te_standins"]), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the same bytes in all" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    done = subprocess.run(command, env=environment([]), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "needs TransformerEngine, which cannot be imported" in done.stdout + done.stderr

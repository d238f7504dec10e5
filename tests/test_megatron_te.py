"""TransformerEngine and Apex under Megatron-Core, by stand-ins (te_standins, apex_standins): each combination in a process of its own, since
Megatron looks for them when it is imported. On a GPU with the real TransformerEngine: ``tpinv verify --framework megatron --spec te``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

pytestmark = pytest.mark.megatron

HERE = Path(__file__).parent
ENVIRONMENTS = {
    "te": (["te_standins"], ["te_cases.py"]),
    "apex": (["apex_standins"], ["apex_cases.py"]),
    "te and apex": (["te_standins", "apex_standins"], ["apex_cases.py"]),
}


def environment(standins: list[str]) -> dict:
    path = [*(str(HERE / name) for name in standins), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_with(name):
    standins, files = ENVIRONMENTS[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / file) for file in files)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment(standins), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("standins", [[], ["te_standins"], ["apex_standins"], ["te_standins", "apex_standins"]], ids=" ".join)
def test_import_paths(standins):
    """tpinv itself imports neither; Megatron's integration imports what Megatron has imported, and finds TE where Megatron does."""
    code = (
        "import sys, tpinv, tpinv.layers, tpinv.optim\n"
        "assert not {'transformer_engine', 'apex', 'megatron'} & sys.modules.keys()\n"
        "import tpinv.integrations.megatron as m\n"
        "from tpinv.integrations.megatron import te\n"
        "from megatron.core.tensor_parallel import layers\n"
        f"assert te.INSTALLED == {'te_standins' in standins} == ('transformer_engine' in sys.modules), te.INSTALLED\n"
        f"assert bool(te.replacements()) == {'te_standins' in standins}\n"
        "assert layers._grad_accum_fusion_available\n"
        f"assert (layers.fused_weight_gradient_mlp_cuda.__class__.__name__ == 'module') == {'apex_standins' in standins}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(standins), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_verify_of_te_needs_te_and_finds_nothing_that_differs():
    command = [sys.executable, "-m", "tpinv", "verify", "--framework", "megatron", "--spec", "te", "--tp", "1,2", "--steps", "2"]
    done = subprocess.run(command, env=environment(["te_standins"]), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the same bytes in all" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    done = subprocess.run(command, env=environment([]), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "needs TransformerEngine, which cannot be imported" in done.stdout + done.stderr

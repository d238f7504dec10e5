"""The GRPO loop itself on a CPU: TRL, accelerate's FSDP2 on two ranks, and vLLM at TP = 2 in the same processes (make test-trl)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("vllm")

from trl.import_utils import is_vllm_available

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not is_vllm_available(), reason="TRL accepts vLLM 0.22 to 0.31")]
EXAMPLE = Path(__file__).parents[1] / "examples" / "grpo_smollm2.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sys.path.insert(0, str(EXAMPLE.parent))
    import smollm2

    return smollm2.write_random(str(tmp_path_factory.mktemp("random")))


def curve(model: str, path: Path, layers: str, ranks: int, *more: str) -> list[dict]:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29641"] if ranks > 1 else []
    size = ["--steps", "3", "--prompts", "2", "--generations", "4", "--completion", "16", "--tp", str(ranks), "--learning-rate", "1e-3"]
    command = [sys.executable, *launch, str(EXAMPLE), "--layers", layers, "--model", model, "--json", str(path), *size, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert path.exists(), done.stderr[-3000:]
    rows = json.loads(path.read_text())["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["tokens"] for row in rows), done.stderr[-3000:]
    return rows


@pytest.mark.parametrize("temperature", ["1", "0.7"])
def test_trainer_and_rollout_are_equal_in_every_step(temperature, model, tmp_path):
    for row in curve(model, tmp_path / "tpinv.json", "tpinv", 2, "--fsdp", "--temperature", temperature):
        assert (row["differing"], row["difference"], row["ratio_min"], row["ratio_max"], row["kl"]) == (0, 0, 1, 1, 0)


def test_stock_is_not(model, tmp_path):
    for row in curve(model, tmp_path / "stock.json", "stock", 1):
        assert row["differing"] and row["difference"] > 0 and row["kl"] > 0

"""What a trainer of the Megatron kind does: a rollout by vLLM at TP = 2, scored by Megatron-Core at TP = 1, 2, 4 and with sequence
parallelism from the same Hugging Face checkpoint, has the rollout's log-probabilities to the byte. Stock's rollout has not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("megatron.core")

from tpinv.cli import main

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
EXAMPLE = Path(__file__).parents[1] / "examples" / "rollout_kl.py"
SIZES = [(1, []), (2, []), (2, ["--sequence-parallel"]), (4, []), (4, ["--sequence-parallel"])]


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """A directory with the checkpoint and answers.jsonl of the plugin, answers-stock.jsonl of vLLM as it is."""
    path = tmp_path_factory.mktemp("rollout")
    sys.path.insert(0, str(EXAMPLE.parent))
    import smollm2

    smollm2.write_random(str(path / "model"))
    settings = ["--model", str(path / "model"), "--out", str(path), "--tp", "2", "--answers", "3", "--tokens", "8"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *settings], capture_output=True, text=True, timeout=1000, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (path / "answers.jsonl").exists() and (path / "answers-stock.jsonl").exists(), done.stderr[-3000:]
    assert done.returncode == 0, done.stdout[-3000:]
    return path


@pytest.mark.parametrize(("tp", "more"), SIZES)
def test_megatron_scores_what_the_rollout_returned(tp, more, rollout, capsys):
    arguments = ["--model", str(rollout / "model"), "--framework", "megatron", "--tp", str(tp), *more]
    assert main(["audit", str(rollout / "answers.jsonl"), *arguments]) == 0
    assert f"24 tokens: all equal (megatron, TP = {tp}" in capsys.readouterr().out
    assert main(["audit", str(rollout / "answers-stock.jsonl"), *arguments]) == 1

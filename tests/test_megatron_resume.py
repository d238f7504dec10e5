"""Training saved at one tensor-parallel size and resumed at another goes on as if nothing had happened: every later byte."""

from dataclasses import replace

import pytest

pytest.importorskip("megatron.core")

import megatron_jobs as jobs

from tpinv.harness.megatron.verify import Run
from tpinv.testing import compare

pytestmark = pytest.mark.megatron

SAVED, STEPS = 2, 4
RUNS = {
    "llama, bf16 with fp32 masters": Run("tpinv", 2, False, (1, 2, 4), dtype="bf16", steps=STEPS, num_layers=1),
    "gpt, tied, fp32": Run("tpinv", 2, True, (1, 2, 4), variant="gpt", tied=True, steps=STEPS, num_layers=1),
}


def continuation(pool, run: Run, directory, *, at: list[tuple[int, bool]]) -> list[dict[str, str]]:
    """Saves ``run`` after SAVED steps and resumes it at each size of ``at``: what differs in the steps after that."""
    whole = pool.run(jobs.in_megatron, run.tp, jobs.train_and_save, run.tp, run, str(directory), SAVED)[0]
    differences = []
    for tp, sp in at:
        other = replace(run, tp=tp, sequence_parallel=sp, seed=4321)
        resumed = pool.run(jobs.in_megatron, tp, jobs.resume, tp, other, str(directory), SAVED)[0]
        later = [name for name in resumed if name in whole and not name.startswith(("initial", "step0/logits"))]
        assert {f"step{step}/loss" for step in range(SAVED, STEPS)} < set(later) and any(name.startswith("final/") for name in later)
        differences.append({name: str(d) for name in later if (d := compare(resumed[name], whole[name]))})
    return differences


@pytest.mark.parametrize("name", [*RUNS][:1] + [pytest.param(name, marks=pytest.mark.one_version) for name in [*RUNS][1:]])
def test_resumed_at_other_sizes(name, megatron_pool, tmp_path):
    assert continuation(megatron_pool, RUNS[name], tmp_path / "saved", at=[(4, True), (1, False)]) == [{}, {}]


@pytest.mark.one_version
def test_stock_goes_on_differently(megatron_pool, tmp_path):
    run = replace(RUNS["llama, bf16 with fp32 masters"], layers="stock")
    same, other = continuation(megatron_pool, run, tmp_path / "saved", at=[(2, False), (4, False)])
    assert not same and other

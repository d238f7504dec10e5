"""The schedules of tpinv verify --framework vllm, which need no vLLM."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from tpinv.harness.vllm import schedule
from tpinv.harness.vllm.verify import Row, against, model_limits, verdict


def test_requests_are_a_function_of_the_seed():
    first, again, other = (schedule.make_requests(seed, 12, 500, 150) for seed in (1, 1, 2))
    assert first == again != other
    assert all(0 < len(r.prompt) <= 150 and r.tokens >= 8 and set(r.prompt) <= set(range(3, 500)) for r in first)
    shared = [a for a in first for b in first if a is not b and a.prompt[:50] == b.prompt[:50]]
    assert len(shared) >= 3 and {r.seed is None for r in first} == {True, False} and any(r.top_k for r in first)


def test_plans_serve_every_request_in_every_wave_and_leave_too_few_blocks():
    requests = schedule.make_requests(1, 12, 500, 150)
    plan = schedule.crowded(3, requests, 32)
    assert plan == schedule.crowded(3, requests, 32) != schedule.crowded(4, requests, 32)
    for wave in plan.waves:
        assert sorted(name for name, _ in wave) == sorted(r.name for r in requests)
        assert [step for _, step in wave] == sorted(step for _, step in wave)
    assert plan.waves[0] != plan.waves[1]
    needed = [-(-(len(r.prompt) + r.tokens) // 32) for r in requests]
    assert max(needed) < plan.blocks < sum(needed)
    assert plan.budget < max(len(r.prompt) for r in requests)
    assert schedule.alone(requests).budget >= max(len(r.prompt) for r in requests)


def row(layers="tpinv", differing=0, preemptions=1, cached=1, plan="crowded 1") -> Row:
    return Row(layers, 2, plan, 10, differing, 2, 0, None, 5, preemptions, cached, 1.0)


def test_verdicts():
    console = Console(quiet=True)
    assert verdict([row("stock", 3), row()], console)
    assert not verdict([row("stock", 3), row(differing=1)], console)
    with pytest.raises(ValueError, match="proves nothing"):
        verdict([row("stock"), row()], console)
    with pytest.raises(ValueError, match="no preemptions"):
        verdict([row("stock", 3), row(preemptions=0)], console)
    with pytest.raises(ValueError, match="no cached"):
        verdict([row("stock", 3), row(cached=0)], console)


@pytest.mark.parametrize("planted", [None, "r1", "r0 wave 1"])
def test_every_wave_is_compared(planted):
    answer = {"tokens": [5, 6], "log_probs": ["aa", "bb"], "candidates": [[], []], "prompt_log_probs": ["cc"]}
    reference = {name: answer for name in ("r0", "r1")}
    answers = reference | {f"{name} wave 1": answer for name in reference}
    if planted:
        answers |= {planted: answer | {"log_probs": ["aa", "b0"]}}
    counts = {"steps": 9, "preemptions": 1, "cached": 1}
    job = {"layers": "tpinv", "tp": 2, "plan": {"name": "crowded 1"}, "requests": [{"name": "r0"}, {"name": "r1"}]}
    found = against(job, {"answers": answers, "counts": counts, "seconds": 1.0}, reference)
    assert (found.tokens, found.requests, found.differing, found.first) == (12, 4, int(planted is not None), planted)


def test_a_model_must_be_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint directory"):
        model_limits(str(tmp_path))
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    assert model_limits(str(tmp_path)) == (7, 2048)


def test_options_of_training_are_refused():
    from tpinv.harness.vllm.verify import run

    given = {"steps": 5, "micro_batches": 1, "sequence_parallel": True, "recompute": False, "distributed_optimizer": False}
    with pytest.raises(ValueError, match="--sequence-parallel is about training"):
        run(SimpleNamespace(**given))

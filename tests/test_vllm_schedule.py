"""The schedules of tpinv verify --framework vllm, and what bench serve does without an engine: no vLLM is needed."""

import importlib.util
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from tpinv.harness.vllm import bench, cache, completions, model, schedule, serve_plan
from tpinv.harness.vllm.verify import Row, against, model_config, model_limits, verdict


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


def row(layers="tpinv", differing=0, preemptions=1, cached=1, plan="crowded 1", kv=4, kv_differing=0) -> Row:
    return Row(layers, 2, plan, 10, differing, kv, kv_differing, 2, 0, None, 5, preemptions, cached, 1.0)


def test_verdicts():
    console = Console(quiet=True)
    assert verdict([row("stock", 3), row()], console)
    assert not verdict([row("stock", 3), row(differing=1)], console)
    assert not verdict([row("stock", 3), row(kv_differing=1)], console)
    with pytest.raises(ValueError, match="no kv"):
        verdict([row("stock", 3), row(kv=0)], console)
    with pytest.raises(ValueError, match="proves nothing"):
        verdict([row("stock"), row()], console)
    with pytest.raises(ValueError, match="no preemptions"):
        verdict([row("stock", 3), row(preemptions=0)], console)
    with pytest.raises(ValueError, match="no cached"):
        verdict([row("stock", 3), row(cached=0)], console)


@pytest.mark.parametrize("planted", [None, "r1", "r0 wave 1"])
@pytest.mark.parametrize("part", ["log_probs", "kv"])
def test_every_wave_is_compared(planted, part):
    answer = {"tokens": [5, 6], "log_probs": ["aa", "bb"], "candidates": [[], []], "prompt_log_probs": ["cc"], "kv": ["dd", "ee"]}
    reference = {name: answer for name in ("r0", "r1")}
    answers = reference | {f"{name} wave 1": answer for name in reference}
    if planted:
        answers |= {planted: answer | {part: [answer[part][0], "b0"]}}
    counts = {"steps": 9, "preemptions": 1, "cached": 1}
    job = {"layers": "tpinv", "tp": 2, "plan": {"name": "crowded 1"}, "requests": [{"name": "r0"}, {"name": "r1"}]}
    found = against(job, {"answers": answers, "counts": counts, "seconds": 1.0}, reference)
    assert (found.tokens, found.kv, found.requests, found.first) == (12, 8, 4, planted)
    wrong = {"log_probs": found.differing, "kv": found.kv_differing}
    assert wrong == {"log_probs": 0, "kv": 0} | {part: int(planted is not None)}


def test_heads_of_all_ranks():
    assert cache.whole_heads((["a", "b"], ["c", "d"]), 4) == ["a", "b", "c", "d"]
    assert cache.whole_heads((["a"], ["a"], ["b"], ["b"]), 2) == ["a", "b"]
    with pytest.raises(RuntimeError, match="ranks 2 to 3 hold copies"):
        cache.whole_heads((["a"], ["a"], ["b"], ["c"]), 2)
    with pytest.raises(ValueError, match="no copies of 3"):
        cache.whole_heads((["a"], ["b"]), 3)


def test_completions_come_in_every_batch_size_and_are_told_apart():
    rounds = completions.make_rounds(1, (5, 6, 7), 4, 100, 500, 30)
    assert rounds == completions.make_rounds(1, (5, 6, 7), 4, 100, 500, 30)
    mine = [request for batch in rounds for request in batch if request.name.startswith("c")]
    assert [*sorted(r.name for r in mine)] == sorted(f"c{i}" for i in range(100)) and {r.prompt for r in mine} == {(5, 6, 7)}
    assert {len(batch) for batch in rounds} == set(completions.BATCHES) and any(r.name.startswith("s") for r in rounds[3])
    answers = {r.name: {"tokens": [1, 2], "log_probs": ["a", "b"]} for r in mine}
    found = completions.summary(rounds, answers)
    assert (found["count"], found["unique"], found["unique_bytes"]) == (100, 1, 1)
    answers |= {"c7": {"tokens": [1, 2], "log_probs": ["a", "c"]}, "c9": {"tokens": [1, 3], "log_probs": ["a", "b"]}}
    found = completions.summary(rounds, answers)
    assert (found["unique"], found["unique_bytes"], found["completions"][0]["count"]) == (2, 3, 99)


def test_a_model_must_be_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint directory"):
        model_limits(str(tmp_path))
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    with pytest.raises(ValueError, match="has no .'num_attention_heads'"):
        model_limits(str(tmp_path))
    (tmp_path / "config.json").write_text('{"vocab_size": 7, "num_attention_heads": 4}')
    assert model_limits(str(tmp_path)) == (7, 2048) and model_config(str(tmp_path))["num_key_value_heads"] == 4


def test_options_of_training_are_refused():
    from tpinv.harness.vllm.verify import run

    given = {"steps": 5, "micro_batches": 1, "sequence_parallel": True, "recompute": False, "distributed_optimizer": False}
    with pytest.raises(ValueError, match="--sequence-parallel is about training"):
        run(SimpleNamespace(**given))


# -- bench serve ---------------------------------------------------------------------------------------------------------------------


def test_turns_exclude_each_other_and_wait_for_all(tmp_path, capsys):
    names, inside, order = ["a", "b"], [], []

    def engine(name):
        for turn in serve_plan._turns(str(tmp_path), name, names, 60.0):
            with turn:
                inside.append(name)
                order.append((name, len(inside)))
                time.sleep(0.02)
                inside.remove(name)

    first = threading.Thread(target=engine, args=("a",))
    first.start()
    time.sleep(0.1)
    assert not order  # b has not started
    engine("b")
    first.join()
    assert sorted(name for name, _ in order) == ["a"] * 3 + ["b"] * 3 and {count for _, count in order} == {1}
    list(serve_plan._turns(str(tmp_path), "a", ["a", "never"], 0.0))
    assert "['never'] start while this engine is timed" in capsys.readouterr().out


def test_bench_serve_says_at_once_what_is_missing_or_does_not_fit(monkeypatch):
    arguments = SimpleNamespace(
        engines=["stock", "tpinv"], gpus=["0"], tp=[1], prompt=4, answer=4, requests=4, leaves=[1, 8], checkpoint=""
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vLLM is not installed; pip install"):
        bench.run(arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="names those of 1 engines, of 2"):
        bench.run(arguments)
    arguments.gpus, arguments.tp = ["0,1", "0"], [2]
    with pytest.raises(ValueError, match="--gpus 0 are not 2"):
        bench.run(arguments)
    arguments.gpus = None
    for name, value, match in (
        ("answer", 0, "--answer 0 must be"),
        ("tp", [3], "--tp 3 does not divide --leaves 8"),
        ("checkpoint", "/no", "/no"),
    ):
        with pytest.raises(ValueError, match=match):
            bench.run(SimpleNamespace(**vars(arguments) | {"tp": [2], name: value}))


def test_the_cache_holds_all_requests(tmp_path):
    """Llama-3-8B: 128 KiB a token on one rank."""
    path = model.write_config(str(tmp_path), model.LLAMA3_8B)
    assert bench._cache_bytes(path, 1, 64, 1280) == int(1.1 * 64 * 1344 * 131072)
    assert bench._cache_bytes(path, 2, 64, 1280) == int(1.1 * 64 * 1344 * 65536)

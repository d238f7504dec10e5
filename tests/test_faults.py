"""tpinv.harness.faults and bench host: late ranks, killed ranks, and what one command runs on a host of many GPUs."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tpinv.cli import bench, bench_all, bench_host, main
from tpinv.harness import faults
from tpinv.testing import RankPool


def delay_with_a_wrong_rank(calls: int) -> dict:
    """The same with an all-reduce that loses the last rank's part."""
    real = faults.tree_all_reduce

    def wrong(values, **how):
        return real(values * (faults.resolve().rank < faults.resolve().size - 1), **how)

    faults.tree_all_reduce = wrong
    try:
        return faults.delay(calls, "cpu")
    finally:
        faults.tree_all_reduce = real


def test_late_ranks_change_nothing_and_a_lost_part_is_seen():
    with RankPool() as pool:
        found = pool.run(faults.delay, 4, 60, "cpu")
        assert [rank["wrong"] for rank in found] == [0] * 4 and all(rank["delayed"] for rank in found)
        assert all(rank["wrong"] == 20 for rank in pool.run(delay_with_a_wrong_rank, 4, 20))


def test_a_killed_rank_is_told_by_all_others(tmp_path, capsys):
    assert faults.main(["killed-rank", "--ranks", "4", "--device", "cpu", "--timeout", "20", "--json", str(tmp_path / "k.json")]) == 0
    found = json.loads((tmp_path / "k.json").read_text())
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1, 2] and all(rank["seconds"] < 20 for rank in found["ranks"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("killed-rank --ranks 1", "--ranks 1 must be at least 2"),
        ("delays --timeout nan", "--timeout nan and --seconds inf above 0"),
        ("delays --timeout 0", "--timeout 0.0 and --seconds inf above 0"),
        ("delays --json nowhere/x", "--json nowhere/x cannot be written"),
    ],
)
def test_what_cannot_be_tried_is_status_2(arguments, message, capsys):
    assert faults.main([*arguments.split(), "--device", "cpu"]) == 2 and message in capsys.readouterr().err


PARTS = ["verify-megatron", "verify-te", "verify-torchtitan", "delays", "killed-rank", "step"]


def test_bench_host_asks_every_part():
    """Commands that exist, at every size for bytes and at those that have a GPU a rank for times."""
    parts, missing = bench_host.commands("out", 4, [1, 2, 4, 8], lambda module: True)
    assert list(parts) == [*PARTS, "collectives-2", "collectives-4", "verify-vllm", "serve", "killed-server"] and not missing
    assert "1,2,4,8" in parts["verify-megatron"] and parts["step"][parts["step"].index("--tp") :][:4] == ["--tp", "1", "2", "4"]
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    for command in parts.values():
        if command[:3] == ["-m", "tpinv", "bench"]:
            parser.parse_args(command[3:])
        assert importlib.util.find_spec(command[1])
    parts, missing = bench_host.commands("out", 1, [1, 2, 4, 8], lambda module: module in ("torch", "megatron.core"))
    assert list(parts) == ["verify-megatron", "delays", "killed-rank", "step"]
    assert missing["serve"] == "vllm is not installed"


def test_bench_host_reports_each_part(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    write = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); raise SystemExit(int(sys.argv[3]))"
    reference = {"layers": "tpinv", "tp": 1, "tensors": 10, "differing": 0}
    rows = {"rows": [reference, reference | {"tp": 2, "differing": 3}, {"layers": "stock", "tp": 2, "tensors": 10, "differing": 9}]}
    killed = {"ok": True, "limit": 30, "ranks": [{"rank": 0, "error": "RuntimeError", "seconds": 1.5}]}
    late = {"ok": True, "asked": 120, "ranks": [{"calls": 100, "wrong": 0, "seconds": 1.0}] * 2}

    def commands(out, gpus, sizes, installed, steps, calls, seconds):
        assert sizes == [1, 2, 4, 8] and (steps, calls, seconds) == (20, 10_000, 3600)
        file = lambda name: str(Path(bench_all.ROOT, out, name))  # noqa: E731
        parts = {name: ["-c", write, file(f"{name}.json"), json.dumps(data), status] for name, data, status in parts_of}
        return parts, {"serve": "vllm is not installed"}

    monkeypatch.setattr(bench_host, "commands", commands)
    parts_of = [("verify-megatron", rows, "1"), ("killed-rank", killed, "0"), ("delays", late, "0")]
    assert main(["bench", "host", "--out", str(tmp_path)]) == 1, "bytes differed"
    said = capsys.readouterr().out
    assert "serve: not run, vllm is not installed" in said and "verify-megatron: 3 of 10 differ" in said
    assert "killed-rank: raised after [1.5] s, limit 30" in said and "delays: 0 of 200 results differ, 100 of 120 calls in the time" in said
    parts_of = [("delays", late, "0"), ("step", {}, "1")]
    assert main(["bench", "host", "--out", str(tmp_path)]) == 2, "what has no bytes to differ has failed"
    capsys.readouterr()
    assert main(["bench", "host", "--out", str(tmp_path), "--parts", "delays"]) == 0, "the step that fails is left out"
    assert "serve" not in capsys.readouterr().out
    assert (
        main(["bench", "host", "--out", str(tmp_path), "--part-seconds", "0"]) == 2
        and "--part-seconds 0.0 must be above 0" in capsys.readouterr().err
    )


def test_a_part_that_takes_too_long_is_ended_with_its_ranks(tmp_path):
    """By Ctrl-C first: a command's ranks are process groups of their own, which nothing else would reach."""
    wait = "import time, pathlib, sys\ntry: time.sleep(600)\nexcept KeyboardInterrupt: pathlib.Path(sys.argv[1]).touch()"
    about, ended = {"commands": []}, tmp_path / "ended"
    assert bench_all.run_parts({"slow": ["-c", wait, str(ended)]}, tmp_path, about, Console(quiet=True), timeout=3) == ["slow"]
    assert about["commands"][0]["status"] == 124 and ended.exists()


def test_parts_are_shortened():
    parts, _ = bench_host.commands("out", 2, [1, 8], lambda module: True, 3, 50, 100.0)
    assert parts["delays"][-8:] == ["--ranks", "8", "--calls", "50", "--seconds", "70", "--json", "out/delays.json"]
    steps = parts["verify-megatron"]
    assert steps[steps.index("--steps") + 1] == "3" and not bench_host.installed("nobody.has.this")

"""tpinv bench gemm without a GPU: what it measures, writes and draws, on kernels that only pretend."""

import argparse
import csv
import importlib.util
import json
import types
from pathlib import Path

import pytest
import torch

from tpinv.cli import bench, bench_all, bench_step, main, plot


@pytest.fixture
def pretended(monkeypatch):
    """A GPU and kernels; returns the names of what was launched."""
    pytest.importorskip("triton")
    from tpinv.kernels.gemm import triton_gemm as gemm
    from tpinv.kernels.gemm import tuner, verification

    launched = []

    class Timed:
        def __init__(self, launches):
            for launch in launches:
                launch()

        def __call__(self, milliseconds):
            return 100.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench, "_Timed", Timed)
    monkeypatch.setattr(bench, "_operands", lambda product, m, n, k: (torch.zeros(m, k), [torch.zeros(n, k).t()] * 2))
    monkeypatch.setattr(bench, "_host_microseconds", lambda node_dtype: (20.0, 5.0))
    monkeypatch.setattr(tuner, "run", lambda problem: launched.append(("tuner", problem.leaves, problem.node_bf16)))
    monkeypatch.setattr(tuner, "choice", lambda problem: types.SimpleNamespace(name="chosen"))
    monkeypatch.setattr(verification, "verify", lambda problem, config: True)
    monkeypatch.setattr(gemm, "run", lambda problem, config, masked=False: launched.append(("triton", problem.leaves, problem.node_bf16)))
    return launched


def gemm(*arguments) -> int:
    shape = ["--linear", "o", "--product", "forward", "--tokens", "4", "8", "--leaves", "1", "8", "--model", "qwen3-8b"]
    return main(["bench", "gemm", *shape, *map(str, arguments)])


def test_rows_and_picture(pretended, tmp_path, capsys):
    rows, picture = tmp_path / "gemm.csv", tmp_path / "gemm.png"
    assert gemm("--csv", rows, "--plot", picture, "--node-dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert "batch_invariant_ops is not installed: its column stays empty" in printed
    assert "host, 16 x 256 x 256: 20.0 us a call, torch.matmul 5.0 us; bfloat16 nodes" in printed
    with open(rows) as file:
        host, *written = csv.DictReader(file)
    assert [(row["M"], row["implementation"], row["leaves"]) for row in written] == [
        (m, name, leaves) for m in ("4", "8") for name, leaves in (("tpinv", "1"), ("tpinv", "8"), ("Triton", "1"))
    ]
    assert {row["node_dtype"] for row in written if row["implementation"] == "tpinv"} == {"bfloat16"}
    assert (host["product"], host["us"], host["cublas_us"], host["ratio"]) == ("host", "20.0", "5.0", "0.25")
    assert {("tuner", 8, True), ("triton", 1, False)} <= set(pretended)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_batch_invariant_ops_is_measured_where_it_is_installed(pretended, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_batch_invariant_matmul", lambda: lambda a, b: pretended.append("theirs"))
    assert gemm() == 0
    assert pretended.count("theirs") == 4 and "not installed" not in capsys.readouterr().out
    assert gemm("--others") == 0
    assert pretended.count("theirs") == 4 and "not installed" not in capsys.readouterr().out


def test_a_kernel_with_other_bits_is_not_timed(pretended, monkeypatch, capsys):
    from tpinv.kernels.gemm import verification

    monkeypatch.setattr(verification, "verify", lambda problem, config: False)
    assert gemm() == 2
    assert "chosen does not have the canonical bits; run tpinv doctor" in capsys.readouterr().err


def test_a_step_that_no_leaves_fit_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=r"--tp \[3, 6\] divides none of --leaves \[8, 16\]"):
        bench_step.run(types.SimpleNamespace(tp=[1, 3, 6, 8], leaves=[8, 16]))


def test_outputs_are_checked_before_the_work(pretended, capsys):
    assert gemm("--csv", "nowhere/gemm.csv") == 2 and not pretended
    assert "--csv nowhere/gemm.csv cannot be written" in capsys.readouterr().err


# -- bench all ----------------------------------------------------------------------------------------------------------------------

RECORDED = Path(__file__).parent.parent / "docs/benchmarks"


@pytest.fixture
def machine(pretended, monkeypatch, tmp_path):
    """Two GPUs, and commands that copy recorded rows where the real ones write theirs; host-time fails."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    files = {"gemm": "2026-11-22-h100/gemm.csv", "collectives-2": "2026-11-22-h200/collectives-2.csv", "step": "2026-11-22-h200/step.csv"}

    def commands(out, gpus):
        real = stock(out, gpus)
        copy = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text(pathlib.Path(sys.argv[1]).read_text())"
        parts = {name: ["-c", copy, str(RECORDED / file), real[name][real[name].index("--csv") + 1]] for name, file in files.items()}
        return parts | {"host-time": ["-c", "raise SystemExit('no')"]}

    stock = bench_all.commands
    monkeypatch.setattr(bench_all, "commands", commands)
    return tmp_path


def test_bench_all_writes_what_readme_says(machine, monkeypatch, capsys):
    assert main(["bench", "all", "--out", str(machine)]) == 2, "one part failed"
    printed = capsys.readouterr()
    assert printed.err.startswith("tpinv bench: host-time failed; their logs are in ") and printed.err.count("\n") == 1
    (out,) = machine.iterdir()
    about, found = (json.loads((out / name).read_text()) for name in ("about.json", "summary.json"))
    assert about["gpu"] == "a GPU" and about["versions"]["torch"] and len(about["commit"]) in (7, 40)
    assert [(part["part"], part["status"]) for part in about["commands"]] == [
        ("gemm", 0),
        ("collectives-2", 0),
        ("step", 0),
        ("host-time", 1),
    ]
    step = {row["tp"]: row["step"] for row in found["step"]}
    assert step == {1: 0.971, 2: 0.95}, "medians of the two rounds that docs/benchmarks-step.md lists"
    assert next(row for row in found["gemm"] if row["tokens"] == "16" and row["product"] == "forward")["ratio_by_leaves"]["8"] > 0.9
    assert {row["bytes"] for row in found["collectives"]} == {1 << 15, 1 << 21, 1 << 25} and found["collectives"][0]["ranks"] == 2
    assert "| TP = 1, L = 8 |" in (out / "summary.md").read_text() in printed.out


def test_bench_all_asks_every_part(monkeypatch):
    """What it would run are commands that exist."""
    parts = bench_all.commands("docs/benchmarks/today", 4)
    assert list(parts) == ["gemm", "collectives-2", "collectives-4", "step", "torchtitan", "host-time"]
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    for command in parts.values():
        if command[:3] == ["-m", "tpinv", "bench"]:
            parser.parse_args(command[3:])
        else:
            assert importlib.util.find_spec(command[1]) and any(
                Path(RECORDED.parent.parent, part).exists() or "." in part for part in command
            )
    assert list(bench_all.commands("docs/benchmarks/today", 1)) == ["gemm", "step", "torchtitan", "host-time"]


def test_step_bars(tmp_path):
    with open(RECORDED / "2026-11-22-h200/step.csv") as file:
        rows = [{name: float(value) if name in bench_step.TIMES else value for name, value in row.items()} for row in csv.DictReader(file)]
    plot.step_bars(rows, bench_step.TIMES, str(tmp_path / "step.png"), "a step")
    assert (tmp_path / "step.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("gemm --tokens 0", "--tokens 0 must be above 0"),
        ("gemm --tokens 16 16", "--tokens 16 16 names a value twice"),
        ("gemm --rounds -1", "--rounds -1 must be above 0"),
        ("gemm --milliseconds nan", "--milliseconds nan must be above 0"),
        ("collectives --ranks 0", "--ranks 0 must be above 0"),
        ("collectives --csv .", "--csv . cannot be written: it is a directory"),
        ("step --num-layers -1", "--num-layers -1 must be above 0"),
        ("step --profile nowhere/x", "--profile nowhere/x cannot be written"),
    ],
)
def test_bad_input_is_one_line_before_the_work(arguments, message, pretended, capsys):
    assert main(["bench", *arguments.split()]) == 2 and not pretended
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "all"]) == 2
    assert capsys.readouterr().err == "tpinv bench: bench needs a GPU; there is none here\n"


def test_attention_writes_rows_as_they_come(monkeypatch, tmp_path, capsys):
    """A case that does not fit the memory is told and left out; twins, rows and ratios are in the file."""
    pytest.importorskip("triton")
    from tpinv.cli import bench_attention

    class Case:
        def __init__(self, batch, keys, heads, key_heads, *_):
            self.shape = "decode", batch, 1, keys, heads, key_heads, 128, 16

        def __str__(self):
            return f"decode of {self.shape[3]}"

        def measure(self, milliseconds, rounds):
            if self.shape[3] > 8192:
                raise torch.cuda.OutOfMemoryError
            return [
                bench_attention.line(self.shape, name, us, 20.0, hbm=0.5) for name, us in (("tpinv", 20.0), ("FA3", 19.0), ("cuDNN", 30.0))
            ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_attention, "twins", lambda: {"FA3, alone and in a batch": (3, 16)})
    monkeypatch.setattr(bench_attention, "Decode", Case)
    rows, found = tmp_path / "rows.csv", tmp_path / "found.json"
    options = ["--decode", "1,8192,32,8", "1,9000,32,8", "--prefill", "--backward", "--csv", str(rows), "--json", str(found)]
    assert main(["bench", "attention", *options]) == 0
    printed = capsys.readouterr().out
    assert "decode of 9000: does not fit into this GPU's memory" in printed and "3 of 16 rows differ" in printed
    assert "FA3 is not installed" in printed and "FlashInfer is not installed" in printed
    with open(rows) as file:
        assert [(row["keys"], row["implementation"], row["ratio"]) for row in csv.DictReader(file)] == [
            ("8192", "tpinv", "1.0"), ("8192", "FA3", "0.95"), ("8192", "cuDNN", "1.5"),
        ]  # fmt: skip
    written = json.loads(found.read_text())
    assert written["twins"] == {"FA3, alone and in a batch": [3, 16]} and len(written["rows"]) == 3 and "a GPU" in written["machine"]

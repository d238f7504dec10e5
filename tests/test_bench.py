"""tpinv bench gemm without a GPU: what it measures, writes and draws, on kernels that only pretend."""

import csv
import types

import pytest
import torch

from tpinv.cli import bench, bench_step, main


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

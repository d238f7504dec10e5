"""csrc/sm90_tree_gemm.cu and its host side agree, and the source compiles to what it was written for. No GPU needed."""

import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tpinv.kernels.gemm import sm90
from tpinv.kernels.gemm.problem import make_problems
from tpinv.runtime import cuda
from tpinv.tree import ReductionTree

SOURCE, SCHEDULE = cuda.source("sm90_tree_gemm.cu"), cuda.source("include/schedule.h")
SOURCES = ("Params", SOURCE), ("Schedule", SCHEDULE)


def problem(leaves, rows=600, cols=328, length=72, transposed=False, out_dtype=torch.bfloat16):
    a, k = torch.zeros(rows, leaves * length).bfloat16(), leaves * length
    b = torch.zeros(k, cols).bfloat16().t() if transposed else torch.zeros(cols, k).bfloat16()
    return make_problems(a, b, torch.empty(1, rows, cols, dtype=out_dtype), None, ReductionTree(leaves), 0, 1, 1, "ieee")[0]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "missing", lambda name: None)


def test_params_have_the_same_fields_in_the_same_order():
    params, schedule = (re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.S).group(1) for name, text in SOURCES)
    body = re.sub(r"//.*", "", params.replace("    Schedule schedule;", schedule))
    names = [name for declaration in body.split(";") for name in re.findall(r"(\w+)(?:\[kMaxLeaves\])?\s*(?:,|$)", declaration.strip())]
    assert names == [name for name, _ in sm90._Params._fields_]
    assert f"kMaxLeaves = {sm90.MAX_LEAVES};" in SCHEDULE


def test_the_host_defines_every_macro_and_no_other():
    given = set(sm90.macros(problem(8), sm90.candidates(problem(8))[0]))
    legend = re.search(r"with these macros:\n(.*?)\n\n", SOURCE, re.S).group(1)
    assert given == set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", legend))


def test_room_is_the_same_on_both_sides():
    low, wide, at, none, otherwise = map(int, re.search(r"kRoom = BN <= (\d+) \? (\d+) : BN == (\d+) \? (\d+) : (\d+);", SOURCE).groups())
    for cols in (16, 32, 64, 128, 192, 256):
        assert sm90._room(cols) == (wide if cols <= low else none if cols == at else otherwise)


@pytest.mark.parametrize("leaves", [1, 2, 3, 6, 8, 24, 64])
@pytest.mark.parametrize("rows", [1, 40, 100, 200, 600, 4096])
def test_candidates_fit(leaves, rows, hopper):
    p = problem(leaves, rows)
    assert sm90.refuses(p) is None
    found = sm90.candidates(p)
    assert found and len(set(found)) == len(found) <= 16
    for config in found:
        assert sm90.fits(p, config)
        assert config.stages >= 3 and config.shared_bytes(p.merges) <= sm90._SHARED_LIMIT


def test_refusals(hopper, monkeypatch):
    assert "16 bytes" in sm90.refuses(problem(8, length=12))
    assert sm90.refuses(problem(1, length=1000)) is None
    rows = make_problems(
        torch.zeros(1, 64).bfloat16().expand(600, 64), torch.zeros(328, 64).bfloat16(), torch.empty(1, 600, 328).bfloat16(),
        None, ReductionTree(8), 0, 1, 1, "ieee",
    )[0]  # fmt: skip
    assert "one row expanded" in sm90.refuses(rows)
    assert "64 leaves" in sm90.refuses(problem(65, length=8))
    assert not any(sm90.fits(problem(8, cols=71), c) and not c.swap for c in sm90.candidates(problem(8, rows=100)))
    monkeypatch.setattr(cuda, "missing", lambda name: "no compiler")
    assert sm90.refuses(problem(8)) == "no compiler"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.0" in sm90.refuses(problem(8))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "leaves, cols, transposed, accumulate", [(8, 128, False, False), (2, 192, True, False), (1, 256, False, False), (1, 256, True, True)]
)
def test_ptxas_keeps_the_matrix_instructions_asynchronous(leaves, cols, transposed, accumulate, tmp_path):
    """No serialized wgmma, no fence that waits for the whole GPU, and next to no spills."""
    p = replace(problem(leaves, transposed=transposed, out_dtype=torch.float32 if accumulate else torch.bfloat16), accumulate=accumulate)
    config = next(c for c in sm90.candidates(p) if c.cols == cols and c.parts == 1)
    macros = [f"-D{name}={value}" for name, value in sm90.macros(p, config).items()]
    target = "-gencode=arch=compute_90a,code=sm_90a"
    done = subprocess.run(
        ["nvcc", target, "-cubin", "-Xptxas", "-v", *macros, "-o", str(tmp_path / "kernel.cubin"), str(cuda.source_path("sm90_tree_gemm.cu"))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Potential Performance Loss" not in done.stderr, done.stderr
    assert int(re.search(r"(\d+) bytes spill stores", done.stderr).group(1)) <= 64, done.stderr
    assert not re.search(
        r"(acquire|release)\.(cluster|gpu|sys)",
        re.sub(r"fence\.mbarrier_init\.release\.cluster", "", cuda.whole_source("sm90_tree_gemm.cu")),
    )

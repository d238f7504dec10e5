"""csrc/sm90_attention_dkv.cu and its host side agree, and the source compiles to what it was written for. No GPU needed."""

import re
import shutil
import subprocess

import pytest
import torch

from tpinv.kernels.attention import sm90, sm90_dkv
from tpinv.reference.attention import Pack
from tpinv.runtime import cuda

SOURCE, SCHEDULE = cuda.source(sm90_dkv.SOURCE), cuda.source("include/attention_schedule.h")


def tensors(width=128, dtype=torch.bfloat16, queries=200, keys=300, heads=4, groups=2):
    return [torch.zeros(n, 1, h, width, dtype=dtype) for n, h in ((queries, heads), (keys, groups), (keys, groups), (queries, heads))]


@pytest.fixture
def hopper(monkeypatch):
    """Tensors on the CPU pass for those of an H100."""
    monkeypatch.setattr(sm90, "_is_hopper", lambda device: True)
    monkeypatch.setattr(cuda, "missing", lambda name: None)


def test_params_have_the_same_fields_in_the_same_order():
    params, grid = (
        re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.S).group(1) for name, text in (("Params", SOURCE), ("Grid", SCHEDULE))
    )
    body = re.sub(r"//.*", "", params.replace("    Grid grid;", grid))
    names = [name for declaration in body.split(";") for name in re.findall(r"(\w+)\s*(?:,|$)", declaration.strip())]
    assert names == [name for name, _ in sm90_dkv._Params._fields_]


def test_the_host_defines_every_macro_and_no_other():
    legend = re.search(r"with these macros:\n(.*?)\n\n", SOURCE, re.S).group(1)
    assert set(sm90_dkv.macros(128, torch.bfloat16, True, False)) == set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", legend))


@pytest.mark.parametrize("width", [8, 64, 96, 128])
def test_slots_fit_into_shared_memory(width):
    assert sm90_dkv.shared_bytes(width) <= 232448


def test_what_it_refuses(hopper):
    assert sm90_dkv.refuses(*tensors(), None) is None
    assert "bf16 or fp16" in sm90_dkv.refuses(*tensors(dtype=torch.float32), None)
    assert "width" in sm90_dkv.refuses(*tensors(width=256), None)
    assert "queries and keys" in sm90_dkv.refuses(*tensors(keys=40), None)
    q, k, v, dout = tensors()
    assert "apart" in sm90_dkv.refuses(q, k, v, dout[:1].expand_as(dout), None)  # the gradient of a sum
    starts = torch.tensor([0, 200], dtype=torch.int32)
    assert "packs" in sm90_dkv.refuses(q, k, v, dout, Pack(starts, starts, starts, starts, 200, 300))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("form", [(128, torch.bfloat16, True, True), (64, torch.float16, False, False)], ids=str)
def test_products_run_on_without_waiting_for_each_other(form, tmp_path):
    """ptxas says C75xx where it makes every wgmma wait for itself."""
    macros = [f"-D{k}={v}" for k, v in sm90_dkv.macros(*form).items()]
    target = "-gencode=arch=compute_90a,code=sm_90a"
    command = ["nvcc", "-std=c++17", target, "-cubin", "-Xptxas", "-v", *macros, "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run([*command, str(cuda.source_path(sm90_dkv.SOURCE))], capture_output=True, text=True, timeout=100)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "C75" not in said, said
    assert int(re.search(r"(\d+) bytes spill loads", said).group(1)) <= 100, said

"""csrc/sm90_attention.cu and its host side agree, and the source compiles to what it was written for. No GPU needed."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

from tpinv.kernels.attention import sm90
from tpinv.reference.attention import Pack
from tpinv.runtime import cuda

SOURCE, SCHEDULE = cuda.source(sm90.SOURCE), cuda.source("include/attention_schedule.h")
FORMS = [  # width, dtype, causal, packed, tree
    (128, torch.bfloat16, True, False, False),
    (128, torch.bfloat16, True, True, True),
    (96, torch.float16, False, False, True),
    (64, torch.bfloat16, True, True, False),
    (64, torch.float16, False, True, True),
]


def tensors(width=128, dtype=torch.bfloat16, queries=200, keys=300, heads=4, groups=2):
    return (torch.zeros(n, 1, h, width, dtype=dtype) for n, h in ((queries, heads), (keys, groups), (keys, groups)))


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
    assert names == [name for name, _ in sm90._Params._fields_]


def test_the_host_defines_every_macro_and_no_other():
    given = set(sm90.macros(128, torch.bfloat16, True, False, False, sm90.choice(128)))
    legend = re.search(r"with these macros:\n(.*?)\n\n", SOURCE, re.S).group(1)
    assert given == set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", legend))


def test_block_and_rows_are_the_same_on_both_sides():
    block, rows = (int(re.search(rf"constexpr int {name} = (\d+);", SCHEDULE).group(1)) for name in ("kBlock", "kGroupRows"))
    assert (block, 2 * rows) == (sm90._BLOCK, sm90.ROWS)


@pytest.mark.parametrize("width", [8, 64, 96, 128])
def test_choices_fit_into_shared_memory(width):
    config = sm90.choice(width)
    assert config.stages >= 4  # fewer, and two warpgroups that take turns wait for each other
    assert config.shared_bytes(sm90.padded_width(width)) <= sm90._SHARED_LIMIT


def test_what_it_refuses(hopper, monkeypatch):
    assert sm90.refuses(*tensors()) is None
    assert "bf16 or fp16" in sm90.refuses(*tensors(dtype=torch.float32))
    assert "width" in sm90.refuses(*tensors(width=256)) and "width" in sm90.refuses(*tensors(width=12))
    assert "tiles" in sm90.refuses(*tensors(queries=sm90.FEWEST_ROWS - 1))
    q, k, v = tensors()
    assert "aligned" in sm90.refuses(q, k, torch.zeros(v.numel() + 1, dtype=v.dtype)[1:].view(v.shape))
    assert "apart" in sm90.refuses(q, torch.zeros(300, 1, 2, 132, dtype=k.dtype)[..., :128], v)
    assert "apart" in sm90.refuses(q, k[:1].expand_as(k), v)
    monkeypatch.setattr(sm90, "MOST_TILES", 8)  # two of each head
    assert "counts" in sm90.refuses(q, k, v) and sm90.refuses(q[:, :, :2], k, v) is None
    starts = torch.tensor([0, 50, 200], dtype=torch.int32)
    assert "tiles" in sm90.refuses(q, k, v, Pack(starts, starts, starts, starts, sm90.FEWEST_ROWS - 1, 300))


def test_what_disagreed_is_never_used(hopper, monkeypatch):
    """The probe's answer is kept by all that is compiled in, and by the width, which is not; a capture asks nothing."""
    asked = []
    monkeypatch.setattr(sm90, "_agrees", lambda *form: bool(asked.append(form[:5])))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q, k, _ = tensors()
    assert not sm90.verified(q, k, True, None, None) and not sm90.verified(q, k, True, None, None)
    assert asked == [(128, torch.bfloat16, True, False, False)]
    sm90.verified(*list(tensors(width=96))[:2], True, None, None)
    sm90.verified(*list(tensors(keys=sm90.NODE + 1))[:2], False, None, None)
    assert asked[1:] == [(96, torch.bfloat16, True, False, False), (128, torch.bfloat16, False, False, True)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not sm90.verified(*list(tensors(width=64))[:2], True, None, None) and len(asked) == 3


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_run_on_without_waiting_for_each_other(form, tmp_path):
    """ptxas says C75xx where it makes every wgmma wait for itself. What it puts into memory is little, and only with a tree or a pack."""
    width, dtype, causal, packed, tree = form
    macros = [f"-D{k}={v}" for k, v in sm90.macros(width, dtype, causal, packed, tree, sm90.choice(width)).items()]
    target = "-gencode=arch=compute_90a,code=sm_90a"
    done = subprocess.run(
        ["nvcc", "-std=c++17", target, "-cubin", "-Xptxas", "-v", *macros, "-o", str(tmp_path / "kernel.cubin"), str(cuda.source_path(sm90.SOURCE))],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "C75" not in said, said
    assert int(re.search(r"(\d+) bytes spill loads", said).group(1)) <= (400 if tree or packed else 0), said


def test_an_early_launch_asks_for_programmatic_serialization(monkeypatch):
    """Structures as the driver's header has them: CUlaunchConfig of 56 bytes, CUlaunchAttribute of 72."""
    asked = []

    class Driver:
        def cuLaunchKernelEx(self, config, function, pointers, extra):
            launch, attribute = config._obj, config._obj.attributes[0]
            asked.append((launch.grid_x, launch.threads_x, launch.shared_bytes, launch.stream, launch.count, attribute.id, attribute.value))
            return 0

        def cuLaunchKernel(self, function, *sizes):
            asked.append(sizes[0])
            return 0

    monkeypatch.setattr(cuda, "_driver", Driver)
    cuda.launch(None, 7, 384, 1000, 5, ctypes.c_int(3), early=True)
    cuda.launch(None, 7, 384, 1000, 5, ctypes.c_int(3))
    assert asked == [(7, 384, 1000, 5, 1, 6, 1), 7]
    assert (ctypes.sizeof(cuda._Launch), ctypes.sizeof(cuda._Attribute)) == (56, 72)

"""Attention's kernels as compiled for Hopper: products run on tensor cores one after another without waiting for each. No GPU needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tpinv.kernels.attention import forward, sm90_decode
from tpinv.runtime import cuda

POINTERS = {name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")} | {
    "lse_ptr": "*fp32",
    "parked_ptr": "*fp32",
    "turn_ptr": "*i32",
}
OPTIONS = ("inner", "window", "sinks_ptr")
STRIDES = {f"{t}_{d}" for t in "qkvo" for d in "sbh"}


@pytest.mark.parametrize("kernel", [forward.attention_kernel, forward.long_attention_kernel], ids=["a node", "a tree"])
def test_no_accumulator_is_read_while_it_is_written(kernel, tmp_path):
    """Else ptxas says C7514 and makes every wgmma wait (leaves.step says when)."""
    rows, warps, stages = forward.TILES[2][128]
    names = kernel.jit.arg_names
    absent = {name: None for name in ("cu_q", "cu_k", "first_q", "first_k", "table_ptr", *OPTIONS)}
    known = {"CAUSAL": True, "DIM": 128, "WIDTH": 128, "ROWS": rows, "LEAF": 512, "PAGE": 0, "LEVELS": forward.LEVELS} | absent
    constants = {name: value for name, value in known.items() if name in names}
    types = {**dict.fromkeys(names, "i32"), **POINTERS, "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in STRIDES or types[name][0] == "*"}
    source = ASTSource(kernel.jit, {name: types[name] for name in names}, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    said = ""
    for name in ("ptxas-blackwell", "ptxas"):  # the first reads the newest versions of PTX, if it is there
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        if not said and ptxas.exists():
            command = [ptxas, "-v", "--gpu-name=sm_90a", "--fmad=false", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "registers" in said
    assert "wgmma.mma_async" in compiled.asm["ptx"] and "C75" not in said, said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("width, rows", [(128, 8), (128, 16), (80, 8), (256, 8)])
def test_the_decode_agrees_with_its_host_and_keeps_its_registers(width, rows, tmp_path):
    """The source asserts the structure of a launch, its shared memory and the contract's sizes as the host gives them."""
    spec = sm90_decode.Spec(width, rows, torch.bfloat16)
    assert spec.shared_bytes <= 232448 and spec.stages >= 4
    macros = [f"-D{name}={value}" for name, value in spec.macros]
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(
        ["nvcc", *target, *macros, str(cuda.source_path(sm90_decode.SOURCE))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+) bytes spill stores", done.stderr).group(1)) <= 64, done.stderr

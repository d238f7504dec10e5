"""The exact sum of squares by elements of a block and warps, beside torch's vector_norm; microseconds for 5e8 elements. Results must agree.

python docs/benchmarks/2026-11-22-h200/squares.py
"""

import torch
import triton

from tpinv.kernels.rows import squares

COUNT, A_PROGRAM = 500_000_000, 65536


def microseconds(function, repeats: int = 20) -> float:
    function()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats * 1e3


def measure(name: str, x: torch.Tensor) -> None:
    def run(bins, block, warps):
        squares.squares_kernel[(triton.cdiv(COUNT, A_PROGRAM),)](
            x, bins, COUNT, BLOCK=block, BLOCKS=A_PROGRAM // block, SIZE=32, num_warps=warps, enable_fp_fusion=False
        )

    row, totals = [f"vector_norm {microseconds(lambda: torch.linalg.vector_norm(x, dtype=torch.float32)):.0f}"], set()
    for block, warps in ((4096, 4), (4096, 8), (2048, 4), (2048, 8), (1024, 4), (1024, 2)):
        bins = squares.counters(x.device)
        run(bins, block, warps)
        totals.add(squares.total(bins).item())
        row.append(f"{block}/{warps} {microseconds(lambda block=block, warps=warps: run(squares.counters(x.device), block, warps)):.0f}")
    assert len(totals) == 1
    print(f"{name:14s}", *row, flush=True)


normal = torch.randn(COUNT, device="cuda")
measure("bf16 normal", (normal * 1e-3).bfloat16())
measure("fp32 of bf16", (normal * 1e-3).bfloat16().float())
measure("fp32 normal", normal * 1e-3)
measure("bf16 mostly 0", torch.where(torch.rand(COUNT, device="cuda") < 0.999, 0, normal * 1e-3).bfloat16())
measure("bf16 wild", (normal * torch.exp2(torch.randn(COUNT, device="cuda") * 8)).bfloat16())
parts, half = [(normal[: COUNT // 4] * 1e-3).bfloat16() for _ in range(4)], torch.tensor(0.5, device="cuda", dtype=torch.bfloat16)
print("torch._foreach_mul_", round(microseconds(lambda: torch._foreach_mul_(parts, half))))

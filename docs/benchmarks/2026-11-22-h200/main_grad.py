"""dW added to main_grad: ours fused, the product alone, ours unfused, cuBLAS unfused. Microseconds, medians of alternating CUDA graphs. Bytes first.

python docs/benchmarks/2026-11-22-h200/main_grad.py
"""

import dataclasses
import statistics

import torch

from tpinv import kernels
from tpinv.kernels.gemm import tuner, verification
from tpinv.kernels.gemm.problem import make_problems
from tpinv.tree import ReductionTree

SHAPES = [(4096, 6144, 4096), (4096, 4096, 4096), (4096, 28672, 4096), (4096, 4096, 14336), (4096, 14336, 4096), (1024, 4096, 4096)]


def capture(function) -> torch.cuda.CUDAGraph:
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            function()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / 6


def measure(tokens: int, n: int, k: int) -> dict:
    dy, x = torch.randn(tokens, n, device="cuda").bfloat16(), torch.randn(tokens, k, device="cuda").bfloat16()
    before = torch.randn(n, k, device="cuda")
    expected, total = before.clone().add_(kernels.matmul(dy.t(), x)), before.clone()
    kernels.add_matmul(total, dy.t(), x)
    same = torch.equal(expected.view(torch.int32), total.view(torch.int32))
    graphs = {
        "fused": capture(lambda: kernels.add_matmul(total, dy.t(), x)),
        "product": capture(lambda: kernels.matmul(dy.t(), x)),
        "unfused": capture(lambda: total.add_(kernels.matmul(dy.t(), x))),
        "cublas": capture(lambda: total.add_(torch.mm(dy.t(), x))),
    }
    times = {name: [] for name in graphs}
    for _ in range(9):
        for name, graph in graphs.items():
            times[name].append(microseconds(graph))
    medians = {name: round(statistics.median(values[1:]), 1) for name, values in times.items()}
    problem = make_problems(dy.t(), x.t(), total.unsqueeze(0), None, ReductionTree(1), 0, 1, 1, "ieee")[0]
    kernel = tuner.choice(dataclasses.replace(problem, accumulate=True)).name
    return {"tokens": tokens, "n": n, "k": k, "same": same, "chosen": kernel, **medians}


for shape in SHAPES:
    print(measure(*shape), flush=True)
print("struck off:", verification.struck_off())

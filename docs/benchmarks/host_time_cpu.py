"""What a call costs the host before anything is computed: host_time.py without a GPU. The kernels are pretended: they allocate their results.

    python docs/benchmarks/host_time_cpu.py [RANKS]       # of a process group that sends nothing; default 1

Microseconds of this thread until a call returns, the least of rounds: as a function with gradients and under no_grad, as a torch operator.
"""

import gc
import sys
import time

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import tpinv
from tpinv import kernels
from tpinv.collectives import resolve
from tpinv.kernels.rows import activation, norm
from tpinv.ops import products
from tpinv.ops.registry import group_name
from tpinv.tree import ReductionTree

ROUNDS, CALLS, TOKENS, WIDTH = 80, 100, 16, 512


def pretend() -> None:
    products.on_gpu = lambda x: x.device.type == "cpu"

    def product(a, b, *, bias=None, out_dtype=None, **_):
        return torch.empty(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype)

    kernels.matmul = product
    kernels.tree_matmul = lambda a, b, tree, **options: product(a, b, **options)
    activation.silu = norm.norm = lambda x, *_: torch.empty_like(x)
    activation.swiglu = lambda x: torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)


def least(call) -> float:
    times = []
    for _ in range(ROUNDS):
        begun = time.thread_time()
        kept = [call() for _ in range(CALLS)]
        times.append((time.thread_time() - begun) / CALLS * 1e6)
        del kept
    return min(times)


def main(p: int) -> None:
    torch.set_num_threads(1)
    gc.disable()
    if p > 1:
        dist.init_process_group("fake", rank=0, world_size=p, store=FakeStore())
    pretend()
    tree, ranks, ops = ReductionTree(8), resolve(), torch.ops.tpinv

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)

    x, column, row, weight = tensor(TOKENS, 1, WIDTH), tensor(WIDTH // p, WIDTH), tensor(WIDTH, WIDTH), tensor(WIDTH)
    common = {"tree": tree, "group": ranks}
    rows = {
        "column_parallel_linear": (
            lambda: tpinv.column_parallel_linear(x, column, **common),
            lambda: ops.column_parallel_linear(x, column, None, 8, "float32", group_name(ranks), False, 1),
        ),
        "rms_norm": (lambda: tpinv.rms_norm(x, weight, tree=tree), lambda: ops.rms_norm(x, weight, 1e-5, 8, "", False, False)),
        "rms_norm, sequence parallel": (lambda: tpinv.rms_norm(x, weight, sequence_parallel=True, **common), None),
        "swiglu": (lambda: tpinv.swiglu(x), lambda: ops.swiglu(x)),
        "silu": (lambda: tpinv.silu(x), lambda: ops.silu(x)),
    }
    if p == 1:
        rows["row_parallel_linear"] = (
            lambda: tpinv.row_parallel_linear(x, row, **common),
            lambda: ops.row_parallel_linear(x, row, None, 8, "float32", "", False),
        )
    print(f"torch {torch.__version__}, TP={p}; microseconds\n{'':28}{'function':>10}{'no_grad':>10}{'operator':>10}")
    for name, (function, operator) in rows.items():
        with torch.no_grad():
            without = least(function)
        print(f"{name:28}{least(function):10.1f}{without:10.1f}{least(operator) if operator else 0:10.1f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)

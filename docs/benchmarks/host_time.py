"""What a call costs the host: microseconds until it returns, forward and backward, of functions too small to keep a GPU busy.

    torchrun --nproc_per_node 2 docs/benchmarks/host_time.py

Stock beside tpinv: the function alone (as Megatron's layers call it) and as a torch operator (as TorchTitan's do). Median of rounds.
"""

import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

import tpinv
from tpinv.collectives import all_gather, resolve
from tpinv.ops.registry import group_name
from tpinv.tree import ReductionTree

ROUNDS, CALLS, TOKENS, WIDTH = 7, 100, 16, 512


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(device_id=device)
    torch.autograd.set_multithreading_enabled(False)
    tree, ranks, ops = ReductionTree(8), resolve(), torch.ops.tpinv
    p, rank = ranks.size, ranks.rank
    group = group_name(ranks)

    def tensor(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    x, part, scattered = tensor(TOKENS, 1, WIDTH), tensor(TOKENS, 1, WIDTH // p), tensor(TOKENS // p, 1, WIDTH)
    column, row, norm = tensor(WIDTH // p, WIDTH), tensor(WIDTH, WIDTH // p), tensor(WIDTH)
    query, key, value = (tensor(TOKENS, 1, heads, 128) for heads in (4, 2, 2))
    batch_first = [t.detach().permute(1, 2, 0, 3).requires_grad_() for t in (query, key, value)]
    values = torch.randn(len(tree.subtrees(rank, p)), TOKENS, WIDTH, device=device)
    whole, local = torch.empty(TOKENS, WIDTH, device=device), torch.empty(TOKENS // p, WIDTH, device=device)

    def swiglu(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    common = {"tree": tree, "group": ranks}
    rows = [  # name, stock, tpinv, operator
        (
            "column_parallel_linear",
            lambda: F.linear(x, column),
            lambda: tpinv.column_parallel_linear(x, column, **common),
            lambda: ops.column_parallel_linear(x, column, None, 8, "float32", group, False, 1),
        ),
        (
            "the same, sequence parallel",
            None,
            lambda: tpinv.column_parallel_linear(scattered, column, sequence_parallel=True, **common),
            lambda: ops.column_parallel_linear(scattered, column, None, 8, "float32", group, True, 1),
        ),
        (
            "row_parallel_linear",
            lambda: F.linear(part, row),
            lambda: tpinv.row_parallel_linear(part, row, **common),
            lambda: ops.row_parallel_linear(part, row, None, 8, "float32", group, False),
        ),
        (
            "the same, sequence parallel",
            None,
            lambda: tpinv.row_parallel_linear(part, row, sequence_parallel=True, **common),
            lambda: ops.row_parallel_linear(part, row, None, 8, "float32", group, True),
        ),
        (
            "rms_norm",
            lambda: F.rms_norm(x, (WIDTH,), norm, 1e-5),
            lambda: tpinv.rms_norm(x, norm, tree=tree),
            lambda: ops.rms_norm(x, norm, 1e-5, 8, "", False, False),
        ),
        (
            "rms_norm, sequence parallel",
            None,
            lambda: tpinv.rms_norm(scattered, norm, sequence_parallel=True, **common),
            lambda: ops.rms_norm(scattered, norm, 1e-5, 8, group, True, False),
        ),
        ("swiglu", lambda: swiglu(x), lambda: tpinv.swiglu(x), lambda: ops.swiglu(x)),
        (
            "core_attention",
            lambda: F.scaled_dot_product_attention(*batch_first, is_causal=True, enable_gqa=True),
            lambda: tpinv.core_attention(query, key, value, causal=True),
            lambda: ops.core_attention(query, key, value, 0.1, True)[0],
        ),
        ("all-reduce", lambda: dist.all_reduce(whole), lambda: tpinv.tree_all_reduce(values, **common), None),
        (
            "reduce-scatter",
            lambda: dist.reduce_scatter_tensor(local, whole),
            lambda: tpinv.tree_reduce_scatter(values, **common),
            None,
        ),
        ("all-gather", lambda: dist.all_gather_into_tensor(whole, local), lambda: all_gather(local, ranks), None),
    ]

    def forward(call):
        begun = time.perf_counter()
        kept = [call() for _ in range(CALLS)]
        return (time.perf_counter() - begun) / CALLS * 1e6, kept

    def backward(kept, dy):
        begun = time.perf_counter()
        for y in kept:
            y.backward(dy)
        return (time.perf_counter() - begun) / CALLS * 1e6

    def measured(call) -> tuple[float, float]:
        times = []
        for _ in range(ROUNDS + 1):
            dist.barrier()
            torch.cuda.synchronize()
            one, kept = forward(call)
            torch.cuda.synchronize()
            two = 0.0
            if isinstance(kept[0], torch.Tensor) and kept[0].requires_grad:
                dist.barrier()
                torch.cuda.synchronize()
                two = backward(kept, torch.ones_like(kept[0]))
            times.append((one, two))
        return tuple(statistics.median(column) for column in zip(*times[1:], strict=True))

    wanted = sys.argv[1:]
    if rank == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TP={p}; microseconds, forward + backward")
        print(f"{'':30}{'stock':>15}{'tpinv':>15}{'operator':>15}", flush=True)
    for name, *calls in rows:
        if wanted and not any(word in name for word in wanted):
            continue
        cells = []
        for call in calls:
            if call is None:
                cells.append("")
                continue
            one, two = measured(call)
            cells.append(f"{one:.0f} + {two:.0f}" if two else f"{one:.0f}")
        if rank == 0:
            print(f"{name:30}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

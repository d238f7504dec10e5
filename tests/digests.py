"""SHA-256 digests of what every public function computes on a CPU: proof that a change of the code has moved no byte.

    python tests/digests.py record before.json        # on the old commit (the script imports the public names alone)
    python tests/digests.py record after.json         # on the new one, on the same machine with the same torch
    python tests/digests.py compare before.json after.json

Results and gradients, p = 1, 2 and 4, float32, bfloat16 and float16, both node dtypes, numbers of tokens that no leaf divides, fixed
seeds. Nothing is stored in the repository: the digests of a BLAS are those of one machine. Exit status of compare: 0 equal, 1 different.
"""

import argparse
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

import tpinv
from tpinv.layers import shard
from tpinv.testing import RankPool

RANKS = (1, 2, 4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TREES = [tpinv.ReductionTree(8), tpinv.ReductionTree(8, "bfloat16"), tpinv.ReductionTree(24)]
TOKENS, BATCH, K, N, VOCAB = 12, 3, 144, 96, 48


def make(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many sizes, whole: the same on every rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-6, 7, shape, generator=generator).float())).to(dtype)


def run(function: Callable, dy: Tensor, *inputs: Tensor | None, needs: str | None = None) -> dict[str, Tensor]:
    """The result, and the gradients of the inputs (of those whose position is in ``needs``)."""
    wanted = [t is not None and t.is_floating_point() and (needs is None or str(i) in needs) for i, t in enumerate(inputs)]
    leaves = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    y = function(*leaves)
    y.backward(dy)
    return {"y": y.detach(), **{f"d{i}": t.grad for i, t in enumerate(leaves) if t is not None and t.grad is not None}}


def linears(rank: int, p: int, dtype: torch.dtype, tree) -> Iterator[tuple[str, dict]]:
    part = lambda t, dim, stride=1: shard(t, dim, rank, p, stride)  # noqa: E731
    x, dy = make("x", TOKENS, BATCH, K, dtype=dtype), make("dy", TOKENS, BATCH, N, dtype=dtype)
    w, b = make("w", N, K, dtype=dtype), make("b", N, dtype=dtype)
    for sp in (False, True):
        scatter = (lambda t: part(t, 0)) if sp else lambda t: t
        for stride in (1, 2):
            for bias in (b, None):
                call = lambda x, w, b, sp=sp, stride=stride: tpinv.column_parallel_linear(  # noqa: E731
                    x, w, b, tree=tree, sequence_parallel=sp, stride=stride
                )
                given = scatter(x), part(w, 0, stride), None if bias is None else part(bias, 0, stride)
                yield f"column sp={sp} stride={stride} bias={bias is not None}", run(call, part(dy, 2, stride), *given)
        call = lambda x, w, b, sp=sp: tpinv.row_parallel_linear(x, w, b, tree=tree, sequence_parallel=sp)  # noqa: E731
        yield f"row sp={sp}", run(call, scatter(dy), part(x, 2), part(w, 1), b)
        yield f"row sp={sp} bias alone", run(call, scatter(dy), part(x, 2), part(w, 1), b, needs="2")
    call = lambda x, w, b: tpinv.column_parallel_linear(x, w, b, tree=tree, gather_output=True)  # noqa: E731
    yield "column gathered", run(call, dy, x, part(w, 0), part(b, 0))
    call = lambda x, w, b: tpinv.column_parallel_linear(x, w, b, tree=tree)  # noqa: E731
    yield (
        "column views",
        run(call, part(dy, 2), x.transpose(0, 1).contiguous().transpose(0, 1), part(w, 0).t().contiguous().t(), part(b, 0)),
    )
    yield "column one row", run(call, part(dy, 2)[0, 0], x[0, 0], part(w, 0), part(b, 0))
    yield "column no rows", run(call, part(dy, 2)[:0], x[:0], part(w, 0), part(b, 0))
    for name, function, dim, rows, dout in (
        ("column", tpinv.column_parallel_linear, 0, x, part(dy, 2)),
        ("row", tpinv.row_parallel_linear, 1, part(x, 2), dy),
    ):
        weight = part(w, dim).requires_grad_()
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
        for _ in range(2):
            function(rows, weight, tree=tree, gradient_accumulation_fusion=True).backward(dout)
        yield f"{name} main_grad", {"main_grad": weight.main_grad}


def norms(rank: int, p: int, dtype: torch.dtype, tree) -> Iterator[tuple[str, dict]]:
    x, dy = make("x", TOKENS + p, BATCH, K, dtype=dtype), make("dy", TOKENS + p, BATCH, K, dtype=dtype)
    w, b = make("w", K, dtype=dtype), make("b", K)
    cut = lambda t: t[: TOKENS // p * p].chunk(p)[rank]  # noqa: E731
    heads = lambda t: t[:4].view(2, 2 * BATCH, K).reshape(2, BATCH, 2, K).repeat(1, 1, 4, 1).chunk(p, 2)[rank]  # noqa: E731
    for rows, options, pick in (
        ("whole", {}, lambda t: t),
        ("tokens", {"sequence_parallel": True}, cut),
        ("heads", {"heads_parallel": True}, heads),
    ):
        rms = lambda x, w, options=options: tpinv.rms_norm(x, w, 1e-6, tree=tree, **options)  # noqa: E731
        layer = lambda x, w, b, options=options: tpinv.layer_norm(x, w, b, tree=tree, **options)  # noqa: E731
        yield f"rms_norm {rows}", run(rms, pick(dy), pick(x), w)
        yield f"rms_norm {rows}, x alone", run(rms, pick(dy), pick(x), w, needs="0")
        yield f"layer_norm {rows}", run(layer, pick(dy), pick(x), w.float(), b)
        yield f"layer_norm {rows}, no bias", run(layer, pick(dy), pick(x), w, None)


def vocabulary(rank: int, p: int, dtype: torch.dtype, tree) -> Iterator[tuple[str, dict]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCAB, (TOKENS, BATCH), generator=generator)
    table, logits = make("table", VOCAB, N, dtype=dtype), make("logits", TOKENS, BATCH, VOCAB, dtype=dtype)
    for sp in (False, True):
        dy = make("dy", TOKENS, BATCH, N, dtype=dtype)
        call = lambda w, sp=sp: tpinv.vocab_parallel_embedding(ids, w, sequence_parallel=sp)  # noqa: E731
        yield f"embedding sp={sp}", run(call, shard(dy, 0, rank, p) if sp else dy, shard(table, 0, rank, p))
    target = ids.masked_fill(ids == 3, -100)
    dloss = make("dloss", TOKENS, BATCH)
    for smoothing in (0.0, 0.1):
        call = lambda x, s=smoothing: tpinv.vocab_parallel_cross_entropy(x, target, tree=tree, label_smoothing=s)  # noqa: E731
        yield f"cross_entropy smoothing={smoothing}", run(call, dloss, shard(logits, 2, rank, p))
    call = lambda x: tpinv.vocab_parallel_log_probs(x, target, tree=tree)  # noqa: E731
    yield "log_probs", run(call, torch.ones(()).expand(TOKENS, BATCH), shard(logits, 2, rank, p))


def elementwise(rank: int, p: int, dtype: torch.dtype, tree) -> Iterator[tuple[str, dict]]:
    x = make("x", TOKENS, BATCH, 2 * N, dtype=dtype)
    whole = make("dy", TOKENS, BATCH, 2 * N, dtype=dtype)
    x, dy = (shard(t, 2, rank, p) for t in (x, whole))
    yield "silu", run(tpinv.silu, dy, x)
    yield "gelu", run(tpinv.gelu, dy, x)
    yield "gelu tanh", run(lambda x: tpinv.gelu(x, "tanh"), dy, x)
    yield "swiglu", run(tpinv.swiglu, dy[..., : dy.shape[-1] // 2], x)


def collectives(rank: int, p: int, dtype: torch.dtype, tree) -> Iterator[tuple[str, dict]]:
    nodes = torch.bfloat16 if tree.node_dtype == "bfloat16" else torch.float32
    values = make(f"values {rank} of {p}", len(tree.subtrees(rank, p)), TOKENS, 5, dtype=nodes)
    yield "tree_all_reduce", {"y": tpinv.tree_all_reduce(values, tree=tree, out_dtype=dtype)}
    yield "tree_reduce_scatter", {"y": tpinv.tree_reduce_scatter(values, tree=tree, out_dtype=dtype)}
    residual, weight = make("residual", TOKENS, 5, dtype=dtype), make("weight", 5, dtype=dtype)
    hidden, normed = tpinv.reduce_add_rms_norm(values, residual, weight, tree=tree)
    yield "reduce_add_rms_norm", {"hidden": hidden, "norm": normed}
    x, w = shard(make("x", TOKENS, K, dtype=dtype), 1, rank, p), shard(make("w", N, K, dtype=dtype), 1, rank, p)
    residual, weight = make("residual", TOKENS, N, dtype=dtype), make("weight", N, dtype=dtype)
    hidden, normed = tpinv.row_parallel_add_rms_norm(x, w, residual, weight, tree=tree)
    yield "row_parallel_add_rms_norm", {"hidden": hidden, "norm": normed}
    torch.manual_seed(0)  # replicas must be the same on every rank
    layers = torch.nn.ModuleList(
        [tpinv.ColumnParallelLinear(K, N, tree=tree, dtype=dtype), tpinv.RowParallelLinear(K, N, tree=tree, dtype=dtype)]
    )
    for i, (parameter, dim) in enumerate(zip(layers.parameters(), (0, 0, 1, None), strict=True)):
        whole = make(f"grad {i}", *((N, K) if parameter.dim() == 2 else (N,)), dtype=dtype)
        parameter.grad = whole if dim is None else shard(whole, dim, rank, p)
    yield "grad_norm", {"l2": tpinv.grad_norm(layers.parameters()), "max": tpinv.grad_norm(layers.parameters(), norm_type=float("inf"))}
    tpinv.clip_grad_norm_(layers.parameters(), 0.5)
    yield "clipped", {str(i): parameter.grad for i, parameter in enumerate(layers.parameters())}


def digests() -> dict[str, str]:
    """Runs on p ranks: name of a tensor -> its digest on this rank."""
    rank, p, found = dist.get_rank(), dist.get_world_size(), {}
    for dtype_name, dtype in DTYPES.items():
        for tree in TREES:
            for group in (linears, norms, vocabulary, elementwise, collectives):
                for case, tensors in group(rank, p, dtype, tree):
                    for name, t in tensors.items():
                        data = f"{t.dtype} {tuple(t.shape)}".encode() + t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                        key = f"p={p} rank {rank} {dtype_name} {tree.fingerprint} {case}: {name}"
                        found[key] = hashlib.sha256(data).hexdigest()[:16]
    return found


def compare(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Lines that say what differs."""
    missing = [f"only on one side: {key}" for key in sorted(before.keys() ^ after.keys())]
    return missing + [f"differs: {key}" for key in sorted(before.keys() & after.keys()) if before[key] != after[key]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("path")
    both = commands.add_parser("compare")
    both.add_argument("before")
    both.add_argument("after")
    arguments = parser.parse_args()
    if arguments.command == "record":
        with RankPool() as pool, open(arguments.path, "w") as file:
            found = {key: digest for p in RANKS for result in pool.run(digests, p, timeout=300) for key, digest in result.items()}
            json.dump(found, file, indent=0)
        print(f"{len(found)} digests")
        return 0
    with open(arguments.before) as one, open(arguments.after) as two:
        before, after = json.load(one), json.load(two)
    differences = compare(before, after)
    print(*differences[:20], f"{len(before)} digests, {len(differences)} differences", sep="\n")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())

"""What the GPU tests run on ranks. Every job takes whole inputs, computes on this rank's shards and returns whole results on rank 0."""

import torch
import torch.distributed as dist

from tpinv import functional, reference
from tpinv.collectives import Ranks, resolve, tree_all_reduce
from tpinv.layers import shard, unshard
from tpinv.optim import norm_of
from tpinv.tree import ReductionTree

M, B, HEADS, GROUPS, D, FFN, V = 96, 2, 16, 8, 32, 1152, 1024
H = HEADS * D
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make(name: str, *shape, dtype=torch.bfloat16) -> torch.Tensor:
    """Exponents over 2^-6 ... 2^6, some -0.0, and columns that cancel; the same on every rank."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-6, 7, shape, generator=g).float())
    x.view(-1)[::11] = -0.0
    x.view(-1)[1::13] = 100.0
    return (x / 16).to(dtype).cuda()


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    tensor = tensor.detach().contiguous()
    out = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(out, tensor)
    return out


def whole(tensor: torch.Tensor, dim: int | None, stride: int = 1) -> torch.Tensor:
    """The shards put together; a replicated tensor (dim None) must be the same bytes on all ranks."""
    every = parts(tensor)
    if dim is not None:
        return unshard(every, dim, stride)
    if any(not torch.equal(p.view(-1).view(torch.uint8), every[0].view(-1).view(torch.uint8)) for p in every):
        raise RuntimeError("a replicated result is not the same bytes on all ranks")
    return every[0]


def block(leaves: int, dtype: str, sp: bool, node_dtype: str = "float32") -> dict[str, torch.Tensor]:
    """A transformer block's functions, one by one on fresh inputs, forward and backward: name -> whole tensor."""
    ranks, tree, dtype = resolve(), ReductionTree(leaves, node_dtype), DTYPES[dtype]
    r, p = ranks.rank, ranks.size
    results: dict[str, torch.Tensor] = {}

    def run(name, function, dy, out_dim, **inputs):
        """``inputs``: name -> (whole tensor, dimension it is sharded on or None, stride). ``dy`` is whole too."""
        mine = {key: (shard(t, dim, r, p, stride) if dim is not None else t).requires_grad_() for key, (t, dim, stride) in inputs.items()}
        y = function(**mine)
        results[name] = whole(y, out_dim)
        y.backward(shard(dy, out_dim, r, p) if out_dim is not None else dy)
        for key, (_, dim, stride) in inputs.items():
            results[f"{name} d{key}"] = whole(mine[key].grad, dim, stride)

    def new(name, *shape):
        return make(name, *shape, dtype=dtype)

    tokens = 0 if sp else None
    for stride, n in ((1, HEADS * D), (2, 2 * FFN)):
        column = lambda x, w, b, stride=stride: functional.column_parallel_linear(  # noqa: E731
            x, w, b, tree=tree, sequence_parallel=sp, stride=stride
        )
        inputs = {"x": (new("x", M, B, H), tokens, 1), "w": (new("w", n, H), 0, stride), "b": (new("b", n), 0, stride)}
        dy = shard_order(new("dy", M, B, n), p, stride)
        run(f"column {stride}", column, dy, 2, **inputs)
        results[f"column {stride}"] = natural_order(results[f"column {stride}"], p, stride)
    row = lambda x, w, b: functional.row_parallel_linear(x, w, b, tree=tree, sequence_parallel=sp)  # noqa: E731
    run("row", row, new("dy", M, B, H), tokens, x=(new("x", M, B, FFN), 2, 1), w=(new("w", H, FFN), 1, 1), b=(new("b", H), None, 1))
    for name, function in (("rms", functional.rms_norm), ("layer", functional.layer_norm)):
        vectors = {"weight": (new("w", H), None, 1)} | ({"bias": (new("b", H), None, 1)} if name == "layer" else {})
        norm = lambda x, function=function, **v: function(x, tree=tree, sequence_parallel=sp, **v)  # noqa: E731
        run(name, norm, new("dy", M, B, H), tokens, x=(new("x", M, B, H), tokens, 1), **vectors)
    heads = lambda x, weight: functional.rms_norm(x, weight, tree=tree, heads_parallel=True)  # noqa: E731
    run("q norm", heads, new("dy", M, B, HEADS, D), 2, x=(new("x", M, B, HEADS, D), 2, 1), weight=(new("w", D), None, 1))
    attention = lambda q, k, v: functional.core_attention(q, k, v)  # noqa: E731
    run(
        "attention", attention, new("dy", M, B, HEADS, D), 2,
        q=(new("q", M, B, HEADS, D), 2, 1), k=(new("k", M, B, GROUPS, D), 2, 1), v=(new("v", M, B, GROUPS, D), 2, 1),
    )  # fmt: skip
    run("swiglu", functional.swiglu, new("dy", M, B, FFN), 2, x=(shard_order(new("x", M, B, 2 * FFN), p, 2), 2, 1))
    results["swiglu dx"] = natural_order(results["swiglu dx"], p, 2)
    ids = (make("ids", M, B, dtype=torch.float32).abs() * 977).long() % V
    embed = lambda weight: functional.vocab_parallel_embedding(ids, weight, sequence_parallel=sp)  # noqa: E731
    run("embedding", embed, new("dy", M, B, H), tokens, weight=(new("table", V, H), 0, 1))
    ids[3, 1] = -100
    for smooth in (0.0, 0.1):
        loss = lambda logits, smooth=smooth: functional.vocab_parallel_cross_entropy(logits, ids, tree=tree, label_smoothing=smooth)  # noqa: E731
        run(f"loss {smooth}", loss, make("dloss", M, B, dtype=torch.float32), None, logits=(new("logits", M, B, V), 2, 1))
    results["norm"] = norm_of([results["row dw"].chunk(p)[r]]).view(1)
    return results if r == 0 else {}


def shard_order(t: torch.Tensor, p: int, stride: int) -> torch.Tensor:
    """The last dimension, ``stride`` blocks side by side, so that rank r's consecutive part holds its part of every block."""
    return torch.cat(reference.split_leaves(t, t.dim() - 1, p, stride), -1) if stride > 1 else t


def natural_order(t: torch.Tensor, p: int, stride: int) -> torch.Tensor:
    return reference.join_leaves(t.chunk(p, -1), t.dim() - 1, stride) if stride > 1 else t


def stock(dtype: str) -> dict[str, torch.Tensor]:
    """The twin: partial sums added by the group's own all-reduce, products and column sums by the libraries."""
    ranks, dtype = resolve(), DTYPES[dtype]
    x, w, dy = (make(name, *shape, dtype=dtype) for name, shape in (("x", (M * B, FFN)), ("w", (H, FFN)), ("dy", (M * B, H))))
    x, w = shard(x, 1, ranks.rank, ranks.size), shard(w, 1, ranks.rank, ranks.size)
    y, db = x @ w.t(), dy.chunk(ranks.size)[ranks.rank].float().sum(0)
    for t in (y, db):
        if ranks.size > 1:
            dist.all_reduce(t)
    return {"row": y, "db": db}


def scattered_norm(leaves: int) -> torch.Tensor:
    """tree_all_reduce of column sums by itself, with several subtrees a rank (p = 3, 6 with 24 leaves)."""
    ranks, tree = resolve(), ReductionTree(leaves)
    from tpinv import kernels

    x = make("x", 480, H, dtype=torch.float32).chunk(ranks.size)[ranks.rank]
    return tree_all_reduce(kernels.column_sum(x, tree, ranks.rank, ranks.size), tree=tree, group=Ranks(ranks.group, ranks.rank, ranks.size))

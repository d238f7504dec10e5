"""Random cases of every function at p = 2, 3, 4, 6 against p = 1, byte for byte: ``python tests/fuzz.py --cases 10000``.

A case is drawn from its number alone: function, shapes (empty and one-row ones among them), dtype, leaves, node dtype, stride,
sequence parallelism, which inputs need gradients, values (tests/hostile.py), and p. Every rank lays its tensors out in memory in
another way: odd storage offsets, transposed or widely strided storage, so that no bit may come from where a tensor lies. Besides
p against 1, some rows computed alone must have the bytes they have among all rows.

``--stock`` runs torch's own functions through the same comparison: it must find differences, or the fuzz proves nothing.
Exit status 0: no difference; 1: differences, each printed with its number, by which ``--first N --cases 1`` repeats it.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hostile import INEXACT, KINDS, hostile, same_nan
from torch import Tensor

import tpinv
from tpinv import ReductionTree, reference
from tpinv.collectives import resolve
from tpinv.layers import shard, unshard
from tpinv.testing import RankPool, compare

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (2, 3, 4, 6)
BATCH = 250  # cases of one p that the ranks compute in one go


class Case(NamedTuple):
    """One call, whole: ``p`` ranks share it. ``sizes`` are those of the function's own dimensions."""

    number: int
    function: str
    p: int
    dtype: torch.dtype
    kind: str
    tree: ReductionTree
    sequence_parallel: bool
    stride: int
    bias: bool
    needs: tuple[bool, bool, bool]
    sizes: dict[str, int]

    def make(self, name: str, *shape: int) -> Tensor:
        return hostile(self.kind, shape, self.dtype, seed=hash_of(self.number, name))

    def integers(self, name: str, high: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash_of(self.number, name))
        return torch.randint(0, high, shape, generator=generator)


def hash_of(number: int, name: str) -> int:
    return number * 1009 + sum(ord(c) * 31**i for i, c in enumerate(name)) % 1_000_003


def draw(number: int) -> Case:
    rng = random.Random(number)
    p = rng.choice(RANKS)
    leaves = p * rng.choice((1, 1, 2, 4)) if rng.random() < 0.7 else 24 if 24 % p == 0 else p
    nodes = "bfloat16" if rng.random() < 0.2 else "float32"
    stride = rng.choice((1, 1, 1, 2))
    few = lambda: rng.choice((1, 1, 2, 3, 5, 7, 16))  # noqa: E731
    sizes = {
        "tokens": p * rng.choice((0, 1, 1, 2, 3, 5, 11, 17)),  # p divides them, for sequence parallelism
        "batch": rng.choice((1, 1, 2, 3)),
        "features": leaves * few(),  # sharded
        "others": rng.choice((1, 2, 3, 7, 8, 13, 37, 64, 129, 130)),  # whole
        "heads": p * rng.choice((1, 2)),
    }
    needs = rng.choice(((True, True, True), (True, True, True), (True, False, False), (False, True, True), (False, False, True)))
    return Case(
        number, rng.choice(sorted(FUNCTIONS)), p, rng.choice(DTYPES), rng.choice(KINDS), ReductionTree(leaves, nodes),
        rng.random() < 0.4, stride, rng.random() < 0.6, needs, sizes,
    )  # fmt: skip


# -- memory: the same values, laid out in another way -------------------------------------------------------------------------------


def scatter_in_memory(t: Tensor, rng: random.Random) -> Tensor:
    """The values of ``t`` at an odd storage offset, or transposed, or with wide rows."""
    way = rng.choice(("as it is", "offset", "offset", "transposed", "wide"))
    if way == "offset":
        offset = rng.randrange(1, 8)
        return t.new_empty(t.numel() + offset)[offset:].view(t.shape).copy_(t)
    if way == "transposed" and t.dim() > 1:
        return t.new_empty(t.movedim(-1, 0).shape).movedim(0, -1).copy_(t)
    if way == "wide" and t.dim():
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + rng.randrange(1, 5)), 7)
        return wide[..., 1 : 1 + t.shape[-1]].copy_(t) if wide.shape[-1] > t.shape[-1] else t
    return t


class Inputs:
    """What one rank gives to a function: whole tensors cut to its shard and put somewhere in memory; leaves of autograd as the case says."""

    def __init__(self, case: Case, rank: int, ranks: int):
        self.case, self.rank, self.ranks = case, rank, ranks
        self.rng = random.Random(f"{case.number} {rank} {ranks}")

    def cut(self, t: Tensor, dim: int | None, stride: int = 1) -> Tensor:
        t = t if dim is None else shard(t, dim, self.rank, self.ranks, stride)
        return scatter_in_memory(t, self.rng)

    def run(self, function: Callable, dy: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """y and the gradients of the tensors ``given`` that need one. ``dy``: this rank's."""
        needs = dict(zip(given, self.case.needs, strict=False))
        given = {name: t.detach().requires_grad_(needs[name] and t.is_floating_point()) for name, t in given.items()}
        y = function(**given)
        if y.requires_grad:
            y.backward(scatter_in_memory(dy, self.rng))
        return {"y": y.detach(), **{f"d{name}": t.grad for name, t in given.items() if t.grad is not None}}


# -- functions: what a rank computes, and along which dimension each result is sharded ------------------------------------------------


def column(case: Case, io: Inputs, stock: bool) -> tuple[dict, dict]:
    tokens, batch, k = case.sizes["tokens"], case.sizes["batch"], case.sizes["others"]
    n, stride, sp = case.sizes["features"] * case.stride, case.stride, case.sequence_parallel
    x, w = io.cut(case.make("x", tokens, batch, k), 0 if sp else None), io.cut(case.make("w", n, k), 0, stride)
    b = {"b": io.cut(case.make("b", n), 0, stride)} if case.bias else {}
    dy = shard(case.make("dy", tokens, batch, n), 2, io.rank, io.ranks, stride)

    def function(x, w, b=None):
        if stock:
            return F.linear(x, w, b)
        return tpinv.column_parallel_linear(x, w, b, tree=case.tree, sequence_parallel=sp, stride=stride)

    if stock and (sp or stride > 1):
        return {}, {}
    results = io.run(function, dy, x=x, w=w, **b)
    if stock and "dx" in results and io.ranks > 1:
        dist.all_reduce(results["dx"])
    return results, {"y": (2, stride), "dx": 0 if sp else None, "dw": (0, stride), "db": (0, stride)}


def row(case: Case, io: Inputs, stock: bool) -> tuple[dict, dict]:
    tokens, batch, n = case.sizes["tokens"], case.sizes["batch"], case.sizes["others"]
    k, sp = case.sizes["features"], case.sequence_parallel
    x, w = io.cut(case.make("x", tokens, batch, k), 2), io.cut(case.make("w", n, k), 1)
    b = {"b": io.cut(case.make("b", n), None)} if case.bias else {}
    dy = io.cut(case.make("dy", tokens, batch, n), 0 if sp else None)
    if stock:
        if sp:
            return {}, {}
        y = F.linear(x, w)
        if io.ranks > 1:
            dist.all_reduce(y)
        return {"y": y}, {"y": None}
    results = io.run(lambda x, w, b=None: tpinv.row_parallel_linear(x, w, b, tree=case.tree, sequence_parallel=sp), dy, x=x, w=w, **b)
    return results, {"y": 0 if sp else None, "dx": 2, "dw": 1, "db": None}


def rms_norm(case: Case, io: Inputs, stock: bool) -> tuple[dict, dict]:
    return _norm(case, io, stock, center=False)


def layer_norm(case: Case, io: Inputs, stock: bool) -> tuple[dict, dict]:
    return _norm(case, io, stock, center=True)


def _norm(case: Case, io: Inputs, stock: bool, center: bool) -> tuple[dict, dict]:
    tokens, width = case.sizes["tokens"], case.sizes["others"]
    by_heads = case.stride == 2  # q/k norms: rows are sharded by heads
    shape = (tokens, case.sizes["batch"], case.sizes["heads"], width) if by_heads else (tokens, case.sizes["batch"], width)
    dim = 2 if by_heads else 0 if case.sequence_parallel else None
    x, w = io.cut(case.make("x", *shape), dim), io.cut(case.make("w", width), None)
    b = {"b": io.cut(case.make("b", width), None)} if case.bias and center else {}
    dy = io.cut(case.make("dy", *shape), dim)
    how = {"tree": case.tree, "sequence_parallel": dim == 0, "heads_parallel": by_heads}
    if stock:
        function = (lambda x, w, b=None: F.layer_norm(x, w.shape, w, b)) if center else (lambda x, w: F.rms_norm(x, w.shape, w, 1e-5))
    else:
        function = (lambda x, w, b=None: tpinv.layer_norm(x, w, b, **how)) if center else (lambda x, w: tpinv.rms_norm(x, w, **how))
    results = io.run(function, dy, x=x, w=w, **b)
    if stock and dim is not None and io.ranks > 1:
        for name in {"dw", "db"} & set(results):
            dist.all_reduce(results[name])
    return results, {"y": dim, "dx": dim, "dw": None, "db": None}


def embedding(case: Case, io: Inputs, stock: bool) -> tuple[dict, dict]:
    vocabulary, width, sp = case.sizes["features"], case.sizes["others"], case.sequence_parallel
    ids = case.integers("ids", vocabulary, case.sizes["tokens"], case.sizes["batch"])
    w = io.cut(case.make("w", vocabulary, width), 0)
    dy = io.cut(case.make("dy", *ids.shape, width), 0 if sp else None)
    if stock:
        return {}, {}
    w = w.detach().requires_grad_()
    y = tpinv.vocab_parallel_embedding(ids, w, sequence_parallel=sp)
    y.backward(dy)
    return {"y": y.detach(), "dw": w.grad}, {"y": 0 if sp else None, "dw": 0}


def cross_entropy(case: Case, io: Inputs, stock: bool) -> tuple[dict, dict]:
    shape = case.sizes["tokens"], case.sizes["batch"], case.sizes["features"] * case.stride
    target = case.integers("t", shape[2], *shape[:2])
    if case.bias:
        target = target.masked_fill(target % 5 == 0, -100)
    x, dy = io.cut(case.make("x", *shape), 2), io.cut(case.make("dy", *shape[:2]).float(), None)
    smoothing = 0.1 if case.needs == (True, False, False) and shape[2] > 1 else 0.0
    if stock:
        total = x.float().exp().sum(-1)
        if io.ranks > 1:
            dist.all_reduce(total)
        return {"y": total.log()}, {"y": None}
    results = io.run(lambda x: tpinv.vocab_parallel_cross_entropy(x, target, tree=case.tree, label_smoothing=smoothing), dy, x=x)
    return results, {"y": None, "dx": 2}


def activation(case: Case, io: Inputs, stock: bool) -> tuple[dict, dict]:
    name = ("silu", "gelu", "gelu_tanh", "swiglu")[case.number % 4]
    stride = 2 if name == "swiglu" else 1
    shape = case.sizes["tokens"], case.sizes["features"] * case.sizes["others"] * stride
    x, dy = io.cut(case.make("x", *shape), 1, stride), io.cut(case.make("dy", shape[0], shape[1] // stride), 1)
    ours = {
        "silu": (tpinv.silu, F.silu),
        "gelu": (tpinv.gelu, F.gelu),
        "gelu_tanh": (lambda x: tpinv.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
        "swiglu": (tpinv.swiglu, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
    }[name][stock]
    return io.run(lambda x: ours(x), dy, x=x), {"y": 1, "dx": (1, stride)}


def tree_all_reduce(case: Case, io: Inputs, stock: bool) -> tuple[dict, dict]:
    tree, shape = case.tree, (case.sizes["tokens"], case.sizes["others"])
    add = reference.node_add(tree)
    leaves = case.make("leaves", tree.leaves, *shape).to(reference.torch_node_dtype(tree))
    if stock:
        y = leaves[list(tree.owned(io.rank, io.ranks))].sum(0)
        if io.ranks > 1:
            dist.all_reduce(y)
        return {"y": y}, {"y": None}
    values = torch.stack([tree.reduce(leaves[n.start : n.stop].unbind(0), add, n) for n in tree.subtrees(io.rank, io.ranks)])
    values = scatter_in_memory(values, io.rng)
    if case.sequence_parallel:
        return {"y": tpinv.tree_reduce_scatter(values, tree=tree, out_dtype=case.dtype)}, {"y": 0}
    return {"y": tpinv.tree_all_reduce(values, tree=tree, out_dtype=case.dtype)}, {"y": None}


FUNCTIONS = {f.__name__: f for f in (column, row, rms_norm, layer_norm, embedding, cross_entropy, activation, tree_all_reduce)}


# -- comparison -------------------------------------------------------------------------------------------------------------------------


def compute(numbers: list[int], stock: bool) -> list[tuple[dict, dict]]:
    """On every rank: the results of the cases, and how they are sharded."""
    _, rank, ranks = resolve()
    return [FUNCTIONS[case.function](case, Inputs(case, rank, ranks), stock) for case in map(draw, numbers)]


def compare_with_one_rank(pool: RankPool, numbers: list[int], p: int, stock: bool) -> list[str]:
    """A line for every tensor that differs."""
    alone = pool.run(compute, 1, numbers, stock, timeout=600)[0]
    ranks = pool.run(compute, p, numbers, stock, timeout=600)
    failures = []
    for at, number in enumerate(numbers):
        (expected, _), (_, dims) = alone[at], ranks[0][at]
        for name, whole in expected.items():
            parts, dim = [rank[at][0][name] for rank in ranks], dims[name]
            joined = parts if dim is None else [unshard(parts, *(dim if isinstance(dim, tuple) else (dim,)))]
            for part in joined:
                if difference := compare(same_nan(part), same_nan(whole)):
                    failures.append(f"{draw(number)}: {name} {difference}")
                    break
    return failures


def compare_rows_alone(number: int) -> list[str]:
    """A slice of a case's rows, at an offset into the same storage, against those rows of the whole."""
    case = draw(number)._replace(sequence_parallel=False)
    if case.function not in ("column", "row", "rms_norm", "layer_norm") or case.sizes["tokens"] < 2:
        return []
    rng, k = random.Random(number), case.sizes["others"]
    n = case.sizes["features"]
    k, n = (k, n) if case.function == "column" else (n, k)
    x, w = case.make("x", case.sizes["tokens"], k), case.make("w", n, k)
    function = {
        "column": lambda x: tpinv.column_parallel_linear(x, w, tree=case.tree),
        "row": lambda x: tpinv.row_parallel_linear(x, w, tree=case.tree),
        "rms_norm": lambda x: tpinv.rms_norm(x, w[0], tree=case.tree),
        "layer_norm": lambda x: tpinv.layer_norm(x, w[0], tree=case.tree),
    }[case.function]
    first = rng.randrange(0, len(x))
    last = rng.randrange(first, len(x)) + 1
    difference = compare(same_nan(function(x[first:last])), same_nan(function(x)[first:last]))
    return [f"{case}: rows {first} to {last} alone: {difference}"] if difference else []


def fuzz(first: int, cases: int, stock: bool = False, report: Callable[[str], None] = lambda line: None) -> list[str]:
    """Failures of cases ``first`` to ``first + cases``."""
    failures = []
    by_p: dict[int, list[int]] = {}
    for number in range(first, first + cases):
        case = draw(number)
        if not stock or case.kind in INEXACT:
            by_p.setdefault(case.p, []).append(number)
        if not stock:
            failures += compare_rows_alone(number)
    done = 0
    with RankPool() as pool:
        for p, numbers in sorted(by_p.items()):
            for at in range(0, len(numbers), BATCH):
                batch = numbers[at : at + BATCH]
                failures += compare_with_one_rank(pool, batch, p, stock)
                done += len(batch)
                report(f"{done} cases, {len(failures)} tensors differ")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--stock", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    failures = fuzz(options.first, options.cases, options.stock, report=lambda line: print(line, flush=True))
    print(*failures[:50], sep="\n")
    print(f"{options.cases} cases, {len(failures)} tensors differ, {time.monotonic() - start:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

"""``tpinv probe OP``: recovers the order of additions of an operation on this machine and draws it."""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.tree import Tree
from torch import Tensor

from tpinv import reference
from tpinv.collectives import tree_all_reduce, tree_reduce_scatter
from tpinv.testing import RankPool, order_probe, tree_shape
from tpinv.testing.probe import Shape
from tpinv.tree import ReductionTree


def _product(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A matrix product as a sum: one row of values times a matrix of ones."""
    return lambda values: multiply(values.unsqueeze(0), torch.ones(len(values), 16))[0, 0]


def _rank_leaves(probes: Tensor, tree: ReductionTree, combine: str) -> Tensor:
    """On a rank: the leaves of probes [B, L] that it owns, summed up by the named collective. [B], whole on every rank."""
    ranks = torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    if combine == "stock":
        mine = probes[:, tree.owned(rank, ranks)].sum(1)
        torch.distributed.all_reduce(mine)
        return mine
    add, nodes = reference.node_add(tree), tree.subtrees(rank, ranks)
    leaves = probes.to(reference.torch_node_dtype(tree))
    values = torch.stack([tree.reduce((leaves[:, leaf] for leaf in range(*node)), add, node) for node in nodes])
    if combine == "all_reduce":
        return tree_all_reduce(values, tree=tree)
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % ranks))
    part = tree_reduce_scatter(padded, tree=tree)
    whole = [torch.empty_like(part) for _ in range(ranks)]
    torch.distributed.all_gather(whole, part)
    return torch.cat(whole)[: probes.shape[0]]


def _collective(combine: str) -> Callable:
    def build(arguments: argparse.Namespace, pool: RankPool) -> dict:
        tree = ReductionTree(arguments.leaves, arguments.node_dtype)
        tree.owned(0, arguments.tp)
        run = lambda probes: pool.run(_rank_leaves, arguments.tp, probes, tree, combine)[0]  # noqa: E731
        if combine == "stock":  # one element per call: its order depends on where in the message an element lies
            return {"total": lambda probe: run(probe.unsqueeze(0))[0], "expected": None}
        return {"total": run, "batched": True, "expected": tree_shape(tree)}

    return build


def _local(total: Callable[[Tensor], Tensor], expected: Callable[[int], Shape] | None = None) -> Callable:
    return lambda arguments, pool: {"total": total, "expected": expected and expected(arguments.leaves)}


def _chain(leaves: int) -> Shape:
    shape: Shape = 0
    for leaf in range(1, leaves):
        shape = (shape, leaf)
    return shape


OPERATIONS = {
    "torch.sum": (_local(torch.sum), "torch.sum of a vector"),
    "torch.cumsum": (_local(lambda v: v.cumsum(0)[-1], _chain), "the last entry of torch.cumsum"),
    "torch.matmul": (_local(_product(torch.matmul)), "one element of a product of float32 matrices"),
    "torch.mv": (_local(lambda v: torch.mv(torch.ones(16, len(v)), v)[0]), "one element of a matrix-vector product"),
    "all_reduce": (_collective("stock"), "torch.distributed.all_reduce (gloo) over --tp ranks of torch.sum"),
    "tpinv.matmul": (_local(_product(reference.chain_matmul)), "tpinv's chain: one leaf of a product"),
    "tpinv.row_sum": (_local(reference.row_sum, lambda n: tree_shape(ReductionTree(n))), "tpinv's plain sum"),
    "tpinv.tree_all_reduce": (_collective("all_reduce"), "tpinv's all-reduce over --tp ranks"),
    "tpinv.tree_reduce_scatter": (_collective("reduce_scatter"), "tpinv's reduce-scatter over --tp ranks"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listed = "; ".join(f"{name}: {text}" for name, (_, text) in OPERATIONS.items())
    parser.add_argument(
        "operation", nargs="?", default="tpinv.tree_all_reduce", metavar="OP", help=f"default tpinv.tree_all_reduce. {listed}"
    )
    parser.add_argument("--leaves", type=int, default=8, help="number of summands (default 8, at most 256)")
    parser.add_argument("--tp", type=int, default=4, help="ranks of a collective (default 4)")
    parser.add_argument("--node-dtype", default="float32", help="float32 (default) or bfloat16, for tpinv's collectives")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Status 0 when the order is what the contract says (or nothing is promised), 1 when it is not."""
    if arguments.operation not in OPERATIONS:
        raise ValueError(f"operation {arguments.operation!r} is unknown; use one of {', '.join(OPERATIONS)}")
    build, text = OPERATIONS[arguments.operation]
    with RankPool() as pool:
        probe = build(arguments, pool)
        expected = probe.pop("expected")
        shape = order_probe(probe.pop("total"), arguments.leaves, **probe)
    console = Console(highlight=False)
    console.print(f"[bold]{arguments.operation}[/]: {text}, {arguments.leaves} summands")
    console.print(_render(shape))
    if expected is None:
        console.print("no order is promised here; another size, shape or machine may show another one")
        return 0
    console.print("[green]this is the promised order[/]" if shape == expected else f"[red]the promised order is {expected}[/]")
    return 0 if shape == expected else 1


def _render(shape: Shape) -> Tree:
    def label(node: Shape) -> str:
        return str(node) if isinstance(node, int) else "+" if len(node) == 2 else f"+ ({len(node)} in one step)"

    def grow(branch: Tree, node: Shape) -> Tree:
        for child in () if isinstance(node, int) else node:
            grow(branch.add(label(child)), child)
        return branch

    return grow(Tree(label(shape)), shape)

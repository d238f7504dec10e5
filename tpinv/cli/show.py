"""``tpinv show``: the tree, as people draw trees, and which rank owns what."""

import argparse

from rich.console import Console
from rich.text import Text

from tpinv.tree import Node, ReductionTree

COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


LARGEST = 4096  # leaves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--leaves", type=int, default=8, help="leaves of the tree (default 8)")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (default 1)")
    parser.add_argument("--node-dtype", default="float32", help="float32 (default) or bfloat16")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    tree = ReductionTree(arguments.leaves, arguments.node_dtype)
    if tree.leaves > LARGEST:
        raise ValueError(f"--leaves {tree.leaves} is a tree too wide to draw; show at most {LARGEST}, whose shape is the same")
    tree.owned(0, arguments.tp)  # ValueError for 0 ranks too, which own nothing below
    owned = [tree.subtrees(rank, arguments.tp) for rank in range(arguments.tp)]
    console = Console(highlight=False)
    console.print(f"[bold]{tree.fingerprint}[/]  {arguments.tp} rank{'s' if arguments.tp > 1 else ''}")
    for line in draw(tree, owned):
        console.print(line)
    console.print()
    for rank, nodes in enumerate(owned):
        leaves = tree.owned(rank, arguments.tp)
        sends = f"{len(nodes)} value{'s' if len(nodes) > 1 else ''} per element: {', '.join(map(str, nodes))}"
        console.print(Text(f"rank {rank}  leaves {leaves.start}..{leaves.stop - 1}  sends {sends}", style=_color(rank)))
    return 0


def _color(rank: int) -> str:
    return COLORS[rank % len(COLORS)]


def draw(tree: ReductionTree, owned: list[tuple[Node, ...]]) -> list[Text]:
    """The tree from the root down, a line per level of nodes and one of branches, each leaf three columns wide.

    What a rank computes by itself has its color; the nodes above, finished across ranks, have none.
    """
    width = max(3, len(str(tree.leaves - 1)) + 1)
    rank_of = {node: rank for rank, nodes in enumerate(owned) for node in nodes}
    levels: dict[int, list[tuple[Node, int | None]]] = {}
    columns: dict[Node, int] = {}

    def place(node: Node, depth: int, rank: int | None) -> int:
        rank = rank_of.get(node, rank)
        levels.setdefault(depth, []).append((node, rank))
        if node.is_leaf:
            columns[node] = node.start * width + width // 2
        else:
            columns[node] = sum(place(child, depth + 1, rank) for child in tree.children(node)) // 2
        return columns[node]

    place(tree.root, 0, None)
    lines = []
    for depth in sorted(levels):
        names, branches = _Canvas(), _Canvas()
        for node, rank in levels[depth]:
            style = "bold" if rank is None else _color(rank)
            names.put(columns[node], str(node.start) if node.is_leaf else "+", style)
            if not node.is_leaf:
                left, right = (columns[child] for child in tree.children(node))
                branches.put_row(left, "┌" + "─" * (columns[node] - left - 1) + "┴" + "─" * (right - columns[node] - 1) + "┐", style)
        lines.append(names.line())
        if branches:
            lines.append(branches.line())
    return lines


class _Canvas:
    """One line of styled characters by column."""

    def __init__(self):
        self.cells: dict[int, tuple[str, str]] = {}

    def __bool__(self) -> bool:
        return bool(self.cells)

    def put(self, column: int, text: str, style: str) -> None:
        self.put_row(column - (len(text) - 1) // 2, text, style)

    def put_row(self, column: int, text: str, style: str) -> None:
        self.cells.update({column + i: (character, style) for i, character in enumerate(text)})

    def line(self) -> Text:
        text = Text(no_wrap=True)
        for column in range(max(self.cells, default=-1) + 1):
            character, style = self.cells.get(column, (" ", ""))
            text.append(character, style)
        return text

"""Draws docs/block.png: the six products of a column- and a row-parallel linear, and where four ranks cut them."""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

RANKS = 4
COLORS = ("#9ecae1", "#c6dbef", "#fdd0a2", "#fdae6b")
WHOLE, TREE, LOCAL = "#e6e6e6", "#c0392b", "#2c7a3f"

# product: title, left operand, right operand, result (name, height, width, dimension that the ranks cut), what is summed, is it cut
M, K, N = 1.5, 1.1, 1.5
PRODUCTS = [
    ("column-parallel: forward", ("x", M, K, None), ("Wᵀ", K, N, 1), ("y", M, N, 1), "sum over K, whole on every rank", False),
    ("column-parallel: dgrad", ("dy", M, N, 1), ("W", N, K, 0), ("dx", M, K, None), "sum over N, cut by the ranks", True),
    ("column-parallel: wgrad", ("dyᵀ", N, M, 0), ("x", M, K, None), ("dW", N, K, 0), "sum over tokens, whole on every rank", False),
    ("row-parallel: forward", ("x", M, N, 1), ("Wᵀ", N, K, 0), ("y", M, K, None), "sum over K, cut by the ranks", True),
    ("row-parallel: dgrad", ("dy", M, K, None), ("W", K, N, 1), ("dx", M, N, 1), "sum over N, whole on every rank", False),
    ("row-parallel: wgrad", ("dyᵀ", K, M, None), ("x", M, N, 1), ("dW", K, N, 1), "sum over tokens, whole on every rank", False),
]


def draw_matrix(axes, x: float, middle: float, name: str, height: float, width: float, cut: int | None) -> float:
    """At left edge x; returns the right edge."""
    bottom = middle - height / 2
    if cut is None:
        axes.add_patch(Rectangle((x, bottom), width, height, facecolor=WHOLE, edgecolor="black", lw=0.8))
    for rank in range(RANKS if cut is not None else 0):
        h, w = (height / RANKS, width) if cut == 0 else (height, width / RANKS)
        corner = (x, bottom + height - (rank + 1) * h) if cut == 0 else (x + rank * w, bottom)
        axes.add_patch(Rectangle(corner, w, h, facecolor=COLORS[rank], edgecolor="black", lw=0.8))
    axes.text(x + width / 2, bottom - 0.06, name, ha="center", va="top", fontsize=11)
    return x + width


def main(path: str) -> None:
    figure, grid = plt.subplots(2, 3, figsize=(12, 4.6))
    for axes, (title, left, right, result, total, tree) in zip(grid.flat, PRODUCTS, strict=True):
        x = draw_matrix(axes, 0, 0, *left)
        axes.text(x + 0.14, 0, "·", ha="center", va="center", fontsize=16)
        x = draw_matrix(axes, x + 0.28, 0, *right)
        axes.text(x + 0.18, 0, "=", ha="center", va="center", fontsize=13)
        x = draw_matrix(axes, x + 0.36, 0, *result)
        axes.set_title(title, fontsize=11, loc="left")
        word = "TREE: " if tree else "local chain: "
        axes.text(0, -1.36, word + total, color=TREE if tree else LOCAL, fontsize=9, fontweight="bold" if tree else "normal")
        axes.set_xlim(-0.1, 5.25)
        axes.set_ylim(-1.5, 0.85)
        axes.set_aspect("equal")
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/block.png")

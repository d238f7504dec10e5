"""Collectives whose bits do not depend on the number of ranks, over any ProcessGroup. They know ranks and tensors, no layers."""

from tpinv.collectives.exact import all_gather, all_max, select_all_reduce, select_reduce_scatter
from tpinv.collectives.group import Ranks, resolve
from tpinv.collectives.tree_reduce import tree_all_reduce, tree_reduce_scatter

__all__ = [
    "Ranks",
    "all_gather",
    "all_max",
    "resolve",
    "select_all_reduce",
    "select_reduce_scatter",
    "tree_all_reduce",
    "tree_reduce_scatter",
]

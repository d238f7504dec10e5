"""Collectives whose bits do not depend on the number of ranks, over any ProcessGroup and over NVLink. They know ranks and tensors, no layers."""

from tpinv.collectives.agreement import agree, chip, ranks_for, refuse
from tpinv.collectives.exact import all_gather, all_max, select_all_reduce, select_reduce_scatter
from tpinv.collectives.group import Ranks, ranks_in, resolve
from tpinv.collectives.transport import all_reduce as all_reduce_integers
from tpinv.collectives.tree_reduce import all_reduce_add_norm, sum_over_ranks, tree_all_reduce, tree_reduce_scatter

__all__ = [
    "Ranks",
    "agree",
    "all_gather",
    "all_max",
    "all_reduce_add_norm",
    "all_reduce_integers",
    "chip",
    "ranks_for",
    "ranks_in",
    "refuse",
    "resolve",
    "select_all_reduce",
    "select_reduce_scatter",
    "sum_over_ranks",
    "tree_all_reduce",
    "tree_reduce_scatter",
]

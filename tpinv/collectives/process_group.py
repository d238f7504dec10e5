"""The rank part of the tree over any ProcessGroup (gloo, NCCL): a two-shot all-reduce in which only the additions are ours.

    rank r's subtree values [S_r, n]  --all_to_all_single of slices-->  every subtree's value of slice r
                                      --finish the tree above them-->   slice r of the sum
    all-reduce only:                  --all_gather-->                   the sum

A small message on a CPU is all latency: there every rank gets all subtrees' values at once and finishes the whole sum, in one exchange.

With L and p powers of two S_r is 1, and a rank sends (p-1)/p n node values and (p-1)/p n results: what a ring all-reduce
sends. Where a rank owns several maximal subtrees (L = 24 at p = 2, 4, 8: two) the first half grows by that factor.
"""

import torch
from torch import Tensor

from tpinv import reference
from tpinv.collectives.group import Ranks
from tpinv.collectives.transport import all_gather_single, all_to_all_single
from tpinv.tree import ReductionTree

SMALL = 4096  # bytes of the result in node_dtype, the same on all ranks, up to which one exchange of all is faster than two of parts


def all_reduce(values: Tensor, tree: ReductionTree, ranks: Ranks, out_dtype: torch.dtype) -> Tensor:
    """values [S, ...] -> [...]."""
    shape = values.shape[1:]
    count = shape.numel()
    padded = -(-count // ranks.size) * ranks.size
    flat = values.reshape(values.shape[0], count)
    if not values.is_cuda and count * flat.element_size() <= SMALL:
        return _exchange(flat.expand(ranks.size, *flat.shape), tree, ranks, out_dtype).view(shape)
    if padded > count:
        flat = torch.nn.functional.pad(flat, (0, padded - count))
    part = _finish_slice(flat, tree, ranks, out_dtype)
    out = part.new_empty(padded)
    all_gather_single(out, part, ranks)
    return out[:count].view(shape)


def reduce_scatter(values: Tensor, tree: ReductionTree, ranks: Ranks, out_dtype: torch.dtype) -> Tensor:
    """values [S, M, ...] -> [M/p, ...]."""
    shape = values.shape[1:]
    part = _finish_slice(values.reshape(values.shape[0], shape.numel()), tree, ranks, out_dtype)
    return part.view(shape[0] // ranks.size, *shape[1:])


def _finish_slice(flat: Tensor, tree: ReductionTree, ranks: Ranks, out_dtype: torch.dtype) -> Tensor:
    """flat [S, n], p dividing n -> this rank's slice [n/p] of the finished sum."""
    length = flat.shape[1] // ranks.size
    return _exchange(flat.view(flat.shape[0], ranks.size, length).transpose(0, 1), tree, ranks, out_dtype)


def _exchange(send: Tensor, tree: ReductionTree, ranks: Ranks, out_dtype: torch.dtype) -> Tensor:
    """send [p, S, n]: this rank's values for each rank -> [n]: the sum of those that were sent here."""
    length = send.shape[2]
    nodes = [tree.subtrees(rank, ranks.size) for rank in range(ranks.size)]
    every = [node for subtrees in nodes for node in subtrees]
    received = send.new_empty(len(every) * length)
    out_sizes = [len(subtrees) * length for subtrees in nodes]
    all_to_all_single(received, send.contiguous().view(-1), out_sizes, [send.shape[1] * length] * ranks.size, ranks)
    return reference.finish(received.view(len(every), length), tree, every, out_dtype)

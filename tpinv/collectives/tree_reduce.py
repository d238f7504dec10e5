"""tree_all_reduce and tree_reduce_scatter over any ProcessGroup (gloo, NCCL): the rank part of the tree.

A two-shot all-reduce in which only the additions are ours:

    rank r's subtree values [S_r, n]  --all_to_all_single of slices-->  every subtree's value of slice r
                                      --finish the tree above them-->   slice r of the sum
    all-reduce only:                  --all_gather-->                   the sum

With L and p powers of two S_r is 1, and a rank sends (p-1)/p n node values and (p-1)/p n results: what a ring all-reduce
sends. Where a rank owns several maximal subtrees (L = 24 at p = 2, 4, 8: two) the first half grows by that factor.
The order of additions comes from the tree alone; no message size, slice boundary or backend changes a bit.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tpinv import reference
from tpinv.collectives.group import all_gather_single, resolve
from tpinv.tree import ReductionTree


def tree_all_reduce(values: Tensor, *, tree: ReductionTree, group=None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Sums over all ranks' leaves by the tree; every rank gets the whole sum.

    Args:
        values: [S, ...] in the tree's node dtype: the values of this rank's maximal subtrees, in the order of
            ``tree.subtrees(rank, p)``. The shape behind S is the same on every rank.
        tree: its leaves are a multiple of the group's size.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        out_dtype: the root is rounded to it once (default: the node dtype), before it travels again.

    Returns:
        [...] in out_dtype, the same bytes on every rank and for every group size. It has no gradient. With one rank it may share
        memory with ``values``.

    Raises:
        ValueError: p does not divide the leaves, S is not this rank's number of subtrees, dtype is not the node dtype, or
            ``values`` require a gradient (with gradients enabled).
    """
    ranks, nodes = _check(values, tree, group)
    shape = values.shape[1:]
    if ranks.size == 1:
        return reference.finish(values, tree, nodes[0], out_dtype)
    count = shape.numel()
    padded = -(-count // ranks.size) * ranks.size
    flat = values.reshape(values.shape[0], count)
    if padded > count:
        flat = torch.nn.functional.pad(flat, (0, padded - count))
    part = _finish_slice(flat, tree, ranks, nodes, out_dtype)
    out = part.new_empty(padded)
    all_gather_single(out, part, group=ranks.group)
    return out[:count].view(shape)


def tree_reduce_scatter(values: Tensor, *, tree: ReductionTree, group=None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Sums like :func:`tree_all_reduce`, bit for bit; rank r gets rows [r M/p, (r+1) M/p) of the sum.

    Args and errors as there. values: [S, M, ...] with p dividing M. Returns [M/p, ...] in out_dtype.
    """
    ranks, nodes = _check(values, tree, group)
    shape = values.shape[1:]
    if not shape or shape[0] % ranks.size:
        raise ValueError(f"values of shape {tuple(values.shape)} cannot be scattered: {ranks.size} ranks must divide dimension 1")
    if ranks.size == 1:
        return reference.finish(values, tree, nodes[0], out_dtype)
    part = _finish_slice(values.reshape(values.shape[0], -1), tree, ranks, nodes, out_dtype)
    return part.view(shape[0] // ranks.size, *shape[1:])


def _check(values: Tensor, tree: ReductionTree, group):
    if torch.is_grad_enabled() and values.requires_grad:
        raise ValueError(
            f"values {tuple(values.shape)} require a gradient, which this collective does not have; use row_parallel_linear, "
            "or call it under torch.no_grad()"
        )
    ranks = resolve(group)
    nodes = [tree.subtrees(rank, ranks.size) for rank in range(ranks.size)]
    mine = nodes[ranks.rank]
    if values.dim() < 1 or values.shape[0] != len(mine):
        raise ValueError(
            f"values of shape {tuple(values.shape)} must hold one value for each of this rank's {len(mine)} subtrees "
            f"{[str(node) for node in mine]} in dimension 0 (rank {ranks.rank} of {ranks.size}, {tree.fingerprint})"
        )
    if values.dtype != reference.torch_node_dtype(tree):
        raise ValueError(f"values are {values.dtype} but the nodes of {tree.fingerprint} are {reference.torch_node_dtype(tree)}")
    return ranks, nodes


def _finish_slice(flat: Tensor, tree: ReductionTree, ranks, nodes, out_dtype) -> Tensor:
    """flat [S, n], p dividing n -> this rank's slice [n/p] of the finished sum."""
    length = flat.shape[1] // ranks.size
    send = flat.view(flat.shape[0], ranks.size, length).transpose(0, 1).contiguous()
    counts = [len(subtrees) for subtrees in nodes]
    received = flat.new_empty(sum(counts) * length)
    dist.all_to_all_single(
        received,
        send.view(-1),
        output_split_sizes=[count * length for count in counts],
        input_split_sizes=[flat.shape[0] * length] * ranks.size,
        group=ranks.group,
    )
    every = [node for subtrees in nodes for node in subtrees]
    return reference.finish(received.view(len(every), length), tree, every, out_dtype)

"""Products of linears: every leaf one chain over k, in fp32 from zero, in increasing k.

The chain here is ``acc = acc + a[:, k:k+STEP] @ b[k:k+STEP]``. What a BLAS does inside one step depends on the shape it is given, on
addresses, and for long k on the number of threads, so every step is given the same shape at every TP size and every batch: ROWS rows by
STEP k by a number of columns that is a whole dimension or one leaf of it, filled up with zeros to a multiple of COLUMNS, from fresh copies
(contract.py). Row i of a product then depends on row i alone; that this machine's BLAS keeps to it is probed at a shape's first use.

A sum over a dimension that no rank boundary cuts (column-parallel forward, row-parallel dgrad, wgrad) is one chain.
Legend: R x C output, k summed over, L leaves, p ranks; weights are [N, K].
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tpinv.contract import COLUMNS, ROWS, STEP
from tpinv.reference.numbers import node_add, torch_node_dtype
from tpinv.reference.sums import subtree_values
from tpinv.tree import ReductionTree


@functools.lru_cache(maxsize=4096)
def require_rows_alike(width: int, columns: int, threads: int) -> None:
    """ValueError unless this machine's BLAS gives a row the same bytes wherever in a step of ``width`` x ``columns`` it stands.

    Every row of the probe is the same one, so every row of its product must be.
    """
    generator = torch.Generator().manual_seed(0)
    tile, b = (torch.randn(shape, generator=generator) for shape in ((1, width), (width, columns)))
    with torch.autocast("cpu", enabled=False):
        product = tile.repeat(ROWS, 1) @ b
    if not torch.equal(product, product[:1].expand_as(product)):
        wrong = (product != product[:1]).any(1).nonzero()[0].item()
        raise ValueError(
            f"this machine's BLAS adds row {wrong} of a product of {ROWS} x {width} by {width} x {columns} ({threads} threads) in another order "
            "than row 0, so that a token's bytes would depend on its place in the batch; use another build of torch or another number of "
            "threads (torch.set_num_threads), or compute on a GPU"
        )


def chain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [R, k] @ b [k, C]`` in fp32: one chain over k of fixed-shape steps. Returns float32 [R, C].

    The bits of row i depend on ``a[i]``, ``b`` and nothing else, provided C is the same at every TP size. Autocast is off
    in here: it would turn these fp32 steps into bf16 ones, also inside an autograd.Function.
    """
    (rows, length), columns = a.shape, b.shape[1]
    on_cpu = a.device.type == "cpu"
    out = torch.zeros(rows, columns, dtype=torch.float32, device=a.device)
    padded = -(-columns // COLUMNS) * COLUMNS
    for k in range(0, length, STEP):
        width = min(STEP, length - k)
        if on_cpu:
            require_rows_alike(width, padded, torch.get_num_threads())
        b_step = torch.zeros(width, padded, dtype=torch.float32, device=a.device)
        b_step[:, :columns] = b[k : k + width]
        for r in range(0, rows, ROWS):
            height = min(ROWS, rows - r)
            tile = torch.zeros(ROWS, width, dtype=torch.float32, device=a.device)  # never a view: a BLAS may look at addresses
            tile[:height] = a[r : r + height, k : k + width]
            with torch.autocast(a.device.type, enabled=False):
                out[r : r + height] += (tile @ b_step)[:height, :columns]
    return out


def split_leaves(t: Tensor, dim: int, leaves: int, stride: int = 1) -> list[Tensor]:
    """Cuts ``dim`` into ``leaves`` equal leaves. With ``stride`` s the dimension is s blocks side by side (SwiGLU's fc1:
    gate, then up) and leaf j joins piece j of each block, so that a leaf holds the same features at every TP size."""
    blocks = t.chunk(stride, dim)
    pieces = zip(*(block.chunk(leaves, dim) for block in blocks), strict=True)
    return [torch.cat(piece, dim) if stride > 1 else piece[0] for piece in pieces]


def join_leaves(parts: Sequence[Tensor], dim: int, stride: int = 1) -> Tensor:
    """Inverse of :func:`split_leaves`."""
    if stride == 1:
        return torch.cat(list(parts), dim)
    return torch.cat([torch.cat(block, dim) for block in zip(*(p.chunk(stride, dim) for p in parts), strict=True)], dim)


def local_product(a: Tensor, b: Tensor, leaves: int, *, dim: int, stride: int = 1) -> Tensor:
    """``a [R, k] @ b [k, C]`` where k is whole on this rank and the output's dimension ``dim`` (0: R, 1: C) is the sharded
    one, of which this rank holds ``leaves`` leaves. Each leaf is a product of its own: its shape does not depend on p.

    Returns float32 [R, C]. Column-parallel forward (dim=1), row-parallel dgrad (dim=1), both wgrads.
    """
    if dim == 0:
        return join_leaves([chain_matmul(part, b) for part in split_leaves(a, 0, leaves, stride)], 0, stride)
    return join_leaves([chain_matmul(a, part) for part in split_leaves(b, 1, leaves, stride)], 1, stride)


def tree_product(a: Tensor, b: Tensor, tree: ReductionTree, rank: int, ranks: int, *, stride: int = 1) -> Tensor:
    """``a [R, k/p] @ b [k/p, C]`` where k is the sharded dimension: the values of this rank's maximal subtrees.

    Returns [S, R, C] in the node dtype. Row-parallel forward (k = K) and column-parallel dgrad (k = N).
    """
    count = len(tree.owned(rank, ranks))
    products = zip(split_leaves(a, 1, count, stride), split_leaves(b, 0, count, stride), strict=True)
    dtype = torch_node_dtype(tree)
    values = (chain_matmul(a_leaf, b_leaf).to(dtype) for a_leaf, b_leaf in products)
    return subtree_values(values, tree, rank, ranks, node_add(tree))

"""Column- and row-parallel linears. Weights [N, K]; M tokens; p ranks; only two of the six products cross a rank boundary:

              y = x W^T (over K)        dx = dy W (over N)         dW = dy^T x (over tokens)   db (over tokens)
    column    local: one chain          TREE over N, cut by p      one chain                   tree over tokens
    row       TREE over K, cut by p     local: one chain           one chain                   tree over tokens

Under sequence parallelism dimension 0 of the activations is sharded over the same ranks: a column-parallel linear gathers x
before its forward and scatters dx, a row-parallel one scatters y and gathers dy. Tokens are whole wherever they are summed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpinv import kernels, reference
from tpinv.collectives import Ranks, all_gather, resolve, tree_all_reduce, tree_reduce_scatter
from tpinv.ops import main_grad, products
from tpinv.ops.shapes import output, rows
from tpinv.tree import ReductionTree


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tree: ReductionTree,
    group=None,
    sequence_parallel: bool = False,
    stride: int = 1,
    gather_output: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """y = x W^T + b with W sharded over its out-features.

    Args:
        x: [..., K], the same on every rank; under ``sequence_parallel`` this rank's part of dimension 0.
        weight: [N/p, K], bias: [N/p] or None; float32, bfloat16 or float16, one dtype for all.
        tree: orders the sum over N in dx and over tokens in db; N (with stride s, N/s) must have ``tree.leaves`` equal leaves.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        stride: s blocks side by side in the weight; 2 for SwiGLU's fc1, whose rank holds [gate_r; up_r]. Leaf j of N then
            pairs piece j of each block.
        gather_output: return [..., N] instead of [..., N/p]. Not with stride > 1, whose blocks a gather would interleave.
        gradient_accumulation_fusion: add dW to ``weight.main_grad`` in backward and hand a meaningless tensor to autograd
            (ops/main_grad.py): the bytes of ``main_grad.add_(weight.grad)``.

    Gradients: dx sums over N, which is sharded: tree. dW sums over tokens, whole on every rank: one chain. db: tree over tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit, p not dividing the leaves, no equal leaves, no main_grad to add to.
    """
    ranks = resolve(group)
    check_column(x, weight, bias, tree, ranks, sequence_parallel, stride)
    if gather_output and stride > 1:
        raise ValueError(f"gather_output with stride={stride} would interleave the blocks; gather after the activation, or use stride=1")
    if gradient_accumulation_fusion:
        main_grad.check(weight)
    y = _ColumnParallelLinear.apply(x, weight, bias, gradient_accumulation_fusion, tree, ranks, sequence_parallel, stride)
    return gather_last_dim(y, ranks) if gather_output else y


def row_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tree: ReductionTree,
    group=None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """y = x W^T + b with W sharded over its in-features.

    Args:
        x: [..., K/p], this rank's features of every token.
        weight: [N, K/p], bias: [N] or None, whole on every rank; float32, bfloat16 or float16, one dtype for all.
        tree: orders the sum over K in y and over tokens in db; K must have ``tree.leaves`` equal leaves.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        sequence_parallel: return this rank's part of dimension 0 of y instead of all of it. p must divide that dimension.
        gradient_accumulation_fusion: as in :func:`column_parallel_linear`.

    y sums over K, which is sharded: tree; the root is rounded to x's dtype, then the bias is added and rounded.
    Gradients: dx sums over N, whole: one chain. dW and db sum over tokens, whole on every rank (gathered under
    ``sequence_parallel``): one chain, and the tree over tokens. The gradient of the bias is the full one on every rank.

    Raises:
        ValueError: shapes or dtypes that do not fit, p not dividing the leaves, no equal leaves, no main_grad to add to.
    """
    ranks = resolve(group)
    check_row(x, weight, bias, tree, ranks, sequence_parallel)
    if gradient_accumulation_fusion:
        main_grad.check(weight)
    return _RowParallelLinear.apply(x, weight, bias, gradient_accumulation_fusion, tree, ranks, sequence_parallel)


def gather_last_dim(x: Tensor, group=None) -> Tensor:
    """Gathers the last dimension, [..., n/p] -> [..., n]. The gradient is this rank's slice of dy, which is the same on every rank."""
    return _GatherLastDim.apply(x, resolve(group))


def check_column(x: Tensor, weight: Tensor, bias: Tensor | None, tree: ReductionTree, ranks: Ranks, sequence_parallel: bool, stride: int):
    """The errors of :func:`column_parallel_linear`."""
    _check(x, weight, bias, ranks, tree)
    count = len(tree.owned(ranks.rank, ranks.size))
    if stride < 1 or weight.shape[0] % (stride * count):
        tree.leaf_length(weight.shape[0] * ranks.size // max(stride, 1), f"out_features / stride {stride}")
        raise ValueError(f"stride={stride} must be at least 1 and cut {weight.shape[0]} local out-features into {count} leaves each")
    if sequence_parallel and x.dim() < 2:
        raise ValueError(
            f"sequence_parallel gathers dimension 0 of x {tuple(x.shape)}, which must be tokens: pass [tokens, ..., in-features]"
        )


def check_row(x: Tensor, weight: Tensor, bias: Tensor | None, tree: ReductionTree, ranks: Ranks, sequence_parallel: bool):
    """The errors of :func:`row_parallel_linear`."""
    _check(x, weight, bias, ranks, tree)
    tree.leaf_length(weight.shape[1] * ranks.size, "in_features")
    if sequence_parallel and (x.dim() < 2 or x.shape[0] % ranks.size):
        raise ValueError(
            f"sequence_parallel scatters dimension 0 of {tuple(x.shape)}, which {ranks.size} ranks must divide; pad the sequence"
        )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, ranks: Ranks, tree: ReductionTree) -> None:
    tree.owned(ranks.rank, ranks.size)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: both must end in this rank's in-features (rank {ranks.rank} of {ranks.size})"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{weight.shape[0]}], the out-features of weight {tuple(weight.shape)}")
    reference.check_dtypes(x=x, weight=weight, bias=bias)


def _tree_product(
    a: Tensor, b: Tensor, lead: torch.Size, tree: ReductionTree, ranks: Ranks, scatter: bool, dtype: torch.dtype, stride: int = 1
) -> Tensor:
    """``a [M, k/p] @ b [k/p, C]`` summed over all ranks as [*lead, C] in ``dtype``, or this rank's part of its dimension 0."""
    if ranks.size == 1 and products.on_gpu(a):  # the root comes rounded out of the kernel
        return output(kernels.tree_matmul(a, b, tree, stride=stride, out_dtype=dtype), (*lead, b.shape[1]))
    values = products.tree_product(a, b, tree, ranks, stride=stride)
    values = values.view(values.shape[0], *lead, values.shape[-1])
    collective = tree_reduce_scatter if scatter else tree_all_reduce
    result = collective(values, tree=tree, group=ranks, out_dtype=dtype)
    return output(result, result.shape)


# -- the arithmetic, which autograd functions (below) and torch operators (operators.py) share ---------------------------------------


def column_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tree: ReductionTree, ranks: Ranks, sequence_parallel: bool, stride: int
) -> Tensor:
    whole = all_gather(x, ranks) if sequence_parallel else x
    y = products.local_product(rows(whole), weight.t(), tree, ranks, dim=1, dtype=x.dtype, stride=stride, bias=bias)
    return output(y, (*whole.shape[:-1], weight.shape[0]))


def column_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], tree: ReductionTree, ranks: Ranks, sequence_parallel: bool, stride: int,
    add_to: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dweight and dbias, those that ``needs`` names. dweight is added to the main_grad of the parameter ``add_to``."""
    lead, dy = dy.shape[:-1], rows(dy)
    dx = dw = db = None
    if needs[0]:
        dx = _tree_product(dy, weight, lead, tree, ranks, sequence_parallel, x.dtype, stride)
    if needs[1]:
        whole = all_gather(x, ranks) if sequence_parallel else x
        dw = _weight_grad(add_to, dy, rows(whole), tree, ranks, dim=0, stride=stride)
    if needs[2]:
        db = products.bias_grad(dy, tree)
    return dx, dw, db


def row_forward(x: Tensor, weight: Tensor, bias: Tensor | None, tree: ReductionTree, ranks: Ranks, sequence_parallel: bool) -> Tensor:
    y = _tree_product(rows(x), weight.t(), x.shape[:-1], tree, ranks, sequence_parallel, x.dtype)
    return y if bias is None else y + bias


def row_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], tree: ReductionTree, ranks: Ranks, sequence_parallel: bool,
    add_to: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As :func:`column_backward`."""
    dy = rows(all_gather(dy, ranks) if sequence_parallel else dy)
    dx = dw = db = None
    if needs[0]:
        dx = products.local_product(dy, weight, tree, ranks, dim=1, dtype=x.dtype).view(x.shape)
    if needs[1]:
        dw = _weight_grad(add_to, dy, rows(x), tree, ranks, dim=1)
    if needs[2]:
        db = products.bias_grad(dy, tree)
    return dx, dw, db


def _weight_grad(add_to: Tensor | None, dy: Tensor, x: Tensor, tree: ReductionTree, ranks: Ranks, *, dim: int, stride: int = 1) -> Tensor:
    if add_to is not None:
        return main_grad.add(add_to, dy, x, tree, ranks, dim=dim, stride=stride)
    return products.local_product(dy.t(), x, tree, ranks, dim=dim, dtype=x.dtype, stride=stride)


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, fuse, *settings):
        _keep(ctx, x, weight, bias, fuse, settings)
        return column_forward(x, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gradients = column_backward(dy, *ctx.saved_tensors, _needs(ctx), *ctx.settings, add_to=_add_to(ctx))
        return *gradients, None, *([None] * len(ctx.settings))


class _RowParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, fuse, *settings):
        _keep(ctx, x, weight, bias, fuse, settings)
        return row_forward(x, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gradients = row_backward(dy, *ctx.saved_tensors, _needs(ctx), *ctx.settings, add_to=_add_to(ctx))
        return *gradients, None, *([None] * len(ctx.settings))


def _keep(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, fuse: bool, settings: tuple) -> None:
    ctx.save_for_backward(x, weight)
    ctx.settings, ctx.has_bias = settings, bias is not None
    ctx.fused = weight if fuse else None  # the parameter itself: a saved tensor may come back as another one


def _needs(ctx) -> tuple[bool, bool, bool]:
    return *ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]


def _add_to(ctx) -> Tensor | None:
    return ctx.fused if ctx.fused is not None and main_grad.accumulates(ctx.next_functions[1][0]) else None


class _GatherLastDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        # A fresh tensor, not a view of x: callers such as stock cross-entropy modify logits in place.
        return all_gather(x, ranks, dim=-1).contiguous() if ranks.size > 1 else x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy.chunk(ctx.ranks.size, -1)[ctx.ranks.rank].contiguous(), None

"""Cross-entropy over a sharded vocabulary.

With top the maximum over the global vocabulary and total = sum(exp(x - top)):

    log p(t) = (x_t - top) - log(total)          loss = -(1 - s) log p(t) - s mean_v(log p(v))
    dx_v     = (exp(x_v - top) / total - (1 - s) [v = t] - s / V) dloss

total (and, with label smoothing, sum(x)) is a tree over the vocabulary with float32 nodes. top and x_t are exact: a maximum
and a selection. s follows Megatron-Core: label_smoothing V / (V - 1), with V the global vocabulary at every TP size.
"""

import torch
from torch import Tensor

from tpinv import contract, reference
from tpinv.collectives import Ranks, all_max, ranks_for, select_all_reduce, sum_over_ranks
from tpinv.ops import products
from tpinv.ops.arguments import check_ids, check_integers, problem_of_tree, require, tree_of
from tpinv.ops.registry import group_name, ranks_of, register
from tpinv.ops.shapes import output, rows, unit_stride
from tpinv.tree import ReductionTree

NAME = "vocab_parallel_cross_entropy"


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, *, tree: ReductionTree, group=None, label_smoothing: float = 0.0, ignore_index: int = -100
) -> Tensor:
    """Per-token cross-entropy, not reduced.

    Args:
        logits: [..., V/p], rank r holding vocabulary [r V/p, (r+1) V/p). float32, bfloat16 or float16. Not modified.
        target: integer [...] in [0, V), the same on every rank, or ``ignore_index``: loss and gradient are 0 there.
        tree: orders the sums over the vocabulary; p must divide its leaves.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        label_smoothing: in [0, 1), Megatron-Core's definition: the probability that goes to the other V - 1 classes.

    Returns:
        float32 [...], autocast or not. The gradient of logits is elementwise, in logits' dtype.

    Raises:
        ValueError, on every rank: shapes that do not fit or differ between ranks, a target out of range (on a GPU: an assertion there),
            label_smoothing outside [0, 1).
        RuntimeError: in a backward pass with create_graph=True.
    """
    ranks = ranks_for(NAME, group)
    require(ranks, NAME, problem_of_tree(tree))
    return OPERATOR(logits, target, tree.leaves, group_name(ranks), label_smoothing, ignore_index, ranks=ranks)[0]


def _check(logits, target, leaves, group, label_smoothing, ignore_index) -> None:
    ranks = ranks_of(group)
    tree_of(leaves).owned(ranks.rank, ranks.size)
    reference.check_dtypes(logits=logits)
    check_integers(target, "target")
    if logits.dim() < 1 or logits.shape[:-1] != target.shape or not logits.shape[-1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be the shape of target {tuple(target.shape)} and the local vocabulary")
    vocab = logits.shape[-1] * ranks.size
    if not 0.0 <= label_smoothing < 1.0 or (label_smoothing and vocab < 2):
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1), over a vocabulary of at least 2 (here {vocab})")


def _check_values(logits, target, leaves, group, label_smoothing, ignore_index) -> None:
    check_ids(target, logits.shape[-1] * ranks_of(group).size, "target", ignore_index)


def _forward(logits, target, leaves, group, label_smoothing, ignore_index) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for the backward the maximum and the sum of exponentials of every row, [M]."""
    tree, ranks = contract.VOCABULARY.tree(tree_of(leaves)), ranks_of(group)
    x, smoothing, vocab = rows(logits), *_smoothing(logits, label_smoothing, ranks)
    local, owned, ignored = _local(target, x.shape[-1], ranks, ignore_index)
    backend, x = products.rows_backend("cross_entropy", x), unit_stride(x)
    top = all_max(backend.row_max(x), ranks, agreed=True)
    picked = x.gather(-1, local.masked_fill(~owned, 0).unsqueeze(-1)).squeeze(-1).float() - top
    sums = backend.vocab_sums(x, top, tree, ranks.rank, ranks.size, bool(smoothing))
    *shifted_sum, total = sum_over_ranks(torch.stack(sums, dim=1), tree, ranks).unbind(0)
    log_total = total.log()
    loss = log_total - select_all_reduce(picked, owned, ranks, agreed=True)
    if smoothing:
        loss = (1.0 - smoothing) * loss + smoothing * (log_total - shifted_sum[0] / vocab)
    return output(loss.masked_fill(ignored, 0.0), target.shape), top, total.clone()


def _backward(dloss, logits, target, top, total, needs, leaves, group, label_smoothing, ignore_index) -> tuple:
    ranks = ranks_of(group)
    x, smoothing, vocab = rows(logits), *_smoothing(logits, label_smoothing, ranks)
    local, owned, ignored = _local(target, x.shape[-1], ranks, ignore_index)
    index = local.masked_fill(~owned, -1).masked_fill(ignored, -2)
    dloss = dloss.float().flatten().contiguous()  # the gradient of a sum is one number, expanded: a kernel would read past it
    backend = products.rows_backend("cross_entropy", x)
    dx = backend.vocab_grad(unit_stride(x), top, total, index, dloss, 1.0 - smoothing, smoothing / vocab)
    return (dx.view(logits.shape),)


def _local(target: Tensor, columns: int, ranks: Ranks, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """[M]: targets counted from this rank's first column; which of them it owns; which are to be ignored."""
    target = target.long().flatten()
    local = target - ranks.rank * columns
    return local, (local >= 0) & (local < columns), target == ignore_index


def _smoothing(logits: Tensor, label_smoothing: float, ranks: Ranks) -> tuple[float, int]:
    """s of the module's docstring, and V."""
    vocab = logits.shape[-1] * ranks.size
    return (label_smoothing * vocab / (vocab - 1) if label_smoothing else 0.0), vocab


def _fake(logits, target, *_) -> tuple[Tensor, ...]:
    count = target.numel()
    return logits.new_empty(target.shape, dtype=torch.float32), *(logits.new_empty(count, dtype=torch.float32) for _ in range(2))


OPERATOR = register(
    f"{NAME}(Tensor logits, Tensor target, int leaves, str group, float label_smoothing, int ignore_index) "
    "-> (Tensor loss, Tensor top, Tensor total)",
    check=_check,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    kept="logits target top total",
    gradients="logits",
    check_values=_check_values,
)

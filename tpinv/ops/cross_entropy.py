"""Cross-entropy and log-probabilities over a sharded vocabulary.

With top the maximum over the global vocabulary and total = sum(exp(x - top)):

    log p(t) = (x_t - top) - log(total)          loss = -(1 - s) log p(t) - s mean_v(log p(v))
    dx_v     = (exp(x_v - top) / total - (1 - s) [v = t] - s / V) dloss

total (and, with label smoothing, sum(x)) is a tree over the vocabulary with float32 nodes. top and x_t are exact: a maximum
and a selection. s follows Megatron-Core: label_smoothing V / (V - 1), with V the global vocabulary at every TP size.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpinv import reference
from tpinv.collectives import Ranks, all_max, resolve, select_all_reduce, tree_all_reduce
from tpinv.ops import products
from tpinv.ops.embedding import check_ids
from tpinv.ops.shapes import output, rows, unit_stride
from tpinv.tree import ReductionTree


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
        float32 [...]. The gradient of logits is elementwise, in logits' dtype.

    Raises:
        ValueError: shapes that do not fit, a target out of range, label_smoothing outside [0, 1).
    """
    ranks = resolve(group)
    tree.owned(ranks.rank, ranks.size)
    reference.check_dtypes(logits=logits)
    if logits.dim() < 1 or logits.shape[:-1] != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be the shape of target {tuple(target.shape)} and the local vocabulary")
    vocab = logits.shape[-1] * ranks.size
    if not 0.0 <= label_smoothing < 1.0 or (label_smoothing and vocab < 2):
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1), over a vocabulary of at least 2 (here {vocab})")
    target = check_ids(target, vocab, "target", ignore_index)
    smoothing = label_smoothing * vocab / (vocab - 1) if label_smoothing else 0.0
    return _CrossEntropy.apply(logits, target, tree.with_float32_nodes(), ranks, smoothing, ignore_index)


def vocab_parallel_log_probs(logits: Tensor, target: Tensor, *, tree: ReductionTree, group=None, ignore_index: int = -100) -> Tensor:
    """log softmax(logits)[target] over the global vocabulary: what RL compares between trainer and rollout.

    Shapes and errors as in :func:`vocab_parallel_cross_entropy`, of which it is the negative. 0 where target is ``ignore_index``.
    """
    return -vocab_parallel_cross_entropy(logits, target, tree=tree, group=group, ignore_index=ignore_index)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, tree, ranks, smoothing, ignore_index):
        x, target_shape, target = rows(logits), target.shape, target.flatten()
        vocab = x.shape[-1] * ranks.size
        local = target - ranks.rank * x.shape[-1]
        owned = (local >= 0) & (local < x.shape[-1])
        index = local.masked_fill(~owned, 0).unsqueeze(-1)
        top, picked, *sums = _statistics(x, index, tree, ranks, bool(smoothing))
        *shifted_sum, total = tree_all_reduce(torch.stack(sums, dim=1), tree=tree, group=ranks).unbind(0)
        log_total = total.log()
        loss = log_total - select_all_reduce(picked, owned, ranks)
        if smoothing:
            loss = (1.0 - smoothing) * loss + smoothing * (log_total - shifted_sum[0] / vocab)
        ignored = target == ignore_index
        ctx.save_for_backward(logits, index, owned, top, total, ignored)
        ctx.args = (smoothing, vocab)
        return output(loss.masked_fill(ignored, 0.0), target_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, index, owned, top, total, ignored = ctx.saved_tensors
        smoothing, vocab = ctx.args
        x, dloss = rows(logits), dloss.float().flatten()
        if products.on_gpu(x):
            from tpinv.kernels.rows import cross_entropy

            index = index.squeeze(-1).masked_fill(~owned, -1).masked_fill(ignored, -2)
            dloss = dloss.contiguous()  # the gradient of a sum is one number, expanded: the kernel would read past it
            dx = cross_entropy.vocab_grad(unit_stride(x), top, total, index, dloss, 1.0 - smoothing, smoothing / vocab)
        else:
            dx = (x.float() - top.unsqueeze(-1)).exp_().div_(total.unsqueeze(-1))
            hit = (1.0 - smoothing) * owned.float().unsqueeze(-1)
            dx.scatter_(-1, index, dx.gather(-1, index) - hit)
            if smoothing:
                dx -= smoothing / vocab
            dx = dx.mul_(dloss.unsqueeze(-1)).masked_fill_(ignored.unsqueeze(-1), 0.0).to(logits.dtype)
        return dx.view(logits.shape), None, None, None, None, None


def _statistics(x: Tensor, index: Tensor, tree: ReductionTree, ranks: Ranks, smoothing: bool) -> tuple[Tensor, ...]:
    """x [M, V/p] -> the maximum over all ranks [M]; x - it at ``index`` [M]; the values [S, M] of this rank's subtrees of, with
    smoothing, the sum of x - maximum, and of the sum of its exponential."""
    if products.on_gpu(x):
        from tpinv.kernels.rows import cross_entropy

        x = unit_stride(x)
        top = all_max(cross_entropy.row_max(x), ranks)
        picked = x.gather(-1, index).squeeze(-1).float() - top
        return top, picked, *cross_entropy.vocab_sums(x, top, tree, ranks.rank, ranks.size, smoothing)
    wide = x.float()
    top = all_max(wide.amax(-1), ranks)
    shifted = wide - top.unsqueeze(-1)
    picked = shifted.gather(-1, index).squeeze(-1)
    sums = [reference.tree_sum(shifted, tree, ranks.rank, ranks.size, dim=-1)] if smoothing else []
    sums.append(reference.tree_sum(shifted.exp_(), tree, ranks.rank, ranks.size, dim=-1))  # in place: logits are large
    return top, picked, *sums

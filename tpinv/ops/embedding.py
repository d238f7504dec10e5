"""Vocabulary-parallel embedding: the forward selects rows, the backward sums them in token order.

The forward adds nothing: stock layers add p-1 zeros to each row, which turns -0.0 into +0.0 at every TP size above one.
The backward of vocabulary row v is one chain over the tokens whose id is v, in token order, in fp32, rounded once.
Ids that a rank does not own are skipped, not aliased to row 0, so that no rank's segment boundaries reach another row.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpinv import reference
from tpinv.collectives import all_gather, resolve, select_all_reduce, select_reduce_scatter
from tpinv.ops import products
from tpinv.ops.shapes import output, rows


def vocab_parallel_embedding(ids: Tensor, weight: Tensor, *, group=None, sequence_parallel: bool = False) -> Tensor:
    """Rows of a table whose vocabulary is sharded.

    Args:
        ids: integer [...], the same on every rank, in [0, V).
        weight: [V/p, H]; rank r holds rows [r V/p, (r+1) V/p). float32, bfloat16 or float16.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        sequence_parallel: return this rank's part of dimension 0, which p must divide.

    Returns:
        [..., H] in weight's dtype. The gradient of weight sums over tokens, whole on every rank (gathered under
        ``sequence_parallel``): a chain in token order, the order of ``ids.flatten()``.

    Raises:
        ValueError: non-integer ids, an id outside [0, V), a dimension 0 that p does not divide.
    """
    ranks = resolve(group)
    reference.check_dtypes(weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"weight {tuple(weight.shape)} must be [V/p, H]")
    ids = check_ids(ids, weight.shape[0] * ranks.size, "ids")
    if sequence_parallel and (ids.dim() < 1 or ids.shape[0] % ranks.size):
        raise ValueError(f"sequence_parallel scatters dimension 0 of ids {tuple(ids.shape)}, which {ranks.size} ranks must divide")
    return _VocabParallelEmbedding.apply(ids, weight, ranks, sequence_parallel)


def check_ids(ids: Tensor, bound: int, name: str, ignore_index: int | None = None) -> Tensor:
    """``ids`` as int64; ValueError unless they are integers in [0, bound) (or ignore_index). On CUDA the range check is asynchronous."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}")
    ids = ids.long()  # a rank subtracts its first id, which would wrap around in uint8
    fine = (ids >= 0) & (ids < bound)
    if ignore_index is not None:
        fine |= ids == ignore_index
    if ids.is_cuda:
        torch._assert_async(fine.all())
    elif not fine.all():
        wrong = ids[~fine]
        raise ValueError(f"{name} must be in [0, {bound}), the global vocabulary; got {wrong[0].item()} and {wrong.numel() - 1} others")
    return ids


def sum_by_id(ids: Tensor, dy: Tensor, rows_here: int) -> Tensor:
    """[rows_here, H] fp32: row v is the chain over the tokens with id v, in token order. ids [M] may be out of range: skipped.

    Pass c adds every id's c-th occurrence: ids are unique within a pass, so that no two additions race on any device.
    """
    here = ((ids >= 0) & (ids < rows_here)).nonzero().squeeze(1)
    ids = ids[here]
    out = torch.zeros(rows_here, dy.shape[1], dtype=torch.float32, device=dy.device)
    by_id, order = torch.sort(ids, stable=True)
    occurrence = torch.arange(len(ids), device=ids.device) - torch.searchsorted(by_id, by_id)
    by_pass, pass_order = torch.sort(occurrence, stable=True)
    token = order[pass_order]
    for tokens in token.split(torch.bincount(by_pass).tolist()):
        out[ids[tokens]] += dy[here[tokens]].float()
    return out


class _VocabParallelEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, ranks, sequence_parallel):
        local = ids - ranks.rank * weight.shape[0]
        owned = (local >= 0) & (local < weight.shape[0])
        ctx.save_for_backward(local)
        ctx.args = (weight.shape[0], weight.dtype, ranks, sequence_parallel)
        picked = weight[local.masked_fill(~owned, 0)]
        select = select_reduce_scatter if sequence_parallel else select_all_reduce
        y = select(picked, owned.unsqueeze(-1), ranks)
        return output(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (local,) = ctx.saved_tensors
        rows_here, dtype, ranks, sequence_parallel = ctx.args
        dy = all_gather(dy, ranks) if sequence_parallel else dy
        if products.on_gpu(dy):
            from tpinv.kernels.rows import embedding

            return None, embedding.sum_by_id(local.flatten(), rows(dy), rows_here, dtype), None, None
        return None, sum_by_id(local.flatten(), rows(dy), rows_here).to(dtype), None, None

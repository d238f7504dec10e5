"""The gradient of an embedding table: row v is one chain over the tokens with id v, in token order. As kernels/rows/embedding.py."""

import torch
from torch import Tensor


def sum_by_id(ids: Tensor, dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, H] in ``dtype``, rounded once from fp32. ids int64 [M]; those outside [0, rows) are skipped. dy [M, H].

    Pass c adds every id's c-th occurrence: ids are unique within a pass, so that no two additions race on any device.
    """
    here = ((ids >= 0) & (ids < rows)).nonzero().squeeze(1)
    ids = ids[here]
    out = torch.zeros(rows, dy.shape[1], dtype=torch.float32, device=dy.device)
    by_id, order = torch.sort(ids, stable=True)
    occurrence = torch.arange(len(ids), device=ids.device) - torch.searchsorted(by_id, by_id)
    by_pass, pass_order = torch.sort(occurrence, stable=True)
    token = order[pass_order]
    for tokens in token.split(torch.bincount(by_pass).tolist()):
        out[ids[tokens]] += dy[here[tokens]].float()
    return out.to(dtype)

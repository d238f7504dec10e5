"""The stock twin of a model that is built from tpinv's layers: the same modules, parameters and calls, with the arithmetic that
Megatron-style layers have everywhere: local products of any order, all-reduce, all-gather and reduce-scatter of torch.distributed.

    with stock_layers():
        loss(model(batch)).backward()      # ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, RMSNorm, LayerNorm: torch's

Functions of tpinv that the model calls by itself (swiglu, vocab_parallel_cross_entropy) stay as they are.
"""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tpinv import layers


class _Copy(torch.autograd.Function):
    """What every rank has: the gradients are added up."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        dy = dy.contiguous().clone()
        dist.all_reduce(dy, group=ctx.ranks.group)
        return dy, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=ranks.group)
        return x

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, None


class _Gather(torch.autograd.Function):
    """Over dimension 0; ``add``: whether the gradient is summed over ranks (each used all of it in its own way) or only cut."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks, add: bool) -> Tensor:
        ctx.ranks, ctx.add = ranks, add
        return _gathered(x, ranks)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return (_scattered(dy, ctx.ranks) if ctx.add else dy.chunk(ctx.ranks.size)[ctx.ranks.rank]), None, None


class _Scatter(torch.autograd.Function):
    """Sums over ranks; each keeps its part of dimension 0."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks) -> Tensor:
        ctx.ranks = ranks
        return _scattered(x, ranks)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _gathered(dy, ctx.ranks), None


def _gathered(x: Tensor, ranks) -> Tensor:
    out = x.new_empty(ranks.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=ranks.group)
    return out


def _scattered(x: Tensor, ranks) -> Tensor:
    out = x.new_empty(x.shape[0] // ranks.size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=ranks.group)
    return out


def _column(self, x: Tensor) -> Tensor:
    if self.ranks.size > 1:
        x = _Gather.apply(x, self.ranks, True) if self.sequence_parallel else _Copy.apply(x, self.ranks)
    y = F.linear(x, self.weight, self.bias)
    if self.gather_output and self.ranks.size > 1:
        y = _Gather.apply(y.movedim(-1, 0), self.ranks, False).movedim(0, -1)
    return y


def _row(self, x: Tensor) -> Tensor:
    y, bias = F.linear(x, self.weight), self.bias
    if self.ranks.size > 1:
        y = (_Scatter if self.sequence_parallel else _Reduce).apply(y, self.ranks)
        if bias is not None and self.sequence_parallel:
            bias = _Copy.apply(bias, self.ranks)
    return y if bias is None else y + bias


def _embedding(self, ids: Tensor) -> Tensor:
    here = self.weight.shape[0]
    local = ids - self.ranks.rank * here
    mine = (local >= 0) & (local < here)
    y = F.embedding(local.masked_fill(~mine, 0), self.weight) * mine.unsqueeze(-1)
    if self.ranks.size > 1:
        y = (_Scatter if self.sequence_parallel else _Reduce).apply(y, self.ranks)
    return y


def _norm_weights(self) -> list[Tensor | None]:
    weights = [self.weight, getattr(self, "bias", None)]
    if self.ranks.size > 1 and (self.sequence_parallel or self.heads_parallel):
        weights = [None if w is None else _Copy.apply(w, self.ranks) for w in weights]
    return weights


def _rms_norm(self, x: Tensor) -> Tensor:
    return F.rms_norm(x, (self.hidden_size,), _norm_weights(self)[0], self.eps)


def _layer_norm(self, x: Tensor) -> Tensor:
    return F.layer_norm(x, (self.hidden_size,), *_norm_weights(self), self.eps)


FORWARD = {
    layers.ColumnParallelLinear: _column,
    layers.RowParallelLinear: _row,
    layers.VocabParallelEmbedding: _embedding,
    layers.RMSNorm: _rms_norm,
    layers.LayerNorm: _layer_norm,
}


def has_layers(model: nn.Module) -> bool:
    """Whether there is anything in the model that has a stock twin."""
    return any(isinstance(module, tuple(FORWARD)) for module in model.modules())


@contextlib.contextmanager
def stock_layers():
    """Within, tpinv's layers compute as stock ones do."""
    own = {kind: kind.forward for kind in FORWARD}
    for kind, forward in FORWARD.items():
        kind.forward = forward
    try:
        yield
    finally:
        for kind, forward in own.items():
            kind.forward = forward


def norm_and_clip(gradients: list[tuple[Tensor, bool]], max_norm: float | None, group=None) -> Tensor:
    """What stock training loops do: squares summed tensor by tensor, those of sharded gradients (True) over ranks; then one factor."""
    device = gradients[0][0].device
    totals = torch.zeros(2, dtype=torch.float32, device=device)
    for gradient, sharded in gradients:
        totals[int(sharded)] += torch.linalg.vector_norm(gradient, dtype=torch.float32) ** 2
    shared, summed = totals[0], totals[1:].clone()
    dist.all_reduce(summed, group=group)
    norm = (shared + summed[0]).sqrt()
    if max_norm is not None:
        torch._foreach_mul_([gradient for gradient, _ in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0).item())
    return norm

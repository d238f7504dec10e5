"""The same weights with other arithmetic: a switch on tpinv's layers, for passes whose bits no answer depends on (self_draft.py).

    linears          a BLAS (cuBLAS), or fp8: weights rounded per out-feature, activations per token, one product in fp8 (on a CPU the
                     rounded weights, in the model's dtype: the same drafts within rounding, no faster)
    sums over ranks  vLLM's all-reduce and gather
    norms, SwiGLU    vLLM's fused kernels on a GPU, torch's on a CPU
    rope, attention  ours: one launch each, over the cache that the target writes too

Inside :func:`fast` all of these are on, in this thread alone. Outside, a layer computes what it always does.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

from tpinv.integrations.vllm import layers, speculation

LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ROWS = 4096  # of a weight that are rounded at a time, so that no float32 copy of a whole vocabulary is made

_on = contextvars.ContextVar("tpinv_fast", default=False)


@contextlib.contextmanager
def fast() -> Iterator[None]:
    """vLLM's sums over ranks, which are refused to the target, are allowed in here."""
    token = _on.set(True)
    try:
        with speculation.drafting():
            yield
    finally:
        _on.reset(token)


def install() -> None:
    """Once a process, after layers.register: gives the layers their second arithmetic."""
    for kind, name, method in (
        (layers.RowParallelLinear, "forward", _row_forward),
        (layers._Columns, "forward", _column_forward),
        (layers.VocabParallelEmbedding, "forward", _embedding_forward),
        (layers.LogitsProcessor, "_apply_head", _apply_head),
        (layers.LogitsProcessor, "_gather_logits", _gather_logits),
        (layers.RMSNorm, "forward", _norm_forward),
        (layers.SiluAndMul, "forward", _swiglu_forward),
    ):
        setattr(kind, name, _either(vars(kind)[name], method))


def _either(usual: Callable, quick: Callable) -> Callable:
    def call(self, *arguments, **keywords):
        return (quick if _on.get() else usual)(self, *arguments, **keywords)

    return call


def round_weights(model: torch.nn.Module) -> None:
    """Gives every linear of ours, and the vocabulary's head, an fp8 copy of its weight for fast passes; into the old copy where there is
    one, so that a CUDA graph that reads it stays right."""
    for module in model.modules():
        if isinstance(module, (layers._Linear, layers.ParallelLMHead)) or module is getattr(model, "lm_head", None):
            rounded, scale = _rounded(module.weight.data)
            held = getattr(module, "fast_weight", None)
            if held is None:
                module.fast_weight = (rounded, scale)
            else:
                for old, new in zip(held, (rounded, scale), strict=True):
                    old.copy_(new)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> float8_e4m3fn [N, K] and float32 [N, 1], whose product it is."""
    rounded = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    for first in range(0, len(weight), _ROWS):
        part = weight[first : first + _ROWS].float()
        scale[first : first + _ROWS] = part.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
        rounded[first : first + _ROWS] = (part / scale[first : first + _ROWS]).to(torch.float8_e4m3fn)
    return rounded, scale


def _product(layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N/p] in x's dtype."""
    held = getattr(layer, "fast_weight", None)
    if held is None:
        return F.linear(x, layer.weight, bias)
    rounded, scale = held
    if not x.is_cuda:
        return F.linear(x, (rounded.float() * scale).to(x.dtype), bias)
    from vllm import _custom_ops

    flat, scale_of_rows = _custom_ops.scaled_fp8_quant(x.reshape(-1, x.shape[-1]), use_per_token_if_dynamic=True)
    y = _custom_ops.cutlass_scaled_mm(flat, rounded.t(), scale_of_rows, scale, x.dtype, bias)
    return y.view(*x.shape[:-1], len(rounded))


def _row_forward(self, x: Tensor):
    if not self.input_is_parallel:
        x = x.chunk(self.tp_size, -1)[self.tp_rank].contiguous()
    y = _product(self, x, self._bias() if self.tp_rank == 0 else None)
    return self._returned(tensor_model_parallel_all_reduce(y) if self.tp_size > 1 else y)


def _column_forward(self, x: Tensor):
    y = _product(self, x, self._bias())
    return self._returned(tensor_model_parallel_all_gather(y) if getattr(self, "gather_output", False) and self.tp_size > 1 else y)


def _embedding_forward(self, ids: Tensor) -> Tensor:
    first = self.ranks.rank * self.weight.shape[0]
    owned = (ids >= first) & (ids < first + self.weight.shape[0])
    picked = self.weight[(ids - first).masked_fill(~owned, 0).long()]
    return picked if self.ranks.size == 1 else tensor_model_parallel_all_reduce(picked.masked_fill(~owned.unsqueeze(-1), 0))


def _apply_head(self, lm_head, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
    """In the model's dtype, whatever the target's head computes in: only the order of logits matters to a draft."""
    return _product(lm_head, hidden_states, None if embedding_bias is None else embedding_bias.to(hidden_states.dtype))


def _gather_logits(self, logits: Tensor) -> Tensor:
    return tensor_model_parallel_all_gather(logits) if self.ranks.size > 1 else logits


def _norm_forward(self, x: Tensor, residual: Tensor | None = None):
    """On a GPU ``x`` and ``residual`` are written over, as by vLLM's own layer."""
    if not x.is_cuda:
        hidden = x if residual is None else x + residual
        y = F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.variance_epsilon)
        return y if residual is None else (y, hidden)
    from vllm import _custom_ops

    if residual is None:
        x = x.contiguous()
        y = torch.empty_like(x)
        _custom_ops.rms_norm(y.view(-1, x.shape[-1]), x.view(-1, x.shape[-1]), self.weight, self.variance_epsilon)
        return y
    _custom_ops.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
    return x, residual


def _swiglu_forward(self, x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    if not x.is_cuda:
        return F.silu(x[..., :width]) * x[..., width:]
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    torch.ops._C.silu_and_mul(y, x)
    return y

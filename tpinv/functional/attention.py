"""Core attention on the GPU, invariant to heads per rank, batch and reruns, forward and backward.

Heads are what tensor parallelism shards here; nothing is summed over them but dk and dv of a group of query heads, which lies on one
rank. So what must hold is that a head's bits do not depend on how many others are computed with it, which kernels/attention.py is
written for and a probe checks on this very chip before the first use.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpinv import reference
from tpinv.functional import products
from tpinv.functional.shapes import unit_stride


def core_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """softmax(query key^T scale) value, by head.

    Args:
        query: [sq, b, h, d] on a GPU; key, value: [sk, b, g, d] with g dividing h: query heads j h/g ... share key head j. Any strides,
            float32, bfloat16 or float16.
        causal: query i sees keys up to i + sk - sq, which must not be negative.
        scale: default 1 / sqrt(d); above 0.

    Returns:
        [sq, b, h, d]. Gradients sum over keys (dq), over queries and the heads of a group (dk, dv): all of them on this rank, in an order
        that depends on positions and d alone.

    Raises:
        ValueError: tensors that do not fit or are not on one GPU, another scale, or a GPU on which the probe finds other bits than it should.
    """
    check(query, key, value, scale, causal)
    return _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, causal)


def check(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> None:
    """The errors of :func:`core_attention`."""
    sq, batch, heads, width = query.shape if query.dim() == 4 else (0, 0, 0, 0)
    fits = width and key.dim() == 4 and key.shape == value.shape and key.shape[1] == batch and key.shape[3] == width
    if not fits or not key.shape[2] or heads % key.shape[2] or not key.shape[0]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be [sq, b, h, d] and [sk, b, g, d] "
            "with sk and d at least 1 and g dividing h"
        )
    if causal and key.shape[0] < sq:
        raise ValueError(f"causal attention of {sq} queries over {key.shape[0]} keys leaves queries without keys; pass all keys")
    if batch * heads > 65535:
        raise ValueError(f"{batch} sequences of {heads} heads are more than the 65535 that one launch can take; split the batch")
    if scale is not None and not 2.0**-126 <= scale < 2.0**127:  # a row's maximum is taken before it is scaled
        raise ValueError(f"scale={scale} must be above 0 and finite in float32; negate the query for a negative one")
    reference.check_dtypes(query=query, key=key, value=value)
    if len({t.device for t in (query, key, value)}) > 1:
        raise ValueError(f"query, key and value are on {query.device}, {key.device} and {value.device}; move them to one GPU")
    if not products.on_gpu(query):
        raise ValueError("core_attention is a GPU kernel and query is on the CPU; compute scores and softmax by group there")
    require_invariant(query.device, query.dtype, width, causal)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, causal):
        from tpinv.kernels import attention

        query, key, value = map(unit_stride, (query, key, value))
        out, lse = attention.forward(query, key, value, scale, causal)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.args = (scale, causal)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        from tpinv.kernels import attention_backward

        return *attention_backward.backward(*ctx.saved_tensors, unit_stride(dout), *ctx.args), None, None


@functools.lru_cache(maxsize=64)
def require_invariant(device: torch.device, dtype: torch.dtype, width: int, causal: bool = True) -> None:
    """ValueError unless, on this chip, a slice of heads and batch gives the bytes it has in the whole, and a second run those of the first."""
    from tpinv.kernels import attention, attention_backward

    generator = torch.Generator(device).manual_seed(0)
    make = lambda heads: torch.randn(333, 2, heads, width, device=device, generator=generator).to(dtype)  # noqa: E731

    def run(*inputs):
        out, lse = attention.forward(*inputs[:3], 1.0, causal)
        return out, *attention_backward.backward(*inputs[:3], out, lse, inputs[3], 1.0, causal)

    for groups in (2, 8):
        inputs = make(8), make(groups), make(groups), make(8)
        last_group = [t[:, 1:, -t.shape[2] // groups :] for t in inputs]  # of the second sequence
        whole, again, part = run(*inputs), run(*inputs), run(*last_group)
        for name, a, b, c in zip(("output", "dq", "dk", "dv"), whole, again, part, strict=True):
            same = [
                torch.equal(t.contiguous().view(torch.uint8), u.contiguous().view(torch.uint8))
                for t, u in ((a, b), (a[:, 1:, -c.shape[2] :], c))
            ]
            if not all(same):
                raise ValueError(
                    f"attention is not invariant on {torch.cuda.get_device_name(device)} for {dtype} heads of width {width}: {name} differs "
                    f"{'between heads' if same[0] else 'between runs'}; compute attention on another GPU, and report this"
                )

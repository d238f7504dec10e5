"""Core attention, invariant to heads per rank, batch, chunks of queries and reruns, forward and backward.

Heads are what tensor parallelism shards here; nothing is summed over them but dk and dv of a group of query heads, which lies on one
rank. So what must hold is that a head's bits do not depend on how many others are computed with it, and, for an engine's sake, that a
row's do not depend on which other rows are: reference/attention.py says by what order. A probe checks it on this very chip before the
first use. ops/paged_attention.py is the same over a paged cache.
"""

import functools
import weakref

import torch
from torch import Tensor

from tpinv import reference
from tpinv.contract import ATTENTION_LEAF
from tpinv.ops import products
from tpinv.ops.attention_options import check_options, option_numbers, options_of, probed
from tpinv.ops.registry import register
from tpinv.ops.shapes import unit_stride
from tpinv.reference import attention as reference_attention
from tpinv.reference import attention_backward as reference_backward
from tpinv.reference.attention import Options, Pack


def core_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(query key^T scale) value, by head.

    Args:
        query: [sq, b, h, d]; key, value: [sk, b, g, d] with g dividing h: query heads j h/g ... share key head j. Any strides,
            float32, bfloat16 or float16.
        causal: query i sees keys up to i + sk - sq, which must not be negative.
        scale: default 1 / sqrt(d); above 0.
        sliding_window: a query sees its last so many keys, its own the last of them (transformers' number; FlashAttention's window_size is
            (sliding_window - 1, 0)). Causal attention alone. Default: all keys.
        softcap: scores are softcap * tanh(query key^T scale / softcap). Default: no cap.
        sinks: [h], float32, bfloat16 or float16: the logit, neither scaled nor capped, of one more key per head without a value. Default: none.

    Returns:
        [sq, b, h, d]. Gradients sum over keys (dq), over queries and the heads of a group (dk, dv), over queries and batch (dsinks): all of
        them on this rank, in an order that depends on positions and d alone.

    Raises:
        ValueError: tensors that do not fit or are not on one device, another scale, or a machine on which the probe finds other bits than
            it should.
    """
    scale = _scale(query, scale)
    if sliding_window is None and softcap is None and sinks is None:
        return CORE(query, key, value, scale, causal)[0]
    return CORE_WITH_OPTIONS(query, key, value, sinks, scale, causal, *option_numbers(sliding_window, softcap))[0]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """:func:`core_attention` of n sequences that lie one behind another; each has the bytes, of its gradients too, that it has alone.

    Args:
        query: [t, h, d]; key, value: [u, g, d]. Strides, dtypes, g, scale, causal (in each sequence) and all after it as in
            core_attention; dsinks sums over the rows of all sequences.
        cu_seqlens_q, cu_seqlens_kv: int32 [n + 1], where the query is. Sequence i has cu_seqlens[i + 1] - cu_seqlens[i] rows; none are legal.
        max_seqlen_q, max_seqlen_kv: no sequence is longer; the default, t and u, starts programs that have nothing to do.
        cu_seqlens_q_padded, cu_seqlens_kv_padded: sequence i starts at row cu_seqlens_padded[i]; default cu_seqlens, no padding.

    Returns:
        [t, h, d]. Rows of no sequence are zero, and so are their gradients.

    Raises:
        ValueError: what core_attention raises, and cu_seqlens of another shape, dtype or device. Lengths on a GPU
            are known to it alone, and it is not waited for: a pack whose lengths do not fit fails there by an assertion, once it is computed.
    """
    first_q = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
    first_k = cu_seqlens_kv if cu_seqlens_kv_padded is None else cu_seqlens_kv_padded
    longest_q, longest_k = len(query) if max_seqlen_q is None else max_seqlen_q, len(key) if max_seqlen_kv is None else max_seqlen_kv
    cumulative = cu_seqlens_q, cu_seqlens_kv, first_q, first_k
    settings = longest_q, longest_k, _scale(query, scale), causal
    if sliding_window is None and softcap is None and sinks is None:
        return PACKED(query, key, value, *cumulative, *settings)[0]
    return PACKED_WITH_OPTIONS(query, key, value, *cumulative, sinks, *settings, *option_numbers(sliding_window, softcap))[0]


def _scale(query: Tensor, scale: float | None) -> float:
    if scale is not None:
        return scale
    return query.shape[-1] ** -0.5 if query.dim() and query.shape[-1] else 1.0  # without a width it is refused


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
    _check_kind(query, key, value, scale)


def check_packed(query, key, value, cu_q, cu_k, first_q, first_k, longest_q, longest_k, scale, causal) -> None:
    """The errors of :func:`packed_attention`, but for those of the lengths."""
    fits = query.dim() == key.dim() == 3 and key.shape == value.shape and query.shape[2] == key.shape[2] != 0 != key.shape[1]
    if not fits or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be [t, h, d] and [u, g, d] "
            "with d at least 1 and g dividing h"
        )
    cumulative = (cu_q, cu_k, first_q, first_k)
    if any(t.dtype != torch.int32 or t.dim() != 1 or not len(t) or t.shape != cu_q.shape or t.device != query.device for t in cumulative):
        described = ", ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in cumulative)
        raise ValueError(f"cu_seqlens for queries, keys, and where they start are {described}; pass torch.int32 [n + 1] on {query.device}")
    _check_kind(query, key, value, scale)


def _check_kind(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    if not 2.0**-126 <= scale < 2.0**127:  # a row's maximum is taken before it is scaled
        raise ValueError(f"scale={scale} must be above 0 and finite in float32; negate the query for a negative one")
    reference.check_dtypes(query=query, key=key, value=value)
    if len({t.device for t in (query, key, value)}) > 1:
        raise ValueError(f"query, key and value are on {query.device}, {key.device} and {value.device}; move them to one device")


def backend(query: Tensor) -> tuple:
    """forward and backward for this device."""
    if products.on_gpu(query):
        from tpinv.kernels.attention import backward, forward  # needs Triton

        return forward.forward, backward.backward
    return reference_attention.forward, reference_backward.backward


_asserted: list = [(), None]  # the last pack: its tensors, weakly, and what was asserted of them


def _assert_lengths(pack, q_rows: int, k_rows: int, causal: bool) -> None:
    """Asserted on the GPU, once for a pack that every layer gets; whenever a graph is captured, whose replays ask again; and every time
    of tensors of inference mode, which count no changes."""
    tensors = pack[:4]
    capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()  # then it belongs into the graph
    unseen = capturing or any(t.is_inference() for t in tensors)
    state = None if unseen else ([t._version for t in tensors], pack[4:], q_rows, k_rows, causal)
    seen, asserted = _asserted
    if state is not None and state == asserted and all(ref() is t for ref, t in zip(seen, tensors, strict=True)):
        return

    def inside(cu, first, rows, longest):
        count, start, following = cu.diff(), first[:-1], first[1:]
        return (count >= 0) & (count <= longest) & (start >= 0) & (start + count <= following) & (following <= rows)

    queries, keys = pack.cu_q.diff(), pack.cu_k.diff()
    seen_by_all = keys >= queries if causal else (keys > 0) | (queries == 0)
    fits = inside(pack.cu_q, pack.first_q, q_rows, pack.longest_q) & inside(pack.cu_k, pack.first_k, k_rows, pack.longest_k) & seen_by_all
    message = "cu_seqlens overlap, leave the tensors, pass max_seqlen, or leave queries without keys"
    if fits.device.type == "cpu" and not fits.all():
        raise ValueError(f"{message}: {', '.join(str(t.tolist()) for t in tensors)} for {q_rows} queries and {k_rows} keys")
    torch._assert_async(fits.all(), message)
    if state is not None:
        _asserted[:] = [weakref.ref(t) for t in tensors], state


@functools.lru_cache(maxsize=64)
def require_invariant(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    causal: bool = True,
    packed: bool = False,
    options: tuple[bool, bool, bool] = (False, False, False),
) -> None:
    """ValueError unless, on this machine, a slice of heads and batch gives the bytes it has in the whole, a second run those of the first,
    and the last rows, over all keys, those they have among the others. ``packed``: and a sequence of a pack those it has alone. ``options``: with a window, a cap, sinks.
    """
    generator = torch.Generator(device).manual_seed(0)
    length = ATTENTION_LEAF + 61 if device.type == "cuda" else 130
    forward, backward = backend(torch.empty(0, device=device))

    def make(heads: int) -> Tensor:
        return torch.randn(length, 2, heads, width, device=device, generator=generator).to(dtype)

    def settings(query: Tensor) -> Options:
        return probed(options, query.shape[2], device)

    def run(*inputs, pack=None):
        out, lse = forward(*inputs[:3], 1.0, causal, pack, settings(inputs[0]))
        return out, *backward(*inputs[:3], out, lse, inputs[3], 1.0, causal, pack, settings(inputs[0]))[:3]

    for groups in (2, 8):
        inputs = make(8), make(groups), make(groups), make(8)
        last_group = [t[:, 1:, -t.shape[2] // groups :] for t in inputs]  # of the second sequence
        whole, again, part = run(*inputs), run(*inputs), run(*last_group)
        rows = forward(inputs[0][-3:], *inputs[1:3], 1.0, causal, None, settings(inputs[0]))[0]
        compared = {
            "runs": (whole, again),
            "heads": ([t[:, 1:, -p.shape[2] :] for t, p in zip(whole, part, strict=True)], part),
            "chunks of queries": ([rows], [whole[0][-3:]]),
        }
        if packed:
            one, cu = [t[:, :1] for t in inputs], torch.tensor([0, 100, 100, length], dtype=torch.int32, device=device)
            alone = zip(*(run(*(t[a:b] for t in one)) for a, b in ((0, 100), (100, length))), strict=True)
            compared["packs"] = (run(*one, pack=Pack(cu, cu, cu, cu, length, length)), [torch.cat(parts) for parts in alone])
        for what, (found, expected) in compared.items():
            for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=False):
                if not same_bytes(a, b):
                    raise ValueError(
                        f"attention is not invariant on {device_name(device)} for {dtype} heads of width {width}: {name} "
                        f"differs between {what}; compute attention on another machine, and report this"
                    )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this CPU ({torch.backends.cpu.get_cpu_capability()})"


# -- operators ----------------------------------------------------------------------------------------------------------------------


def _forward(query, key, value, scale, causal) -> tuple[Tensor, Tensor]:
    require_invariant(query.device, query.dtype, query.shape[-1], causal)
    return backend(query)[0](*map(unit_stride, (query, key, value)), scale, causal)


def _backward(dout, query, key, value, out, lse, needs, scale, causal) -> tuple[Tensor, ...]:
    return backend(query)[1](*map(unit_stride, (query, key, value)), out, lse, unit_stride(dout), scale, causal)


def _fake(query, *_) -> tuple[Tensor, Tensor]:
    sq, batch, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, sq, dtype=torch.float32)


def _forward_packed(query, key, value, cu_q, cu_k, first_q, first_k, longest_q, longest_k, scale, causal) -> tuple[Tensor, Tensor]:
    require_invariant(query.device, query.dtype, query.shape[-1], causal, True)
    pack = _pack(cu_q, cu_k, first_q, first_k, longest_q, longest_k)
    _assert_lengths(pack, len(query), len(key), causal)
    out, lse = backend(query)[0](*(unit_stride(t).unsqueeze(1) for t in (query, key, value)), scale, causal, pack)
    return out.squeeze(1), lse


def _backward_packed(
    dout, query, key, value, out, lse, cu_q, cu_k, first_q, first_k, needs, longest_q, longest_k, scale, causal
) -> tuple[Tensor, ...]:
    query, key, value, out, dout = (unit_stride(t).unsqueeze(1) for t in (query, key, value, out, dout))
    pack = _pack(cu_q, cu_k, first_q, first_k, longest_q, longest_k)
    return tuple(gradient.squeeze(1) for gradient in backend(query)[1](query, key, value, out, lse, dout, scale, causal, pack))


def _pack(cu_q, cu_k, first_q, first_k, longest_q: int, longest_k: int) -> Pack:
    return Pack(*(t.contiguous() for t in (cu_q, cu_k, first_q, first_k)), longest_q, longest_k)


def _fake_packed(query, *_) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(1, query.shape[1], query.shape[0], dtype=torch.float32)


def _check_with(query, key, value, sinks, scale, causal, sliding_window, softcap) -> None:
    check(query, key, value, scale, causal)
    check_options(query, sinks, scale, causal, sliding_window, softcap)


def _forward_with(query, key, value, sinks, scale, causal, *numbers) -> tuple[Tensor, Tensor]:
    options = options_of(sinks, *numbers)
    require_invariant(query.device, query.dtype, query.shape[-1], causal, False, options.kinds)
    return backend(query)[0](*map(unit_stride, (query, key, value)), scale, causal, None, options)


def _backward_with(dout, query, key, value, sinks, out, lse, needs, scale, causal, *numbers) -> tuple[Tensor | None, ...]:
    inputs = (*map(unit_stride, (query, key, value)), out, lse, unit_stride(dout))
    gradients = backend(query)[1](*inputs, scale, causal, None, options_of(sinks, *numbers))
    return (*gradients, None) if sinks is None else gradients


def _check_packed_with(query, key, value, cu_q, cu_k, first_q, first_k, sinks, longest_q, longest_k, scale, causal, *numbers) -> None:
    check_packed(query, key, value, cu_q, cu_k, first_q, first_k, longest_q, longest_k, scale, causal)
    check_options(query, sinks, scale, causal, *numbers)


def _forward_packed_with(query, key, value, cu_q, cu_k, first_q, first_k, sinks, longest_q, longest_k, scale, causal, *numbers):
    options = options_of(sinks, *numbers)
    require_invariant(query.device, query.dtype, query.shape[-1], causal, True, options.kinds)
    pack = _pack(cu_q, cu_k, first_q, first_k, longest_q, longest_k)
    _assert_lengths(pack, len(query), len(key), causal)
    out, lse = backend(query)[0](*(unit_stride(t).unsqueeze(1) for t in (query, key, value)), scale, causal, pack, options)
    return out.squeeze(1), lse


def _backward_packed_with(
    dout, query, key, value, sinks, out, lse, cu_q, cu_k, first_q, first_k, needs, longest_q, longest_k, scale, causal, *numbers
) -> tuple[Tensor | None, ...]:
    query, key, value, out, dout = (unit_stride(t).unsqueeze(1) for t in (query, key, value, out, dout))
    pack = _pack(cu_q, cu_k, first_q, first_k, longest_q, longest_k)
    options = options_of(sinks, *numbers)
    dq, dk, dv, *dsinks = backend(query)[1](query, key, value, out, lse, dout, scale, causal, pack, options)
    return *(gradient.squeeze(1) for gradient in (dq, dk, dv)), *(dsinks or [None])


def _fake_backward_with(dout, query, key, value, sinks, *_) -> list[Tensor | None]:
    return [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value, sinks)]


CORE = register(
    "core_attention(Tensor query, Tensor key, Tensor value, float scale, bool causal) -> (Tensor out, Tensor lse)",
    check=check,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    kept="query key value out lse",
    gradients="query key value",
)
PACKED = register(
    "packed_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_kv, Tensor first_q, Tensor first_kv, "
    "SymInt max_seqlen_q, SymInt max_seqlen_kv, float scale, bool causal) -> (Tensor out, Tensor lse)",
    check=check_packed,
    forward=_forward_packed,
    fake=_fake_packed,
    backward=_backward_packed,
    kept="query key value out lse cu_seqlens_q cu_seqlens_kv first_q first_kv",
    gradients="query key value",
)
# The same with options. Operators of their own: those without have the arguments, and cost the host, what they did before there were any.
_NUMBERS = "float scale, bool causal, int sliding_window, float softcap) -> (Tensor out, Tensor lse)"
CORE_WITH_OPTIONS = register(
    f"core_attention_with_options(Tensor query, Tensor key, Tensor value, Tensor? sinks, {_NUMBERS}",
    check=_check_with,
    forward=_forward_with,
    fake=_fake,
    backward=_backward_with,
    kept="query key value sinks out lse",
    gradients="query key value sinks",
    fake_backward=_fake_backward_with,
)
PACKED_WITH_OPTIONS = register(
    "packed_attention_with_options(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_kv, Tensor first_q, "
    f"Tensor first_kv, Tensor? sinks, SymInt max_seqlen_q, SymInt max_seqlen_kv, {_NUMBERS}",
    check=_check_packed_with,
    forward=_forward_packed_with,
    fake=_fake_packed,
    backward=_backward_packed_with,
    kept="query key value sinks out lse cu_seqlens_q cu_seqlens_kv first_q first_kv",
    gradients="query key value sinks",
    fake_backward=_fake_backward_with,
)

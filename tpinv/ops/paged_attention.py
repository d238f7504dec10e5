"""Attention over a paged cache, for engines: the bytes of core_attention, whatever is computed together.

A row (a query of one head) has the same bytes in a prefill, in a chunk of it, in a decode, beside any other requests, with pages of any
size in any order, and with any number of heads on this rank: they depend on the request's keys and values up to its own position.
Nothing is summed over anything else, and what lies in the cache beyond a request's length is never used.

An engine writes the keys and values of new tokens with :func:`append_kv`, then calls :func:`paged_attention`. On a GPU both can be captured
in a CUDA graph: lengths and tables are read there, and the host waits for nothing.
"""

import functools

import torch
from torch import Tensor

from tpinv import reference
from tpinv.contract import ATTENTION_LEAF, ATTENTION_NODE
from tpinv.ops import attention, products
from tpinv.ops.attention_options import check_options, option_numbers, options_of, probed
from tpinv.ops.shapes import unit_stride
from tpinv.reference import attention as reference_attention
from tpinv.reference.attention import PLAIN

CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST_PAGE = 16


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    out: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(query key^T scale) value of n requests, whose keys and values lie in pages. No gradient.

    Args:
        query: [t, h, d], the queries of all requests one behind another. A request's queries are its last positions: query j of q sits at
            position seq_len - q + j.
        key_cache, value_cache: [pages, page size, g, d] with g dividing h, any strides but unit stride in d: a view of either layout of
            vLLM's cache fits, ``kv_cache.unbind(0)`` or ``unbind(1)``, permuted. Page size a multiple of 16. The query's dtype: bfloat16,
            float16 (float32 for tests); no fp8.
        block_table: int32 [n, at least the pages of the longest request], the page of each page size positions of a request.
        seq_lens: int32 [n], the keys of each request, those of its queries included. A request of no keys gives zeros.
        query_start_loc: int32 [n + 1], where each request's queries begin; rows from query_start_loc[n] on are padding.
        max_query_len, max_seq_len: no request has more; they bound grids and scratch, and no bit depends on them. Default: t, and what
            block_table can hold.
        causal: a query sees keys up to its own position; otherwise all keys of its request.
        scale: default 1 / sqrt(d); above 0.
        out: [t, h, d] in the query's dtype, contiguous in d, which is filled and returned. It shares no memory with the other tensors.
        sliding_window, softcap, sinks: as in core_attention. Pages that lie before the window of a request's first query are not looked at.

    Returns:
        [t, h, d]. Rows of no request are zero.

    Raises:
        ValueError: tensors that do not fit, another dtype, page size or scale, or a machine on which the probe finds other bits than it
            should. On a CPU also lengths that do not fit; a GPU, which is not waited for, gives NaN to a request with fewer keys than
            queries or more of either than the bounds say, and reads pages as block_table names them.
    """
    _check_kinds(max_query_len, max_seq_len, causal, scale)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.dim() and query.shape[-1] else 1.0
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key_cache, value_cache)):
        raise ValueError("paged_attention has no gradient; train with core_attention or packed_attention, or call it in torch.no_grad()")
    if max_query_len is None:
        max_query_len = len(query)
    if max_seq_len is None and block_table.dim() == 2 and key_cache.dim() == 4:
        max_seq_len = block_table.shape[1] * key_cache.shape[1]
    arguments = block_table, seq_lens, query_start_loc, max_query_len, max_seq_len or 0, scale, causal
    options = ()
    if sliding_window is not None or softcap is not None or sinks is not None:
        options = (sinks, *option_numbers(sliding_window, softcap))
    if out is None:
        return torch.ops.tpinv.paged_attention(query, key_cache, value_cache, *arguments, *options)
    torch.ops.tpinv.paged_attention_out(query, key_cache, value_cache, *arguments, out, *options)
    return out


def append_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes the keys and values of new tokens into the cache: token i into position ``slot % page size`` of page ``slot // page size``.

    Args:
        key, value: [t, g, d], any strides. Rows past slot_mapping's are padding.
        key_cache, value_cache: [pages, page size, g, d] as in :func:`paged_attention`.
        slot_mapping: int64 or int32 [t or fewer], ``slot``; a token whose slot is below 0 is left out. Of two tokens with one slot either
            may be kept.

    Raises:
        ValueError: tensors that do not fit, dtypes that differ, caches that are one memory, or a key or value that requires a gradient, which
            a cache has not. On a CPU also a slot past the cache; a GPU leaves such a token out.
    """
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        raise ValueError("append_kv has no gradient; train with core_attention or packed_attention, or call it in torch.no_grad()")
    torch.ops.tpinv.append_kv(key, value, key_cache, value_cache, slot_mapping)


# -- checks -------------------------------------------------------------------------------------------------------------------------


def _check_kinds(max_query_len, max_seq_len, causal, scale) -> None:
    """What torch would take for another number: None for False, True for 1."""
    for name, bound in (("max_query_len", max_query_len), ("max_seq_len", max_seq_len)):
        if bound is not None and (isinstance(bound, bool) or not hasattr(bound, "__index__") or (type(bound) is int and bound < 0)):
            raise ValueError(f"{name}={bound!r} must be a whole number of at least 0, or None")
    if not isinstance(causal, bool):
        raise ValueError(f"causal={causal!r} must be True or False")
    if scale is not None and (isinstance(scale, bool | str) or not hasattr(scale, "__float__")):
        raise ValueError(f"scale={scale!r} must be a number, or None for 1 / sqrt(d)")


def _in_common(out: Tensor, other: Tensor) -> bool:
    """Do they share memory? Heads side by side in one buffer do not; what else lies between each other's ends is taken for shared."""
    if not out.numel() or not other.numel() or out.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    (first, last), (first_other, last_other) = (
        (t.storage_offset(), t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) for t in (out, other)
    )
    if last < first_other or last_other < first:
        return False
    step, width = out.stride(0), (out.shape[1] - 1) * out.stride(1) + out.shape[2]
    return out.stride() != other.stride() or not width <= (first_other - first) % max(step, 1) <= step - width


def _repeats(t: Tensor) -> bool:
    """Is it one row seen many times, as expand gives it?"""
    return any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True))


def _check_cache(name: str, heads: int, width: int, key_cache: Tensor, value_cache: Tensor) -> None:
    fits = key_cache.dim() == 4 and key_cache.shape == value_cache.shape and key_cache.shape[3] == width and width
    if not fits or not key_cache.shape[2] or heads % key_cache.shape[2]:
        raise ValueError(
            f"{name} of {heads} heads of width {width}, key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} do not "
            "fit: caches are [pages, page size, g, d] with g dividing the heads"
        )
    if key_cache.dtype not in CACHE_DTYPES or value_cache.dtype != key_cache.dtype:
        raise ValueError(
            f"the cache is {key_cache.dtype} and {value_cache.dtype}; bytes are promised for bfloat16 and float16 only, fp8 is not covered"
        )
    if key_cache.shape[1] % SMALLEST_PAGE or not key_cache.shape[1]:
        raise ValueError(f"pages of {key_cache.shape[1]} positions must be a multiple of {SMALLEST_PAGE}")
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        raise ValueError(f"the cache has stride {key_cache.stride(3)} and {value_cache.stride(3)} in d, which must be 1; permute its view")


def check(query, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale, out=None) -> None:
    if query.dim() != 3:
        raise ValueError(f"query {tuple(query.shape)} must be [t, h, d]")
    tokens, heads, width = query.shape
    _check_cache("query", heads, width, key_cache, value_cache)
    if not 2.0**-126 <= scale < 2.0**127:
        raise ValueError(f"scale={scale} must be above 0 and finite in float32; negate the query for a negative one")
    reference.check_dtypes(query=query, key_cache=key_cache)
    numbers = (block_table, seq_lens, query_start_loc)
    fits = block_table.dim() == 2 and seq_lens.shape == block_table.shape[:1] and query_start_loc.shape == (len(block_table) + 1,)
    if not fits or any(t.dtype != torch.int32 for t in numbers):
        described = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in numbers)
        raise ValueError(f"block_table, seq_lens and query_start_loc are {described}; they must be torch.int32 [n, pages], [n] and [n + 1]")
    if len({t.device for t in (query, key_cache, value_cache, *numbers)}) > 1:
        raise ValueError(
            f"query is on {query.device}, the cache on {key_cache.device}, {value_cache.device}, tables on "
            f"{', '.join(str(t.device) for t in numbers)}; move them to one device"
        )
    if out is not None and (out.shape != query.shape or out.dtype != query.dtype or out.device != query.device or out.stride(2) != 1):
        raise ValueError(f"out {out.dtype} {tuple(out.shape)} on {out.device} must be like query and have unit stride in d")
    if out is not None and any(_in_common(out, t) for t in (query, key_cache, value_cache)):
        raise ValueError("out shares memory with query or the cache, which is read while out is written; pass memory of its own")
    if out is not None and _repeats(out):
        raise ValueError(f"out has strides {out.stride()}: rows of one memory; pass a tensor whose rows are apart")


def _check_lengths(
    query, key_cache, block_table, seq_lens, query_start_loc, max_query_len, max_seq_len, causal, window=None
) -> None:  # fmt: skip
    """On a CPU, where numbers can be read."""
    starts, lengths, (pages, size) = query_start_loc.tolist(), seq_lens.tolist(), key_cache.shape[:2]
    counts = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    if min(counts, default=0) < 0 or starts[0] < 0 or starts[-1] > len(query):
        raise ValueError(f"query_start_loc={starts} must not decrease nor leave the {len(query)} rows of query")
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if length < 0 or length > block_table.shape[1] * size or (causal and count > length > 0):
            raise ValueError(
                f"request {i} has {count} queries and seq_len {length}: it must be at least the queries and at most the "
                f"{block_table.shape[1]} x {size} positions of its row of block_table"
            )
        if count > max_query_len or (count and length > max_seq_len):
            raise ValueError(
                f"request {i} has {count} queries and seq_len {length}, more than max_query_len={max_query_len} or max_seq_len={max_seq_len} "
                "says; pass bounds that hold, or None"
            )
        used = block_table[i, reference_attention.first_seen(count, length, window) // size : -(-length // size)]
        if count and len(used) and not 0 <= int(used.min()) <= int(used.max()) < pages:
            raise ValueError(f"request {i} names pages {used.tolist()} of a cache of {pages}")


def _check_append(key, value, key_cache, value_cache, slot_mapping) -> None:
    if key.dim() != 3 or key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must be [t, g, d]")
    _check_cache("key", key.shape[1], key.shape[2], key_cache, value_cache)
    if key.shape[1] != key_cache.shape[2]:
        raise ValueError(f"key has {key.shape[1]} heads, the cache {key_cache.shape[2]}")
    reference.check_dtypes(key=key, value=value, key_cache=key_cache)
    if slot_mapping.dim() != 1 or slot_mapping.dtype not in (torch.int32, torch.int64) or len(slot_mapping) > len(key):
        raise ValueError(
            f"slot_mapping {slot_mapping.dtype} {tuple(slot_mapping.shape)} must be int64 or int32, one for each of {len(key)} keys"
        )
    if key_cache.numel() and (key_cache.data_ptr() == value_cache.data_ptr() or _repeats(key_cache) or _repeats(value_cache)):
        raise ValueError("keys and values, or pages, are one memory; pass caches whose numbers are apart")
    if len({t.device for t in (key, value, key_cache, value_cache, slot_mapping)}) > 1:
        raise ValueError("key, value, caches and slot_mapping are on different devices; move them to one")


# -- operators ----------------------------------------------------------------------------------------------------------------------


def _paged_out(
    query, key_cache, value_cache, block_table, seq_lens, query_start_loc, max_query_len, max_seq_len, scale, causal, out, sinks=None,
    sliding_window=0, softcap=0.0,
):  # fmt: skip
    check(query, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale, out)
    check_options(query, sinks, scale, causal, sliding_window, softcap)
    options = options_of(sinks, sliding_window, softcap)
    where = query.device, query.dtype, query.shape[2]
    require_paged(*where, options.kinds) if options.given else require_paged(*where)  # what an engine asked ahead must be found
    numbers = block_table, seq_lens, query_start_loc, max_query_len, max_seq_len
    _compute(query, key_cache, value_cache, *numbers, scale, causal, out, options)


def _paged(query, *arguments):
    out = query.new_empty(query.shape)
    _paged_out(query, *arguments[:9], out, *arguments[9:])
    return out


def _compute(
    query, key_cache, value_cache, block_table, seq_lens, query_start_loc, max_query_len, max_seq_len, scale, causal, out, options=PLAIN
):
    query, numbers = unit_stride(query), (unit_stride(block_table), seq_lens.contiguous(), query_start_loc.contiguous())
    if products.on_gpu(query):
        from tpinv.kernels.attention import paged  # needs Triton

        paged.forward(query, key_cache, value_cache, *numbers, max_query_len, max_seq_len, scale, causal, out, options=options)
    else:
        _check_lengths(query, key_cache, *numbers, max_query_len, max_seq_len, causal, options.window)
        reference_attention.paged_forward(query, key_cache, value_cache, *numbers, scale, causal, out, options)


def _append(key, value, key_cache, value_cache, slot_mapping):
    _check_append(key, value, key_cache, value_cache, slot_mapping)
    key, value = key[: len(slot_mapping)], value[: len(slot_mapping)]
    if products.on_gpu(key):
        from tpinv.kernels.attention import paged  # needs Triton

        paged.append(unit_stride(key), unit_stride(value), key_cache, value_cache, slot_mapping.contiguous())
        return
    slots = key_cache.shape[0] * key_cache.shape[1]
    if len(slot_mapping) and int(slot_mapping.max()) >= slots:
        raise ValueError(f"slot {int(slot_mapping.max())} is past the cache's {slots}")
    reference_attention.append_kv(key, value, key_cache, value_cache, slot_mapping)


_library = torch.library.Library("tpinv", "FRAGMENT")
_INPUTS = (
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, "
    "SymInt max_query_len, SymInt max_seq_len, float scale, bool causal"
)
_OPTIONS = "Tensor? sinks=None, int sliding_window=0, float softcap=0.0"
for _signature, _function, _fake in (
    (f"paged_attention({_INPUTS}, {_OPTIONS}) -> Tensor", _paged, lambda query, *_: query.new_empty(query.shape)),
    (f"paged_attention_out({_INPUTS}, Tensor(a!) out, {_OPTIONS}) -> ()", _paged_out, lambda *_: None),
    (
        "append_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping) -> ()",
        _append,
        lambda *_: None,
    ),
):
    _name = "tpinv::" + _signature.split("(")[0]
    _library.define(_signature, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(_name, torch.no_grad()(_function), "CompositeExplicitAutograd")
    torch.library.register_fake(_name, _fake, lib=_library)


# -- probe --------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def require_paged(device: torch.device, dtype: torch.dtype, width: int, options: tuple[bool, bool, bool] = (False, False, False)) -> None:
    """ValueError unless, on this machine, a decode, a chunk of queries and another request's company give a row the bytes that
    core_attention gives it in one prefill, over shuffled pages with NaN behind the last position. ``options``: with a window, a cap, sinks."""
    length = (4 * ATTENTION_NODE + 2) * ATTENTION_LEAF + 333 if device.type == "cuda" else ATTENTION_LEAF + 70
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(length, heads, width, device=device, generator=generator).to(dtype) for heads in (4, 2, 2))
    given = probed(options, 4, device)

    def prefill(length: int) -> Tensor:
        return attention.backend(q)[0](*(t[:length].unsqueeze(1) for t in (q, k, v)), 1.0, True, None, given)[0].squeeze(1)

    whole = prefill(length)
    short = 133  # which one kernel computes, and the long one another, if it is longer than a node
    if not attention.same_bytes(whole[:short], prefill(short)):
        raise ValueError(
            f"attention is not invariant on {attention.device_name(device)}: the first {short} rows differ from those of {length}"
        )
    for size in (16, 256):
        of_each = -(-length // size)
        order = torch.randperm(2 * of_each, generator=torch.Generator().manual_seed(1)).to(device)
        caches = [torch.full((2 * of_each, size, 2, width), float("nan"), device=device).to(dtype) for _ in range(2)]
        for cache, rows in zip(caches, (k, v), strict=True):
            for pages, count in ((order[:of_each], length), (order[of_each:], short)):
                position = torch.arange(count, device=device)
                cache[pages[position // size], position % size] = rows[:count]
        table = order.view(2, of_each).int()
        for queries in (1, 3, 100):  # of the long request, beside a decode of the short one
            mine = torch.cat([q[length - queries :], q[short - 1 : short]])
            numbers = ([length, short], [0, queries, queries + 1])
            lengths, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in numbers)
            out = torch.empty_like(mine)
            _compute(mine, *caches, table, lengths, starts, queries, length, 1.0, True, out, given)
            if not attention.same_bytes(out, torch.cat([whole[length - queries :], whole[short - 1 : short]])):
                raise ValueError(
                    f"paged attention is not invariant on {attention.device_name(device)} for {dtype} heads of width {width}: {queries} "
                    f"queries over pages of {size} differ from one prefill; compute on another machine, and report this"
                )

"""Attention over a paged cache, and the writer of that cache. Which kernel computes a request is a question of speed: all have one set of
bytes (reference/attention.py).

    up to 64 queries of every request     kernels/attention/decode.py
    more                                  requests of few queries there, the others by tiles of rows (kernels/attention/forward.py)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv import contract
from tpinv.kernels.attention.decode import decode
from tpinv.kernels.attention.forward import LEVELS, MAX_KEYS, constants, long_attention_kernel, programs_for, scratch_floats, tile_sizes
from tpinv.reference.attention import PLAIN, Options
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry

DECODED = 64  # queries of a request, when no request has more
BESIDE = 16  # rows (queries by heads of a group) of a request that is decoded beside prefills
_ELEMENTS = 4096  # of a program that writes a cache


@on_device_of_first
def forward(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    max_query_len: int, max_seq_len: int, scale: float, causal: bool, out: Tensor, leaf: int = contract.ATTENTION_LEAF,
    options: Options = PLAIN,
) -> None:  # fmt: skip
    """query [t, h, d], caches [pages, page size, g, d], all of unit stride in d; int32 block_table [n, ...] of unit stride, seq_lens [n],
    query_start_loc [n + 1], contiguous -> out [t, h, d]."""
    tokens, heads, width = query.shape
    per_group, requests = heads // key_cache.shape[2], len(seq_lens)
    rows, warps, stages = tile_sizes(width, query.dtype)
    if max_seq_len > MAX_KEYS:
        raise ValueError(f"max_seq_len={max_seq_len} is more than {MAX_KEYS}, the most keys of one sequence; pass a smaller bound")
    if not query.numel():
        return
    max_query_len = min(max_query_len, tokens)
    few = max_query_len <= DECODED
    most = max_query_len if few else max(1, BESIDE // per_group)
    numbers = block_table, seq_lens, query_start_loc
    decode(query, key_cache, value_cache, *numbers, most, max_seq_len, scale, causal, out, not few, leaf, options)
    if few or not requests:
        return
    fits = (query_start_loc.diff() <= max_query_len).all() & (seq_lens <= max_seq_len).all()
    torch._assert_async(fits, "a request is longer than max_query_len or max_seq_len says")
    tiles = ceil_div(max_query_len, rows)
    programs = programs_for(tiles * heads * requests, query.device)
    parked, turn = query.new_empty(scratch_floats(programs, rows, width), dtype=torch.float32), query.new_zeros(1, dtype=torch.int32)
    inner, scale = options.factors(scale)
    (k_b, k_s, k_h, _), (v_b, v_s, v_h, _) = key_cache.stride(), value_cache.stride()
    long_attention_kernel[(programs,)](
        query, key_cache, value_cache, out, None, parked, turn, block_table, query.stride(0), 0, query.stride(1), k_s, k_b, k_h, v_s, v_b, v_h,
        out.stride(0), 0, out.stride(1), query_start_loc, seq_lens, None, None, tokens, 0, block_table.stride(0), most, heads, requests,
        tiles, per_group, scale, inner, options.window, options.sinks, ROWS=rows, PAGE=key_cache.shape[1], LEAF=leaf, LEVELS=LEVELS, num_warps=warps, num_stages=stages,
        **constants(query, causal),
    )  # fmt: skip


@entry
@triton.jit(do_not_specialize=["tokens", "slots"])
def append_kernel(
    key_ptr, value_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, tokens, slots, key_s, key_h, value_s, value_h,
    k_b, k_s, k_h, v_b, v_s, v_h, PAGE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of TOKENS, heads."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + token, mask=token < tokens, other=-1).to(tl.int64)
    dim = tl.arange(0, WIDTH)
    inside = ((slot >= 0) & (slot < slots))[:, None] & (dim < DIM)[None, :]
    page, row, token = slot // PAGE, slot % PAGE, token.to(tl.int64)
    key = tl.load(key_ptr + (token * key_s + head * key_h)[:, None] + dim[None, :], mask=inside, other=0.0)
    value = tl.load(value_ptr + (token * value_s + head * value_h)[:, None] + dim[None, :], mask=inside, other=0.0)
    tl.store(k_cache_ptr + (page * k_b + row * k_s + head * k_h)[:, None] + dim[None, :], key, mask=inside)
    tl.store(v_cache_ptr + (page * v_b + row * v_s + head * v_h)[:, None] + dim[None, :], value, mask=inside)


@on_device_of_first
def append(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """key, value [t, g, d] of unit stride in d, slot_mapping [t], contiguous, into caches [pages, page size, g, d] of unit stride in d. A
    token whose slot is below 0, or past the cache, is left out."""
    tokens, heads, width = key.shape
    if not key.numel():
        return
    padded = triton.next_power_of_2(width)
    block = max(1, min(_ELEMENTS // padded, triton.next_power_of_2(tokens)))
    append_kernel[(ceil_div(tokens, block), heads)](
        key, value, key_cache, value_cache, slot_mapping, tokens, key_cache.shape[0] * key_cache.shape[1], *key.stride()[:2],
        *value.stride()[:2], *(s for t in (key_cache, value_cache) for s in t.stride()[:3]),
        PAGE=key_cache.shape[1], DIM=width, WIDTH=padded, TOKENS=block, num_warps=4,
    )  # fmt: skip

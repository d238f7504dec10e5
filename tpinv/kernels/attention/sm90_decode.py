"""The decode of kernels/attention/decode.py on Hopper, in one launch: the host side of csrc/sm90_decode.cu.

A block is a multiprocessor's: it has blocks of keys and values under way while it computes, the next unit's too, but no more of them than
memory needs to be busy: whoever else asks the L2 cache, such as a finished unit that announces itself, waits behind them. Which of the two kernels computes a request is in no bit; this one is used where its bytes were found to be those of the other
(decode.py).

Scratch, in fp32: units x key heads x rows x (width + 4), as many units as decode.py says; counters: nodes in units of leaves, and requests x
tiles x key heads.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from tpinv import contract
from tpinv.runtime import cuda
from tpinv.runtime.device import ceil_div, current_stream
from tpinv.runtime.state import device_state

SOURCE = "sm90_decode.cu"
ROWS = (8, 16)  # of a tile
REQUESTS = 1024  # at most: kMost of the source
_THREADS = 384
_SHARED_LIMIT = 232448  # bytes a block may have on sm_90
_STAGES, _FEWEST = 16, 4
_UNDER_WAY = 80 << 10  # bytes of stages


class Spec(NamedTuple):
    """What is compiled in."""

    width: int
    rows: int
    dtype: torch.dtype

    @property
    def fixed_bytes(self) -> int:
        """Of struct Shared but for its barriers, with room for alignment."""
        of_blocks = contract.ATTENTION_LEAF // contract.ATTENTION_BLOCK * self.rows * (128 + 16)
        return 1024 + of_blocks + self.rows * (8 * self.width + 48) + 16 * REQUESTS + 256

    @property
    def stages(self) -> int:
        fit = (_SHARED_LIMIT - self.fixed_bytes) // (self.stage_bytes + 16)
        return min(_STAGES, fit, max(_FEWEST, _UNDER_WAY // self.stage_bytes))

    @property
    def stage_bytes(self) -> int:
        return contract.ATTENTION_BLOCK * 128 * ceil_div(self.width, 64)

    @property
    def shared_bytes(self) -> int:
        return self.fixed_bytes + self.stages * (self.stage_bytes + 16)

    @property
    def macros(self) -> tuple[tuple[str, int], ...]:
        return (
            ("DIM", self.width), ("NT", self.rows // 8), ("STAGES", self.stages), ("FP16", int(self.dtype == torch.float16)),
            ("SHARED_BYTES", self.shared_bytes), ("PARAMS_BYTES", ctypes.sizeof(_Params)),
            ("BLOCK_KEYS", contract.ATTENTION_BLOCK), ("LEAF_KEYS", contract.ATTENTION_LEAF), ("NODE_LEAVES", contract.ATTENTION_NODE),
        )  # fmt: skip


class _Params(ctypes.Structure):
    """struct Params of the source, field by field."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "out", "acc", "sums", "arrived", "table", "starts", "lens")),
        *((n, ctypes.c_longlong) for n in ("q_s", "q_h", "o_s", "o_h", "table_s")),
        *((n, ctypes.c_int) for n in ("requests", "tokens", "heads", "per_group", "most", "longest", "page", "causal", "elsewhere")),
        *((n, ctypes.c_int) for n in ("enough", "limit", "tiles", "nodes")),
        ("scale", ctypes.c_float),
    ]


def spec_for(query: Tensor, key_cache: Tensor, value_cache: Tensor, requests: int, most: int, out: Tensor) -> Spec | None:
    """What computes these; None if this kernel does not."""
    width, rows = query.shape[2], most * (query.shape[1] // key_cache.shape[2])
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or width % 16 or width > 256 or not 0 < requests <= REQUESTS:
        return None
    if device_state(query.get_device()).capability != (9, 0) or cuda.missing(SOURCE) or rows > ROWS[-1]:
        return None
    # what the copy engine asks for, and stores of 8 bytes
    for t, multiple in ((key_cache, 8), (value_cache, 8), (query, 8), (out, 4)):
        if t.data_ptr() % (2 * multiple) or any(s % multiple or not s < 1 << 36 for s in t.stride()[:-1]):
            return None
    if any(s == 0 and n > 1 for t in (key_cache, value_cache) for s, n in zip(t.stride(), t.shape, strict=True)):
        return None
    return Spec(width, next(n for n in ROWS if rows <= n), query.dtype)


def _map(cache: Tensor):
    """For copies of 16 rows of a page by 64 columns of a head: d, head, row, page."""
    page_s, row_s, head_s, _ = cache.stride()
    sizes = tuple(reversed(cache.shape))
    strides = tuple(8 if n == 1 else s for s, n in zip((head_s, row_s, page_s), sizes[1:], strict=True))  # legal where never stepped over
    return cuda.tensor_map(cache.data_ptr(), cache.dtype, sizes, strides, (64, 1, 16, 1))


def run(
    spec: Spec, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    most: int, longest: int, scale: float, causal: bool, out: Tensor, elsewhere: bool, limit: int, enough: int | None = None,
) -> None:  # fmt: skip
    """decode.decode, for what :func:`spec_for` gave ``spec``. ``scale`` includes log2(e). ``limit``: units of leaves at most; ``enough``: units
    of nodes from which on they are used."""
    (tokens, heads, width), (_, page, key_heads, _), requests = query.shape, key_cache.shape, len(seq_lens)
    per_group, index = heads // key_heads, query.get_device()
    state, tiles = device_state(index), ceil_div(most * per_group, spec.rows)
    of_each = requests * tiles * key_heads
    most_nodes = of_each * ceil_div(longest, contract.ATTENTION_LEAF * contract.ATTENTION_NODE)
    items = max(min(of_each * ceil_div(longest, contract.ATTENTION_LEAF), limit), most_nodes)
    nodes = min(most_nodes, limit)
    scratch = query.new_empty(items * spec.rows * (width + 4), dtype=torch.float32)
    arrived = state.counters.take(nodes + of_each)
    acc = scratch.data_ptr()
    params = _Params(
        query.data_ptr(), out.data_ptr(), acc, acc + 4 * items * spec.rows * width, arrived.data_ptr(), block_table.data_ptr(),
        query_start_loc.data_ptr(), seq_lens.data_ptr(), *query.stride()[:2], *out.stride()[:2], block_table.stride(0), requests, tokens,
        key_heads, per_group, most, longest, page, causal, elsewhere, 3 * state.multiprocessors // 4 if enough is None else enough, limit, tiles, nodes, scale,
    )  # fmt: skip
    maps = [_map(cache) for cache in (key_cache, value_cache)]
    function = cuda.load(SOURCE, "decode", spec.macros, "sm_90a", spec.shared_bytes, index)
    grid = max(1, min(items, state.multiprocessors))
    cuda.launch(function, grid, _THREADS, spec.shared_bytes, current_stream(index), *maps, params, early=True)

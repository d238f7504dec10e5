"""Attention's forward on Hopper: the host side of csrc/sm90_attention.cu, which has the bytes of kernels/attention/forward.py.

What a configuration may choose (slots of the copy pipeline, whether warpgroups take turns) moves work around and
no bit. :func:`forward` is used only after :func:`verified` compared the very kernel that will run with the Triton kernel on this chip.
"""

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tpinv import contract
from tpinv.reference.attention import LOG2E, Pack
from tpinv.runtime import cuda
from tpinv.runtime.device import ceil_div, current_stream, on_device_of_first
from tpinv.runtime.state import device_state

SOURCE = "sm90_attention.cu"
MOST_TILES = 1 << 30
FEWEST_ROWS = 65  # fewer, and half of every tile is empty
ROWS, _BLOCK = 128, contract.ATTENTION_BLOCK  # queries of a tile, keys of a slot
_THREADS, _CONSUMERS = 384, 256
_SHARED_LIMIT = 232448  # bytes a block may have on sm_90
_SECTION_BYTES = 24 << 20  # keys and values that tiles work on at a time: about half of the L2 cache
NODE = contract.ATTENTION_LEAF * contract.ATTENTION_NODE


@dataclass(frozen=True)
class Config:
    stages: int
    pingpong: bool = True

    def shared_bytes(self, width: int) -> int:
        return 1024 + (self.stages + 2) * _BLOCK * width * 2 + 16 * _CONSUMERS + 128 + 16 * self.stages + 32


CHOICES = {64: Config(22), 128: Config(11)}  # by padded width


def padded_width(width: int) -> int:
    return 64 if width <= 64 else 128


def choice(width: int) -> Config:
    return CHOICES[padded_width(width)]


class _Params(ctypes.Structure):
    """struct Params of the source, field by field."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("out", "lse", "scratch", "turn", "cu_q", "cu_k", "first_q", "first_k", "v")),
        *((n, ctypes.c_longlong) for n in ("out_row", "out_batch", "out_head", "v_row", "v_head")),
        *((n, ctypes.c_int) for n in ("q_rows", "k_rows", "per_group", "levels", "width")),
        ("scale", ctypes.c_float),
        *((n, ctypes.c_int) for n in ("heads", "sequences", "tiles", "section")),
    ]


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and device_state(device.index).capability == (9, 0)


def refuses_operands(source: str, q: Tensor, *others: Tensor) -> str | None:
    """Why kernels of this kind cannot read these [s, b, heads, d]; None when they can."""
    if not _is_hopper(q.device):
        return "needs compute capability 9.0"
    if cuda.missing(source):
        return cuda.missing(source)
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, got {q.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"needs heads of width 8, 16, ..., 128, got {q.shape[-1]}"
    for t in (q, *others):
        steps = [s for s, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1]
        if t.data_ptr() % 16 or any(s % 8 or s <= 0 for s in steps):
            return "copies need tensors that are aligned to 16 bytes, and rows that lie a multiple of 8 elements apart"
    return None


def refuses(q: Tensor, k: Tensor, v: Tensor, pack: Pack | None = None) -> str | None:
    """Why this kernel cannot compute these; None when it can. Decides speed only: the Triton kernel has the same bits."""
    if why := refuses_operands(SOURCE, q, k, v):
        return why
    longest, sequences = (len(q), q.shape[1]) if pack is None else (pack.longest_q, len(pack.cu_q) - 1)
    if longest < FEWEST_ROWS:
        return f"is made for tiles of {ROWS} queries"
    if ceil_div(longest, ROWS) * q.shape[2] * sequences >= MOST_TILES:
        return f"counts up to {MOST_TILES} tiles"
    return None


def macros(width: int, dtype: torch.dtype, causal: bool, packed: bool, tree: bool, config: Config) -> dict[str, int]:
    return {
        "WIDTH": padded_width(width), "IN_FP16": int(dtype == torch.float16), "CAUSAL": int(causal), "PACKED": int(packed),
        "TREE": int(tree), "STAGES": config.stages, "PINGPONG": int(config.pingpong), "LEAF_BLOCKS": contract.ATTENTION_LEAF // _BLOCK,
        "NODE_BLOCKS": NODE // _BLOCK,
    }  # fmt: skip


def box_of(t: Tensor) -> tuple:
    """What cuda.tensor_map takes after the address, for [s, b, heads, d]: copies bring 64 rows of 64 columns."""
    rows, batch, heads, width = t.shape
    sizes, strides = (width, rows, heads, batch), (t.stride(0), t.stride(2), t.stride(1))
    # A dimension of size one is never stepped over, but its stride must still be a legal one.
    strides = tuple(8 if n == 1 else s for s, n in zip(strides, sizes[1:], strict=True))
    return t.dtype, sizes, strides, (64, _BLOCK, 1, 1)


@dataclass(frozen=True)
class _Plan:
    """What a launch needs and no pointer decides."""

    function: ctypes.c_void_p
    grid: int
    shared: int
    scratch: int  # floats
    params: bytes
    boxes: tuple[tuple, tuple, tuple]


def _plan(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, pack: Pack | None, config: Config) -> _Plan | None:
    """None when there is nothing to compute."""
    (q_rows, batch, heads, width), (k_rows, _, groups, _) = q.shape, k.shape
    longest_q, longest_k, sequences = (q_rows, k_rows, batch) if pack is None else (pack.longest_q, pack.longest_k, len(pack.cu_q) - 1)
    tiles, padded = ceil_div(longest_q, ROWS), padded_width(width)
    if not tiles * heads * sequences:
        return None
    per_group, levels = heads // groups, max(0, ceil_div(longest_k, NODE) - 1).bit_length()
    arguments = tuple(macros(width, q.dtype, causal, pack is not None, levels > 0, config).items())
    shared = config.shared_bytes(padded)
    grid = min(device_state(q.device.index).multiprocessors, tiles * heads * sequences)
    section = max(1, _SECTION_BYTES // max(1, 4 * width * longest_k)) * per_group
    params = _Params(
        v_row=v.stride(0), v_head=v.stride(2), q_rows=q_rows, k_rows=k_rows, per_group=per_group, levels=levels, width=width,
        scale=scale * LOG2E, heads=heads, sequences=sequences, tiles=tiles, section=min(section, heads * sequences),
    )  # fmt: skip
    return _Plan(
        function=cuda.load(SOURCE, "attention", arguments, "sm_90a", shared, q.device.index),
        grid=grid,
        shared=shared,
        scratch=grid * levels * (padded // 8 + 1) * _CONSUMERS * 4,
        params=bytes(params),
        boxes=(box_of(q), box_of(k), box_of(v)),
    )


@on_device_of_first
def run(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, pack: Pack | None, config: Config | None = None
) -> None:
    """Fills ``out`` and ``lse``, on the current stream. The caller has asked :func:`refuses`. ``config``: default :func:`choice`."""
    state, config = device_state(q.device.index), config or choice(q.shape[-1])
    key = (*_kind(q, k, v, causal, pack), scale, config)
    if key not in state.plans:
        state.plans[key] = _plan(q, k, v, scale, causal, pack, config)
    plan = state.plans[key]
    if plan is None:
        return
    params = _Params.from_buffer_copy(plan.params)
    params.out, params.lse, params.turn, params.v = out.data_ptr(), lse.data_ptr(), state.counters.take(2).data_ptr(), v.data_ptr()
    params.out_row, params.out_batch, params.out_head, _ = out.stride()
    if plan.scratch:
        scratch = q.new_empty(plan.scratch, dtype=torch.float32)  # freed after the launch: what takes it on this stream comes later
        params.scratch = scratch.data_ptr()
    if pack is not None:
        params.cu_q, params.cu_k, params.first_q, params.first_k = (t.data_ptr() for t in pack[:4])
    maps = [cuda.tensor_map(t.data_ptr(), *box) for t, box in zip((q, k, v), plan.boxes, strict=True)]
    cuda.launch(plan.function, plan.grid, _THREADS, plan.shared, current_stream(q.device.index), *maps, params)


def _kind(q: Tensor, k: Tensor, v: Tensor, causal: bool, pack: Pack | None) -> tuple:
    """All that decides, but for addresses and the scale, what is launched."""
    lengths = None if pack is None else (len(pack.cu_q), pack.longest_q, pack.longest_k)
    return SOURCE, q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride(), causal, lengths


def admits(q: Tensor, k: Tensor, v: Tensor, causal: bool, pack: Pack | None, truth: Callable) -> bool:
    """Whether :func:`run` may compute these: it can, and was seen to give the bytes of ``truth``, another forward."""
    device = q.device
    if device.type != "cuda":
        return False
    calls = device_state(device.index).calls
    key = (*_kind(q, k, v, causal, pack), (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16)
    known = calls.get(key)
    if known is None:
        known = refuses(q, k, v, pack) is None and verified(q, k, causal, pack, truth)
        if not torch.cuda.is_current_stream_capturing():  # then nothing could be asked
            calls[key] = known
    return known


# -- has it the bytes of the Triton kernel? -----------------------------------------------------------------------------------------


def verified(q: Tensor, k: Tensor, causal: bool, pack: Pack | None, truth: Callable) -> bool:
    """Whether the kernel that computes these gives the bytes of ``truth``, another forward, for hostile operands of a few hundred rows and, if
    there is a tree, three nodes of keys. Asked once for each compiled kernel and width; while a CUDA graph is captured it cannot be asked,
    and what is not known is not used."""
    width, longest = q.shape[-1], len(k) if pack is None else pack.longest_k
    key = (SOURCE, width, *macros(width, q.dtype, causal, pack is not None, longest > NODE, choice(width)).items())
    known = device_state(q.device.index).verified
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return False
        known[key] = _agrees(width, q.dtype, causal, pack is not None, longest > NODE, q.device, truth)
    return known[key]


def _agrees(width: int, dtype: torch.dtype, causal: bool, packed: bool, tree: bool, device: torch.device, truth: Callable) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def make(rows: int, batch: int, heads: int) -> Tensor:
        x = torch.randn(rows, batch, heads, width, device=device, generator=generator)
        return (x * torch.exp2(torch.randint(-3, 3, x.shape, device=device, generator=generator).float())).to(dtype)

    def same(queries: int, keys: int, batch: int, pack: Pack | None = None) -> bool:
        q, k, v = make(queries, batch, 4), make(keys, batch, 2), make(keys, batch, 2)
        if pack is not None:  # behind the last sequence there may be anything
            k[-1], v[-1] = float("nan"), float("nan")
        found = torch.full_like(q, float("nan")), q.new_full((batch, 4, queries), float("nan"), dtype=torch.float32)
        run(q, k, v, *found, width**-0.5, causal, pack)
        expected = truth(q, k, v, width**-0.5, causal, pack)
        inside = slice(None) if pack is None else slice(0, int(pack.cu_q[-1]))
        pairs = [(found[0][inside], expected[0][inside]), (found[1][..., inside], expected[1][..., inside])]
        return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)

    if not packed:
        lengths = [(300, 2 * NODE + 100), (200, 3 * NODE)] if tree else [(700, 700), (300, 1100), (129, NODE)]
        return all(same(queries, keys, 2) for queries, keys in lengths)

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    queries, keys = [130, 0, 65, 1], [2 * NODE + 70, 0, NODE + 1, 600] if tree else [700, 0, 65, 600]
    cu_q, cu_k = starts(queries), starts(keys)
    pack = Pack(cu_q, cu_k, cu_q, cu_k, max(queries), max(keys))
    return same(sum(queries) + 1, sum(keys) + 1, 1, pack)

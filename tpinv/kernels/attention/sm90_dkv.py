"""Gradients of attention's keys and values on Hopper: the host side of csrc/sm90_attention_dkv.cu, which has the bytes of
kernels/attention/backward.py's dkv_kernel: a query head's part of dk and dv.

:func:`run` is used only after :func:`admits` compared the very kernel that will run with the Triton kernel on this chip. Packs are Triton's.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from tpinv.kernels.attention import sm90
from tpinv.reference.attention import LOG2E, Pack
from tpinv.runtime import cuda
from tpinv.runtime.device import ceil_div, current_stream
from tpinv.runtime.state import device_state

SOURCE = "sm90_attention_dkv.cu"
KEYS, _BLOCK = 128, 64  # of a tile, of a warpgroup; queries of a slot are as many
STAGES = {64: 8, 128: 4}  # by padded width
_THREADS = 384
_SECTION_BYTES = 24 << 20  # queries and output gradients that tiles work on at a time: about half of the L2 cache


class _Params(ctypes.Structure):
    """struct Params of the source, field by field."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("dk", "dv", "lse", "delta")),
        *((n, ctypes.c_longlong) for n in ("out_row", "out_batch", "out_head")),
        *((n, ctypes.c_int) for n in ("queries", "keys", "per_group", "width")),
        ("scale", ctypes.c_float),
        ("out_scale", ctypes.c_float),
        *((n, ctypes.c_int) for n in ("heads", "sequences", "tiles", "section")),
    ]


def shared_bytes(width: int) -> int:
    padded = sm90.padded_width(width)
    tile, stages = 2 * _BLOCK * padded, STAGES[padded]
    return 1024 + 4 * tile + stages * (2 * tile + 8 * _BLOCK + 16) + 8


def macros(width: int, dtype: torch.dtype, causal: bool, parts: bool) -> dict[str, int]:
    padded = sm90.padded_width(width)
    return {"WIDTH": padded, "IN_FP16": int(dtype == torch.float16), "CAUSAL": int(causal), "PARTS": int(parts), "STAGES": STAGES[padded]}


def refuses(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, pack: Pack | None) -> str | None:
    """Why this kernel cannot compute these; None when it can."""
    if pack is not None:
        return "takes no packs"
    if why := sm90.refuses_operands(SOURCE, q, k, v, dout):
        return why
    if min(len(q), len(k)) < _BLOCK:
        return f"is made for {_BLOCK} queries and keys, and more"
    if ceil_div(len(k), KEYS) * q.shape[2] * q.shape[1] >= sm90.MOST_TILES:
        return f"counts up to {sm90.MOST_TILES} tiles"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, scale: float, causal: bool
) -> None:
    """Fills dk and dv [keys, b, heads of q, d], fp32 or, where a key head has one query head, of the operands' type. The caller has asked
    :func:`admits`. They have the same strides; lse and delta [b, heads, queries] are contiguous."""
    (queries, batch, heads, width), (keys, _, groups, _), index = q.shape, k.shape, q.device.index
    parts, tiles = dk.dtype == torch.float32, ceil_div(keys, KEYS)
    section = max(1, _SECTION_BYTES // (4 * width * queries))
    params = _Params(
        dk.data_ptr(), dv.data_ptr(), lse.data_ptr(), delta.data_ptr(), *dk.stride()[:3], queries, keys, heads // groups, width,
        scale * LOG2E, scale, heads, batch, tiles, min(section, heads * batch),
    )  # fmt: skip
    shared = shared_bytes(width)
    function = cuda.load(SOURCE, "dkv", tuple(macros(width, q.dtype, causal, parts).items()), "sm_90a", shared, index)
    maps = [cuda.tensor_map(t.data_ptr(), *sm90.box_of(t)) for t in (q, k, v, dout)]
    cuda.launch(function, tiles * heads * batch, _THREADS, shared, current_stream(index), *maps, params)


def admits(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, pack: Pack | None, truth: Callable) -> bool:
    """Whether :func:`run` may compute these: it can, and was seen to give the bytes of ``truth``, which takes the same arguments. Asked once for
    each compiled kernel and width; while a CUDA graph is captured it cannot be asked, and what is not known is not used."""
    if q.device.type != "cuda" or refuses(q, k, v, dout, pack) is not None:
        return False
    width, parts = q.shape[3], q.shape[2] != k.shape[2]
    key = (SOURCE, width, *macros(width, q.dtype, causal, parts).items())
    known = device_state(q.device.index).verified
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return False
        known[key] = _agrees(width, q.dtype, causal, parts, q.device, truth)
    return known[key]


def _agrees(width: int, dtype: torch.dtype, causal: bool, parts: bool, device: torch.device, truth: Callable) -> bool:
    """Hostile operands of a few hundred rows: around tiles, more keys than queries, and without causality fewer; two of a batch."""
    generator = torch.Generator(device).manual_seed(0)

    def make(rows: int, heads: int) -> Tensor:
        x = torch.randn(rows, 2, heads, width, device=device, generator=generator)
        return (x * torch.exp2(torch.randint(-3, 1, x.shape, device=device, generator=generator).float())).to(dtype)

    heads, per_group = 4, 2 if parts else 1
    for queries, keys in ((300, 300), (129, 700), (640, 640), (500, 65 if not causal else 577)):
        q, k, v, dout = make(queries, heads), make(keys, heads // per_group), make(keys, heads // per_group), make(queries, heads)
        # Not of these operands: weights of any size.
        lse = 6 * torch.randn(2, heads, queries, device=device, generator=generator) + 12
        delta = torch.randn(2, heads, queries, device=device, generator=generator)
        found, expected = (
            torch.full((2, keys, 2, heads, width), float("nan"), device=device, dtype=torch.float32 if parts else dtype) for _ in range(2)
        )
        run(q, k, v, dout, lse, delta, *found, width**-0.5, causal)
        truth(q, k, v, dout, lse, delta, *expected, width**-0.5, causal)
        if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            return False
    return True

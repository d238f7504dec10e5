"""The large-M tree GEMM on Hopper: the host side of csrc/sm90_tree_gemm.cu.

What a configuration may choose (tile width, stages, clusters, where pending values are parked, how the last wave is split)
moves work around and no bit; the tuner holds every configuration to that before it is used.
"""

import ctypes
import functools
from dataclasses import asdict, dataclass

import torch

from tpinv.kernels import cuda
from tpinv.kernels.counters import arrivals
from tpinv.kernels.problem import Problem

_SOURCE = "sm90_tree_gemm.cu"
_BM, _BK, _THREADS, _CONSUMERS = 128, 64, 384, 256
_SHARED_LIMIT = 232448  # bytes a block may have on sm_90
_OUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_LEAVES = 64


@dataclass(frozen=True)
class Sm90Config:
    """cols: width of a tile. cluster: blocks that share B. parts: subtrees a tile of the last partial wave is split into."""

    cols: int
    stages: int
    cluster: int
    shared_slots: int
    parts: int
    group: int = 8

    @property
    def name(self) -> str:
        return "sm90-" + "-".join(str(v) for v in asdict(self).values())

    def shared_bytes(self, depth: int) -> int:
        top = 64 if depth > 0 and self.cols == 256 else 0
        slots = self.shared_slots if depth > 1 else 0
        return 1024 + self.stages * (_BM + self.cols) * _BK * 2 + slots * self.cols * 512 + top * _CONSUMERS * 4 + 16 * self.stages


class _Params(ctypes.Structure):
    """struct Params of the source, field by field."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("out", "bias", "scratch", "parts", "arrivals")),
        ("out_stride", ctypes.c_longlong),
        *((n, ctypes.c_int) for n in ("rows", "cols", "leaves", "pieces", "steps", "tiles_m", "tiles_n", "whole", "group")),
        ("merges", ctypes.c_ubyte * MAX_LEAVES),
        ("part_merges", ctypes.c_ubyte * MAX_LEAVES),
    ]


def refuses(problem: Problem) -> str | None:
    """Why this kernel cannot compute ``problem``; None when it can. Decides speed only: another kernel has the same bits."""
    a, b, out = problem.a, problem.b, problem.out
    if torch.cuda.get_device_capability(a.device) != (9, 0):
        return "needs compute capability 9.0"
    if a.dtype not in (torch.bfloat16, torch.float16) or out.dtype not in (a.dtype, torch.float32, torch.bfloat16):
        return f"needs bf16 or fp16 inputs, got {a.dtype} -> {out.dtype}"
    if problem.leaves > MAX_LEAVES:
        return f"holds at most {MAX_LEAVES} leaves, got {problem.leaves}"
    if problem.cols % 8 or out.stride(0) % 8 or out.data_ptr() % 16:
        return "writes rows of out in 16-byte pieces"
    for t, major in zip((a, b), problem.major, strict=True):
        if t.stride(major ^ 1) != 1 or t.stride(major) % 8 or t.data_ptr() % 16:
            return "copies need one unit stride, the other a multiple of 8 elements, and 16-byte alignment"
        if (problem.leaves > 1 or problem.pieces > 1) and (problem.length * t.stride(1)) % 8:
            return f"leaves of {problem.length} do not start on 16 bytes"
    return None


def _operand_map(t: torch.Tensor, major: int, rows: int, problem: Problem):
    """``rows``: how many rows of ``t`` one copy brings (when k is contiguous), or how many k (when rows are)."""
    leaf, piece = problem.length * t.stride(1), problem.piece_stride * t.stride(1)
    if major == 0:
        sizes = (problem.length, problem.leaves, problem.pieces, t.shape[0])
        strides, box = (leaf, piece, t.stride(0)), (_BK, 1, 1, rows)
    else:
        sizes = (t.shape[0], problem.length, problem.leaves, problem.pieces)
        strides, box = (t.stride(1), leaf, piece), (64, rows, 1, 1)
    # A dimension of size one is never stepped over, but its stride must still be a legal one.
    strides = tuple(8 if n == 1 else s for s, n in zip(strides, sizes[1:], strict=True))
    return cuda.tensor_map(t.data_ptr(), t.dtype, sizes, strides, box)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(problem: Problem, config: Sm90Config) -> None:
    """Fills ``problem.out`` on the current stream. The caller has asked :func:`refuses` and checked the split."""
    device, depth = problem.a.device, problem.depth
    major_a, major_b = problem.major
    macros = {
        "BN": config.cols, "STAGES": config.stages, "CLUSTER": config.cluster, "DEPTH": depth,
        "A_MAJOR": major_a, "B_MAJOR": major_b, "IN_FP16": int(problem.a.dtype == torch.float16),
        "OUT": _OUT[problem.out.dtype], "NODE_BF16": int(problem.node_bf16), "BIAS": int(problem.bias is not None),
        "SHARED_SLOTS": config.shared_slots, "SPLIT": config.parts,
    }  # fmt: skip
    shared = config.shared_bytes(depth)
    function = cuda.load(_SOURCE, "tree_gemm", tuple(macros.items()), "sm_90a", shared, device.index)

    blocks = _multiprocessors(device.index) // config.cluster * config.cluster
    tiles_m = -(-problem.rows // (_BM * config.cluster))
    tiles_n = -(-problem.cols // config.cols)
    tiles, clusters = tiles_m * tiles_n, blocks // config.cluster
    whole = tiles if config.parts == 1 else tiles // clusters * clusters
    split_tiles = tiles - whole
    tile_values = config.cluster * _BM * config.cols
    stream = torch.cuda.current_stream(device).cuda_stream

    scratch = torch.empty(blocks * _BM * config.cols * depth if depth > 1 else 0, dtype=torch.float32, device=device)
    parts = torch.empty(split_tiles * config.parts * tile_values, dtype=torch.float32, device=device)
    counters = arrivals(split_tiles * config.cluster * 2, device) if split_tiles else parts
    bias = problem.bias.data_ptr() if problem.bias is not None else None
    params = _Params(
        problem.out.data_ptr(), bias, scratch.data_ptr(), parts.data_ptr(), counters.data_ptr(), problem.out.stride(0),
        problem.rows, problem.cols, problem.leaves, problem.pieces, -(-problem.length // _BK), tiles_m, tiles_n, whole,
        max(1, config.group // config.cluster),
    )  # fmt: skip
    params.merges[: problem.leaves] = problem.merges
    part = problem.splits[config.parts]
    params.part_merges[: len(part)] = part

    map_a = _operand_map(problem.a, major_a, _BK if major_a else _BM, problem)
    map_b = _operand_map(problem.b, major_b, (_BK if major_b else config.cols) // config.cluster, problem)
    units = whole + split_tiles * config.parts
    grid = min(blocks, units * config.cluster)
    cuda.launch(function, grid, _THREADS, shared, stream, map_a, map_b, params)


def candidates(problem: Problem) -> list[Sm90Config]:
    """Configurations worth timing for ``problem``."""
    depth = problem.depth
    found = []
    for cols, slots in ((256, 0), (192, 0), (192, 1), (128, 0), (128, 1)):
        if slots and depth < 2:
            continue  # nothing to park
        for cluster in (2, 1):
            for parts in problem.splits:
                for stages in (5, 4, 3):
                    config = Sm90Config(cols, stages, cluster, slots, parts)
                    if config.shared_bytes(depth) + 64 <= _SHARED_LIMIT:
                        found.append(config)
                        break
    return found

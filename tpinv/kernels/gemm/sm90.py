"""The large-M tree GEMM on Hopper: the host side of csrc/sm90_tree_gemm.cu.

What a configuration may choose (tile width, stages, clusters, where pending values are parked, how the last wave is split)
moves work around and no bit; the tuner holds every configuration to that before it is used.
"""

import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from tpinv.kernels.gemm.problem import Problem, most_pending, most_pending_pairs
from tpinv.runtime import cuda
from tpinv.runtime.device import current_stream
from tpinv.runtime.state import device_state

SOURCE = "sm90_tree_gemm.cu"
STEP = 64  # of k
_BM, _THREADS, _CONSUMERS = 128, 384, 256
_SHARED_LIMIT = 232448  # bytes a block may have on sm_90
_OUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_LEAVES = 64
EVERY_LANE_ARRIVES = 0  # 1 to run under compute-sanitizer --tool racecheck, see the source


def _room(cols: int) -> int:
    """Positions of the stack that fit in registers for tiles of this width: kRoom of the source."""
    return 2 if cols <= 64 else 0 if cols == 192 else 1


@dataclass(frozen=True)
class Sm90Config:
    """cols: width of a tile. cluster: blocks that share B. parts: subtrees a tile of the last partial wave is split into.
    swap: tiles of 128 features by ``cols`` tokens instead of 128 tokens by ``cols`` features."""

    cols: int
    stages: int
    cluster: int
    shared_slots: int
    parts: int
    swap: bool = False
    group: int = 8

    @property
    def name(self) -> str:
        return "sm90-" + "-".join(str(int(v)) for v in asdict(self).values())

    def stack_depth(self, merges: tuple[int, ...]) -> int:
        """DEPTH of the source: tiles up to 192 columns have accumulators for a leaf and its sibling."""
        return most_pending_pairs(merges) if self.cols <= 192 else most_pending(merges)

    def spills(self, merges: tuple[int, ...]) -> bool:
        """Whether positions of the stack remain that are not in registers."""
        return self.stack_depth(merges) > _room(self.cols)

    def shared_bytes(self, merges: tuple[int, ...]) -> int:
        held_shared = 64 * _CONSUMERS * 4 if self.cols == 256 and self.stack_depth(merges) > 0 else 0
        slots = self.shared_slots * self.cols * 512 if self.spills(merges) else 0
        return 1024 + self.stages * (_BM + self.cols) * STEP * 2 + slots + held_shared + 16 * self.stages + 8 * self.stack_depth(merges)


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
    if cuda.missing(SOURCE):
        return cuda.missing(SOURCE)
    if a.dtype not in (torch.bfloat16, torch.float16) or out.dtype not in (a.dtype, torch.float32, torch.bfloat16):
        return f"needs bf16 or fp16 inputs, got {a.dtype} -> {out.dtype}"
    if problem.leaves > MAX_LEAVES:
        return f"holds at most {MAX_LEAVES} leaves, got {problem.leaves}"
    for t, major in zip((a, b), problem.major, strict=True):
        if t.stride(major) == 0 and t.shape[major] > 1:
            return "copies need rows that lie one after another, not one row expanded"
        if t.stride(major ^ 1) != 1 or t.stride(major) % 8 or t.data_ptr() % 16:
            return "copies need one unit stride, the other a multiple of 8 elements, and 16-byte alignment"
        if (problem.leaves > 1 or problem.pieces > 1) and (problem.length * t.stride(1)) % 8:
            return f"leaves of {problem.length} do not start on 16 bytes"
    return None


def _writes_vectors(problem: Problem) -> bool:
    out = problem.out
    return problem.cols % 8 == 0 and out.stride(0) % 8 == 0 and out.data_ptr() % 16 == 0


def layout(problem: Problem) -> tuple[bool, bool]:
    """All that :func:`refuses` and :func:`fits` ask of addresses and strides."""
    return refuses(problem) is None, _writes_vectors(problem)


def fits(problem: Problem, config: Sm90Config) -> bool:
    """Whether ``config`` can write this output, hold these leaves, and find what it needs in shared memory."""
    narrow = config.cols < 64 and problem.major[0 if config.swap else 1] == 1  # copies bring 64 contiguous columns
    enough = config.shared_bytes(problem.merges) + 64 <= _SHARED_LIMIT
    return (config.swap or _writes_vectors(problem)) and not narrow and config.parts in problem.splits and enough


def _operand_box(t: torch.Tensor, major: int, rows: int, problem: Problem) -> tuple:
    """What cuda.tensor_map takes after the address. ``rows``: how many rows of ``t`` one copy brings (when k is contiguous), or how many k (when rows are)."""
    leaf, piece = problem.length * t.stride(1), problem.piece_stride * t.stride(1)
    if major == 0:
        sizes = (problem.length, problem.leaves, problem.pieces, t.shape[0])
        strides, box = (leaf, piece, t.stride(0)), (STEP, 1, 1, rows)
    else:
        sizes = (t.shape[0], problem.length, problem.leaves, problem.pieces)
        strides, box = (t.stride(1), leaf, piece), (64, rows, 1, 1)
    # A dimension of size one is never stepped over, but its stride must still be a legal one.
    strides = tuple(8 if n == 1 else s for s, n in zip(strides, sizes[1:], strict=True))
    return t.dtype, sizes, strides, box


def macros(problem: Problem, config: Sm90Config) -> dict[str, int]:
    """The specialization of the source that ``config`` needs for ``problem``."""
    major_a, major_b = reversed(problem.major) if config.swap else problem.major
    return {
        "BN": config.cols, "STAGES": config.stages, "CLUSTER": config.cluster, "DEPTH": config.stack_depth(problem.merges),
        "A_MAJOR": major_a, "B_MAJOR": major_b, "IN_FP16": int(problem.a.dtype == torch.float16),
        "OUT": _OUT[problem.out.dtype], "NODE_BF16": int(problem.node_bf16), "BIAS": int(problem.bias is not None),
        "SHARED_SLOTS": config.shared_slots, "SPLIT": config.parts, "SWAP": int(config.swap),
        "ACCUMULATE": int(problem.accumulate), "EVERY_LANE_ARRIVES": EVERY_LANE_ARRIVES,
    }  # fmt: skip


def compiled(problem: Problem, config: Sm90Config) -> tuple[tuple[str, int], ...]:
    """All that is compiled into the kernel that computes ``problem`` with ``config``; the rest it reads at run time."""
    return tuple(macros(problem, config).items())


def compile_ahead(macros: dict[str, int]) -> None:
    """Compiles into the disk cache, from any thread, without touching the GPU."""
    cuda.compile_source(SOURCE, macros, "sm_90a")


@dataclass(frozen=True)
class _Plan:
    """What a launch needs and no pointer decides."""

    function: ctypes.c_void_p
    grid: int
    shared: int
    scratch: int  # floats
    parts: int  # floats
    counters: int
    params: bytes


def _plan(
    device: int | None, config: Sm90Config, macros: tuple, rows: int, cols: int, steps: int, pieces: int,
    merges: tuple[int, ...], part_merges: tuple[int, ...], blocks: int | None,
) -> _Plan:  # fmt: skip
    shared = config.shared_bytes(merges)
    blocks = blocks or device_state(device).multiprocessors
    clusters = max(1, blocks // config.cluster)
    tiles_m, tiles_n = -(-rows // (_BM * config.cluster)), -(-cols // config.cols)
    tiles = tiles_m * tiles_n
    whole = tiles if config.parts == 1 else tiles // clusters * clusters
    split_tiles = tiles - whole
    grid = min(clusters, whole + split_tiles * config.parts) * config.cluster
    tile = _BM * config.cols
    params = _Params(
        rows=rows, cols=cols, leaves=len(merges), pieces=pieces, steps=steps, tiles_m=tiles_m, tiles_n=tiles_n, whole=whole,
        group=max(1, config.group // config.cluster),
    )  # fmt: skip
    params.merges[: len(merges)] = merges
    params.part_merges[: len(part_merges)] = part_merges
    return _Plan(
        function=cuda.load(SOURCE, "tree_gemm", macros, "sm_90a", shared, device),
        grid=grid,
        shared=shared,
        scratch=grid * tile * config.stack_depth(merges) if config.spills(merges) else 0,
        parts=split_tiles * config.parts * config.cluster * tile,
        counters=split_tiles * config.cluster * 2,
        params=bytes(params),
    )


def run(problem: Problem, config: Sm90Config, blocks: int | None = None) -> None:
    """Fills ``problem.out``, or adds to it, on the current stream. The caller has asked :func:`refuses` and :func:`fits`.

    ``blocks``: how many multiprocessors to use (default: all). It moves the boundary between whole and split tiles.
    """
    bias = None if problem.bias is None else problem.bias.data_ptr()
    launcher(problem, config, blocks)(problem.a.data_ptr(), problem.b.data_ptr(), problem.out.data_ptr(), bias)


def launcher(problem: Problem, config: Sm90Config, blocks: int | None = None) -> Callable[[int, int, int, int | None], None]:
    """:func:`run` for the addresses of a, b, out and bias; of ``problem``'s own tensors only what is no address is used."""
    device, out_dtype, out_stride, accumulate, swap = (
        problem.a.device, problem.out.dtype, problem.out.stride(0), problem.accumulate, config.swap,
    )  # fmt: skip
    sides = [(problem.a, problem.major[0]), (problem.b, problem.major[1])]
    (a, major_a), (b, major_b) = reversed(sides) if swap else sides
    key = (
        config, compiled(problem, config), a.shape[0], b.shape[0],
        -(-problem.length // STEP), problem.pieces, problem.merges, problem.splits[config.parts], blocks,
    )  # fmt: skip
    plans = device_state(device.index).plans
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = _plan(device.index, *key)
    box_a = _operand_box(a, major_a, STEP if major_a else _BM, problem)
    box_b = _operand_box(b, major_b, (STEP if major_b else config.cols) // config.cluster, problem)
    box_out = (out_dtype, (problem.cols, problem.rows, 1, 1), (out_stride, 4, 4), (32, _BM, 1, 1))

    def launch(a: int, b: int, out: int, bias: int | None) -> None:
        params = _Params.from_buffer_copy(plan.params)
        params.out, params.out_stride, params.bias = out, out_stride, bias
        keep = []  # freed to the allocator after the launch: later work on this stream comes after the kernel
        if plan.scratch:
            keep.append(torch.empty(plan.scratch, dtype=torch.float32, device=device))
            params.scratch = keep[-1].data_ptr()
        if plan.parts:
            keep.append(torch.empty(plan.parts, dtype=torch.float32, device=device))
            params.parts = keep[-1].data_ptr()
            keep.append(device_state(device.index).counters.take(plan.counters))
            params.arrivals = keep[-1].data_ptr()
        if swap:
            a, b = b, a
        map_a, map_b = cuda.tensor_map(a, *box_a), cuda.tensor_map(b, *box_b)
        map_out = cuda.tensor_map(out, *box_out) if accumulate else map_a  # else nobody's
        stream = current_stream(device.index)
        cuda.launch(plan.function, plan.grid, _THREADS, plan.shared, stream, map_a, map_b, map_out, params)

    return launch


_STAGES = (12, 10, 8, 6, 5, 4, 3)


def candidates(problem: Problem) -> list[Sm90Config]:
    """Configurations worth timing for ``problem``: those that won somewhere in docs/benchmarks.md."""
    rows, merges = problem.rows, problem.merges
    wanted: list[tuple[int, int, int, bool]] = []  # cols, cluster, parts, swap
    if rows <= 128:
        wanted += [(max(16, 1 << (rows - 1).bit_length()), 1, parts, True) for parts in problem.splits]
    if rows > 64:
        wanted += [(256, 1, 1, False), (256, 2, 1, False), (192, 1, 1, False), (192, 2, 1, False), (128, 1, 1, False), (128, 2, 1, False)]
        if rows <= 1024:
            wanted += [(128, 1, parts, False) for parts in problem.splits if parts > 1]
        if rows <= 512:
            wanted += [(64, 1, parts, False) for parts in problem.splits if parts <= 2]
    found = []
    if problem.accumulate:  # what is added to comes in boxes of 128 rows
        wanted = [(cols, cluster, parts, swap) for cols, cluster, parts, swap in wanted if cols >= 128 and parts == 1 and not swap]
    for cols, cluster, parts, swap in wanted:
        spills = Sm90Config(cols, 3, cluster, 0, parts, swap).spills(merges)
        slots = int(spills and cols <= 128)  # wider tiles get parked values back through the pipeline
        deepest = (Sm90Config(cols, stages, cluster, slots, parts, swap) for stages in _STAGES)
        found += [c for c in deepest if fits(problem, c)][:1]
    return found

"""The collectives over memory that the ranks share: fills in what csrc/tree_reduce.cu needs, and launches it."""

import ctypes
import functools

import torch
from torch import Tensor

from tpinv import reference
from tpinv.collectives import schedule
from tpinv.collectives.symmetric import BLOCKS_PER_MULTIPROCESSOR, MAX_BLOCKS, SOURCE, Workspace
from tpinv.runtime import cuda
from tpinv.runtime.state import device_state
from tpinv.tree import ReductionTree

_OUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_THREADS = 256
_NORM_THREADS = 512
_LIMIT = 4096  # calls kept, with shapes that come and go
_CHUNKS, _SHORTEST = 3, 4  # of a block in two_shot: how many at least where each has this many packs a thread


def refuses(tree: ReductionTree, ranks: int, out_dtype: torch.dtype) -> str | None:
    """Why these kernels cannot add up ``tree`` over ``ranks``; None when they can. The same on every rank."""
    values = schedule.first_values(tree, ranks)[-1]
    if values > schedule.MAX_VALUES:
        return f"{values} subtree values are more than {schedule.MAX_VALUES}"
    if out_dtype not in _OUT:
        return f"an output of {out_dtype}"
    return None


def tree_reduce(
    workspace: Workspace, values: Tensor, tree: ReductionTree, out_dtype: torch.dtype, scatter: bool, algorithm: str | None = None
) -> Tensor:
    """values [S, ...] -> their sum over all ranks, [...], or with ``scatter`` this rank's part of its dimension 0. Their device is the
    current one."""
    key = values.shape, values.dtype, tree, out_dtype, scatter, algorithm, workspace.bulk_bytes, workspace.timeout
    call = workspace.calls.get(key)
    if call is None:
        if len(workspace.calls) >= _LIMIT:
            workspace.calls.clear()
        call = workspace.calls[key] = _Call(workspace, values, tree, out_dtype, scatter, algorithm)
    return call(workspace, values)


class _Call:
    """A collective of one shape: all that addresses do not decide, found out at its first call and kept in the workspace."""

    def __init__(
        self, workspace: Workspace, values: Tensor, tree: ReductionTree, out_dtype: torch.dtype, scatter: bool, algorithm: str | None
    ):
        shape, size = values.shape[1:], workspace.size
        self.tree, self.out_dtype, self.scatter = tree, out_dtype, scatter
        self.elements = schedule.PACK // values.element_size()
        self.slices = size if scatter else 1
        self.part = shape.numel() // self.slices  # elements of a slice, and how many are added to it to fill packs
        self.padding = -self.part % self.elements
        self.shape = (shape[0] // size, *shape[1:]) if scatter else shape
        self.packs = self.slices * (self.part + self.padding) // self.elements
        self.plan = schedule.plan(
            self.packs,
            size,
            schedule.first_values(tree, size)[-1],
            self.elements * out_dtype.itemsize,
            scatter,
            algorithm,
            workspace.bulk_bytes,
        )
        self.prepared = None, ()  # the workspace's areas, and launches into them

    def __call__(self, workspace: Workspace, values: Tensor) -> Tensor:
        if self.packs == 0:
            return values.new_empty(self.shape, dtype=self.out_dtype)
        if self.padding or not values.is_contiguous() or values.data_ptr() % schedule.PACK:
            values = self._in_packs(values)
        out = values.new_empty(self.part + self.padding if self.padding else self.shape, dtype=self.out_dtype)
        self._launch(workspace, values.data_ptr(), out.data_ptr())
        return out[: self.part].view(self.shape) if self.padding else out

    def _in_packs(self, values: Tensor) -> Tensor:
        """Contiguous and aligned; packs must not straddle values or slices."""
        flat = torch.nn.functional.pad(values.reshape(len(values), self.slices, -1), (0, self.padding)).contiguous()
        return flat.clone() if flat.data_ptr() % schedule.PACK else flat

    def _launch(self, workspace: Workspace, values: int, out: int) -> None:
        areas, (known, launches) = _areas(workspace, self.plan), self.prepared
        if areas != known:  # the first call, or the workspace has grown
            launches = [self._prepare(workspace, areas, start, packs) for start, packs in self.plan.launches]
            self.prepared = areas, launches  # at once, and only when all is well
        stream = workspace.enter()
        for function, blocks, threads, prepared in launches:
            params = type(prepared).from_buffer_copy(prepared)
            params.values, params.out = values, out
            cuda.launch(function, blocks, threads, 0, stream, params)

    def _prepare(self, workspace: Workspace, areas: tuple, start: int, packs: int) -> tuple:
        one_shot = self.plan.algorithm == "one_shot"
        name = "one_shot" if one_shot else "two_shot_scatter" if self.scatter else "two_shot"
        params = _params(workspace, self.packs, self.tree, self.plan, areas, start, packs)
        blocks, threads, params.chunk = grid(packs, workspace.blocks, one_shot)
        macros = _macros(self.tree, workspace.size, self.out_dtype)
        return _function(name, macros, workspace.device.index), blocks, threads, params


def _areas(workspace: Workspace, plan: schedule.Plan) -> tuple:
    """Bytes of a slot, and every rank's slots and place for finished slices."""
    if plan.algorithm == "one_shot":
        return schedule.INBOX_BYTES, workspace.inbox, workspace.inbox
    return workspace.bulk(plan.slot_bytes, plan.gathered_bytes)


def add_norm(
    workspace: Workspace, values: Tensor, residual: Tensor, weight: Tensor, eps: float, tree: ReductionTree
) -> tuple[Tensor, Tensor] | None:
    """hidden = residual + sum of values, and its RMSNorm, in one kernel; None where that does not fit and it takes several.

    values [S, M, H], residual [M, H], weight [H]. Decided by what all ranks know alike.
    """
    rows, width = residual.shape
    elements = schedule.PACK // values.element_size()
    first = schedule.first_values(tree, workspace.size)
    words = first[-1] * residual.numel() * values.element_size() * schedule.WORD_BYTES
    row_packs = width // elements
    if rows == 0 or width % elements or row_packs > 8 * _NORM_THREADS or words > schedule.INBOX_BYTES:
        return None
    if weight.dtype not in _OUT or residual.dtype not in _OUT:
        return None
    values, residual, weight = values.contiguous(), residual.contiguous(), weight.contiguous()
    if values.data_ptr() % schedule.PACK:
        values = values.clone()
    residual = residual.clone() if residual.data_ptr() % schedule.PACK else residual
    per_thread = 1
    while row_packs > per_thread * _NORM_THREADS:
        per_thread *= 2
    threads = max(32, 1 << (-(-row_packs // per_thread) - 1).bit_length())
    hidden, normed = torch.empty_like(residual), torch.empty_like(residual)
    plan = schedule.Plan("one_shot", 0, ((0, rows * row_packs),), schedule.INBOX_BYTES, 0)
    params = _params(workspace, rows * row_packs, tree, plan, _areas(workspace, plan), 0, rows * row_packs)
    params.values, params.out = values.data_ptr(), hidden.data_ptr()
    params.residual, params.normed, params.weight = residual.data_ptr(), normed.data_ptr(), weight.data_ptr()
    # torch divides a CUDA tensor by a number by multiplying with the number's rounded inverse.
    params.eps, params.inverse_width = eps, _inverse(width)
    params.rows, params.row_packs = rows, row_packs
    macros = _macros(tree, workspace.size, hidden.dtype, per_thread, _OUT[weight.dtype])
    blocks = min(rows, max(1, workspace.blocks // BLOCKS_PER_MULTIPROCESSOR))
    cuda.launch(_function("one_shot_norm", macros, workspace.device.index), blocks, threads, 0, workspace.enter(), params)
    return hidden, normed


@functools.cache
def _inverse(width: int) -> float:
    return (torch.ones((), dtype=torch.float32) / torch.tensor(width, dtype=torch.float32)).item()


# -- what the source is given ------------------------------------------------------------------------------------------------


@functools.cache
def _params_type(ranks: int) -> type[ctypes.Structure]:
    """struct Params of the source, field by field."""

    class Params(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_uint64 * ranks) for name in ("flags", "slots", "gathered")),
            ("slot_bytes", ctypes.c_uint64),
            *((name, ctypes.c_void_p) for name in ("values", "out", "epochs", "claim", "report")),
            ("timeout_ns", ctypes.c_uint64),
            *((name, ctypes.c_longlong) for name in ("packs", "slice", "start", "count")),
            *((name, ctypes.c_int) for name in ("rank", "chunk")),
            ("first", ctypes.c_int * (ranks + 1)),
            *((name, ctypes.c_void_p) for name in ("residual", "normed", "weight")),
            *((name, ctypes.c_float) for name in ("eps", "inverse_width")),
            *((name, ctypes.c_int) for name in ("rows", "row_packs")),
        ]

    return Params


def _params(workspace: Workspace, value_packs: int, tree: ReductionTree, plan: schedule.Plan, areas: tuple, start: int, packs: int):
    """All but the addresses of tensors. ``value_packs``: of one value."""
    params = _params_type(workspace.size)()
    params.flags[:] = workspace.flags
    params.slot_bytes, params.slots[:], params.gathered[:] = areas
    params.epochs, params.claim = workspace.epochs.data_ptr(), workspace.epochs.data_ptr() + 8 * MAX_BLOCKS
    params.report, params.timeout_ns = workspace.report.data_ptr(), int(workspace.timeout * 1e9)
    params.packs, params.slice, params.start, params.count = value_packs, plan.slice, start, packs
    params.rank, params.first[:] = workspace.rank, schedule.first_values(tree, workspace.size)
    return params


@functools.cache
def _macros(tree: ReductionTree, ranks: int, out_dtype: torch.dtype, per_thread: int = 0, weight: int = 0) -> tuple:
    merges = schedule.finish_merges(tree, ranks)
    return tuple(
        {
            "RANKS": ranks, "VALUES": len(merges), "MERGES": f"{schedule.octal(merges)}ull",
            "NODE_BF16": int(reference.torch_node_dtype(tree) == torch.bfloat16), "OUT": _OUT[out_dtype],
            "PER_THREAD": per_thread, "WEIGHT": weight,
        }.items()
    )  # fmt: skip


def _function(name: str, macros: tuple, device: int) -> ctypes.c_void_p:
    major, minor = device_state(device).capability
    return cuda.load(SOURCE, name, macros, f"sm_{major}{minor}", 0, device)


def grid(packs: int, blocks: int, one_shot: bool) -> tuple[int, int, int]:
    """Blocks, threads, and packs of a thread and chunk. Found by timing two H200: a block of two_shot costs flags and fences, so that
    past 64 blocks each has several packs a thread to move; then there are longer turns."""
    threads = _THREADS // 2 if one_shot and packs <= _THREADS // 4 * blocks else _THREADS
    if not one_shot:
        blocks = min(blocks, max(64, -(-packs // (_SHORTEST * threads))))
    grid = max(1, min(blocks, -(-packs // threads)))
    turns = -(-packs // (grid * threads))
    return grid, threads, min(turns, max(_SHORTEST, -(-turns // _CHUNKS)))

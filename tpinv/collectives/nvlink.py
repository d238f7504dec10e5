"""The collectives over memory that the ranks share: fills in what csrc/tree_reduce.cu or its Triton twin needs, and launches it."""

import ctypes
import functools

import torch
from torch import Tensor

from tpinv import reference
from tpinv.collectives import schedule
from tpinv.collectives.symmetric import BLOCKS_PER_MULTIPROCESSOR, MAX_BLOCKS, SOURCE, Workspace
from tpinv.kernels import cuda
from tpinv.tree import ReductionTree

_OUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_THREADS = 256
_NORM_THREADS = 512
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
    shape, size = values.shape[1:], workspace.size
    count = shape.numel()
    if scatter:
        shape = (shape[0] // size, *shape[1:])
    if count == 0:
        return values.new_empty(shape, dtype=out_dtype)
    elements = schedule.PACK // values.element_size()
    flat = values.reshape(values.shape[0], size if scatter else 1, -1)
    part = flat.shape[2]
    if part % elements or not flat.is_contiguous() or flat.data_ptr() % schedule.PACK:  # packs must not straddle values or slices
        flat = torch.nn.functional.pad(flat, (0, -part % elements)).contiguous()
        flat = flat.clone() if flat.data_ptr() % schedule.PACK else flat
    padded = flat.shape[1] * flat.shape[2]
    out = values.new_empty(padded // size if scatter else padded, dtype=out_dtype)
    plan = schedule.plan(
        padded // elements,
        size,
        schedule.first_values(tree, size)[-1],
        elements * out.element_size(),
        scatter,
        algorithm,
        workspace.bulk_bytes,
    )
    launch = _launch_cuda if workspace.backend == "cuda" else _launch_triton
    for start, packs in plan.launches:
        launch(workspace, flat, out, tree, plan, start, packs, scatter)
    return out[: part if scatter else count].view(shape)


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
    if workspace.backend != "cuda" or rows == 0 or width % elements or row_packs > 8 * _NORM_THREADS or words > schedule.INBOX_BYTES:
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
    params = _params(workspace, values, hidden, tree, plan, 0, rows * row_packs)
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


# -- CUDA --------------------------------------------------------------------------------------------------------------------


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


def _params(workspace: Workspace, values: Tensor, out: Tensor, tree: ReductionTree, plan: schedule.Plan, start: int, packs: int):
    params = _params_type(workspace.size)()
    if plan.algorithm == "one_shot":
        params.slot_bytes, slots, gathered = schedule.INBOX_BYTES, workspace.inbox, workspace.inbox
    else:
        params.slot_bytes, slots, gathered = workspace.bulk(plan.slot_bytes, plan.gathered_bytes)
    params.flags[:], params.slots[:], params.gathered[:] = workspace.flags, slots, gathered
    params.values, params.out = values.data_ptr(), out.data_ptr()
    params.epochs, params.claim = workspace.epochs.data_ptr(), workspace.epochs.data_ptr() + 8 * MAX_BLOCKS
    params.report, params.timeout_ns = workspace.report.data_ptr(), int(workspace.timeout * 1e9)
    params.packs = values[0].numel() * values.element_size() // schedule.PACK
    params.slice, params.start, params.count = plan.slice, start, packs
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


@functools.cache
def _function(name: str, macros: tuple, device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
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


def _launch_cuda(workspace, values, out, tree, plan, start, packs, scatter) -> None:
    params = _params(workspace, values, out, tree, plan, start, packs)
    one_shot = plan.algorithm == "one_shot"
    macros = _macros(tree, workspace.size, out.dtype)
    name = "one_shot" if one_shot else "two_shot_scatter" if scatter else "two_shot"
    blocks, threads, params.chunk = grid(packs, workspace.blocks, one_shot)
    cuda.launch(_function(name, macros, workspace.device.index), blocks, threads, 0, workspace.enter(), params)


# -- Triton ------------------------------------------------------------------------------------------------------------------


def _table(workspace: Workspace, entries: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the device, and kept as long as the workspace: graphs hold its address."""
    if (entries, dtype) not in workspace.tables:
        if workspace.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError("a table for this call is not on the GPU yet; make the same call once before CUDA graph capture")
        workspace.tables[entries, dtype] = torch.tensor(entries, dtype=dtype).to(workspace.device)
    return workspace.tables[entries, dtype]


def _launch_triton(workspace, values, out, tree, plan, start, packs, scatter) -> None:
    import triton

    from tpinv.collectives import triton_kernels

    one_shot = plan.algorithm == "one_shot"
    if one_shot:
        slot_bytes, slots, gathered = schedule.INBOX_BYTES, workspace.inbox, workspace.inbox
    else:
        slot_bytes, slots, gathered = workspace.bulk(plan.slot_bytes, plan.gathered_bytes)
    merges = schedule.finish_merges(tree, workspace.size)
    left, right = schedule.children(merges)
    words = schedule.PACK // 4
    arguments = dict(
        peers_ptr=_table(workspace, (*workspace.flags, *slots, *gathered), torch.int64),
        first_ptr=_table(workspace, tuple(schedule.first_values(tree, workspace.size)), torch.int32),
        values_ptr=values.view(-1).view(torch.int32), out_ptr=out, epochs_ptr=workspace.epochs,
        report=workspace.report.data_ptr(), timeout=int(workspace.timeout * 1e9), slot_bytes=slot_bytes,
        value_words=values[0].numel() * values.element_size() // 4, slice_words=plan.slice * words, count_words=packs * words,
        rank=workspace.rank, RANKS=workspace.size, VALUES=len(merges), LEFT=left, RIGHT=right, NODE_BF16=values.dtype == torch.bfloat16,
    )  # fmt: skip
    block = 512 if one_shot else 2048
    # One program a multiprocessor: ranks that share a GPU must fit on it together, and nothing bounds the registers here.
    blocks = max(1, min(workspace.blocks // BLOCKS_PER_MULTIPROCESSOR, triton.cdiv(packs * words, block)))
    workspace.enter()
    if one_shot:
        triton_kernels.one_shot_kernel[(blocks,)](**arguments, BLOCK=block, num_warps=4)
    else:
        triton_kernels.two_shot_kernel[(blocks,)](**arguments, start_words=start * words, GATHER=not scatter, BLOCK=block, num_warps=8)

"""What a CUDA graph must not meet for the first time: products of shapes that nothing has tuned, verified or compiled yet.

The first product of a shape is measured on the GPU, which a capture forbids. In a capture a new shape takes a kernel that was verified
before, with a warning that it may be slow, or raises a RuntimeError if there is none; a collective of a new group or a longer message
raises a ValueError. So call every shape once before: by running the model, or, where only its numbers of tokens are known, by ``warmup``.
"""

from collections.abc import Iterable

import torch
from torch import nn

from tpinv.layers import ColumnParallelLinear, RowParallelLinear


def warmup(model: nn.Module, tokens: Iterable[int], *, backward: bool = False) -> int:
    """Calls every tpinv linear of ``model`` once for each number of tokens, on random numbers; with ``backward`` its gradients too.

    It is a collective: all ranks of a linear's group call it alike. Parameters and their gradients are left as they are. Attention, norms
    and losses compile at a first call as well: they have no shapes to tune, but a model whose graph holds them has to run once.

    Args:
        tokens: rows of the activations, of all ranks together (under sequence parallelism p divides them).

    Returns:
        How many calls that was: linears that differ in shape, dtype, layout, tree or group, times numbers of tokens.

    Raises:
        ValueError: no linear of tpinv in ``model``, or no number of tokens, or one below 1; what the linears raise.
        RuntimeError: in the capture of a CUDA graph.
    """
    counts = sorted(set(tokens))
    if not counts or counts[0] < 1:
        raise ValueError(f"tokens={counts} must be numbers of at least 1, such as the batch sizes that will be captured")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup comes before the capture of a CUDA graph, not in it: call it outside of torch.cuda.graph")
    linears = {_kind(m): m for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)}
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no ColumnParallelLinear or RowParallelLinear of tpinv; run the model itself once instead"
        )
    for linear in linears.values():
        for count in counts:
            _call(linear, count, backward)
    for device in {linear.weight.device for linear in linears.values() if linear.weight.is_cuda}:
        torch.cuda.synchronize(device)
    return len(linears) * len(counts)


def _kind(linear: ColumnParallelLinear | RowParallelLinear) -> tuple:
    """Linears of one kind take the same kernels."""
    w, group = linear.weight, linear.ranks.group
    return (
        type(linear), w.shape, w.stride(), w.data_ptr() % 16, w.dtype, w.device, linear.bias is None, linear.tree, linear.sequence_parallel,
        getattr(linear, "stride", 1), getattr(linear, "gather_output", False), group and group.group_name,
    )  # fmt: skip


def _call(linear: ColumnParallelLinear | RowParallelLinear, tokens: int, backward: bool) -> None:
    w = linear.weight
    gathers = linear.sequence_parallel and isinstance(linear, ColumnParallelLinear)
    rows = tokens // linear.ranks.size if gathers else tokens
    x = torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device, generator=torch.Generator(w.device).manual_seed(0))
    with torch.set_grad_enabled(backward):
        y = linear(x.requires_grad_(backward))
    if backward:
        wanted = [t for t in (x, *linear.parameters()) if t.requires_grad]
        torch.autograd.grad(y, wanted, torch.ones_like(y))

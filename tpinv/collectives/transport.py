"""torch.distributed's collectives, with a guarded wait on a CPU: one that ends when a peer will not come.

A call that all ranks make takes no longer than without: the wait is the one that torch does, in slices of a second. After the first slice
it looks at the group's board (comparison.py): a peer that refused this call, that calls something else, or has ended, is raised as an
error that names it. The collective that was begun cannot be taken back then, so the group's connections are given up: peers in it end
too, the process can exit, and later calls of the group are refused.

What waits on a GPU is not looked at: its host goes on, NCCL and the NVLink kernels have their own timeouts, and a graph may be under capture.
"""

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tpinv.collectives import comparison
from tpinv.collectives.group import GroupState, Ranks, state_of

_SLICES = timedelta(seconds=comparison.PATIENCE), timedelta(seconds=comparison.LOOK)

# torch 2.13 renamed them (same arguments) and warns at each use of the old names; older versions know only those.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_single(out: Tensor, x: Tensor, ranks: Ranks) -> None:
    """out [p n, ...] from every rank's x [n, ...]."""
    _run(lambda **how: _all_gather_single(out, x, group=ranks.group, **how), x, ranks)


def reduce_scatter_single(out: Tensor, x: Tensor, ranks: Ranks) -> None:
    """out [n, ...], this rank's part of the sum of every rank's x [p n, ...]. For integers: the order of additions is the backend's."""
    _run(lambda **how: _reduce_scatter_single(out, x, group=ranks.group, **how), x, ranks)


def all_reduce(x: Tensor, ranks: Ranks) -> None:
    """x becomes the sum of every rank's. For integers: the order of additions is the backend's."""
    _run(lambda **how: dist.all_reduce(x, group=ranks.group, **how), x, ranks)


def all_to_all_single(out: Tensor, x: Tensor, out_sizes: list[int], in_sizes: list[int], ranks: Ranks) -> None:
    """Slice r of x goes to rank r; out joins the slices that came, in rank order."""
    _run(
        lambda **how: dist.all_to_all_single(out, x, output_split_sizes=out_sizes, input_split_sizes=in_sizes, group=ranks.group, **how),
        x,
        ranks,
    )


def _run(collective: Callable, x: Tensor, ranks: Ranks) -> None:
    if x.is_cuda or torch.compiler.is_compiling():
        collective()
        return
    wait(collective(async_op=True), ranks)


def wait(work: dist.Work | None, ranks: Ranks) -> None:
    """Waits for a collective on a CPU that was begun with ``async_op=True``.

    Raises:
        ValueError, RuntimeError: as :func:`tpinv.collectives.agreement.agree` does; RuntimeError also for what the backend raised.
    """
    if work is None:
        return
    with contextlib.suppress(RuntimeError):  # a second has passed, or the collective failed
        work.wait(_SLICES[0])
        return
    _wait_and_look(work, state_of(ranks))


def _wait_and_look(work: dist.Work, state: GroupState) -> None:
    while not work.is_completed():
        began = time.monotonic()
        if state.board is not None:
            try:
                comparison.compare_in_wait(state)
            except (ValueError, RuntimeError) as found:
                error = comparison.store_gone(state, found) if isinstance(found, dist.DistError) else found
                _give_up(state, error)
                raise error from None
        with contextlib.suppress(RuntimeError):  # also what the collective itself raises, which is asked below
            work.wait(_SLICES[1])
        if not work.is_completed() and time.monotonic() < began + comparison.LOOK / 2:
            time.sleep(comparison.LOOK)  # a backend whose wait knows no timeout
    try:
        work.wait()
    except RuntimeError as failure:
        _explain(state, failure)


def _explain(state: GroupState, failure: RuntimeError) -> None:
    """The backend lost a connection or gave up: raises what the board says of it, which may come a little later than the loss."""
    error = RuntimeError(f"{comparison.where(state)}: the backend failed: {failure}")
    try:
        if state.board is not None:
            comparison.explain(state, time.monotonic() + comparison.GRACE)
        if state.board is not None and (earlier := comparison.last_refusal(state)):
            error = RuntimeError(f"{comparison.where(state)}: the backend failed: {failure}. Before that: {earlier}")
    except ValueError as found:
        error = found
    except RuntimeError as found:  # the store may have gone as well
        error = error if isinstance(found, dist.DistError) else found
    _give_up(state, error)
    raise error from failure


def _give_up(state: GroupState, error: Exception) -> None:
    """Closes the group's connections, if the backend is gloo: what waits on them ends, here and on the peers, and no thread of the group
    keeps the process from exiting."""
    state.broken = f"the connections of this process group were given up after an error, make a new group. The error: {error}"
    with contextlib.suppress(RuntimeError):  # a receive that times out closes all pairs of the context
        backend = state.group()._get_backend(torch.device("cpu"))
        if backend.name() == "gloo":
            backend.recv([torch.empty(1)], (state.rank + 1) % state.size, _NO_TAG).wait(timedelta(milliseconds=1))


_NO_TAG = 0x7E9F1A  # of a message that nobody sends

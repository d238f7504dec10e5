"""Agreement between ranks: what one rank refuses, all refuse; and all make the same call with the same settings.

A function that communicates calls :func:`agree` first. That counts the calls of a group, so that call number n is the same call on every
rank, and then

    checks       what the caller checks. A rank that refuses posts its reason on the group's board (board.py) under the call's number.
    compares     a (name, signature) that is new to the group: every rank posts its own and reads its peers'. If they differ, or a peer
                 refused, all ranks raise one ValueError that names ranks and values. The group's first comparison takes in what must
                 be one for all calls: versions, the table of sums, the chip.
    remembers    a signature that all had: it is known from then on, and costs a look into a dictionary.

The board lies in the group's store and no tensor is sent: nothing waits for a GPU, and a CUDA graph may be under capture.

Two ways from there. Ranks on the CPUs of one machine announce every call, known or not, on a line (line.py) before a collective begins:
whatever is wrong is found there, on all ranks, and the group can go on after it. Ranks on GPUs or on several machines go straight into
their collective where the signature is known to them; if a peer refuses that call or calls something else, they wait in it. On a CPU that
wait is guarded (transport.py): after a second it looks at the board, every half second, and raises what it finds; the group is given up.
On a GPU a thread of the host looks likewise (:class:`Refusals`) and calls the NVLink kernels off, whose error ends the process; what waits
in NCCL waits until NCCL's own timeout. A rank that refused compares its next call even if it is known.
"""

import atexit
import contextlib
import math
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping

import torch
import torch.distributed as dist

from tpinv.collectives import strays
from tpinv.collectives.board import ended
from tpinv.collectives.comparison import (
    GRACE,
    LOOK,
    PATIENCE,
    chip,
    compare,
    compare_in_wait,
    digest,
    explain,
    fail,
    late_ranks,
    post_refusal,
    store_gone,
    text,
    timeout,
    where,
)  # fmt: skip
from tpinv.collectives.group import Agreed, GroupState, Ranks, resolve, state_of, states
from tpinv.collectives.line import REFUSED, LineError

__all__ = ["agree", "chip", "ranks_for", "refuse"]
Signature = Mapping | Iterable[tuple]
KNOWN = 1 << 14  # signatures remembered; the oldest goes first, on every rank alike


def agree(
    ranks: Ranks,
    name: str,
    signature: Signature | Callable[[], Signature] = (),
    check: Callable[[], None] | None = None,
    key: Hashable = None,
) -> None:
    """Called once at the start of a function that will communicate over ``ranks``, on every rank, whatever its arguments are.

    Args:
        ranks: a resolved group. With one rank ``check`` runs and that is all.
        name: of the function.
        signature: everything that must be equal on all ranks, as a mapping or as (field, value) pairs; messages name the fields. Values
            have a hash and say in ``str`` what they are: numbers, strings, dtypes, shapes, trees, None. Or a function that returns it, or
            raises as ``check`` does.
        check: raises a ValueError for arguments that this rank refuses.
        key: with a function as ``signature``: the name and all that it looks at. It is not asked again for a key whose signature all
            ranks have had.

    Raises:
        ValueError: what ``check`` raised; or, on the other ranks, that a peer refused this call, and its reason; or, on all of them,
            that the ranks' calls or settings differ.
        RuntimeError: a peer did not come within TPINV_TIMEOUT seconds (600), has ended, or the group was given up after an error.
    """
    if ranks.size == 1 or torch.compiler.is_compiling():  # a traced call agrees when it runs, inside its operator
        if callable(signature):
            signature()
        if check is not None:
            check()
        return
    state = state_of(ranks)
    if state.strays:
        strays.settle(state, name)
    state.calls += 1
    try:
        agreed = state.keys.get(key)
    except TypeError:  # a value without a hash
        key = agreed = None
    if agreed is not None and not agreed.remembered:
        agreed = None
    try:
        state.call = agreed.call if agreed else (name, ())
        if state.broken is not None:
            raise RuntimeError(state.broken)
        if agreed is None:
            state.call = call = (name, _pairs(signature() if callable(signature) else signature))
        if check is not None:
            check()
    except Exception as error:
        _refuse(state, error)
        raise
    if agreed is None:
        try:
            agreed = state.known.get(call)
        except TypeError:  # a value without a hash, such as a list: by what it says
            state.call = call = (name, tuple((field, text(value)) for field, value in call[1]))
            agreed = state.known.get(call)
        if agreed is not None and key is not None:
            state.keys[key] = agreed
    if state.board is not None and (agreed is None or state.line is not None or state.suspect):
        try:
            while state.line is None or not _announce(state, agreed.digest if agreed else digest(state)):
                try:
                    compare(state)
                    break
                except strays.Renumbered:
                    state.refused.add(state.calls)
                    state.calls += 1
        except dist.DistError as error:
            raise store_gone(state, error) from error
        state.suspect = False
        state.strays.clear()
    if agreed is None:
        agreed = state.known[call] = Agreed(call, digest(state))
        if key is not None:
            state.keys[key] = agreed
        if len(state.known) > KNOWN:
            state.known.pop(next(iter(state.known))).remembered = False


def _pairs(signature: Signature) -> tuple[tuple, ...]:
    return tuple(signature.items() if isinstance(signature, Mapping) else signature)


def ranks_for(name: str, group) -> Ranks:
    """``resolve(group)`` for a call of the function ``name``: that ``group`` is none, and on this rank alone, reaches the peers too."""
    try:
        return resolve(group)
    except ValueError as error:
        if dist.is_available() and dist.is_initialized() and not torch.compiler.is_compiling():
            with contextlib.suppress(RuntimeError):  # the store has gone: the error at hand says more
                strays.post(name, error)
        raise


def refuse(ranks: Ranks, name: str, error: Exception) -> None:
    """Tells the peers that this rank refuses this call, for an error found where :func:`agree` cannot be called; it takes its place.
    The caller raises ``error`` then."""
    if ranks.size > 1 and not torch.compiler.is_compiling():
        state = state_of(ranks)
        if state.strays:
            strays.settle(state, name)
        state.calls += 1
        state.call = (name, ())
        _refuse(state, error)


class Refusals:
    """For a thread that watches while this process waits on a GPU, for a peer that refused a call whose signature this rank knew."""

    def __init__(self, state: GroupState):
        self._state, self._calls, self._since = weakref.ref(state), 0, math.inf

    def look(self) -> str | None:
        """What such a peer has posted, once this rank has made no call for a second. Nothing is posted or raised."""
        state, now = self._state(), time.monotonic()
        if state is None or state.board is None or state.group() is None:
            return None
        if state.calls != self._calls:
            self._calls, self._since = state.calls, now
        if now < self._since + PATIENCE:
            return None
        self._since = now + LOOK - PATIENCE
        statuses = [status for rank in range(state.size) if rank != state.rank and (status := state.board.status(rank))]
        refusals = [refusal for status in statuses for refusal in status["refusals"]]
        fitting = [r for r in refusals if r["at"] <= self._calls and r["at"] not in state.refused] or [strays.of_peers(state)]
        return fitting[0] and fitting[0]["refused"]


def _refuse(state: GroupState, error: Exception) -> None:
    value_error = isinstance(error, ValueError)
    said = str(error) if value_error else f"{type(error).__name__}: {error}"
    if state.strays:
        state.calls -= 1
        strays.add(state, state.call[0], said, value_error)
        return
    whole = f"rank {state.rank} of {state.size} refused {state.call[0]} (call {state.calls} of the group): {said}"
    post_refusal(state, {"rank": state.rank, "refused": whole, "value_error": value_error})
    if state.line is not None:  # after the post, where peers look for the reason
        state.line.send(state.calls, REFUSED)


@atexit.register
def _post_ends() -> None:
    """Tells the peers of a process that ends, and why if by an error. Rank 0, whose process may hold the store, gives them time to read it."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    why = f"{type(error).__name__}: {error}".partition("\n")[0] if error else "its process is at its end"
    deadline = time.monotonic() + GRACE
    for state in states():
        if state.board is None or not state.calls:
            continue
        with contextlib.suppress(RuntimeError):  # the store has gone
            state.board.post_end(why)
            while error and state.rank == 0 and time.monotonic() < deadline:
                if all(_knows(state, rank) for rank in range(1, state.size)):
                    break
                time.sleep(LOOK / 5)


def _knows(state: GroupState, rank: int) -> bool:
    """Has this peer heard of the end of this rank, or ended itself?"""
    status = state.board.status(rank)
    return status is not None and (ended(status) is not None or any(refusal["at"] >= state.calls for refusal in status["refusals"]))


def _announce(state: GroupState, own: bytes) -> bool:
    """On the line, to every peer; do all of them make this call?"""
    started = time.monotonic()

    def look():
        waited, limit = time.monotonic() - started, timeout()
        if waited > PATIENCE:
            compare_in_wait(state)
        if waited > limit:
            late = [rank for rank in range(state.size) if rank != state.rank and not state.board.has(state.calls, [rank])]
            raise fail(state, RuntimeError(late_ranks(state, late, limit)))

    try:
        return state.line.agrees(state.calls, own, look)
    except LineError as error:
        explain(state, time.monotonic() + GRACE)
        place = f"rank {error.rank} of {state.size} has ended or destroyed the group; the others wait for it in {where(state)}"
        raise fail(state, RuntimeError(place)) from None

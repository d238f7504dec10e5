"""What ranks post on their group's board and read there: the comparison of one call, by ranks that wait for each other.

agreement.py says when. Here is how: a rank posts its call, or why it refuses it; reads its peers' posts; and raises what differs, with ranks
and values, or what is known of a peer that does not come. Whoever finds an error posts it on, so that all raise one and the same.
"""

import contextlib
import functools
import hashlib
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from tpinv import contract
from tpinv.collectives import strays
from tpinv.collectives.board import ended
from tpinv.collectives.group import GroupState
from tpinv.collectives.line import Line, one_place
from tpinv.tree import ReductionTree

PATIENCE = 1.0  # seconds before a wait looks around
LOOK = 0.5  # seconds between two looks
GRACE = 3.0  # seconds for the others to post as well, once one differs: then every rank names all


@functools.cache
def chip(device: torch.device) -> str:
    """What computes on ``device``. Bits depend on it, so the ranks of a group must have one and the same."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} ({properties.major}.{properties.minor})"
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def timeout() -> float:
    """Seconds that ranks wait for each other: TPINV_TIMEOUT. ValueError where that is no number above 0."""
    text = os.environ.get("TPINV_TIMEOUT", "600")
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= 1e9:
            return seconds
    raise ValueError(f"TPINV_TIMEOUT is {text!r}; set it to seconds above 0 and up to 1e9, or unset it")


def store_gone(state: GroupState, error: dist.DistError) -> RuntimeError:
    """The error of a rank that cannot read the board any more."""
    state.refused.add(state.calls)
    state.suspect = True
    first = str(error).partition("\n")[0]
    return RuntimeError(f"in {where(state)}, the group's store has gone with the process that held it; its own error says why ({first})")


def explain(state: GroupState, deadline: float) -> None:
    """After the loss of a connection: raises what the board says of it, which may come a little later than the loss, if anything."""
    while True:
        compare_in_wait(state)
        if time.monotonic() > deadline:
            return
        time.sleep(LOOK / 5)


def compare(state: GroupState) -> None:
    """Posts this rank's call, waits for every peer's, and raises unless they are one."""
    number, started, limit, pause, odd_at = state.calls, time.monotonic(), timeout(), 0.0002, math.inf
    looked = started + PATIENCE
    posts = {state.rank: _post_call(state)}
    while missing := [rank for rank in range(state.size) if rank not in posts]:
        now = time.monotonic()
        if state.board.has(number, missing):
            posts.update((rank, state.board.read(number, rank)) for rank in missing)
            break
        if now > started + 0.05:  # one by one: what is wrong already need not wait for all
            posts.update((rank, post) for rank in missing if (post := state.board.read(number, rank)))
            if odd_at == math.inf and not _one(posts):
                odd_at = now
        if now > odd_at + _grace(posts):
            break
        if now > looked + LOOK:
            looked = now
            raise_for_peers(state, comparing=True)
        if now > started + limit:
            raise fail(state, RuntimeError(late_ranks(state, [rank for rank in missing if rank not in posts], limit)))
        time.sleep(pause)
        pause = min(2 * pause, 0.02 if now < started + PATIENCE else 0.1)
    if state.strays and not _one(posts):
        strays.take(state, {post["name"] for rank, post in posts.items() if rank != state.rank and "name" in post})
    _raise_unless_one(state, posts)
    if not state.introduced:
        _connect(state, posts)
        state.introduced = True
    state.board.delete_posts_before(number)


def _connect(state: GroupState, posts: Mapping[int, dict]) -> None:
    """The line, if every rank has one to offer; all draw the same conclusion from the posts of the group's first comparison."""
    if one_place([posts[rank]["line"] for rank in range(state.size)]):
        try:
            state.offered.connect({rank: post["line"] for rank, post in posts.items()}, timeout())
        except OSError as error:
            raise fail(state, RuntimeError(f"the ranks of one machine could not connect to each other: {error}")) from error
        state.line = state.offered


def compare_in_wait(state: GroupState) -> None:
    """For a wait inside a collective: posts this rank's call, once, and raises if a peer has posted another one under that number, or its
    refusal. A peer that is only late has not posted anything, and is waited for."""
    number, began = state.calls, time.monotonic()
    own = _description(state) if state.board.posted(number) else _post_call(state)
    while True:
        posts = {state.rank: own}
        posts.update((rank, post) for rank in range(state.size) if rank != state.rank and (post := state.board.read(number, rank)))
        if _one(posts) or len(posts) == state.size or time.monotonic() > began + _grace(posts):
            break
        time.sleep(LOOK / 5)  # the others wait as well, and will post: then all ranks say the same
    _raise_unless_one(state, posts)
    raise_for_peers(state)


def raise_for_peers(state: GroupState, comparing: bool = False) -> None:
    """Raises if a peer is where it will not come to the current call from: it refused an earlier one that this rank did not, it went past
    this one without the comparison that this rank waits for, or its process has ended."""
    _raise_for_strays(state)
    number = state.calls
    for rank in range(state.size):
        if rank == state.rank or not (status := state.board.status(rank)):
            continue
        for refusal in status["refusals"]:
            if refusal["at"] <= number and refusal["at"] not in state.refused:
                raise _refused_by_peer(state, refusal)
        if state.board.has(number, [rank]):
            continue
        # This rank compares, and that one did not. On a line it has announced the call, perhaps while this rank was looking around.
        if status["call"] > number and state.call not in state.known and state.line is None:
            place = f"rank {rank} went past it to its call {status['call']}, {status['name']}, and had compared such a call before"
            raise fail(
                state, ValueError(f"the ranks do not make the same calls: {where(state)} is new on rank {state.rank}; {place}. {_SAME}")
            )
        if why := ended(status):
            raise fail(state, RuntimeError(f"rank {rank} of {state.size} has ended ({why}); the others wait for it in {where(state)}"))


def _raise_for_strays(state: GroupState) -> None:
    if stray := strays.of_peers(state):
        raise _refused_by_peer(state, stray)


def _raise_unless_one(state: GroupState, posts: Mapping[int, dict]) -> None:
    refusals = [post for _, post in sorted(posts.items()) if "refused" in post]
    if refusals:
        raise _refused_by_peer(state, min(refusals, key=lambda refusal: refusal["rank"]))
    if differences := _differences(posts):
        _raise_for_strays(state)
        state.refused.add(state.calls)  # the posts stay as they are, so that every rank finds the same
        state.suspect = True
        raise ValueError(f"the ranks differ in call {state.calls} of their group: {'; '.join(differences)}. {_SAME}")


def _grace(posts: Mapping[int, dict]) -> float:
    """Seconds in which the missing ranks may still post. A refusal says all by itself; what differs wants every rank's value."""
    return LOOK if any("refused" in post for post in posts.values()) else GRACE


def _one(posts: Mapping[int, dict]) -> bool:
    return not any("refused" in post for post in posts.values()) and not _differences(posts)


def _differences(posts: Mapping[int, dict]) -> list[str]:
    """One entry for each field that is not the same in all posts: "sequence_parallel: True on rank 0, False on ranks 1, 2"."""
    calls = {rank: {"function": post["name"], **dict(post["fields"])} for rank, post in sorted(posts.items())}
    introductions = {rank: dict(post["introduction"]) for rank, post in sorted(posts.items()) if post["introduction"]}
    found = []
    for described in (calls, introductions):
        for field in dict.fromkeys(field for fields in described.values() for field in fields):
            holders: dict[str, list[int]] = {}
            for rank, fields in described.items():
                holders.setdefault(fields.get(field, "not given"), []).append(rank)
            if len(holders) > 1:
                found.append(f"{field}: " + ", ".join(f"{value} on {_ranks(where)}" for value, where in holders.items()))
            if len(holders) > 1 and field == "function":
                break  # the other fields are not comparable
    return found


# -- what is posted and said --------------------------------------------------------------------------------------------------------

_SAME = "Every rank must make the same calls in the same order, with the same settings and fitting shapes"


def _description(state: GroupState) -> dict:
    name, signature = state.call
    fields = [(field, text(value)) for field, value in signature]
    if state.introduced:
        return {"name": name, "fields": fields, "introduction": [], "line": None}
    if state.offered is None and "nccl" not in state.backend:
        with contextlib.suppress(OSError):
            state.offered = Line(state.rank, state.size, LOOK)
    line = state.offered.address if state.offered else None
    return {"name": name, "fields": fields, "introduction": _introduction(state.backend), "line": line}


def digest(state: GroupState) -> bytes:
    """Of the current call: 16 bytes, never those of a refusal."""
    name, signature = state.call
    return hashlib.blake2b(repr((name, [(field, text(value)) for field, value in signature])).encode(), digest_size=16).digest()


@functools.cache
def _introduction(backend: str) -> list[tuple[str, str]]:
    """What must be one for all calls of a group, compared at its first."""
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
    table = contract.fingerprint(ReductionTree(1)).partition("sums.")[2]
    versions = {"tpinv version": sys.modules["tpinv"].__version__, "torch version": torch.__version__}
    return list({**versions, "table of sums": table, "chip": chip(device)}.items())


def _post_call(state: GroupState) -> dict:
    description = _description(state)
    state.board.post(state.calls, state.call[0], description)
    return description


def post_refusal(state: GroupState, refusal: dict) -> None:
    """Of the current call: ``refused``, the sentence that every peer raises, ``value_error``, its kind, and the ``rank`` it comes from."""
    state.refused.add(state.calls)
    state.suspect = True
    if state.board is not None:
        with contextlib.suppress(RuntimeError):  # the store may have gone with the rank that held it: the error at hand says more
            state.board.post(state.calls, state.call[0], refusal)


def fail(state: GroupState, error: Exception) -> Exception:
    """``error``, which this rank found, after the peers were told: they might wait for it."""
    post_refusal(state, {"rank": state.rank, "refused": str(error), "value_error": isinstance(error, ValueError)})
    return error


def _refused_by_peer(state: GroupState, refusal: Mapping) -> Exception:
    """What a peer has posted, as an error; it is passed on, so that it reaches those who wait for this rank."""
    post_refusal(state, dict(refusal))
    return (ValueError if refusal["value_error"] else RuntimeError)(refusal["refused"])


def last_refusal(state: GroupState) -> str | None:
    """The newest refusal that any rank has posted."""
    statuses = [status for rank in range(state.size) if (status := state.board.status(rank))]
    refusals = [refusal for status in statuses for refusal in status["refusals"]]
    return max(refusals, key=lambda refusal: refusal["at"])["refused"] if refusals else None


def late_ranks(state: GroupState, late: list[int], limit: float) -> str:
    places = []
    for rank in late:
        status = state.board.status(rank)
        places.append(
            f"rank {rank} was last seen at its call {status['call']}, {status['name']}" if status else f"rank {rank} has made no call"
        )
    return f"rank {state.rank} waited {limit:g} s for {_ranks(late)} of {state.size} in {where(state)}: {'; '.join(places)}. {_SAME}; TPINV_TIMEOUT sets the seconds"


def where(state: GroupState) -> str:
    """The current call, in words."""
    return f"call {state.calls} of the group, {state.call[0]}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def text(value) -> str:
    if isinstance(value, ReductionTree):
        return value.fingerprint
    return str(tuple(value) if isinstance(value, torch.Size) else value)

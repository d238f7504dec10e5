"""Refusals of calls whose group nobody knows: ``group=`` was no group, so this rank cannot say to whom it refuses, and its peers wait somewhere.

Any other refusal has a number, that of the call in its group. A stray one is shown on the boards of all groups of this process, with the
function's name and the number of calls made before it, and belongs to the first group that claims it. That is where a peer waits for this
rank in its next call, of that function: it raises what it reads. Or where this rank itself comes to call that function again, or to find its
peers in it. A stray that is claimed has a number of that group from then on, on every rank: what they call next is one call again.

    tpinv/stray/{token}      in the default group's store, which only the first can set: the name of the group that has claimed it
"""

import secrets

from torch.distributed import distributed_c10d as c10d

from tpinv.collectives.group import GroupState, ranks_in, state_of


class Renumbered(Exception):
    """The peers' call of this number is one that this rank has refused before; its own is the next."""


def post(name: str, error: Exception) -> None:
    """Shows every group of this process that this rank refuses a call of the function ``name``."""
    token = secrets.token_hex(8)
    for group in list(c10d._world.pg_map):
        ranks = ranks_in(group)
        if ranks.size > 1 and state_of(ranks).board is not None:
            add(state_of(ranks), name, str(error), isinstance(error, ValueError), token)


def add(state: GroupState, name: str, why: str, value_error: bool, token: str | None = None) -> None:
    """For one group: a call after strays that nobody has claimed yet, so that its number is not known either."""
    whole = f"rank {state.rank} of {state.size} refused {name}: {why}"
    stray = {"rank": state.rank, "refused": whole, "value_error": value_error, "name": name, "after": state.calls}
    state.strays.append({**stray, "token": token or secrets.token_hex(8)})
    state.board.show_strays(state.strays)
    state.suspect = state.suspect or state.calls > 0


def settle(state: GroupState, name: str) -> None:
    """Before this rank's next call, of the function ``name``: the strays that this group has claimed, or does now, get their numbers."""
    mine = max((i for i, stray in enumerate(state.strays) if stray["name"] == name), default=-1)
    owners = [_owner(state, stray, claim=i <= mine) for i, stray in enumerate(state.strays)]
    for owner in owners:
        if owner == _name(state):
            state.calls += 1
            state.refused.add(state.calls)
    state.strays = [stray for stray, owner in zip(state.strays, owners, strict=True) if owner is None]


def take(state: GroupState, names: set[str]) -> None:
    """The peers' calls have these names, and this rank's has another. Renumbered if that is a stray of its own, which is claimed then."""
    for i, stray in enumerate(state.strays):
        if stray["name"] in names and _owner(state, stray, claim=True) == _name(state):
            state.strays = state.strays[i + 1 :]
            raise Renumbered


def of_peers(state: GroupState) -> dict | None:
    """A peer's stray that refuses the current call; it is claimed then."""
    for rank in range(state.size):
        if rank == state.rank or not (status := state.board.status(rank)):
            continue
        earlier = 0  # of this group's
        for stray in status["strays"]:
            fits = stray["name"] == state.call[0] and stray["after"] + earlier + 1 == state.calls
            if _owner(state, stray, claim=fits) == _name(state):
                if fits:
                    return stray
                earlier += 1
    return None


def _name(state: GroupState) -> str:
    return state.group().group_name


def _owner(state: GroupState, stray: dict, claim: bool = False) -> str | None:
    store, key = c10d._get_default_store(), f"tpinv/stray/{stray['token']}"
    if claim:
        return store.compare_set(key, "", _name(state)).decode()
    return store.get(key).decode() if store.check([key]) else None

"""What the ranks of a group write to its c10d store for each other to read, without a collective: posts and a status per rank.

    tpinv/made/{rank}             how often this rank has made a group of this name over this store; below it is G
    tpinv/G/{number}/{rank}       a post: what this rank calls as call ``number`` of the group, or why it refuses it
    tpinv/G/status/{rank}         where this rank is: its last post, its refusals, those without a number, its process; written over

Nothing here waits: a blocking read would hold the store's one connection, which gloo and NCCL use too. Values are JSON. A store that
fails (the process that held it has ended) raises RuntimeError, as torch's stores do.
"""

import contextlib
import functools
import json
import os
import socket
from collections import deque
from pathlib import Path

from torch.distributed import FileStore, PrefixStore, Store

_KEPT = 32  # posts of waits that no comparison has cleared, and refusals in a status


class Board:
    """Of one rank of one group. ``generation``: a group that is made anew over the same store finds the old keys and must not read them."""

    def __init__(self, store: Store, rank: int, size: int):
        self._store, self.rank, self.size = store, rank, size
        # Counted per rank, since ranks come in any order; all ranks make a group equally often.
        self.generation = store.add(f"tpinv/made/{rank}", 1)
        self._posted: deque[int] = deque()
        self._refusals: deque[dict] = deque(maxlen=_KEPT)
        self._status = {"call": 0, "name": "", "refusals": [], "strays": [], "ended": None, "process": _process()}

    def posted(self, number: int) -> bool:
        """Has this rank posted as call ``number``?"""
        return number in self._posted

    def post(self, number: int, name: str, what: dict) -> None:
        self._write(f"{number}/{self.rank}", what)
        self._posted.append(number)
        if len(self._posted) > _KEPT:
            self._delete(self._posted.popleft())
        if "refused" in what:
            self._refusals.append({"at": number, **what})
        self._status.update(call=number, name=name, refusals=list(self._refusals))
        self._write(f"status/{self.rank}", self._status)

    def show_strays(self, strays: list[dict]) -> None:
        """Refusals that have no number yet, see strays.py."""
        self._status["strays"] = list(strays[-_KEPT:])
        self._write(f"status/{self.rank}", self._status)

    def post_end(self, why: str) -> None:
        """This process is about to end. A store in a file that is gone would be waited for."""
        store = self._store
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        if isinstance(store, FileStore) and not os.path.exists(store.path):
            return
        self._status["ended"] = why
        self._write(f"status/{self.rank}", self._status)

    def has(self, number: int, ranks: list[int]) -> bool:
        """Have all ``ranks`` posted as call ``number``? One round trip to the store."""
        return self._store.check([self._key(f"{number}/{rank}") for rank in ranks])

    def read(self, number: int, rank: int) -> dict | None:
        return self._read(f"{number}/{rank}")

    def status(self, rank: int) -> dict | None:
        return self._read(f"status/{rank}")

    def delete_posts_before(self, number: int) -> None:
        """Once every rank has posted as call ``number``: by then it has read what was posted as earlier ones."""
        while self._posted and self._posted[0] < number:
            self._delete(self._posted.popleft())

    def _key(self, name: str) -> str:
        return f"tpinv/{self.generation}/{name}"

    def _write(self, name: str, value: dict) -> None:
        self._store.set(self._key(name), json.dumps(value))

    def _read(self, name: str) -> dict | None:
        key = self._key(name)
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _delete(self, number: int) -> None:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a store may not know how to
            self._store.delete_key(self._key(f"{number}/{self.rank}"))


def ended(status: dict) -> str | None:
    """Why the process that wrote ``status`` is gone, if it said so, or if it ran on this machine and does not any more."""
    if status["ended"]:
        return status["ended"]
    namespace, process, started = status["process"]
    if namespace is None or namespace != _process()[0] or _start_of(process) == started:
        return None
    return f"its process {process} is gone"


@functools.cache
def _process() -> tuple[str | None, int, str | None]:
    """Where this process's number means something, the number, and when it started."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}", os.getpid(), _start_of(os.getpid())
    except OSError:
        return None, os.getpid(), None


def _start_of(process: int) -> str | None:
    """A process's start time in the kernel's ticks; None when it has ended, waited for or not."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]

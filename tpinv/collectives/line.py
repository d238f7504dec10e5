"""A line between the ranks of a group on one machine, on which each announces a call before it begins: 24 bytes to every peer.

On a CPU the collectives that follow a call cost hundreds of microseconds and cannot be taken back: gloo aborts the process where sizes
differ, and hangs where a peer does not come. So on the line every call is compared, known or not, by number and digest, before any
collective begins. A rank that refuses says so with a digest of its own and need not wait for anyone. Sockets of the machine's own kernel
(no network): a round takes some ten microseconds a peer, a peer that ends is noticed, and nothing keeps a process from exiting.
"""

import contextlib
import os
import secrets
import socket
import struct
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

REFUSED = bytes(16)  # in place of a digest
_FRAME = struct.Struct("<Q16s")
_HELLO = struct.Struct("<I16s")


class LineError(ConnectionError):
    """The peer ``rank`` has closed its end: its process has ended, or it has destroyed the group."""

    def __init__(self, rank: int):
        super().__init__(f"rank {rank} has closed its line")
        self.rank = rank


class Line:
    """This rank's end. ``address`` goes to the peers, ``connect`` takes theirs; ``slice`` is the seconds between two looks of a wait.

    Raises:
        OSError: this machine has no such sockets.
    """

    def __init__(self, rank: int, size: int, slice: float):
        self.rank, self.size = rank, size
        self._slice = struct.pack("ll", int(slice), int(slice % 1 * 1e6))
        self._peers: dict[int, socket.socket] = {}
        self._ahead: dict[int, tuple[int, bytes]] = {}  # rank -> a frame that came before its call
        self._open: list[socket.socket] = []  # closed with this object
        weakref.finalize(self, _close, self._open)
        token, self._secret = secrets.token_hex(16), secrets.token_bytes(16)
        self._listener = self._socket()
        self._listener.bind(f"\0tpinv-{token}")
        self._listener.listen(size)
        self.address = {"place": _place(), "token": token, "secret": self._secret.hex()}

    def connect(self, addresses: Mapping[int, dict], timeout: float) -> None:
        """To every peer; ``addresses`` are those of all ranks. OSError after ``timeout`` seconds without a peer."""
        for rank in range(self.rank):
            peer = self._socket()
            peer.connect(f"\0tpinv-{addresses[rank]['token']}")
            peer.send(_HELLO.pack(self.rank, bytes.fromhex(addresses[rank]["secret"])))
            self._peers[rank] = peer
        self._listener.settimeout(timeout)
        while len(self._peers) < self.size - 1:
            peer, _ = self._listener.accept()
            self._open.append(peer)
            peer.settimeout(timeout)
            hello = peer.recv(_HELLO.size + 1)
            if len(hello) == _HELLO.size and _HELLO.unpack(hello)[1] == self._secret:  # anybody on the machine can connect
                self._peers[_HELLO.unpack(hello)[0]] = peer
        self._listener.close()
        self._peers = dict(sorted(self._peers.items()))
        for peer in self._peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, self._slice)

    def send(self, number: int, digest: bytes) -> None:
        """Announces call ``number`` to every peer, and waits for none."""
        frame = _FRAME.pack(number, digest)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # it has ended, or reads nothing any more: found out when it is read from
                peer.send(frame, socket.MSG_DONTWAIT)

    def agrees(self, number: int, digest: bytes, look: Callable[[], None]) -> bool:
        """Announces call ``number`` and waits until every peer has; are all digests equal? ``look()`` after each slice of waiting.

        Raises:
            LineError: a peer has closed its end.
        """
        self.send(number, digest)
        equal = True
        for rank, peer in self._peers.items():
            announced, theirs = self._ahead.pop(rank, (-1, b""))
            while announced < number:  # below: of calls that this rank refused and for which it waited for nobody
                try:
                    frame = peer.recv(_FRAME.size)
                except BlockingIOError:
                    frame = None
                except OSError:
                    frame = b""
                if frame is None:
                    look()
                    continue
                if not frame:
                    raise LineError(rank)
                announced, theirs = _FRAME.unpack(frame)
            if announced > number:  # of a later call, which this rank will come to (strays.py)
                self._ahead[rank] = announced, theirs
            equal = equal and announced == number and theirs == digest
        return equal

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._open.append(made)
        return made


def one_place(addresses: list[dict | None]) -> bool:
    """Can the ranks with these addresses be connected?"""
    return all(addresses) and len({address["place"] for address in addresses}) == 1


def _place() -> str:
    """The same in processes that can reach each other by such sockets. OSError where that cannot be said."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()

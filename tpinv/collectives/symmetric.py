"""Memory that the ranks of a group share: who has it, one workspace per group, and what happens when a peer never comes.

torch.distributed._symmetric_memory maps every rank's allocation into every other rank. A group gets a workspace at its first
collective, by agreement: all ranks exchange what they are and draw the same conclusion, so that no rank takes another path
than its peers. Whatever speaks against it is a reason to use the ProcessGroup path, which has the same bits.

    control      flags and two slots for small messages; allocated once
    bulk         two slots and a place for finished slices; grown by powers of two. Old ones are kept for graphs that captured them

Ranks must make their calls in the same order, as with NCCL. Calls from several streams of a device are put in that order here; the
replay of a CUDA graph is ordered by the stream it is launched on, and must not run beside other calls of its group: the kernels
report that and stop.

Every allocation is a rendezvous, which torch counts per process: before a group's first call all its processes must have had as many,
or they wait for each other until the store's timeout. So let groups that overlap grow alike: the longest message once in each.
"""

import atexit
import contextlib
import logging
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tpinv.collectives.agreement import Refusals
from tpinv.collectives.group import Ranks, state_of
from tpinv.collectives.schedule import BULK_BYTES, INBOX_BYTES, MAX_RANKS
from tpinv.runtime import cuda
from tpinv.runtime.state import device_state
from tpinv.runtime.turns import Turns

SOURCE = "tree_reduce.cu"
MAX_BLOCKS = 256  # kMaxBlocks of the source
BLOCKS_PER_MULTIPROCESSOR = 2  # that wait for other blocks must all run at once: __launch_bounds__ of the source


@dataclass(frozen=True)
class Facts:
    """What a rank tells its peers."""

    host: str
    device: str
    reachable: tuple[str, ...]  # devices whose memory this one can map
    overlap: bool  # may several ranks share a GPU?
    multiprocessors: int
    wanted: str  # TPINV_CUDA
    no_cuda: str | None  # why csrc cannot be used
    off: str | None  # why this rank can take no part
    timeout: str = "600"  # TPINV_TIMEOUT


@dataclass(frozen=True)
class Decision:
    backend: str | None  # "cuda", or None: the ProcessGroup
    reason: str
    blocks: int = 0


def decide(facts: Sequence[Facts]) -> Decision:
    """The same on every rank, from the same facts. ValueError when the ranks' TPINV_CUDA differ or ask for what is not there, or when
    a TPINV_TIMEOUT is no number of seconds."""
    for rank, fact in enumerate(facts):
        if fact.off:
            return Decision(None, f"rank {rank}: {fact.off}")
    if len(facts) > MAX_RANKS:
        return Decision(None, f"{len(facts)} ranks are more than {MAX_RANKS}")
    if len({fact.host for fact in facts}) > 1:
        return Decision(None, f"the ranks are on several hosts: {sorted({fact.host for fact in facts})}")
    devices = [fact.device for fact in facts]
    if len(set(devices)) < len(devices) and not all(fact.overlap for fact in facts):
        return Decision(None, "ranks share a GPU; TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 allows that")
    for rank, fact in enumerate(facts):
        for peer, device in enumerate(devices):
            if device not in fact.reachable:
                return Decision(None, f"the GPU of rank {rank} cannot map the memory of rank {peer}'s, or does not see it: {_SEE_ALL}")
    for rank, fact in enumerate(facts):
        if not 0 < _seconds(fact.timeout) <= 1e9:
            raise ValueError(f"TPINV_TIMEOUT is {fact.timeout!r} on rank {rank}; set it to seconds above 0 and up to 1e9, or unset it")
    wanted = {fact.wanted for fact in facts}
    if len(wanted) > 1 or not wanted <= {"auto", "0", "1"}:
        raise ValueError(f"TPINV_CUDA is {sorted(wanted)} on the ranks of one group; set it to one of auto, 0, 1 on all of them")
    missing = next((f"rank {rank}: {fact.no_cuda}" for rank, fact in enumerate(facts) if fact.no_cuda), None)
    if wanted == {"1"} and missing:
        raise ValueError(f"TPINV_CUDA=1 asks for csrc/{SOURCE}, but {missing}; TPINV_CUDA=auto uses the ProcessGroup")
    if wanted == {"0"} or missing:
        return Decision(None, missing or "TPINV_CUDA=0")
    sharing = max(devices.count(device) for device in devices)
    blocks = max(1, min(MAX_BLOCKS, BLOCKS_PER_MULTIPROCESSOR * min(fact.multiprocessors for fact in facts) // sharing))
    return Decision("cuda", "every rank can map every other rank's memory", blocks)


_SEE_ALL = "CUDA_VISIBLE_DEVICES must show every process all of the group's GPUs"


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def facts(device: torch.device) -> Facts:
    """Of this rank. It creates no CUDA context but that of ``device``."""
    properties = torch.cuda.get_device_properties(device)
    boot = Path("/proc/sys/kernel/random/boot_id")
    reachable = [i for i in range(torch.cuda.device_count()) if i == device.index or torch.cuda.can_device_access_peer(device.index, i)]
    off = None
    if os.environ.get("TPINV_NVLINK", "auto") == "0":
        off = "TPINV_NVLINK=0"
    elif torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        off = "symmetric memory needs an NVIDIA GPU of compute capability 8.0 or newer"
    return Facts(
        host=f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}",
        device=str(properties.uuid),
        reachable=tuple(str(torch.cuda.get_device_properties(i).uuid) for i in reachable),
        overlap=os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0") == "1",
        multiprocessors=properties.multi_processor_count,
        wanted=os.environ.get("TPINV_CUDA", "auto"),
        no_cuda=cuda.missing(SOURCE),
        off=off,
        timeout=os.environ.get("TPINV_TIMEOUT", "600"),
    )


class Shared:
    """``size`` zeroed bytes on every rank; ``addresses[r]`` is where rank r's are mapped here. A collective.

    RuntimeError on all ranks when one has not the memory: in the rendezvous the others would wait for it.
    """

    def __init__(self, size: int, ranks: Ranks, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric_memory

        failed = None
        try:
            self._own = symmetric_memory.empty(size, dtype=torch.uint8, device=device).zero_()
            torch.cuda.synchronize(device)  # zeroed before a peer can store here
        except RuntimeError as error:
            failed = f"{error}".partition("\n")[0]
        for rank, reason in enumerate(_gather(failed, ranks)):
            if reason:
                raise RuntimeError(f"rank {rank} has no {size} bytes to share: {reason}")
        self._handle = symmetric_memory.rendezvous(self._own, ranks.group)
        # A tensor of the peer's memory, asked for its address, knows where in its allocation this one lies.
        self.addresses = tuple(self._handle.get_buffer(r, (size,), torch.uint8).data_ptr() for r in range(ranks.size))


class Workspace:
    """Addresses that kernels are given, and the host's side of their order and their waits."""

    printed = False  # what it has to say of a failure

    def __init__(self, rank: int, size: int, device: torch.device, blocks: int, turns: Turns, allocate):
        """``allocate(bytes)`` returns the addresses of that many zeroed bytes of every rank, and what keeps them alive."""
        self.rank, self.size, self.device, self.blocks = rank, size, device, blocks
        self.timeout = float(os.environ.get("TPINV_TIMEOUT", "600"))
        self.bulk_bytes = BULK_BYTES
        self._allocate, self._kept = allocate, []
        self._flag_bytes = MAX_BLOCKS * size * 8
        self.flags = self._new(self._flag_bytes + 2 * INBOX_BYTES)
        self.inbox = tuple(address + self._flag_bytes for address in self.flags)
        self._bulk: tuple[int, int, tuple[int, ...]] = (0, 0, (0,) * size)
        self.epochs = torch.ones(MAX_BLOCKS + 2, dtype=torch.int64, device=device)
        self.epochs[MAX_BLOCKS:] = 0  # claimed by the block that reports a failure; busy while a call runs
        self.calls: dict = {}  # what nvlink.py keeps
        self.report = torch.zeros(8, dtype=torch.int64, pin_memory=True)
        self._report = self.report.numpy()
        self._turns = turns
        self.refusal: Callable[[], str | None] = lambda: None  # of a peer, that ends a wait for it
        self._refused: str | None = None
        torch.cuda.synchronize(device)
        _watched.append(weakref.ref(self))

    def _new(self, size: int) -> tuple[int, ...]:
        addresses, keep = self._allocate(size)
        self._kept.append(keep)
        return addresses

    def bulk(self, slot_bytes: int, gathered_bytes: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Size of a slot, and every rank's slots and place for finished slices. A collective when it must grow."""
        slot, gathered, addresses = self._bulk
        if slot_bytes > slot or gathered_bytes > gathered:
            if torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    f"the workspace has slots of {slot} bytes and this call needs {slot_bytes}; memory cannot be shared during CUDA graph "
                    "capture, make the same call once before it"
                )
            slot, gathered = _power_of_two(max(slot_bytes, slot)), _power_of_two(max(gathered_bytes, gathered))
            addresses = self._new(2 * slot + gathered)
            self._bulk = slot, gathered, addresses
        return slot, addresses, tuple(address + 2 * slot for address in addresses)

    def enter(self) -> int:
        """The current stream, for a launch that may begin when its turn has come. RuntimeError after a wait that did not end."""
        if self._report[0]:
            raise RuntimeError(self.failure())
        return self._turns.next(torch.cuda.current_stream(self.device))

    def call_off(self) -> None:
        """Ends a wait on the GPU for a peer that has refused the call which waits: within milliseconds the kernel reports and traps."""
        if not self._report[6] and (refused := self.refusal()):
            self._refused = refused
            self._report[6] = 1

    def failure(self) -> str | None:
        """What a kernel reported before it gave up; None when all is well."""
        if not self._report[0]:
            return None
        _, sender, what, block, seen, expected = (int(x) for x in self._report[:6])
        if what == 3:
            return f"tpinv: rank {self.rank} of {self.size} waited for rank {sender} in a collective that will not end: {self._refused}"
        if what == 2:
            return (
                f"tpinv: two collectives of one group ran at once on rank {self.rank} of {self.size}, and each would have taken the other's values "
                "for its own. The replay of a CUDA graph must not run beside other calls of its group: order their streams by wait_stream"
            )
        return (
            f"tpinv: rank {self.rank} of {self.size} waited {self.timeout:g} s for rank {sender} and gave up: {('chunk', 'word')[what]} of block {block}, "
            f"seen {seen}, expected {expected}. That rank has died, hangs, or has called other collectives; TPINV_TIMEOUT sets the seconds"
        )


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# A kernel that gives up traps, and what the user then sees is CUDA's word for it. The cause is printed beside it, or at exit.
_watched: list[weakref.ref] = []
_watcher: threading.Thread | None = None


def _print_failures() -> None:
    for reference in list(_watched):
        workspace = reference()
        if workspace and not workspace.printed and (failure := workspace.failure()):
            workspace.printed = True
            print(failure, flush=True)


def _watch() -> None:
    while True:
        time.sleep(0.2)
        for reference in list(_watched):
            if workspace := reference():
                with contextlib.suppress(RuntimeError, ValueError):  # the store, or the group, has gone
                    workspace.call_off()
        _print_failures()


def _start_watching() -> None:
    global _watcher
    if _watcher is None:
        _watcher = threading.Thread(target=_watch, name="tpinv-watch", daemon=True)
        _watcher.start()
        atexit.register(_print_failures)


def workspace(ranks: Ranks, device: torch.device) -> Workspace | None:
    """The group's workspace; None when it has none, on all ranks alike. A collective at the group's first call."""
    return agreement(ranks, device)[0]


def agreement(ranks: Ranks, device: torch.device) -> tuple[Workspace | None, Decision]:
    """The workspace, and why it is what it is, which rank 0 logs."""
    known = state_of(ranks).workspaces
    if device not in known:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("the ranks of a group agree on shared memory at their first collective; make one before CUDA graph capture")
        known[device] = _agree(ranks, device)
        decision = known[device][1]
        if ranks.rank == 0:
            level = logging.INFO if decision.backend else logging.WARNING
            logging.getLogger("tpinv").log(
                level, "%d ranks: %s, because %s", ranks.size, decision.backend or "ProcessGroup", decision.reason
            )
    return known[device]


def _agree(ranks: Ranks, device: torch.device) -> tuple[Workspace | None, Decision]:
    with torch.cuda.device(device), torch.inference_mode(False):
        decision = decide(_gather(facts(device), ranks))
        if decision.backend is None:
            return None, decision

        def allocate(size: int):
            shared = Shared(size, ranks, device)
            return shared.addresses, shared

        made, failed, turns = None, None, device_state(device.index).turns
        try:
            made = Workspace(ranks.rank, ranks.size, device, decision.blocks, turns, allocate)
        except RuntimeError as error:  # what torch raises where memory cannot be shared after all; the peers are told
            failed = f"{error}".splitlines()[0]
        for rank, reason in enumerate(_gather(failed, ranks)):
            if reason:
                return None, Decision(None, f"rank {rank} could not share memory: {reason}")
    made.refusal = Refusals(state_of(ranks)).look
    _start_watching()
    return made, decision


def _gather(value, ranks: Ranks) -> list:
    gathered = [None] * ranks.size
    dist.all_gather_object(gathered, value, group=ranks.group)
    return gathered

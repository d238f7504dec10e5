"""The Triton collectives under Triton's interpreter: p processes that really store into each other's memory (files mapped by all of
them) and really wait for each other. Run by test_nvlink.py in a process of its own."""

import os

import fast_interpreter  # noqa: F401
import pytest
import torch
import torch.distributed as dist
import triton.language as tl
from hostile import hostile

from tpinv import reference
from tpinv.collectives import nvlink, schedule, triton_kernels
from tpinv.collectives.symmetric import MAX_BLOCKS, Workspace
from tpinv.testing import assert_bitwise_equal, compare, run_ranks
from tpinv.tree import ReductionTree


class Mapped(Workspace):
    """A workspace of files in ``folder``, without a GPU."""

    def __init__(self, folder: str):
        self.rank, self.size, self.device, self.backend, self.blocks = (
            dist.get_rank(),
            dist.get_world_size(),
            torch.device("cpu"),
            "triton",
            6,
        )
        self.timeout, self.bulk_bytes, self._folder, self._maps = 60.0, 1 << 14, folder, []
        flag_bytes = MAX_BLOCKS * self.size * 8
        self.flags = self._new(flag_bytes + 2 * schedule.INBOX_BYTES)
        self.inbox = tuple(address + flag_bytes for address in self.flags)
        self.slots = self._new(3 << 20)
        self.epochs = torch.ones(MAX_BLOCKS + 1, dtype=torch.int64)
        self.report = torch.zeros(8, dtype=torch.int64)
        self.tables, self.calls = {}, {}

    def _new(self, size: int) -> tuple[int, ...]:
        names = [os.path.join(self._folder, f"{len(self._maps)}-{rank}") for rank in range(self.size)]
        with open(names[self.rank], "wb") as file:
            file.truncate(size)
        dist.barrier()
        self._maps.append([torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names])
        return tuple(t.data_ptr() for t in self._maps[-1])

    def bulk(self, slot_bytes, gathered_bytes):
        assert slot_bytes <= 1 << 20 and gathered_bytes <= 1 << 20
        return 1 << 20, self.slots, tuple(address + (2 << 20) for address in self.slots)

    def enter(self) -> int:
        return 0


def collectives(folder: str) -> None:
    # What is inline PTX on a GPU. An aligned 8-byte access of one lane is atomic here as well.
    triton_kernels._store_words = lambda address, words: tl.store(address.to(tl.pointer_type(tl.int64)), words)
    triton_kernels._load_words = lambda address: tl.load(address.to(tl.pointer_type(tl.int64)))
    triton_kernels._now = lambda: 0
    workspace, p = Mapped(folder), dist.get_world_size()
    for leaves in (p, 24):
        tree = ReductionTree(leaves)
        add = reference.node_add(tree)
        for size in (1, 24, 2400):
            data = hostile("exponents", (leaves, size, 1), torch.float32, size)
            mine = torch.stack([tree.reduce(data[n.start : n.stop], add, n) for n in tree.subtrees(workspace.rank, p)])
            expected = reference.finish(torch.stack([tree.reduce(data, add)]), ReductionTree(1), [ReductionTree(1).root])
            assert leaves < 4 or size < 24 or compare(data.sum(0), expected)  # the stock sum: these values can tell
            for algorithm in ("one_shot", "two_shot", "two_shot"):
                for dtype in (torch.float32, torch.float16):
                    actual = nvlink.tree_reduce(workspace, mine, tree, dtype, False, algorithm)
                    assert_bitwise_equal(actual, expected.to(dtype), f"{algorithm} {size} {dtype}")
                if size % p == 0:
                    actual = nvlink.tree_reduce(workspace, mine, tree, torch.float32, True, algorithm)
                    assert_bitwise_equal(actual, expected.chunk(p)[workspace.rank], f"{algorithm} {size} scattered")


@pytest.mark.parametrize("p", [3, 4])
def test_processes_store_into_each_other(p, tmp_path):
    run_ranks(collectives, p, str(tmp_path), timeout=200)

"""p ranks in one process on one GPU: a stream and a workspace each, over plain memory. The kernels run side by side and cannot
tell; that they do not wait for one another's time slices, as processes on one GPU do, makes thousands of iterations cheap."""

import itertools

import torch

from tpinv import reference
from tpinv.collectives import nvlink
from tpinv.collectives.symmetric import BLOCKS_PER_MULTIPROCESSOR, Turns, Workspace
from tpinv.tree import ReductionTree


class OneGpu:
    def __init__(self, p: int):
        self.p, self.device = p, torch.device("cuda", 0)
        blocks = torch.cuda.get_device_properties(0).multi_processor_count * BLOCKS_PER_MULTIPROCESSOR // p
        self._memory: list[list[torch.Tensor]] = []
        self.ranks = [Workspace(r, p, self.device, blocks, Turns(), self._allocator()) for r in range(p)]
        self.streams = [torch.cuda.Stream() for _ in range(p)]
        for stream in self.streams:  # the allocator must not ask the driver for memory while a kernel waits for its peers
            with torch.cuda.stream(stream):
                kept = [torch.empty(96 << 20, dtype=torch.uint8, device="cuda")]
                kept += [torch.empty(1 << size, dtype=torch.uint8, device="cuda") for size in (9, 12, 16, 19) for _ in range(16)]
                del kept
        torch.cuda.synchronize()

    def _allocator(self):
        turns = itertools.count()

        def allocate(size: int):
            turn = next(turns)
            if turn == len(self._memory):
                self._memory.append([torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(self.p)])
                torch.cuda.synchronize()
            return tuple(t.data_ptr() for t in self._memory[turn]), self._memory[turn]

        return allocate

    def run(self, function) -> list:
        """``function(workspace)`` for every rank, each on its stream; waits for all of them."""
        torch.cuda.synchronize()
        results = []
        for workspace, stream in zip(self.ranks, self.streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(function(workspace))
        torch.cuda.synchronize()
        return results

    def tree_reduce(self, values: list[torch.Tensor], tree: ReductionTree, out_dtype, scatter: bool, algorithm: str | None = None):
        return self.run(lambda w: nvlink.tree_reduce(w, values[w.rank], tree, out_dtype, scatter, algorithm))


def subtree_values(leaves: torch.Tensor, tree: ReductionTree, p: int) -> list[torch.Tensor]:
    """[L, ...] leaf values -> each rank's subtree values."""
    dtype, add = reference.torch_node_dtype(tree), reference.node_add(tree)
    leaves = leaves.to(dtype)
    return [torch.stack([tree.reduce(leaves[n.start : n.stop], add, n) for n in tree.subtrees(r, p)]) for r in range(p)]


def same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """On the GPU, NaN for NaN."""
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    actual, expected = (x.masked_fill(x.isnan(), float("nan")).view(integer) for x in (actual, expected))
    return actual.shape == expected.shape and bool((actual == expected).all())

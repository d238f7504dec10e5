"""The bytes that a finished request leaves in an engine's KV cache, as digests that engines of any tensor-parallel size have in common.

A digest is of one layer and one KV head: keys and values of the first so many positions, in their order, wherever the request's blocks
lie. Ranks hold heads, so that the digests of all ranks, in the order of heads, are those of one rank; ranks that hold copies of a head
(fewer KV heads than ranks) must agree, or RuntimeError.

A block is free when its request has finished, and keeps its content until the scheduler gives it away: the digests are taken between
the step that finished a request and the next. The scheduler must be in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

import hashlib

import torch


class ReadCache:
    """What vLLM mixes into its workers (``worker_extension_cls``), for ``collective_rpc``."""

    def digest_kv(self, blocks: list[int], length: int) -> list[list[str]]:
        """Of the first ``length`` positions in ``blocks``: a digest for each layer and each KV head of this rank."""
        found = []
        for cache in self.model_runner.kv_caches:  # [blocks, kv heads, block size, 2 d], in the order of layers
            if cache.dim() != 4:
                raise ValueError(f"a KV cache of shape {tuple(cache.shape)} is none that can be read here")
            heads = cache[torch.tensor(blocks, device=cache.device)].transpose(0, 1).flatten(1, 2)[:, :length].contiguous().cpu()
            found.append([hashlib.blake2b(head.view(torch.uint8).numpy(), digest_size=12).hexdigest() for head in heads])
        return found

    def describe_collectives(self) -> dict:
        """Of tpinv: how this rank's groups communicate, and what vLLM's own communicator was asked for since the model was built."""
        from tpinv.collectives.group import states
        from tpinv.integrations.vllm import guard

        paths = [decision.reason for state in states() for _, decision in state.workspaces.values()]
        return {"paths": paths, "stock": dict(guard.calls)}


EXTENSION = f"{ReadCache.__module__}.{ReadCache.__qualname__}"


class Finished:
    """Watches the scheduler of an engine for the blocks that finished requests had. ``take`` reads and forgets them."""

    def __init__(self, llm, kv_heads: int):
        self.llm, self.kv_heads, self.blocks = llm, kv_heads, {}
        manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
        original = getattr(manager.free, "original", manager.free)

        def free(request) -> None:
            if request.is_finished():
                self.blocks[request.request_id] = manager.get_block_ids(request.request_id)[0]
            original(request)

        free.original = original
        manager.free = free

    def take(self, name: str, length: int) -> list[str]:
        """The digests of the first ``length`` positions of request ``name``, layer by layer, head by head. vLLM may add to names."""
        key = next(key for key in self.blocks if key == name or key.startswith(f"{name}-"))
        ranks = self.llm.collective_rpc("digest_kv", args=(self.blocks.pop(key), length))
        return [digest for layer in zip(*ranks, strict=True) for digest in whole_heads(layer, self.kv_heads)]


def whole_heads(ranks: tuple[list[str], ...], kv_heads: int) -> list[str]:
    """The digests of every rank's heads in one layer -> one for each head. RuntimeError where copies of a head differ."""
    held = sum(map(len, ranks))
    copies = held // kv_heads
    if held != copies * kv_heads or not copies:
        raise ValueError(f"{len(ranks)} ranks hold {held} heads, which are no copies of {kv_heads}")
    if copies == 1:
        return [digest for rank in ranks for digest in rank]
    held_once = [rank[0] for rank in ranks]
    for first in range(0, len(ranks), copies):
        if len(set(held_once[first : first + copies])) > 1:
            raise RuntimeError(f"ranks {first} to {first + copies - 1} hold copies of a KV head, and their bytes differ")
    return held_once[::copies]

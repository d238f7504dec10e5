"""Arrival counters: zeros that kernels count up in and set back to zero before they end.

Kernels of one stream follow each other, so they share one buffer. A launch that is captured into a CUDA graph gets a region
of its own for good, because its graph may be replayed beside anything; that region is taken from a pool that was
zeroed before, so that no fill kernel enters the graph.
"""

import torch

from tpinv.runtime.device import current_stream

_POOL = 1 << 22  # counters a device's captured launches share, 16 MB
_STREAMS = 64  # that have a buffer at once


class Counters:
    """Of CUDA device number ``index``; None: the CPU."""

    def __init__(self, index: int | None):
        self._index = index
        self._buffers: dict[int, torch.Tensor] = {}  # stream -> its buffer
        self._pool: torch.Tensor | None = None
        self._taken = 0

    @property
    def kept(self) -> int:
        """Bytes."""
        return sum(t.nbytes for t in (*self._buffers.values(), *([] if self._pool is None else [self._pool])))

    def take(self, count: int) -> torch.Tensor:
        """``count`` int32 zeros, for one launch on the current stream that leaves them at zero."""
        if self._index is None:
            return torch.zeros(count, dtype=torch.int32)
        if torch.cuda.is_current_stream_capturing():
            start = self._taken
            if self._pool is None or start + count > _POOL:
                return self._zeros(count)  # one fill kernel in the graph: slower, as right
            self._taken = start + -(-count // 32) * 32
            return self._pool[start : start + count]
        if self._pool is None:
            self._pool = self._zeros(_POOL)
        stream = current_stream(self._index)
        if stream not in self._buffers or self._buffers[stream].numel() < count:
            if len(self._buffers) >= _STREAMS:  # each goes back to its own stream's memory: what was launched there comes first
                self._buffers.clear()
            self._buffers[stream] = self._zeros(max(count, 1 << 14))
        return self._buffers[stream]

    def recycle(self) -> None:
        """Gives the regions of captured launches out again. Only when every graph captured so far is gone: a benchmark makes thousands."""
        self._taken = 0

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", self._index))

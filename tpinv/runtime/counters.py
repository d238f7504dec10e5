"""Arrival counters: zeros that kernels count up in and set back to zero before they end.

Kernels of one stream follow each other, so they share one buffer. A launch that is captured into a CUDA graph gets a region
of its own for good, because its graph may be replayed beside anything; that region is taken from a pool that was
zeroed before, so that no fill kernel enters the graph.
"""

import torch

from tpinv.runtime.device import current_stream

_POOL = 1 << 20  # counters a device's captured launches share, 4 MB
_buffers: dict[tuple[int, int], torch.Tensor] = {}
_pools: dict[int, torch.Tensor] = {}
_taken: dict[int, int] = {}


def arrivals(count: int, device: torch.device) -> torch.Tensor:
    """``count`` int32 zeros on CUDA ``device``, for one launch on the current stream that leaves them at zero."""
    index = device.index
    if torch.cuda.is_current_stream_capturing():
        start = _taken.get(index, 0)
        if index not in _pools or start + count > _POOL:
            return torch.zeros(count, dtype=torch.int32, device=device)  # one fill kernel in the graph: slower, as right
        _taken[index] = start + -(-count // 32) * 32
        return _pools[index][start : start + count]
    if index not in _pools:
        _pools[index] = torch.zeros(_POOL, dtype=torch.int32, device=device)
    key = (index, current_stream(index))
    if key not in _buffers or _buffers[key].numel() < count:
        _buffers[key] = torch.zeros(max(count, 1 << 14), dtype=torch.int32, device=device)
    return _buffers[key]


def recycle() -> None:
    """Gives the regions of captured launches out again. Only when every graph captured so far is gone: a benchmark makes thousands."""
    _taken.clear()

"""The gradients of reference/attention.py, which says what fixes their bits, on any device.

Products are single steps there too: dq over key blocks in order; dk and dv of a query head over tiles of queries in order, then one chain
over the heads of the group. A capped score passes its gradient on times 1 - tanh^2, one fma. A sink's is a left-complete binary tree over
the queries of the batch, [sq, b] in memory order, of what each adds.
"""

import torch
from torch import Tensor

from tpinv.reference import pairwise_sum, row_sum
from tpinv.reference.attention import (
    BLOCK,
    LOG2E,
    NONE,
    PLAIN,
    TILE,
    Keys,
    Options,
    exp2,
    fma,
    products,
    sequences,
    tanh,
    tiles,
)


def _sequence_backward(q, k, v, dout, lse, delta, scale: float, causal: bool, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """q, dout [n, h, d], k, v [m, g, d], lse, delta [h, n] -> dq [n, h, d], dk, dv [m, g, d]. FlashAttention-2's recurrences:
    dq over key blocks in order; dk and dv of a query head over tiles of queries in order, then one chain over the heads of the group."""
    (queries, heads, width), (length, groups, _), dtype = q.shape, k.shape, q.dtype
    per_group = heads // groups
    q_tiles, d_tiles = tiles(q.transpose(0, 1)), tiles(dout.transpose(0, 1))  # [h, T, 64, W]
    k_tiles, v_tiles = (tiles(t.transpose(0, 1), BLOCK).repeat_interleave(per_group, 0) for t in (k, v))
    rows = q_tiles.shape[1] * TILE
    lse = torch.nn.functional.pad(lse, (0, rows - queries), value=float("inf")).view(heads, -1, TILE, 1)
    delta = torch.nn.functional.pad(delta, (0, rows - queries)).view(heads, -1, TILE, 1)
    seen = torch.full((queries,), length)
    if causal:
        seen = seen - torch.arange(queries - 1, -1, -1)
    keys, (inner, outer) = Keys.of(seen, k_tiles.shape[1], options.window), options.factors(scale)
    dq, dk, dv = torch.zeros_like(q_tiles), torch.zeros_like(k_tiles), torch.zeros_like(v_tiles)
    padded = q_tiles.shape[3]
    for block in range(k_tiles.shape[1]):
        seeing_tiles = keys.tiles(block)
        seeing = seeing_tiles.stop - seeing_tiles.start
        if not seeing:
            continue
        here, shape = (slice(None), seeing_tiles), (heads, seeing, TILE, BLOCK)
        q_here, d_here = ([t for t in x[here].flatten(0, 1).unbind(0)] for x in (q_tiles, d_tiles))
        k_here, v_here = ([t for head in x[:, block].unbind(0) for t in [head] * seeing] for x in (k_tiles, v_tiles))
        scores = products(q_here, [t.t() for t in k_here], q_tiles, BLOCK).view(shape)
        if inner is not None:
            scores = tanh(scores * inner)
        p = exp2(fma(scores, outer, -lse[here]))
        keys.hide(p, block, 0.0)
        dp = products(d_here, [t.t() for t in v_here], q_tiles, BLOCK).view(shape)
        ds = p * (dp - delta[here])
        if inner is not None:
            ds = ds * fma(-scores, scores, torch.ones_like(scores))
        ds = ds.to(dtype).float().flatten(0, 1)
        p = p.to(dtype).float().flatten(0, 1)
        dq[here] += products(ds.unbind(0), k_here, q_tiles, padded).view(heads, seeing, TILE, padded)
        to_dv = products([t.t() for t in p.unbind(0)], d_here, q_tiles, padded).view(heads, seeing, BLOCK, padded)
        to_dk = products([t.t() for t in ds.unbind(0)], q_here, q_tiles, padded).view(heads, seeing, BLOCK, padded)
        for tile in range(seeing):
            dv[:, block] += to_dv[:, tile]
            dk[:, block] += to_dk[:, tile]
    dq = (dq * scale).flatten(1, 2)[:, :queries, :width].transpose(0, 1)
    dk, dv = ((t.flatten(1, 2)[:, :length, :width]).unflatten(0, (groups, per_group)) for t in (dk * scale, dv))
    for head in range(1, per_group):
        dk[:, 0] += dk[:, head]
        dv[:, 0] += dv[:, head]
    return dq.to(dtype), *(t[:, 0].transpose(0, 1).to(dtype) for t in (dk, dv))


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float, causal: bool, pack=None, options: Options = PLAIN
) -> tuple[Tensor, ...]:
    """dq, dk, dv, contiguous, in the shapes of q, k, v; and dsinks if there are any."""
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    delta = row_sum(out.float() * dout.float()).permute(1, 2, 0)
    if pack is None:
        every = [(slice(None), b, slice(None)) for b in range(q.shape[1])]
    else:
        every = [(queries, 0, keys) for queries, keys in sequences(pack)]
    for queries, b, keys in every:
        if q[queries].numel():
            parts = (q[queries, b], k[keys, b], v[keys, b], dout[queries, b], lse[b, :, queries], delta[b, :, queries])
            dq[queries, b], dk[keys, b], dv[keys, b] = _sequence_backward(*parts, scale, causal, options)
    if options.sinks is None:
        return dq, dk, dv
    return dq, dk, dv, pairwise_sum(sink_terms(lse, delta, options.sinks), 0).to(options.sinks.dtype)


def sink_terms(lse: Tensor, delta: Tensor, sinks: Tensor) -> Tensor:
    """lse, delta [b, h, sq] -> [sq b, h], what each query adds to the gradient of its head's sink; rows of no sequence, whose lse is -inf, 0."""
    shift = sinks.float().mul(LOG2E).view(1, -1, 1) - torch.where(lse == NONE, 0.0, lse)
    if shift.is_cuda:
        p = shift.exp2()
    else:
        p = exp2(torch.nn.functional.pad(shift.flatten(), (0, -shift.numel() % TILE)))[: shift.numel()].view_as(shift)
    terms = torch.where(lse == NONE, 0.0, -p * delta)
    return terms.permute(2, 0, 1).flatten(0, 1)

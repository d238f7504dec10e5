"""Attention by leaves in plain torch: the oracle for kernels/attention, and the CPU backend of core_attention, packed_attention and
paged_attention, with the kernels' signatures.

What one row (a query of one head) is, the contract, for keys counted from the sequence's first:

    block   64 keys. scores s = q k^T; top' = max(top, max(s) scale); p = exp2(fma(s, scale, -top')), shrink = exp2(top - top');
            total = fma(total, shrink, sum of p); acc = acc shrink, then acc + p v, p rounded once to the inputs' dtype.
            The sum of p is a fixed tree over the 64 columns, :func:`block_sum`
    leaf    512 keys: the recurrence over its blocks, from top = -inf, total = 0, acc = 0
    node    8 leaves: a chain of merges from left to right, :func:`merge`
    root    the nodes under the left-complete tree of tree.py, whose nodes are merges too; then one division. lse = top + log2(total)

``scale`` includes log2(e); lse is in powers of two. What the mask hides adds zeros, so that a block, leaf or node which a row sees nothing
of may be skipped or not: a row has the same bytes in a prefill, in any chunk of it, and alone. A zero result is +0.0, whatever
its terms were. So a prefill may run through the keys while a decode computes leaves apart and merges them.

Options change what a row sees and what its scores are, and no place of any key (:class:`Options`):

    window  a row sees its last ``window`` keys, its own the last of them. Blocks, leaves and nodes before them are hidden as those behind are
    softcap what was s scale above is u (softcap log2(e)) with u = :func:`tanh` (s (scale / softcap)), whose every operation IEEE 754 fixes
    sinks   one more key per head, with the score sink log2(e) and the value 0, merged behind the root of the tree

On a CPU every product is one step of 64 rows by 64 keys by the head's width (a multiple of 16, filled up with zeros), from contiguous
copies: what a BLAS does then depends on the values alone. Rows of a group of query heads fill such a tile together, since a row's place in
it does not matter. fma is computed in float64 and rounded. exp2 is torch's, called on whole vectors by one thread, since its scalar code
has other bits.

Legend: G key heads (of all sequences of a batch), N rows of a key head (queries by heads of its group), T tiles of 64 rows, B blocks of
keys, W the padded width.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tpinv.contract import ATTENTION_BLOCK as BLOCK
from tpinv.contract import ATTENTION_LEAF, ATTENTION_NODE, TANH_LIMIT, TANH_P, TANH_Q
from tpinv.tree import ReductionTree

LOG2E = 1.4426950408889634
TILE = 64  # rows of a product
_WHOLE = 1 << 15  # elements that torch computes in one thread
NONE = float("-inf")


class Part(NamedTuple):
    """What some of the keys make of rows: the largest scaled score, sum of p, and p v, not yet divided. top, total [G, T, 64], acc [..., W]."""

    top: Tensor
    total: Tensor
    acc: Tensor


class Pack(NamedTuple):
    """Sequence i of a pack: queries first_q[i] and on, cu_q[i + 1] - cu_q[i] of them, at most longest_q; keys likewise. int32.
    What is in no sequence is zero in every result."""

    cu_q: Tensor
    cu_k: Tensor
    first_q: Tensor
    first_k: Tensor
    longest_q: int
    longest_k: int


class Options(NamedTuple):
    """``window`` keys that a causal row sees, None: all; ``softcap`` of scores, None: none; ``sinks`` [h], the logits of no key, None: none."""

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def kinds(self) -> tuple[bool, bool, bool]:
        """Which of them are given."""
        return tuple(option is not None for option in self)

    @property
    def given(self) -> bool:
        return any(self.kinds)

    def factors(self, scale: float) -> tuple[float | None, float]:
        """What a score is multiplied by before tanh, None without, and what a score, or that tanh, is multiplied by in powers of two."""
        return (None, scale * LOG2E) if self.softcap is None else (scale / self.softcap, self.softcap * LOG2E)


PLAIN = Options()


# -- arithmetic ---------------------------------------------------------------------------------------------------------------------


def fma(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """a b + c, rounded once to float32 (but for a tie that float64 makes, once in some 2^29)."""
    b = b.double() if isinstance(b, Tensor) else torch.tensor(b, dtype=torch.float32).double()
    return (a.double() * b).add_(c.double()).float()


def tanh(x: Tensor) -> Tensor:
    """tanh of float32, by the operations of contract.TANH_P."""
    x = x.clamp(-TANH_LIMIT, TANH_LIMIT)
    z = x * x
    (*low_p, p), (*low_q, q) = TANH_P, TANH_Q
    p, q = torch.full_like(z, p), torch.full_like(z, q)
    for of_p, of_q in zip(reversed(low_p), reversed(low_q), strict=True):
        p, q = (fma(t, z, torch.tensor(one, dtype=torch.float32, device=x.device)) for t, one in ((p, of_p), (q, of_q)))
    return (x * p / q).clamp_(-1.0, 1.0)


def exp2(x: Tensor) -> Tensor:
    """2^x of a float32 tensor whose elements are a multiple of 64, in place if it is contiguous."""
    x = x.contiguous()
    for part in x.view(-1).split(_WHOLE):
        part.exp2_()
    return x


def block_sum(p: Tensor) -> Tensor:
    """[..., 64] -> [...]: neighbours; then the 8 sums in distance 8 as a tree of neighbours; then the 4 that are left likewise.

    In the tensor core's accumulator a thread holds two neighbours of every 8 columns, and four threads a row: the last step alone crosses
    threads."""
    p = p.unflatten(-1, (8, 4, 2))
    p = p[..., 0] + p[..., 1]
    while p.shape[-2] > 1:
        p = p[..., 0::2, :] + p[..., 1::2, :]
    p = p[..., 0, 0::2] + p[..., 0, 1::2]
    return p[..., 0] + p[..., 1]


def finite(top: Tensor) -> Tensor:
    """``top``, or 0 for a row that has seen nothing: -inf - -inf is no number."""
    return torch.where(top == NONE, 0.0, top)


def merge(left: Part, right: Part) -> Part:
    top = torch.maximum(left.top, right.top)
    shift = finite(top)
    a, b = exp2(left.top - shift), exp2(right.top - shift)
    wide_a, wide_b = a.unsqueeze(-1), b.unsqueeze(-1)
    return Part(top, fma(left.total, a, right.total * b), fma(left.acc, wide_a, right.acc * wide_b))


def products(a: Iterable[Tensor], b: Iterable[Tensor], like: Tensor, columns: int) -> Tensor:
    """a_i [64, k] @ b_i [k, columns] -> [len, 64, columns], fp32."""
    a = list(a)
    out = like.new_empty(len(a), TILE, columns, dtype=torch.float32)
    with torch.autocast(like.device.type, enabled=False):
        for x, y, z in zip(a, b, out.unbind(0), strict=True):
            torch.mm(x, y, out=z)
    return out


# -- tiles --------------------------------------------------------------------------------------------------------------------------


def tiles(x: Tensor, rows: int = TILE) -> Tensor:
    """[..., N, d] -> fp32 [..., T, 64, W], a fresh copy filled up with zeros. At least one tile."""
    *lead, count, width = x.shape
    padded_rows, padded_width = max(1, -(-count // rows)) * rows, -(-width // 16) * 16
    out = x.new_zeros(*lead, padded_rows, padded_width, dtype=torch.float32)
    out[..., :count, :width] = x
    return out.unflatten(-2, (-1, rows))


class Keys(NamedTuple):
    """What rows of tiles see. ``seen`` [T, 64]: each row sees that many keys from the first on, not fewer than the row before it, and of them,
    with a window, the last ``window``."""

    seen: Tensor
    first: list[int]  # the first tile that sees anything of each block
    whole: list[int]  # the first tile whose rows all see all of it, if there is no window
    past: list[int]  # the first tile behind them that sees nothing of it
    window: int | None

    @staticmethod
    def of(seen: Sequence[int] | Tensor, blocks: int, window: int | None = None) -> "Keys":
        seen = torch.as_tensor(seen, dtype=torch.int64)
        filled = seen.new_full((max(1, -(-len(seen) // TILE)) * TILE,), int(seen[-1]) if len(seen) else 0)
        filled[: len(seen)] = seen
        filled = filled.view(-1, TILE)
        start = torch.arange(blocks) * BLOCK
        first = torch.searchsorted(filled.amax(1), start, right=True)
        whole = torch.searchsorted(filled.amin(1), start + BLOCK)
        past = torch.full_like(first, len(filled))
        if window is not None:
            past = torch.searchsorted(filled.amin(1) - window, start + BLOCK).clamp(min=first)
        return Keys(filled, first.tolist(), whole.tolist(), past.tolist(), window)

    def tiles(self, block: int) -> slice:
        """Those that see anything of ``block``."""
        return slice(self.first[block], self.past[block])

    def hide(self, scores: Tensor, block: int, value: float) -> None:
        """scores [G, T of :meth:`tiles`, 64, 64] of ``block``: ``value`` where a row does not see the key."""
        tiles = self.tiles(block)
        first, until = tiles.start, self.whole[block] if self.window is None else tiles.stop
        if until > first:
            key = block * BLOCK + torch.arange(BLOCK, device=scores.device)
            seen = self.seen[first:until].to(scores.device).unsqueeze(-1)
            hidden = key >= seen
            if self.window is not None:
                hidden |= key < seen - self.window
            scores[:, : until - first].masked_fill_(hidden, value)


# -- forward ------------------------------------------------------------------------------------------------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Sequence[int] | Tensor, scale: float, inner: float | None = None, window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [G, N, d], k and v [G, m, d], row i sees the first seen[i] keys, seen in increasing order, or the last ``window`` of them -> out
    [G, N, d], lse fp32 [G, N]. ``inner``, ``scale``: of Options.factors. ``sinks`` [G, N]: a row's sink. A row that sees none is zero, its lse -inf."""
    groups, rows, width = q.shape
    q_tiles, k_tiles, v_tiles = tiles(q), tiles(k, BLOCK), tiles(v, BLOCK)
    blocks = -(-k.shape[1] // BLOCK)
    per_leaf, per_node = ATTENTION_LEAF // BLOCK, ATTENTION_NODE * ATTENTION_LEAF // BLOCK
    keys = Keys.of(seen, blocks, window)

    def node(first: int) -> Part:
        ends = range(first, min(first + per_node, blocks), per_leaf)
        leaves = (leaf(q_tiles, k_tiles, v_tiles, keys, range(at, min(at + per_leaf, blocks)), scale, q.dtype, inner) for at in ends)
        return functools.reduce(merge, leaves)

    nodes = -(-blocks // per_node)
    if nodes:
        root = ReductionTree(nodes).reduce((node(i * per_node) for i in range(nodes)), merge)
    else:
        root = nothing(q_tiles)
    if sinks is not None:
        root = merge(root, sink_part(sinks, root))
    total = root.total.flatten(1)[:, :rows]
    nobody = total == 0
    out = root.acc.flatten(1, 2)[:, :rows, :width] / total.masked_fill(nobody, 1.0).unsqueeze(-1) + 0.0
    lse = root.top.flatten(1)[:, :rows] + total.log2()
    return out.to(q.dtype), lse.masked_fill(nobody, NONE)


def sink_part(sinks: Tensor, like: Part) -> Part:
    """sinks [G, N] -> what they make of rows: a sum of one, and of no value."""
    top = torch.full_like(like.top, NONE)
    top.flatten(1)[:, : sinks.shape[1]] = sinks.float() * LOG2E
    return Part(top, torch.ones_like(top), torch.zeros_like(like.acc))


def nothing(q: Tensor) -> Part:
    return Part(q.new_full(q.shape[:3], NONE), q.new_zeros(q.shape[:3]), torch.zeros_like(q))


def leaf(q: Tensor, k: Tensor, v: Tensor, keys: Keys, blocks: range, scale: float, dtype: torch.dtype, inner: float | None = None) -> Part:
    """q [G, T, 64, W], k and v [G, B, 64, W]"""
    top, total, acc = part = nothing(q)
    groups, _, _, width = q.shape
    for block in blocks:
        seeing_tiles = keys.tiles(block)
        seeing = seeing_tiles.stop - seeing_tiles.start
        if not seeing:
            continue
        here = (slice(None), seeing_tiles)
        repeated = [t for head in k[:, block].mT.unbind(0) for t in [head] * seeing]
        scores = products(q[here].flatten(0, 1).unbind(0), repeated, q, BLOCK).view(groups, seeing, TILE, BLOCK)
        if inner is not None:
            scores = tanh(scores * inner)
        keys.hide(scores, block, NONE)
        new_top = torch.maximum(top[here], scores.amax(-1) * scale)
        shift = finite(new_top)
        p = exp2(fma(scores, scale, -shift.unsqueeze(-1)))
        shrink = exp2(top[here] - shift)
        total[here] = fma(total[here], shrink, block_sum(p))
        repeated = [t for head in v[:, block].unbind(0) for t in [head] * seeing]
        pv = products(p.to(dtype).float().flatten(0, 1).unbind(0), repeated, q, width)
        acc[here] = acc[here].mul_(shrink.unsqueeze(-1)).add_(pv.view(groups, seeing, TILE, width))
        top[here] = new_top
    return part


def grouped(q: Tensor, groups: int) -> Tensor:
    """[n, h, d] -> [G, n h/G, d]: rows of a key head's group, queries outermost."""
    queries, heads, width = q.shape
    return q.reshape(queries, groups, heads // groups, width).transpose(0, 1).reshape(groups, -1, width)


def ungrouped(x: Tensor, heads: int) -> Tensor:
    """[G, n h/G, ...] -> [n, h, ...]"""
    groups = x.shape[0]
    x = x.unflatten(1, (-1, heads // groups)).transpose(0, 1)
    return x.reshape(x.shape[0], heads, *x.shape[3:])


def _sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, options: Options) -> tuple[Tensor, Tensor]:
    """q [n, h, d], k and v [m, g, d] -> out [n, h, d], lse [n, h]. The last query sees all keys, or the last ones."""
    queries, heads, _ = q.shape
    seen = torch.full((queries,), len(k))
    if causal:
        seen = seen - torch.arange(queries - 1, -1, -1)
    seen = seen.repeat_interleave(heads // k.shape[1])
    inner, scale = options.factors(scale)
    sinks = options.sinks
    if sinks is not None:
        sinks = grouped(sinks.view(1, heads, 1).expand(queries, -1, -1), k.shape[1]).squeeze(2)
    out, lse = attend(grouped(q, k.shape[1]), k.transpose(0, 1), v.transpose(0, 1), seen, scale, inner, options.window, sinks)
    return ungrouped(out, heads), ungrouped(lse, heads)


def sequences(pack: Pack) -> list[tuple[slice, slice]]:
    """Rows of the queries and keys of every sequence of a pack."""
    rows = []
    for cu, first in ((pack.cu_q, pack.first_q), (pack.cu_k, pack.first_k)):
        counts = cu.diff().tolist()
        rows.append([slice(start, start + count) for start, count in zip(first.tolist(), counts, strict=False)])
    return list(zip(*rows, strict=True))


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, pack: Pack | None = None, options: Options = PLAIN
) -> tuple[Tensor, Tensor]:
    """q [sq, b, h, d], k and v [sk, b, g, d] -> out [sq, b, h, d], lse fp32 [b, h, sq]. b is 1 in a pack."""
    sq, batch, heads, width = q.shape
    out, lse = q.new_zeros(q.shape), q.new_full((batch, heads, sq), NONE, dtype=torch.float32)
    if pack is None:
        every = [(slice(None), b, slice(None)) for b in range(batch)]
    else:
        every = [(queries, 0, keys) for queries, keys in sequences(pack)]
    for queries, b, keys in every:
        if out[queries].numel():
            out[queries, b], got = _sequence(q[queries, b], k[keys, b], v[keys, b], scale, causal, options)
            lse[b, :, queries] = got.t()
    return out, lse


# -- paged --------------------------------------------------------------------------------------------------------------------------


def paged_forward(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    scale: float, causal: bool, out: Tensor, options: Options = PLAIN,
) -> None:  # fmt: skip
    """query [t, h, d], caches [pages, page size, g, d], block_table [n, pages of the longest], seq_lens [n], query_start_loc [n + 1]; fills
    out [t, h, d]. Rows of no request are zero."""
    out.zero_()
    starts, size = query_start_loc.tolist(), key_cache.shape[1]
    for start, stop, length, pages in zip(starts, starts[1:], seq_lens.tolist(), block_table, strict=False):
        if stop > start and length:
            first = first_seen(stop - start, length, options.window)
            pages = pages[first // size : -(-length // size)].long()
            key, value = (_gather(cache, pages, first, length) for cache in (key_cache, value_cache))
            out[start:stop], _ = _sequence(query[start:stop], key, value, scale, causal, options)


def first_seen(queries: int, keys: int, window: int | None) -> int:
    """The first key that any of the last ``queries`` positions of ``keys`` sees."""
    return 0 if window is None else max(0, keys - queries + 1 - window)


def _gather(cache: Tensor, pages: Tensor, first: int, length: int) -> Tensor:
    """Positions of a request, [length, g, d], of which ``pages`` has those from that of ``first`` on; those before it are 0, as no row sees them."""
    size = cache.shape[1]
    held = cache[pages].flatten(0, 1)
    if not first:
        return held[:length]
    at = first // size * size
    return torch.cat([held.new_zeros(first, *held.shape[1:]), held[first - at : length - at]])


def append_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """key, value [t, g, d] into slots slot_mapping [t] of caches [pages, page size, g, d]; a slot below 0 is left out."""
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    slots, size = slot_mapping[rows], key_cache.shape[1]
    where = slots // size, slots % size
    key_cache[where] = key[rows]
    value_cache[where] = value[rows]

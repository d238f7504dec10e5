"""What tests/test_verified.py runs on ranks: a decoder of two layers over a paged cache, of tpinv's functions and of torch's own."""

import hashlib

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tpinv import ReductionTree, column_parallel_linear, row_parallel_linear
from tpinv.functional import append_kv, paged_attention, rms_norm, swiglu
from tpinv.inference import verified

TREE = ReductionTree(4)
HIDDEN, FFN, HEADS, WIDTH, VOCABULARY, LAYERS, PAGE = 64, 128, 4, 16, 96, 2, 16
LONGEST = 96  # of a sequence, and of what follows it in a window


class Decoder:
    """This rank's shards, and its cache of pages in no order. ``writes``: whether the target's keys and values stay (the twin: no)."""

    def __init__(self, requests, dtype, writes: bool = True):
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.group = dist.group.WORLD if self.size > 1 else None
        self.dtype, self.writes = dtype, writes
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: (torch.randn(shape, generator=generator) * 1.5 * shape[-1] ** -0.5).to(dtype)  # noqa: E731
        cut = lambda weight, dim: weight.chunk(self.size, dim)[self.rank].contiguous()  # noqa: E731
        self.embedding, self.head = draw(VOCABULARY, HIDDEN), draw(VOCABULARY, HIDDEN) * 3
        self.layers = []
        for _ in range(LAYERS):
            qkv = [cut(draw(HEADS * WIDTH, HIDDEN), 0) for _ in range(3)]
            gate_up = torch.cat([cut(draw(FFN, HIDDEN), 0) for _ in range(2)])
            self.layers.append((qkv, cut(draw(HIDDEN, HEADS * WIDTH), 1), gate_up, cut(draw(HIDDEN, FFN), 1)))
        self.one = torch.ones(HIDDEN, dtype=dtype)
        pages = -(-LONGEST // PAGE)
        order = torch.randperm(pages * len(requests), generator=generator).to(torch.int32)
        self.tables = {request.prompt: order[i * pages : (i + 1) * pages] for i, request in enumerate(requests)}
        shape = (pages * len(requests), PAGE, HEADS // self.size, WIDTH)
        self.caches = [(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)) for _ in range(LAYERS)]

    def _run(self, rows, fast: bool):
        """rows: (request, first position, tokens) -> logits of all tokens, packed."""
        tokens = torch.tensor([token for _, _, found in rows for token in found])
        lengths = torch.tensor([len(found) for _, _, found in rows])
        ends = torch.tensor([first + len(found) for _, first, found in rows], dtype=torch.int32)
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        tables = torch.stack([self.tables[request.prompt] for request, _, _ in rows])
        slots = torch.cat([self._slots(*row) for row in rows])
        positions = torch.cat([torch.arange(first, first + len(found)) for _, first, found in rows])
        x = self.embedding[tokens]
        x = x + (positions.unsqueeze(1) * torch.arange(1, HIDDEN + 1) / 37).sin().to(self.dtype) * 0.5
        for (qkv, out, gate_up, down), (keys, values) in zip(self.layers, self.caches, strict=True):
            normed = self._norm(x, fast)
            q, k, v = (self._column(normed, weight, fast).view(len(x), -1, WIDTH) for weight in qkv)
            append_kv(k, v, keys, values, slots)
            if fast:
                y = torch.cat(
                    [self._stock_attention(q[starts[i] : starts[i + 1]], keys, values, tables[i], int(ends[i])) for i in range(len(rows))]
                )
            else:
                y = paged_attention(q, keys, values, block_table=tables, seq_lens=ends, query_start_loc=starts)
            x = x + self._row(y.flatten(1), out, fast)
            x = x + self._row(self._swiglu(self._column(self._norm(x, fast), gate_up, fast), fast), down, fast)
        x = self._norm(x, fast)
        return F.linear(x, self.head) if fast else column_parallel_linear(x, self.head, tree=TREE)

    def _slots(self, request, first, tokens):
        positions = torch.arange(first, first + len(tokens))
        return self.tables[request.prompt][positions // PAGE].long() * PAGE + positions % PAGE

    def _norm(self, x, fast):
        return F.rms_norm(x, (HIDDEN,), self.one, 1e-5) if fast else rms_norm(x, self.one, tree=TREE)

    def _column(self, x, weight, fast):
        return F.linear(x, weight) if fast else column_parallel_linear(x, weight, tree=TREE, group=self.group)

    def _row(self, x, weight, fast):
        if not fast:
            return row_parallel_linear(x, weight, tree=TREE, group=self.group)
        y = F.linear(x, weight)
        if self.group is not None:
            dist.all_reduce(y)
        return y

    def _swiglu(self, x, fast):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up if fast else swiglu(x)

    def _stock_attention(self, q, keys, values, table, end):
        k, v = (cache[table.long()].flatten(0, 1)[:end].transpose(0, 1).unsqueeze(0) for cache in (keys, values))
        mask = torch.arange(end) <= torch.arange(end - len(q), end).unsqueeze(1)
        return F.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask)[0].transpose(0, 1)

    def draft(self, requests, counts):
        """Self-draft: stock arithmetic, a token of all requests at a time, keys and values into the requests' own slots."""
        found = [([], []) for _ in requests]
        for step in range(max(counts)):
            going = [i for i, count in enumerate(counts) if step < count]
            rows = []
            for i in going:
                sequence = (*requests[i].context, *found[i][0])
                rows.append((requests[i], len(sequence) - 1, sequence[-1:]))
            for i, row, logits in zip(going, rows, self._run(rows, fast=True).split(1), strict=True):
                token, log_prob = verified.own_tokens(logits, requests[i], row[1], TREE)
                found[i][0].extend(token)
                found[i][1].extend(log_prob)
        return found

    def target(self, windows):
        kept = None if self.writes else [(k.clone(), v.clone()) for k, v in self.caches]
        logits = self._run([(w.request, w.first, w.tokens) for w in windows], fast=False)
        if kept is not None and any(w.first for w in windows):
            for cache, before in zip(self.caches, kept, strict=True):
                for new, old in zip(cache, before, strict=True):
                    unwritten = old.isnan()
                    new.copy_(torch.where(unwritten, new, old))
        answers, first = [], 0
        for window in windows:
            rows = logits[first : first + len(window.tokens)][-len(window.drafts) - 1 :]
            first += len(window.tokens)
            answers.append(verified.own_tokens(rows, window.request, len(window.request.context) - 1, TREE))
        return answers

    def kv_bytes(self, request) -> str:
        """Of all positions but the last token's, which nothing has read, layers and heads of all ranks."""
        digest = hashlib.sha256()
        for cache in (tensor for layer in self.caches for tensor in layer):
            mine = cache.flatten(0, 1)[self._slots(request, 0, request.context[:-1])]
            shares = [torch.empty_like(mine) for _ in range(self.size)]
            if self.size > 1:
                dist.all_gather(shares, mine)
            else:
                shares = [mine]
            digest.update(torch.cat(shares, 1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def requests_of(specs) -> list[verified.Request]:
    return [verified.Request(**spec) for spec in specs]


def decode(specs, dtype, window: int, share: float, writes: bool = True, alone: bool = False, fixed: bool = False):
    """(tokens, bytes of log-probabilities, digest of keys and values) of each request, and the counts as a dict. ``alone``: one request
    after another. ``fixed``: drafts of window tokens that repeat the last one, as an n-gram might."""
    requests = requests_of(specs)
    model = Decoder(requests, dtype, writes)
    draft = verified.spoil(_repeat if fixed else model.draft, share, VOCABULARY) if window else None
    totals = verified.Counts()
    for some in [[request] for request in requests] if alone else [requests]:
        counts = verified.decode(some, draft, model.target, window=window)
        totals = verified.Counts(*(a + b for a, b in zip(vars(totals).values(), vars(counts).values(), strict=True)))
    found = [(r.tokens, torch.tensor(r.log_probs).numpy().tobytes().hex(), model.kv_bytes(r), r.finished) for r in requests]
    return found, vars(totals)


def _repeat(requests, counts):
    return [
        ([request.context[-1]] * (count if place % 2 else count // 2), ())
        for place, (request, count) in enumerate(zip(requests, counts, strict=True))
    ]

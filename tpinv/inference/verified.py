"""Verified decoding: something fast drafts, the invariant model decides, and nothing that it has not decided leaves.

    draft     proposes tokens for a request, by any means: stock kernels, another parallelism, fp8 weights, another server
    target    computes the window of last token and drafts in one pass: at every row its own next token and that token's log-probability,
              its keys and values in the request's slots, over what the draft may have left there
    commit    the longest prefix of drafts that are the target's own tokens, then the target's token at the first that is not, or after all

A target whose rows depend neither on the shape of the pass nor on the rest of the batch gives, in a window of any length, what it gives one
token at a time. So tokens, log-probabilities and keys and values are those of plain decoding, whatever the draft, the window and the batch:
plain decoding is the window 0. There are no fixed groups, no dummies and no isolated prefills; windows of different lengths and prompts pack
into one pass. A pass commits at least one token of each request, and rolls back by not keeping: the next window starts where it stopped.

What makes it wrong is keys and values of the draft that stay where the target would have written its own: the next rows read them.

Sampling is no exception, since a token is a function of (logits, seed, position): :func:`own_tokens` draws what plain decoding draws there.
B requests, n rows, V vocabulary.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tpinv.inference.log_probs import token_log_probs
from tpinv.inference.sampling import apply_temperature, greedy, keep_top, sample
from tpinv.tree import ReductionTree


@dataclass
class Request:
    """A prompt and what has been committed after it.

    Attributes:
        prompt: token ids, at least one.
        limit: the most tokens of the answer, at least one.
        stop: sequences of token ids, each of which ends the answer and is its last part.
        temperature: 0 takes the likeliest token, and ``seed``, ``top_k`` (0: all) and ``top_p`` do not matter.
        deterministic: False takes the draft's tokens as they are, once the prompt is computed; such requests may stand between others.
        tokens, log_probs: committed so far. ``finished``: None, "stop" or "length".
    """

    prompt: tuple[int, ...]
    limit: int
    stop: tuple[tuple[int, ...], ...] = ()
    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    deterministic: bool = True
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: str | None = None

    def __post_init__(self):
        self.prompt = tuple(self.prompt)
        self.stop = tuple(tuple(sequence) for sequence in self.stop)
        if not self.prompt or self.limit < 1 or not all(self.stop):
            raise ValueError(
                f"a prompt of {len(self.prompt)} tokens, limit={self.limit}, stop={self.stop}: give at least one token each, or leave stop out"
            )
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: must be at least 0, at least 0, and in (0, 1]"
            )

    @property
    def context(self) -> tuple[int, ...]:
        return (*self.prompt, *self.tokens)

    def commit(self, tokens: Sequence[int], log_probs: Sequence[float]) -> int:
        """Appends up to the first token that ends the answer; returns how many."""
        for count, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True), 1):
            self.tokens.append(int(token))
            self.log_probs.append(float(log_prob))
            if any(tuple(self.tokens[-len(sequence) :]) == sequence for sequence in self.stop):
                self.finished = "stop"
            elif len(self.tokens) == self.limit:
                self.finished = "length"
            if self.finished:
                return count
        return len(tokens)


@dataclass(frozen=True)
class Window:
    """What the target computes of a request: the rows of its tokens from ``first`` on and of the drafts, of which the last
    ``len(drafts) + 1`` are asked for. ``first`` is 0 for a new request, and else the place of its last token."""

    request: Request
    drafts: tuple[int, ...]
    first: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of positions ``first`` and following."""
        return (*self.request.context[self.first :], *self.drafts)


# (tokens, log-probabilities) each. A draft may propose fewer than asked; its log-probabilities are for requests that are not deterministic,
# and may be missing (empty) for others. A target may stop behind its first token that is not the draft's, which is all that is looked at.
Rows = tuple[Sequence[int], Sequence[float]]
Draft = Callable[[Sequence[Request], Sequence[int]], Sequence[Rows]]
Target = Callable[[Sequence[Window]], Sequence[Rows]]


@dataclass
class Counts:
    """``recomputed``: drafts that were not committed, of deterministic requests. ``rows``: of windows after the prompts."""

    passes: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0
    recomputed: int = 0
    unverified: int = 0


def decode(
    requests: Sequence[Request],
    draft: Draft | None,
    target: Target,
    *,
    window: int = 32,
    committed: Callable[[Request, int], None] = lambda request, count: None,
) -> Counts:
    """Answers all requests. Afterwards each has its tokens, log-probabilities and how it finished.

    Args:
        draft: asked for up to ``window`` tokens of every unfinished request at a time. None: plain decoding.
        target: asked for all windows of a round at once, of whatever lengths.
        window: the most drafts of a request between two passes. No byte depends on it.
        committed: told of every commitment: (request, how many of its last tokens are new). What it is told is final.

    Raises:
        ValueError: a negative window; rows that do not fit what was asked; a request that is not deterministic, and no drafts for it.
    """
    if window < 0:
        raise ValueError(f"window={window} must be at least 0")
    counts = Counts()
    new = [request for request in requests if not request.finished]
    if draft is None or window == 0:
        draft = _no_drafts
    _pass([Window(request, (), 0) for request in new], target, counts, committed)
    while active := [request for request in new if not request.finished]:
        # The target's own token comes on top.
        room = [min(window, request.limit - len(request.tokens) - request.deterministic) for request in active]
        proposals = draft(active, room)
        if len(proposals) != len(active):
            raise ValueError(
                f"the draft answered {len(proposals)} of {len(active)} requests; it must answer each, with no tokens if it has none"
            )
        windows = []
        for request, most, (tokens, log_probs) in zip(active, room, proposals, strict=True):
            if len(tokens) > most:
                raise ValueError(f"the draft gave {len(tokens)} tokens where {most} were asked for; it must not give more")
            if request.deterministic:
                windows.append(Window(request, tuple(int(token) for token in tokens), len(request.context) - 1))
                continue
            if not len(tokens) or len(tokens) != len(log_probs):
                raise ValueError(
                    f"{len(tokens)} tokens and {len(log_probs)} log-probabilities for a request that is not deterministic: the draft must give "
                    "at least one token, each with its log-probability, or the request be deterministic"
                )
            count = request.commit(tokens, log_probs)
            counts.unverified += count
            committed(request, count)
        _pass(windows, target, counts, committed)
    return counts


def _no_drafts(requests: Sequence[Request], counts: Sequence[int]) -> list[Rows]:
    return [((), ())] * len(requests)


def _pass(windows: list[Window], target: Target, counts: Counts, committed: Callable[[Request, int], None]) -> None:
    if not windows:
        return
    counts.passes += 1
    answers = target(windows)
    if len(answers) != len(windows):
        raise ValueError(f"the target answered {len(answers)} of {len(windows)} windows; it must answer each")
    for window, (tokens, log_probs) in zip(windows, answers, strict=True):
        kept = 0
        while kept < min(len(window.drafts), len(tokens)) and int(tokens[kept]) == window.drafts[kept]:
            kept += 1
        if len(tokens) <= kept or len(log_probs) < kept + 1:
            raise ValueError(
                f"the target gave {len(tokens)} tokens and {len(log_probs)} log-probabilities for {len(window.drafts)} drafts, {kept} of them "
                "its own; it must give its token at every draft up to the first that is not its own, and one more behind the last"
            )
        count = window.request.commit(tokens[: kept + 1], log_probs[: kept + 1])
        counts.rows += len(window.drafts) + 1 if window.first else 0
        counts.drafted += len(window.drafts)
        counts.accepted += min(kept, count)
        counts.recomputed += len(window.drafts) - min(kept, count)
        committed(window.request, count)


def count_equal(own: Tensor, drafts: Tensor, counts: Tensor) -> Tensor:
    """How many drafts are the target's own tokens, up to the first that is not: int64 [B]. Waits for no device.

    Args:
        own: [B, k + 1] or wider, the target's token at every row.
        drafts: [B, k], the draft that stands behind that row.
        counts: [B], how many of the k are drafts.
    """
    width = drafts.shape[1]
    equal = (own[:, :width] == drafts) & (torch.arange(width, device=drafts.device) < counts.unsqueeze(1))
    return equal.cumprod(1).sum(1)


def own_tokens(logits: Tensor, request: Request, first: int, tree: ReductionTree) -> tuple[list[int], list[float]]:
    """What plain decoding commits at each row: logits [n, V] of the positions ``first`` and following -> (tokens, log-probabilities of the
    raw logits)."""
    chosen = apply_temperature(logits, request.temperature).float()
    if request.temperature == 0:
        tokens = greedy(chosen)
    else:
        n, vocabulary = logits.shape
        k = torch.full((n,), request.top_k, device=logits.device) if 0 < request.top_k < vocabulary else None
        p = torch.full((n,), request.top_p, device=logits.device) if request.top_p < 1 else None
        tokens = sample(keep_top(chosen, k, p), [request.seed] * n, [*range(first, first + n)])
    return tokens.tolist(), token_log_probs(logits, tokens.unsqueeze(1), tree)[:, 0].tolist()


def spoil(draft: Draft, share: float, vocabulary: int, seed: int = 0) -> Draft:
    """``draft`` with about ``share`` of its tokens exchanged for others: mismatches by intention, for tests and measurements. Which ones
    follows from the seed and the place, so that every rank exchanges the same."""

    def spoiled(requests: Sequence[Request], counts: Sequence[int]) -> list[Rows]:
        found = []
        for request, (tokens, log_probs) in zip(requests, draft(requests, counts), strict=True):
            place = len(request.context)
            draws = [random.Random(f"{seed} {request.prompt} {place + i}") for i in range(len(tokens))]
            found.append(
                ([_other(int(t), vocabulary, d) if d.random() < share else int(t) for t, d in zip(tokens, draws, strict=True)], log_probs)
            )
        return found

    return spoiled


def _other(token: int, vocabulary: int, draw: random.Random) -> int:
    return (token + draw.randrange(1, vocabulary)) % vocabulary

"""Verified decoding over two engines that share nothing: one streams provisional tokens, another decides, wherever and whenever.

The engine that drafts is anything; the one that decides must be invariant (vLLM with tpinv's plugin, at any tensor-parallel size). What is
committed are the decider's tokens and log-probabilities, the bytes that it would have given alone (verified.py). No engine is changed:

    greedy     the window is scored as a prompt (``prompt_logprobs``), one request a window: the likeliest token of each place, where no
               second one is as likely; else the decider is asked for one token there, since only its sampler knows how it breaks ties
    sampled    one token is asked for behind each of the drafts, with the request's seed: a token is a function of the logits, the seed and
               its place, so that a prompt which ends there draws it

Keys and values are not shared: the decider computes a prompt again for every window, but for what its prefix cache holds (vLLM caches
nothing of a prompt that is scored). That is a prefill for ``window`` tokens, or an audit after the fact.

:class:`Server` speaks to vLLM's OpenAI API; tpinv.integrations.vllm.endpoint.Engine to an ``LLM``; :func:`decisions_of_model` asks a model,
such as the trainer's.
"""

import concurrent.futures
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tpinv.inference.verified import Draft, Request, Rows, Target, Window, own_tokens
from tpinv.tree import ReductionTree


@dataclass(frozen=True)
class Job:
    """``tokens`` more behind ``prompt``, no more and no fewer. ``scored``: with the two likeliest tokens at each place of the prompt."""

    prompt: tuple[int, ...]
    tokens: int
    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    scored: bool = False


@dataclass(frozen=True)
class Completion:
    """``scored``: for each place of the prompt the log-probabilities of some tokens, the two likeliest among them; the first is empty."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    scored: tuple[dict[int, float], ...] = ()


class Endpoint(Protocol):
    def complete(self, jobs: Sequence[Job]) -> list[Completion]:
        """All at once, in their order. RuntimeError where the engine does not answer."""


def drafts_of(endpoint: Endpoint) -> Draft:
    """The draft for verified.decode: what the engine would answer."""

    def draft(requests: Sequence[Request], counts: Sequence[int]) -> list[Rows]:
        asked = [i for i, count in enumerate(counts) if count]
        answers = dict(zip(asked, endpoint.complete([_job(requests[i], requests[i].context, counts[i]) for i in asked]), strict=True))
        return [(answers[i].tokens, answers[i].log_probs) if i in answers else ((), ()) for i in range(len(counts))]

    return draft


def decisions_of(endpoint: Endpoint) -> Target:
    """The target for verified.decode: what the engine, which must be invariant, decides."""

    def target(windows: Sequence[Window]) -> list[Rows]:
        jobs, spans = [], []
        for window in windows:
            context, drafts = window.request.context, window.drafts
            if window.request.temperature:
                found = [_job(window.request, (*context, *drafts[:i]), 1) for i in range(len(drafts) + 1)]
            else:
                found = [Job((*context, *drafts), 1, scored=bool(drafts))]
            spans.append((len(jobs), len(found)))
            jobs += found
        answers = endpoint.complete(jobs)
        decided = []
        for window, (first, count) in zip(windows, spans, strict=True):
            mine = answers[first : first + count]
            if window.request.temperature:
                decided.append(([answer.tokens[0] for answer in mine], [answer.log_probs[0] for answer in mine]))
            else:
                decided.append(_greedy(endpoint, window, mine[0]))
        return decided

    return target


def decisions_of_model(logits_of: Callable[[tuple[int, ...]], Tensor], tree: ReductionTree) -> Target:
    """The target for verified.decode: what a model's forward decides.

    Args:
        logits_of: token ids of a sequence -> the logits of all its rows, [n, V], whole on this rank; an invariant model's.
        tree: of the sum over the vocabulary in log-probabilities.
    """

    def target(windows: Sequence[Window]) -> list[Rows]:
        decided = []
        for window in windows:
            rows = logits_of((*window.request.context, *window.drafts))[-len(window.drafts) - 1 :]
            decided.append(own_tokens(rows, window.request, len(window.request.context) - 1, tree))
        return decided

    return target


def _greedy(endpoint: Endpoint, window: Window, answer: Completion) -> Rows:
    """Up to the first token that is not the draft's."""
    tokens, log_probs, context = [], [], window.request.context
    for i, draft in enumerate(window.drafts):
        likeliest = sorted(answer.scored[len(context) + i].items(), key=lambda entry: -entry[1])
        if len(likeliest) > 1 and likeliest[0][1] > likeliest[1][1]:
            token, log_prob = likeliest[0]
        else:
            (one,) = endpoint.complete([Job((*context, *window.drafts[:i]), 1)])
            token, log_prob = one.tokens[0], one.log_probs[0]
        tokens.append(token)
        log_probs.append(log_prob)
        if token != draft:
            return tokens, log_probs
    return [*tokens, answer.tokens[0]], [*log_probs, answer.log_probs[0]]


def _job(request: Request, prompt: tuple[int, ...], tokens: int) -> Job:
    if not request.temperature:
        return Job(prompt, tokens)
    return Job(prompt, tokens, request.temperature, request.seed, request.top_k, request.top_p)


class Server:
    """A server with vLLM's OpenAI API: prompts as token ids, log-probabilities as the numbers that JSON carries without loss.

    Args:
        url: such as ``http://host:8000``.
        model: its name there; default the first that the server lists.
        requests: sent at once.
    """

    def __init__(self, url: str, model: str | None = None, *, requests: int = 64, timeout: float = 600.0):
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.pool = concurrent.futures.ThreadPoolExecutor(requests)
        self.model = model or self._ask("/v1/models")["data"][0]["id"]

    def complete(self, jobs: Sequence[Job]) -> list[Completion]:
        return list(self.pool.map(self._complete, jobs))

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self._ask("/tokenize", {"model": self.model, "prompt": text})["tokens"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._ask("/detokenize", {"model": self.model, "tokens": list(tokens)})["prompt"]

    def _complete(self, job: Job) -> Completion:
        asked = {
            "model": self.model, "prompt": list(job.prompt), "max_tokens": job.tokens, "temperature": job.temperature, "seed": job.seed,
            "top_k": job.top_k or -1, "top_p": job.top_p, "logprobs": 0, "ignore_eos": True, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "add_special_tokens": False, "skip_special_tokens": False,
        } | ({"prompt_logprobs": 2} if job.scored else {})  # fmt: skip
        choice = self._ask("/v1/completions", asked)["choices"][0]
        told = choice.get("logprobs") or {}
        tokens = choice.get("token_ids") or [int(token.removeprefix("token_id:")) for token in told.get("tokens", ())]
        log_probs = told.get("token_logprobs") or ()
        if len(tokens) != job.tokens or len(log_probs) != job.tokens:
            raise RuntimeError(
                f"{self.url} gave {len(tokens)} tokens and {len(log_probs)} log-probabilities where {job.tokens} were asked for; it must "
                "have room for them (--max-model-len) and return token ids, as vLLM 0.26 and later do"
            )
        scored = tuple(
            {int(token): entry["logprob"] for token, entry in (place or {}).items()} for place in choice.get("prompt_logprobs") or ()
        )
        if job.scored and len(scored) != len(job.prompt):
            raise RuntimeError(f"{self.url} scored {len(scored)} of {len(job.prompt)} places; it must know prompt_logprobs, as vLLM does")
        return Completion(tuple(tokens), tuple(log_probs), scored)

    def _ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{self.url}{path}: {error.code} {error.read()[:500].decode(errors='replace')}") from None
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{self.url}{path}: {error}; is a vLLM server running there?") from None

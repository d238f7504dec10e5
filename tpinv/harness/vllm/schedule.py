"""Random requests and random ways to serve them: what ``tpinv verify --framework vllm`` compares, without vLLM or torch.

The requests of a seed are always the same. A plan says how an engine meets them: when each arrives, how many tokens a step may hold
(chunked prefill), whether prefixes are cached, and how small the cache is (preemption). What a request is told may depend on none of that.
"""

import random
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Request:
    """One request. ``seed`` None is greedy. ``prompt_log_probs``: asked for every token of the prompt, which vLLM then does not cache."""

    name: str
    prompt: tuple[int, ...]
    tokens: int
    seed: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    prompt_log_probs: bool = False


@dataclass(frozen=True)
class Plan:
    """How an engine serves them.

    Attributes:
        waves: each serves all requests once: (request name, the step before which it arrives). Empty: one after the other, each alone in
            the engine, once.
        budget: tokens of a step (max_num_batched_tokens).
        sequences: requests of a step.
        blocks: of the KV cache, 0 for as many as fit.
    """

    name: str
    waves: tuple[tuple[tuple[str, int], ...], ...]
    budget: int
    sequences: int
    prefix_cache: bool
    blocks: int

    def as_dict(self) -> dict:
        return asdict(self)


def make_requests(seed: int, count: int, vocabulary: int, longest: int) -> list[Request]:
    """``count`` requests with prompts up to ``longest`` tokens, of which half begin with one of two common prefixes."""
    draw = random.Random(f"requests {seed}")
    tokens = lambda n: tuple(draw.randrange(3, vocabulary) for _ in range(n))  # noqa: E731
    prefixes = [tokens(longest // 2), tokens(longest // 3)]
    requests = []
    for i in range(count):
        prefix = draw.choice(prefixes) if i % 2 else ()
        prompt = prefix + tokens(draw.randint(1, longest - len(prefix)))
        length = draw.randint(8, max(9, longest // 4))
        if i % 3 == 2:
            sampling = {"seed": draw.randrange(2**31), "temperature": draw.choice((0.7, 1.0, 1.3))}
            sampling |= draw.choice(({}, {"top_k": draw.randint(2, 40)}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.8}))
        else:
            sampling = {}
        requests.append(Request(f"r{i}", prompt, length, prompt_log_probs=i % 4 == 0, **sampling))
    return requests


def alone(requests: list[Request]) -> Plan:
    """Every request by itself, its prompt in one step, nothing cached: what all others are compared with."""
    longest = max(len(request.prompt) + request.tokens for request in requests)
    return Plan("alone", (), max(2048, longest), 1, False, 0)


def crowded(seed: int, requests: list[Request], block: int) -> Plan:
    """Two waves in which requests arrive at random, while a step holds few tokens and the cache a third of what they need at once."""
    draw = random.Random(f"plan {seed}")
    waves = []
    for _ in range(2):
        step, arrivals = 0, []
        for request in draw.sample(requests, len(requests)):
            arrivals.append((request.name, step))
            step += draw.choice((0, 0, 1, 1, 2, 4))
        waves.append(tuple(arrivals))
    sizes = sorted(-(-(len(request.prompt) + request.tokens) // block) for request in requests)
    budget = draw.randint(max(17, len(requests) + 1), 90)
    return Plan(f"crowded {seed}", tuple(waves), budget, len(requests), True, max(sizes[-1] + 2, sum(sizes) // 3))

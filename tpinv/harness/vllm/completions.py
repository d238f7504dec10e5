"""So many completions of one prompt at temperature 0, each beside other strangers, in batches of 1 to 64: how many are there?

The prompt's requests and the strangers' are drawn from a seed, the same for every engine. A completion is its tokens, and with its
log-probabilities it is bytes.
"""

import collections
import random

from tpinv.harness.vllm.schedule import Request

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def make_rounds(seed: int, prompt: tuple[int, ...], tokens: int, count: int, vocabulary: int, longest: int) -> list[list[Request]]:
    """Batches that are served one after the other, with ``count`` completions of ``prompt`` among them in all, named c0, c1, ..."""
    draw = random.Random(f"completions {seed}")
    rounds, made, strangers = [], 0, 0
    while made < count:
        size = BATCHES[len(rounds) % len(BATCHES)] if len(rounds) < 4 * len(BATCHES) else BATCHES[-1]
        mine = min(count - made, size if size == 1 else draw.randint(1, size))
        batch = [Request(f"c{made + i}", prompt, tokens) for i in range(mine)]
        for _ in range(size - mine):
            text = tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(1, longest)))
            batch.append(Request(f"s{strangers}", text, draw.randint(1, tokens)))
            strangers += 1
        draw.shuffle(batch)
        rounds.append(batch)
        made += mine
    return rounds


def summary(rounds: list[list[Request]], answers: dict[str, dict]) -> dict:
    """Distinct completions with how often each came and from what batches; and how many there are with their log-probabilities."""
    kinds, exact = collections.defaultdict(collections.Counter), set()
    for batch in rounds:
        for request in batch:
            if request.name.startswith("c"):
                answer = answers[request.name]
                kinds[tuple(answer["tokens"])][len(batch)] += 1
                exact.add((*answer["tokens"], *answer["log_probs"]))
    found = [{"tokens": list(tokens), "count": sum(batches.values()), "batches": dict(batches)} for tokens, batches in kinds.items()]
    found.sort(key=lambda kind: -kind["count"])
    return {"count": sum(kind["count"] for kind in found), "unique": len(found), "unique_bytes": len(exact), "completions": found}

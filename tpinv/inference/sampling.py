"""Sampling that depends on a request's logits, its seed and the position, and on nothing else.

    greedy    the smallest index among the largest logits
    sample    argmax over v of logits_v + noise_v, noise of the Gumbel distribution: a draw from softmax(logits)

The noise of vocabulary entry v is a function of (seed, position, v) without any state: a request that was preempted, resumed from a
prefix, sampled in another batch or on another number of ranks draws the same token. It comes from Philox 4x32-10 (Salmon et al., SC
2011) with counter (v, position, 0) and key seed, 52 bits of it as a number u in (0, 1), and noise = -log(-log(u)) in float64.
B requests, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def greedy(logits: Tensor) -> Tensor:
    """[B, V] -> int64 [B]: among equal logits, which 16-bit products make often, the smallest index (torch.argmax documents it)."""
    return logits.argmax(-1)


def apply_temperature(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """logits [B, V] / temperature, in float32, rounded once; a temperature of 1, or of 0, which means greedy, leaves them as they are.

    ``temperature``: one number, or float32 [B]. It becomes a tensor of the device: by a number, torch multiplies with the inverse on GPUs.
    """
    if isinstance(temperature, Tensor):
        return logits.float() / temperature.masked_fill(temperature == 0, 1.0).unsqueeze(1)
    if temperature in (0.0, 1.0):
        return logits
    return logits.float() / torch.tensor([temperature], dtype=torch.float32, device=logits.device)


def gumbel_noise(seed: int | Tensor, position: int | Tensor, vocabulary: int, device: torch.device | str = "cpu") -> Tensor:
    """float64 [V] of the standard Gumbel distribution; with ``seed`` and ``position`` as int64 [B, 1], [B, V].

    Args:
        seed: any 64-bit integer.
        position: of the last token before the one to be drawn.
    """
    first, second, _, _ = _philox(torch.arange(vocabulary, device=device), position, seed)
    uniform = (((first << 20) | (second >> 12)).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def sample(logits: Tensor, seeds: list[int], positions: list[int]) -> Tensor:
    """[B, V] -> int64 [B], a draw from softmax(logits) for every row, in float64. -inf is never drawn.

    On a CPU row by row: an elementwise function may treat the last elements of a whole batch differently there.
    """
    if not len(logits):
        return logits.new_empty(0, dtype=torch.int64)
    if logits.is_cuda:
        seed, position = (torch.tensor(given, dtype=torch.int64, device=logits.device).unsqueeze(1) for given in (seeds, positions))
        return (logits.double() + gumbel_noise(seed, position, logits.shape[1], logits.device)).argmax(-1)
    rows = zip(logits.unbind(0), seeds, positions, strict=True)
    return torch.stack([(row.double() + gumbel_noise(seed, position, len(row))).argmax() for row, seed, position in rows])


def keep_top(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """-inf in place of the logits that top-k and top-p sampling drop: [B, V] -> [B, V], ``k`` int [B] (V keeps all), ``p`` float [B].

    Kept are, of every row in the order of (larger logit, smaller index): the first k; and of those the first whose probabilities,
    renormalised among the k, sum to p, the one that reaches it included, at least one. Row by row: a scan over the vocabulary is laid
    out by the number of rows.
    """
    if k is None and p is None:
        return logits
    kept = []
    for b, row in enumerate(logits.unbind(0)):
        order = torch.sort(row, descending=True, stable=True).indices
        ordered = row[order].double()
        drop = torch.zeros_like(order, dtype=torch.bool)
        if k is not None:
            drop |= torch.arange(len(order), device=row.device) >= k[b]
        if p is not None:
            probabilities = torch.softmax(ordered.masked_fill(drop, float("-inf")), -1)
            before = torch.cumsum(probabilities, -1) - probabilities
            drop[1:] |= before[1:] >= p[b].double()
        kept.append(row.masked_fill(torch.empty_like(drop).scatter_(0, order, drop), float("-inf")))
    return torch.stack(kept) if kept else logits


class TopK(NamedTuple):
    values: Tensor
    indices: Tensor


def topk(x: Tensor, k: int) -> TopK:
    """The k largest of every row in the order of (larger, smaller index): [..., V] -> values and int64 indices, [..., k].

    torch.topk leaves open which of equal entries it takes, and the algorithm that decides it is chosen by the number of rows. ``x`` is
    float32 or narrower.
    """
    bits = (x.float() + 0.0).view(torch.int32)  # one zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys = ordered | torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
    indices = x.shape[-1] - 1 - (torch.topk(keys, k, dim=-1).values & _LOW)
    return TopK(x.gather(-1, indices), indices)


def _philox(counter: Tensor, position: int | Tensor, seed: int | Tensor) -> list[Tensor]:
    """Ten rounds over (counter, position, position >> 32, 0), int64 tensors that hold 32 bits each."""
    zero = torch.zeros_like(counter)
    x = [counter & _LOW, zero + (position & _LOW), zero + ((position >> 32) & _LOW), zero]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        (high0, low0), (high1, low1) = (_multiply(x[2 * i], _MULTIPLIERS[i]) for i in (0, 1))
        x = [high1 ^ x[1] ^ key[0], low1, high0 ^ x[3] ^ key[1], low0]
        key = [(word + step) & _LOW for word, step in zip(key, _WEYL, strict=True)]
    return x


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers. int64 keeps the lower 64 bits of what overflows its sign."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW

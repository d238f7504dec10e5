"""A model of your own for ``tpinv verify``: a decoder block of tpinv's layers, with its data and its loss.

    tpinv verify --model examples/verify_plain.py:build --tp 1,2,4 --sequence-parallel

verify calls ``build`` on every rank of every size with the arguments that it names (docs/verify.md lists them), trains what it returns,
and compares every tensor with TP = 1. The stock twin is verify's: the same layers with torch's arithmetic.
"""

import torch
from torch import nn

from tpinv import ColumnParallelLinear, RMSNorm, RowParallelLinear, VocabParallelEmbedding, swiglu, vocab_parallel_cross_entropy

VOCABULARY, WIDTH, HIDDEN, TOKENS = 64, 32, 48, 24


class Block(nn.Module):
    def __init__(self, tree, group, sequence_parallel: bool):
        super().__init__()
        shared = {"tree": tree, "group": group, "sequence_parallel": sequence_parallel}
        self.norm = RMSNorm(WIDTH, **shared)
        self.fc1 = ColumnParallelLinear(WIDTH, 2 * HIDDEN, stride=2, **shared)  # a rank holds its part of gate and of up
        self.fc2 = RowParallelLinear(HIDDEN, WIDTH, **shared)

    def forward(self, x):
        return x + self.fc2(swiglu(self.fc1(self.norm(x))))


class Model(nn.Module):
    def __init__(self, tree, group, sequence_parallel: bool):
        super().__init__()
        self.embedding = VocabParallelEmbedding(VOCABULARY, WIDTH, group=group, sequence_parallel=sequence_parallel)
        self.blocks = nn.Sequential(*(Block(tree, group, sequence_parallel) for _ in range(2)))
        self.head = ColumnParallelLinear(WIDTH, VOCABULARY, bias=False, tree=tree, group=group, sequence_parallel=sequence_parallel)

    def forward(self, ids):
        return self.head(self.blocks(self.embedding(ids)))  # [tokens, vocabulary / ranks]


def build(tree, group, sequence_parallel, device, dtype, steps):
    model = Model(tree, group, sequence_parallel).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (steps, TOKENS + 1), generator=generator)

    def loss(logits, batch):
        return vocab_parallel_cross_entropy(logits, batch["ids"].roll(-1), tree=tree, group=group).mean()

    return {"model": model, "batches": [{"ids": row[:-1]} for row in text], "loss": loss}

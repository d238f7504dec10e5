"""A framework for ``tpinv verify`` that trains nothing: its "stock" tensors depend on the number of ranks, its "tpinv" ones do not.

The options that a real one takes for its model choose a fault here: --tied a stock that does not differ either, --qk-norm a
tpinv that does, 2 micro-batches an unfair start, 3 a recording of other tensors, 4 ranks that sleep as many seconds as there are steps, 5 a
rank 1 that raises while rank 0 waits for it, 6 a stock with NaN.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Run:
    layers: str
    tp: int
    sequence_parallel: bool
    sizes: tuple[int, ...]
    leaves: int
    variant: str
    dtype: str
    steps: int
    micro_batches: int
    tied: bool
    qk_norm: bool


def train(run: Run):
    assert dist.get_world_size() == run.tp and run.tp in run.sizes
    if run.micro_batches == 4:
        time.sleep(run.steps)
    if run.micro_batches == 5 and run.tp > 1:
        1 / (1 - dist.get_rank())
        dist.barrier()
    moves = (run.layers == "stock" and not run.tied) or (run.layers == "tpinv" and run.qk_norm)
    ulps = run.tp - 1 if moves else 0
    weight = torch.arange(1.0, 5.0).view(2, 2)
    moved = (weight.view(torch.int32) + ulps).view(torch.float32)
    if run.micro_batches == 6 and ulps:
        moved[0, 0] = torch.nan
    recorded = {"initial/weight": moved if run.micro_batches == 2 else weight, "step0/logits": weight}
    for step in range(run.steps):
        recorded[f"step{step}/loss"] = torch.tensor(2.0 - step)
    recorded["final/weight"] = moved
    if run.micro_batches == 3 and run.tp > 1:
        recorded["another"] = weight
    return recorded if dist.get_rank() == 0 else None

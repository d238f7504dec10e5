"""transformers: the model is whole on every rank; FSDP2 shards what it stores."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tpinv.collectives import Ranks
from tpinv.functional import vocab_parallel_log_probs
from tpinv.harness.across import DTYPES, Task
from tpinv.integrations.transformers import convert
from tpinv.tree import ReductionTree


def compute(task: Task, variant: str) -> dict[str, Tensor] | None:
    tree, tokens = ReductionTree(task.leaves), task.tokens
    model = AutoModelForCausalLM.from_pretrained(task.path, dtype=DTYPES[task.dtype]).eval()
    if task.layers == "tpinv":
        convert(model, tree=tree)
    if variant == "FSDP2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        if task.layers == "tpinv":
            log_probs = vocab_parallel_log_probs(logits[:, :-1], tokens[:, 1:], tree=tree, group=Ranks(None, 0, 1))
        else:
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return {"logits": logits, "log_probs": log_probs} if dist.get_rank() == 0 else None

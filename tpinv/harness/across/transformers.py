"""transformers: the model is whole on every rank; FSDP2 shards what it stores."""

import contextlib
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def opened(task: Task, variant: str) -> Iterator[tuple[Callable[[Tensor], Tensor], Ranks]]:
    """The checkpoint, loaded: a function from tokens [b, s] to this rank's logits [b, s, V/p], and the ranks that share them."""
    model = AutoModelForCausalLM.from_pretrained(task.path, dtype=DTYPES[task.dtype]).to(task.device).eval()
    if task.layers == "tpinv":
        convert(model, tree=ReductionTree(task.leaves, task.node_dtype))
    if variant == "FSDP2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    yield lambda tokens: model(tokens, use_cache=False).logits, Ranks(None, 0, 1)


def compute(task: Task, variant: str) -> dict[str, Tensor] | None:
    tokens = task.tokens
    with opened(task, variant) as (local_logits, group), torch.no_grad():
        logits = local_logits(tokens)
        if task.layers == "tpinv":
            log_probs = vocab_parallel_log_probs(logits[:, :-1], tokens[:, 1:], tree=ReductionTree(task.leaves), group=group)
        else:
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return {"logits": logits, "log_probs": log_probs} if dist.get_rank() == 0 else None

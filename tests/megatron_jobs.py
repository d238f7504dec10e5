"""What the Megatron tests run on ranks. A module of its own, so that workers import it by name."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor

from tpinv.integrations.megatron import convert, on_cpu
from tpinv.integrations.megatron.verify import Run, build_config, build_model, real_text
from tpinv.layers import unshard


def in_megatron(job: Callable, tp: int, *args):
    """Runs ``job(*args)`` with Megatron's parallel state set up for ``tp`` ranks, on the CPU."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    try:
        with on_cpu():
            return job(*args)
    finally:
        parallel_state.destroy_model_parallel()


def logits_of(run: Run, model, vocab: int | None = None) -> Tensor:
    """Whole logits [b, s, V] of one batch of real text."""
    tokens = real_text()[: 2 * run.sequence].view(2, -1)
    mask = torch.ones(1, 1, run.sequence, run.sequence).triu(1).bool()
    with torch.no_grad():
        logits = model(tokens, torch.arange(run.sequence).expand(2, -1), mask).contiguous()
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits)
    return torch.cat(parts, -1)


def save_checkpoint(run: Run, directory: str) -> Tensor:
    """Saves the model of ``run`` with Megatron's distributed checkpoint; returns its logits."""
    model = build_model(run, build_config(run))
    if dist.get_rank() == 0:
        Path(directory).mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=_metadata()), directory)
    return logits_of(run, model)


def load_checkpoint(run: Run, directory: str) -> dict[str, Tensor]:
    """Loads it into a model drawn from another seed; returns the logits and every whole parameter."""
    model = build_model(run, build_config(run))
    state = dist_checkpointing.load(model.sharded_state_dict(metadata=_metadata()), directory)
    model.load_state_dict(state)
    return {"logits": logits_of(run, model), **whole_parameters(model)}


def _metadata() -> dict:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def whole_parameters(model) -> dict[str, Tensor]:
    whole = {}
    for name, parameter in model.named_parameters():
        parts = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, parameter.detach().contiguous())
        sharded = getattr(parameter, "tensor_model_parallel", False)
        whole[name] = unshard(parts, parameter.partition_dim, parameter.partition_stride) if sharded else parts[0]
    return whole


__all__ = ["convert", "in_megatron", "load_checkpoint", "logits_of", "save_checkpoint", "whole_parameters"]

"""What the Megatron tests run on ranks, and what they share. A module of its own, so that workers import it by name."""

import queue
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tpinv.harness.megatron import verify
from tpinv.harness.megatron.verify import DTYPES, Run, StockProvider, build_config, build_model, real_text, train_here
from tpinv.integrations.megatron import gpt_layer_spec, is_converted, layers, on_cpu
from tpinv.integrations.megatron.specs import block_spec
from tpinv.layers import unshard
from tpinv.ops import main_grad

# Checkpoints are written in this process. The queue that would reach another one comes with a server process, which imports torch.
filesystem_async._results_queue = queue.Queue()


def in_megatron(job: Callable, tp: int, *args):
    """Runs ``job(*args)`` with Megatron's parallel state set up for ``tp`` ranks, on the CPU."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    try:
        with on_cpu():
            return job(*args)
    finally:
        parallel_state.destroy_model_parallel()


def unconverted(run: Run, *, spec: str = "stock", config=None, **settings) -> GPTModel:
    """The GPT of ``run`` before conversion, from Megatron's local spec or ("tpinv") from ours. ``settings`` are GPTModel's."""
    config = build_config(run) if config is None else config
    torch.manual_seed(run.seed)
    model = GPTModel(
        config,
        transformer_layer_spec=gpt_layer_spec(config, tree=run.tree) if spec == "tpinv" else block_spec(config, StockProvider()),
        vocab_size=run.vocab_size,
        max_sequence_length=run.sequence,
        position_embedding_type="rope" if run.variant == "llama" else "learned_absolute",
        share_embeddings_and_output_weights=run.tied,
        **settings,
    )
    return model.to(DTYPES[run.dtype])


def batch(run: Run, shift: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [2, s] of real text, their positions, and the causal mask."""
    tokens = real_text()[shift : shift + 2 * run.sequence].view(2, -1)
    return tokens, torch.arange(run.sequence).expand(2, -1), torch.ones(1, 1, run.sequence, run.sequence).triu(1).bool()


def gathered(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def logits_of(run: Run, model) -> Tensor:
    """Whole logits [2, s, V] of one batch."""
    with torch.no_grad():
        logits = model(*batch(run))
    return logits if logits.shape[-1] == run.vocab_size else torch.cat(gathered(logits), -1)


def whole(model, attribute: str | None = None, *, replicas: bool = True) -> dict[str, Tensor]:
    """Every parameter (or its ``attribute``), put together from the shards. RuntimeError if ``replicas`` are not the same bytes."""
    tensors = {}
    for name, parameter in model.named_parameters():
        parts = gathered(parameter if attribute is None else getattr(parameter, attribute))
        if getattr(parameter, "tensor_model_parallel", False):
            tensors[name] = unshard(parts, parameter.partition_dim, parameter.partition_stride)
        else:
            if replicas and any(not torch.equal(part.view(torch.uint8), parts[0].view(torch.uint8)) for part in parts):
                raise RuntimeError(f"{name} is replicated but not the same bytes on all ranks")
            tensors[name] = parts[0]
    return tensors


def step(run: Run, model) -> dict[str, Tensor]:
    """One forward and backward: whole logits, the loss of every token, and every whole gradient before any finalisation."""
    loss = model(*batch(run), labels=batch(run, 1)[0])
    loss.mean().backward()
    gradients = whole(model, "grad", replicas=is_converted(model))  # stock's q/k norms hold a part each, until finalisation
    gradients = {f"grad/{name}": tensor for name, tensor in gradients.items()}
    return {"logits": logits_of(run, model), "loss": loss.detach(), **gradients}


def save_checkpoint(run: Run, directory: str) -> dict[str, Tensor]:
    """Saves the model of ``run`` with Megatron's distributed checkpoint; returns its logits and every whole parameter."""
    model = _built(run)
    if dist.get_rank() == 0:
        Path(directory).mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=_metadata()), directory)
    return {"logits": logits_of(run, model), **whole(model)}


def load_checkpoint(run: Run, directory: str) -> dict[str, Tensor]:
    """Loads it into the model of ``run``, which should have another seed; returns the same as save_checkpoint."""
    model = _built(run)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata=_metadata()), directory))
    return {"logits": logits_of(run, model), **whole(model)}


def _state(model, optimizer, is_loading: bool) -> dict:
    state = {"model": model.sharded_state_dict(metadata=_metadata())}
    return state | {"optimizer": optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=_metadata())}


def train_and_save(run: Run, directory: str, steps: int) -> dict[str, Tensor] | None:
    """Trains without interruption; saves weights and optimizer after ``steps`` steps."""

    def save(step: int, model, optimizer) -> None:
        if step + 1 == steps:
            if dist.get_rank() == 0:
                Path(directory).mkdir()
            dist.barrier()
            dist_checkpointing.save(_state(model, optimizer, is_loading=False), directory)

    return train_here(run, after=save)


def resume(run: Run, directory: str, steps: int) -> dict[str, Tensor] | None:
    """Goes on from there, from a model of another seed."""

    def load(model, optimizer) -> None:
        loaded = dist_checkpointing.load(_state(model, optimizer, is_loading=True), directory)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])

    return train_here(run, start=steps, before=load)


def train_counting(run: Run, how: str = "") -> tuple[dict[str, Tensor] | None, int]:
    """``train``, and how many weight gradients went straight into main_grad. ``how``: with gradient_accumulation_fusion ("fusion"), with
    overlap_grad_reduce ("overlap"), or with gradients that autograd rounds to their weight's dtype first ("rounded")."""
    stock_ddp, stock_config, stock_add, added = verify._ddp_config, verify.build_config, main_grad.add, []

    def count(*args, **kwargs):
        added.append(args[0])
        return stock_add(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_grad, "add", count)
        patch.setattr(verify, "_ddp_config", lambda run: replace(stock_ddp(run), overlap_grad_reduce=how == "overlap"))
        patch.setattr(verify, "build_config", lambda run: replace(stock_config(run), gradient_accumulation_fusion=how == "fusion"))
        if how == "rounded":
            patch.setattr(layers, "fuses_main_grad", lambda *_: False)
        return verify.train(run), len(added)


def _built(run: Run):
    """In one dtype, as Float16Module makes it: learned positions are drawn in float32."""
    return build_model(run, build_config(run)).to(DTYPES[run.dtype])


def _metadata() -> dict:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

"""Trains a small decoder (recipe.py) with TorchTitan's own Trainer, FSDP and optimizer, and records every tensor of the run.

``train`` is what ``tpinv verify --framework torchtitan`` runs on each rank, once with the stock modules and once with the override. Both
start from the same weights, drawn whole and sharded (stock draws each shard). The recording holds whole tensors, so that runs at
different sizes can be compared byte for byte.
"""

import contextlib
import logging
import os
import tempfile
import warnings
from functools import partial

from tpinv.harness.torchtitan.recipe import STOCK_TRAINS, Run, build_model_config, build_trainer_config, own_trainer_config  # isort: skip  # before torchtitan
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, debug
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.parallel_dims import MeshAxisName
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

from tpinv.collectives import Ranks
from tpinv.harness.comparison import Recording
from tpinv.harness.own import OwnRun, call_factory
from tpinv.integrations.torchtitan.module import init_whole
from tpinv.layers import unshard


class RecordingTrainer(Trainer):
    """The Trainer on ranks that are set up already, which keeps what ``train_step`` computes on the way."""

    def init_distributed(self) -> ParallelDims:
        torch.autograd.set_multithreading_enabled(False)  # the backward pass looks for the current mesh in its own thread
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())

    def forward_backward_step(self, **batch) -> Tensor:
        loss = super().forward_backward_step(**batch)
        self.losses.append(loss.detach().float())
        return loss

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        model = self.model_parts[0]
        model._skip_lm_head, skipped = False, model._skip_lm_head
        with self.train_context():
            logits = model(tokens.to(self.device))
        model._skip_lm_head = skipped
        return logits.float()

    def run(self, record: "Record", steps: int) -> None:
        model = self.model_parts[0]
        batches = list(zip(range(steps * self.gradient_accumulation_steps), self.dataloader, strict=False))
        record.parameters("initial", model)
        record.sharded("step0/logits", self.logits(batches[0][1][0]["input"]), -1)
        if not self.config.override.imports and not STOCK_TRAINS:  # below torch 2.12 stock is only known by its logits
            return
        iterator = self.batch_generator(batch for _, batch in batches)
        for self.step in range(1, steps + 1):
            step, self.losses = self.step - 1, []
            with _before_clipping(partial(self._record_step, record, step, step in (0, steps - 1))):
                self.train_step(iterator)
        record.parameters("final", model)

    def _record_step(self, record: "Record", step: int, gradients: bool, norm: Tensor | None) -> None:
        if norm is not None:
            record.replicated(f"step{step}/grad_norm", norm)
            return
        record.replicated(f"step{step}/loss", torch.stack(self.losses).sum(0))
        if gradients:
            record.parameters(f"step{step}/grad", self.model_parts[0], gradients=True)


@contextlib.contextmanager
def _before_clipping(look):
    """Calls look(norm=None) before the trainer clips, and look(norm=...) after it."""
    clip = dist_utils.clip_grad_norm_

    def looked(*args, **kwargs):
        look(norm=None)
        norm = clip(*args, **kwargs)
        look(norm=norm.detach().float().cpu())
        return norm

    dist_utils.clip_grad_norm_ = looked
    try:
        yield
    finally:
        dist_utils.clip_grad_norm_ = clip


class Record:
    """Whole tensors, put together over the tensor-parallel ranks (of the first replica: world ranks 0 to tp - 1)."""

    def __init__(self, tp: int):
        self.tp = tp
        self.tensors: dict[str, Tensor] = {}

    def parameters(self, prefix: str, model: nn.Module, *, gradients: bool = False) -> None:
        named = [(name, parameter, shard_dim(model, name)) for name, parameter in model.named_parameters()]
        for name, parameter, dim in reversed(named) if gradients else named:
            tensor = parameter.grad if gradients else parameter.detach()
            if dim is None:
                self.replicated(f"{prefix}/{name}", tensor)
            else:
                self.sharded(f"{prefix}/{name}", tensor, dim)

    def sharded(self, name: str, tensor: Tensor, dim: int) -> None:
        if isinstance(tensor, DTensor):
            self.tensors[name] = tensor.full_tensor().detach().clone().cpu()  # of one rank it may be the parameter itself
        else:
            self.tensors[name] = unshard(_gather(tensor)[: self.tp], dim % tensor.dim()).clone().cpu()

    def replicated(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        first, *others = (part.view(-1).view(torch.uint8) for part in _gather(tensor)[: self.tp])
        if any(not torch.equal(first, other) for other in others):
            raise RuntimeError(f"{name} is replicated but not the same bytes on all ranks")
        self.tensors[name] = tensor.detach().clone().cpu()


def shard_dim(model: nn.Module, name: str) -> int | None:
    """The dimension on which tensor parallelism shards a parameter, by its module's own declaration."""
    owner, _, leaf = name.replace("._checkpoint_wrapped_module", "").rpartition(".")
    layout = model.get_submodule(owner)._sharding_config.state_shardings[leaf]
    return getattr(layout.per_axis_spmd_types()[MeshAxisName.TP], "dim", None)


def _gather(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


@contextlib.contextmanager
def drawn_whole(ranks: Ranks):
    """Stock modules that are initialised in here start from the weights of tpinv's: each drawn whole, in the same order."""

    def init_param(stock: Module, name: str, param: nn.Parameter) -> None:
        init_whole(param, stock._param_init[name], shard_dim(stock, name), ranks)

    own, Module._init_param = Module._init_param, init_param
    try:
        yield
    finally:
        Module._init_param = own


def train(run: Run, model=None) -> dict[str, Tensor] | None:
    """Trains ``model`` (a model's Config; default the small one of ``build_model_config``) on this rank. Rank 0 returns the recording,
    name -> whole tensor on the CPU, in the order in which things are computed; the others None.

    initial/NAME, step0/logits, stepI/loss, stepI/grad/NAME for the first and the last step (before clipping), stepI/grad_norm,
    final/NAME. RuntimeError if a replicated parameter or gradient is not the same bytes on all ranks.
    """
    with running(run, model) as trainer:
        record = Record(run.tp)
        trainer.run(record, run.steps)
    return record.tensors if dist.get_rank() == 0 else None


def train_own(run: OwnRun, first: Recording) -> dict[str, Tensor] | None:
    """The same with what the user's factory returns (harness/own.py): a model's Config or a ModelSpec, around which verify makes the small
    Trainer.Config of recipe.py, or a Trainer.Config, of which it sets what the comparison is about (own_trainer_config). Tensors are drawn
    whole in stock and tpinv alike, so that initial weights do not depend on TP; that they do not is checked."""
    case, own_twin = call_factory(run)
    settings = Run(
        run.layers, run.tp, run.sequence_parallel, run.sizes, leaves=run.leaves, dtype=run.dtype, steps=run.steps,
        micro_batches=run.micro_batches, device=run.device, seed=run.seed,
    )  # fmt: skip
    if case.batches is not None or case.optimizer is not None or case.loss is not None:
        raise ValueError(f"{run.model}: for TorchTitan batches, loss and optimizer are the Trainer.Config's; return one that has them")
    with running(settings, config=partial(own_trainer_config, run, settings, case.model)) as trainer:
        record = Record(run.tp)
        trainer.run(record, run.steps)
    return record.tensors if dist.get_rank() == 0 else None


@contextlib.contextmanager
def running(run: Run, model=None, config=None):
    """The trainer of ``run`` on this rank, closed in the end. Stock modules start from the weights of tpinv's. ``config(folder)`` makes the
    Trainer.Config, by default that of ``model``."""
    warnings.simplefilter("ignore")
    for name in (None, "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if run.device == "cuda" else dist.get_rank())
    weights = drawn_whole(Ranks(None, dist.get_rank() % run.tp, run.tp)) if run.layers == "stock" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="tpinv-") as folder:
        with weights:
            made = build_trainer_config(run, model or build_model_config(run), folder) if config is None else config(folder)
            trainer = RecordingTrainer(made)
        for part in trainer.model_parts[0].modules() if run.dp > 1 else ():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(dist.get_backend() == "gloo")  # which has no sum with a factor
        try:
            yield trainer
        finally:
            trainer.close()
            # DTensor's caches would give an equal mesh of later process groups the one of these, which FSDP refuses.
            debug._clear_sharding_prop_cache()
            if run.compile or config is not None:
                torch._dynamo.reset()  # the blocks of all models are one function, which may be compiled so many times

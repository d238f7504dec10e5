"""Trains a small GPT with Megatron-Core's own model, DistributedDataParallel and optimizer, and records every tensor of the run.

``train`` is what ``tpinv verify`` runs on each rank of each tensor-parallel size, once with the stock layers and once with tpinv's.
Everything that is not the subject is equal on purpose: the weights are drawn whole on the CPU and sharded, tokens are bytes of real
text, dropout is off, gradients are accumulated in fp32, bf16 runs keep fp32 master weights. The recording holds whole tensors,
put together from the shards, so that runs at different sizes can be compared byte for byte.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from tpinv.harness import weights
from tpinv.harness.comparison import DTYPES, LOADED, Recording
from tpinv.harness.own import Case, OwnRun, call_factory, require_dtype
from tpinv.integrations.megatron import convert, convert_optimizer, gpt_layer_spec, is_converted, on_cpu, te
from tpinv.integrations.megatron.specs import block_spec
from tpinv.layers import unshard
from tpinv.testing.text import real_text
from tpinv.tree import ReductionTree


@dataclass(frozen=True)
class Run:
    """One run of the comparison. ``sizes`` are all tensor-parallel sizes compared, so that one model fits every one of them."""

    layers: str  # "stock" or "tpinv"
    tp: int
    sequence_parallel: bool
    sizes: tuple[int, ...]
    leaves: int = 8
    spec: str = (
        "local"  # or "te": TransformerEngine's layers, which Megatron builds by default where it is installed, its rope and its Adam
    )
    variant: str = "llama"  # RMSNorm, SwiGLU, grouped queries, rope; "gpt": LayerNorm, GELU, biases, learned positions
    dtype: str = "fp32"
    steps: int = 5
    micro_batches: int = 1
    tied: bool = False
    qk_norm: bool = False
    num_layers: int = 2
    seed: int = 1234
    device: str = "cpu"  # or "cuda", the current GPU
    hidden: int = 0  # about, with heads of 128; 0: as small as can be
    recompute: bool = False  # every layer's activations
    distributed_optimizer: bool = False

    @property
    def tree(self) -> ReductionTree:
        return ReductionTree(self.leaves)

    @property
    def vocab_size(self) -> int:
        return -(-256 // self.leaves) * self.leaves

    @property
    def sequence(self) -> int:
        fits = math.lcm(*self.sizes)
        return -(-(128 if self.hidden else 48) // fits) * fits


def build_config(run: Run) -> TransformerConfig:
    """The smallest config in which every sharded dimension has ``leaves`` equal leaves and every size divides the query groups."""
    if run.spec == "te" and not te.INSTALLED:
        raise ValueError(
            "spec='te' needs TransformerEngine, which cannot be imported; pip install transformer-engine[pytorch], or use 'local'"
        )
    groups = math.lcm(*run.sizes)
    heads = 2 * groups
    width = 16 if heads <= 16 else 8
    if run.hidden:
        heads, width = groups * max(1, run.hidden // (128 * groups)), 128
    unit = math.lcm(heads * width, run.leaves)
    llama = run.variant == "llama"
    dtype = DTYPES[run.dtype]
    return TransformerConfig(
        num_layers=run.num_layers,
        hidden_size=unit,
        num_attention_heads=heads,
        num_query_groups=groups if llama else heads,
        kv_channels=unit // heads,
        # on purpose no multiple of a vector (see tpinv/ops/activation.py), but where speed counts
        ffn_hidden_size=2 * unit + (0 if run.hidden else run.leaves),
        normalization="RMSNorm" if llama else "LayerNorm",
        activation_func=torch.nn.functional.silu if llama else torch.nn.functional.gelu,
        gated_linear_unit=llama,
        add_bias_linear=not llama,
        qk_layernorm=run.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=run.tp,
        sequence_parallel=run.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        apply_rope_fusion=run.spec == "te",
        **({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if run.recompute else {}),
    )


class _TorchNorm:
    """The stock local norm, which refuses sequence parallelism for want of the mark that Megatron's finalisation looks for."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class StockProvider(LocalSpecProvider):
    """Megatron's local modules, with a norm that can do sequence parallelism without Apex."""

    def layer_norm(self, *_, **__) -> type:
        return _TorchNorm


def build_model(run: Run, config: TransformerConfig) -> GPTModel:
    torch.manual_seed(run.seed)
    if run.spec == "te":
        spec = te_spec(config)
    else:
        spec = gpt_layer_spec(config, tree=run.tree) if run.layers == "tpinv" else block_spec(config, StockProvider())
    model = GPTModel(
        config,
        transformer_layer_spec=spec,
        vocab_size=run.vocab_size,
        max_sequence_length=run.sequence,
        position_embedding_type="rope" if run.variant == "llama" else "learned_absolute",
        share_embeddings_and_output_weights=run.tied,
    ).to(run.device)
    if run.layers == "stock":
        return model
    return convert(model, tree=run.tree, tokenizer_vocab_size=256, make_vocab_size_divisible_by=1)


def te_spec(config: TransformerConfig):
    """Megatron's own, for stock and for ours, which converts it."""
    from tpinv.integrations.megatron.te.specs import block_te_spec

    return block_te_spec(config)


def train(run: Run) -> dict[str, Tensor] | None:
    """Trains on this rank. Rank 0 returns the recording, name -> whole tensor, in the order in which things are computed.

    initial/NAME, step0/logits, stepI/loss, stepI/grad/NAME for the first and the last step (before clipping), stepI/grad_norm,
    final/NAME. The others return None. RuntimeError if a replicated parameter or gradient is not the same bytes on all ranks.
    """
    with _megatron(run):
        return train_here(run)


def train_own(run: OwnRun, first: Recording) -> dict[str, Tensor] | None:
    """The same with the GPTModel that the user's factory builds (harness/own.py): converted here unless it is or the run is stock, wrapped
    in Float16Module and DistributedDataParallel, trained by Megatron's own optimizer.

    ValueError for a model that is no bare GPTModel or HybridModel, that was built for another tensor-parallel size, or that a stock run
    finds converted.
    """
    logging.getLogger("tpinv").setLevel(logging.ERROR)  # what it warns of, weights that depend on TP, is seen to below
    with _megatron(run):
        case, _ = call_factory(run, parallel_state.get_tensor_model_parallel_group())
        gpt = case.model
        if not isinstance(gpt, LanguageModule):
            raise ValueError(f"{run.model} returned a {type(gpt).__name__}; return the bare GPTModel or HybridModel: verify wraps it")
        for name, value in (("tensor_model_parallel_size", run.tp), ("sequence_parallel", run.sequence_parallel)):
            if getattr(gpt.config, name) != value:
                raise ValueError(
                    f"{run.model} built {name}={getattr(gpt.config, name)} where the run has {value}; take the argument and pass it on"
                )
        require_dtype(run, gpt)
        gpt.to(run.device, DTYPES[run.dtype] if gpt.config.bf16 else None)  # as Float16Module will have it
        if run.layers == "stock" and is_converted(gpt):
            raise ValueError(
                f"{run.model} converts its model in the stock run too; leave convert to verify, or take stock and convert where it is False"
            )
        if run.layers == "tpinv" and not is_converted(gpt):
            convert(gpt, tree=run.tree, **(case.convert or {}))
        loaded = weights.agree(run, case, gpt, first)
        recorded = _train(run, gpt, _own_data(run, case, gpt), _own_optimizer_config(run, case, gpt.config), loss=case.loss)
        return recorded and {LOADED: torch.tensor(loaded), **recorded}


def _own_data(run: OwnRun, case: Case, gpt: LanguageModule) -> Callable:
    """batch(step, micro_batch) -> keyword arguments of the model, of the factory's batches or of real text."""
    if case.batches is None:
        fits = math.lcm(*run.sizes)
        length = min(gpt.max_sequence_length, 128) // fits * fits
        if not length:
            raise ValueError(
                f"max_sequence_length={gpt.max_sequence_length} is below {fits}, which every size {run.sizes} divides; return batches"
            )
        return _text_batches(run, length, gpt.vocab_size)
    batches = case.take(run.steps * run.micro_batches)

    def batch(step: int, micro_batch: int) -> dict:
        given = batches[step * run.micro_batches + micro_batch]
        if isinstance(given, (tuple, list)) and len(given) == 2:
            given = _arguments(*given)
        if not isinstance(given, dict) or given.get("labels") is None:
            raise ValueError(f"{run.model}: a batch is (tokens, labels), or a dict of the model's keyword arguments with labels")
        return {name: value.to(run.device) if isinstance(value, Tensor) else value for name, value in given.items()}

    return batch


def _arguments(tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of [b, s] tokens and labels: causal attention at positions 0 to s - 1."""
    length = tokens.shape[1]
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(length, device=tokens.device).expand(tokens.shape[0], -1),
        "attention_mask": torch.ones(1, 1, length, length, device=tokens.device).triu(1).bool(),
        "labels": labels,
    }


def _text_batches(run, length: int, vocabulary: int = 256) -> Callable:
    """Two sequences of real text a micro-batch."""
    text, size = real_text().to(run.device) % vocabulary, 2 * length

    def batch(step: int, micro_batch: int) -> dict[str, Tensor]:
        start = (step * run.micro_batches + micro_batch) * size
        return _arguments(*(text[start + shift : start + shift + size].view(2, -1) for shift in (0, 1)))

    return batch


def _own_optimizer_config(run: OwnRun, case: Case, config: TransformerConfig) -> OptimizerConfig:
    if case.optimizer is None:
        made = OptimizerConfig(optimizer="adam", lr=3e-3, weight_decay=0.1, bf16=config.bf16, params_dtype=config.params_dtype)
        return dataclasses.replace(made, clip_grad=case.clip or 0.0)
    if not isinstance(case.optimizer, OptimizerConfig):
        raise ValueError(
            f"{run.model}: optimizer is a {type(case.optimizer).__name__}; for Megatron return an OptimizerConfig, of Adam or SGD"
        )
    return case.optimizer


@contextlib.contextmanager
def _megatron(run):
    """Megatron-Core set up for this run's ranks, and on a CPU where there is no GPU."""
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with _groups_of_one_over_nccl() if run.device == "cuda" else contextlib.nullcontext():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=run.tp)
    try:
        with on_cpu():
            if run.device == "cuda":
                tensor_parallel.model_parallel_cuda_manual_seed(run.seed)  # Megatron forks that stream around dropout, 0 too
            yield
    finally:
        parallel_state.destroy_model_parallel()


def _ddp_config(optimizer_config: OptimizerConfig) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=optimizer_config.use_distributed_optimizer)


def _optimizer_config(run: Run, config: TransformerConfig) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam", lr=3e-3, weight_decay=0.1, clip_grad=1.0, bf16=config.bf16, params_dtype=config.params_dtype,
        use_distributed_optimizer=run.distributed_optimizer,
    )  # fmt: skip


@contextlib.contextmanager
def _groups_of_one_over_nccl():
    """DDP's coalesced all-reduce is not in gloo for GPUs. The data-parallel group is one rank here, whose NCCL group may share a GPU."""
    stock = parallel_state.create_group

    @functools.wraps(stock)
    def create(ranks, *args, backend=None, **kwargs):
        return stock(ranks, *args, backend="nccl" if len(ranks) == 1 and backend is None else backend, **kwargs)

    parallel_state.create_group = create
    try:
        yield
    finally:
        parallel_state.create_group = stock


def train_here(run: Run, *, start: int = 0, before: Callable | None = None, after: Callable | None = None) -> dict[str, Tensor] | None:
    """``train`` in a Megatron that is set up. Steps ``start`` to run.steps; ``before(model, optimizer)`` them all, ``after(step, model,
    optimizer)`` each: to save a checkpoint and to go on from one."""
    config = build_config(run)
    gpt = build_model(run, config)
    return _train(
        run, gpt, _text_batches(run, run.sequence), _optimizer_config(run, config), start=start, before=before, after=after
    )  # fmt: skip


def _train(
    run, gpt: LanguageModule, batch: Callable, optimizer_config: OptimizerConfig, *, loss: Callable | None = None, start: int = 0,
    before: Callable | None = None, after: Callable | None = None,
) -> dict[str, Tensor] | None:  # fmt: skip
    """The loop. ``batch(step, micro_batch)`` gives the model's keyword arguments; ``loss(output, batch)`` a scalar of what the model
    returns for them (default: the mean of its losses)."""
    config = gpt.config
    model = Float16Module(config, gpt) if config.bf16 or config.fp16 else gpt
    model = DistributedDataParallel(config, _ddp_config(optimizer_config), model)
    optimizer = get_megatron_optimizer(optimizer_config, [model])
    if run.layers == "tpinv":
        convert_optimizer(optimizer)
    if before:
        before(gpt, optimizer)
    record = _Record()
    record.parameters("initial", gpt)
    for step in range(start, run.steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = []
        for micro_batch in range(run.micro_batches):
            given = batch(step, micro_batch)
            if step == micro_batch == 0:
                with torch.no_grad():
                    logits = model(**{**given, "labels": None}).float()
                record.sharded("step0/logits", logits, dim=-1) if gpt.parallel_output else record.replicated("step0/logits", logits)
            output = model(**given)
            total = (output.mean() if loss is None else loss(output, given)) / run.micro_batches
            total.backward()
            losses.append(total.detach().float())
        finalize_model_grads([model])
        record.replicated(f"step{step}/loss", torch.stack(losses).sum(0))
        if step in (0, run.steps - 1):
            record.parameters(f"step{step}/grad", gpt, "main_grad")
        _, norm, _ = optimizer.step()
        norm = float("nan") if norm is None else norm  # an optimizer that does not clip has none
        record.replicated(f"step{step}/grad_norm", torch.tensor(norm, dtype=torch.float32, device=run.device))
        if after:
            after(step, gpt, optimizer)
    record.parameters("final", gpt)
    return record.tensors if dist.get_rank() == 0 else None


class _Record:
    """Whole tensors, put together over the tensor-parallel ranks."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}

    def parameters(self, prefix: str, model: GPTModel, attribute: str | None = None) -> None:
        named = list(model.named_parameters())
        for name, parameter in named if attribute is None else reversed(named):
            tensor = parameter.detach() if attribute is None else getattr(parameter, attribute)
            if getattr(parameter, "tensor_model_parallel", False):
                self.sharded(f"{prefix}/{name}", tensor, parameter.partition_dim, parameter.partition_stride)
            else:
                self.replicated(f"{prefix}/{name}", tensor)

    def sharded(self, name: str, tensor: Tensor, dim: int, stride: int = 1) -> None:
        parts = self._gather(tensor)
        self.tensors[name] = unshard(parts, dim if dim >= 0 else tensor.dim() + dim, stride).clone()

    def replicated(self, name: str, tensor: Tensor) -> None:
        first, *others = (part.view(-1).view(torch.uint8) for part in self._gather(tensor))
        if any(not torch.equal(first, other) for other in others):
            raise RuntimeError(f"{name} is replicated but not the same bytes on all ranks")
        self.tensors[name] = tensor.detach().clone()

    @staticmethod
    def _gather(tensor: Tensor) -> list[Tensor]:
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return parts

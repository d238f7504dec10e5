"""What the TorchTitan tests run on ranks. A module of its own, so that workers import it by name."""

import dataclasses

from tpinv.harness.torchtitan import verify  # isort: skip  # before torchtitan
import torch
import torch.distributed as dist
from torchtitan.components.loss import compute_logprobs
from torchtitan.config import ParallelismConfig, apply_overrides
from torchtitan.config.override import OverrideConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models import llama3, qwen3
from torchtitan.models.common.attention import ScaledDotProductAttention, VarlenAttention
from torchtitan.tools.utils import set_default_dtype

from tpinv.harness.torchtitan.recipe import OVERRIDE, Run, build_model_config
from tpinv.harness.torchtitan.verify import running, shard_dim
from tpinv.layers import shard
from tpinv.ops.column_parallel_linear import OPERATOR as COLUMN
from tpinv.ops.row_parallel_linear import OPERATOR as ROW
from tpinv.testing.text import real_text


def debug_model(name: str, layers: int = 2):
    """The registry's debug model, with fewer layers and attention that has a backward on a CPU."""
    model = {"llama3": llama3, "qwen3": qwen3}[name].model_registry("debugmodel", attn_backend="flex").model
    model.layers = model.layers[:layers]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return model


def train_debug_model(run: Run, name: str):
    return verify.train(run, debug_model(name))


def packed_documents(run: Run):
    """Loss and gradients of a batch of short documents, through VarlenAttention."""
    model = build_model_config(run)
    for layer in model.layers:
        layer.attention.inner_attention = VarlenAttention.Config()
    with running(run, model) as trainer:
        trainer.losses = []
        batch, labels = next(iter(trainer.dataloader))
        positions = torch.cat([torch.arange(size) for size in (31, 1, run.sequence - 32, 20, run.sequence - 20)]).view(2, -1)
        trainer.forward_backward_step(
            input_dict={**batch, "positions": positions}, labels=labels, global_valid_tokens=torch.tensor(labels.numel())
        )
        record = verify.Record(run.tp)
        record.replicated("loss", trainer.losses[0])
        record.parameters("grad", trainer.model_parts[0], gradients=True)
    return record.tensors


def first_logits(run: Run) -> torch.Tensor:
    with running(run) as trainer:
        record = verify.Record(run.tp)
        record.sharded("logits", trainer.logits(next(iter(trainer.dataloader))[0]["input"]), -1)
    return record.tensors["logits"]


def tokens(run: Run) -> torch.Tensor:
    return real_text()[: 2 * run.sequence].view(2, -1)


def trainer_log_probs(run: Run):
    """Log-probabilities that a trainer computes, and its whole weights."""
    with running(run) as trainer, torch.no_grad():
        logits = trainer.logits(tokens(run)).to(torch.float32)
        with trainer.train_context():
            log_probs = compute_logprobs(logits, tokens(run))
        record = verify.Record(run.tp)
        record.parameters("", trainer.model_parts[0])
    return log_probs, {name[1:]: tensor for name, tensor in record.tensors.items()}


def generator_log_probs(run: Run, weights: dict, lengths: tuple[int, ...] = ()):
    """What a generator computes, built as TorchTitan's vLLM wrapper does: the override on the model's config alone, plain local
    weights (skip_dp), no gradients; and the last token's of prefixes of ``lengths``, one sequence at a time."""
    model = build_model_config(run)
    parallelism = ParallelismConfig(tensor_parallel_degree=run.tp, enable_sequence_parallel=run.sequence_parallel)
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    dist_utils.set_spmd_backend("spmd_types")
    context = dist_utils.get_spmd_context(parallel_dims=dims)
    model.update_from_config(config=dataclasses.make_dataclass("Inference", [("parallelism", ParallelismConfig)])(parallelism))
    if run.layers == "tpinv":
        apply_overrides(OverrideConfig(imports=[(OVERRIDE, {"leaves": run.leaves})]), model)
    with torch.device("meta"), set_default_dtype(torch.bfloat16 if run.dtype == "bf16" else torch.float32):
        built = model.build()
    built.parallelize(dims)
    built.to_empty(device="cpu")
    with torch.no_grad(), context():
        built.init_weights(buffer_device=None)  # for the buffers, as vLLM's wrapper does
        for name, parameter in built.named_parameters():
            owner, _, leaf = name.rpartition(".")
            dim = shard_dim(built.get_submodule(owner), leaf)
            whole = weights[name]
            parameter.copy_(whole if dim is None else shard(whole, dim, dist.get_rank(), run.tp))
    with torch.inference_mode(), context():
        batch = tokens(run)
        whole = compute_logprobs(built(batch), batch)
        prefixes = [compute_logprobs(built(row[None, :n]), row[None, :n])[0, -1] for row in batch for n in lengths]
    return whole, prefixes


def clipped(run: Run):
    """What the trainers' clip function returns for gradients 1, 2, ... of a model's parameters; for a stranger's parameter, and what
    the stock function returns for that."""
    with running(run) as trainer:
        parameters = list(trainer.model_parts[0].parameters())
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, i + 1)
        norm = dist_utils.clip_grad_norm_(parameters, 1.0)
        stranger = torch.nn.Parameter(torch.ones(3))
        stranger.grad = torch.full((3,), 2.0)
        return norm, dist_utils.clip_grad_norm_([stranger], 100.0), dist_utils.clip_grad_norm_.stock([stranger], 100.0)


def products(run: Run) -> int:
    """How often the forward of a linear is computed in one forward and backward pass."""
    calls, stock = [], (COLUMN.forward, ROW.forward)

    def counted(function):
        return lambda *args, **kwargs: (calls.append(function), function(*args, **kwargs))[1]

    COLUMN.forward, ROW.forward = map(counted, stock)
    try:
        with running(run) as trainer:
            trainer.losses = []
            batch, labels = next(iter(trainer.dataloader))
            trainer.forward_backward_step(input_dict=batch, labels=labels, global_valid_tokens=torch.tensor(labels.numel()))
    finally:
        COLUMN.forward, ROW.forward = stock
    return len(calls)

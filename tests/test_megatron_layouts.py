"""Data parallelism of 2 and pipelines of 2 stages beside tensor parallelism: the bytes of TP = 1, and for pipelines those of one stage."""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from tpinv.harness.megatron.verify import DTYPES, Run, StockProvider, build_config
from tpinv.integrations.megatron import convert, gpt_layer_spec, on_cpu
from tpinv.integrations.megatron.specs import block_spec
from tpinv.layers import shard, unshard
from tpinv.testing import assert_bitwise_equal, compare
from tpinv.testing.text import real_text

pytestmark = pytest.mark.megatron

RUN = Run("tpinv", 1, False, (1, 2), dtype="bf16", qk_norm=True, num_layers=2, micro_batches=2, steps=2)


def trained(run: Run, stages: int, distributed: bool = False) -> dict:
    """Two steps on this process's part of the model and of the data. Returns this stage's whole tensors by their names in the whole model,
    the gradient norms and, on the last stage, the losses."""
    parallel_state.initialize_model_parallel(run.tp, stages)
    try:
        with on_cpu():
            return _train(run, distributed)
    finally:
        parallel_state.destroy_model_parallel()


def _train(run: Run, distributed: bool) -> dict:
    config = build_config(run)
    stages, stage = parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_pipeline_model_parallel_rank()
    first, last = stage == 0, stage == stages - 1
    config.pipeline_model_parallel_size, config.batch_p2p_comm, config.deallocate_pipeline_outputs = stages, False, stages > 1
    config.variable_seq_lengths = False
    spec = gpt_layer_spec(config, tree=run.tree) if run.layers == "tpinv" else block_spec(config, StockProvider())
    model = GPTModel(
        config, spec, run.vocab_size, run.sequence, pre_process=first, post_process=last, position_embedding_type="rope",
        share_embeddings_and_output_weights=run.tied,
    ).to(DTYPES[run.dtype])  # fmt: skip
    names = _names(model, config, stages, stage)
    _initialize(model, names)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    chunk = DistributedDataParallel(config, ddp, Float16Module(config, model))
    settings = OptimizerConfig(
        optimizer="adam", lr=3e-3, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=distributed
    )
    optimizer = get_megatron_optimizer(settings, [chunk])
    if run.layers == "tpinv":
        convert([chunk], tree=run.tree, optimizer=optimizer, tokenizer_vocab_size=256, make_vocab_size_divisible_by=1)
    found = {}
    for step in range(run.steps):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward, run), data_iterator=_batches(run, step), model=chunk, num_microbatches=run.micro_batches,
            seq_length=run.sequence, micro_batch_size=2, forward_only=False,
        )  # fmt: skip
        finalize_model_grads([chunk])
        found |= {f"grad{step}/{names[name]}": _whole(p, p.main_grad) for name, p in model.named_parameters()}
        found[f"norm{step}"] = torch.tensor(optimizer.step()[1], dtype=torch.float32)
        found |= {f"loss{step}/{i}": loss for i, loss in enumerate(losses)}
    return found | {names[name]: _whole(p, p.detach()) for name, p in model.named_parameters()}


def _forward(run: Run, batches, chunk):
    tokens, labels = next(batches)
    mask = torch.ones(1, 1, run.sequence, run.sequence).triu(1).bool()
    output = chunk(tokens, torch.arange(run.sequence).expand(2, -1), mask, labels=labels)
    return output, lambda losses: (losses.mean(), losses.detach().float())


def _batches(run: Run, step: int):
    """Micro-batches of this data-parallel rank."""
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    text, size = real_text(), 2 * run.sequence
    for micro_batch in range(run.micro_batches):
        start = ((step * run.micro_batches + micro_batch) * replicas + replica) * size
        yield tuple(text[start + shift : start + shift + size].view(2, -1) for shift in (0, 1))


def _names(model, config, stages: int, stage: int) -> dict[str, str]:
    """A stage counts its layers from 0."""
    offset = stage * config.num_layers // stages
    return {
        name: ".".join(str(int(part) + offset) if part.isdigit() else part for part in name.split("."))
        for name, _ in model.named_parameters()
    }


def _initialize(model, names) -> None:
    """The same whole values whatever holds them."""
    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for name, p in model.named_parameters():
        sharded = getattr(p, "tensor_model_parallel", False)
        shape = [n * ranks if sharded and dim == p.partition_dim else n for dim, n in enumerate(p.shape)]
        generator = torch.Generator().manual_seed(sum(map(ord, names[name])) * 7919 + len(names[name]))
        whole = torch.randn(shape, generator=generator) * (0.05 if p.dim() > 1 else 0.1) + (p.dim() == 1)
        part = shard(whole, p.partition_dim, rank, ranks, p.partition_stride) if sharded else whole
        with torch.no_grad():
            p.copy_(part)


def _whole(parameter, tensor):
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    if getattr(parameter, "tensor_model_parallel", False):
        return unshard(parts, parameter.partition_dim, parameter.partition_stride)
    return parts[0].clone()


@pytest.fixture(scope="module")
def layout(megatron_pool):
    """layout(layers, tp, sp, dp, stages, distributed) -> every rank's tensors."""

    @functools.cache
    def found(layers: str, tp: int, sp: bool, dp: int = 1, stages: int = 1, distributed: bool = False):
        run = replace(RUN, layers=layers, tp=tp, sequence_parallel=sp)
        return megatron_pool.run(trained, tp * dp * stages, run, stages, distributed, timeout=200)

    return found


def assert_same(ranks: list[dict], whole: dict) -> None:
    """Every tensor of every rank is that of ``whole``, and together they hold all of it."""
    assert {name for found in ranks for name in found} == set(whole)
    for found in ranks:
        for name, tensor in found.items():
            assert_bitwise_equal(tensor, whole[name], name)


@pytest.mark.parametrize("tp, sp, distributed", [(1, False, True), (2, False, False), (2, True, True)])
def test_two_replicas(tp, sp, distributed, layout):
    """Their losses are of other batches, so they are left out."""
    alone, found = layout("tpinv", 1, False, 2), layout("tpinv", tp, sp, 2, 1, distributed)
    kept = {name: tensor for name, tensor in alone[0].items() if not name.startswith(("loss", "grad" if distributed else "loss"))}
    for rank in found:
        for name, expected in kept.items():
            assert_bitwise_equal(rank[name], expected, name)
    assert compare(alone[0]["loss0/0"], alone[1]["loss0/0"]), "two batches"


@pytest.mark.one_version
def test_two_stock_replicas_differ(layout):
    alone, found = layout("stock", 1, False, 2)[0], layout("stock", 2, False, 2)[0]
    assert sum(bool(compare(found[name], expected)) for name, expected in alone.items()) > len(alone) / 2


@pytest.mark.parametrize("tp, sp", [(1, False), (2, False), (2, True)])
def test_two_pipeline_stages(tp, sp, layout):
    (whole,) = layout("tpinv", 1, False)
    assert {"loss1/1", "norm1", "grad0/decoder.layers.1.mlp.linear_fc2.weight"} < whole.keys()
    assert_same(layout("tpinv", tp, sp, 1, 2), whole)


@pytest.mark.one_version
def test_two_stock_pipeline_stages_differ(layout):
    (whole,) = layout("stock", 1, False)
    found = [rank for rank in layout("stock", 2, False, 1, 2)]
    differing = {name for rank in found for name, tensor in rank.items() if compare(tensor, whole[name])}
    assert len(differing) > len(whole) / 2


def tied_stages(run: Run) -> None:
    parallel_state.initialize_model_parallel(1, 2)
    try:
        with on_cpu():
            config = build_config(run)
            config.pipeline_model_parallel_size = 2
            stage = parallel_state.get_pipeline_model_parallel_rank()
            model = GPTModel(
                config, gpt_layer_spec(config, tree=run.tree), run.vocab_size, run.sequence, pre_process=stage == 0, post_process=stage == 1,
                position_embedding_type="rope", share_embeddings_and_output_weights=True,
            )  # fmt: skip
            with pytest.raises(ValueError, match="tied embeddings over 2 pipeline stages are added up by Megatron's finalisation"):
                convert(model, tree=run.tree)
    finally:
        parallel_state.destroy_model_parallel()


def test_tied_embeddings_over_stages_are_refused(megatron_pool):
    megatron_pool.run(tied_stages, 2, RUN)

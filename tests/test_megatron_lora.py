"""LoRA on a converted model: adapters' gradients, norms and training steps are the bytes of TP = 1; checkpoints of them reshard."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import nn

from tpinv.harness.megatron.verify import Run, build_config
from tpinv.integrations.megatron import add_lora, convert
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.megatron

LLAMA = Run("tpinv", 1, False, (1, 2, 4), dtype="bf16", qk_norm=True, num_layers=1)
RUNS = {"llama": LLAMA, "gpt": replace(LLAMA, variant="gpt", tied=True)}


def on(pool, job, tp: int, *args):
    return pool.run(jobs.in_megatron, tp, job, tp, *args)


def adapted(run: Run):
    config = build_config(run)
    model = add_lora(convert(jobs.unconverted(run, config=config), tree=run.tree), rank=3, alpha=6.0)
    for _, module in model.named_modules():  # B starts at zero, where A has no gradient
        if hasattr(module, "lora"):
            with torch.no_grad():
                whole = torch.linspace(-0.1, 0.1, module.lora.b.numel() * (run.tp if module.lora.column else 1)).view(-1, 3)
                part = jobs_shard(whole, module.lora.cut_stride, run.tp) if module.lora.column else whole
                module.lora.b.copy_(part)
    return config, model


def jobs_shard(whole, stride: int, ranks: int):
    return torch.cat([block.chunk(ranks)[dist.get_rank()] for block in whole.chunk(stride)])


def trained(run: Run, steps: int = 2) -> dict:
    config, model = adapted(run)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), Float16Module(config, model))
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.1, bf16=True, params_dtype=torch.bfloat16)
    optimizer = get_megatron_optimizer(settings, [chunk])
    convert([chunk], tree=run.tree, optimizer=optimizer)
    found = {}
    for step in range(steps):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = chunk(*jobs.batch(run, step), labels=jobs.batch(run, step + 1)[0])
        loss.mean().backward()
        finalize_model_grads([chunk])
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(adapters) == 8 and all(".lora." in name for name in adapters)
        found |= {f"{step}/loss": loss.detach(), **{f"{step}/{name}": whole(p, p.main_grad) for name, p in adapters.items()}}
        found[f"{step}/norm"] = torch.tensor(optimizer.step()[1])
    assert all(p.equal(base[name]) for name, p in model.named_parameters() if name in base), "the base is frozen"
    return found | {name: whole(p, p.detach()) for name, p in adapters.items()}


def whole(parameter, tensor):
    parts = jobs.gathered(tensor)
    if getattr(parameter, "tensor_model_parallel", False):
        return jobs.unshard(parts, parameter.partition_dim, parameter.partition_stride)
    assert all(part.equal(parts[0]) for part in parts), "a replica differs"
    return parts[0]


@pytest.mark.parametrize("tp, sp", [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("name", RUNS)
def test_adapters_train_to_the_bytes_of_one_rank(name, tp, sp, megatron_pool):
    alone = on(megatron_pool, trained, 1, RUNS[name])[0]
    assert all(tensor.any() for tensor in alone.values())
    for found in on(megatron_pool, trained, tp, replace(RUNS[name], tp=tp, sequence_parallel=sp)):
        assert found.keys() == alone.keys()
        for key, expected in alone.items():
            assert_bitwise_equal(found[key], expected, key)


def by_hand(run: Run) -> dict:
    """The twin: adapters of stock products around a stock model's row-parallel linear, summed as its partial sums are."""
    model = jobs.unconverted(run)
    fc2, rank = model.decoder.layers[0].mlp.linear_fc2, dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(3, fc2.input_size, generator=generator).bfloat16().chunk(run.tp, 1)[rank].clone().requires_grad_()
    b = torch.randn(fc2.output_size, 3, generator=generator).bfloat16().requires_grad_()

    def add(module, args, output):
        h = args[0] @ a.t()
        dist.all_reduce(h.data)
        return output[0] + h @ b.t(), output[1]

    fc2.register_forward_hook(add)
    loss = model(*jobs.batch(run), labels=jobs.batch(run, 1)[0])
    loss.mean().backward()
    return {"loss": loss.detach(), "b": b.grad}


@pytest.mark.one_version
def test_stock_adapters_differ(megatron_pool):
    alone, found = (on(megatron_pool, by_hand, tp, replace(LLAMA, tp=tp))[0] for tp in (1, 4))
    assert all(compare(found[name], alone[name]) for name in alone)


def plain(run: Run) -> torch.Tensor:
    """B = 0: the model without adapters; then close to the product of the definition."""
    model = convert(jobs.unconverted(run), tree=run.tree)
    before = jobs.logits_of(run, model)
    add_lora(model, rank=2, alpha=4.0)
    assert_bitwise_equal(jobs.logits_of(run, model), before)
    fc1 = model.decoder.layers[0].mlp.linear_fc1
    with torch.no_grad():
        fc1.lora.b.normal_()
        x = torch.randn(8, 2, fc1.input_size).to(fc1.weight.dtype)
        expected = x.float() @ fc1.weight.float().t() + 2.0 * (x.float() @ fc1.lora.a.float().t()) @ fc1.lora.b.float().t()
        torch.testing.assert_close(fc1(x)[0].float(), expected, rtol=0.03, atol=0.03)


def test_what_is_added_is_the_definitions(megatron_pool):
    on(megatron_pool, plain, 1, LLAMA)


def save(run: Run, directory: str) -> dict:
    _, model = adapted(run)
    if dist.get_rank() == 0:
        Path(directory).mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=jobs._metadata()), directory)
    return {name: whole(p, p.detach()) for name, p in model.named_parameters()}


def load(run: Run, directory: str) -> dict:
    _, model = adapted(replace(run, seed=7))
    for p in model.parameters():
        p.data.zero_()
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata=jobs._metadata()), directory))
    return {name: whole(p, p.detach()) for name, p in model.named_parameters()}


def test_checkpoints_of_adapters_reshard(megatron_pool, tmp_path):
    """SwiGLU's fc1, whose B is gate and up side by side, included."""
    saved = on(megatron_pool, save, 2, replace(LLAMA, tp=2), str(tmp_path / "lora"))[0]
    assert saved["decoder.layers.0.mlp.linear_fc1.lora.b"].any()
    for tp in (1, 4):
        for name, tensor in on(megatron_pool, load, tp, replace(LLAMA, tp=tp), str(tmp_path / "lora"))[0].items():
            assert_bitwise_equal(tensor, saved[name], name)


def refusals(run: Run) -> None:
    with pytest.raises(ValueError, match="add_lora needs a converted model"):
        add_lora(jobs.unconverted(run), rank=2, alpha=1.0)
    config = build_config(run)
    model = convert(jobs.unconverted(run, config=config), tree=run.tree)
    for settings, message in [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 2, "targets": ["linear_fc3"]}, "no linear is called linear_fc3"),
        ({"rank": 2, "targets": ["word_embeddings"]}, "TPInvariantVocabParallelEmbedding is no converted linear"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_lora(model, alpha=1.0, **settings)
    assert all(p.requires_grad for p in model.parameters())
    add_lora(model, rank=2, alpha=1.0, targets=["linear_qkv"])
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(model, rank=2, alpha=1.0)
    model.decoder.layers[0].self_attention.linear_qkv.lora.c = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="does not know its parameters c"):
        jobs.logits_of(run, model)
    model = convert(jobs.unconverted(run, config=config), tree=run.tree)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    with pytest.raises(ValueError, match="call add_lora before the model is wrapped"):
        add_lora(chunk, rank=2, alpha=1.0)


def test_refusals(megatron_pool):
    on(megatron_pool, refusals, 2, replace(LLAMA, tp=2))

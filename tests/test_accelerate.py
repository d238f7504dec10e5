"""A converted model trained with accelerate alone, FSDP2 with float32 parameters and bfloat16 computation: the bytes of one process on
two, and a padded row's bytes are those it has alone. Stock layers in the same loop differ."""

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch.distributed as dist

from tpinv import ReductionTree
from tpinv.testing import RankPool, assert_bitwise_equal, compare

LENGTHS, TOKENS = (31, 9, 20), 40
RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655"}  # asked for, though the group is there


def loop(layers: str) -> dict:
    """Three steps of AdamW on this rank; the same batch on all, so that the mean over ranks is exact."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from grpo_smollm2 import shard_on_cpus
    from test_transformers import build, ids

    from tpinv.integrations.transformers import convert

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": str(dist.get_rank())} | RENDEZVOUS
    shard_on_cpus()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin)
    model = build("llama", torch.bfloat16, tie_word_embeddings=True, initializer_range=0.1)
    if layers == "tpinv":
        convert(model, tree=ReductionTree(8))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert accelerator.is_fsdp2 and {p.dtype for p in model.parameters()} == {torch.float32}
    x, real = ids(3, TOKENS), torch.stack([(torch.arange(TOKENS) >= TOKENS - n).long() for n in LENGTHS])
    positions, labels = (real.cumsum(1) - 1).clamp(min=0), x.masked_fill(real == 0, -100)
    found = {}
    for step in range(3):
        out = model(input_ids=x, attention_mask=real, position_ids=positions, labels=labels, use_cache=False)
        found[f"logits {step}"] = torch.cat([row[-n:] for row, n in zip(out.logits.detach(), LENGTHS, strict=True)])
        with torch.no_grad():
            alone = [model(input_ids=row[None, -n:], use_cache=False).logits[0] for row, n in zip(x, LENGTHS, strict=True)]
        found[f"alone {step}"], found[f"loss {step}"] = torch.cat(alone), out.loss.detach()
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
    found |= {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
    AcceleratorState._reset_state(True)
    return found


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:  # its own: accelerate's state and environment stay in a process
        yield pool


def test_two_processes_have_the_bytes_of_one_and_padded_rows_those_alone(pool):
    one, two = (pool.run(loop, ranks, "tpinv", timeout=300)[0] for ranks in (1, 2))
    for name, value in one.items():
        assert_bitwise_equal(two[name], value, name)
    for step in range(3):
        assert_bitwise_equal(one[f"logits {step}"], one[f"alone {step}"], f"step {step}")
    assert len({one[f"loss {step}"].item() for step in range(3)}) == 3  # it trains


def test_stock_rows_depend_on_padding(pool):
    found = pool.run(loop, 2, "stock", timeout=300)[0]
    assert all(compare(found[f"logits {step}"], found[f"alone {step}"]) for step in range(3))


def shard_by_plan(path: str) -> str:
    """What convert says to a model that transformers has sharded by its tp_plan."""
    from transformers import AutoModelForCausalLM

    from tpinv.integrations.transformers import convert

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": str(dist.get_rank())} | RENDEZVOUS
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    try:
        convert(model, tree=ReductionTree(8))
    except ValueError as error:
        return str(error)
    return "converted"


def test_a_model_sharded_by_tp_plan_is_refused(pool, tmp_path):
    from test_transformers import build

    build("llama").save_pretrained(tmp_path)
    for told in pool.run(shard_by_plan, 2, str(tmp_path), timeout=120):
        assert "q_proj" in told and "load without tp_plan" in told

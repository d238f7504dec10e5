"""skip_bias_add: callers that add a linear's bias themselves get one to add, whose every bit of effect is in the output already."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train, bias_dropout_add_unfused

from tpinv.harness.megatron.verify import Run
from tpinv.integrations.megatron import convert
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.megatron

RUN = Run("tpinv", 1, False, (1, 2, 4), variant="gpt", num_layers=1)


def on(pool, job, tp: int, *args):
    return pool.run(jobs.in_megatron, tp, job, tp, *args)


def called(run: Run, layers: str) -> dict:
    """What a caller of a layer's MLP and attention projection sees and makes of it."""
    model = jobs.unconverted(run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                ranks, rank = (dist.get_world_size(), dist.get_rank()) if getattr(parameter, "tensor_model_parallel", False) else (1, 0)
                parameter.copy_((torch.arange(parameter.numel() * ranks) / (parameter.numel() * ranks) - 0.3).chunk(ranks)[rank])
    stock_sum = None
    if layers == "tpinv":
        stock_out, stock_bias = model.decoder.layers[0].mlp(hidden(run))
        stock_sum = (stock_out + stock_bias).detach()
        convert(model, tree=run.tree)
    mlp, attention = model.decoder.layers[0].mlp, model.decoder.layers[0].self_attention
    x = hidden(run).requires_grad_()
    out, bias = mlp(x)
    assert bias.shape == mlp.linear_fc2.bias.shape == (run_width(run),) and bias.dtype == out.dtype and bias.device == out.device
    _, inner = mlp.linear_fc1(x)
    assert inner.shape == mlp.linear_fc1.bias.shape
    assert attention.linear_proj(out[..., : attention.linear_proj.input_size_per_partition])[1].shape == bias.shape
    assert attention.linear_qkv(x)[1] is None, "skip_bias_add is False there"
    found = {
        "sum": out + bias,
        "expanded": out + bias.expand_as(out),
        "unfused": bias_dropout_add_unfused(True)((out, bias), x, 0.0),
        "fused": bias_dropout_add_fused_train((out, bias), x, 0.0),
        "added elsewhere": out * 1.0 + bias,
    }
    sum(value.square().sum() for value in found.values()).backward()
    found |= {"dx": x.grad, "dbias": mlp.linear_fc2.bias.grad}
    if layers == "tpinv":
        for value in (found["sum"], found["expanded"]):
            assert_bitwise_equal(value.detach(), out.detach(), "adding the bias that is handed out changes no bit")
        torch.testing.assert_close(found["sum"].detach(), stock_sum, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # in eval mode Megatron adds in place
        inference, bias = mlp(x)
        found["in place"] = bias_dropout_add_unfused(False)((inference, bias), x.detach(), 0.0)
    assert_bitwise_equal(found["in place"], found["unfused"].detach())
    return {name: value.detach() for name, value in found.items()}


def run_width(run: Run) -> int:
    return jobs.build_config(run).hidden_size


def hidden(run: Run) -> torch.Tensor:
    torch.manual_seed(3)
    x = torch.randn(run.sequence, 2, run_width(run))
    x[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-40, -1e-40])
    return x


@pytest.mark.parametrize("tp", [2, 4])
def test_callers_that_add_the_bias_get_the_bytes_of_one_rank(tp, megatron_pool):
    alone, found = (on(megatron_pool, called, size, replace(RUN, tp=size), "tpinv") for size in (1, tp))
    for rank in found:
        for name, expected in alone[0].items():
            assert_bitwise_equal(rank[name], expected, name)


@pytest.mark.one_version
def test_stock_differs(megatron_pool):
    alone, found = (on(megatron_pool, called, size, replace(RUN, tp=size), "stock")[0] for size in (1, 4))
    assert all(compare(found[name], alone[name]) for name in ("sum", "dx", "dbias"))

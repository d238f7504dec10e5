"""Megatron-Core with Apex's modules (the stand-ins in apex_standins), without TransformerEngine or with it: run by test_megatron_te.py."""

from dataclasses import replace

import amp_C
import apex
import fused_weight_gradient_mlp_cuda
import megatron_jobs as jobs
import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.optimizer import Adam, clip_grads

from tpinv.harness.megatron import verify
from tpinv.harness.megatron.verify import Run, train
from tpinv.integrations.megatron import te
from tpinv.testing import compare

pytestmark = pytest.mark.megatron

RUN = Run("tpinv", 1, False, (1, 2), variant="gpt", num_layers=1, steps=2, dtype="bf16", spec="te" if te.INSTALLED else "local")


def test_which_kernels_megatron_takes():
    """TransformerEngine's before Apex's; the local layers' weight gradient is Apex's alone."""
    assert tensor_parallel.layers.fused_weight_gradient_mlp_cuda is fused_weight_gradient_mlp_cuda
    assert (Adam is apex.optimizers.FusedAdam) == (not te.INSTALLED)
    assert (clip_grads.l2_norm_impl is amp_C.multi_tensor_l2norm) == (not te.INSTALLED)


def train_with_apex(run: Run) -> dict:
    """The local spec's norms are Apex's; Apex's weight gradient must not be reached by converted layers."""

    def never(*_):
        raise AssertionError("a converted layer called Apex's weight gradient")

    stock_config = verify.build_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "build_config", lambda run: replace(stock_config(run), gradient_accumulation_fusion=True))
        patch.setattr(verify, "StockProvider", LocalSpecProvider)
        if run.layers == "tpinv":
            patch.setattr(fused_weight_gradient_mlp_cuda, "wgrad_gemm_accum_fp32", never)
        return train(run)


def test_training_with_gradient_accumulation_fusion(megatron_pool):
    alone = megatron_pool.run(train_with_apex, 1, RUN)[0]
    plain = megatron_pool.run(train, 2, replace(RUN, tp=2, sequence_parallel=True))[0]
    found = megatron_pool.run(train_with_apex, 2, replace(RUN, tp=2))[0]
    for other in (plain, found):
        assert not {name: str(d) for name in alone if (d := compare(other[name], alone[name]))}
    stock = [megatron_pool.run(train_with_apex, tp, replace(RUN, layers="stock", tp=tp))[0] for tp in (1, 2)]
    assert any(compare(stock[1][name], stock[0][name]) for name in stock[0])


def converted_norms(run: Run) -> list[str]:
    model = jobs.unconverted(run)
    before = [type(m).__name__ for m in model.modules() if isinstance(m, FusedLayerNorm)]
    return before


def test_apex_norms_of_the_local_spec_are_replaced(megatron_pool):
    from megatron.core.models import backends

    assert backends.HAVE_APEX and backends.LNImpl is FusedLayerNorm
    norm = torch.nn.LayerNorm(4)
    assert norm.weight.shape == (4,)

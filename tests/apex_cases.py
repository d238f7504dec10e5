"""Megatron-Core with Apex's modules (the stand-ins in apex_standins), without TransformerEngine or with it: run by test_megatron_te.py."""

from dataclasses import replace

import amp_C
import fused_weight_gradient_mlp_cuda
import megatron_jobs as jobs
import pytest
import torch
from apex.optimizers import FusedAdam as ApexAdam
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import Adam, clip_grads

from tpinv.harness.megatron import verify
from tpinv.harness.megatron.verify import DTYPES, Run, build_config, train
from tpinv.integrations.megatron import convert, te
from tpinv.testing import compare

pytestmark = pytest.mark.megatron

RUN = Run("tpinv", 1, False, (1, 2), variant="gpt", num_layers=1, steps=2, dtype="bf16", spec="te" if te.INSTALLED else "local")


def test_which_kernels_megatron_takes():
    """TransformerEngine's before Apex's; the local layers' weight gradient is Apex's alone."""
    assert tensor_parallel.layers.fused_weight_gradient_mlp_cuda is fused_weight_gradient_mlp_cuda
    assert (Adam is ApexAdam) == (not te.INSTALLED)
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


def with_apex_norms(run: Run) -> tuple[list[str], dict]:
    config = build_config(run)
    torch.manual_seed(run.seed)
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="LayerNorm"), run.vocab_size, run.sequence, position_embedding_type="learned_absolute"
    ).to(DTYPES[run.dtype])  # fmt: skip
    kinds = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
    if run.layers == "tpinv":
        convert(model, tree=run.tree)
        assert not any(type(m) is FusedLayerNorm for m in model.modules())
    return kinds, jobs.step(run, model)


def on(pool, tp: int, run: Run) -> list:
    return pool.run(jobs.in_megatron, tp, with_apex_norms, tp, run)


def test_apex_norms_of_the_local_spec(megatron_pool):
    """The spec's are Apex's; the final one is TransformerEngine's where both are installed."""
    run = replace(RUN, spec="local", tied=False)
    kinds, alone = on(megatron_pool, 1, run)[0]
    assert kinds == (["FusedLayerNorm", "LayerNorm"] if te.INSTALLED else ["FusedLayerNorm"])
    for _, found in on(megatron_pool, 2, replace(run, tp=2, sequence_parallel=True)):
        assert not {name: str(d) for name in alone if (d := compare(found[name], alone[name]))}
    stock = [on(megatron_pool, tp, replace(run, tp=tp, layers="stock"))[0][1] for tp in (1, 2)]
    assert compare(stock[1]["logits"], stock[0]["logits"])

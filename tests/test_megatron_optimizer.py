"""An optimizer of a converted model that nobody told so, and gradient norms when Megatron's marks were lost."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import nn

from tpinv import clip_grad_norm_, grad_norm
from tpinv.harness.megatron.verify import Run, build_config, train
from tpinv.integrations.megatron import convert, convert_optimizer
from tpinv.testing import RankError, compare

pytestmark = pytest.mark.megatron

RUN = Run("tpinv", 1, False, (1, 2, 4), variant="gpt", qk_norm=True, num_layers=1)


def on(pool, job, tp: int, *args):
    return pool.run(jobs.in_megatron, tp, job, tp, *args)


def prepared(run: Run, *, converts: bool = True, lose=None, distributed: bool = False, clip: float = 1.0):
    """A model with gradients of one step, wrapped, and Megatron's optimizer of it; ``lose`` happens to the model before it is wrapped."""
    config = build_config(run)
    model = jobs.unconverted(run, config=config)
    if converts:
        convert(model, tree=run.tree)
    if lose is not None:
        lose(model)
    wrapped = Float16Module(config, model) if run.dtype == "bf16" else model
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    chunk = DistributedDataParallel(config, ddp, wrapped)
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-3, clip_grad=clip, bf16=run.dtype == "bf16", params_dtype=config.params_dtype, use_distributed_optimizer=distributed
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [chunk])
    chunk(*jobs.batch(run), labels=jobs.batch(run, 1)[0]).mean().backward()
    finalize_model_grads([chunk])
    return model, chunk, optimizer


def forgotten(run: Run, distributed: bool) -> str:
    model, _, optimizer = prepared(run, distributed=distributed)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert all(p.equal(was) for p, was in zip(model.parameters(), before, strict=True)), "nothing was updated"
    for call in (optimizer.get_grad_norm, lambda: optimizer.chained_optimizers[0].clip_grad_norm(1.0)):
        with pytest.raises(ValueError, match="call convert_optimizer"):
            call()
    convert(model, tree=run.tree, optimizer=optimizer)
    _, norm, _ = optimizer.step()
    assert norm > 0
    return str(error.value)


@pytest.mark.parametrize("dtype, distributed", [("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)])
def test_forgetting_convert_optimizer_is_refused_at_the_first_step(dtype, distributed, megatron_pool):
    for message in on(megatron_pool, forgotten, 2, replace(RUN, tp=2, dtype=dtype), distributed):
        assert "holds parameters of a converted model, but its gradient norm is Megatron's" in message
        assert "convert_optimizer(optimizer), or convert(model, tree=tree, optimizer=optimizer)" in message


def others(run: Run) -> None:
    """A stock model's optimizer beside a converted model, and torch's own optimizers and clipping."""
    model, _, _ = prepared(run)
    _, _, stock = prepared(run, converts=False)
    assert stock.step()[1] > 0
    for p in model.parameters():
        p.grad = p.main_grad.clone()
    with pytest.raises(ValueError, match="counts this rank's shards of a converted model alone; use Megatron's .*tpinv.clip_grad_norm_"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    nn.utils.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.optim.RMSprop(model.parameters(), lr=0.1).step()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    with pytest.raises(ValueError, match="Muon updates .*, and is not known to treat every element alike"):
        torch.optim.Muon(matrices, lr=0.1).step()
    own = nn.Linear(4, 4, bias=False)
    own.weight.grad = torch.ones(4, 4)
    torch.optim.Muon(own.parameters(), lr=0.1).step()


def test_other_optimizers_and_clipping(megatron_pool):
    on(megatron_pool, others, 2, replace(RUN, tp=2))


def settings_of_an_optimizer(run: Run) -> str:
    model, _, optimizer = prepared(run)
    optimizer.chained_optimizers[0].config.optimizer_cpu_offload = True
    with pytest.raises(ValueError) as error:
        convert(model, tree=run.tree, optimizer=optimizer)
    with pytest.raises(ValueError, match="optimizer_cpu_offload=True"):
        convert_optimizer(optimizer)
    convert_optimizer(optimizer, accept=["optimizer_cpu_offload"])
    return str(error.value)


def test_settings_of_an_optimizer_are_looked_at(megatron_pool):
    for message in on(megatron_pool, settings_of_an_optimizer, 2, replace(RUN, tp=2)):
        assert (
            "optimizer_cpu_offload=True: nobody has looked at this setting (its default is False); set optimizer_cpu_offload=False"
            in message
        )


def to_empty(model) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state, strict=False)


def new_parameters(model) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


def overwritten(model) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def swapped(model) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def assigned(model) -> None:
    model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items() if value is not None}, assign=True, strict=False
    )


LOSSES = {"kept": None, "to_empty": to_empty, "new": new_parameters, "overwritten": overwritten, "swapped": swapped, "assigned": assigned}


def norm_without_marks(run: Run, way: str, distributed: bool) -> tuple[float, dict]:
    """The norm, and every gradient after finalisation: replicas must be whole and the same on all ranks, and counted once."""
    model, chunk, optimizer = prepared(run, lose=LOSSES[way], distributed=distributed)
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters() if "layernorm" in name or name.endswith("fc2.bias")}
    norm = convert_optimizer(optimizer).step()[1]
    return norm, gradients


@pytest.mark.parametrize("way", LOSSES)
@pytest.mark.parametrize("distributed", [False, True])
def test_the_norm_does_not_need_megatrons_marks(way, distributed, megatron_pool):
    """Sequence parallelism included, where finalisation goes by a mark, too."""
    alone, expected = on(megatron_pool, norm_without_marks, 1, RUN, "kept", False)[0]
    for norm, gradients in on(megatron_pool, norm_without_marks, 4, replace(RUN, tp=4, sequence_parallel=True), way, distributed):
        assert norm == alone
        assert not {name: str(d) for name in expected if (d := compare(gradients[name], expected[name]))}


def norm_by_modules(run: Run, lose) -> tuple[float, float]:
    """tpinv.grad_norm and clipping of .grad, without Megatron's optimizer."""
    model = convert(jobs.unconverted(run), tree=run.tree)
    if lose is not None:
        lose(model)
    model(*jobs.batch(run), labels=jobs.batch(run, 1)[0]).mean().backward()
    norm = grad_norm(model).item()
    assert clip_grad_norm_(list(model.parameters()), norm / 2).item() == norm
    return norm, grad_norm(model).item()


@pytest.mark.parametrize("way", ["kept", "new", "to_empty"])
@pytest.mark.parametrize("tied", [False, True])
def test_tpinvs_norm_asks_megatrons_modules(way, tied, megatron_pool):
    run = replace(RUN, tied=tied)
    lose = LOSSES[way] if not tied else None
    alone = on(megatron_pool, norm_by_modules, 1, run, None)[0]
    assert on(megatron_pool, norm_by_modules, 4, replace(run, tp=4, sequence_parallel=True), lose) == [alone] * 4


def stock_norm(run: Run) -> float:
    return float(prepared(run, converts=False)[2].step()[1])


@pytest.mark.one_version
def test_stock_norm_differs(megatron_pool):
    assert on(megatron_pool, stock_norm, 1, RUN)[0] != on(megatron_pool, stock_norm, 4, replace(RUN, tp=4))[0]


def one_rank_refuses(run: Run, where: str) -> str:
    model = jobs.unconverted(run)
    if torch.distributed.get_rank() == 1:
        if where == "setting":
            model.config.softmax_type = "learnable"
        else:
            model.decoder.layers[0].adapter = nn.Linear(4, 4)
    with pytest.raises(ValueError) as error:
        convert(model, tree=run.tree)
    return str(error.value)


@pytest.mark.parametrize("where", ["setting", "module"])
def test_what_one_rank_refuses_all_refuse(where, megatron_pool):
    try:
        first, second = megatron_pool.run(jobs.in_megatron, 2, one_rank_refuses, 2, replace(RUN, tp=2), where, timeout=30)
    except RankError as error:
        pytest.fail(str(error))
    assert ("softmax_type" in second if where == "setting" else "owns parameters" in second) and "rank 1" in first


def train_without_convert_optimizer(run: Run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpinv.harness.megatron.verify.convert_optimizer", lambda optimizer: optimizer)
        return train(run)


def test_training_without_it_ends_at_the_first_step(megatron_pool):
    with pytest.raises(RankError, match="holds parameters of a converted model"):
        megatron_pool.run(train_without_convert_optimizer, 1, replace(RUN, steps=1))

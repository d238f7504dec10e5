"""A GPT that Megatron-Core trains: logits, loss, gradients, norm and parameters after two Adam steps are the bytes of TP=1."""

import functools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("megatron.core")

from tpinv.harness.megatron.verify import Run, train
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.megatron

POWERS, THREES = (1, 2, 4, 8), (1, 3, 6)


class Case(NamedTuple):
    """A configuration of the model, and the sizes (with SP or without) that are compared with TP=1."""

    run: Run
    layouts: tuple[tuple[int, bool], ...]

    def __str__(self) -> str:
        run = self.run
        named = {"tied": run.tied, "qk-norm": run.qk_norm, "2 micro-batches": run.micro_batches == 2}
        return ", ".join([run.variant, run.dtype, *(name for name, on in named.items() if on), f"L{run.leaves}"])


def case(variant: str, dtype: str, sizes: tuple[int, ...], layouts: str, *, layers: int = 2, **settings) -> Case:
    """``layouts`` such as "4 8sp"."""
    parsed = tuple((int(layout.removesuffix("sp")), layout.endswith("sp")) for layout in layouts.split())
    leaves = 24 if sizes == THREES else 8
    run = Run("tpinv", 1, False, sizes, leaves, variant, dtype, steps=2, num_layers=layers, **settings)
    return Case(run, parsed)


# Every setting (variant, dtype, tied, qk-norm, micro-batches, SP) is met at 4 ranks or more, and each of 2, 3, 4, 6, 8 with SP and without.
CASES = [
    case("llama", "fp32", POWERS, "2 2sp 4 4sp 8 8sp"),
    case("llama", "bf16", POWERS, "4 4sp", tied=True, qk_norm=True, micro_batches=2, layers=1),
    case("gpt", "fp32", POWERS, "4 4sp", tied=True, qk_norm=True, micro_batches=2, layers=1),
    case("gpt", "bf16", POWERS, "4sp 8"),
    case("llama", "bf16", THREES, "3sp 6 6sp", micro_batches=2, layers=1),
    case("gpt", "fp32", THREES, "3 6sp", qk_norm=True, layers=1),
]
ALSO_ELSEWHERE = (1, 2)  # what is trained with every version of Megatron
EVERY = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if i in ALSO_ELSEWHERE else pytest.mark.one_version) for i, c in enumerate(CASES)], ids=str
)


@functools.cache
def recording(pool, run: Run):
    return pool.run(train, run.tp, run, timeout=200)[0]


def at(case: Case, layers: str, tp: int = 1, sp: bool = False) -> Run:
    return replace(case.run, layers=layers, tp=tp, sequence_parallel=sp)


@EVERY
def test_every_tensor_is_that_of_one_rank(case, megatron_pool):
    """Each layout is compared with TP=1, so that SP on equals SP off too."""
    alone = recording(megatron_pool, at(case, "tpinv"))
    assert {"step0/logits", "step0/loss", "step1/loss", "step0/grad_norm", "step1/grad_norm"} <= alone.keys()
    gradients = [name for name in alone if name.startswith("step0/grad/")]
    assert gradients and all(alone[name].any() for name in gradients), "a gradient that is zero everywhere shows nothing"
    for tp, sp in case.layouts:
        together = recording(megatron_pool, at(case, "tpinv", tp, sp))
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            assert_bitwise_equal(together[name], expected, f"{name} at TP={tp}{' SP' if sp else ''}")


@pytest.mark.one_version
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stock_layers_differ(case, megatron_pool):
    """The twin, at the last layout: from the same weights, most of what the stock layers compute is not TP=1's."""
    alone = recording(megatron_pool, at(case, "stock"))
    together = recording(megatron_pool, at(case, "stock", *case.layouts[-1]))
    differing = {name for name, expected in alone.items() if compare(together[name], expected)}
    assert not [name for name in differing if name.startswith("initial/")], "an unfair start"
    computed = [name for name in alone if not name.startswith("initial/")]
    assert len(differing) > len(computed) / 2
    assert "step0/logits" in differing


@EVERY
def test_both_start_from_the_same_weights_and_agree_closely(case, megatron_pool):
    """tpinv is another order of the same sums, not another model."""
    ours, stock = recording(megatron_pool, at(case, "tpinv")), recording(megatron_pool, at(case, "stock"))
    assert ours.keys() == stock.keys()
    for name in ours:
        if name.startswith("initial/"):
            assert_bitwise_equal(ours[name], stock[name], name)
        elif name.startswith("step0/"):
            # Rounding errors, beside the gradient's largest element; k_layernorm's bias has none but these, as softmax takes no shift.
            bound = 1e-7 + stock[name].abs().max().item() * (0.05 if case.run.dtype == "bf16" else 1e-4)
            torch.testing.assert_close(ours[name], stock[name], rtol=0.0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")
    assert ours["step1/loss"] != ours["step0/loss"]


@pytest.mark.one_version
def test_the_twins_losses_go_down(megatron_pool):
    """What is compared is a model that learns."""
    run = replace(CASES[0].run, steps=8, num_layers=1)
    recorded = recording(megatron_pool, run)
    assert recorded["step7/loss"] < recorded["step0/loss"] - 1.0

"""Activation recomputation, the distributed optimizer and weight gradients added inside backward change no byte, and keep none from
being the same at every size."""

from dataclasses import replace

import pytest

pytest.importorskip("megatron.core")

import megatron_jobs as jobs

from tpinv.harness.megatron.verify import Run, train
from tpinv.testing import compare

pytestmark = pytest.mark.megatron

PLAIN = Run("tpinv", 1, False, (1, 2), dtype="bf16", steps=2, micro_batches=2, num_layers=1)


@pytest.fixture(scope="module")
def plain(megatron_pool):
    return megatron_pool.run(train, 1, PLAIN)[0]


@pytest.mark.parametrize("option", ["recompute", "distributed_optimizer"])
@pytest.mark.parametrize("tp, sp", [(1, False), (2, True)])
def test_the_same_bytes(option, tp, sp, plain, megatron_pool):
    recording = megatron_pool.run(train, tp, replace(PLAIN, tp=tp, sequence_parallel=sp, **{option: True}))[0]
    assert recording.keys() == plain.keys()
    assert not {name: str(d) for name in plain if (d := compare(recording[name], plain[name]))}


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.one_version)], ids=["untied", "tied"])
def test_main_grad_fused_or_not(tied, megatron_pool):
    """config.gradient_accumulation_fusion, which Megatron allows with Apex alone, changes nothing: dW is added in fp32, unrounded, always."""
    run = replace(PLAIN, variant="gpt", steps=3, tied=tied, sizes=(1, 2, 4))
    plain, _ = megatron_pool.run(jobs.train_counting, 1, run)[0]
    for tp, sp, how in ((1, False, "fusion"), (2, False, ""), (4, True, "fusion")):
        found, count = megatron_pool.run(jobs.train_counting, tp, replace(run, tp=tp, sequence_parallel=sp), how)[0]
        assert count == 5 * run.micro_batches * run.steps and found.keys() == plain.keys()  # qkv, proj, fc1, fc2, the output layer
        assert not {name: str(d) for name in plain if (d := compare(found[name], plain[name]))}
    rounded, none = megatron_pool.run(jobs.train_counting, 1, run, "rounded")[0]
    assert none == 0 and any(compare(rounded[name], plain[name]) for name in plain), "the twin"


def test_overlapped_reduction_finds_its_gradients(megatron_pool):
    """DistributedDataParallel then insists on a gradient for every weight in its hook."""
    run = replace(PLAIN, micro_batches=1)
    expected, _ = megatron_pool.run(jobs.train_counting, 1, run)[0]
    found, count = megatron_pool.run(jobs.train_counting, 2, replace(run, tp=2), "overlap")[0]
    assert count == 5 * run.steps and found.keys() == expected.keys()
    assert not {name: str(d) for name in expected if (d := compare(found[name], expected[name]))}


def test_twin_stock(plain, megatron_pool):
    one, two = (megatron_pool.run(train, tp, replace(PLAIN, layers="stock", tp=tp, recompute=True))[0] for tp in (1, 2))
    assert any(compare(one[name], two[name]) for name in one)

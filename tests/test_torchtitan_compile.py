"""Selective activation checkpointing and torch.compile(fullgraph=True) of every block, as TorchTitan applies them, change no byte."""

import dataclasses
import functools

import pytest

pytest.importorskip("torchtitan")

import torchtitan_jobs as jobs

from tpinv.harness.torchtitan.recipe import Run
from tpinv.harness.torchtitan.verify import train
from tpinv.testing import assert_bitwise_equal

pytestmark = pytest.mark.torchtitan
EAGER = Run("tpinv", 1, False, (1, 2, 4), steps=1, num_layers=1, backend="spmd_types")


@functools.cache
def recording(pool, run: Run):
    found = pool.run(train, run.tp, run, timeout=300)[0]
    return {name.replace("._checkpoint_wrapped_module", ""): tensor for name, tensor in found.items()}


@pytest.mark.parametrize(
    "run",
    [
        dataclasses.replace(EAGER, selective_ac=True, tp=4, sequence_parallel=True),
        dataclasses.replace(EAGER, selective_ac=True, backend="partial_dtensor", tp=2),
        dataclasses.replace(EAGER, selective_ac=True, compile="aot_eager", tp=2, sequence_parallel=True),
    ],
    ids=["checkpointing", "checkpointing, FSDP", "checkpointing, compiled"],
)
def test_the_bytes_of_one_eager_rank(run, torchtitan_pool):
    expected = recording(torchtitan_pool, EAGER)
    found = recording(torchtitan_pool, run)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_bitwise_equal(found[name], expected[name], name)


def test_products_are_not_computed_again(torchtitan_pool):
    """4 products with weights of a block and the output layer, whose loss has 2 chunks; the stock policy would run a block's again."""
    assert torchtitan_pool.run(jobs.products, 1, dataclasses.replace(EAGER, selective_ac=True))[0] == 4 + 2
    assert torchtitan_pool.run(jobs.products, 1, EAGER)[0] == 4 + 2

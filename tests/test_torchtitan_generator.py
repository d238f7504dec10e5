"""One override serves RL's trainer and its generator: log-probabilities are the same bytes at different tensor-parallel sizes."""

import functools
from dataclasses import replace

import pytest

pytest.importorskip("torchtitan")

import torchtitan_jobs as jobs

from tpinv.harness.torchtitan.recipe import Run
from tpinv.testing import RankError, assert_bitwise_equal, compare

pytestmark = pytest.mark.torchtitan
SIZES = (1, 2, 4)
LENGTHS = (1, 17, 48)  # a generator's prefixes: one token, a ragged prefill, the whole sequence


def run(layers: str, dtype: str, tp: int, sp: bool) -> Run:
    return Run(layers, tp, sp, SIZES, dtype=dtype, qk_norm=True, tied=True, backend="partial_dtensor")


@functools.cache
def trained(pool, run: Run):
    return pool.run(jobs.trainer_log_probs, run.tp, run)[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("trainer, generators", [((1, False), [(4, False)]), ((2, True), [(1, False), (4, False), (4, True)])])
def test_log_probs(dtype, trainer, generators, torchtitan_pool):
    """Trainer with FSDP and fp32 master weights, generator with plain local weights in its own dtype."""
    expected, weights = trained(torchtitan_pool, run("tpinv", dtype, *trainer))
    for tp, sp in generators:
        for found, _ in torchtitan_pool.run(jobs.generator_log_probs, tp, run("tpinv", dtype, tp, sp), weights):
            assert_bitwise_equal(found, expected, f"generator TP={tp} SP={sp}")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stock_log_probs_differ(dtype, torchtitan_pool):
    expected, weights = trained(torchtitan_pool, run("stock", dtype, 1, False))
    found, _ = torchtitan_pool.run(jobs.generator_log_probs, 4, run("stock", dtype, 4, False), weights)[0]
    assert compare(found, expected)


def test_prefixes(torchtitan_pool):
    """A token's log-probability does not depend on what comes after it, nor on the other sequences of its batch: decode sees neither."""
    whole, weights = trained(torchtitan_pool, run("tpinv", "bf16", 1, False))
    _, prefixes = torchtitan_pool.run(jobs.generator_log_probs, 4, run("tpinv", "bf16", 4, False), weights, LENGTHS)[0]
    wanted = [row[n - 1] for row in whole for n in LENGTHS]
    for found, expected, n in zip(prefixes, wanted, LENGTHS * 2, strict=True):
        assert_bitwise_equal(found, expected, f"after {n} tokens")


def test_a_generator_of_a_size_that_does_not_fit(torchtitan_pool):
    """Its settings are shown to no override, only to the modules."""
    _, weights = trained(torchtitan_pool, run("tpinv", "fp32", 1, False))
    with pytest.raises(RankError, match="2 ranks do not divide leaves=1"):
        torchtitan_pool.run(jobs.generator_log_probs, 2, replace(run("tpinv", "fp32", 2, False), leaves=1), weights)

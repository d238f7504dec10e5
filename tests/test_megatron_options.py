"""Activation recomputation and the distributed optimizer change no byte, and keep none from being the same at every size."""

from dataclasses import replace

import pytest

pytest.importorskip("megatron.core")

from tpinv.integrations.megatron.verify import Run, train
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


def test_twin_stock(plain, megatron_pool):
    one, two = (megatron_pool.run(train, tp, replace(PLAIN, layers="stock", tp=tp, recompute=True))[0] for tp in (1, 2))
    assert any(compare(one[name], two[name]) for name in one)

"""TorchTitan's Trainer on GPUs, backend spmd_types (without FSDP below torch 2.14): every tensor of a run has the bytes of one GPU. Ranks may
share GPUs."""

import dataclasses

import pytest
import torch

pytest.importorskip("torchtitan")
# Not marked as TorchTitan's: for those the fork server imports it, which asks for GPUs, and no worker could use one.
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

import torchtitan_jobs as jobs  # noqa: E402

from tpinv.harness.torchtitan import verify  # noqa: E402
from tpinv.harness.torchtitan.recipe import Run  # noqa: E402
from tpinv.testing import RankPool, assert_bitwise_equal  # noqa: E402

ONE = Run("tpinv", 1, False, (1, 2, 4), dtype="bf16", steps=3, micro_batches=2, hidden=1024, backend="spmd_types", device="cuda")
KINDS = {
    "llama": ONE,
    "compiled": dataclasses.replace(ONE, compile="inductor", selective_ac=True, num_layers=1),
    "qwen": dataclasses.replace(ONE, qk_norm=True, fused_qkv=False, dtype="fp32", num_layers=1),
}


@pytest.fixture(scope="module")
def gpu_pool():
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("kind", KINDS)
def test_training_at_any_size_has_the_bytes_of_one_gpu(kind, gpu_pool):
    one = KINDS[kind]
    expected = gpu_pool.run(verify.train, 1, one, timeout=300, device="cuda")[0]
    assert len({expected[f"step{i}/loss"].item() for i in range(one.steps)}) == one.steps  # it trains
    for tp, sp in ((2, True), (4, False), (4, True)):
        run = dataclasses.replace(one, tp=tp, sequence_parallel=sp)
        found = gpu_pool.run(verify.train, tp, run, timeout=300, device="cuda")[0]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_bitwise_equal(found[name], tensor, f"{name} at TP={tp}, SP={sp}")


def test_twin_stock_logits_differ(gpu_pool):
    """Stock's gradients need FSDP above TP = 1, so torch 2.14; its logits do not."""
    stock = [dataclasses.replace(ONE, layers="stock", tp=tp) for tp in (1, 4)]
    one, four = (gpu_pool.run(jobs.first_logits, run.tp, run, timeout=300, device="cuda")[0] for run in stock)
    assert one.shape == four.shape and not torch.equal(one, four)

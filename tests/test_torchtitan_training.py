"""Decoders that TorchTitan's Trainer trains: initial weights, logits, losses, gradients, norms and parameters are the bytes of TP=1."""

import functools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("torchtitan")

import torchtitan_jobs as jobs

from tpinv.harness.torchtitan.recipe import Run
from tpinv.harness.torchtitan.verify import train
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.torchtitan


class Case(NamedTuple):
    """A model, and the sizes (with SP or without) that are compared with TP=1."""

    run: Run
    layouts: tuple[tuple[int, bool], ...]
    debug_model: str | None = None

    def __str__(self) -> str:
        run = self.run
        named = {"qwen3": run.qk_norm, "tied": run.tied, "wq wk wv": not run.fused_qkv, "2 micro-batches": run.micro_batches == 2}
        name = f"{self.debug_model} debugmodel" if self.debug_model else "llama3"
        return ", ".join([name, run.dtype, *(name for name, on in named.items() if on), run.backend, f"L{run.leaves}"])


def case(layouts: str, *, debug_model: str | None = None, leaves: int = 8, **settings) -> Case:
    """``layouts`` such as "8sp 4", the last of 4 ranks or more: there stock is compared too."""
    parsed = tuple((int(layout.removesuffix("sp")), layout.endswith("sp")) for layout in layouts.split())
    sizes = (1, 3, 6) if leaves == 24 else (1, 2, 4, 8) if "8" in layouts else (1, 2, 4)
    run = Run("tpinv", 1, False, sizes, leaves, **{"backend": "partial_dtensor", "num_layers": 1, "steps": 1} | settings)
    return Case(run, parsed, debug_model)


CASES = [
    case("2sp 4 4sp", steps=2),
    case("8 4", dtype="bf16", tied=True, micro_batches=2),
    case("8sp 4", dtype="bf16", qk_norm=True),
    case("4sp", qk_norm=True, tied=True, fused_qkv=False),
    case("3sp 6", dtype="bf16", leaves=24),
    case("4sp", debug_model="llama3", num_layers=2),
]
# Whose twins are above: the same modules, in other hands or of other sizes.
MORE = [
    case("2 4sp", backend="spmd_types", steps=2),
    case("2sp 4", backend="spmd_types", dtype="bf16", qk_norm=True),
    case("4sp", debug_model="qwen3", dtype="bf16", qk_norm=True),
]


@functools.cache
def recording(pool, case: Case, layers: str, tp: int, sp: bool):
    run = replace(case.run, layers=layers, tp=tp, sequence_parallel=sp)
    arguments = (jobs.train_debug_model, tp, run, case.debug_model) if case.debug_model else (train, tp, run)
    return pool.run(*arguments, timeout=200)[0]


@pytest.mark.parametrize("case", CASES + MORE, ids=str)
def test_the_bytes_of_one_rank(case, torchtitan_pool):
    alone = recording(torchtitan_pool, case, "tpinv", 1, False)
    assert all(tensor.any() for name, tensor in alone.items() if "/grad/" in name)
    assert any(compare(tensor, alone[name.replace("final", "initial")]) for name, tensor in alone.items() if name.startswith("final/"))
    for tp, sp in case.layouts:
        found = recording(torchtitan_pool, case, "tpinv", tp, sp)
        assert list(found) == list(alone)
        for name, expected in alone.items():
            assert_bitwise_equal(found[name], expected, f"TP={tp} SP={sp} {name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stock_modules_differ(case, torchtitan_pool):
    """From the same initial weights, at the last size above."""
    alone = recording(torchtitan_pool, case, "stock", 1, False)
    found = recording(torchtitan_pool, case, "stock", *case.layouts[-1])
    ours = recording(torchtitan_pool, case, "tpinv", 1, False)
    for name in (name for name in alone if name.startswith("initial/")):
        assert_bitwise_equal(found[name], alone[name], name)
        assert_bitwise_equal(ours[name], alone[name], name)
    computed = [name for name in alone if not name.startswith("initial/")]
    differing = [name for name in computed if compare(found[name], alone[name])]
    assert len(differing) > len(computed) / 2 and "step0/logits" in differing


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_documents(dtype, torchtitan_pool):
    """The stock module has no backward on a CPU; its twins are the stock linears above."""
    run = Run("tpinv", 1, False, (1, 2, 4), num_layers=2, dtype=dtype, backend="partial_dtensor")
    alone = torchtitan_pool.run(jobs.packed_documents, 1, run)[0]
    assert len(alone) > 10 and all(tensor.any() for tensor in alone.values())
    for tp, sp in ((2, False), (4, True)):
        for found in torchtitan_pool.run(jobs.packed_documents, tp, replace(run, tp=tp, sequence_parallel=sp)):
            assert not {name: str(d) for name in alone if (d := compare(found[name], alone[name]))}


def test_two_replicas(torchtitan_pool):
    """FSDP over two data-parallel ranks, each of one or of two tensor-parallel ranks."""
    runs = [Run("tpinv", tp, tp > 1, (1, 2), steps=2, num_layers=1, dp=2, dtype="bf16", backend="partial_dtensor") for tp in (1, 2)]
    alone, found = (torchtitan_pool.run(train, 2 * run.tp, run, timeout=200)[0] for run in runs)
    for name, expected in alone.items():
        assert_bitwise_equal(found[name], expected, name)


def test_the_backend_changes_no_bit(torchtitan_pool):
    """FSDP with DTensors, and plain local tensors: in fp32 they hold the same numbers."""
    fsdp, plain = (recording(torchtitan_pool, case, "tpinv", 4, True) for case in (CASES[0], MORE[0]))
    for name, found in plain.items():
        assert_bitwise_equal(found, fsdp[name], name)


def test_not_far_from_stock(torchtitan_pool):
    run = CASES[0]
    stock, ours = (recording(torchtitan_pool, run, layers, 1, False) for layers in ("stock", "tpinv"))
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")

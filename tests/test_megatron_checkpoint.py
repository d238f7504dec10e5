"""Megatron's distributed checkpoint between tensor-parallel sizes and between stock and converted models: every parameter's bytes."""

import functools
from dataclasses import replace

import pytest

pytest.importorskip("megatron.core")

import megatron_jobs as jobs

from tpinv.harness.megatron.verify import Run
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.megatron

# llama's fc1 holds SwiGLU's gate and up side by side (stride 2), which resharding must take apart; gpt's output layer is its embedding.
RUNS = {
    "llama": Run("tpinv", 2, False, (1, 2, 4), variant="llama", num_layers=1),
    "gpt, tied, bf16": Run("tpinv", 2, False, (1, 2, 4), variant="gpt", tied=True, dtype="bf16", num_layers=1),
}
EVERY = pytest.mark.parametrize("name", ["llama", pytest.param("gpt, tied, bf16", marks=pytest.mark.one_version)])


@pytest.fixture(scope="module")
def checkpoints(megatron_pool, tmp_path_factory):
    """saved(name, layers, tp) -> (directory, what was saved); loaded(directory, run) -> what a model of another seed holds then."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def saved(name: str, layers: str, tp: int):
        directory = str(root / f"{name}-{layers}-{tp}")
        run = replace(RUNS[name], layers=layers, tp=tp)
        return directory, megatron_pool.run(jobs.in_megatron, tp, jobs.save_checkpoint, tp, run, directory)[0]

    @functools.cache
    def loaded(directory: str, name: str, layers: str, tp: int, sp: bool = False):
        run = replace(RUNS[name], layers=layers, tp=tp, sequence_parallel=sp, seed=4321)
        return megatron_pool.run(jobs.in_megatron, tp, jobs.load_checkpoint, tp, run, directory)[0]

    return saved, loaded


def assert_same(loaded: dict, saved: dict, *, logits: bool) -> None:
    assert loaded.keys() == saved.keys()
    for name in saved.keys() - (set() if logits else {"logits"}):
        assert_bitwise_equal(loaded[name], saved[name], name)


@EVERY
@pytest.mark.parametrize("tp, sp", [(4, False), (4, True), (1, False)])
def test_saved_by_a_converted_model_and_loaded_at_another_size(name, tp, sp, checkpoints):
    saved, loaded = checkpoints
    directory, expected = saved(name, "tpinv", 2)
    assert_same(loaded(directory, name, "tpinv", tp, sp), expected, logits=True)


@EVERY
def test_saved_by_a_converted_model_and_loaded_by_a_stock_one(name, checkpoints):
    saved, loaded = checkpoints
    directory, expected = saved(name, "tpinv", 2)
    stock = loaded(directory, name, "stock", 4)
    assert_same(stock, expected, logits=False)
    assert compare(stock["logits"], expected["logits"]), "the stock layers add in another order"


@EVERY
@pytest.mark.parametrize("tp", [2, 1])
def test_saved_by_a_stock_model_and_loaded_by_a_converted_one(name, tp, checkpoints):
    """The logits are those of a converted model with these weights at any size."""
    saved, loaded = checkpoints
    directory, stock = saved(name, "stock", 4)
    converted = loaded(directory, name, "tpinv", tp)
    assert_same(converted, stock, logits=False)
    assert_same(converted, saved(name, "tpinv", 2)[1], logits=True)


@pytest.mark.one_version
@EVERY
def test_stock_logits_move_with_the_size(name, checkpoints):
    """The twin: one checkpoint, stock layers, two sizes."""
    saved, loaded = checkpoints
    directory, at_four = saved(name, "stock", 4)
    assert compare(loaded(directory, name, "stock", 1)["logits"], at_four["logits"])

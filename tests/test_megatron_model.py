"""Whole models beside the plain GPT, and what surrounds a model: HybridModel, gathered logits, finalisation, optimizer, on_cpu."""

import functools
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
from hostile import hostile
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import random as megatron_random

from tpinv import ReductionTree
from tpinv.harness.megatron.verify import DTYPES, Run, StockProvider, build_config
from tpinv.integrations.megatron import convert, convert_optimizer, hybrid_stack_spec, is_converted, on_cpu, padded_vocab_size
from tpinv.integrations.megatron.guard import check_vocabulary
from tpinv.integrations.megatron.hooks import norm_fp32
from tpinv.integrations.megatron.specs import stack_spec
from tpinv.layers import shard
from tpinv.testing import assert_bitwise_equal, compare

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # 0.16 calls it a Mamba model
    from megatron.core.models.mamba import MambaModel as HybridModel

pytestmark = pytest.mark.megatron

LLAMA = Run("tpinv", 1, False, (1, 2, 4), variant="llama", qk_norm=True, num_layers=1)
GPT = replace(LLAMA, variant="gpt", tied=True)
HYBRIDS = {
    "llama": replace(LLAMA, num_layers=4),
    "gpt, tied": replace(GPT, num_layers=4, qk_norm=False),
    "llama, bf16": replace(LLAMA, num_layers=4, dtype="bf16"),
}
LAYOUTS = [(2, False), (2, True), (4, False), (4, True)]


def on(pool, job, run: Run, tp: int = 1, sp: bool = False, *args):
    run = replace(run, tp=tp, sequence_parallel=sp)
    return pool.run(jobs.in_megatron, tp, job, tp, run, *args)


def hybrid(run: Run, layers: str) -> dict:
    """One step of a HybridModel of attention and MLP layers."""
    config = build_config(run)
    torch.manual_seed(run.seed)
    model = HybridModel(
        config,
        hybrid_stack_spec(config, tree=run.tree) if layers == "tpinv" else stack_spec(config, StockProvider()),
        run.vocab_size,
        run.sequence,
        hybrid_override_pattern="*-*-",
        position_embedding_type="rope",
        share_embeddings_and_output_weights=run.tied,
    ).to(DTYPES[run.dtype])
    if layers == "tpinv":
        convert(model, tree=run.tree)
        assert is_converted(model)
    return jobs.step(run, model)


@pytest.fixture(scope="module")
def hybrid_step(megatron_pool):
    return functools.cache(lambda name, layers, *layout: on(megatron_pool, hybrid, HYBRIDS[name], *(layout or (1, False)), layers))


@pytest.mark.parametrize("tp, sp", LAYOUTS)
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_model(name, tp, sp, hybrid_step):
    """Before any finalisation: every rank's gradients of norms and row biases are complete as they come out of backward."""
    alone = hybrid_step(name, "tpinv")[0]
    assert len(alone) > 15 and all(tensor.any() for tensor in alone.values())
    for found in hybrid_step(name, "tpinv", tp, sp):
        for tensor, expected in alone.items():
            assert_bitwise_equal(found[tensor], expected, tensor)


@pytest.mark.one_version
@pytest.mark.parametrize("name", HYBRIDS)
def test_stock_hybrid_model_differs(name, hybrid_step):
    alone, found = hybrid_step(name, "stock")[0], hybrid_step(name, "stock", 4, False)[0]
    assert alone.keys() == hybrid_step(name, "tpinv")[0].keys()
    differing = [tensor for tensor, expected in alone.items() if compare(found[tensor], expected)]
    assert len(differing) > len(alone) / 2 and {"logits", "loss"} <= set(differing)


def gpt_step(run: Run, layers: str, settings: dict) -> dict:
    model = jobs.unconverted(run, **settings)
    return jobs.step(run, convert(model, tree=run.tree) if layers == "tpinv" else model)


@pytest.mark.parametrize("run", [LLAMA, GPT], ids=["llama", "gpt, tied"])
def test_gathered_logits(run, megatron_pool):
    """parallel_output=False: loss and gradients are those of sharded logits, at every size."""
    alone = on(megatron_pool, gpt_step, run, 1, False, "tpinv", {})[0]
    for tp in (1, 4):
        for found in on(megatron_pool, gpt_step, run, tp, False, "tpinv", {"parallel_output": False}):
            for tensor, expected in alone.items():
                assert_bitwise_equal(found[tensor], expected, f"{tensor} at TP={tp}")
    stock = on(megatron_pool, gpt_step, run, 4, False, "stock", {})[0]
    assert compare(stock["loss"], alone["loss"])


def finalised(run: Run, which: str) -> tuple[dict, dict]:
    """Gradients of one step before and after finalisation, with a stock and a converted model in one process."""
    config = build_config(run)
    other = convert(jobs.unconverted(run), tree=run.tree)
    model = other if which == "tpinv" else jobs.unconverted(run, config=config)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    chunk(*jobs.batch(run), labels=jobs.batch(run, 1)[0]).mean().backward()
    before = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    finalize_model_grads([chunk])
    return before, {name: p.main_grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("sp", [False, True])
def test_finalisation_leaves_complete_gradients_alone(sp, megatron_pool):
    """Norms, q/k norms and row biases: not multiplied by the number of ranks that hold the whole gradient each."""
    alone = on(megatron_pool, finalised, GPT, 1, False, "tpinv")[0][1]
    for before, after in on(megatron_pool, finalised, GPT, 2, sp, "tpinv"):
        for name, gradient in after.items():
            assert_bitwise_equal(gradient, before[name], name)
        replicated = [name for name in after if "layernorm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias"))]
        assert len(replicated) == 12  # weight and bias of two norms, the final one, q and k, and two row biases
        for name in replicated:
            assert_bitwise_equal(after[name], alone[name], name)


@pytest.mark.parametrize("sp", [False, True])
def test_a_stock_model_beside_it_is_finalised_as_before(sp, megatron_pool):
    """Megatron's sum over ranks, by the mark that sequence parallelism sets and by the names of q/k norms."""
    (before, after), (other, _) = on(megatron_pool, finalised, GPT, 2, sp, "stock")
    summed = {name for name in after if compare(after[name], before[name])}
    qk = {name for name in after if "q_layernorm" in name or "k_layernorm" in name}
    marked = {name for name in after if "layernorm" in name or name.endswith(("proj.bias", "fc2.bias", "position_embeddings.weight"))}
    assert qk <= summed <= marked and (summed > qk) == sp
    for name in summed:
        assert_bitwise_equal(after[name], before[name] + other[name], name)


def norms(run: Run, kind: str) -> list:
    """Gradient norm of one set of whole gradients, by Megatron's optimizer as it is and converted (twice); and those gradients."""
    config = build_config(run)
    model = jobs.unconverted(run)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0), [chunk])
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    wholes = []
    for seed, (_, p) in enumerate(model.named_parameters()):
        sharded = getattr(p, "tensor_model_parallel", False)
        shape = [n * size if sharded and dim == p.partition_dim else n for dim, n in enumerate(p.shape)]
        wholes.append(hostile(kind, tuple(shape), torch.float32, seed))
        p.main_grad.copy_(shard(wholes[-1], p.partition_dim, rank, size, p.partition_stride) if sharded else wholes[-1])
    optimizer.prepare_grads()
    stock = float(optimizer.get_grad_norm())
    assert convert_optimizer(optimizer) is optimizer
    methods = [getattr(optimizer, name) for name in ("get_grad_norm", "clip_grad_norm", "step")]
    assert [getattr(convert_optimizer(optimizer), name) for name in ("get_grad_norm", "clip_grad_norm", "step")] == methods
    exact = float(optimizer.get_grad_norm())
    assert float(optimizer.clip_grad_norm(1.0)) == exact
    return [stock, exact, wholes]


@pytest.mark.parametrize("kind", ["normal", "exponents"])
def test_the_optimizers_norm_is_exact(kind, megatron_pool):
    """The float32 next to the square root of the exact sum of squares. Stock's is another number at some size."""
    stocks, run = set(), replace(LLAMA, tied=True)
    for tp in (1, 2, 4):
        for stock, exact, wholes in on(megatron_pool, norms, run, tp, False, kind):
            expected = math.sqrt(math.fsum(value * value for whole in wholes for value in whole.double().view(-1).tolist()))
            assert exact == torch.tensor(expected).item()
            stocks.add(stock)
    assert len(stocks) > 1, "the twin"


def norm_with_an_empty_rank(run: Run) -> tuple[float, float]:
    mine = [torch.tensor([3.0, -4.0])] if torch.distributed.get_rank() == 0 else []
    group = torch.distributed.group.WORLD
    return norm_fp32(mine, grad_stats_parallel_group=group), norm_fp32(mine, float("inf"), group)


def test_a_rank_that_counts_no_gradient_takes_part_in_the_norm(megatron_pool):
    assert on(megatron_pool, norm_with_an_empty_rank, LLAMA, 2) == [(5.0, 4.0)] * 2


def places() -> list:
    cuda = [getattr(torch.cuda, name) for name in ("current_device", "current_stream", "synchronize")]
    tracker = [megatron_random._CUDA_RNG_STATE_TRACKER, megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED]
    return cuda + tracker + [torch.zeros(1).type()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on_cpu does nothing where there is CUDA")
def test_on_cpu_puts_everything_back():
    before = places()
    with on_cpu():
        assert torch.zeros(2, device="cuda").device == torch.device("cpu") == torch.cuda.current_device()
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        with megatron_random.get_cuda_rng_tracker().fork():
            pass
        with on_cpu():
            assert torch.cuda.current_stream() is None
        assert torch.cuda.current_stream() is None, "an inner one puts back the outer one's"
    assert places() == before
    with pytest.raises(KeyError), on_cpu():
        raise KeyError
    assert places() == before


@pytest.mark.parametrize(
    "vocabulary, leaves, divisible_by, padded",
    [
        (256, 8, 128, 256),
        (257, 8, 128, 384),
        (100, 24, 128, 384),
        (50257, 8, 128, 50304),
        (50257, 24, 128, 50304),
        (10, 24, 1, 24),
        (1, 1, 1, 1),
    ],
)
def test_padded_vocab_size(vocabulary, leaves, divisible_by, padded):
    tree = ReductionTree(leaves)
    assert padded_vocab_size(vocabulary, tree, divisible_by) == padded
    check_vocabulary(padded_vocab_size(vocabulary, tree), tree, vocabulary)
    with pytest.raises(ValueError, match="no multiple of leaves=5, so it would have to be padded"):
        check_vocabulary(256, ReductionTree(5), None)

"""Log-probabilities as frameworks for RL take them: Megatron's cross-entropy, called on the logits of a converted model."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # imported before any convert, as frameworks do

from tpinv import ReductionTree, vocab_parallel_log_probs
from tpinv.harness.megatron.verify import Run
from tpinv.integrations.megatron import convert, log_probs
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.megatron

RUN = Run("tpinv", 1, False, (1, 2, 4), dtype="bf16", num_layers=1)


def on(pool, job, tp: int, *args):
    return pool.run(jobs.in_megatron, tp, job, tp, *args)


def ways(logits, labels, model) -> dict:
    """The same log-probs, as different frameworks ask for them. logits [s, b, V/p], labels [s, b]."""
    group, packed = model.pg_collection.tp, logits.transpose(0, 1).reshape(1, -1, logits.shape[-1])
    calls = {
        "by name": lambda: vocab_parallel_cross_entropy(logits.clone(), labels),
        "by package": lambda: tensor_parallel.vocab_parallel_cross_entropy(vocab_parallel_logits=logits.clone(), target=labels),
        "cast": lambda: vocab_parallel_cross_entropy(logits.float(), labels),
        "sliced": lambda: vocab_parallel_cross_entropy(logits[3:].contiguous(), labels[3:]),
        "packed rows": lambda: vocab_parallel_cross_entropy(packed.clone(), labels.t().reshape(1, -1)),
        "temperature": lambda: vocab_parallel_cross_entropy(logits.float() / 0.7, labels),
        "fused": lambda: fused_vocab_parallel_cross_entropy(logits.clone(), labels, group),
        "smoothed": lambda: vocab_parallel_cross_entropy(logits.clone(), labels, 0.1),
    }
    return {name: -call() for name, call in calls.items()}


def recorded(run: Run, layers: str) -> dict:
    model = jobs.unconverted(run)
    if layers == "tpinv":
        convert(model, tree=run.tree)
    with torch.no_grad():
        logits = model(*jobs.batch(run)).transpose(0, 1).contiguous()
        labels = jobs.batch(run, 1)[0].t().contiguous()
        found = ways(logits, labels, model)
    if layers == "tpinv":
        found["ours"] = log_probs([model], logits, labels)
        found["ours, gathered"] = log_probs(model, torch.cat(jobs.gathered(logits), -1), labels)
        found["expected"] = vocab_parallel_log_probs(logits, labels, tree=run.tree, group=model.pg_collection.tp)
        found["expected, temperature"] = vocab_parallel_log_probs(logits.float() / 0.7, labels, tree=run.tree, group=model.pg_collection.tp)
    logits.requires_grad_()
    (-vocab_parallel_cross_entropy(logits * 1.0, labels)).sum().backward()
    found["gradient"] = torch.cat(jobs.gathered(logits.grad), -1)
    return found


@pytest.mark.parametrize("tp", [2, 4])
def test_megatrons_function_on_a_converted_models_logits(tp, megatron_pool):
    alone, found = (on(megatron_pool, recorded, size, replace(RUN, tp=size), "tpinv") for size in (1, tp))
    for rank in found:
        for name, expected in alone[0].items():
            assert_bitwise_equal(rank[name], expected, f"{name} at TP={tp}")
        for name in ("by name", "by package", "cast", "fused", "ours", "ours, gathered"):
            assert_bitwise_equal(rank[name], rank["expected"], name)
        assert_bitwise_equal(rank["temperature"], rank["expected, temperature"])
        assert_bitwise_equal(rank["packed rows"].view(2, -1).t(), rank["expected"])
        assert_bitwise_equal(rank["sliced"], rank["expected"][3:])


@pytest.mark.one_version
def test_stock_log_probs_differ(megatron_pool):
    """The twin."""
    alone, found = (on(megatron_pool, recorded, size, replace(RUN, tp=size), "stock")[0] for size in (1, 4))
    assert all(compare(found[name], expected) for name, expected in alone.items())


def of_stock_logits(run: Run) -> dict:
    """Stock's cross-entropy on the logits of a stock model, without and with a converted model in the process, and what is refused."""
    stock = jobs.unconverted(run)
    with torch.no_grad():
        before = stock(*jobs.batch(run), labels=jobs.batch(run, 1)[0])
        logits = stock(*jobs.batch(run)).transpose(0, 1).contiguous()
        other = logits[..., : logits.shape[-1] // 2].contiguous()  # of another vocabulary than the converted model's
        labels = torch.zeros(other.shape[:-1], dtype=torch.long)
        cut = vocab_parallel_cross_entropy(other.clone(), labels)
        model = convert(jobs.unconverted(run), tree=run.tree)
        after = stock(*jobs.batch(run), labels=jobs.batch(run, 1)[0])
        assert_bitwise_equal(vocab_parallel_cross_entropy(other.clone(), labels), cut, "a vocabulary that is no converted model's")
        with pytest.raises(ValueError, match="GPTModel holds no converted GPTModel or HybridModel; call convert"):
            log_probs(stock, logits, labels)
        with pytest.raises(ValueError, match=r"must end in this rank's vocabulary 64 or in the whole one 256; pass the model's logits"):
            log_probs(model, other, labels)
        second = convert(jobs.unconverted(run), tree=ReductionTree(4))
        with pytest.raises(
            ValueError, match=r"follow \['tpinv1-.*L4.*', 'tpinv1-.*L8.*'\], and the logits do not say whose .*log_probs\(model"
        ):
            vocab_parallel_cross_entropy(logits, labels)
        assert log_probs(second, logits, labels).shape == labels.shape
        del model, second
    return {"before": before, "after": after}


def test_a_stock_model_beside_it_keeps_its_loss(megatron_pool):
    for found in on(megatron_pool, of_stock_logits, 4, replace(RUN, tp=4)):
        assert_bitwise_equal(found["after"], found["before"])


def stock_loss_is_still_stocks() -> bool:
    return dist.is_initialized() and LanguageModule.compute_language_model_loss.__name__ == "compute_language_model_loss"


def test_what_is_wrapped_keeps_its_name(megatron_pool):
    assert all(on(megatron_pool, stock_loss_is_still_stocks, 2))


def beside_a_model_of_a_destroyed_group(run: Run) -> dict:
    old = convert(jobs.unconverted(run), tree=run.tree)
    dist.destroy_process_group(old.pg_collection.tp)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    return recorded(run, "tpinv")


def test_a_model_whose_group_is_gone_owns_no_logits(megatron_pool):
    found, expected = (
        on(megatron_pool, job, 1, *args)[0] for job, *args in ((beside_a_model_of_a_destroyed_group, RUN), (recorded, RUN, "tpinv"))
    )
    for name in expected:
        assert_bitwise_equal(found[name], expected[name], name)

"""TRL's parts replaced by tpinv's, without an engine: the fused lm_head against rows decoded one at a time, settings, seeds. The loop
itself, with vLLM at TP = 1 and 2, is tests/test_trl_vllm.py."""

import dataclasses

import pytest
import torch

pytest.importorskip("trl")

from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head

from tpinv import ReductionTree
from tpinv.inference import apply_temperature, token_log_probs
from tpinv.integrations.transformers import convert
from tpinv.integrations.trl import settings
from tpinv.integrations.trl.lm_head import add_lm_head, score
from tpinv.integrations.trl.trainer import _replaced
from tpinv.testing import assert_bitwise_equal, compare

TREE = ReductionTree(8)
PROMPTS, COMPLETIONS = (3, 17, 9), (40, 22, 31)


def build(dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).to(dtype).eval()


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (p + c,), generator=generator) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def batch() -> dict[str, torch.Tensor]:
    """As TRL pads: prompts on the left, completions on the right; labels where a completion's token is."""
    left, right = max(PROMPTS), max(COMPLETIONS)
    ids, mask, labels = (torch.full((len(PROMPTS), left + right), fill) for fill in (7, 0, -100))
    for row, p, c, tokens in zip(range(len(PROMPTS)), PROMPTS, COMPLETIONS, rows(), strict=True):
        span = slice(left - p, left + c)
        ids[row, span], mask[row, span] = tokens, 1
        labels[row, left : left + c] = tokens[p:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def as_engine(model, temperature: float, log_probs) -> list[torch.Tensor]:
    """Each request alone: its prompt in one pass, then a token at a time, log-probabilities of whole rows of logits."""
    found = []
    for tokens, p in zip(rows(), PROMPTS, strict=True):
        step = model(tokens[None, :p], use_cache=True)
        logits = [step.logits[0, -1:]]
        for at in range(p, len(tokens) - 1):
            step = model(tokens[None, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits[0])
        divided = torch.cat(logits).float().div_(torch.full((len(logits), 1), temperature))  # vLLM's own line
        found.append(log_probs(divided, tokens[p:, None]).squeeze(1))
    return found


def of_trainer(model) -> list[torch.Tensor]:
    left = max(PROMPTS)
    out = model(**batch(), fused_lm_head=True)
    return [out.log_probs[row, left - 1 : left - 1 + c] for row, c in enumerate(COMPLETIONS)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [False, True])
def test_trainer_has_the_log_probabilities_of_a_decode(tied, temperature):
    model = convert(build(tie_word_embeddings=tied), tree=TREE)
    add_lm_head(model, temperature, tree=TREE)
    expected = as_engine(model, temperature, lambda logits, ids: token_log_probs(logits, ids, TREE))
    with torch.no_grad():
        for row, (found, one) in enumerate(zip(of_trainer(model), expected, strict=True)):
            assert_bitwise_equal(found, one, f"row {row}")


def test_stock_trainer_has_not():
    model = build()
    add_fused_lm_head(model)
    expected = as_engine(model, 1.0, lambda logits, ids: logits.log_softmax(-1).gather(-1, ids))
    with torch.no_grad():
        assert all(compare(found, one) for found, one in zip(of_trainer(model), expected, strict=True))


def test_gradients_loss_and_entropy_are_those_of_stock_to_rounding():
    ours, stock = convert(build(torch.float32), tree=TREE), build(torch.float32)
    add_lm_head(ours, 0.9, outputs=("log_probs", "entropy"), tree=TREE, entropy_has_gradient=True)
    add_fused_lm_head(stock, 0.9, outputs=("log_probs", "entropy"))
    grads = []
    for model in (ours, stock):
        given = batch()
        positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)  # which stock TRL leaves to transformers
        out = model(**given, position_ids=positions, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.sum()).backward()
        grads.append([out.loss.detach(), out.entropy.detach(), *(p.grad for p in model.parameters())])
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_without_labels_that_count_and_without_the_fused_head():
    model = convert(build(), tree=TREE)
    plain = model(**{name: value for name, value in batch().items() if name != "labels"}).logits
    add_lm_head(model, outputs=("log_probs", "entropy"), tree=TREE)
    again = model(**{name: value for name, value in batch().items() if name != "labels"}).logits
    assert_bitwise_equal(again, plain)
    out = model(**batch() | {"labels": torch.full_like(batch()["labels"], -100)}, fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0 and not out.log_probs.any() and not out.entropy.any()


def test_lm_head_refuses():
    with pytest.raises(ValueError, match="not converted"):
        add_lm_head(build(), tree=TREE)
    model = convert(build(), tree=TREE)
    for wrong in ({"cast_lm_head_to_fp32": True}, {"temperature": 0.0}, {"outputs": ("log_probs", "is_top1")}):
        with pytest.raises(ValueError, match="covered are"):
            add_lm_head(model, tree=TREE, **wrong)


def test_temperature_is_one_division_in_float32():
    logits = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for temperature in (0.3, 0.7, 1.7):
        exact = logits.double() / torch.tensor(temperature, dtype=torch.float32).double()
        assert_bitwise_equal(apply_temperature(logits, temperature), exact.float())  # a quotient in float64 rounds once more, harmlessly
        rows = torch.full((64,), temperature)
        assert_bitwise_equal(apply_temperature(logits, rows), apply_temperature(logits, temperature))
        inverse = logits.float() * (1 / temperature)
        assert compare(apply_temperature(logits, temperature), inverse), "the inverse would do: this test tells nothing"
    assert apply_temperature(logits, 1.0) is logits
    assert_bitwise_equal(apply_temperature(logits, torch.zeros(64)), logits.float())


def test_any_rows_together_score_the_same():
    logits, targets = torch.randn(50, 256).bfloat16(), torch.arange(50)
    whole, entropy = score(logits, targets, tree=TREE, entropy=True)
    parts = [score(logits[i : i + 7], targets[i : i + 7], tree=TREE)[0] for i in range(0, 50, 7)]
    assert_bitwise_equal(torch.cat(parts), whole)
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits.float()).entropy(), atol=1e-4)


def config(**changes) -> GRPOConfig:
    fine = {"use_cpu": True, "bf16": False, "use_vllm": True, "report_to": "none", "num_generations": 2, "per_device_train_batch_size": 2}
    return GRPOConfig(**fine | changes)


def test_settings_that_change_nothing_are_covered():
    settings.check_config(config())
    settings.check_config(config(temperature=0.5, beta=0.04, loss_type="grpo", mask_truncated_completions=True, top_entropy_quantile=0.5))
    settings.check_config(config(generation_kwargs={"ignore_eos": True}, gradient_checkpointing=True, num_iterations=3, min_p=0.0))


REFUSED = {
    "use_vllm": {"use_vllm": False},
    "vllm_mode": {"vllm_mode": "server"},
    "vllm_model_impl": {"vllm_model_impl": "transformers"},
    "vllm_enable_sleep_mode": {"vllm_enable_sleep_mode": True},
    "vllm_structured_outputs_regex": {"vllm_structured_outputs_regex": "[0-9]+"},
    "temperature": {"temperature": 0.0},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "generation_kwargs": {"generation_kwargs": {"frequency_penalty": 0.5}},
    "cast_lm_head_to_fp32": {"cast_lm_head_to_fp32": True},
    "use_liger_kernel": {"use_liger_kernel": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "torch_compile": {"torch_compile": True},
    "fp16": {"fp16": True},
    "deepspeed": None,
    "router_aux_loss_coef": {"router_aux_loss_coef": 0.01},
    "a_setting_of_tomorrow": None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_could_are_refused(name):
    if REFUSED[name] is None:
        given = config()
        if name == "deepspeed":
            given.deepspeed = {"zero_optimization": {"stage": 3}}
        else:
            field = (name, bool, dataclasses.field(default=False))
            given = dataclasses.make_dataclass("Tomorrow", [field], bases=(GRPOConfig,))(
                use_cpu=True, bf16=False, use_vllm=True, num_generations=2, per_device_train_batch_size=2, a_setting_of_tomorrow=True
            )
    else:
        given = config(**REFUSED[name])
    with pytest.raises(ValueError, match=name):
        settings.check_config(given)


@pytest.mark.parametrize("name", settings.ARGUMENTS)
def test_arguments_of_the_trainer_are_refused(name):
    with pytest.raises(ValueError, match=name):
        settings.check_config(config(), **{name: [object()]})


def test_every_free_setting_is_one_or_was_one():
    """A misspelt name would let nothing through and go unnoticed."""
    known = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert settings.FREE - known <= {"warmup_ratio", "logging_dir", "vllm_importance_sampling_cap"}


def test_fsdp_does_not_round_what_modules_return():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    @dataclasses.dataclass
    class Plugin:
        fsdp_version: int = 2
        cpu_offload: object = None
        mixed_precision_policy: MixedPrecisionPolicy | None = None

    plugin = Plugin(mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16))
    settings.settle_fsdp(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    settings.settle_fsdp(None)
    for wrong in (Plugin(fsdp_version=1), Plugin(cpu_offload=True)):
        with pytest.raises(ValueError, match="not tested"):
            settings.settle_fsdp(wrong)


def test_replaced_parts_are_put_back():
    import types

    module = types.SimpleNamespace(one=1, two=2)
    with pytest.raises(KeyError), _replaced(module, {"one": 10}):
        assert module.one == 10
        raise KeyError
    assert module.one == 1
    with pytest.raises(AttributeError), _replaced(module, {"three": 3}):
        pass


def test_each_request_has_a_seed_that_the_ranks_of_its_engine_share():
    from types import SimpleNamespace

    from tpinv.integrations.trl.rollout import VLLMGeneration

    class Params:
        seed = None

        def clone(self):
            return Params()

    def seeds(rank: int, calls: int = 2) -> list[list[int]]:
        rollout = object.__new__(VLLMGeneration)
        rollout.seed, rollout.calls, rollout.tensor_parallel_size = 42, 0, 2
        rollout.accelerator = SimpleNamespace(process_index=rank)
        rollout._generate = lambda prompts, sampling_params: [params.seed for params in sampling_params]
        return [rollout._generate_with_seeds(["a", "a", "b"], Params()) for _ in range(calls)]

    first, peer, other = seeds(0), seeds(1), seeds(2)
    assert first == peer
    drawn = [seed for call in (*first, *other) for seed in call]
    assert len(set(drawn)) == len(drawn)

"""What the guard refuses without a model to look at, what convert refuses on a CPU, and a spec whose model was never converted."""

import dataclasses
import functools
import re
import warnings
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention

from tpinv.harness.megatron.verify import Run, build_config, build_model
from tpinv.integrations.megatron import convert, convert_optimizer, settings
from tpinv.integrations.megatron.attention import TPInvariantDotProductAttention, _require_causal
from tpinv.integrations.megatron.convert import _no_dynamic_batching
from tpinv.integrations.megatron.guard import check_config, check_data_parallel, check_optimizer_config, warn_of_version
from tpinv.integrations.megatron.layers import TPInvariantSwiGLU, fuses_main_grad, mark_shared_weights
from tpinv.integrations.megatron.modules import check_modules
from tpinv.tree import ReductionTree

pytestmark = pytest.mark.megatron
TREE = ReductionTree(8)
SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 8}


def config_of(base: type, **values):
    """A config with ``values``, put there past the checks of Megatron's __post_init__ and of the version's own fields."""
    made = base(**SIZES, hidden_dropout=0.0, attention_dropout=0.0) if base is TransformerConfig else base()
    vars(made).update(values)
    return made


CHECKS = {
    TransformerConfig: lambda config, accept: check_config(config, TREE, 8, accept),
    DistributedDataParallelConfig: check_data_parallel,
    OptimizerConfig: check_optimizer_config,
}


def other_than(*values):
    """A value that equals none of these."""
    return next(other for other in (True, 2, "other") if other not in values)


@pytest.mark.parametrize("base", CHECKS)
def test_every_setting_is_looked_at_or_at_its_default(base):
    """The allowlist: whatever field the installed version has, another value than its default is refused by name unless it is listed."""
    table, refused = settings.TABLES[base.__name__], 0
    CHECKS[base](config_of(base), ())
    for field in dataclasses.fields(base):
        known = table.get(field.name)
        if known is not None and known.values is None:
            continue
        value = other_than(getattr(config_of(base), field.name), *(known.values if known else ()))
        config = config_of(base, **{field.name: value})
        reason = known.why if known else "nobody has looked at this setting (its default is "
        with pytest.raises(ValueError, match=re.escape(f"{field.name}={value!r}: {reason}") + f".*; set {field.name}=") as error:
            CHECKS[base](config, ())
        assert str(error.value).count("\n  - ") == 1, "one reason"
        refused += 1
        if known is None:
            CHECKS[base](config, [field.name])
        else:
            with pytest.raises(ValueError, match=re.escape(known.why)):
                CHECKS[base](config, [field.name])  # what is known to change bits is not the caller's to accept
    assert refused > len(dataclasses.fields(base)) / 3


def test_listed_settings_may_have_any_value_but_by_rule():
    for name, setting in settings.MODEL.items():
        if setting.values is None and settings.RULED not in setting.why:
            check_config(config_of(TransformerConfig, **{name: other_than(None)}), TREE, 8)
    for name, value, message in [
        (
            "activation_func",
            torch.nn.functional.mish,
            "mish.* may depend on a shard.s width .*; use silu, gelu, relu or squared_relu",
        ),
        ("num_query_groups", 4, "num_query_groups=4 is not a multiple of the tensor-parallel size 8"),
        ("bias_activation_fusion", True, "bias_activation_fusion with GELU: .*; set bias_activation_fusion=False"),
        ("finalize_model_grads_func", print, "added once more, .*; use megatron.core.distributed.finalize_model_grads"),
        ("cross_entropy_fusion_impl", "linear", "bypasses the output layer; set cross_entropy_loss_fusion=False"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_config(config_of(TransformerConfig, cross_entropy_loss_fusion=True, **{name: value}), TREE, 8)
    check_config(
        config_of(TransformerConfig, finalize_model_grads_func=functools.partial(finalize_model_grads, pg_collection=None)), TREE, 8
    )


@dataclasses.dataclass
class OwnConfig(TransformerConfig):
    """What a framework derives: a setting of its own, and another default of one of Megatron's."""

    own_kernel: str = "none"
    softmax_type: str = "learnable"


def test_a_derived_configs_own_settings_and_defaults():
    config = OwnConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0)
    with pytest.raises(ValueError, match="softmax_type='learnable': .*; set softmax_type='vanilla'"):
        check_config(config, TREE, 8)
    config.softmax_type = "vanilla"
    check_config(config, TREE, 8)
    config.own_kernel = "fast"
    with pytest.raises(ValueError, match=r"own_kernel='fast': nobody has looked .*pass accept=\['own_kernel'\]"):
        check_config(config, TREE, 8)
    config.own_kernel, config.set_by_hand = "none", 3
    with pytest.raises(ValueError, match=r"set_by_hand=3: nobody has looked at this setting \(its default is none\)"):
        check_config(config, TREE, 8)


def test_an_untested_version_is_a_warning_once(caplog):
    for version, outside in [("0.16.0", True), ("0.16.1", False), ("0.18.3", False), ("0.19.2+abc", False), ("0.20.0", True)]:
        warn_of_version.cache_clear()
        with warnings.catch_warnings(record=True) as seen, caplog.at_level("WARNING", "tpinv"):
            warnings.simplefilter("always")
            warn_of_version(version)
            warn_of_version(version)
        assert [f"megatron-core {version} is outside 0.16.1 to 0.19.2" in str(w.message) for w in seen] == [True] * outside
        assert len(caplog.records) == outside
        caplog.clear()
    warn_of_version.cache_clear()


def test_the_tables_are_rendered_for_the_docs():
    text = settings.render_markdown()
    assert text.count("| every other | its default | nobody has looked at it |") == 3
    assert all(f"`{name}`" in text for table in settings.TABLES.values() for name in table)


def with_buffer(dtype=torch.float32, **marks) -> torch.nn.Linear:
    linear = torch.nn.Linear(4, 4)
    linear.config = SimpleNamespace()
    linear.weight.main_grad, linear.weight.grad_added_to_main_grad = torch.zeros(4, 4, dtype=dtype), False
    vars(linear.weight).update(marks)
    return linear


def test_which_weight_gradients_go_straight_into_main_grad():
    linear, other = with_buffer(), with_buffer()
    assert fuses_main_grad(linear, linear.weight)
    assert not fuses_main_grad(linear, other.weight), "handed to forward by the module it belongs to"
    for unfit in (with_buffer(torch.bfloat16), with_buffer(__fsdp_param__=True), torch.nn.Linear(4, 4)):
        assert not fuses_main_grad(unfit, unfit.weight)
    for graphs in ("local", "transformer_engine", "none"):
        linear.config.cuda_graph_impl = graphs
        assert fuses_main_grad(linear, linear.weight)
    tied = torch.nn.Embedding(4, 4)
    tied.weight = other.weight
    mark_shared_weights([linear, other, tied])
    assert not linear.weight.__dict__.get("zero_out_wgrad") and other.weight.zero_out_wgrad
    assert fuses_main_grad(linear, other.weight), "handed to forward, and its owner's hook adds what else there is"


def optimizer(kind: str, inner: str, **attributes):
    base = {"get_grad_norm": lambda self: 0.0, "clip_grad_norm": lambda self, clip: 0.0, "step": lambda self: None}
    made = type(kind, (), base)()
    made.optimizer = type(inner, (), {})()
    vars(made).update(attributes)
    return made


@pytest.mark.parametrize("kind, inner", [("LayerWiseDistributedOptimizer", "Adam"), ("FP32Optimizer", "Muon")])
def test_an_optimizer_that_is_not_elementwise_is_refused(kind, inner, monkeypatch):
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda **_: 1)
    with pytest.raises(ValueError, match=f"{kind} over {inner} is not covered: use one of FP32Optimizer"):
        convert_optimizer(optimizer(kind, inner))
    convert_optimizer(optimizer("FP32Optimizer", "AdamW"))


def test_data_parallelism_above_two_needs_a_fixed_order(monkeypatch):
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda **_: 4)
    with pytest.raises(
        ValueError, match="data parallelism over 4 ranks adds .*; use at most 2, or the distributed optimizer with reduce_sc"
    ):
        convert_optimizer(optimizer("DistributedOptimizer", "Adam", ddp_config=SimpleNamespace()))
    fixed = SimpleNamespace(reduce_scatter_with_fp32_accumulation=True)
    convert_optimizer(optimizer("DistributedOptimizer", "Adam", ddp_config=fixed))


def test_dynamic_batching_is_refused():
    _no_dynamic_batching(torch.nn.Identity(), (), {"inference_context": SimpleNamespace(is_static_batching=lambda: True)})
    with pytest.raises(ValueError, match="dynamic batching is not covered"):
        _no_dynamic_batching(torch.nn.Identity(), (), {"inference_context": SimpleNamespace(is_static_batching=lambda: False)})


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 0}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=lambda options: next(iter(options)),
)
def test_an_embedding_that_does_more_than_select_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"position_embeddings: an embedding with {name}={value} is not covered"):
        check_modules([("position_embeddings", torch.nn.Embedding(5, 4, **options))], TREE)
    check_modules([("position_embeddings", torch.nn.Embedding(5, 4))], TREE)


@pytest.mark.parametrize("kind, inputs", [(TPInvariantSwiGLU, 1), (TPInvariantDotProductAttention, 4)])
def test_arguments_of_other_versions_are_refused(kind, inputs):
    with pytest.raises(ValueError, match="does not know sink; pass None"):
        kind.forward(torch.nn.Identity(), *[torch.zeros(1)] * inputs, sink=1, other=None)


def test_a_mask_is_remembered_with_its_shape():
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    for _ in range(2):
        _require_causal(mask, 8, 8)
    with pytest.raises(ValueError, match=r"must be the causal one, bool \[..., 1, 8\]"):
        _require_causal(mask, 1, 8)
    mask[..., 0, 0] = True
    with pytest.raises(RuntimeError, match="not the causal one"):
        _require_causal(mask, 8, 8)


def test_a_mask_of_inference_mode_is_checked_every_time():
    with torch.inference_mode():
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
        _require_causal(mask, 8, 8)
        mask[..., 0, 0] = True
        with pytest.raises(RuntimeError, match="not the causal one"):
            _require_causal(mask, 8, 8)


class OwnAttention(DotProductAttention):
    """A core attention that tpinv knows nothing of."""


def refusals() -> dict[str, str]:
    run = Run("tpinv", 1, False, (1, 2))
    found = {}
    for name in ("activation", "fusion", "attention", "dropout"):
        config = build_config(run)
        model = jobs.unconverted(run)
        mlp, attention = model.decoder.layers[0].mlp, model.decoder.layers[0].self_attention
        if name == "activation":
            mlp.config.activation_func = torch.nn.functional.mish
        elif name == "fusion":
            mlp.config.bias_activation_fusion = True
        elif name == "dropout":
            attention.core_attention.attention_dropout.p = 0.1
        else:
            attention.core_attention.__class__ = OwnAttention
        with pytest.raises(ValueError) as error:
            convert(model, tree=TREE)
        found[name] = str(error.value)
    config = build_config(run)
    model = build_model(run, config)
    jobs.logits_of(run, model)
    for module in model.modules():
        module.__dict__.pop("converted", None)
    with pytest.raises(ValueError) as error:
        jobs.logits_of(run, model)
    found["spec"] = str(error.value)
    return found


def test_refused_on_a_cpu_and_before_conversion(megatron_pool):
    found = megatron_pool.run(jobs.in_megatron, 1, refusals, 1, timeout=120)[0]
    assert "may depend on a shard's width on a CPU" in found["activation"] and "; use silu, gelu, relu or squared" in found["activation"]
    assert "bias_activation_fusion" in found["fusion"] and "set it to False" in found["fusion"]
    assert "OwnAttention" in found["attention"] and "is not covered" in found["attention"]
    assert "its dropout of 0.1 draws from a stream per rank" in found["dropout"]
    assert "call convert(model, tree=tree) once the model is built" in found["spec"]

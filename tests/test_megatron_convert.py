"""convert: what it changes and what it leaves, the same model by every way that leads to it, and every refusal."""

import copy
import functools
import logging
import re
import types
from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import Float16Module
from torch import nn

from tpinv import ReductionTree
from tpinv.harness.megatron.verify import Run, build_config
from tpinv.integrations.megatron import TPInvariantSpecProvider, convert, gpt_layer_spec, hybrid_stack_spec, is_converted
from tpinv.integrations.megatron.layers import TPInvariantNorm
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.megatron

LLAMA = Run("tpinv", 2, False, (1, 2), variant="llama", qk_norm=True, num_layers=1)
GPT = replace(LLAMA, variant="gpt", tied=True)
BOTH = pytest.mark.parametrize("run", [LLAMA, GPT], ids=["llama", "gpt"])
TREE = LLAMA.tree


def on(pool, job, *args, tp: int = 2):
    return pool.run(jobs.in_megatron, tp, job, tp, *args)


def state_of(model) -> dict:
    """All that a refused conversion must leave: classes, attributes of modules and parameters, and the values."""
    modules = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.detach().sum().item(), dict(vars(p))) for name, p in model.named_parameters()}
    return {"modules": modules, "parameters": parameters}


def checkpoint_keys(model) -> dict:
    sharded = model.sharded_state_dict()
    places = ("key", "global_shape", "global_offset", "local_shape", "axis_fragmentations", "replica_id")
    return {name: [getattr(value, place, None) for place in places] for name, value in sharded.items()}


def logged(model, tree: ReductionTree) -> list[str]:
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    logger = logging.getLogger("tpinv")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert convert(model, tree=tree) is model
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return messages


def names_and_messages(run: Run):
    model = jobs.unconverted(run)
    before, keys = {name: id(p) for name, p in model.named_parameters()}, checkpoint_keys(model)
    assert not is_converted(model)
    first = logged(model, run.tree)
    assert is_converted(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before and checkpoint_keys(model) == keys
    once = state_of(model)
    second = logged(model, run.tree)
    assert state_of(model) == once
    with pytest.raises(
        ValueError, match="converted with tpinv1-rfc6962-L8-float32 already, not tpinv1-rfc6962-L4-float32; build the model"
    ):
        convert(model, tree=ReductionTree(4))
    assert state_of(model) == once
    return first, second, logged(jobs.unconverted(run, spec="tpinv"), run.tree)


def test_parameters_and_checkpoint_keys_stay_and_twice_is_once(megatron_pool):
    for (first, *_), second, (from_spec, *_) in on(megatron_pool, names_and_messages, LLAMA)[:1]:
        assert first == (
            "INFO tpinv1-rfc6962-L8-float32: replaced 3 ColumnParallelLinear, 1 DotProductAttention, 5 RMSNorm, 2 RowParallelLinear, "
            "1 VocabParallelEmbedding, the loss and the gradient finalisation"
        )
        assert second == []
        assert "replaced 1 ColumnParallelLinear, 1 VocabParallelEmbedding, the loss" in from_spec
    for (first, *_), second, _ in on(megatron_pool, names_and_messages, replace(GPT, qk_norm=False))[:1]:
        assert "1 Embedding" in first and "3 LayerNorm" in first and second == []


def by_every_way(run: Run) -> dict[str, dict]:
    """One step of the same model, converted in different ways; "stock" is not converted."""
    weights = {name: p.detach().clone() for name, p in jobs.unconverted(replace(run, seed=99)).named_parameters()}
    ways = {
        "stock": jobs.unconverted(run),
        "built stock": convert(jobs.unconverted(run), tree=run.tree),
        "built from specs": convert(jobs.unconverted(run, spec="tpinv"), tree=run.tree),
        "loaded before": jobs.unconverted(run),
        "loaded after": convert(jobs.unconverted(run), tree=run.tree),
    }
    for way in ("loaded before", "loaded after"):
        ways[way].load_state_dict(weights, strict=False)
    convert(ways["loaded before"], tree=run.tree)
    original = ways["built stock"]
    # Stock modules hold process groups, which torch cannot copy: a memo says that they are to be shared.
    groups = [value for m in original.modules() for value in vars(m).values() if isinstance(value, torch.distributed.ProcessGroup)]
    groups += [m.pg_collection for m in original.modules() if hasattr(m, "pg_collection")]
    ways["copied"] = copy.deepcopy(original, {id(group): group for group in groups})
    assert ways["copied"].compute_language_model_loss.__self__ is ways["copied"]
    marks = [[{k: v for k, v in vars(p).items() if isinstance(v, int)} for p in m.parameters()] for m in (original, ways["copied"])]
    assert marks[0] == marks[1]
    assert all(is_converted(model) for way, model in ways.items() if way != "stock")
    return {way: jobs.step(run, model) for way, model in ways.items()}


@BOTH
def test_every_way_leads_to_the_same_bytes(run, megatron_pool):
    found = on(megatron_pool, by_every_way, run)[0]
    alone = on(megatron_pool, by_every_way, replace(run, tp=1), tp=1)[0]
    for name, expected in alone["built stock"].items():
        for way in ("built stock", "built from specs", "copied"):
            assert_bitwise_equal(found[way][name], expected, f"{name}, {way}")
        assert_bitwise_equal(found["loaded after"][name], found["loaded before"][name], name)
        assert_bitwise_equal(found["loaded after"][name], alone["loaded before"][name], name)
    assert compare(found["loaded after"]["loss"], found["built stock"]["loss"]), "other weights"
    differing = [name for name, expected in alone["stock"].items() if compare(found["stock"][name], expected)]
    assert len(differing) > len(alone["stock"]) / 2, "the twin"


def wrapped(run: Run, when: str) -> dict:
    """Gradients of one step of a bf16 model in Float16Module and DistributedDataParallel, converted inside or outside of them."""
    config = build_config(run)
    model = jobs.unconverted(run)
    if when == "before":
        convert(model, tree=run.tree)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), Float16Module(config, model))
    if when == "after":
        assert convert([chunk], tree=run.tree) == [chunk] and is_converted(chunk)
    loss = chunk(*jobs.batch(run), labels=jobs.batch(run, 1)[0])
    loss.mean().backward()
    finalize_model_grads([chunk])
    return {"loss": loss.detach(), **jobs.whole(model, "main_grad", replicas=is_converted(chunk))}


@BOTH
def test_wrapped_in_float16_module_and_data_parallel(run, megatron_pool):
    run = replace(run, dtype="bf16")
    alone = on(megatron_pool, wrapped, replace(run, tp=1), "before", tp=1)[0]
    for when in ("before", "after"):
        found = on(megatron_pool, wrapped, run, when)[0]
        for name, expected in alone.items():
            assert_bitwise_equal(found[name], expected, f"{name}, converted {when} wrapping")
    stock = on(megatron_pool, wrapped, run, "never")[0]
    assert sum(bool(compare(stock[name], expected)) for name, expected in alone.items()) > len(alone) / 2


CONFIG_REFUSALS = {  # setting: (value, how the message names it and the fix)
    "hidden_dropout": (0.1, "hidden_dropout=0.1: dropout draws from a stream per rank; set hidden_dropout=0.0"),
    "attention_dropout": (0.1, "attention_dropout=0.1: dropout draws from a stream per rank; set attention_dropout=0.0"),
    "fp8": ("hybrid", "fp8='hybrid': fp8 scales are taken from a rank's shard; set fp8=None"),
    "fp4": ("e2m1", "fp4='e2m1': fp4 scales are taken from a rank's shard; set fp4=None"),
    "tp_comm_overlap": (True, "tp_comm_overlap=True: userbuffers add chunks in an order of their own; set tp_comm_overlap=False"),
    "defer_embedding_wgrad_compute": (True, "set defer_embedding_wgrad_compute=False"),
    "cpu_offloading": (True, "set cpu_offloading=False"),
    "multi_latent_attention": (True, "multi_latent_attention=True: .* not covered; set multi_latent_attention=False"),
    "num_moe_experts": (4, "num_moe_experts=4: mixture of experts is not covered; set num_moe_experts=None"),
    "mtp_num_layers": (1, "mtp_num_layers=1: .* not covered; set mtp_num_layers=None"),
    "layernorm_zero_centered_gamma": (True, "set layernorm_zero_centered_gamma=False"),
    "symmetric_ar_type": ("two_shot", "symmetric_ar_type='two_shot': .*; set symmetric_ar_type=None"),
    "use_kitchen": (True, "set use_kitchen=False"),
    "use_te_activation_func": (True, "set use_te_activation_func=False"),
    "batch_invariant_mode": (True, "batch_invariant_mode=True: .*; set batch_invariant_mode=False"),
    "context_parallel_size": (2, "context_parallel_size=2: .*not covered; (use|set context_parallel_size=)"),
    "num_query_groups": (1, "num_query_groups=1 is not a multiple of the tensor-parallel size 2: .*; use a tensor-parallel size that divides 1"),
    "softmax_type": ("learnable", "softmax_type='learnable': .*; set softmax_type='vanilla'"),
    "bias_activation_fusion": (True, "bias_activation_fusion with GELU: .*; set bias_activation_fusion=False"),
    "cross_entropy_fusion_impl": ("linear", "cross_entropy_fusion_impl='linear' bypasses the output layer; set cross_entropy_loss_fusion=False"),
    "rotary_percent": (0.5, "rotary_percent=0.5: nobody has looked at this setting .*pass accept=.'rotary_percent'. if you have"),
}  # fmt: skip


def config_refusals() -> dict[str, str]:
    found, model = {}, jobs.unconverted(GPT)
    config = model.config
    for name, (value, _) in CONFIG_REFUSALS.items():
        saved = {key: getattr(config, key) for key in (name, "cross_entropy_loss_fusion") if hasattr(config, key)}
        setattr(config, name, value)
        config.cross_entropy_loss_fusion = name == "cross_entropy_fusion_impl"
        before = state_of(model)
        calls = {"convert": lambda: convert([model], tree=TREE)}
        calls["spec"] = lambda: gpt_layer_spec(config, tree=TREE)
        calls["hybrid spec"] = lambda: hybrid_stack_spec(config, tree=TREE)
        for call, make in calls.items():
            with pytest.raises(ValueError, match="this model cannot be made invariant to the tensor-parallel size") as error:
                make()
            found[name, call] = str(error.value)
        assert state_of(model) == before and not is_converted(model)
        for key in saved.keys() | {name}:
            setattr(config, key, saved[key]) if key in saved else delattr(config, key)
    config.fp8, config.hidden_dropout = "hybrid", 0.5
    with pytest.raises(ValueError) as error:
        convert(model, tree=TREE)
    found["two at once"] = str(error.value)
    config.fp8, config.hidden_dropout = None, 0.0
    convert(model, tree=TREE)
    return found


def test_settings_that_cannot_be_invariant_are_refused(megatron_pool):
    found = on(megatron_pool, config_refusals)[1]
    assert "fp8='hybrid'" in found["two at once"] and "hidden_dropout=0.5" in found.pop("two at once")
    assert len(found) == 3 * len(CONFIG_REFUSALS)
    for (name, call), message in found.items():
        assert message.count("\n  - ") == 1, f"{name}: one reason"
        assert re.search(CONFIG_REFUSALS[name][1], message), call


def _first_layer(model):
    return model.decoder.layers[0]


def _unmark(model):
    del _first_layer(model).mlp.linear_fc1.weight.partition_stride


def _unknown(model):
    _first_layer(model).adapter = nn.Linear(4, 4)


def _l2_norm(model):
    from megatron.core.transformer.torch_norm import L2Norm

    _first_layer(model).self_attention.q_layernorm = L2Norm(hidden_size=8)


class Stateless(nn.Module):
    """Owns nothing, and adds something up."""

    def forward(self, x):
        return x.sum(-1, keepdim=True)


def _hook(module, args, output):
    return output


def _adapter(model):
    """What hand-made LoRA does: parameters under the linear, and a forward hook that adds their product."""
    fc2 = _first_layer(model).mlp.linear_fc2
    fc2.lora_a = nn.Parameter(torch.zeros(2, fc2.weight.shape[1]))
    fc2.lora_b = nn.Parameter(torch.zeros(fc2.weight.shape[0], 2))


def _buffer(model):
    _first_layer(model).mlp.register_buffer("scale", torch.ones(1))


def _spectral(model):
    torch.nn.utils.spectral_norm(_first_layer(model).mlp.linear_fc2)


def _parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(_first_layer(model).mlp.linear_fc2)


MODULE_REFUSALS = {
    "stateless module": (
        lambda m: setattr(_first_layer(m), "pooler", Stateless()),
        "decoder.layers.0.pooler: test_megatron_convert.Stateless is not covered: nobody has looked at .*; use the local layer spec .*accept=",
    ),
    "buffer": (_buffer, r"layers.0.mlp: .*MLP owns buffers that are not covered \(scale\); build it without"),
    "foreign parameters": (
        _adapter,
        "linear_fc2: RowParallelLinear does not know its parameters lora_a, lora_b; for adapters, use add_lora",
    ),
    "foreign module": (
        lambda m: setattr(_first_layer(m).mlp.linear_fc1, "lora", nn.Linear(2, 2)),
        "linear_fc1: ColumnParallelLinear does not know its modules lora; for adapters",
    ),
    "forward hook": (
        lambda m: _first_layer(m).mlp.linear_fc2.register_forward_hook(_hook),
        "linear_fc2: test_megatron_convert._hook, in _forward_hooks, may change what RowParallelLinear computes; remove it, convert first",
    ),
    "forward pre-hook": (
        lambda m: m.decoder.register_forward_pre_hook(lambda module, args: None),
        "decoder: .*lambda.*, in _forward_pre_hooks, may change what TransformerBlock computes",
    ),
    "a module's own forward": (
        lambda m: setattr(_first_layer(m).mlp.linear_fc2, "forward", lambda x, weight=None: (x, None)),
        "linear_fc2: test_megatron_convert.*lambda.* stands in the place of forward of RowParallelLinear here",
    ),
    "a bound method": (
        lambda m: setattr(m.decoder, "forward", types.MethodType(_hook, m.decoder)),
        "decoder: test_megatron_convert._hook stands in the place of forward of TransformerBlock here",
    ),
    "a partial": (
        lambda m: setattr(m, "forward", functools.partial(_hook, m)),
        "functools.partial stands in the place of forward of GPTModel here",
    ),
    "compiled": (lambda m: _first_layer(m).compile(), r"TransformerLayer was compiled \(TransformerLayer.compile\(\)\)"),
    "backward hook": (
        lambda m: m.register_full_backward_hook(lambda module, grad_input, grad_output: None),
        "lambda.*, in _backward_hooks, may change what GPTModel computes",
    ),
    "spectral norm": (_spectral, "linear_fc2: RowParallelLinear does not know its parameters weight_orig"),
    "parametrization": (_parametrized, "linear_fc2: .*ParametrizedRowParallelLinear"),
    "dropout": (
        lambda m: setattr(m.embedding.embedding_dropout, "p", 0.1),
        "embedding_dropout: its dropout of 0.1 draws from a stream per rank; build it with 0.0",
    ),
    "module with parameters": (
        _unknown,
        "decoder.layers.0.adapter: torch.nn.modules.linear.Linear owns parameters and is not covered; use",
    ),
    "module that is not covered": (
        _l2_norm,
        "decoder.layers.0.self_attention.q_layernorm: .*L2Norm is not covered: nobody has looked at what it adds up; use the local",
    ),
    "no partition_stride": (_unmark, "linear_fc1: its weight has no partition_stride, .*; build with perform_initialization=True"),
    "expert": (lambda m: setattr(_first_layer(m).mlp.linear_fc1, "is_expert", True), "linear_fc1: an expert's linear is not covered"),
    "sum elsewhere": (
        lambda m: setattr(_first_layer(m).mlp.linear_fc1, "disable_grad_reduce", True),
        "linear_fc1: disable_grad_reduce moves the sum elsewhere; set it to False",
    ),
    "whole input": (
        lambda m: setattr(_first_layer(m).mlp.linear_fc2, "input_is_parallel", False),
        "linear_fc2: input_is_parallel=False is not covered; pass this rank's features",
    ),
}


def module_refusal(name: str) -> str:
    model = jobs.unconverted(LLAMA)
    MODULE_REFUSALS[name][0](model)
    before = state_of(model)
    with pytest.raises(ValueError) as error:
        convert(model, tree=TREE)
    assert state_of(model) == before and not is_converted(model)
    return str(error.value)


@pytest.mark.parametrize("name", MODULE_REFUSALS)
def test_modules_that_are_not_covered_are_refused(name, megatron_pool):
    message = on(megatron_pool, module_refusal, name)[0]
    assert re.search(MODULE_REFUSALS[name][1], message), message


def accepted() -> None:
    """What the caller has looked at: a module's class, a hook, a setting, by name; what is known to change bits is not theirs to accept."""
    model = jobs.unconverted(LLAMA)
    _first_layer(model).pooler = Stateless()
    model.decoder.register_forward_hook(_hook)
    model.config.rotary_percent = 0.5
    for accept in ([], [Stateless, _hook], [Stateless, "rotary_percent"], [_hook, "rotary_percent"]):
        with pytest.raises(ValueError):
            convert(model, tree=TREE, accept=accept)
    convert(model, tree=TREE, accept=[Stateless, _hook, "rotary_percent"])
    model = jobs.unconverted(LLAMA)
    model.config.softmax_type = "learnable"
    with pytest.raises(ValueError, match="softmax_type='learnable'"):
        convert(model, tree=TREE, accept=["softmax_type"])


def test_accept(megatron_pool):
    on(megatron_pool, accepted)


def method_of_a_class() -> None:
    """A fused forward that somebody has put into Megatron's class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLP, "forward", _hook)
        with pytest.raises(ValueError, match="_hook stands in the place of forward of MLP, and nobody has looked"):
            convert(jobs.unconverted(LLAMA), tree=TREE)
        convert(jobs.unconverted(LLAMA), tree=TREE, accept=[_hook])
    convert(jobs.unconverted(LLAMA), tree=TREE)


def test_a_method_in_the_place_of_a_class_s_own_is_refused(megatron_pool):
    on(megatron_pool, method_of_a_class)


def _own_forward(model) -> None:
    layer = _first_layer(model).mlp.linear_fc2
    layer.forward = functools.partial(type(layer).forward, layer)


def changed_after_conversion() -> None:
    """Adapters that come after convert: at the linear's next forward, or at the next finalisation."""
    config = build_config(LLAMA)
    for change, message in [
        (_adapter, "has changed since it was converted: .*lora_a, lora_b"),
        (_unknown, "owns parameters and is not cov"),
        (_own_forward, "functools.partial stands in the place of forward of TPInvariantRowParallelLinear here"),
    ]:
        model = convert(jobs.unconverted(LLAMA, config=config), tree=TREE)
        chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        chunk(*jobs.batch(LLAMA), labels=jobs.batch(LLAMA, 1)[0]).mean().backward()
        finalize_model_grads([chunk])
        change(model)
        with pytest.raises(ValueError, match=message):
            chunk(*jobs.batch(LLAMA), labels=jobs.batch(LLAMA, 1)[0]).mean().backward()
            finalize_model_grads([chunk])


def test_changes_after_conversion_are_noticed(megatron_pool):
    on(megatron_pool, changed_after_conversion)


def data_parallel_settings() -> None:
    config = build_config(LLAMA)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), jobs.unconverted(LLAMA, config=config))
    chunk.ddp_config.nccl_ub = True
    with pytest.raises(ValueError, match="nccl_ub=True: nobody has looked at this setting"):
        convert([chunk], tree=TREE)
    chunk.ddp_config.nccl_ub = False
    convert([chunk], tree=TREE)
    chunk(*jobs.batch(LLAMA), labels=jobs.batch(LLAMA, 1)[0]).mean().backward()
    chunk.ddp_config.nccl_ub = True
    with pytest.raises(ValueError, match="nccl_ub=True: nobody has looked at this setting"):
        finalize_model_grads([chunk])


def test_settings_of_data_parallelism_are_looked_at(megatron_pool):
    on(megatron_pool, data_parallel_settings)


def other_refusals() -> None:
    model = jobs.unconverted(LLAMA)
    before = state_of(model)
    for message, arguments in {
        "2 ranks do not divide leaves=3": {"tree": ReductionTree(3)},
        "vocab_size=256 is no multiple of leaves=6, .* build the model with 384": {"tree": ReductionTree(6)},
        "has no 256 equal leaves": {"tree": ReductionTree(256)},
        r"vocab_size=256 is padded from 100 by a rule that may depend .* build the model with 128 .*padded_vocab_size": {
            "tree": TREE, "tokenizer_vocab_size": 100,
        },
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert(model, **arguments)
        assert state_of(model) == before and not is_converted(model)
    with pytest.raises(ValueError, match=r"Linear holds no Megatron-Core LanguageModule \(GPTModel, HybridModel\); convert those"):
        convert(nn.Linear(8, 8), tree=TREE)
    good, bad = jobs.unconverted(LLAMA), jobs.unconverted(LLAMA)
    _unknown(bad)
    with pytest.raises(ValueError, match="owns parameters"):
        convert([good, bad], tree=TREE)
    assert not is_converted(good), "no chunk is converted unless all can be"
    config = build_config(LLAMA)
    config.perform_initialization = False
    unmarked = jobs.unconverted(LLAMA, config=config)
    fc1 = _first_layer(unmarked).mlp.linear_fc1.weight
    if hasattr(fc1, "partition_stride"):  # megatron-core 0.19 marks what it does not initialise, too
        assert fc1.partition_stride == 2 and convert(unmarked, tree=TREE) is unmarked
    else:
        with pytest.raises(ValueError, match="no partition_stride"):
            convert(unmarked, tree=TREE)
    config = build_config(LLAMA)
    config.normalization = "BatchNorm"
    with pytest.raises(ValueError, match=r"normalization='BatchNorm' is not covered; use one of \['LayerNorm', 'RMSNorm'\]"):
        TPInvariantNorm.bind(TREE)(config, 8)
    with pytest.raises(ValueError, match="mixture of experts is not covered; build a dense model"):
        TPInvariantSpecProvider(TREE).grouped_mlp_modules(True, True)
    with pytest.raises(ValueError, match='must have qkv_format="thd"'):
        _first_layer(convert(good, tree=TREE)).self_attention.core_attention(
            *[torch.zeros(1, 1, 1, 8)] * 3, None, packed_seq_params=object()
        )
    assert isinstance(convert(model, tree=TREE, tokenizer_vocab_size=250), LanguageModule)


def test_everything_else_that_is_refused(megatron_pool):
    on(megatron_pool, other_refusals)

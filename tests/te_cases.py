"""Megatron-Core with TransformerEngine's classes (the stand-ins in te_standins): run by test_megatron_te.py in a process where they can be
imported, since Megatron looks for them once, when it is imported itself."""

import functools
from dataclasses import replace
from pathlib import Path

import megatron_jobs as jobs
import pytest
import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import Adam, clip_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from transformer_engine.pytorch.optimizers import FusedAdam

from tpinv.harness.megatron.verify import DTYPES, Run, build_config, build_model, te_spec, train
from tpinv.integrations.megatron import convert, hooks, is_converted
from tpinv.integrations.megatron.te import layers as te_layers
from tpinv.integrations.megatron.te import specs as te_specs
from tpinv.testing import assert_bitwise_equal, compare

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:
    from megatron.core.models.mamba import MambaModel as HybridModel

pytestmark = pytest.mark.megatron

LLAMA = Run("tpinv", 1, False, (1, 2, 4), spec="te", variant="llama", qk_norm=True, num_layers=1, steps=2, dtype="bf16")
GPT = replace(LLAMA, variant="gpt", qk_norm=False, tied=True, micro_batches=2)
RUNS = pytest.mark.parametrize("run", [LLAMA, GPT], ids=["llama", "gpt"])
TREE = LLAMA.tree


def on(pool, job, tp: int, *args):
    return pool.run(jobs.in_megatron, tp, job, tp, *args)


def gpt(run: Run, spec=None, **settings) -> GPTModel:
    """Of stock TE layers, or of ``spec``, not converted."""
    config = replace(build_config(run), **settings)
    torch.manual_seed(run.seed)
    model = GPTModel(
        config,
        transformer_layer_spec=te_spec(config) if spec is None else spec(config),
        vocab_size=run.vocab_size,
        max_sequence_length=run.sequence,
        position_embedding_type="rope" if run.variant == "llama" else "learned_absolute",
        share_embeddings_and_output_weights=run.tied,
    )
    return model.to(DTYPES[run.dtype])


# -- training ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(megatron_pool):
    return functools.cache(lambda run, tp, sp=False: megatron_pool.run(train, tp, replace(run, tp=tp, sequence_parallel=sp))[0])


@RUNS
@pytest.mark.parametrize("tp, sp", [(2, True), (4, False), (4, True)])
def test_training_is_the_same_bytes_at_every_size(run, tp, sp, trained):
    alone, found = trained(run, 1), trained(run, tp, sp)
    assert alone.keys() == found.keys() and len(alone) > 30
    assert not {name: str(d) for name in alone if (d := compare(found[name], alone[name]))}


@RUNS
def test_twin_of_stock_layers(run, trained):
    stock = replace(run, layers="stock")
    differing = [name for name, tensor in trained(stock, 1).items() if compare(trained(stock, 4)[name], tensor)]
    assert len(differing) > 10


def test_a_te_model_has_the_bytes_of_a_local_one(trained):
    """Only the names of the fused norms differ. (Llama's fused rope rounds elsewhere than Megatron's unfused one.)"""
    local, of_te = trained(replace(GPT, spec="local"), 1), trained(GPT, 4)
    renamed = {
        name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
            "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
        ): t
        for name, t in of_te.items()
    }
    assert renamed.keys() == local.keys()
    assert not {name: str(d) for name in local if (d := compare(renamed[name], local[name]))}


@pytest.mark.parametrize("how", ["fusion", "overlap"])
def test_gradient_accumulation_fusion(how, trained, megatron_pool):
    """Every dW goes into main_grad, unrounded, with the setting and without: the same bytes. And with overlap_grad_reduce."""
    found, added = megatron_pool.run(jobs.train_counting, 2, replace(GPT, tp=2), how)[0]
    assert added == 5 * GPT.micro_batches * GPT.steps
    assert not {name: str(d) for name, t in trained(GPT, 1).items() if (d := compare(found[name], t))}


# -- one step ---------------------------------------------------------------------------------------------------------------------


def by_every_way(run: Run) -> dict:
    provider = te_specs.TPInvariantTESpecProvider(run.tree)
    assert provider.column_parallel_layer_norm_linear() is te_layers.TPInvariantTELayerNormColumnParallelLinear.bind(run.tree)
    assert issubclass(provider.row_parallel_linear(), megatron_te.TERowParallelLinear)
    assert provider.layer_norm(for_qk=True).by_heads and not provider.layer_norm().by_heads
    for refused in (provider.linear, lambda: provider.grouped_mlp_modules(True)):
        with pytest.raises(ValueError, match="not covered; build a dense model"):
            refused()
    spec_built = gpt(run, lambda config: te_specs.gpt_layer_te_spec(config, tree=run.tree))
    with pytest.raises(ValueError, match="was built from tpinv's spec, but its model was not converted"):
        jobs.step(run, spec_built)
    ways = {"stock": gpt(run), "converted": convert(gpt(run), tree=run.tree), "spec": convert(spec_built, tree=run.tree)}
    return {way: jobs.step(run, model) for way, model in ways.items()}


@RUNS
def test_building_from_specs_is_converting(run, megatron_pool):
    found = on(megatron_pool, by_every_way, 2, replace(run, tp=2))[0]
    for name, expected in found["converted"].items():
        assert_bitwise_equal(found["spec"][name], expected, name)
    assert compare(found["stock"]["logits"], found["converted"]["logits"])


def hybrid(run: Run, layers: str) -> dict:
    config = build_config(run)
    torch.manual_seed(run.seed)
    spec = te_specs.hybrid_stack_te_spec(config, tree=run.tree) if layers == "spec" else te_specs.stock_stack_spec
    model = HybridModel(
        config, spec, run.vocab_size, run.sequence, hybrid_override_pattern="*-*-", position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(DTYPES[run.dtype])  # fmt: skip
    return jobs.step(run, model if layers == "stock" else convert(model, tree=run.tree))


def test_hybrid_model(megatron_pool):
    run = replace(LLAMA, qk_norm=False, num_layers=4)
    alone = on(megatron_pool, hybrid, 1, run, "converted")[0]
    assert len(alone) > 15 and all(tensor.any() for tensor in alone.values())
    for layers, sp in (("converted", True), ("spec", False)):
        for found in on(megatron_pool, hybrid, 4, replace(run, tp=4, sequence_parallel=sp), layers):
            for name, expected in alone.items():
                assert_bitwise_equal(found[name], expected, name)
    stock = [on(megatron_pool, hybrid, tp, replace(run, tp=tp), "stock")[0] for tp in (1, 4)]
    assert compare(stock[0]["logits"], stock[1]["logits"])


def local_with_te_norms(run: Run) -> dict:
    """A local spec's model on a machine with TE: Megatron gives it TE's final norm, and here all others as well."""

    def spec(config):
        layer = get_gpt_layer_local_spec(qk_layernorm=False, normalization=config.normalization)
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            setattr(layer.submodules, name, megatron_te.TENorm)
        return layer

    model = gpt(run, spec)
    assert type(model.decoder.final_layernorm) in (te.RMSNorm, te.LayerNorm)
    if run.layers == "tpinv":
        convert(model, tree=run.tree)
        assert isinstance(model.decoder.final_layernorm, (te.RMSNorm, te.LayerNorm)) and is_converted(model)
    return jobs.step(run, model)


@RUNS
def test_te_norms_in_a_local_model(run, megatron_pool):
    run = replace(run, qk_norm=False)
    alone = on(megatron_pool, local_with_te_norms, 1, run)[0]
    for found in on(megatron_pool, local_with_te_norms, 4, replace(run, tp=4, sequence_parallel=True)):
        for name, expected in alone.items():
            assert_bitwise_equal(found[name], expected, name)
    stock = [on(megatron_pool, local_with_te_norms, tp, replace(run, tp=tp, layers="stock"))[0] for tp in (1, 4)]
    assert compare(stock[0]["logits"], stock[1]["logits"])


# -- what stays -------------------------------------------------------------------------------------------------------------------


def kept(run: Run) -> list[str]:
    model = gpt(run)

    def state():
        marks = {name: {k: v for k, v in vars(p).items() if isinstance(v, int)} for name, p in model.named_parameters()}
        sharded = {
            key: [getattr(value, place, None) for place in ("key", "global_shape", "global_offset", "local_shape", "replica_id")]
            for key, value in model.sharded_state_dict(metadata=jobs._metadata()).items()
        }
        return [(name, id(p)) for name, p in model.named_parameters()], list(model.state_dict()), sharded, marks

    before, bases = state(), {name: type(m) for name, m in model.named_modules()}
    convert(model, tree=run.tree)
    after = state()
    assert after[:3] == before[:3] and sum("_extra_state" in key for key in after[1]) >= 7
    for name, p in model.named_parameters():  # replicated ones are complete on every rank: no mark that they are a part
        assert not (getattr(p, "sequence_parallel", False)), name
        if "layer_norm" not in name and "layernorm" not in name:
            assert {k: v for k, v in after[3][name].items() if k != "sequence_parallel"} == {
                k: v for k, v in before[3][name].items() if k != "sequence_parallel"
            }
    assert all(isinstance(m, bases[name]) for name, m in model.named_modules())
    once = state()
    convert(model, tree=run.tree)
    assert state() == once
    layer = model.decoder.layers[0]
    assert layer.mlp.linear_fc1.parameter_sharding()["weight"] == (0, 2 if run.variant == "llama" else 1)
    assert layer.self_attention.linear_qkv.bias.numel() == (0 if run.variant == "llama" else layer.self_attention.linear_qkv.out_features)
    layer.mlp.linear_fc1.backward_dw()
    # DistributedDataParallel's hooks for overlapped gathers call modules by their parameters
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True), model)
    ddp(*jobs.batch(run), labels=jobs.batch(run, 1)[0]).mean().backward()
    return [name for name, p in model.named_parameters() if not p.main_grad.any()]


@RUNS
def test_parameters_names_marks_state_and_classes_stay(run, megatron_pool):
    assert on(megatron_pool, kept, 2, replace(run, tp=2, sequence_parallel=True))[0] == []


def save(run: Run, directory: str) -> dict:
    model = built(run)
    if dist.get_rank() == 0:
        Path(directory).mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=jobs._metadata()), directory)
    return {"logits": jobs.logits_of(run, model), **jobs.whole(model)}


def load(run: Run, directory: str) -> dict:
    """Local norms have no extra state, which TE's would load (it is empty): Megatron's --dist-ckpt-strictness log_all."""
    model = built(replace(run, seed=99))
    sharded = model.sharded_state_dict(metadata=jobs._metadata())
    missing, unexpected = model.load_state_dict(dist_checkpointing.load(sharded, directory, strict=StrictHandling.LOG_ALL), strict=False)
    assert not unexpected and all(key.endswith("norm._extra_state") for key in missing), (missing, unexpected)
    return {"logits": jobs.logits_of(run, model), **jobs.whole(model)}


def through(run: Run, source: str, target: str) -> dict:
    """Loaded and saved again: from one layer spec and size to another."""
    model = built(replace(run, seed=99))
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata=jobs._metadata()), source))
    if dist.get_rank() == 0:
        Path(target).mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=jobs._metadata()), target)
    return {"logits": jobs.logits_of(run, model)}


def built(run: Run) -> GPTModel:
    config = replace(build_config(run), apply_rope_fusion=False)  # of which the local spec has another rounding
    model = gpt(run, apply_rope_fusion=False) if run.spec == "te" else build_model(run, config).to(DTYPES[run.dtype])
    return convert(model, tree=run.tree) if run.layers == "tpinv" and not is_converted(model) else model


@pytest.mark.parametrize("variant", ["llama", "gpt"])
def test_checkpoints_go_between_te_tpinv_and_local_layers(variant, megatron_pool, tmp_path):
    """TE's at TP 2 -> tpinv at TP 4 -> tpinv's local spec at TP 1 -> TE's at TP 2."""
    run = replace(LLAMA, variant=variant, qk_norm=variant == "llama")
    of_te, ours, local = replace(run, layers="stock"), run, replace(run, spec="local")
    stock = on(megatron_pool, save, 2, replace(of_te, tp=2), str(tmp_path / "te"))[0]
    four = on(megatron_pool, through, 4, replace(ours, tp=4), str(tmp_path / "te"), str(tmp_path / "four"))[0]
    one = on(megatron_pool, through, 1, replace(local, tp=1), str(tmp_path / "four"), str(tmp_path / "one"))[0]
    back = on(megatron_pool, load, 2, replace(of_te, tp=2), str(tmp_path / "one"))[0]
    assert_bitwise_equal(one["logits"], four["logits"])
    assert compare(stock["logits"], four["logits"]), "the twin: TE's layers add in another order"
    assert back.keys() == stock.keys()
    for name, expected in stock.items():
        assert_bitwise_equal(back[name], expected, name)


# -- what is refused --------------------------------------------------------------------------------------------------------------


def attribute(path: str, name: str, value):
    def change(model):
        setattr(model.get_submodule(path), name, value)

    return change


QKV, CORE, PROJ = (f"decoder.layers.0.self_attention.{name}" for name in ("linear_qkv", "core_attention", "linear_proj"))
REFUSED = {
    "zero-centred gamma": (attribute(QKV, "zero_centered_gamma", True), "zero_centered_gamma=True is not covered; build it with"),
    "zero-centred norm": (attribute("decoder.final_layernorm", "zero_centered_gamma", True), "zero_centered_gamma=True is not covered"),
    "duplicated": (attribute(PROJ, "parallel_mode", None), "parallel_mode=None is not covered"),
    "norm's output": (attribute(QKV, "return_layernorm_output", True), "return_layernorm_output=True"),
    "symmetric memory": (attribute(PROJ, "symmetric_ar_type", "multimem"), "symmetric_ar_type='multimem'"),
    "userbuffers": (attribute(QKV, "ub_overlap_ag_fprop", True), "ub_overlap_ag_fprop=True"),
    "quantised": (attribute(QKV, "te_quant_params", "recipe"), "te_quant_params='recipe'"),
    "fp8 weights": (attribute(QKV, "primary_weights_in_fp8", True), "primary_weights_in_fp8=True"),
    "fp8": (attribute(QKV, "fp8", True), "fp8=True"),
    "splits": (attribute(QKV, "weight_names", ["q_weight", "k_weight"]), "weight_names="),
    "no group": (attribute(QKV, "tp_group", None), "tp_group=None: initialise Megatron's parallel state"),
    "width": (attribute(PROJ, "in_features", 36), "no 8 equal leaves"),
    "window": (attribute(CORE, "window_size", (128, 0)), "window_size=(128, 0) is not covered"),
    "softcap": (attribute(CORE, "softcap", 30.0), "softcap=30.0"),
    "sinks": (attribute(CORE, "softmax_type", "off-by-one"), "softmax_type='off-by-one'"),
    "dropout": (attribute(CORE, "attention_dropout", 0.1), "attention_dropout=0.1 draws from a stream per rank"),
    "mask": (attribute(CORE, "attn_mask_type", "arbitrary"), "attn_mask_type='arbitrary' is not covered; use causal"),
    "hook": (lambda model: model.get_submodule(QKV).register_forward_hook(lambda *_: None), "may change what"),
    "adapter": (lambda model: model.get_submodule(QKV).add_module("lora", torch.nn.Linear(2, 2)), "lora"),
    "subclass": (lambda model: attribute(PROJ, "__class__", type("Mine", (type(model.get_submodule(PROJ)),), {}))(model), "Mine owns parameters"),
    "below attention": (lambda model: model.get_submodule(CORE).add_module("mine", torch.nn.LSTM(2, 2)), "LSTM owns parameters"),
}  # fmt: skip
SETTINGS = {
    "fp8": "hybrid", "tp_comm_overlap": True, "delay_wgrad_compute": True, "use_transformer_engine_op_fuser": True,
    "fused_residual_rmsnorm": True, "layernorm_zero_centered_gamma": True, "moe_shared_expert_overlap": True, "symmetric_ar_type": "one_shot",
    "use_te_activation_func": True, "fused_single_qkv_rope": True,
}  # fmt: skip


def refused(run: Run) -> dict:
    found = {}
    for name, (change, _) in REFUSED.items():
        model = gpt(run)
        change(model)
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError) as caught:
            convert(model, tree=run.tree)
        assert [type(m) for m in model.modules()] == classes, "nothing was changed"
        found[name] = str(caught.value)
    for setting, value in SETTINGS.items():
        model = gpt(run)
        if hasattr(model.config, setting):
            setattr(model.config, setting, value)
            with pytest.raises(ValueError) as caught:
                convert(model, tree=run.tree)
            found[f"setting {setting}"] = str(caught.value)
    return found


def test_what_te_can_do_and_is_not_covered_is_refused(megatron_pool):
    found = on(megatron_pool, refused, 1, LLAMA)[0]
    for name, (_, message) in REFUSED.items():
        assert message in found[name], (name, found[name])
    for name, message in found.items():
        if name.startswith("setting "):
            assert f"{name.removeprefix('setting ')}=" in message and "set " in message, message
    assert sum(name.startswith("setting ") for name in found) >= 6


def attention(run: Run) -> dict:
    model = convert(gpt(run), tree=run.tree)
    core = model.get_submodule(CORE)
    config = model.config
    q, k, v = (
        torch.randn(8, 2, n, config.kv_channels, dtype=torch.bfloat16) for n in (config.num_attention_heads, *[config.num_query_groups] * 2)
    )
    causal = torch.ones(1, 1, 8, 8).triu(1).bool()
    full, none = core(q, k, v, None), core(q, k, v, None, AttnMaskType.no_mask)
    assert full.equal(core(q, k, v, causal, AttnMaskType.causal)) and compare(full, none)
    last = core(q[-1:], k, v, causal[:, :, -1:], AttnMaskType.causal_bottom_right)
    assert_bitwise_equal(last, full[-1:])
    assert_bitwise_equal(core(q[-1:], k, v, None, AttnMaskType.no_mask), full[-1:])
    cu = torch.tensor([0, 8], dtype=torch.int32)
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=8, max_seqlen_kv=8)
    for kind in (AttnMaskType.padding_causal, AttnMaskType.causal):
        assert_bitwise_equal(core(q[:, 0], k[:, 0], v[:, 0], None, kind, packed_seq_params=pack), full[:, 0])
    calls = {
        "reads a mask": lambda: core(q, k, v, ~causal, AttnMaskType.causal),
        "no_mask is not read": lambda: core(q, k, v, causal, AttnMaskType.no_mask),
        "padding is covered for packed": lambda: core(q, k, v, None, AttnMaskType.padding),
        "use causal_bottom_right": lambda: core(q[-1:], k, v, None, AttnMaskType.causal),
        "attention bias": lambda: core(q, k, v, None, attention_bias=q),
        "does not know num_splits": lambda: core(q, k, v, None, num_splits=2),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        found[name] = str(caught.value)
    return found


def test_attention_of_one_module(megatron_pool):
    for name, message in on(megatron_pool, attention, 1, LLAMA)[0].items():
        assert name in message or (name == "reads a mask" and "causal" in message), (name, message)


# -- the optimizer ----------------------------------------------------------------------------------------------------------------


def optimizer_states(run: Run) -> list[str]:
    model = convert(gpt(run), tree=run.tree)
    assert isinstance(model, LanguageModule) and Adam is FusedAdam
    messages = []
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "master_weight_dtype"):
        for dtype in (torch.float16, torch.uint8):
            parameter = next(model.parameters())
            parameter.grad = torch.zeros_like(parameter)
            with pytest.raises(ValueError) as caught:
                FusedAdam([parameter], **{name: dtype}).step()
            messages.append(str(caught.value))
    FusedAdam([parameter], exp_avg_dtype=torch.bfloat16).step()
    FusedAdam([torch.nn.Parameter(torch.zeros(2))], exp_avg_dtype=torch.uint8).step()  # nobody converted its model
    return messages


def test_states_that_carry_a_scale_per_shard_are_refused(megatron_pool):
    messages = on(megatron_pool, optimizer_states, 1, LLAMA)[0]
    assert len(messages) == 6 and all("use float32 or bfloat16" in message for message in messages)


def norms() -> list:
    grads = [torch.full((3,), 2.0), torch.full((2, 2), 1.0)]
    return [hooks.norm_fp32(grads), hooks.norm_fp32(grads, float("inf"))]


def test_the_norm_is_a_tensor_where_megatron_scales_by_one(megatron_pool):
    two, largest = on(megatron_pool, norms, 1)[0]
    assert float(two) == 4.0 and largest == 2.0
    wants = getattr(clip_grads, "multi_tensor_scale_tensor_impl", None) is not None
    assert [isinstance(norm, torch.Tensor) and norm.shape == (1,) for norm in (two, largest)] == [wants, False]

"""What the guard refuses without a model to look at, what convert refuses on a CPU, and a spec whose model was never converted."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention

from tpinv.harness.megatron.verify import Run, build_config, build_model
from tpinv.integrations.megatron import convert, convert_optimizer
from tpinv.integrations.megatron.attention import TPInvariantDotProductAttention, _require_causal
from tpinv.integrations.megatron.convert import _check_modules, _no_dynamic_batching
from tpinv.integrations.megatron.guard import check_config
from tpinv.integrations.megatron.layers import TPInvariantSwiGLU, fuses_main_grad, mark_shared_weights
from tpinv.tree import ReductionTree

pytestmark = pytest.mark.megatron
TREE = ReductionTree(8)
SETTINGS = (
    "attention_dropout attention_output_gate batch_invariant_mode cpu_offloading defer_embedding_wgrad_compute delay_wgrad_compute "
    "enable_autocast experimental_attention_variant fine_grained_activation_offloading flash_decode fp32_residual_connection fp4 fp8 "
    "heterogeneous_block_specs hidden_dropout inference_fuse_tp_communication layernorm_zero_centered_gamma "
    "linear_attention_freq log_max_attention_logit mtp_num_layers multi_latent_attention nccl_all_reduce_for_prefill num_moe_experts qk_clip "
    "qk_l2_norm quant_recipe symmetric_ar_type tensor_parallel_num_weight_shards tp_comm_overlap use_grouped_gemm_for_dense_mlp "
    "use_inference_optimized_layers use_kitchen use_te_activation_func use_transformer_engine_op_fuser"
).split()
ONES = "context_parallel_size gtp_weight_remat_size mlp_chunks_for_prefill mlp_chunks_for_training".split()


@pytest.mark.parametrize("name, value", [*((name, True) for name in SETTINGS), *((name, 2) for name in ONES)])
def test_a_setting_that_changes_bits_is_refused_by_name(name, value):
    config = SimpleNamespace(num_attention_heads=8, num_query_groups=8)
    check_config(config, TREE, 8)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: ") + f".*; set {name}="):
        check_config(config, TREE, 8)


def test_gradient_accumulation_fusion_is_accepted():
    check_config(SimpleNamespace(num_attention_heads=8, num_query_groups=8, gradient_accumulation_fusion=True), TREE, 8)


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
    for unfit in (with_buffer(torch.bfloat16), with_buffer(zero_out_wgrad=True), with_buffer(__fsdp_param__=True), torch.nn.Linear(4, 4)):
        assert not fuses_main_grad(unfit, unfit.weight)
    for graphs in ("local", "none"):
        linear.config.cuda_graph_impl = graphs
        assert fuses_main_grad(linear, linear.weight) == (graphs == "none")
    tied = torch.nn.Embedding(4, 4)
    tied.weight = other.weight
    mark_shared_weights([linear, other, tied])
    assert fuses_main_grad(linear, linear.weight) and not fuses_main_grad(other, other.weight)


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
        _check_modules([("position_embeddings", torch.nn.Embedding(5, 4, **options))], TREE)
    _check_modules([("position_embeddings", torch.nn.Embedding(5, 4))], TREE)


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
    assert "may depend on a shard's width on a CPU; use silu, gelu, relu or squared_relu" in found["activation"]
    assert "bias_activation_fusion" in found["fusion"] and "set it to False" in found["fusion"]
    assert "OwnAttention" in found["attention"] and "is not covered" in found["attention"]
    assert "its dropout of 0.1 draws from a stream per rank" in found["dropout"]
    assert "call convert(model, tree=tree) once the model is built" in found["spec"]

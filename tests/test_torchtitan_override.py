"""What the override claims, keeps, and refuses; and the clip function that it installs."""

import copy
import dataclasses
import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("torchtitan")

import spmd_types as spmd
import torch
import torchtitan_jobs as jobs
from torch._subclasses import FakeTensorMode
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config import CompileConfig, ConfigManager, DebugConfig, ParallelismConfig
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.parallel_dims import MeshAxisName
from torchtitan.models import deepseek_v3, llama3, qwen3
from torchtitan.models.common.attention import FlexAttention, VarlenMetadata, create_varlen_metadata_for_document
from torchtitan.models.common.attention import VarlenAttention as StockVarlenAttention
from torchtitan.models.common.feed_forward import SigmoidGatedFeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module

from tpinv import functional
from tpinv.harness.torchtitan.recipe import OVERRIDE, Run, build_model_config, build_trainer_config
from tpinv.harness.torchtitan.verify import train
from tpinv.integrations.torchtitan import replace
from tpinv.integrations.torchtitan.layers import ScaledDotProductAttention, VarlenAttention
from tpinv.integrations.torchtitan.loss import CrossEntropyLoss as InvariantLoss
from tpinv.ops.registry import ALONE
from tpinv.testing import RankError, assert_bitwise_equal

pytestmark = pytest.mark.torchtitan
LLAMA = Run("tpinv", 2, True, (1, 2, 4))
QWEN = dataclasses.replace(LLAMA, qk_norm=True, fused_qkv=False)


def configured(run: Run, **settings):
    """A trainer's config as it is when overrides are applied."""
    config = build_trainer_config(run, build_model_config(run), "")
    for name, value in settings.items():
        setattr(config, name, value)
    config.model_spec.model.update_from_config(config=config)
    return config


def override(config, **arguments):
    return apply_overrides(OverrideConfig(imports=[(OVERRIDE, arguments)]), config)


def modules(config, kind=Module.Config) -> dict[str, Module.Config]:
    return {fqn: node for fqn, node, _, _ in config.model_spec.model.traverse(kind, recurse=True)}


@pytest.mark.parametrize("run", [LLAMA, QWEN], ids=["llama3", "qwen3"])
def test_every_module_with_parameters_is_replaced(run):
    config, stock = configured(run), configured(run)
    override(config, leaves=4, node_dtype="bfloat16")
    found, before = modules(config), modules(stock)
    assert found.keys() == before.keys()
    with_states = {fqn for fqn, node in before.items() if getattr(node.sharding_config, "state_shardings", None) and "rope" not in fqn}
    assert all(type(found[fqn]) is not type(before[fqn]) for fqn in with_states) and len(with_states) > 12
    assert {(found[fqn].leaves, found[fqn].node_dtype) for fqn in with_states} == {(4, "bfloat16")}
    assert isinstance(config.loss, ChunkedLossWrapper.Config) and type(config.loss.loss_fn) is InvariantLoss.Config
    for fqn in with_states:
        states, expected = found[fqn].sharding_config.state_shardings, before[fqn].sharding_config.state_shardings
        assert states.keys() == expected.keys()
        for name in states:  # FSDP must not add up once more what is complete
            placements = [layout.per_axis_spmd_types()[MeshAxisName.TP] for layout in (states[name], expected[name])]
            assert placements[0] == placements[1] or placements == [spmd.I, spmd.R], (fqn, name, placements)


def test_flex_attention_is_computed_by_documents(monkeypatch):
    """By default, as torchtitan's varlen configs do, without CUDA graphs. In batch-invariant mode it stays, and its gradients are not promised."""
    config = configured(LLAMA)
    config.model_spec.model = llama3.model_registry("debugmodel", attn_backend="flex").model
    config.training.disable_cuda_graphs = False
    override(config)
    inner = [layer.attention.inner_attention for layer in config.model_spec.model.layers]
    assert {(type(one), tuple(one.window_size)) for one in inner} == {(VarlenAttention.Config, (-1, 0))}
    assert config.training.disable_cuda_graphs
    masks = config.model_spec.model.build().get_attention_masks(positions=torch.arange(8).view(1, 8) % 5)
    assert isinstance(masks, VarlenMetadata) and masks.cu_seq_q.tolist() == [0, 5, 8]
    monkeypatch.setattr(replace, "is_in_batch_invariant_mode", lambda: True)
    for backend, stock in (("flex", FlexAttention), ("varlen", StockVarlenAttention)):
        config.model_spec.model = llama3.model_registry("debugmodel", attn_backend=backend).model
        with pytest.raises(ValueError, match="gradients depend on the heads of a rank"):
            override(config)
        if backend == "flex":
            with pytest.raises(ValueError, match="BatchInvariantFlexConverter"):
                override(config, forward_only=True)
        config.model_spec.model = llama3.model_registry("debugmodel", attn_backend=backend).model
        if backend == "flex":
            for layer in config.model_spec.model.layers:
                layer.attention.inner_attention.kernel_options |= {"BACKEND": "TRITON", "BLOCK_M": 16, "BLOCK_N": 16}
        override(config, forward_only=True)
        assert {type(layer.attention.inner_attention) for layer in config.model_spec.model.layers} == {stock.Config}


def test_a_second_time_changes_nothing():
    config = configured(LLAMA)
    override(config)
    once = modules(config)
    override(config)
    assert {fqn: type(node) for fqn, node in modules(config).items()} == {fqn: type(node) for fqn, node in once.items()}


@pytest.mark.parametrize("run", [LLAMA, QWEN], ids=["llama3", "qwen3"])
def test_names_of_parameters_and_checkpoints_stay(run):
    config = configured(run)
    override(config)
    ours, stock = config.model_spec.model.build(), configured(run).model_spec.model.build()
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert {name: value.shape for name, value in ours.state_dict().items()} == {n: v.shape for n, v in stock.state_dict().items()}
    ours.load_state_dict(stock.state_dict())
    for (name, value), expected in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert_bitwise_equal(value, expected, name)


def test_the_command_line_names_one_override():
    arguments = "--module llama3 --config llama3_debugmodel --override.imports".split()
    config = ConfigManager().parse_args([*arguments, OVERRIDE])
    config.model_spec.model.update_from_config(config=config)
    replaced = apply_overrides(config.override, config)
    # 6 layers; embedding, norm, output layer, loss; checkpointing; 5 groups of settings
    assert len(replaced) == 6 + 4 + 1 + 5
    config = ConfigManager().parse_args([*arguments, OVERRIDE + '={"leaves": 16}'])
    assert list(config.override.imports) == [(OVERRIDE, {"leaves": 16})]


def moe():
    return qwen3.model_registry("debugmodel_moe", attn_backend="flex").model


def gated():
    model = build_model_config(LLAMA)
    forward = model.layers[0].feed_forward
    gate = Linear.Config(in_features=model.dim, out_features=1)
    model.layers[0].feed_forward = SigmoidGatedFeedForward.Config(w1=forward.w1, w2=forward.w2, w3=forward.w3, gate=gate)
    return model


def float8():
    model = build_model_config(LLAMA)
    for _, node, parent, name in list(model.traverse(Linear.Config)):
        if name == "w2":
            setattr(parent, name, type("Float8", (Linear.Config,), {})(in_features=node.in_features, out_features=node.out_features))
    return model


class Strange(Module):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass


def strange_attention():
    model = build_model_config(LLAMA)
    model.layers[0].attention.inner_attention = Strange.Config()
    return model


class StrangeBlock(llama3.model.Llama3TransformerBlock):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(llama3.model.Llama3TransformerBlock.Config):
        pass


def strange(node, kind: type):
    return kind(**{field.name: getattr(node, field.name) for field in dataclasses.fields(node) if field.init})


def strange_block():
    model = build_model_config(LLAMA)
    model.layers[0] = strange(model.layers[0], StrangeBlock.Config)
    return model


def strange_rope():
    model = build_model_config(LLAMA)
    rope = model.layers[0].attention.rope
    model.layers[0].attention.rope = strange(
        rope, dataclasses.make_dataclass("StrangeRope", [], bases=(type(rope),), kw_only=True, slots=True)
    )
    return model


def window():
    model = llama3.model_registry("debugmodel", attn_backend="varlen").model
    model.layers[0].attention.inner_attention.window_size = (64, 64)
    return model


MODELS = {
    "mixture of experts": moe,
    "GQAttention.Config": lambda: deepseek_v3.model_registry("debugmodel", attn_backend="flex").model,
    "SigmoidGatedFeedForward.Config is not covered": gated,
    "Float8 is not covered": float8,
    r"window_size=\(64, 64\) is not covered": window,
    "the attention .*Strange.Config is not covered": strange_attention,
    "StrangeBlock.Config is not covered": strange_block,
    "StrangeRope is not covered": strange_rope,
    "AllGatherFused.* is not covered": lambda: llama3.model_registry("debugmodel", tp_gemm_backend="dist_gemm").model,
}


@pytest.mark.parametrize("message", MODELS)
def test_models_that_are_not_covered(message):
    config = configured(LLAMA)
    config.model_spec.model = MODELS[message]()
    with pytest.raises(ValueError, match=message):
        override(config)


SETTINGS = {
    "context_parallel_degree=2": {"parallelism": ParallelismConfig(context_parallel_degree=2)},
    "pipeline_parallel_degree=2": {"parallelism": ParallelismConfig(pipeline_parallel_degree=2)},
    "4 data-parallel ranks": {"parallelism": ParallelismConfig(data_parallel_shard_degree=4)},
    "3 data-parallel ranks": {"parallelism": ParallelismConfig(data_parallel_replicate_degree=3)},
    "expert_parallel_degree=2": {"parallelism": ParallelismConfig(expert_parallel_degree=2)},
    "spmd_backend='full_dtensor'": {"parallelism": ParallelismConfig(spmd_backend="full_dtensor")},
    "16 ranks do not divide leaves=8": {"parallelism": ParallelismConfig(tensor_parallel_degree=16)},
    "enable_async_tensor_parallel=True": {"compile": CompileConfig(enable=True, enable_async_tensor_parallel=True)},
    "spmd_typechecking=True": {"debug": DebugConfig(spmd_typechecking=True)},
    "DistMuon may add up": {
        "optimizer": OptimizersContainer.Config(param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="DistMuon")])
    },
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_are_not_covered(message):
    config = configured(LLAMA)
    for name, value in SETTINGS[message].items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        override(config)


@pytest.mark.parametrize("forward_only", [False, True])
def test_data_parallelism_above_two(forward_only):
    """The degree in the settings may be what the other sizes leave (-1); then the modules see it first."""
    config = configured(LLAMA)
    override(config, forward_only=forward_only)
    dims = SimpleNamespace(
        tp=1, cp=1, ep=1, pp=1, dp_replicate=1, dp_shard=4, spmd_backend="partial_dtensor", get_optional_mesh=lambda *_: None
    )
    norm = config.model_spec.model.layers[0].attention_norm
    norm.sharding_config = None
    if forward_only:
        norm.build().parallelize(dims)
    else:
        with pytest.raises(ValueError, match="4 data-parallel ranks"):
            norm.build().parallelize(dims)


def test_data_parallelism_above_two_at_one_rank(torchtitan_pool):
    """Where TorchTitan shows the modules no parallelism, their parameters do, before the first step."""
    with pytest.raises(RankError, match="4 data-parallel ranks"):
        torchtitan_pool.run(train, 4, dataclasses.replace(LLAMA, tp=1, sequence_parallel=False, dp=4, backend="partial_dtensor"))


@pytest.mark.parametrize("leaves, message", [(3, "no 3 equal leaves"), (0, "at least 1")])
def test_trees_that_do_not_fit(leaves, message):
    with pytest.raises(ValueError, match=message):
        override(configured(LLAMA), leaves=leaves)


def test_the_norm_of_gradients_is_exact(torchtitan_pool):
    """Over FSDP's DTensors and over plain local tensors, at any size, and a stranger's parameters go to the stock function."""
    runs = [(tp, backend) for tp in (1, 4) for backend in ("partial_dtensor", "spmd_types")]
    results = [
        torchtitan_pool.run(jobs.clipped, tp, dataclasses.replace(LLAMA, tp=tp, sequence_parallel=tp > 1, backend=backend))[0]
        for tp, backend in runs
    ]
    model = build_model_config(LLAMA).build()
    expected = sum((i + 1.0) ** 2 * parameter.numel() for i, parameter in enumerate(model.parameters())) ** 0.5
    for norm, stranger, stock_norm in results:
        assert abs(norm.item() - expected) <= expected * 2**-23
        assert_bitwise_equal(norm, results[0][0])
        assert stranger.item() == stock_norm.item() == pytest.approx(12**0.5)


def test_parameters_that_were_replaced_are_clipped(monkeypatch):
    """Neither those of a copy nor those that load_state_dict puts in place fall to the stock function."""
    config = configured(LLAMA)
    override(config)
    monkeypatch.setattr(dist_utils.clip_grad_norm_, "stock", None)
    model = copy.deepcopy(config.model_spec.model.build())
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()}, assign=True)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = dist_utils.clip_grad_norm_(parameters, 1.0, group=ALONE)
    assert norm.item() == pytest.approx(2 * sum(parameter.numel() for parameter in parameters) ** 0.5)


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (3, 0)])
def test_packed_documents_have_the_bytes_they_have_alone(window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, heads, 16, generator=generator).requires_grad_() for heads in (6, 2, 2))
    documents = create_varlen_metadata_for_document(torch.cat([torch.arange(size) for size in (9, 1, 10, 12, 8)]).view(2, 20))
    assert documents.cu_seq_q.tolist() == [0, 9, 10, 20, 32, 40]
    dout = torch.randn(2, 20, 6, 16, generator=generator)
    out = VarlenAttention(VarlenAttention.Config(window_size=window))(q, k, v, attention_masks=documents, enable_gqa=True)
    whole = [t.flatten(0, 1) for t in (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))]
    for start, end in itertools.pairwise(documents.cu_seq_q.tolist()):
        mine = [t.detach().flatten(0, 1)[None, start:end].requires_grad_() for t in (q, k, v)]
        if window == (3, 0):
            rows = [t.transpose(0, 1) for t in mine]
            alone = functional.core_attention(*rows, sliding_window=4).transpose(0, 1)
        else:
            alone = ScaledDotProductAttention(ScaledDotProductAttention.Config())(*mine, is_causal=window == (-1, 0), enable_gqa=True)
        gradients = torch.autograd.grad(alone, mine, dout.flatten(0, 1)[None, start:end])
        for found, expected in zip(whole, (alone.detach(), *gradients), strict=True):
            assert_bitwise_equal(found[start:end], expected[0])
    for masks, options, message in ((None, {}, "got NoneType"), (documents, {"out_transform": abs}, "out_transform")):
        with pytest.raises(ValueError, match=message):
            VarlenAttention(VarlenAttention.Config())(q, k, v, attention_masks=masks, **options)


@pytest.mark.parametrize("window", [(3, 1), (-2, 0), (3,), (True, 0), (3.0, 0), "30", (0, -1)])
def test_windows_that_are_refused(window):
    with pytest.raises(ValueError, match=r"window_size=.* is not covered; use \(-1, 0\), \(-1, -1\), or \(n, 0\)"):
        VarlenAttention(VarlenAttention.Config(window_size=window))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "keys, options, message",
    [(8, {"attention_masks": 1}, "no attention_masks"), (8, {"dropout_p": 0.1}, "no dropout_p"), (5, {}, "8 queries over 5 keys")],
)
def test_what_attention_does_not_take_is_refused(keys, options, message, device):
    attention = ScaledDotProductAttention(ScaledDotProductAttention.Config())
    with FakeTensorMode():  # a CUDA device without a GPU
        q, kv = torch.empty(2, 8, 4, 16, device=device), torch.empty(2, keys, 2, 16, device=device)
        with pytest.raises(ValueError, match=message):
            attention(q, kv, kv, enable_gqa=True, **options)

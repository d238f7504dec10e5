"""The same Llama weights in Megatron-Core and in TorchTitan, fp32 on a CPU: every module gives the same bytes up to the first attention,
which the two frameworks compute by different algorithms; with one of them in both, the logits are the same bytes, at different sizes."""

import dataclasses

import pytest

pytest.importorskip("torchtitan")
pytest.importorskip("megatron.core")

from tpinv.harness.torchtitan import verify as titan  # isort: skip
import torch
import torch.distributed as dist
from torchtitan.config import ParallelismConfig
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.common import CosSinRoPE

from tpinv.harness.torchtitan.recipe import OVERRIDE, Run, build_model_config
from tpinv.layers import shard
from tpinv.testing import assert_bitwise_equal, compare
from tpinv.testing.text import real_text

pytestmark = pytest.mark.torchtitan
SIZES = (1, 2, 4)
NAMES = {  # Megatron's: TorchTitan's
    "embedding.word_embeddings": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.qkv_linear.wqkv",
    "self_attention.linear_proj": "attention.wo",
    "pre_mlp_layernorm": "ffn_norm",
    "mlp.linear_fc2": "feed_forward.w2",
    "decoder.final_layernorm": "norm",
    "decoder.layers": "layers",
    "output_layer": "lm_head",
}


def tokens(sequence: int) -> torch.Tensor:
    return real_text()[: 2 * sequence].view(2, -1)


def in_titan(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def megatron_run() -> tuple[dict, dict]:
    """On one rank: the weights, and the output of every module that both have, as [B, L, ...]."""
    from megatron.core import parallel_state

    from tpinv.harness.megatron import verify
    from tpinv.integrations.megatron import on_cpu

    run = verify.Run("tpinv", 1, False, SIZES)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    try:
        with on_cpu():
            model = verify.build_model(run, verify.build_config(run))
            outputs = {}
            for name, module in model.named_modules():
                if any(name.endswith(known) for known in NAMES):
                    module.register_forward_hook(lambda module, inputs, output, name=name: outputs.__setitem__(name, output))
            causal = torch.ones(1, 1, run.sequence, run.sequence).triu(1).bool()
            with torch.no_grad():
                model(tokens(run.sequence), torch.arange(run.sequence).expand(2, -1), causal)
    finally:
        parallel_state.destroy_model_parallel()
    outputs = {name: output[0] if isinstance(output, tuple) else output for name, output in outputs.items()}
    # Only the embedding is [b, s, h] in Megatron too.
    outputs = {in_titan(name): o if name == "embedding.word_embeddings" else o.transpose(0, 1) for name, o in outputs.items()}
    weights = {in_titan(name): parameter.detach() for name, parameter in model.named_parameters()}
    for name in [name for name in weights if "linear_fc1" in name]:
        w1, w3 = weights.pop(name).chunk(2)
        weights |= {name.replace("mlp.linear_fc1", f"feed_forward.{new}"): part for new, part in (("w1", w1), ("w3", w3))}
    return weights, outputs


class MegatronAttention(torch.nn.Module):
    """Megatron's core attention in the place of TorchTitan's."""

    def __init__(self, heads: int, groups: int, width: int):
        super().__init__()
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.enums import AttnMaskType

        from tpinv.integrations.megatron.attention import TPInvariantDotProductAttention

        config = TransformerConfig(
            num_layers=1, hidden_size=heads * width, num_attention_heads=heads, num_query_groups=groups, kv_channels=width,
            attention_dropout=0.0, masked_softmax_fusion=False,
        )  # fmt: skip
        self.attention = TPInvariantDotProductAttention(config, 1, AttnMaskType.causal, "self")

    def forward(self, q, k, v, **_):
        causal = torch.ones(1, 1, q.shape[1], q.shape[1]).triu(1).bool()
        return self.attention(*(t.transpose(0, 1) for t in (q, k, v)), causal).transpose(0, 1).unflatten(-1, q.shape[2:])


def titan_run(weights: dict, megatrons_attention: bool) -> dict:
    """On every rank: outputs of the same modules, of whole sequences; sharded features are put together."""
    from megatron.core import parallel_state

    from tpinv.integrations.megatron import on_cpu

    tp, rank = dist.get_world_size(), dist.get_rank()
    run = Run("tpinv", tp, False, SIZES)
    config = build_model_config(run)
    for layer in config.layers:
        layer.attention.rope = CosSinRoPE.Config(dim=layer.attention.rope.dim, max_seq_len=run.sequence, theta=10000)
    parallelism = ParallelismConfig(tensor_parallel_degree=tp, enable_sequence_parallel=False)
    dist_utils.set_spmd_backend("spmd_types")
    config.update_from_config(config=dataclasses.make_dataclass("Settings", [("parallelism", ParallelismConfig)])(parallelism))
    apply_overrides(OverrideConfig(imports=[(OVERRIDE, {"leaves": run.leaves})]), config)
    model, dims = config.build(), ParallelDims.from_config(parallelism, tp)
    model.parallelize(dims)
    outputs = {}
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    try:
        with torch.no_grad(), on_cpu(), dist_utils.get_spmd_context(parallel_dims=dims)():
            model.init_weights(buffer_device=None)
            for name, parameter in model.named_parameters():
                dim = titan.shard_dim(model, name)
                parameter.copy_(weights[name] if dim is None else shard(weights[name], dim, rank, tp))
            for name, module in model.named_modules():
                if name.endswith(tuple(NAMES.values())):
                    sharded = name.endswith(("wqkv", "lm_head"))
                    module.register_forward_hook(
                        lambda module, inputs, output, name=name, sharded=sharded: outputs.__setitem__(
                            name, torch.cat(titan._gather(output), -1) if sharded else output
                        )
                    )
            attention = config.layers[0].attention
            for block in model.layers.values() if megatrons_attention else ():
                width = attention.dim // attention.n_heads
                block.attention.inner_attention = MegatronAttention(attention.n_heads, attention.n_kv_heads, width)
            model(tokens(run.sequence))
    finally:
        parallel_state.destroy_model_parallel()
    return outputs


@pytest.fixture(scope="module")
def megatron(torchtitan_pool):
    return torchtitan_pool.run(megatron_run, 1, timeout=200)[0]


@pytest.mark.parametrize("tp", [1, 4])
def test_logits_with_one_core_attention(tp, megatron, torchtitan_pool):
    weights, expected = megatron
    found = torchtitan_pool.run(titan_run, tp, weights, True, timeout=200)[0]
    assert found.keys() == expected.keys() and {"tok_embeddings", "layers.1.feed_forward.w2", "norm", "lm_head"} <= found.keys()
    for name in expected:
        assert_bitwise_equal(found[name], expected[name].reshape(found[name].shape), name)


def test_attention_is_where_they_part(megatron, torchtitan_pool):
    weights, expected = megatron
    found = torchtitan_pool.run(titan_run, 1, weights, False, timeout=200)[0]
    same = {name for name in expected if not compare(found[name], expected[name].reshape(found[name].shape))}
    assert same == {"tok_embeddings", "layers.0.attention_norm", "layers.0.attention.qkv_linear.wqkv"}

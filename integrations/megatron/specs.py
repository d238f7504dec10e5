"""Specs, for people who build their model from them. What a spec reaches is built invariant; the word embedding, the output layer and
the loss are in no spec, so the model still goes through ``convert`` once it is built:

    model = convert(GPTModel(config, transformer_layer_spec=gpt_layer_spec(config, tree=tree), ...), tree=tree)

It is also the way to sequence parallelism without Apex or TransformerEngine: the stock local spec's norm refuses it.
"""

import contextlib

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from tpinv.integrations.megatron import layers
from tpinv.integrations.megatron.attention import TPInvariantDotProductAttention
from tpinv.integrations.megatron.guard import check_config
from tpinv.tree import ReductionTree

try:  # megatron-core 0.19 and later
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
except ImportError:  # 0.16 calls it a Mamba stack
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules


class TPInvariantSpecProvider(LocalSpecProvider):
    """A BackendSpecProvider whose modules follow ``tree``. Whatever it does not name falls back to the local provider's."""

    def __init__(self, tree: ReductionTree):
        self.tree = tree

    def column_parallel_linear(self) -> type:
        return layers.TPInvariantColumnParallelLinear.bind(self.tree)

    def row_parallel_linear(self) -> type:
        return layers.TPInvariantRowParallelLinear.bind(self.tree)

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_) -> type:
        kind = layers.TPInvariantQKNorm if for_qk else layers.TPInvariantNorm
        return kind.bind(self.tree)

    def core_attention(self) -> type:
        return TPInvariantDotProductAttention

    def grouped_mlp_modules(self, *_, **__):
        raise ValueError("mixture of experts is not covered; build a dense model")


@contextlib.contextmanager
def _local_provider(provider: LocalSpecProvider):
    """Megatron's spec builders take no provider but construct LocalSpecProvider() by that name."""
    stock = gpt_layer_specs.LocalSpecProvider
    gpt_layer_specs.LocalSpecProvider = lambda: provider
    try:
        yield
    finally:
        gpt_layer_specs.LocalSpecProvider = stock


def block_spec(config, provider: LocalSpecProvider, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """GPT's local layer spec with the modules of ``provider``, for all layers of this pipeline stage, and its final norm."""
    rms_norm = config.normalization == "RMSNorm"
    with _local_provider(provider):
        layer = gpt_layer_specs.get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization, qk_l2_norm=getattr(config, "qk_l2_norm", False)
        )
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=provider.layer_norm(rms_norm=rms_norm))


def gpt_layer_spec(config, *, tree: ReductionTree, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """``transformer_layer_spec`` for a GPTModel: linears, norms (q/k and final ones too) and core attention follow ``tree``.

    Raises ValueError for what cannot be invariant (guard.py). Pass the built model through ``convert``.
    """
    check_config(config, tree, config.tensor_model_parallel_size)
    return block_spec(config, TPInvariantSpecProvider(tree), vp_stage=vp_stage)


class LocalHybridStack(HybridStack):
    """HybridStack whose final norm comes from the spec's ``params``: the stock one is TransformerEngine's, whatever the spec says."""

    def __init__(self, *args, final_norm: type, post_layer_norm: bool = True, **kwargs):
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            config = self.config
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def stack_spec(config, provider: LocalSpecProvider) -> ModuleSpec:
    """HybridModel's stack of attention (*) and MLP (-) layers with the modules of ``provider``."""
    rms_norm = config.normalization == "RMSNorm"
    norm, qk_norm = provider.layer_norm(rms_norm=rms_norm), provider.layer_norm(rms_norm=rms_norm, for_qk=True)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm if config.qk_layernorm else IdentityOp,
            k_layernorm=qk_norm if config.qk_layernorm else IdentityOp,
        ),
    )
    mlp = MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
    return ModuleSpec(
        module=LocalHybridStack,
        params={"final_norm": norm},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(input_layernorm=norm, self_attention=attention, self_attn_bda=get_bias_dropout_add),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=norm, mlp=ModuleSpec(module=MLP, submodules=mlp), mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )


def hybrid_stack_spec(config, *, tree: ReductionTree) -> ModuleSpec:
    """Stack spec for a HybridModel (0.16: MambaModel) of attention and MLP layers, such as the pattern "*-*-".

    Mamba, delta-net and expert layers are not in it: a pattern that names them fails to build. Pass the built model through ``convert``.
    """
    check_config(config, tree, config.tensor_model_parallel_size)
    return stack_spec(config, TPInvariantSpecProvider(tree))

"""Specs with TransformerEngine's layers, for people who build their model from them: Megatron's own TE specs with our classes in them.

    model = convert(GPTModel(config, transformer_layer_spec=gpt_layer_te_spec(config, tree=tree), ...), tree=tree)

Converting a model that was built from the stock spec gives the same bytes. Imported where TransformerEngine is installed.
"""

import dataclasses

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from tpinv.integrations.megatron.guard import check_config
from tpinv.integrations.megatron.te import layers
from tpinv.tree import ReductionTree

try:  # megatron-core 0.19 and later
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stock_stack_spec
except ImportError:  # 0.16 calls it a Mamba stack
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as stock_stack_spec

BY_HEADS = ("q_layernorm", "k_layernorm")


class TPInvariantTESpecProvider(TESpecProvider):
    """TESpecProvider whose modules follow ``tree``."""

    def __init__(self, tree: ReductionTree):
        self.tree = tree

    def column_parallel_linear(self) -> type:
        return layers.TPInvariantTEColumnParallelLinear.bind(self.tree)

    def row_parallel_linear(self) -> type:
        return layers.TPInvariantTERowParallelLinear.bind(self.tree)

    def column_parallel_layer_norm_linear(self) -> type:
        return layers.TPInvariantTELayerNormColumnParallelLinear.bind(self.tree)

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_) -> type:
        return (layers.TPInvariantTEQKNorm if for_qk else layers.TPInvariantTENorm).bind(self.tree)

    def core_attention(self) -> type:
        return layers.TPInvariantTEDotProductAttention

    def linear(self) -> type:
        raise ValueError("a linear without tensor parallelism (multi-latent attention) is not covered; build a dense model")

    def grouped_mlp_modules(self, *_, **__):
        raise ValueError("mixture of experts is not covered; build a dense model")


def with_tree(spec, tree: ReductionTree, slot: str = ""):
    """A spec, class or dataclass of submodules with ours in the place of every stock TE class; what is not covered stays stock, and convert
    refuses it if a model is built of it."""
    if isinstance(spec, ModuleSpec):
        return dataclasses.replace(spec, module=with_tree(spec.module, tree, slot), submodules=with_tree(spec.submodules, tree))
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = {field.name: with_tree(getattr(spec, field.name), tree, field.name) for field in dataclasses.fields(spec) if field.init}
        return dataclasses.replace(spec, **fields)
    if isinstance(spec, list):
        return [with_tree(each, tree) for each in spec]
    if spec is TENorm or getattr(spec, "__name__", "") == "_TENormWithResidual":
        return (layers.TPInvariantTEQKNorm if slot in BY_HEADS else layers.TPInvariantTENorm).bind(tree)
    ours = layers.REPLACEMENTS.get(spec) if isinstance(spec, type) else None
    return ours.bind(tree) if hasattr(ours, "bind") else ours or spec


def block_te_spec(config, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """GPT's stock TE layer spec for all layers of this pipeline stage, and its final norm."""
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=TENorm)


def gpt_layer_te_spec(config, *, tree: ReductionTree, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """``transformer_layer_spec`` for a GPTModel of TE's layers that follow ``tree``. ValueError for what cannot be invariant (guard.py).
    Pass the built model through ``convert``."""
    check_config(config, tree, config.tensor_model_parallel_size)
    return with_tree(block_te_spec(config, vp_stage=vp_stage), tree)


def hybrid_stack_te_spec(config, *, tree: ReductionTree) -> ModuleSpec:
    """Stack spec for a HybridModel (0.16: MambaModel) of TE's attention and MLP layers, such as the pattern "*-*-". Pass the built model
    through ``convert``, which sees to the final norm and refuses layers of other kinds."""
    check_config(config, tree, config.tensor_model_parallel_size)
    return with_tree(stock_stack_spec, tree)

"""TransformerEngine's layers: what Megatron-Core builds by default once TE is installed, and the final norm of every model then.

TE's modules become ours the way the local ones do: a subclass of Megatron's own wrapper that overrides ``forward``. Parameters, their order
and names, ``_extra_state``, ``sharded_state_dict``, what ``isinstance`` says and DistributedDataParallel's hooks are TE's by construction.
Nothing here imports TE or needs it, but for layers.py and specs.py, which are imported where Megatron-Core itself has found it.
"""

import functools

from megatron.core.extensions import transformer_engine as megatron_te
from torch import nn

from tpinv.tree import ReductionTree

INSTALLED = bool(megatron_te.HAVE_TE)
# Below TE's core attention hang its three implementations, which a converted one never calls.
IMPLEMENTATIONS = ("flash_attention", "fused_attention", "unfused_attention")


@functools.cache
def replacements() -> dict[type, type]:
    """Stock class -> ours; empty without TransformerEngine."""
    if not INSTALLED:
        return {}
    from tpinv.integrations.megatron.te import layers

    return layers.REPLACEMENTS


def is_linear(module: nn.Module) -> bool:
    return INSTALLED and isinstance(module, (megatron_te.TELinear, megatron_te.TELayerNormColumnParallelLinear))


def is_attention(module: nn.Module) -> bool:
    return INSTALLED and isinstance(module, megatron_te.TEDotProductAttention)


def is_norm(module: nn.Module) -> bool:
    return INSTALLED and isinstance(module, (megatron_te.te.pytorch.LayerNorm, megatron_te.te.pytorch.RMSNorm))


def unused_modules(plan: list[tuple[str, nn.Module]]) -> set[int]:
    """ids of the modules below TE's core attentions that are never called: nobody needs to have looked at them."""
    found = set()
    for _, module in plan:
        if is_attention(module):
            for name in IMPLEMENTATIONS:
                found |= {id(below) for below in (getattr(module, name, None) or nn.Module()).modules()}
    return found


def problems(name: str, module: nn.Module, tree: ReductionTree) -> list[str]:
    """Why a TE module cannot be converted as it was built: rule, value, fix."""
    if is_linear(module):
        found = _linear_problems(module, tree)
    elif is_attention(module):
        found = _attention_problems(module)
    elif is_norm(module):
        found = _not(module, zero_centered_gamma=False)
    else:
        found = []
    return [f"{name}: {type(module).__name__} with {problem}" for problem in found]


def _not(module: nn.Module, **wanted) -> list[str]:
    """Attributes that are there and not what they must be."""
    return [
        f"{attribute}={value!r} is not covered; build it with {attribute}={good!r}"
        for attribute, good in wanted.items()
        if (value := getattr(module, attribute, good)) != good
    ]


USERBUFFERS = (
    "ub_overlap_ag_fprop ub_overlap_rs_fprop ub_overlap_ag_dgrad ub_overlap_rs_dgrad ub_bulk_dgrad ub_bulk_wgrad ub_overlap_ag ub_overlap_rs"
).split()


def _linear_problems(module: nn.Module, tree: ReductionTree) -> list[str]:
    row = isinstance(module, megatron_te.TERowParallelLinear)
    found = _not(
        module, parallel_mode="row" if row else "column", zero_centered_gamma=False, return_layernorm_output=False, symmetric_ar_type=None,
        te_quant_params=None, primary_weights_in_fp8=False, fp8=False, fp8_calibration=False, weight_names=["weight"],
    )  # fmt: skip
    found += _not(module, **dict.fromkeys(USERBUFFERS, False))
    store = getattr(module, "wgrad_store", None)
    if store is not None and store.delay_wgrad_compute():
        found.append("delay_wgrad_compute: weight gradients are computed later, by TE's kernels; set delay_wgrad_compute=False")
    if not row and "stride" not in vars(module):
        found.append("no stride, which tells SwiGLU's fc1 from others; use megatron-core 0.16.1 or later")
    if module.tp_group is None:
        found.append("tp_group=None: initialise Megatron's parallel state before the model is built")
    width = module.in_features if row else module.out_features // getattr(module, "stride", 1)
    try:
        tree.leaf_length(width * module.tp_size, f"its {'in' if row else 'out'}put_size")
    except ValueError as error:
        found.append(str(error))
    return found


def _attention_problems(module: nn.Module) -> list[str]:
    found = _not(module, softcap=0.0, attention_type="self", cp_group=None, return_max_logit=False, softmax_type="vanilla")
    if module.attention_dropout:
        found.append(f"attention_dropout={module.attention_dropout} draws from a stream per rank; build it with 0.0")
    window = module.window_size
    if window is not None and tuple(window) not in ((-1, -1), (-1, 0)):
        found.append(f"window_size={tuple(window)} is not covered; build it without")
    if module.attn_mask_type not in ("causal", "causal_bottom_right", "no_mask", "padding_causal", "padding"):
        found.append(f"attn_mask_type={module.attn_mask_type!r} is not covered; use causal")
    return found

"""What stands between two linears of a transformer block, in one call: (row-parallel linear,) all-reduce, residual add, RMSNorm.

For inference (no gradient). Decode spends its time on launches and on small messages; where the ranks share memory and the message
is small this is one kernel, elsewhere it is the separate operations. The bytes are the same, so that a trainer may use
those and a rollout engine this.
"""

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from tpinv import reference
from tpinv.collectives import all_reduce_add_norm, resolve, tree_all_reduce
from tpinv.ops import products
from tpinv.ops.norm import rms_norm
from tpinv.ops.shapes import rows
from tpinv.tree import ReductionTree

_library = torch.library.Library("tpinv", "FRAGMENT")
_library.define(
    "reduce_add_rms_norm(Tensor values, Tensor residual, Tensor weight, float eps, int leaves, str node_dtype, str group) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def row_parallel_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float = 1e-5, *, tree: ReductionTree, group=None
) -> tuple[Tensor, Tensor]:
    """``hidden = residual + row_parallel_linear(x, weight)`` and ``rms_norm(hidden, norm_weight, eps)``, bit for bit.

    x [..., K/p], weight [N, K/p] and residual [..., N] share a dtype. Returns and raises as :func:`reduce_add_rms_norm`.
    """
    _refuse_gradient(x, weight, residual, norm_weight)
    ranks = resolve(group)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must both end in this rank's in-features")
    reference.check_dtypes(x=x, weight=weight, residual=residual)
    tree.leaf_length(weight.shape[1] * ranks.size, "in_features")
    values = products.tree_product(rows(x), weight.t(), tree, ranks)
    values = values.view(len(values), *x.shape[:-1], weight.shape[0])
    return reduce_add_rms_norm(values, residual, norm_weight, eps, tree=tree, group=ranks)


def reduce_add_rms_norm(
    values: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, *, tree: ReductionTree, group=None
) -> tuple[Tensor, Tensor]:
    """``hidden = residual + tree_all_reduce(values, out_dtype=residual.dtype)`` and ``rms_norm(hidden, weight, eps)``, bit for bit.

    Args:
        values: [S, ..., H] in the tree's node dtype, this rank's subtree values, as tree_all_reduce takes them.
        residual: [..., H]; weight: [H]. float32, bfloat16 or float16; whole and the same on every rank.

    Returns:
        hidden and its norm, [..., H] in residual's dtype. Neither has a gradient.

    Raises:
        ValueError: shapes that do not fit, or what tree_all_reduce raises.
    """
    _refuse_gradient(values, residual, weight)
    if values.shape[1:] != residual.shape or residual.dim() < 1 or weight.shape != residual.shape[-1:]:
        raise ValueError(
            f"values {tuple(values.shape)}, residual {tuple(residual.shape)}, weight {tuple(weight.shape)} must be [S, ..., H], [..., H], [H]"
        )
    reference.check_dtypes(residual=residual)
    reference.check_dtypes(weight=weight)
    ranks = resolve(group)
    if ranks.size == 1:
        return _separate(values, residual, weight, eps, tree, ranks)
    name = ranks.group.group_name
    return torch.ops.tpinv.reduce_add_rms_norm(values, residual, weight, eps, tree.leaves, tree.node_dtype, name)


def _refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError("this fusion has no gradient; use the separate operations, or call it under torch.no_grad()")


def _separate(values, residual, weight, eps, tree, ranks) -> tuple[Tensor, Tensor]:
    hidden = residual + tree_all_reduce(values, tree=tree, group=ranks, out_dtype=residual.dtype)
    return hidden, rms_norm(hidden, weight, eps, tree=tree)


def _reduce_add_rms_norm(values, residual, weight, eps, leaves, node_dtype, group) -> tuple[Tensor, Tensor]:
    tree, ranks = ReductionTree(leaves, node_dtype), resolve(_resolve_process_group(group))
    fused = all_reduce_add_norm(values, residual, weight, eps, tree=tree, group=ranks)
    return fused or _separate(values, residual, weight, eps, tree, ranks)


def _reduce_add_rms_norm_fake(values, residual, weight, eps, leaves, node_dtype, group) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


_library.impl("reduce_add_rms_norm", _reduce_add_rms_norm, "CompositeExplicitAutograd")
torch.library.register_fake("tpinv::reduce_add_rms_norm", _reduce_add_rms_norm_fake, lib=_library)

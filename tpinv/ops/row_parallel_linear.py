"""Row-parallel linear: W is sharded over its in-features, so y sums over what the ranks share."""

from torch import Tensor

from tpinv import contract
from tpinv.collectives import all_gather, ranks_for
from tpinv.ops import products
from tpinv.ops.arguments import problem_of_tree, require, tree_of
from tpinv.ops.linear import FusedGradient, check_linear, fake_gradients, weight_grad
from tpinv.ops.registry import agree_backward, group_name, ranks_of, register
from tpinv.ops.shapes import rows
from tpinv.tree import ReductionTree

NAME = "row_parallel_linear"


def row_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tree: ReductionTree,
    group=None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """y = x W^T + b with W sharded over its in-features.

    Args:
        x: [..., K/p], this rank's features of every token.
        weight: [N, K/p], bias: [N] or None, whole on every rank; float32, bfloat16 or float16, one dtype for all. Autocast casts none.
        tree: orders the sum over K in y and over tokens in db; K must have ``tree.leaves`` equal leaves.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        sequence_parallel: return this rank's part of dimension 0 of y instead of all of it. p must divide that dimension.
        gradient_accumulation_fusion: as in :func:`column_parallel_linear`.

    y sums over K, which is sharded: tree; the root is rounded to x's dtype, then the bias is added and rounded.
    Gradients: dx sums over N, whole: one chain. dW and db sum over tokens, whole on every rank (gathered under
    ``sequence_parallel``): one chain, and the tree over tokens. The gradient of the bias is the full one on every rank.

    Raises:
        ValueError, on every rank: shapes or dtypes that do not fit, p not dividing the leaves, no equal leaves, no main_grad to add to,
            ranks that differ in any of it.
        RuntimeError: in a backward pass with create_graph=True.
    """
    ranks = ranks_for(NAME, group)
    require(ranks, NAME, problem_of_tree(tree))
    fused = FusedGradient(weight, ranks, NAME) if gradient_accumulation_fusion else None
    return OPERATOR(x, weight, bias, tree.leaves, tree.node_dtype, group_name(ranks), sequence_parallel, fused=fused, ranks=ranks)


def _check(x, weight, bias, leaves, node_dtype, group, sequence_parallel) -> None:
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    check_linear(x, weight, bias, tree, ranks)
    tree.leaf_length(weight.shape[1] * ranks.size, "in_features")
    if sequence_parallel and (x.dim() < 2 or x.shape[0] % ranks.size):
        raise ValueError(
            f"sequence_parallel scatters dimension 0 of {tuple(x.shape)}, which {ranks.size} ranks must divide; pad the sequence"
        )


def _forward(x, weight, bias, leaves, node_dtype, group, sequence_parallel) -> Tensor:
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    x_shard_k, w_shard_k, nodes = rows(x), weight, contract.ROW_Y.tree(tree)
    y = products.sum_product(x_shard_k, w_shard_k.t(), x.shape[:-1], nodes, ranks, sequence_parallel, x.dtype)
    return y if bias is None else y + bias


def _backward(dy, x, weight, needs, leaves, node_dtype, group, sequence_parallel, add_to=None) -> tuple:
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    if sequence_parallel:
        agree_backward(ranks, NAME, needs, (leaves, node_dtype), dy=dy, x=x, weight=weight)
        dy = all_gather(dy, ranks, agreed=True)
    dy, x_shard_k = rows(dy), rows(x)
    dx = dw = db = None
    if needs[0]:
        dx = products.local_product(dy, weight, tree, ranks, dim=1, dtype=x.dtype).view(x.shape)
    if needs[1]:
        dw = weight_grad(add_to, dy, x_shard_k, tree, ranks, dim=1)
    if needs[2]:
        db = products.bias_grad(dy, tree)
    return dx, dw, db


def _fake(x, weight, bias, leaves, node_dtype, group, sequence_parallel) -> Tensor:
    lead = x.shape[:-1]
    if sequence_parallel:
        lead = (lead[0] // ranks_of(group).size, *lead[1:])
    return x.new_empty(*lead, weight.shape[0])


OPERATOR = register(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, int leaves, str node_dtype, str group, bool sequence_parallel) -> Tensor",
    check=_check,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    kept="x weight",
    gradients="x weight bias",
    fake_backward=fake_gradients,
)

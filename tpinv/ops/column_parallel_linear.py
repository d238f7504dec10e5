"""Column-parallel linear: W is sharded over its out-features, so dx sums over what the ranks share."""

from torch import Tensor

from tpinv import contract
from tpinv.collectives import all_gather, ranks_for
from tpinv.ops import products
from tpinv.ops.arguments import problem_of_tree, require, tree_of
from tpinv.ops.gather_dim import gather_last_dim
from tpinv.ops.linear import FusedGradient, check_linear, fake_gradients, weight_grad
from tpinv.ops.registry import agree_backward, group_name, ranks_of, register
from tpinv.ops.shapes import output, rows
from tpinv.tree import ReductionTree

NAME = "column_parallel_linear"


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tree: ReductionTree,
    group=None,
    sequence_parallel: bool = False,
    stride: int = 1,
    gather_output: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """y = x W^T + b with W sharded over its out-features.

    Args:
        x: [..., K], the same on every rank; under ``sequence_parallel`` this rank's part of dimension 0.
        weight: [N/p, K], bias: [N/p] or None; float32, bfloat16 or float16, one dtype for all. Autocast casts none of them.
        tree: orders the sum over N in dx and over tokens in db; N (with stride s, N/s) must have ``tree.leaves`` equal leaves.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        stride: s blocks side by side in the weight; 2 for SwiGLU's fc1, whose rank holds [gate_r; up_r]. Leaf j of N then
            pairs piece j of each block.
        gather_output: return [..., N] instead of [..., N/p]. Not with stride > 1, whose blocks a gather would interleave.
        gradient_accumulation_fusion: add dW to ``weight.main_grad`` in backward and hand a meaningless tensor to autograd
            (ops/main_grad.py): one fp32 addition of the product, which is not rounded to the weight's dtype before.

    Gradients: dx sums over N, which is sharded: tree. dW sums over tokens, whole on every rank: one chain. db: tree over tokens.

    Raises:
        ValueError, on every rank: shapes or dtypes that do not fit, p not dividing the leaves, no equal leaves, no main_grad to add to,
            ranks that differ in any of it.
        RuntimeError: in a backward pass with create_graph=True.
    """
    ranks = ranks_for(NAME, group)
    problem = problem_of_tree(tree)
    if gather_output and stride != 1:
        problem = f"gather_output with stride={stride} would interleave the blocks; gather after the activation, or use stride=1"
    require(ranks, NAME, problem)
    fused = FusedGradient(weight, ranks, NAME) if gradient_accumulation_fusion else None
    y = OPERATOR(x, weight, bias, tree.leaves, tree.node_dtype, group_name(ranks), sequence_parallel, stride, fused=fused, ranks=ranks)
    return gather_last_dim(y, ranks) if gather_output else y


def _check(x, weight, bias, leaves, node_dtype, group, sequence_parallel, stride) -> None:
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    check_linear(x, weight, bias, tree, ranks)
    count = len(tree.owned(ranks.rank, ranks.size))
    if stride < 1 or weight.shape[0] % (stride * count):
        tree.leaf_length(weight.shape[0] * ranks.size // max(stride, 1), f"out_features / stride {stride}")
        raise ValueError(f"stride={stride} must be at least 1 and cut {weight.shape[0]} local out-features into {count} leaves each")
    if sequence_parallel and x.dim() < 2:
        raise ValueError(
            f"sequence_parallel gathers dimension 0 of x {tuple(x.shape)}, which must be tokens: pass [tokens, ..., in-features]"
        )


def _forward(x, weight, bias, leaves, node_dtype, group, sequence_parallel, stride) -> Tensor:
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    whole = all_gather(x, ranks, agreed=True) if sequence_parallel else x
    y_shard_n = products.local_product(rows(whole), weight.t(), tree, ranks, dim=1, dtype=x.dtype, stride=stride, bias=bias)
    return output(y_shard_n, (*whole.shape[:-1], weight.shape[0]))


def _backward(dy, x, weight, needs, leaves, node_dtype, group, sequence_parallel, stride, add_to=None) -> tuple:
    tree, ranks = tree_of(leaves, node_dtype), ranks_of(group)
    agree_backward(ranks, NAME, needs, (leaves, node_dtype, sequence_parallel, stride), dy=dy, x=x, weight=weight)
    lead, dy_shard_n = dy.shape[:-1], rows(dy)
    dx = dw = db = None
    if needs[0]:
        nodes = contract.COLUMN_DX.tree(tree)
        dx = products.sum_product(dy_shard_n, weight, lead, nodes, ranks, sequence_parallel, x.dtype, stride)
    if needs[1]:
        whole = all_gather(x, ranks, agreed=True) if sequence_parallel else x
        dw = weight_grad(add_to, dy_shard_n, rows(whole), tree, ranks, dim=0, stride=stride)
    if needs[2]:
        db = products.bias_grad(dy_shard_n, tree)
    return dx, dw, db


def _fake(x, weight, bias, leaves, node_dtype, group, sequence_parallel, stride) -> Tensor:
    lead = x.shape[:-1]
    if sequence_parallel:
        lead = (lead[0] * ranks_of(group).size, *lead[1:])
    return x.new_empty(*lead, weight.shape[0])


OPERATOR = register(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, int leaves, str node_dtype, str group, bool sequence_parallel, int stride) -> Tensor",
    check=_check,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    kept="x weight",
    gradients="x weight bias",
    fake_backward=fake_gradients,
)

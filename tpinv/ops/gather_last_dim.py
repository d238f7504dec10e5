"""Gathers the last dimension, which ranks share: no sum, and its gradient is a slice."""

from torch import Tensor

from tpinv.collectives import all_gather, resolve
from tpinv.ops.registry import group_name, ranks_of, register


def gather_last_dim(x: Tensor, group=None) -> Tensor:
    """[..., n/p] -> [..., n], in rank order. The gradient is this rank's slice of dy, which is the same on every rank.

    ValueError, on every rank, where shapes or dtypes differ; RuntimeError in a backward pass with create_graph=True.
    """
    return OPERATOR(x, group_name(resolve(group)))


def _check(x, group) -> None:
    if x.dim() < 1:
        raise ValueError("gather_last_dim joins the last dimension of x, which has none; pass [..., n/p]")


def _forward(x, group) -> Tensor:
    ranks = ranks_of(group)
    # A fresh tensor, not a view of x: callers such as stock cross-entropy modify logits in place.
    return all_gather(x, ranks, dim=-1, agreed=True).contiguous() if ranks.size > 1 else x.clone()


def _backward(dy, needs, group) -> tuple:
    ranks = ranks_of(group)
    return (dy.chunk(ranks.size, -1)[ranks.rank].contiguous(),)


def _fake(x, group) -> Tensor:
    size = ranks_of(group).size
    return x.new_empty(*x.shape[:-1], x.shape[-1] * size) if size > 1 else x.clone()


def _fake_gradient(dy, needs, group) -> list[Tensor]:
    return [dy.new_empty(*dy.shape[:-1], dy.shape[-1] // ranks_of(group).size)]


OPERATOR = register(
    "gather_last_dim(Tensor x, str group) -> Tensor",
    check=_check,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    gradients="x",
    fake_backward=_fake_gradient,
)

"""Gathers a dimension that ranks share: no sum, and its gradient is a slice."""

from torch import Tensor

from tpinv.collectives import all_gather, ranks_for
from tpinv.ops.registry import group_name, ranks_of, register


def gather_last_dim(x: Tensor, group=None) -> Tensor:
    """[..., n/p] -> [..., n], in rank order. The gradient is this rank's slice of dy, which is the same on every rank.

    ValueError, on every rank, where shapes or dtypes differ; RuntimeError in a backward pass with create_graph=True.
    """
    ranks = ranks_for("gather_dim", group)
    return OPERATOR(x, group_name(ranks), -1, ranks=ranks)


def gather_first_dim(x: Tensor, group=None) -> Tensor:
    """[n/p, ...] -> [n, ...]; all else as of :func:`gather_last_dim`."""
    ranks = ranks_for("gather_dim", group)
    return OPERATOR(x, group_name(ranks), 0, ranks=ranks)


def _check(x, group, dim) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"x {tuple(x.shape)} has no dimension {dim} to gather")


def _forward(x, group, dim) -> Tensor:
    ranks = ranks_of(group)
    # A fresh tensor, not a view of x: callers such as stock cross-entropy modify logits in place.
    return all_gather(x, ranks, dim=dim, agreed=True).contiguous() if ranks.size > 1 else x.clone()


def _backward(dy, needs, group, dim) -> tuple:
    ranks = ranks_of(group)
    return (dy.chunk(ranks.size, dim)[ranks.rank].contiguous(),)


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _fake(x, group, dim) -> Tensor:
    size = ranks_of(group).size
    return _resized(x, dim, x.shape[dim] * size) if size > 1 else x.clone()


def _fake_gradient(dy, needs, group, dim) -> list[Tensor]:
    return [_resized(dy, dim, dy.shape[dim] // ranks_of(group).size)]


OPERATOR = register(
    "gather_dim(Tensor x, str group, int dim) -> Tensor",
    check=_check,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    gradients="x",
    fake_backward=_fake_gradient,
)

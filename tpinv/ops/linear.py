"""What both linears share. Weights [N, K]; M tokens; p ranks; only two of the six products cross a rank boundary:

              y = x W^T (over K)        dx = dy W (over N)         dW = dy^T x (over tokens)   db (over tokens)
    column    local: one chain          TREE over N, cut by p      one chain                   tree over tokens
    row       TREE over K, cut by p     local: one chain           one chain                   tree over tokens

Under sequence parallelism dimension 0 of the activations is sharded over the same ranks: a column-parallel linear gathers x
before its forward and scatters dx, a row-parallel one scatters y and gathers dy. Tokens are whole wherever they are summed.
"""

import torch
from torch import Tensor

from tpinv import reference
from tpinv.collectives import Ranks, refuse
from tpinv.ops import main_grad, products
from tpinv.tree import ReductionTree


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tree: ReductionTree, ranks: Ranks) -> None:
    """The errors that column- and row-parallel linears have in common."""
    tree.owned(ranks.rank, ranks.size)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: both must end in this rank's in-features (rank {ranks.rank} of {ranks.size})"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{weight.shape[0]}], the out-features of weight {tuple(weight.shape)}")
    reference.check_dtypes(x=x, weight=weight, bias=bias)


def fake_gradients(dy: Tensor, x: Tensor, weight: Tensor, *_) -> list[Tensor]:
    """dx, dweight, dbias."""
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, weight[:, 0])]


def weight_grad(add_to: Tensor | None, dy: Tensor, x: Tensor, tree: ReductionTree, ranks: Ranks, *, dim: int, stride: int = 1) -> Tensor:
    """dW = dy^T x, one chain over tokens; dimension ``dim`` is the sharded one. Added to the main_grad of the parameter ``add_to``, if any."""
    if add_to is not None:
        return main_grad.add(add_to, dy, x, tree, ranks, dim=dim, stride=stride)
    return products.local_product(dy.t(), x, tree, ranks, dim=dim, dtype=x.dtype, stride=stride)


class FusedGradient:
    """The parameter whose gradient is added to its main_grad, unseen by autograd: a saved tensor may come back as another one."""

    def __init__(self, weight: Tensor, ranks: Ranks, name: str):
        try:
            main_grad.check(weight)
        except ValueError as error:
            refuse(ranks, name, error)
            raise
        self.weight = weight

    def add_to(self, ctx) -> Tensor | None:
        """The parameter, if this backward pass is one that accumulates its gradient. It is the second tensor among the inputs."""
        return self.weight if main_grad.accumulates(ctx.next_functions[1][0], self.weight) else None

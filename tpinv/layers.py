"""Modules: parameters, shapes and their initial values. The arithmetic is in ops/.

Names follow torch.nn and Megatron-Core. Initial values are drawn for the whole parameter and then sharded, so that they do not
depend on the TP size either. A sharded parameter carries Megatron's attributes ``tensor_model_parallel``, ``partition_dim`` and
``partition_stride``; norms and row-parallel biases are whole on every rank, and so are their gradients after backward.
"""

import copy
import math

import torch
from torch import Tensor, nn

from tpinv import functional, reference
from tpinv.collectives import resolve
from tpinv.tree import ReductionTree


def shard(whole: Tensor, dim: int, rank: int, ranks: int, stride: int = 1) -> Tensor:
    """Rank ``rank``'s part of a parameter that is sharded on ``dim`` in ``stride`` blocks. ValueError unless it divides evenly."""
    if whole.shape[dim] % (ranks * stride):
        raise ValueError(f"dimension {dim} of {tuple(whole.shape)} must be divisible by {ranks} ranks x stride {stride}")
    return reference.split_leaves(whole, dim, ranks, stride)[rank].contiguous()


def unshard(parts: list[Tensor], dim: int, stride: int = 1) -> Tensor:
    """Inverse of :func:`shard`, given every rank's part."""
    return reference.join_leaves(parts, dim, stride)


def mark_sharded(parameter: nn.Parameter, dim: int, stride: int = 1) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, stride


class KeepsMarks:
    """Mixin for modules: parameters keep their marks (attributes that are bools or integers) in a deep copy and when replaced by
    ``load_state_dict(assign=True)``.

    nn.Parameter itself drops them, and without ``tensor_model_parallel`` the norm would count a shard as a replica.
    """

    def _load_from_state_dict(self, *args, **kwargs):
        marks = {name: dict(vars(parameter)) for name, parameter in self._parameters.items() if parameter is not None}
        super()._load_from_state_dict(*args, **kwargs)
        for name, values in marks.items():
            for mark, value in values.items():
                if isinstance(value, int):
                    setattr(self._parameters[name], mark, value)

    def __deepcopy__(self, memo: dict):
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for name, parameter in self._parameters.items():
            for mark, value in vars(parameter).items() if parameter is not None else ():
                if isinstance(value, int):
                    setattr(twin._parameters[name], mark, value)
        return twin


class _Sharded(KeepsMarks, nn.Module):
    def _parameter(self, shape, dim, bound, stride=1, device=None, dtype=None) -> nn.Parameter:
        """A uniform(-bound, bound) parameter of global ``shape`` (bound 0: zeros), this rank's part of it; dim None: all of it."""
        whole = torch.empty(shape, dtype=dtype).uniform_(-bound, bound) if bound else torch.zeros(shape, dtype=dtype)
        part = whole if dim is None else shard(whole, dim, self.ranks.rank, self.ranks.size, stride)
        parameter = nn.Parameter(part.to(device))
        if dim is not None:
            mark_sharded(parameter, dim, stride)
        return parameter


class ColumnParallelLinear(_Sharded):
    """y = x W^T + b, W [out_features, in_features] sharded over out_features. Arguments: :func:`tpinv.column_parallel_linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        tree: ReductionTree,
        group=None,
        sequence_parallel: bool = False,
        stride: int = 1,
        gather_output: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if stride < 1 or (gather_output and stride > 1):
            raise ValueError(f"stride={stride} must be at least 1, and 1 with gather_output={gather_output}")
        tree.leaf_length(out_features // stride, "out_features" if stride == 1 else f"out_features / {stride}")
        self.in_features, self.out_features, self.tree, self.ranks = in_features, out_features, tree, resolve(group)
        tree.owned(self.ranks.rank, self.ranks.size)  # ValueError now rather than at the first forward
        self.sequence_parallel, self.stride, self.gather_output = sequence_parallel, stride, gather_output
        bound = 1 / math.sqrt(in_features)
        self.weight = self._parameter((out_features, in_features), 0, bound, stride, device, dtype)
        self.bias = self._parameter((out_features,), 0, bound, stride, device, dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.column_parallel_linear(
            x,
            self.weight,
            self.bias,
            tree=self.tree,
            group=self.ranks,
            sequence_parallel=self.sequence_parallel,
            stride=self.stride,
            gather_output=self.gather_output,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, stride={self.stride}, {self.tree.fingerprint}, p={self.ranks.size}"


class RowParallelLinear(_Sharded):
    """y = x W^T + b, W [out_features, in_features] sharded over in_features. Arguments: :func:`tpinv.row_parallel_linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        tree: ReductionTree,
        group=None,
        sequence_parallel: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        tree.leaf_length(in_features, "in_features")
        self.in_features, self.out_features, self.tree, self.ranks = in_features, out_features, tree, resolve(group)
        tree.owned(self.ranks.rank, self.ranks.size)  # ValueError now rather than at the first forward
        self.sequence_parallel = sequence_parallel
        bound = 1 / math.sqrt(in_features)
        self.weight = self._parameter((out_features, in_features), 1, bound, 1, device, dtype)
        self.bias = self._parameter((out_features,), None, bound, 1, device, dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.row_parallel_linear(
            x, self.weight, self.bias, tree=self.tree, group=self.ranks, sequence_parallel=self.sequence_parallel
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.tree.fingerprint}, p={self.ranks.size}"


class VocabParallelEmbedding(_Sharded):
    """A table [num_embeddings, embedding_dim] sharded over its rows. Arguments: :func:`tpinv.vocab_parallel_embedding`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, group=None, sequence_parallel: bool = False, device=None, dtype=None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.ranks = num_embeddings, embedding_dim, resolve(group)
        self.sequence_parallel = sequence_parallel
        self.weight = self._parameter((num_embeddings, embedding_dim), 0, 1 / math.sqrt(embedding_dim), 1, device, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.vocab_parallel_embedding(ids, self.weight, group=self.ranks, sequence_parallel=self.sequence_parallel)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, p={self.ranks.size}"


class _Norm(nn.Module):
    def __init__(self, hidden_size, eps, tree, group, sequence_parallel, heads_parallel, device, dtype):
        super().__init__()
        self.hidden_size, self.eps, self.tree, self.ranks = hidden_size, eps, tree, resolve(group)
        self.sequence_parallel, self.heads_parallel = sequence_parallel, heads_parallel
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def _sharding(self) -> dict:
        return {
            "tree": self.tree,
            "group": self.ranks,
            "sequence_parallel": self.sequence_parallel,
            "heads_parallel": self.heads_parallel,
        }

    def extra_repr(self) -> str:
        rows = "tokens" if self.sequence_parallel else "heads" if self.heads_parallel else "nothing"
        return f"{self.hidden_size}, eps={self.eps}, rows sharded by {rows}, {self.tree.fingerprint}, p={self.ranks.size}"


class RMSNorm(_Norm):
    """x / rms(x) * weight. Arguments: :func:`tpinv.ops.rms_norm`."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, *, tree: ReductionTree, group=None,
        sequence_parallel: bool = False, heads_parallel: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(hidden_size, eps, tree, group, sequence_parallel, heads_parallel, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight, self.eps, **self._sharding())


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias. Arguments: :func:`tpinv.ops.layer_norm`."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, bias: bool = True, *, tree: ReductionTree, group=None,
        sequence_parallel: bool = False, heads_parallel: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(hidden_size, eps, tree, group, sequence_parallel, heads_parallel, device, dtype)
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight, self.bias, self.eps, **self._sharding())

"""Modules: parameters, shapes and their initial values. The arithmetic is in ops/.

Names follow torch.nn and Megatron-Core. Initial values are drawn for the whole parameter and then sharded, so that they do not
depend on the TP size either. What a parameter is a part of, the module says (sharding.py), not the parameter; norms and row-parallel
biases are whole on every rank, and so are their gradients after backward.

That ranks drew from one seed, and that what is whole is the same on all of them, is compared once, by digests, in the first forward pass
that communicates: weights are often loaded between construction and that. Values that were drawn and then overwritten are not asked for.
"""

import math
import operator

import torch
from torch import Tensor, nn

from tpinv import ops
from tpinv.collectives import agree, resolve
from tpinv.sharding import digest, local, shard, unshard
from tpinv.state_dict import ShardedModule
from tpinv.tree import ReductionTree

__all__ = ["ColumnParallelLinear", "LayerNorm", "RMSNorm", "RowParallelLinear", "VocabParallelEmbedding", "shard", "unshard"]

DRAWN = 1024  # elements of a drawn parameter that are compared: another seed differs in all of them


class _Layer(ShardedModule, nn.Module):
    """What the layers share: checks, parameters, and the comparison of the ranks' values."""

    def __init__(self, group, tree: ReductionTree | None = None):
        super().__init__()
        self.ranks, self.tree = resolve(group), tree
        self._drawn: dict[str, tuple] = {}  # name -> parameter, its version when drawn, digest of the whole
        self._compared = self.ranks.size == 1

    def _draw(self, name: str, shape, bound: float, device, dtype) -> None:
        """Registers this rank's part of a uniform(-bound, bound) parameter of global ``shape``."""
        whole = torch.empty(shape, dtype=dtype).uniform_(-bound, bound)
        dim = self.shards[name]
        part = whole if dim is None else shard(whole, dim, self.ranks.rank, self.ranks.size, self.stride)
        parameter = nn.Parameter(part.to(device))
        self.register_parameter(name, parameter)
        if not self._compared and not whole.is_meta and not parameter.is_meta:
            # Itself, until the first forward: the id of one that has gone may be given to another, on one rank and not on its peers,
            # and what has weak references cannot be swapped (torch.__future__).
            self._drawn[name] = parameter, parameter._version, int(digest(whole.view(-1)[:DRAWN]))

    def __getstate__(self) -> dict:
        """For pickle and copy, which make other parameters."""
        return {**self.__dict__, "_drawn": {}}

    def _before_forward(self, communicates: bool) -> None:
        if torch.compiler.is_compiling():
            return
        self.refuse_unknown_parameters()
        if communicates and not self._compared and not (self.weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._compare_ranks()

    @torch.no_grad()
    def _compare_ranks(self) -> None:
        """ValueError on every rank if parameters were drawn from different seeds, or what is whole differs."""
        values = {}
        for name, sharding in self.parameter_shardings().items():
            parameter = self._parameters[name]
            drawn_parameter, version, drawn = self._drawn.get(name, (None, None, None))
            if sharding.dim is None:
                values[f"values of {name}, whole on every rank"] = f"digest {int(digest(local(parameter))):x}"
            elif drawn_parameter is parameter and version == parameter._version:
                values[f"initial values of {name}, drawn whole and then cut"] = f"digest {drawn:x}"
        try:
            agree(self.ranks, f"{type(self).__name__}'s first forward", values)
        except ValueError as error:
            raise ValueError(
                f"{error}. Build the layers from one seed on every rank of their group (torch.manual_seed), or load the same weights everywhere"
            ) from None
        self._compared = True
        self._drawn.clear()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._drawn.clear()
        self._compared = self.ranks.size == 1


def _check_tree(tree) -> None:
    if not isinstance(tree, ReductionTree):
        raise ValueError(f"tree={tree!r} is a {type(tree).__name__}; pass a ReductionTree, such as ReductionTree(leaves=8)")


def _check_sizes(**sizes) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not hasattr(size, "__index__") or operator.index(size) < 1:
            raise ValueError(f"{name}={size!r} must be a whole number of at least 1")


class ColumnParallelLinear(_Layer):
    """y = x W^T + b, W [out_features, in_features] sharded over out_features. Arguments: :func:`tpinv.column_parallel_linear`."""

    shards = {"weight": 0, "bias": 0}

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
        super().__init__(group, tree)
        _check_tree(tree)
        _check_sizes(in_features=in_features, out_features=out_features)
        if not isinstance(stride, int) or stride < 1 or (gather_output and stride > 1):
            raise ValueError(f"stride={stride} must be at least 1, and 1 with gather_output={gather_output}")
        if out_features % stride:
            raise ValueError(f"out_features={out_features} must be divisible by stride={stride}")
        tree.leaf_length(out_features // stride, "out_features" if stride == 1 else f"out_features / {stride}")
        self.in_features, self.out_features = in_features, out_features
        tree.owned(self.ranks.rank, self.ranks.size)  # ValueError now rather than at the first forward
        self.sequence_parallel, self.stride, self.gather_output = sequence_parallel, stride, gather_output
        bound = 1 / math.sqrt(in_features)
        self._draw("weight", (out_features, in_features), bound, device, dtype)
        if bias:
            self._draw("bias", (out_features,), bound, device, dtype)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        self._before_forward(self.sequence_parallel or self.gather_output)
        return ops.column_parallel_linear(
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


class RowParallelLinear(_Layer):
    """y = x W^T + b, W [out_features, in_features] sharded over in_features. Arguments: :func:`tpinv.row_parallel_linear`."""

    shards = {"weight": 1, "bias": None}

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
        super().__init__(group, tree)
        _check_tree(tree)
        _check_sizes(in_features=in_features, out_features=out_features)
        tree.leaf_length(in_features, "in_features")
        self.in_features, self.out_features = in_features, out_features
        tree.owned(self.ranks.rank, self.ranks.size)  # ValueError now rather than at the first forward
        self.sequence_parallel = sequence_parallel
        bound = 1 / math.sqrt(in_features)
        self._draw("weight", (out_features, in_features), bound, device, dtype)
        if bias:
            self._draw("bias", (out_features,), bound, device, dtype)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        self._before_forward(True)
        return ops.row_parallel_linear(
            x, self.weight, self.bias, tree=self.tree, group=self.ranks, sequence_parallel=self.sequence_parallel
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.tree.fingerprint}, p={self.ranks.size}"


class VocabParallelEmbedding(_Layer):
    """A table [num_embeddings, embedding_dim] sharded over its rows. Arguments: :func:`tpinv.vocab_parallel_embedding`."""

    shards = {"weight": 0}

    def __init__(self, num_embeddings: int, embedding_dim: int, *, group=None, sequence_parallel: bool = False, device=None, dtype=None):
        super().__init__(group)
        _check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.sequence_parallel = sequence_parallel
        self._draw("weight", (num_embeddings, embedding_dim), 1 / math.sqrt(embedding_dim), device, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        self._before_forward(True)
        return ops.vocab_parallel_embedding(ids, self.weight, group=self.ranks, sequence_parallel=self.sequence_parallel)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, p={self.ranks.size}"


class _Norm(_Layer):
    def __init__(self, hidden_size, eps, tree, group, sequence_parallel, heads_parallel, device, dtype):
        super().__init__(group, tree)
        _check_tree(tree)
        _check_sizes(hidden_size=hidden_size)
        if not 0 < eps < math.inf:  # NaN is neither
            raise ValueError(f"eps={eps} must be above 0 and finite; torch's norms use 1e-5")
        if sequence_parallel and heads_parallel:
            raise ValueError("sequence_parallel and heads_parallel both say what shards the rows; a norm has one of them")
        if sequence_parallel or heads_parallel:
            tree.owned(self.ranks.rank, self.ranks.size)  # ValueError now rather than at the first backward
        self.hidden_size, self.eps = hidden_size, eps
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

    shards = {"weight": None}

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, *, tree: ReductionTree, group=None,
        sequence_parallel: bool = False, heads_parallel: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(hidden_size, eps, tree, group, sequence_parallel, heads_parallel, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._before_forward(False)
        return ops.rms_norm(x, self.weight, self.eps, **self._sharding())


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias. Arguments: :func:`tpinv.ops.layer_norm`."""

    shards = {"weight": None, "bias": None}

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, bias: bool = True, *, tree: ReductionTree, group=None,
        sequence_parallel: bool = False, heads_parallel: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(hidden_size, eps, tree, group, sequence_parallel, heads_parallel, device, dtype)
        self.register_parameter("bias", nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        self._before_forward(False)
        return ops.layer_norm(x, self.weight, self.bias, self.eps, **self._sharding())

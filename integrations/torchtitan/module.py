"""What every replaced module has: a tree, the tensor-parallel ranks, and states that TorchTitan shards as it always did.

TorchTitan describes a parallel module by data: how its states are sharded, and between which layouts its inputs and outputs are
moved. Here only the states stay described. Each module owns the collectives around its products, so activations enter and leave
as plain local tensors and the stock machinery has nothing to move. Parameters are plain tensors (backend spmd_types) or DTensors
(partial_dtensor); ``local`` takes off the wrapper.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.param_init import skip_param_init

from tpinv.collectives import Ranks, resolve
from tpinv.ops.registry import ALONE, group_name
from tpinv.sharding import Sharded, shard
from tpinv.tree import ReductionTree


@dataclass(kw_only=True)  # without slots: it is mixed with Configs that have them
class TreeConfig:
    """Fields that the override adds to a stock Config. ``enable_sp``: dimension 1 of [B, L, D] (0 of [T, D]) is sharded outside."""

    leaves: int = 8
    node_dtype: str = "float32"
    enable_sp: bool = False
    forward_only: bool = False


class Invariant(Sharded):
    """Mixin before a stock module class, whose ``Config`` also derives from :class:`TreeConfig`."""

    ranks = ALONE
    group = ""  # the name by which operators know the ranks

    def __init__(self, config):
        super().__init__(config)
        self.tree = ReductionTree(config.leaves, config.node_dtype)
        self.sequence_parallel, self.forward_only = config.enable_sp, config.forward_only

    def parallelize(self, parallel_dims) -> None:
        dims = parallel_dims
        check_parallelism(self.tree, tp=dims.tp, cp=dims.cp, ep=dims.ep, pp=dims.pp, backend=dims.spmd_backend)
        check_replicas(dims.dp_replicate * dims.dp_shard, self.forward_only)
        if (mesh := dims.get_optional_mesh("tp")) is not None:
            self.ranks = resolve(mesh)
            self.group = group_name(self.ranks)
        super().parallelize(dims)

    def _init_param(self, name: str, param: nn.Parameter) -> None:
        if self._param_init is None or name not in self._param_init:
            super()._init_param(name, param)  # says what is missing
        if isinstance(param, DTensor):  # at TP = 1 under partial_dtensor nobody calls parallelize; this mesh is the first sign of replicas
            sizes = zip(param.device_mesh.mesh_dim_names or (), param.device_mesh.shape, strict=False)
            check_replicas(math.prod(size for axis, size in sizes if axis != "tp"), self.forward_only)
        init_whole(param, self._param_init[name], self.shards.get(name), self.ranks)


def check_parallelism(tree: ReductionTree, *, tp: int, cp: int, ep: int, pp: int, backend: str) -> None:
    """ValueError for a parallel layout that is not covered. RL's trainer and generator show it to nobody but the modules."""
    tree.owned(0, tp)
    if cp != 1:
        raise ValueError(f"context_parallel_degree={cp}: it adds the gradients of keys and values in rank order; set it to 1")
    if ep != 1:
        raise ValueError(f"expert_parallel_degree={ep}: mixture of experts is not covered; set it to 1")
    if pp != 1:
        raise ValueError(f"pipeline_parallel_degree={pp}: pipelines were never compared; set it to 1")
    if backend == "full_dtensor":
        raise ValueError("spmd_backend='full_dtensor' hands DTensors to every module; use 'spmd_types' or 'partial_dtensor'")


def check_replicas(replicas: int, forward_only: bool) -> None:
    if replicas > 2 and not forward_only:
        raise ValueError(
            f"{replicas} data-parallel ranks: FSDP adds their gradients in an order that depends on the shards' sizes, so on TP; use at "
            "most 2, or forward_only=True to promise the forward pass alone (as RL's log-probabilities need)"
        )


def init_whole(param: nn.Parameter, init, dim: int | None, ranks: Ranks) -> None:
    """Draws the whole parameter on every rank, whose seeds agree, and keeps a part: stock draws each shard on its own.
    ``dim`` is the one a plain ``param`` is sharded on; a DTensor knows."""
    if init is skip_param_init:  # tied to another, which is initialised
        return
    shape = list(param.shape)
    if not isinstance(param, DTensor) and dim is not None:
        shape[dim] *= ranks.size
    whole = torch.empty(shape, dtype=param.dtype, device=param.device)
    # Without a current mesh: within one, the stock initialiser of fused QKV takes its shard of what it is given.
    with set_current_spmd_mesh(None) if get_spmd_backend() == "spmd_types" else contextlib.nullcontext():
        init(whole)
    with torch.no_grad():
        if isinstance(param, DTensor):
            param.copy_(DTensor.from_local(whole, param.device_mesh, [Replicate()] * param.device_mesh.ndim, run_check=False))
        else:
            param.copy_(whole if dim is None else shard(whole, dim, ranks.rank, ranks.size))


def local(tensor: Tensor | None) -> Tensor | None:
    """This rank's part, with its gradient. A DTensor's placements are those of its gradient too: shards, or complete replicas."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tokens_first(x: Tensor) -> Tensor:
    """[B, L, D] <-> [L, B, D], so that dimension 0 is the one that sequence parallelism shards; packed tokens [T, D] as they are.

    Done with and without sequence parallelism: the order of tokens is part of every sum over them.
    """
    return x.transpose(0, 1) if x.dim() == 3 else x

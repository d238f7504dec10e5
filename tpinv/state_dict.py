"""State dicts of modules that hold parts of parameters: what torch.distributed.checkpoint saves at one tensor-parallel size and loads at another.

``module.state_dict()`` gives, where a parameter is cut over more than one rank, a DTensor of the whole parameter's shape that shares memory
with this rank's part; under FSDP2 its mesh has FSDP's dimensions and then tensor parallelism's. Names, shapes and values do not depend on
the number of ranks, nor on who saves. So ``dcp.save(model.state_dict())``, ``get_model_state_dict`` and ``full_state_dict=True`` do
what they say. A stock DTensor is one box of the whole; of a parameter of several blocks (SwiGLU's gate and up, stride 2) a rank holds one box of
each block, which :class:`BlocksTensor` says.

``load_state_dict`` takes any of: such a DTensor, a whole tensor, this rank's part.

An optimizer's state follows its parameters: see :func:`shard_optimizer_states`, which torch's own hook calls at an optimizer's first step.
"""

import weakref
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tpinv import guards
from tpinv.sharding import Sharded, Sharding, find_shardings, global_ranks, shard, unshard


class ShardedModule(Sharded):
    """Mixin, before nn.Module, for a module that holds parts of parameters: ``shards`` names them and the dimension each is cut on, ``ranks``
    the group. The gradient norm, state dicts and checkpoints follow; torch's clipping and optimizers that are not elementwise are refused
    (guards.py)."""

    guarded = True

    def __new__(cls, *args, **kwargs):
        if dist.is_available() and dist.is_initialized():
            guards.install()
        return super().__new__(cls, *args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name, sharding in _cut(self):
                destination[prefix + name] = as_whole(self._parameters[name].detach(), sharding)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, sharding in _cut(self):
            if isinstance(value := state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = as_part(value, self._parameters[name], sharding)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _cut(module: Sharded) -> Iterator[tuple[str, Sharding]]:
    for name, sharding in module.parameter_shardings().items():
        if sharding.dim is not None and (sharding.ranks.size > 1 or not isinstance(module._parameters[name], DTensor)):
            yield name, sharding


def whole_shape(part: Tensor, sharding: Sharding) -> torch.Size:
    shape = list(part.shape)
    shape[sharding.dim] *= sharding.ranks.size
    return torch.Size(shape)


def as_whole(part: Tensor, sharding: Sharding) -> Tensor:
    """A DTensor of the whole parameter around ``part``, this rank's part of it, or a DTensor of that (FSDP2's). Shares its memory; nothing is
    communicated. With one rank ``part`` itself."""
    ranks = sharding.ranks
    if ranks.size == 1:
        return part
    shape = whole_shape(part, sharding)
    mesh, placements = _mesh_over(part, ranks)
    local = part.to_local() if isinstance(part, DTensor) else part
    one_box = sharding.stride == 1
    if one_box:
        placements = [
            _StridedShard(p.dim, split_factor=ranks.size) if p.is_shard() and p.dim == sharding.dim else p for p in placements
        ]  # FSDP cuts what tensor parallelism has cut before
    last = Shard(sharding.dim) if one_box else _Blocks(sharding.dim, split_factor=sharding.stride)
    meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), part.dtype)
    spec = DTensorSpec(mesh, (*placements, last), tensor_meta=meta)
    if one_box:
        return DTensor(local, spec, requires_grad=False)
    return BlocksTensor.around(local, spec, _boxes(part, sharding), sharding)


def as_part(value: Tensor, parameter: Tensor, sharding: Sharding) -> Tensor:
    """What ``parameter``, a part or FSDP's DTensor of one, is to become: from a DTensor or a tensor of the whole shape, or one of its own.
    Anything else is returned as it is, for torch to refuse by its shape."""
    ranks, whole = sharding.ranks, whole_shape(parameter, sharding)
    if value.shape == whole and (ranks.size > 1 or isinstance(value, DTensor)):
        if isinstance(value, DTensor) and ranks.size > 1:
            like = as_whole(parameter.detach(), sharding)
            if value.device_mesh == like.device_mesh and value.placements == like.placements:
                local = value.to_local()
                if not isinstance(parameter, DTensor):
                    return local
                return DTensor(local, parameter._spec, requires_grad=False)
        value = value.full_tensor() if isinstance(value, DTensor) else value
        value = shard(value, sharding.dim, ranks.rank, ranks.size, sharding.stride)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def _mesh_over(part: Tensor, ranks) -> tuple[DeviceMesh, list]:
    """FSDP's mesh with one more dimension, the group's, and FSDP's placements; for a plain tensor the group alone."""
    kind = "cuda" if "nccl" in dist.get_backend(ranks.group) and part.device.type != "cpu" else part.device.type
    kind = "cpu" if kind == "meta" else kind
    if not isinstance(part, DTensor):
        return DeviceMesh.from_group(ranks.group, kind), []
    outer = part.device_mesh
    # Row-major meshes: a rank's number is a sum of one term per dimension.
    offsets = torch.tensor(global_ranks(ranks)) - dist.get_rank()
    mesh = outer.mesh.unsqueeze(-1).long() + offsets
    names = (*(f"outer{i}" for i in range(outer.ndim)), "tp")
    groups = [outer.get_group(i) for i in range(outer.ndim)] + [ranks.group]
    return DeviceMesh.from_group(groups, kind, mesh, mesh_dim_names=names), list(part.placements)


def _boxes(part: Tensor, sharding: Sharding) -> list[tuple[int, int, tuple[int, ...]]]:
    """(where it begins in the local tensor's cut dimension, how much of it, the offsets in the whole) of each box of the whole that this rank
    holds."""
    dim, ranks, stride = sharding.dim, sharding.ranks, sharding.stride
    offset, size = [0] * part.dim(), part.shape[dim]
    if isinstance(part, DTensor):
        shape, offset = compute_local_shape_and_global_offset(part.shape, part.device_mesh, part.placements)
        if 0 in shape:
            return []
        size = shape[dim]
    block = part.shape[dim] // stride  # this rank's part of a block
    boxes = []
    for i in range(stride):
        start, end = max(offset[dim], i * block), min(offset[dim] + size, (i + 1) * block)
        if start < end:
            at = list(offset)
            at[dim] = (i * ranks.size + ranks.rank) * block + start - i * block
            boxes.append((start - offset[dim], end - start, tuple(at)))
    return boxes


class _Blocks(_StridedShard):
    """The placement of a :class:`BlocksTensor`. Torch would name the first of its boxes and take it for all (``broadcast_from_rank0`` of
    an optimizer's state copies one slice of the whole): whoever asks where it begins is told that there is no such place."""

    def local_shard_size_and_offset(self, *args, **kwargs):
        raise ValueError(
            f"a parameter of {self.split_factor} blocks is several boxes of the whole on a rank, and the caller knows one (set_optimizer_state_dict "
            "with broadcast_from_rank0=True does): pass the full state on every rank without broadcast_from_rank0, or load by dcp.load"
        )

    _local_shard_size_and_offset = local_shard_size_and_offset


class BlocksTensor(DTensor):
    """A DTensor of a parameter of several blocks, each cut over the ranks: a rank's part is a box of each block, which stock DTensors,
    having one box a rank, cannot say. Made to be saved, loaded and gathered; operations on it give stock DTensors."""

    @classmethod
    def around(cls, local: Tensor, spec: DTensorSpec, boxes: list, sharding: Sharding) -> "BlocksTensor":
        tensor = cls(local, spec, requires_grad=False)
        tensor._boxes, tensor._sharding = boxes, sharding
        return tensor

    def _like(self, local: Tensor) -> "BlocksTensor":
        spec = self._spec
        meta = TensorMeta(spec.shape, spec.stride, local.dtype)
        return BlocksTensor.around(local, DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta), self._boxes, self._sharding)

    def detach(self) -> "BlocksTensor":
        return self._like(self._local_tensor.detach())

    def clone(self, **options) -> "BlocksTensor":
        return self._like(self._local_tensor.clone(**options))

    def __deepcopy__(self, memo: dict) -> "BlocksTensor":
        memo[id(self)] = copied = self.clone()
        return copied

    def to(self, *args, **kwargs) -> "BlocksTensor":
        return self._like(self._local_tensor.to(*args, **kwargs))

    def cpu(self) -> "BlocksTensor":
        return self.to("cpu")

    def full_tensor(self, *, grad_placements=None) -> Tensor:
        part = self._local_tensor
        *outer, _ = self.placements
        if outer:  # what FSDP has cut first
            inner = DeviceMesh.from_group(
                [self.device_mesh.get_group(i) for i in range(len(outer))],
                self.device_mesh.device_type,
                self.device_mesh.mesh[..., self.device_mesh.get_local_rank(len(outer))],
                mesh_dim_names=self.device_mesh.mesh_dim_names[:-1],
            )
            shape = list(self.shape)
            shape[self._sharding.dim] //= self._sharding.ranks.size
            meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), part.dtype)
            part = DTensor(part, DTensorSpec(inner, tuple(outer), tensor_meta=meta), requires_grad=False).full_tensor()
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self._sharding.ranks.size)]
        dist.all_gather(parts, part, group=self._sharding.ranks.group)
        return unshard(parts, self._sharding.dim, self._sharding.stride)

    def redistribute(self, device_mesh=None, placements=None, **options) -> DTensor:
        if not all(placement.is_replicate() for placement in placements or ()):
            raise ValueError(f"a parameter of {self._sharding.stride} blocks is gathered whole or not at all; got placements {placements}")
        return DTensor.from_local(self.full_tensor(), self.device_mesh, [Replicate()] * self.device_mesh.ndim, run_check=False)

    # torch.distributed.checkpoint's protocol: what to write and to read, and where it lies.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), self._box(start, size).shape) for start, size, at in self._boxes]

    def __create_write_items__(self, fqn: str, tensor: Tensor) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.shape))
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(self._box(start, size) for start, size, at in self._boxes if torch.Size(at) == index.offset)

    def _box(self, start: int, size: int) -> Tensor:
        return self._local_tensor.narrow(self._sharding.dim, start, size)


# -- optimizers -----------------------------------------------------------------------------------------------------------------------


def shard_optimizer_states(optimizer: torch.optim.Optimizer) -> None:
    """From now on ``optimizer.state_dict()`` gives states of parameters that modules cut as DTensors of the whole, and ``load_state_dict``
    takes them, as :class:`ShardedModule` does for the parameters. Idempotent. Called for every optimizer at its first step, by torch's hook
    for all of them; call it for one that is loaded and saved without a step between."""
    if optimizer not in _prepared:
        _prepared.add(optimizer)
        optimizer.register_state_dict_post_hook(_after_state_dict)
        optimizer.register_load_state_dict_pre_hook(_before_load_state_dict)


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Sharding | None]]:
    """In the order of state_dict's indices."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    holders = find_shardings(parameters)
    cut = [h is not None and h.sharding is not None and h.sharding.dim is not None and h.sharding.ranks.size > 1 for h in holders]
    return [(p, holder.sharding if yes else None) for p, holder, yes in zip(parameters, holders, cut, strict=True)]


def _after_state_dict(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    state = dict(state_dict["state"])
    for index, (p, sharding) in enumerate(_parameters(optimizer)):
        if sharding is not None and index in state:
            state[index] = {name: _state_as_whole(name, value, p, sharding) for name, value in state[index].items()}
    return {**state_dict, "state": state}


def _state_as_whole(name: str, value, parameter: Tensor, sharding: Sharding):
    if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"the optimizer's state {name} of shape {tuple(value.shape)} belongs to a part {tuple(parameter.shape)} of a parameter {sharding}: "
            "which part of what it is nobody says, so that it cannot be saved; use an elementwise optimizer such as AdamW"
        )
    return as_whole(value, sharding)


def _before_load_state_dict(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    state = dict(state_dict["state"])
    names = [name for group in state_dict["param_groups"] for name in group["params"]]  # indices, or names as torch's checkpoint has them
    for name, (p, sharding) in zip(names, _parameters(optimizer), strict=False):
        if sharding is not None and name in state:
            state[name] = {key: as_part(value, p, sharding) if _is_whole(value) else value for key, value in state[name].items()}
    return {**state_dict, "state": state}


def _is_whole(value) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _before_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    """A state that was loaded before the hooks were there."""
    if torch.compiler.is_compiling() or optimizer in _prepared:
        return
    for p, sharding in _parameters(optimizer):
        if sharding is not None and (state := optimizer.state.get(p)):
            state.update({name: as_part(value, p, sharding) for name, value in state.items() if _is_whole(value)})
    shard_optimizer_states(optimizer)


_prepared: weakref.WeakSet = weakref.WeakSet()
register_optimizer_step_pre_hook(_before_step)

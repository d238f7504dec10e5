"""Initial weights that do not depend on the tensor-parallel size: those of TP = 1, which every rank gets its part of.

How a parameter is sharded is asked of the case's ``shards``, then of its module, then of Megatron's marks; what nobody knows and has
the shape of TP = 1 is replicated, and what nobody knows and has not is compared by its shapes but never loaded.
"""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpinv.diff import Part
from tpinv.harness.comparison import HarnessError, Recording, compare_recorded, part
from tpinv.harness.own import Case, OwnRun
from tpinv.sharding import shard, unshard
from tpinv.state_dict import ShardedModule

UNKNOWN = "unknown"


def sharding(case: Case, model: nn.Module) -> dict[str, tuple[int, int] | None | str]:
    """For each parameter's name (dimension, stride), None where its module says that it is replicated, or UNKNOWN."""
    said: dict[str, tuple[int, int] | None] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedModule):
            for name, how in module.parameter_shardings().items():
                said[f"{prefix}.{name}".lstrip(".")] = None if how.dim is None else (how.dim, how.stride)
    return {name: _sharding(case, said, name, parameter) for name, parameter in model.named_parameters()}


def _sharding(case: Case, said: dict, name: str, parameter: nn.Parameter):
    with contextlib.suppress(KeyError):
        return case.shard_of(name)
    if name in said:
        return said[name]
    if getattr(parameter, "tensor_model_parallel", False):
        return parameter.partition_dim % parameter.dim(), parameter.partition_stride
    return UNKNOWN


def gather(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor, on the CPU, on every rank; shapes may differ."""
    if hasattr(tensor, "full_tensor"):  # a DTensor, which is one tensor wherever it lies
        return [tensor.full_tensor().detach().cpu().clone()] * dist.get_world_size()
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.detach().cpu().contiguous())
    return parts


def put_together(tensor: Tensor, how) -> Tensor | list[Part]:
    """The whole tensor where it is known how it is sharded and all is well, else every rank's part for the comparison to judge."""
    parts = gather(tensor)
    if isinstance(how, tuple) and len({p.shape for p in parts}) == 1:
        return unshard(parts, *how).clone()
    return [part(p) for p in parts]


def record_parameters(recording: Recording, prefix: str, case: Case, model: nn.Module, value=lambda parameter: parameter.detach()) -> None:
    """Adds prefix/NAME for every parameter with a value, in the order of the model, gradients from the last to the first."""
    if case.state is not None and prefix in ("initial", "final"):
        recording.update({f"{prefix}/{name}": tensor.detach().cpu().clone() for name, tensor in case.state(model).items()})
        return
    hows = sharding(case, model)
    named = list(model.named_parameters())
    for name, parameter in named if prefix in ("initial", "final") else reversed(named):
        tensor = value(parameter)
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, tensor is not None)
        if all(parts):
            recording[f"{prefix}/{name}"] = put_together(tensor, hows[name])
        elif any(parts):
            raise HarnessError(f"{prefix}/{name} is on some ranks only: {[rank for rank, there in enumerate(parts) if there]}")


def agree(run: OwnRun, case: Case, model: nn.Module, first: Recording) -> int:
    """Compares this run's initial parameters with those of TP = 1, which rank 0 has in ``first``, and loads those where they differ.
    Returns the number of tensors that had to be loaded."""
    if run.tp == 1:
        return 0
    mine: Recording = {}
    record_parameters(mine, "initial", case, model)
    orders: list = [None, None]
    if dist.get_rank() == 0:
        whole = {name: tensor for name, tensor in first.items() if name.startswith("initial/")}
        if whole.keys() != mine.keys():
            orders[1] = f"{run.layers} TP={run.tp} has other parameters than TP=1: {sorted(whole.keys() ^ mine.keys())}"
        else:
            differ = [name for name in whole if not compare_recorded(name, mine[name], whole[name]).same]
            orders[0] = {name: whole[name] if isinstance(whole[name], Tensor) else whole[name][0].value for name in differ}
    dist.broadcast_object_list(orders)
    wanted, refusal = orders
    if refusal:
        raise HarnessError(refusal)
    if wanted:
        _load(run, case, model, {name.removeprefix("initial/"): tensor for name, tensor in wanted.items()})
    return len(wanted)


@torch.no_grad()
def _load(run: OwnRun, case: Case, model: nn.Module, whole: dict[str, Tensor]) -> None:
    if case.state is not None:
        if case.load is None:
            raise HarnessError(
                f"{run.model}: the state depends on TP, first {next(iter(whole))}, and there is no load(model, state) to set it"
            )
        case.load(model, whole)
        return
    hows, parameters = sharding(case, model), dict(model.named_parameters())
    for name, tensor in whole.items():
        how, parameter = hows[name], parameters[name]
        if isinstance(how, tuple):
            value = shard(tensor, how[0], dist.get_rank(), run.tp, how[1])
        elif tensor.shape == parameter.shape:
            value = tensor
        else:
            raise HarnessError(
                f"{run.model}: the initial {name} depends on TP and nothing says how it is sharded ({tuple(tensor.shape)} at TP=1, "
                f"{tuple(parameter.shape)} at TP={run.tp}); draw it whole and shard it, or return shards={{'{name}': dimension}}"
            )
        if hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
            raise HarnessError(f"{run.model}: the initial {name} depends on TP and cannot be loaded into {tuple(parameter.shape)}")
        parameter.copy_(value)

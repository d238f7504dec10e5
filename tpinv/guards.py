"""What takes this rank's part of a parameter for the whole of it is refused: torch's gradient clipping, optimizers that add up elements, and data
parallelism over ranks that hold other parts.

``torch.nn.utils.clip_grad_norm_`` (and ``get_total_norm``) counts the elements that a rank holds, so that every rank scales its gradients by a norm of its own, and
what is whole on all of them drifts apart. An optimizer that looks at a parameter as a matrix (Muon, Adafactor, Shampoo), or at its norm (LAMB),
updates a part otherwise than the whole. DistributedDataParallel, whose default are all ranks, sends the first rank's parts to everyone, and FSDP
gathers pieces of different parts into one. None says a word, and all give other weights at every number of ranks.

FSDP's constructors are found where torch has them: torch.distributed.checkpoint, which state_dict.py needs, imports it.
"""

import functools
import inspect
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tpinv.sharding import find_shardings, global_ranks, grads_of_parts

# By name. ZeRO holds whole parameters of other optimizers, which are looked at themselves.
ELEMENTWISE = {
    "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "SGD", "FusedAdam", "FusedSGD",
    "ZeroRedundancyOptimizer",
}  # fmt: skip


def install() -> None:
    """Once per process; the first ShardedModule among ranks calls it. What belongs to other modules is left alone."""
    if not hasattr(clip_grad._get_total_norm, "tpinv_parts"):
        nn.utils.get_total_norm = clip_grad._get_total_norm = _refused_for_parts(clip_grad._get_total_norm)
        register_optimizer_step_pre_hook(_refuse_what_is_not_elementwise)
        DistributedDataParallel.__init__ = _refused_over_parts(DistributedDataParallel.__init__, _groups_of_wrapper)
    for module, name, groups in _FSDP:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and not hasattr(kind.__init__, "tpinv_parts"):
            kind.__init__ = _refused_over_parts(kind.__init__, groups)


def _refused_for_parts(stock):
    @functools.wraps(stock)
    def guarded(tensors, *args, **kwargs):
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        parts = grads_of_parts()
        if any(id(tensor) in parts for tensor in tensors):
            raise ValueError(
                "torch's gradient norm takes this rank's part of a gradient for the whole: every rank would scale by another one; use "
                "tpinv.clip_grad_norm_(model, max_norm) or tpinv.grad_norm(model)"
            )
        return stock(tensors, *args, **kwargs)

    guarded.tpinv_parts = True
    return guarded


def _refuse_what_is_not_elementwise(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    kind = type(optimizer)
    if kind.__name__ in ELEMENTWISE or getattr(kind, "elementwise", False) is True or torch.compiler.is_compiling():
        return
    holders = find_shardings([p for group in optimizer.param_groups for p in group["params"]])
    parts = [h for h in holders if h is not None and h.sharding is not None and h.sharding.dim is not None and h.sharding.ranks.size > 1]
    if parts:
        raise ValueError(
            f"{kind.__name__} updates {parts[0].name}, {parts[0].sharding}, and is not known to treat every element alike, whatever part it is in; "
            f"use an elementwise optimizer ({', '.join(sorted(ELEMENTWISE))}), or set {kind.__name__}.elementwise = True if it is one"
        )


# -- data parallelism ------------------------------------------------------------------------------------------------------------


def _refused_over_parts(stock, groups):
    """``stock``: a constructor. ``groups``: from its arguments to what it is called, the parameters it takes, and its groups' global ranks."""

    @functools.wraps(stock)
    def guarded(self, *args, **kwargs):
        try:
            bound = inspect.signature(stock).bind(self, *args, **kwargs).arguments
        except TypeError:
            return stock(self, *args, **kwargs)  # which says what is wrong
        parameters, over = groups(bound)
        for holder in find_shardings(parameters):
            if holder is None or holder.sharding is None or holder.sharding.dim is None:
                continue
            for ranks in over:
                if len(common := sorted({*global_ranks(holder.sharding.ranks)} & {*ranks})) > 1:
                    raise ValueError(
                        f"{type(self).__name__} over the ranks {list(ranks)} takes {holder.name} for the same on all of them, and it is "
                        f"{holder.sharding}: ranks {common} hold other parts; pass the group (process_group=, mesh=) of the ranks that hold the same"
                    )
        return stock(self, *args, **kwargs)

    guarded.tpinv_parts = True
    return guarded


def _groups_of_wrapper(arguments: dict) -> tuple[list[Tensor], list[list[int]]]:
    """Of DistributedDataParallel and FullyShardedDataParallel."""
    mesh, group = arguments.get("device_mesh"), arguments.get("process_group")
    groups = _groups_of_mesh(mesh) if mesh is not None else [group] if not isinstance(group, tuple) else list(group)
    parameters = list(arguments["module"].parameters()) if isinstance(arguments["module"], nn.Module) else []
    return parameters, [dist.get_process_group_ranks(g) for g in groups]


def _groups_of_param_group(arguments: dict) -> tuple[list[Tensor], list[list[int]]]:
    """Of what fully_shard makes of a module."""
    names = "shard_process_group", "replicate_process_group"
    groups = [g for name in names if (g := getattr(arguments["mesh_info"], name, None)) is not None]
    return list(arguments["params"]), [dist.get_process_group_ranks(g) for g in groups]


def _groups_of_mesh(mesh) -> list:
    return [mesh.get_group(i) for i in range(mesh.ndim)]


_FSDP = (
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", _groups_of_wrapper),
    ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup", _groups_of_param_group),
)

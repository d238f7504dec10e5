"""Which models of this process have been converted, and what their modules know about their parameters.

Megatron keeps what a parameter is (``tensor_model_parallel``, ``partition_dim``, ``sequence_parallel``) as marks on the tensor, which
``to_empty``, a new ``nn.Parameter`` or a swap drop without a word. Here it is the module's knowledge (``parameter_sharding``), asked for
when it is needed: the finalisation and the gradient norm go by it, and put the marks back for Megatron's own code.
"""

import weakref
from collections.abc import Collection, Iterator

import torch
from torch import nn

from tpinv.integrations.megatron import layers
from tpinv.ops.marks import mark_sharded
from tpinv.tree import ReductionTree

# The LanguageModules that convert has been through. Held weakly, so that a model is forgotten when its owner forgets it.
_models: weakref.WeakSet = weakref.WeakSet()


def remember(model: nn.Module, tree: ReductionTree, accept: Collection = ()) -> None:
    """``accept``: what the caller of convert has looked at, for later checks of the same model."""
    model.tpinv_tree, model.tpinv_accept = tree, tuple(accept)
    _models.add(model)


def models() -> list[nn.Module]:
    return list(_models)


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` (wrapped or not) has been through ``convert``, or was built from tpinv's specs and then converted."""
    return any(isinstance(getattr(m, "tpinv_tree", None), ReductionTree) for m in model.modules())


def sharded_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, tuple[int, int] | None]]:
    """Every parameter that a tpinv module of ``model`` owns, with (dimension, stride) of its shards; None: whole on every rank, and so is
    its gradient after backward."""
    for module in model.modules():
        if isinstance(module, layers.TreeBound):
            sharding = module.parameter_sharding()
            for name, parameter in module.named_parameters(recurse=False):
                if name in sharding:
                    yield parameter, sharding[name]


def parameter_ids(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters()}


def restore_marks(model: nn.Module) -> None:
    """Puts back Megatron's marks, by which its optimizer counts shards and replicas, where they were lost or are others."""
    for parameter, sharding in sharded_parameters(model):
        mark(parameter, sharding)


def mark(parameter: torch.Tensor, sharding: tuple[int, int] | None) -> None:
    if sharding is not None:
        mark_sharded(parameter, *sharding)
    elif getattr(parameter, "tensor_model_parallel", False):
        parameter.tensor_model_parallel = False
    if sharding is None and getattr(parameter, "sequence_parallel", False):
        parameter.sequence_parallel = False  # finalisation would add up, over the ranks, what is complete on each

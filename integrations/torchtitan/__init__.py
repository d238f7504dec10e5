"""TorchTitan: one override makes a dense decoder invariant to the tensor-parallel size. Works with torchtitan 0.3.0.

    torchrun ... -m torchtitan.train --module llama3 --config llama3_8b --override.imports tpinv.integrations.torchtitan.invariant

It claims every module, the loss and the settings that could break the promise (replace.py); parameters, their names, state-dict
adapters and checkpoints stay TorchTitan's. Initial weights are drawn whole on every rank (module.py), gradients are clipped by
their exact norm (clip.py). What is not covered is a ValueError before anything is built.
"""

from tpinv.integrations.torchtitan import compat  # isort: skip  # noqa: F401  before torchtitan's own modules, which read the device once
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Configurable
from torchtitan.config.configs import CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.override import override
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module

from tpinv.integrations.torchtitan import clip
from tpinv.integrations.torchtitan.module import TreeConfig
from tpinv.integrations.torchtitan.replace import invariant_config
from tpinv.tree import ReductionTree

_SETTINGS = (ParallelismConfig, TrainingConfig, CompileConfig, DebugConfig, OptimizersContainer.Config)
_CLAIMED = (Module.Config, BaseLoss.Config, SelectiveAC.Config, *_SETTINGS)


class _Claims(type):
    """An override has one target class and may not claim what lies inside another's. This target is every outermost node that
    matters: all modules below the model's root (a root cannot be replaced), the loss that is wrapped, settings to check."""

    def __instancecheck__(cls, config) -> bool:
        return isinstance(config, _CLAIMED) and not isinstance(config, (BaseModel.Config, ChunkedLossWrapper.Config))


class _Claimed(Configurable.Config, metaclass=_Claims):
    pass


@override(target=_Claimed, description="the same bytes at every tensor-parallel size")
def invariant(config, leaves: int = 8, node_dtype: str = "float32", forward_only: bool = False):
    """The override. With arguments it is listed as ``("tpinv.integrations.torchtitan.invariant", {"leaves": 24})``.

    Args:
        leaves: of the tree, a multiple of every tensor-parallel size to compare.
        node_dtype: "float32", or "bfloat16" for half the bytes on the wire.
        forward_only: promise logits and log-probabilities, not gradients, which allows data parallelism above 2.
    """
    clip.install()
    replaced = invariant_config(config, ReductionTree(leaves, node_dtype), forward_only=forward_only)
    if isinstance(replaced, Configurable.Config):
        for _, node, _, _ in replaced.traverse(TreeConfig, recurse=True):
            node.forward_only = forward_only
    return replaced


__all__ = ["invariant"]

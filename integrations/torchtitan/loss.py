"""Cross-entropy over a sharded vocabulary: one code path at every tensor-parallel size, TP = 1 included."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components import loss
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.tools.logging import logger

from tpinv import functional
from tpinv.collectives import resolve
from tpinv.integrations.torchtitan.module import TreeConfig, local
from tpinv.ops.registry import ALONE
from tpinv.tree import ReductionTree


class CrossEntropyLoss(loss.CrossEntropyLoss):
    """The sum over all tokens, as the stock loss; scaling by the number of valid tokens is inherited."""

    @dataclass(kw_only=True, slots=True)
    class Config(TreeConfig, loss.CrossEntropyLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config)
        if compile_config is not None and compile_config.enable and "loss" in compile_config.components:
            logger.info("the loss is not compiled: its sums follow the tree")
        self.tree, self.fn = ReductionTree(config.leaves), self._sum_of_tokens

    def _sum_of_tokens(self, pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
        """pred [B, L, V/p], a DTensor under partial_dtensor and TP > 1; labels [B, L]."""
        group = pred.device_mesh if isinstance(pred, DTensor) else _vocabulary_ranks()
        losses = functional.vocab_parallel_cross_entropy(
            local(pred), labels, tree=self.tree, group=resolve(group), ignore_index=loss.IGNORE_INDEX
        )
        return losses.sum()


def _vocabulary_ranks():
    return current_spmd_mesh().get_group("tp") if spmd_mesh_size("tp") > 1 else ALONE

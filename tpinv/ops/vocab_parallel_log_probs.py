"""Log-probabilities over a sharded vocabulary."""

from torch import Tensor

from tpinv.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from tpinv.tree import ReductionTree


def vocab_parallel_log_probs(logits: Tensor, target: Tensor, *, tree: ReductionTree, group=None, ignore_index: int = -100) -> Tensor:
    """log softmax(logits)[target] over the global vocabulary: what RL compares between trainer and rollout.

    Shapes and errors as in :func:`vocab_parallel_cross_entropy`, of which it is the negative. 0 where target is ``ignore_index``.
    """
    return -vocab_parallel_cross_entropy(logits, target, tree=tree, group=group, ignore_index=ignore_index)

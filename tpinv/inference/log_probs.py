"""Log-probabilities of whole rows of logits, as an engine has them after the gather, in the bytes that a trainer gets from shards.

    log p(v) = (x_v - top) - log(total)          total = sum over v of exp(x_v - top), a tree over the vocabulary, float32 nodes

That is tpinv.functional.vocab_parallel_log_probs for every entry instead of the target's: the trainer's value at any tensor-parallel
size and the engine's are one number. top and x_v are exact. M rows, V vocabulary.
"""

from torch import Tensor

from tpinv import contract, reference
from tpinv.ops import products
from tpinv.ops.shapes import rows, unit_stride
from tpinv.tree import ReductionTree


def log_softmax(logits: Tensor, tree: ReductionTree) -> Tensor:
    """log softmax over the last dimension: [..., V] -> float32 [..., V].

    Args:
        logits: float32, bfloat16 or float16; entries of -inf are impossible tokens.
        tree: orders the sum over the vocabulary, of which nothing is padding.

    Raises:
        ValueError: another dtype.
    """
    top, log_total = _row_statistics(logits, tree)
    return ((rows(logits).float() - top.unsqueeze(-1)) - log_total.unsqueeze(-1)).view(logits.shape)


def token_log_probs(logits: Tensor, token_ids: Tensor, tree: ReductionTree) -> Tensor:
    """:func:`log_softmax` at ``token_ids`` [M, k] of logits [M, V], the same bytes: float32 [M, k]."""
    if token_ids.dim() != 2 or logits.dim() != 2 or token_ids.shape[0] != logits.shape[0]:
        raise ValueError(f"logits {tuple(logits.shape)} and token_ids {tuple(token_ids.shape)} must be [M, V] and [M, k]")
    top, log_total = _row_statistics(logits, tree)
    picked = logits.gather(-1, token_ids.long()).float() - top.unsqueeze(-1)
    return picked - log_total.unsqueeze(-1)


def _row_statistics(logits: Tensor, tree: ReductionTree) -> tuple[Tensor, Tensor]:
    """The maximum of every row and the logarithm of its sum: float32 [M] each."""
    reference.check_dtypes(logits=logits)
    x, tree = rows(logits), contract.VOCABULARY.tree(tree)
    if products.on_gpu(x):
        from tpinv.kernels.rows import cross_entropy

        x = unit_stride(x)
        top = cross_entropy.row_max(x)
        (total,) = cross_entropy.vocab_sums(x, top, tree, 0, 1, False)
    else:
        wide = x.float()
        top = wide.amax(-1)
        total = reference.tree_sum((wide - top.unsqueeze(-1)).exp_(), tree, 0, 1, dim=-1)
    return top, reference.finish(total, tree, tree.subtrees(0, 1)).log()

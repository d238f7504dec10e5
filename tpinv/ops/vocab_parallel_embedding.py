"""Vocabulary-parallel embedding: the forward selects rows, the backward sums them in token order.

The forward adds nothing: stock layers add p-1 zeros to each row, which turns -0.0 into +0.0 at every TP size above one.
The backward of vocabulary row v is one chain over the tokens whose id is v, in token order, in fp32, rounded once.
Ids that a rank does not own are skipped, not aliased to row 0, so that no rank's segment boundaries reach another row.
"""

from torch import Tensor

from tpinv import reference
from tpinv.collectives import all_gather, ranks_for, select_all_reduce, select_reduce_scatter
from tpinv.ops import products
from tpinv.ops.arguments import check_ids, check_integers
from tpinv.ops.registry import agree_backward, group_name, ranks_of, register
from tpinv.ops.shapes import output, rows

NAME = "vocab_parallel_embedding"


def vocab_parallel_embedding(ids: Tensor, weight: Tensor, *, group=None, sequence_parallel: bool = False) -> Tensor:
    """Rows of a table whose vocabulary is sharded.

    Args:
        ids: integer [...], the same on every rank, in [0, V).
        weight: [V/p, H]; rank r holds rows [r V/p, (r+1) V/p). float32, bfloat16 or float16.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        sequence_parallel: return this rank's part of dimension 0, which p must divide.

    Returns:
        [..., H] in weight's dtype, autocast or not. The gradient of weight sums over tokens, whole on every rank (gathered under
        ``sequence_parallel``): a chain in token order, the order of ``ids.flatten()``.

    Raises:
        ValueError, on every rank: non-integer ids, an id outside [0, V) (on a GPU: an assertion there), a dimension 0 that p does not
            divide, shapes that differ between ranks.
        RuntimeError: in a backward pass with create_graph=True.
    """
    ranks = ranks_for(NAME, group)
    rows_here = weight.shape[0] if isinstance(weight, Tensor) and not weight.is_nested and weight.dim() else 0
    return OPERATOR(ids, weight, rows_here * ranks.size, group_name(ranks), sequence_parallel, ranks=ranks)


def _check(ids, weight, vocab, group, sequence_parallel) -> None:
    reference.check_dtypes(weight=weight)
    check_integers(ids, "ids")
    ranks = ranks_of(group)
    if weight.dim() != 2:
        raise ValueError(f"weight {tuple(weight.shape)} must be [V/p, H]")
    if vocab != weight.shape[0] * ranks.size:
        raise ValueError(f"vocab={vocab} must be {ranks.size} times the {weight.shape[0]} rows of this rank's weight")
    if sequence_parallel and (ids.dim() < 1 or ids.shape[0] % ranks.size):
        raise ValueError(f"sequence_parallel scatters dimension 0 of ids {tuple(ids.shape)}, which {ranks.size} ranks must divide")


def _check_values(ids, weight, vocab, *_) -> None:
    check_ids(ids, vocab, "ids")


def _forward(ids, weight, vocab, group, sequence_parallel) -> Tensor:
    ranks = ranks_of(group)
    local, owned = _local(ids, weight.shape[0], ranks)
    picked = weight[local.masked_fill(~owned, 0)]
    select = select_reduce_scatter if sequence_parallel else select_all_reduce
    y = select(picked, owned.unsqueeze(-1), ranks, agreed=True)
    return output(y, y.shape)


def _backward(dy, ids, needs, vocab, group, sequence_parallel) -> tuple:
    ranks = ranks_of(group)
    if sequence_parallel:
        agree_backward(ranks, NAME, needs, (vocab,), dy=dy, ids=ids)
        dy = all_gather(dy, ranks, agreed=True)
    rows_here = vocab // ranks.size
    local, _ = _local(ids, rows_here, ranks)
    return (products.rows_backend("embedding", dy).sum_by_id(local.flatten(), rows(dy), rows_here, dy.dtype),)


def _local(ids: Tensor, rows_here: int, ranks) -> tuple[Tensor, Tensor]:
    """Ids counted from this rank's first, int64, and which of them it owns."""
    local = ids.long() - ranks.rank * rows_here
    return local, (local >= 0) & (local < rows_here)


def _fake(ids, weight, vocab, group, sequence_parallel) -> Tensor:
    lead = ids.shape
    if sequence_parallel:
        lead = (lead[0] // ranks_of(group).size, *lead[1:])
    return weight.new_empty(*lead, weight.shape[1])


def _fake_gradient(dy, ids, needs, vocab, group, sequence_parallel) -> list[Tensor]:
    return [dy.new_empty(vocab // ranks_of(group).size, dy.shape[-1])]


OPERATOR = register(
    f"{NAME}(Tensor ids, Tensor weight, SymInt vocab, str group, bool sequence_parallel) -> Tensor",
    check=_check,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    kept="ids",
    gradients="weight",
    fake_backward=_fake_gradient,
    check_values=_check_values,
)

"""What is whole on several ranks must be the same bytes on all of them: compared by digests, for the gradient norm (optim.py).

A parameter that no module says is cut counts once in the norm, whichever rank's copy is taken. Copies that differ (another seed, a gradient
that was not reduced, a part that nobody names) would give every rank another norm, or one that depends on the number of ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tpinv.collectives import Ranks, all_gather, all_max
from tpinv.sharding import digest, global_ranks, local

_compared = WeakIdKeyDictionary()  # parameters on a GPU whose replicas were compared


def newly_seen(parameters: Sequence[Tensor]) -> bool:
    """Whether any of these was never given here before."""
    new = [parameter for parameter in parameters if parameter not in _compared]
    for parameter in new:
        _compared[parameter] = True
    return bool(new)


class Replicas:
    """Digests of values and gradients of parameters (each with a ``name``, its ``grad``, and the groups in ``cut`` that divide it), and which
    of them were found to differ."""

    def __init__(self, parameters: Sequence, device: torch.device):
        self._parameters = parameters
        zero = torch.zeros((), dtype=torch.int64, device=device)
        pairs = [(digest(local(p.parameter)), zero if p.grad is None else digest(local(p.grad))) for p in parameters]
        self._digests = torch.stack([torch.stack(pair).to(device) for pair in pairs]) if pairs else zero.new_zeros(0, 2)
        self._differ = torch.zeros_like(self._digests)

    def compare(self, ranks: Ranks) -> None:
        """Over one group: those parameters that it does not divide. A group that holds parts of one, and copies of it, is none to compare."""
        members = {*global_ranks(ranks)}
        whole = [all(len(members & {*global_ranks(cut)}) == 1 for cut in p.cut) for p in self._parameters]
        every = all_gather(self._digests.unsqueeze(0), ranks)
        differ = (every != every[:1]).any(0) & torch.tensor(whole, dtype=torch.bool, device=every.device).unsqueeze(1)
        self._differ |= differ.long()

    def raise_for_differences(self, groups: list[Ranks]) -> None:
        differ = self._differ
        for ranks in groups if len(groups) > 1 else ():  # what one group has found, to all ranks
            differ = all_max(differ, ranks)
        what = [
            f"the {kind} of {p.name or f'parameter {i} {tuple(p.parameter.shape)}'}"
            for i, (p, flags) in enumerate(zip(self._parameters, differ.tolist(), strict=True))
            for kind, flag in zip(("value", "gradient"), flags, strict=True)
            if flag
        ]
        if what:
            more = f" and {len(what) - 4} more" if len(what) > 4 else ""
            raise ValueError(
                f"{', '.join(what[:4])}{more}: no module says that it is cut between ranks, so that it must be the same bytes on all of them, and "
                "it is not. Begin from equal values (one seed, or broadcast them); take the norm after gradients are reduced; and if it is a part, "
                "derive its module from tpinv.ShardedModule"
            )

"""A group= that is none, on one rank alone: the peers hear of it wherever they wait, and what all call next is one call again."""

import time

import pytest
import torch
import torch.distributed as dist

import tpinv
from tpinv import ReductionTree
from tpinv.testing import run_ranks

TREE = ReductionTree(8)
SECONDS = 20


def column(group):
    return tpinv.column_parallel_linear(torch.ones(2, 4), torch.ones(16 // dist.get_world_size(group_of(group)), 4), tree=TREE, group=group)


def norm(group):
    return tpinv.rms_norm(torch.ones(2, 4), torch.ones(4), tree=TREE, group=group, sequence_parallel=True)


def total(group):
    size = dist.get_world_size(group_of(group))
    return tpinv.tree_all_reduce(torch.ones(len(TREE.subtrees(0, size)), 3), tree=TREE, group=group)


def embed(group):
    return tpinv.vocab_parallel_embedding(torch.arange(4), torch.ones(4, 2), group=group)


def gradients(group):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return tpinv.grad_norm([weight], group=group)


def group_of(group):
    return group if isinstance(group, dist.ProcessGroup) else None


def said(function, group) -> str:
    began = time.monotonic()
    try:
        function(group)
        return ""
    except Exception as error:
        assert time.monotonic() - began < SECONDS
        return f"{type(error).__name__}: {error}"


def programs(size: int, odd: int):
    """One program after the other in groups of ``size`` of the ranks; the rank ``odd`` of each has a wrong one. What every call says."""
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    group = groups[rank // size] if size < world else None
    refuses = rank % size == odd
    out = {}
    for wrong in (dist.DeviceMesh("cpu", torch.arange(world).view(2, -1)), 8, dist.GroupMember.NON_GROUP_MEMBER, "tp"):
        mine = wrong if refuses else group
        out["once", str(wrong)] = [said(column, mine), said(total, group), said(column, group)]
    out["twice", ""] = [said(total, mine), said(total, mine), said(column, group), said(total, group)]
    out["the same again", ""] = [said(norm, mine), said(norm, group), said(norm, group)]
    out["late", ""] = [time.sleep(1.5 * refuses) or said(embed, mine), said(embed, group)]
    out["then another refusal", ""] = [said(embed, mine), said(total, mine), said(norm, group)]
    out["gradients", ""] = [said(gradients, mine), said(column, group)]
    return out


@pytest.mark.parametrize("p, size, odd", [(4, 4, 0), (4, 2, 1)])
def test_what_is_no_group_on_one_rank(p, size, odd):
    results = run_ranks(programs, p, size, odd, timeout=120)
    refused = {"once": 1, "twice": 2, "the same again": 1, "late": 1, "then another refusal": 2, "gradients": 1}
    for key in results[0]:
        for rank, texts in enumerate(result[key] for result in results):
            count = refused[key[0]]
            assert all(text.startswith("ValueError: ") for text in texts[:count]) and not any(texts[count:]), (key, rank, texts)
            if rank % size != odd:
                assert all(f"rank {odd} of {size} refused" in text for text in texts[:count]), (key, rank, texts)

"""tree_all_reduce, tree_reduce_scatter: the order is the tree's for every L, p and size. Selection moves bits, zeros included."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from hostile import DTYPES, INEXACT, KINDS, RANKS, hostile, join, poison, same_nan, sum_of
from torch._dynamo.testing import CompileCounter

from tpinv import ReductionTree, tree_all_reduce, tree_reduce_scatter
from tpinv.collectives import all_gather, all_max, resolve, select_all_reduce, select_reduce_scatter
from tpinv.reference import torch_node_dtype
from tpinv.testing import RankError, assert_bitwise_equal, compare, order_probe, run_ranks, tree_shape

TREES = [ReductionTree(leaves, node) for leaves in (1, 2, 3, 4, 6, 8, 12, 24) for node in ("float32", "bfloat16")]
SIZES = [(), (0,), (1,), (7,), (48, 5), (24, 0), (20_001,)]  # smaller than p, odd, large; (48, 5) can be scattered


def fits(tree: ReductionTree, ranks: int) -> bool:
    return tree.leaves % ranks == 0


def values(leaves: torch.Tensor, tree: ReductionTree, rank: int, ranks: int) -> torch.Tensor:
    """[L, ...] leaf values -> this rank's subtree values, with additions written out here and not in the code under test."""
    dtype = torch_node_dtype(tree)

    def add(left, right):
        return (left.float() + right.float()).to(dtype)

    return torch.stack([tree.reduce(leaves[node.start : node.stop].to(dtype), add, node) for node in tree.subtrees(rank, ranks)])


def probe_all():
    """The trees found from outside, by what comes out of the collective: {fingerprint: (all-reduce's, reduce-scatter's)}."""
    _, rank, ranks = resolve()
    found = {}
    for tree in (t for t in TREES if fits(t, ranks)):

        def total(probes, collective, tree=tree):
            probes = torch.nn.functional.pad(probes, (0, 0, 0, -len(probes) % ranks))  # rows are scattered
            return collective(values(probes.t(), tree, rank, ranks), tree=tree, out_dtype=torch.float32)

        def scattered(probes, tree=tree):
            return all_gather(total(probes, tree_reduce_scatter, tree), resolve())[: len(probes)]

        def reduced(probes, tree=tree):
            return total(probes, tree_all_reduce, tree)[: len(probes)]

        found[tree.fingerprint] = [order_probe(f, tree.leaves, batched=True) for f in (reduced, scattered)]
    return found


@pytest.mark.parametrize("p", (1, *RANKS))
def test_probe_finds_the_tree(p):
    for found in run_ranks(probe_all, p):
        assert len(found) == sum(fits(tree, p) for tree in TREES)
        for tree in (t for t in TREES if fits(t, p)):
            assert found[tree.fingerprint] == [tree_shape(tree)] * 2, tree.fingerprint


def every_case():
    """{(fingerprint, kind, size): all-reduce, reduce-scatter where it fits, and gloo's own sum of the same values}."""
    _, rank, ranks = resolve()
    out = {}
    with poison(ranks > 1):
        # of 20 leaves, 4 ranks own two or three subtrees
        for tree in (ReductionTree(24), ReductionTree(24, "bfloat16"), ReductionTree(20), *(ReductionTree(p) for p in RANKS)):
            for kind in KINDS if fits(tree, ranks) else ():
                for size in SIZES if tree.leaves == 24 and kind == "exponents" else SIZES[:-1]:
                    leaves = hostile(kind, (tree.leaves, *size), torch_node_dtype(tree), seed=1)
                    mine = values(leaves, tree, rank, ranks)
                    key = (tree.fingerprint, kind, size)
                    out[key] = {"all": tree_all_reduce(mine, tree=tree, out_dtype=torch.bfloat16)}
                    if size and size[0] % 24 == 0:
                        out[key]["scattered"] = tree_reduce_scatter(mine, tree=tree, out_dtype=torch.bfloat16)
                    if size == (48, 5):
                        out[key]["fp32"] = tree_all_reduce(mine, tree=tree, out_dtype=torch.float32)
                        owned = tree.owned(rank, ranks)
                        out[key]["gloo"] = sum_of(leaves[owned.start : owned.stop].float().sum(0)) if ranks > 1 else leaves.float().sum(0)
    return out


@functools.cache
def run(p: int):
    return run_ranks(every_case, p)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_as_one_rank(kind, p):
    results, alone = run(p), run(1)[0]
    keys = [key for key in results[0] if key[1] == kind]
    assert len(keys) >= 2 * len(SIZES[:-1])
    for key in keys:
        for name, tensor in alone[key].items():
            if name != "gloo":
                for actual in join(results, key, name, 0 if name == "scattered" else None):
                    assert_bitwise_equal(same_nan(actual), same_nan(tensor), f"{name} {key} at p={p}")


@pytest.mark.parametrize("p", [4, 6, 8])
@pytest.mark.parametrize("kind", INEXACT)
def test_gloo_depends_on_the_number_of_ranks(kind, p):
    key = (ReductionTree(24).fingerprint, kind, (48, 5))
    assert compare(run(p)[0][key]["gloo"], run(1)[0][key]["gloo"])


def test_both_collectives_agree():
    for p in (1, *RANKS):
        for key, result in run(p)[0].items():
            if "scattered" in result:
                assert_bitwise_equal(same_nan(join(run(p), key, "scattered", 0)[0]), same_nan(result["all"]), str(key))


def traffic():
    """Elements this rank sends and receives in all_to_all."""
    sent = []
    real = dist.all_to_all_single
    dist.all_to_all_single = lambda out, x, **rest: sent.append((x.numel(), out.numel())) or real(out, x, **rest)
    try:
        tree_all_reduce(torch.ones(1, 8000), tree=ReductionTree(8))
        tree_all_reduce(torch.ones(1, 800), tree=ReductionTree(8))  # small: all values at once
    finally:
        dist.all_to_all_single = real
    return sent


def test_traffic_is_that_of_a_two_shot_all_reduce():
    assert run_ranks(traffic, 4) == [[(8000, 8000), (3200, 3200)]] * 4


def selections():
    """Rank r owns the rows with row % p == r, except row 0, which nobody owns. The values are hostile bit patterns."""
    ranks = resolve()
    out = {}
    with poison(ranks.size > 1):
        for name, dtype in {**DTYPES, "fp16": torch.float16}.items():
            for width in (0, 1, 3, 4):
                bits = torch.arange(48 * width, dtype=torch.int64).mul(7919).view(48, width)
                if dtype is torch.float32:
                    x = (bits * 90_001).to(torch.int32).view(dtype)  # NaN payloads, -0.0, subnormals, inf
                else:
                    x = (bits * 31).to(torch.int16).view(dtype)
                x[1:3] = -0.0
                rows = torch.arange(48).unsqueeze(1)
                owned = (rows % ranks.size == ranks.rank) & (rows > 0)
                garbage = x.masked_fill(~owned, float("nan"))  # what a rank does not own must not matter
                out[name, width] = {
                    "all": select_all_reduce(garbage, owned, ranks),
                    "scattered": select_reduce_scatter(garbage, owned, ranks),
                    "expected": x.masked_fill(rows == 0, 0.0),
                }
    return out


@pytest.mark.parametrize("p", (1, *RANKS))
def test_selection_keeps_every_bit(p):
    results = run_ranks(selections, p)
    for key, result in results[0].items():
        for actual in (*join(results, key, "all", None), *join(results, key, "scattered", 0)):
            assert_bitwise_equal(actual, result["expected"], str(key))


def gathers_and_maxima():
    ranks = resolve()
    whole = torch.arange(48.0).view(2, 24)
    x = whole.chunk(ranks.size, 1)[ranks.rank]
    nan = torch.tensor([1.0, float("nan") if ranks.rank == ranks.size // 2 else 2.0, float(ranks.rank)])
    return {"gathered": all_gather(x, ranks, dim=1), "max": all_max(nan, ranks)}


@pytest.mark.parametrize("p", (1, *RANKS))
def test_gather_and_maximum(p):
    for result in run_ranks(gathers_and_maxima, p):
        assert_bitwise_equal(result["gathered"], torch.arange(48.0).view(2, 24))
        assert_bitwise_equal(same_nan(result["max"]), torch.tensor([1.0, float("nan"), p - 1.0]))


def test_errors():
    tree = ReductionTree(8)
    for wrong in (torch.zeros(2, 3), torch.zeros(())):
        with pytest.raises(ValueError, match=r"must hold one value for each of this rank's 1 subtrees \['\[0,8\)'\]"):
            tree_all_reduce(wrong, tree=tree)
    with pytest.raises(ValueError, match="values are torch.bfloat16 but the nodes of tpinv1-rfc6962-L8-float32 are torch.float32"):
        tree_all_reduce(torch.zeros(1, 3, dtype=torch.bfloat16), tree=tree)
    with pytest.raises(ValueError, match="cannot be scattered"):
        tree_reduce_scatter(torch.zeros(1), tree=tree)


@pytest.mark.parametrize("collective", [tree_all_reduce, tree_reduce_scatter])
def test_a_lost_gradient_is_an_error(collective):
    tree, values = ReductionTree(8), torch.randn(1, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"values \(1, 3\) require a gradient, .* use row_parallel_linear"):
        collective(values * 2, tree=tree)
    with torch.no_grad():
        assert_bitwise_equal(collective(values, tree=tree), values.detach()[0])


def test_a_resolved_group_is_its_own_copy():
    ranks = resolve()
    assert copy.copy(ranks) is ranks and copy.deepcopy(ranks) is ranks


def odd_rows():
    tree_reduce_scatter(torch.zeros(1, 5), tree=ReductionTree(8))


def not_a_member():
    group = dist.new_group([0, 1])
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="pass mesh\\['tp'\\]"):
        resolve(mesh)
    return resolve(group).rank


def destroyed(folder: str):
    """A group that is gone is not the one that has its name now, in which this rank may be another."""
    old, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    ranks = resolve(old)
    assert ranks.rank == rank
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="this process group has been destroyed"):
        resolve(old)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", size), rank=size - 1 - rank, world_size=size)
    assert dist.group.WORLD.group_name == old.group_name
    for gone in (old, ranks):
        with pytest.raises(ValueError, match="this process group has been destroyed"):
            tree_all_reduce(torch.zeros(1, 3), tree=ReductionTree(size), group=gone)
    assert resolve().rank == size - 1 - rank


def test_a_destroyed_group(tmp_path):
    run_ranks(destroyed, 2, str(tmp_path))


def recompiled():
    """Groups that are resolved elsewhere do not make Dynamo compile again."""
    groups, count = [dist.new_group([0, 1]) for _ in range(4)], CompileCounter()
    ranks_of = torch.compile(lambda x, group: x + resolve(group).size, backend=count, fullgraph=True)
    for group in groups:
        resolve(group)
        assert ranks_of(torch.zeros(1), groups[0]).item() == 2
    return count.frame_count


def test_groups_do_not_make_dynamo_compile_again():
    assert run_ranks(recompiled, 2) == [1, 1]


def test_errors_on_ranks():
    with pytest.raises(RankError, match="2 ranks must divide dimension 1"):
        run_ranks(odd_rows, 2)
    with pytest.raises(RankError, match="this process is not a member of the given group"):
        run_ranks(not_a_member, 4)

"""Modules: initial values do not depend on p, attributes are Megatron's, and a module is its function."""

import copy
import functools

import pytest
import torch
from hostile import RANKS, join

import tpinv
from tpinv import ColumnParallelLinear, LayerNorm, ReductionTree, RMSNorm, RowParallelLinear, VocabParallelEmbedding, functional
from tpinv.layers import shard, unshard
from tpinv.testing import RankError, assert_bitwise_equal, compare, run_ranks

TREE = ReductionTree(24)
LAYERS = {
    "column": functools.partial(ColumnParallelLinear, 20, 96, tree=TREE),
    "column, gathered, no bias": functools.partial(ColumnParallelLinear, 20, 96, bias=False, tree=TREE, gather_output=True),
    "column, stride 2": functools.partial(ColumnParallelLinear, 20, 96, tree=TREE, stride=2),
    "column, bf16": functools.partial(ColumnParallelLinear, 20, 96, tree=TREE, dtype=torch.bfloat16),
    "row": functools.partial(RowParallelLinear, 96, 20, tree=TREE),
    "row, SP": functools.partial(RowParallelLinear, 96, 20, tree=TREE, sequence_parallel=True),
    "embedding": functools.partial(VocabParallelEmbedding, 48, 20),
    "rms": functools.partial(RMSNorm, 20, tree=TREE),
    "layer norm": functools.partial(LayerNorm, 20, tree=TREE, sequence_parallel=True),
    "layer norm, no bias": functools.partial(LayerNorm, 20, bias=False, tree=TREE),
}


def shardings_of(module) -> dict[str, tuple[int, int] | None]:
    return {name: None if s.dim is None else (s.dim, s.stride) for name, s in module.parameter_shardings().items()}


def built():
    """{layer: {parameter: value}} and {layer: {parameter: its sharding}} of freshly seeded layers."""
    values, shardings = {}, {}
    for name, layer in LAYERS.items():
        torch.manual_seed(5)
        module = layer()
        values[name] = {n: p.detach() for n, p in module.named_parameters()}
        shardings[name] = shardings_of(module)
        values[name]["next random number"] = torch.rand(1)  # what follows in the model must not depend on p either
    return values, shardings


@functools.cache
def run(p: int):
    return run_ranks(built, p)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", LAYERS)
def test_initial_values_do_not_depend_on_p(name, p):
    values, expected, shardings = [v for v, _ in run(p)], run(1)[0][0][name], run(p)[0][1][name]
    for parameter, whole in expected.items():
        for actual in join(values, name, parameter, shardings.get(parameter)):
            assert_bitwise_equal(actual, whole, f"{name} {parameter} at p={p}")


def test_stock_layers_draw_other_values():
    """The twin: with one seed, what rank 1 draws for its shard is not its part of the whole."""
    torch.manual_seed(5)
    whole = torch.nn.Linear(20, 96).weight
    torch.manual_seed(5)
    part = torch.nn.Linear(20, 24).weight
    assert compare(part, whole[24:48])


def test_shardings():
    assert run(2)[0][1] == {
        "column": {"weight": (0, 1), "bias": (0, 1)},
        "column, gathered, no bias": {"weight": (0, 1)},
        "column, stride 2": {"weight": (0, 2), "bias": (0, 2)},
        "column, bf16": {"weight": (0, 1), "bias": (0, 1)},
        "row": {"weight": (1, 1), "bias": None},
        "row, SP": {"weight": (1, 1), "bias": None},
        "embedding": {"weight": (0, 1)},
        "rms": {"weight": None},
        "layer norm": {"weight": None, "bias": None},
        "layer norm, no bias": {"weight": None},
    }


def test_initial_values_have_the_right_spread():
    values = run(1)[0][0]
    for name, bound in (("column", 20**-0.5), ("row", 96**-0.5), ("embedding", 20**-0.5)):
        top = values[name]["weight"].abs().max().item()
        assert 0.95 * bound < top <= bound
    assert values["column, bf16"]["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dim, stride", [(0, 1), (0, 2), (1, 1), (-1, 1), (1, 3)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shard_and_unshard(ranks, dim, stride):
    whole = torch.arange(24.0 * 36).view(24, 36)
    parts = [shard(whole, dim, rank, ranks, stride) for rank in range(ranks)]
    assert all(part.is_contiguous() for part in parts)
    assert_bitwise_equal(unshard(parts, dim, stride), whole)


def test_shard_must_divide():
    with pytest.raises(ValueError, match=r"dimension 0 of \(24, 2\) must be divisible by 3 ranks x stride 3"):
        shard(torch.zeros(24, 2), 0, 0, 3, 3)


def modules_and_functions():
    torch.manual_seed(0)
    x, ids = torch.randn(24, 2, 20), torch.randint(0, 48, (24, 2))
    wide = torch.randn(24, 2, 96)
    out = {}
    for name, layer in LAYERS.items():
        module = layer()
        if name.startswith("column"):
            x_here = x.to(module.weight.dtype)
            expected = tpinv.column_parallel_linear(
                x_here, module.weight, module.bias, tree=TREE, stride=module.stride, gather_output=module.gather_output
            )
        elif name.startswith("row"):
            x_here = shard(wide, 2, module.ranks.rank, module.ranks.size)
            expected = tpinv.row_parallel_linear(x_here, module.weight, module.bias, tree=TREE, sequence_parallel=module.sequence_parallel)
        elif name == "embedding":
            x_here, expected = ids, tpinv.vocab_parallel_embedding(ids, module.weight)
        elif name == "rms":
            x_here, expected = x, functional.rms_norm(x, module.weight, tree=TREE)
        else:
            x_here, expected = x, functional.layer_norm(x, module.weight, module.bias, tree=TREE, sequence_parallel=True)
        out[name] = (module(x_here).detach(), expected.detach(), repr(module))
    return out


@pytest.mark.parametrize("p", [1, 4])
def test_a_module_is_its_function(p):
    for result in run_ranks(modules_and_functions, p):
        for name, (actual, expected, text) in result.items():
            assert_bitwise_equal(actual, expected, name)
            assert f"p={p}" in text and ("L24" in text or name == "embedding")


def copies():
    """Deep copies share the group, which cannot be copied, and nothing else."""
    for layer in LAYERS.values():
        module = layer()
        twin = copy.deepcopy(module)
        assert twin.ranks.group is module.ranks.group
        before = module.weight.detach().clone()
        assert_bitwise_equal(twin.weight, before)
        with torch.no_grad():
            twin.weight.add_(1.0)
        assert_bitwise_equal(module.weight, before)
        assert twin.parameter_shardings() == module.parameter_shardings()


@pytest.mark.parametrize("p", [1, 4])
def test_layers_can_be_copied(p):
    run_ranks(copies, p)


def replaced_parameter() -> bool:  # whether there was such an id
    """A parameter is replaced before the first forward; on rank 0 by one that gets the id of the one that has gone."""
    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    layer = RowParallelLinear(8, 16, bias=False, tree=ReductionTree(2))
    values, key, kept = torch.ones_like(layer.weight), id(layer.weight), []
    if rank == 0:
        del layer._parameters["weight"]
    while True:  # the memory is free at once, and taken after a few objects of its size
        parameter = torch.nn.Parameter(values.clone())
        kept.append(parameter)
        if rank != 0 or id(parameter) == key or len(kept) == 500:
            break
    layer._parameters["weight"] = parameter
    layer(torch.ones(2, 4))
    return id(parameter) == key


def test_a_parameter_in_the_place_of_another_was_not_drawn():
    assert run_ranks(replaced_parameter, 2) == [False, False]


def test_state_dict_names():
    assert list(LAYERS["column"]().state_dict()) == ["weight", "bias"]
    assert list(LAYERS["layer norm"]().state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: ColumnParallelLinear(8, 20, tree=TREE), "out_features=20 has no 24 equal leaves"),
        (lambda: ColumnParallelLinear(8, 72, tree=TREE, stride=2), "out_features / 2=36 has no 24 equal leaves"),
        (lambda: ColumnParallelLinear(8, 24, tree=TREE, stride=0), "stride=0 must be at least 1"),
        (lambda: ColumnParallelLinear(8, 48, tree=TREE, stride=2, gather_output=True), "1 with gather_output=True"),
        (lambda: ColumnParallelLinear(8, 49, tree=TREE, stride=2), "must be divisible"),
        (lambda: RowParallelLinear(20, 8, tree=TREE), "in_features=20 has no 24 equal leaves"),
    ],
)
def test_errors_at_construction(layer, message):
    with pytest.raises(ValueError, match=message):
        layer()


def wrong_tree():
    ColumnParallelLinear(8, 24, tree=ReductionTree(8))


def wrong_vocabulary():
    VocabParallelEmbedding(50, 8)


def test_errors_at_construction_on_ranks():
    with pytest.raises(RankError, match="3 ranks do not divide leaves=8"):
        run_ranks(wrong_tree, 3)
    with pytest.raises(RankError, match=r"dimension 0 of \(50, 8\) must be divisible by 3 ranks"):
        run_ranks(wrong_vocabulary, 3)

"""Checkpoints by torch.distributed.checkpoint move between tensor-parallel sizes with stock calls: TP 2 -> 4 -> 1, biases, a weight of two
blocks, the embedding and the optimizer's states, byte for byte."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_fsdp import ALONE, sharded, wholes
from test_sharding import TREE, Net, backward, load, refusal, whole_weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tpinv import ColumnParallelLinear, ShardedModule, VocabParallelEmbedding, grad_norm
from tpinv.sharding import shard
from tpinv.state_dict import shard_optimizer_states
from tpinv.testing import assert_bitwise_equal, run_ranks

FULL = StateDictOptions(full_state_dict=True)


def model(layout: str, weights: dict | None = None) -> nn.Module:
    """Drawn from another seed unless ``weights`` are given. plain: over all ranks; mesh: dp 2 x tp; fsdp: FSDP2 over dp 2 x tp; fsdp alone:
    FSDP2 over all ranks, tensor parallelism of one."""
    weights = weights or whole_weights(99)
    if layout == "plain":
        return load(Net(), weights)
    ranks = dist.get_world_size()
    if layout == "fsdp alone":
        return sharded(load(Net(ALONE), weights), init_device_mesh("cpu", (ranks,)))
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    net = load(Net(mesh["tp"]), weights)
    return net if layout == "mesh" else sharded(net, mesh["dp"])


def stepped(net: nn.Module, optimizer, steps: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()


def adam(net: nn.Module):
    return torch.optim.AdamW(net.parameters(), lr=0.01)


def whole_states(net: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's states as whole tensors, by the names of parameters, put together from what each rank holds, not by its state_dict."""
    found = {}
    for state in ("exp_avg", "exp_avg_sq"):
        twin = {}
        for name, p in net.named_parameters():
            twin[name] = p.detach().clone()
            with torch.no_grad():
                p.copy_(optimizer.state[p][state])
        found |= {f"{state} {name}": value.clone() for name, value in wholes(net).items()}
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(twin[name])
    return found


def everything(net, optimizer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in wholes(net).items()} | whole_states(net, optimizer)


def save(path: str, layout: str, how: str):
    """A model after two steps of training, and what it was."""
    net = model(layout, whole_weights())
    optimizer = adam(net)
    stepped(net, optimizer, 2)
    if how == "stock calls":
        state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    else:
        state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
    dcp.save(state, checkpoint_id=path)
    return everything(net, optimizer)


def load_and_go_on(path: str, layout: str, how: str, to: str | None = None):
    """Loaded into a model that was drawn otherwise, saved again; what it was, and after one more step."""
    net = model(layout)
    optimizer = adam(net)
    if how == "stock calls":
        state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.load(state, checkpoint_id=path)
        net.load_state_dict(state["model"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
    else:
        state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
        dcp.load(state, checkpoint_id=path)
        set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = everything(net, optimizer)
    if to:
        dcp.save({"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=to)
    stepped(net, optimizer)
    return loaded, everything(net, optimizer)


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_bitwise_equal(actual[name], value, name)


ROUTES = [
    ((2, "plain"), (4, "plain"), (1, "plain")),
    ((1, "plain"), (4, "plain"), (2, "plain")),
    ((4, "mesh"), (2, "plain"), (4, "plain")),
    ((4, "fsdp"), (2, "plain"), (4, "fsdp")),
    ((3, "fsdp alone"), (4, "fsdp"), (1, "plain")),
]


@pytest.mark.parametrize("how", ["stock calls", "get_state_dict"])
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: " -> ".join(f"{ranks} {layout}" for ranks, layout in route))
def test_a_checkpoint_goes_from_one_size_to_another(route, how, tmp_path):
    (ranks, layout), *stops = route
    saved = run_ranks(save, ranks, f"{tmp_path}/0", layout, how)
    continued = []
    for i, (ranks, layout) in enumerate(stops):
        for loaded, after in run_ranks(load_and_go_on, ranks, f"{tmp_path}/{i}", layout, how, f"{tmp_path}/{i + 1}"):
            assert_same(loaded, saved[0])
            continued.append(after)
    for after in continued[1:]:
        assert_same(after, continued[0])
    for other in saved[1:]:
        assert_same(other, saved[0])


class StockParallel(nn.Module):
    """The twin: a shard that is a plain tensor, of which DCP keeps rank 0's and says nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 2), float(dist.get_rank())))


def save_and_load_stock(path: str):
    net = StockParallel()
    dcp.save(net.state_dict(), checkpoint_id=path)
    state = net.state_dict()
    dcp.load(state, checkpoint_id=path)
    return state["weight"]


def test_stock_shards_are_lost(tmp_path):
    assert run_ranks(save_and_load_stock, 2, str(tmp_path))[1].eq(0).all()


# -- one process's state dicts --------------------------------------------------------------------------------------------------------


def full_and_back(layout: str):
    """full_state_dict=True, and loading whole tensors, with and without a broadcast from rank 0."""
    net = model(layout, whole_weights())
    optimizer = adam(net)
    stepped(net, optimizer)
    expected = everything(net, optimizer)
    full, states = get_model_state_dict(net, options=FULL), get_optimizer_state_dict(net, optimizer, options=FULL)
    assert not any(isinstance(value, DTensor) for value in full.values())
    for name, value in full.items():
        assert_bitwise_equal(value, expected[name], name)
    for name in ("exp_avg", "exp_avg_sq"):
        for key in full:
            assert_bitwise_equal(states["state"][key][name], expected[f"{name} {key}"], key)
    for broadcast in (False, True) if layout == "plain" else (False,):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        other = model(layout)
        again = adam(other)
        set_model_state_dict(other, dict(full) if not broadcast or dist.get_rank() == 0 else {}, options=options)
        if not broadcast:
            set_optimizer_state_dict(other, again, copy.deepcopy(states), options=options)
            assert_same(everything(other, again), expected)
        else:
            assert_same(wholes(other), wholes(net))
    return expected


@pytest.mark.parametrize("ranks, layout", [(2, "plain"), (4, "plain"), (4, "mesh")])
def test_full_state_dicts(ranks, layout):
    results = run_ranks(full_and_back, ranks, layout)
    for result in results[1:]:
        assert_same(result, results[0])


def broadcast_states(layout: str) -> list[str]:
    """An optimizer's state from rank 0 alone: refused on all ranks where a weight has two blocks, of which torch knows one; right without."""
    said = []
    for blocks in (True, False):
        net = model(layout, whole_weights())
        kept = net if blocks else nn.ModuleDict({"down": net.down, "norm": net.norm})
        optimizer = torch.optim.AdamW(kept.parameters(), lr=0.01)
        stepped(net, optimizer)
        states = copy.deepcopy(get_optimizer_state_dict(kept, optimizer, options=FULL))
        expected = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in kept.parameters()}
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        given = states if dist.get_rank() == 0 else {}
        said.append(refusal(lambda: set_optimizer_state_dict(kept, optimizer, given, options=options)))  # noqa: B023
        if not blocks:
            for p, state in expected.items():
                assert_bitwise_equal(optimizer.state[p]["exp_avg"], state["exp_avg"])
    return said


@pytest.mark.parametrize("ranks, layout", [(2, "plain"), (4, "plain"), (4, "mesh")])
def test_states_that_rank_0_broadcasts(ranks, layout):
    for blocks, one_box in run_ranks(broadcast_states, ranks, layout):
        assert "several boxes of the whole" in blocks and one_box == "nothing was refused"


def what_load_state_dict_takes():
    """This rank's parts, whole tensors, DTensors; assigned too; keep_vars; names and shapes."""
    source = load(Net(), whole_weights())
    state = source.state_dict()
    assert list(state) == list(whole_weights())
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in whole_weights().items()}
    vars_ = source.state_dict(keep_vars=True)
    assert all(vars_[name] is p for name, p in source.named_parameters())
    parts = {name: p.detach().clone() for name, p in source.named_parameters()}
    kinds = {"DTensors": state, "whole": whole_weights(), "parts": parts, "copies": copy.deepcopy(state), "views": dict(state)}
    for name, values in kinds.items():
        for assign in (False, True):
            net = Net()
            net.load_state_dict(copy.deepcopy(values), assign=assign)
            for key, p in net.named_parameters():
                assert_bitwise_equal(p.detach(), parts[key], f"{name} {key}")
                assert type(p.detach()) is torch.Tensor
            assert grad_norm(backward(net)) == grad_norm(backward(copy.deepcopy(source)))
    up = state["up.weight"]
    (up.to_local() if isinstance(up, DTensor) else up).fill_(7.0)
    assert source.up.weight.eq(7).all(), "a state dict shares memory with the model"
    with pytest.raises(RuntimeError, match="size mismatch"):
        Net().load_state_dict({**parts, "up.weight": torch.zeros(3, 16)})


def kept_in_a_file():
    """torch.save of a state dict, per rank."""
    source = load(Net(), whole_weights())
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    net = Net()
    net.load_state_dict(torch.load(buffer, weights_only=False))
    for (name, p), q in zip(net.named_parameters(), source.parameters(), strict=True):
        assert_bitwise_equal(p.detach(), q.detach(), name)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("job", [what_load_state_dict_takes, kept_in_a_file])
def test_state_dicts(job, ranks):
    run_ranks(job, ranks)


def factored():
    net = load(Net(), whole_weights())
    optimizer = type("Factored", (torch.optim.Adafactor,), {"elementwise": True})(net.parameters())  # which it says, and is not
    stepped(net, optimizer)
    return refusal(optimizer.state_dict)


def plain_optimizer_state():
    """optimizer.state_dict() and load_state_dict without torch.distributed.checkpoint, into an optimizer that has never stepped."""
    net = load(Net(), whole_weights())
    optimizer = adam(net)
    stepped(net, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(net)
    early, late = adam(twin), adam(twin)
    shard_optimizer_states(early)
    early.load_state_dict(state)
    late.load_state_dict(state)
    stepped(net, optimizer)
    stepped(twin, late)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert_bitwise_equal(q.detach(), p.detach())
        assert type(late.state[q]["exp_avg"]) is type(early.state[q]["exp_avg"]) is torch.Tensor
    return state["state"][2]["exp_avg"].shape


def test_optimizers():
    for said in run_ranks(factored, 2):
        assert "which part of what it is nobody says" in said
    for shape in run_ranks(plain_optimizer_state, 2):
        assert shape == (64, 16), "of the whole"


# -- pickles and copies ---------------------------------------------------------------------------------------------------------------


def pickled():
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp")) if dist.get_world_size() > 1 else None
    for group in (None, mesh and mesh["tp"]):
        net = load(Net(group), whole_weights())
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        for twin in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
            assert twin.up.ranks == net.up.ranks and twin.up.ranks.group is net.up.ranks.group
            assert_bitwise_equal(grad_norm(backward(twin)), grad_norm(backward(copy.deepcopy(net))))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_modules_pickle(ranks):
    run_ranks(pickled, ranks)


def dumped():
    return pickle.dumps(ColumnParallelLinear(8, 16, tree=TREE))


def loaded(dumps):
    return refusal(lambda: pickle.loads(dumps[dist.get_rank() % len(dumps)]))


def test_a_pickle_of_another_run():
    dumps = run_ranks(dumped, 2)
    for said in run_ranks(loaded, 4, dumps):
        assert "was pickled" in said and "2 ranks" in said
    with pytest.raises(ValueError, match="was pickled on rank 1 of 2 ranks"):
        pickle.loads(dumps[1])


class Own(ShardedModule, nn.Module):
    """A module of a user's, which the mixin makes savable."""

    shards = {"table": 1}

    def __init__(self):
        super().__init__()
        self.ranks = VocabParallelEmbedding(8, 4).ranks
        whole = torch.arange(32.0).view(4, 8)
        self.table = nn.Parameter(shard(whole, 1, self.ranks.rank, self.ranks.size))


def own_module():
    net = Own()
    assert_bitwise_equal(net.state_dict()["table"].full_tensor(), torch.arange(32.0).view(4, 8))
    net.load_state_dict({"table": -torch.arange(32.0).view(4, 8)})
    assert net.table[0, 0] == -8.0 * dist.get_rank() / dist.get_world_size()


def test_a_module_of_ones_own():
    run_ranks(own_module, 4)

"""torch's clipping and optimizers that add up elements are refused where a rank holds parts, and nowhere else."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tpinv import ColumnParallelLinear, LayerNorm, ReductionTree, RowParallelLinear, ShardedModule, clip_grad_norm_
from tpinv.collectives import resolve
from tpinv.testing import run_ranks

TREE = ReductionTree(8)


class Lion(torch.optim.Optimizer):
    """Elementwise, and unknown."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=0.01)


class Said(Lion):
    elementwise = True


class MyAdamW(torch.optim.AdamW):
    """Who knows what it does."""


KINDS = {
    "Muon": lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2]),
    "Adafactor": torch.optim.Adafactor,
    "Lion": Lion,
    "MyAdamW": MyAdamW,
}
FINE = (Said, torch.optim.AdamW, lambda ps: torch.optim.SGD(ps, 0.1), lambda ps: torch.optim.RMSprop(ps, 0.1))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(ColumnParallelLinear(8, 16, tree=TREE), RowParallelLinear(16, 8, tree=TREE), LayerNorm(8, tree=TREE))
    (model(torch.randn(4, 8)) * torch.randn(4, 8)).sum().backward()
    return model


def refused(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


class Table(ShardedModule, nn.Module):
    shards = {"table": 0}

    def __init__(self):
        super().__init__()
        self.ranks = resolve()
        self.table = nn.Parameter(torch.ones(4, 4))
        self.table.grad = torch.ones(4, 4)


def of_ones_own() -> list[str]:
    table = Table()
    return [refused(lambda: nn.utils.clip_grad_norm_(table.parameters(), 1.0)), refused(torch.optim.Muon(table.parameters()).step)]


def test_a_module_of_ones_own():
    for clip, muon in run_ranks(of_ones_own, 2):
        assert "tpinv.clip_grad_norm_" in clip and "Muon updates Table.table, cut on dimension 0 over 2 ranks [0, 1]" in muon
    assert run_ranks(of_ones_own, 1) == [["", ""]]


def outcomes() -> dict:
    model, found = net(), {}
    for name, kind in KINDS.items():
        found[name] = refused(kind(list(model.parameters())).step)
    for kind in FINE:
        assert not refused(kind(list(model.parameters())).step)
    found["clip"] = refused(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    found["norm"] = refused(lambda: nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    clip_grad_norm_(model, 1.0)
    stock = nn.Linear(4, 4, bias=False)
    stock.weight.grad = torch.ones(4, 4)
    nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
    nn.utils.clip_grad_norm_(model[2].parameters(), 1.0)  # whole on every rank
    torch.optim.Muon(stock.parameters()).step()
    Lion(model[2].parameters()).step()
    return found


@pytest.mark.parametrize("p", [2, 4])
def test_what_takes_a_part_for_the_whole_is_refused(p):
    for found in run_ranks(outcomes, p):
        assert all(f"{name} updates " in found[name] and "is not known to treat every element alike" in found[name] for name in KINDS), (
            found
        )
        assert "tpinv.clip_grad_norm_" in found["clip"] and "tpinv.grad_norm" in found["norm"]


def test_nothing_is_refused_on_one_rank():
    (found,) = run_ranks(outcomes, 1)
    assert not any(found.values())


def test_muon_of_parts_is_another():
    """The twin: what would have been silent. AdamW's parts are those of the whole."""
    torch.manual_seed(1)
    grad = torch.randn(8, 8)

    def step(kind, rows):
        p = nn.Parameter(torch.ones(8, 8)[rows].clone())
        p.grad = grad[rows].clone()
        kind([p]).step()
        return p.detach()

    for kind, same in ((torch.optim.Muon, False), (torch.optim.AdamW, True)):
        parts = torch.cat([step(kind, slice(0, 4)), step(kind, slice(4, 8))])
        assert torch.equal(parts, step(kind, slice(0, 8))) == same


def all_norms_differ() -> float:
    model = net()
    return float(inspect.unwrap(nn.utils.get_total_norm)([p.grad for p in model.parameters()]))


def test_torchs_norm_is_another_on_every_rank():
    norms = run_ranks(all_norms_differ, 4)
    assert len(set(norms)) > 1


def wrapped(make) -> str:
    return refused(lambda: make(net()))


def data_parallel() -> dict:
    world = list(range(dist.get_world_size()))
    alone, _ = dist.new_subgroups_by_enumeration([[rank] for rank in world])
    mesh = init_device_mesh("cpu", (1, len(world)), mesh_dim_names=("dp", "tp"))
    found = {
        "ddp": wrapped(DistributedDataParallel),
        "ddp, mesh": wrapped(lambda m: DistributedDataParallel(m, device_mesh=mesh["tp"])),
        "fsdp1": wrapped(lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"))),
        "fsdp2": wrapped(fully_shard),
        "fsdp2 of a layer": wrapped(lambda m: fully_shard(m[0], mesh=mesh["tp"])),
        "hsdp": wrapped(lambda m: fully_shard(m, mesh=mesh)),
    }
    fine = {
        "ddp": wrapped(lambda m: DistributedDataParallel(m, process_group=alone)),
        "whole": wrapped(lambda m: DistributedDataParallel(m[2])),
        "fsdp2": wrapped(lambda m: fully_shard(m, mesh=mesh["dp"])),
        "stock": wrapped(lambda m: DistributedDataParallel(nn.Linear(2, 2))),
    }
    x, model = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), net()
    before = model(x)
    twin = DistributedDataParallel.__new__(DistributedDataParallel)
    inspect.unwrap(DistributedDataParallel.__init__)(twin, model)
    return {"found": found, "fine": fine, "twin": torch.equal(twin(x), before)}


@pytest.mark.parametrize("p", [2, 4])
def test_data_parallelism_over_ranks_that_hold_other_parts_is_refused(p):
    """And the twin: unrefused, every rank has the first one's parts, and another output."""
    for outcome in run_ranks(data_parallel, p):
        assert all(f"cut on dimension 0 over {p} ranks" in said and "hold other parts" in said for said in outcome["found"].values()), (
            outcome
        )
        assert not any(outcome["fine"].values()), outcome
        assert not outcome["twin"]


def test_fsdp_is_imported_with_tpinv():
    """However late a script imports fully_shard: what is not imported when a layer is made would not be looked at."""
    code = "import sys, tpinv, tpinv.guards; assert all(hasattr(sys.modules[module], name) for module, name, _ in tpinv.guards._FSDP)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)

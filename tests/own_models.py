"""Factories for ``tpinv verify --model own_models:NAME``: small models, and ways in which a user's factory goes wrong."""

import torch
import torch.distributed as dist
from torch import nn

from tpinv import ColumnParallelLinear, RowParallelLinear, silu
from tpinv.harness import own, plain

WIDTH, HIDDEN, TOKENS = 16, 48, 12


class Net(nn.Module):
    def __init__(self, tree, group=None, bias=True):
        super().__init__()
        self.up = ColumnParallelLinear(WIDTH, HIDDEN, bias, tree=tree, group=group)
        self.down = RowParallelLinear(HIDDEN, WIDTH, bias, tree=tree, group=group)

    def forward(self, x):
        return self.down(silu(self.up(x)))


def batches(steps=2):
    return [(x,) for x in torch.randn(steps, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))]


def net(tree, group):
    return Net(tree, group), batches()


def drawn_per_rank(tree, group):
    """Initial weights that depend on TP, as those of most frameworks do: verify loads those of TP = 1."""
    return _drawn_per_rank(Net(tree, group)), batches()


class Foreign(nn.Module):
    """A row-parallel linear that nobody knows: its parameter has no mark, and its sum is stock's."""

    def __init__(self, group):
        super().__init__()
        torch.manual_seed(3)
        whole = torch.empty(WIDTH, HIDDEN).uniform_(-0.2, 0.2)
        self.weight = nn.Parameter(whole.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)].contiguous())
        self.group = group

    def forward(self, x):
        mine = x.chunk(dist.get_world_size(self.group), -1)[dist.get_rank(self.group)]
        return _Add.apply(mine @ self.weight.t(), self.group)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        dist.all_reduce(x := x.clone(), group=group)
        return x

    backward = staticmethod(lambda ctx, dy: (dy, None))


def uncovered(tree, group, stock):
    """What tpinv does not cover: a product whose sum over ranks is stock's, also in tpinv's runs."""
    x = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    return {"model": Foreign(group), "batches": list(x), "shards": {"weight": 1}}


def foreign_per_rank(tree, group, stock):
    """Weights that depend on TP, of a module that says nothing of how they are sharded."""
    return {**uncovered(tree, group, stock), "model": _drawn_per_rank(Foreign(group)), "shards": None}


def with_state(tree, group, stock):
    """The same with functions that put its weights together and take them apart."""

    def state(model):
        parts = [torch.empty_like(model.weight) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, model.weight.detach(), group=group)
        return {"whole": torch.cat(parts, 1)}

    def load(model, whole):
        model.weight.data.copy_(whole["whole"].chunk(dist.get_world_size(group), 1)[dist.get_rank(group)])

    return {**foreign_per_rank(tree, group, stock), "shards": {"weight": 1}, "state": state, "load": load}


def _drawn_per_rank(model: nn.Module) -> nn.Module:
    torch.manual_seed(100 + dist.get_rank())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


class Shapes(nn.Module):
    """Returns tensors whose shapes at TP = 2 do not tell how they belong to those of TP = 1, beside a loss of tpinv's layers."""

    def __init__(self, tree, group):
        super().__init__()
        self.net, self.ranks = Net(tree, group), dist.get_world_size(group)

    def forward(self, x):
        return {"loss": self.net(x).square().mean(), "odd": torch.ones(5 - self.ranks, 3 + self.ranks)}


def odd_shapes(tree, group):
    return Shapes(tree, group), batches()


def no_twin():
    return nn.Linear(WIDTH, WIDTH), batches()


def raises(tree):
    raise KeyError("no such\nlayer")


def raises_on_one_rank(tree, group):
    if dist.get_rank() == 1:
        raise OSError("no checkpoint here")
    return Net(tree, group), batches()


def asks_for_more(tree, checkpoint):
    return None


def returns_nothing(tree):
    pass


def returns_three(tree, group):
    return Net(tree, group), batches(), None


def returns_unknown(tree, group):
    return {"model": Net(tree, group), "data": batches()}


def without_batches(tree, group):
    return Net(tree, group)


def of_another_dtype(tree, group):
    return Net(tree, group).bfloat16(), batches()


def empty(tree, group):
    return Net(tree, group), []


def endless_number(tree, group):
    return Net(tree, group), 3


def no_loss(tree, group):
    model = Net(tree, group)
    model.register_forward_hook(lambda module, args, output: [output])
    return model, batches()


def returns_a_string():
    return "gpt"


def messages(names: list[str]) -> list[str]:
    """On a rank: what verify says of each factory."""
    said = []
    for name in names:
        try:
            plain.train_own(own.OwnRun(f"own_models:{name}", "stock", 1, False, (1, 2), steps=1), {})
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said

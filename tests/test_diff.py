"""record and tpinv diff over TP sizes: the first module whose bytes differ is named, and how shards were put together is told."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tpinv
from tpinv import ReductionTree
from tpinv.cli import main
from tpinv.diff import Key, Run, compare_runs
from tpinv.layers import shard
from tpinv.testing import record, run_ranks

TREE = ReductionTree(8)
WIDTH, HIDDEN, TOKENS = 32, 64, 16


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


# -- a model in three kinds: plain, stock tensor-parallel, tpinv ----------------------------------------------------------------


class StockColumn(nn.Module):
    """What Megatron's ColumnParallelLinear computes: local product forward, all-reduce of dx backward."""

    def __init__(self, inputs, outputs, stride=1, **_):
        super().__init__()
        whole = torch.empty(outputs, inputs).uniform_(-0.2, 0.2)
        self.weight = nn.Parameter(shard(whole, 0, dist.get_rank(), dist.get_world_size(), stride))
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, 0, stride

    def forward(self, x):
        return _AllReduceBackward.apply(x) @ self.weight.t()


class StockRow(nn.Module):
    def __init__(self, inputs, outputs, **_):
        super().__init__()
        whole = torch.empty(outputs, inputs).uniform_(-0.2, 0.2)
        self.weight = nn.Parameter(shard(whole, 1, dist.get_rank(), dist.get_world_size()))
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, 1, 1

    def forward(self, x):
        return _AllReduceForward.apply(x @ self.weight.t())


class _AllReduceBackward(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.view_as(x))

    @staticmethod
    def backward(ctx, dy):
        dist.all_reduce(dy := dy.clone())
        return dy


class _AllReduceForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x)
        return x

    backward = staticmethod(lambda ctx, dy: dy)


class MLP(nn.Module):
    def __init__(self, column, row, **options):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.fc1 = column(WIDTH, 2 * HIDDEN, stride=2, **options)
        self.fc2 = row(HIDDEN, WIDTH, **options)

    def forward(self, x):
        gate, up = self.fc1(self.norm(x)).chunk(2, -1)
        return x + self.fc2(tpinv.silu(gate) * up)


def parallel_model(kind: str, sequence_parallel: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "stock":
        return nn.Sequential(*(MLP(StockColumn, StockRow) for _ in range(2)))
    options = {"tree": TREE, "bias": False, "sequence_parallel": sequence_parallel}
    model = nn.Sequential(*(MLP(tpinv.ColumnParallelLinear, tpinv.RowParallelLinear, **options) for _ in range(2)))
    for mlp in model:  # its gradient is a sum over tokens, which only tpinv's own norm adds up under sequence parallelism
        mlp.norm = tpinv.RMSNorm(WIDTH, tree=TREE, sequence_parallel=sequence_parallel)
    return model


def train(kind: str, path: str, sequence_parallel: bool = False, **options) -> None:
    model = parallel_model(kind, sequence_parallel)
    torch.manual_seed(1)
    x = torch.randn(2, TOKENS, WIDTH)
    if sequence_parallel:
        x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with record(model, path, **options) as recorder:
        for batch in x:
            optimizer.zero_grad()
            model(batch).pow(2).sum().backward()
            recorder.step()
            optimizer.step()


def parallel_runs(directory: str) -> None:
    """Everything that is compared over TP sizes, by one start of the ranks."""
    p = dist.get_world_size()
    train("stock", f"{directory}/stock{p}")
    train("tpinv", f"{directory}/tpinv{p}")
    train("tpinv", f"{directory}/sp{p}", sequence_parallel=p > 1)
    train("tpinv", f"{directory}/digests{p}", keep=0)


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parallel")
    for ranks in (1, 2, 4):
        run_ranks(parallel_runs, ranks, str(directory))
    return directory


def diff(*arguments) -> int:
    return main(["diff", *map(str, arguments)])


def test_stock_layers_differ_where_the_first_all_reduce_is(parallel, tmp_path, capsys):
    rows, picture = tmp_path / "rows.json", tmp_path / "map.png"
    assert diff(parallel / "stock1", parallel / "stock4", "--json", rows, "--plot", picture) == 1
    printed = capsys.readouterr().out
    assert "first difference  step 0, forward: 0.fc2 output\n" in printed
    assert "the last that is the same: step 0, forward: 0.fc2 input\n" in printed
    assert "it arises in this module, whose input is the same bytes" in printed
    result = json.loads(rows.read_text())
    assert result["equal"] is False and result["not_compared"] == 0 and result["differing"] == len(result["rows"])
    first = result["first"]
    assert (first["module"], first["tensor"], first["phase"], first["rule"]) == ("0.fc2", "output", "forward", "replicated")
    assert sum(first["ulp_histogram"]) == first["count"] <= first["total"] == TOKENS * WIDTH
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


@pytest.mark.parametrize("a, b", [("tpinv1", "tpinv4"), ("tpinv2", "tpinv4"), ("tpinv1", "sp4"), ("sp2", "sp4"), ("sp4", "tpinv4")])
def test_tpinv_layers_differ_nowhere(parallel, a, b, capsys):
    assert diff(parallel / a, parallel / b) == 0
    assert "the same bytes in all" in capsys.readouterr().out


def test_every_way_of_sharding_is_told(parallel):
    found = {row.key: row.rule for row in compare_runs(Run(parallel / "tpinv1"), Run(parallel / "sp4"))}
    at = lambda phase, module, tensor: found[Key(1, phase, module, tensor, 0)]  # noqa: E731
    assert at("parameter", "1.fc1", "weight") == "shards of dimension 0 in 2 blocks, as marked"
    assert at("gradient", "1.fc2", "weight.grad") == "shards of dimension 1, as marked"
    assert (
        at("forward", "1.fc1", "output")
        == at("backward", "1.fc1", "grad_output")
        == "shards of dimension 1 in 2 blocks, as its module says"
    )
    assert at("forward", "1.fc1", "input") == at("backward", "1.norm", "grad_input") == "shards of dimension 0, by the shapes"
    assert at("backward", "1.fc2", "grad_input") == "shards of dimension 1, by the shapes"
    assert at("gradient", "0.norm", "weight.grad") == "replicated"


def test_digests_alone_tell_that_but_not_how(parallel, capsys):
    assert diff(parallel / "digests2", parallel / "digests2") == 0
    assert diff(parallel / "digests1", parallel / "digests4") == 2, "shards cannot be put together"
    assert "could not be compared, first step 0, parameter: 0.fc1 weight: only digests of 1 x [128, 32]" in capsys.readouterr().out
    assert diff(parallel / "digests1", parallel / "digests4", "--partial") == 0
    assert diff(parallel / "stock1", parallel / "digests1", "--partial") == 1
    assert "digests differ; how far apart the values are was not kept" in capsys.readouterr().out
    assert sum(file.stat().st_size for file in (parallel / "digests1").iterdir()) < 100_000


class Heads(nn.Module):
    """Calls a module once per head, of which each rank has its part; with a batch first, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x):  # [batch, heads, 4]
        x = self.linear(x)
        return torch.stack([self.head(x[b, h]) for b in range(x.shape[0]) for h in range(x.shape[1])])


def heads(directory: str, planted: bool) -> None:
    torch.manual_seed(0)
    model, x, p = Heads(), torch.randn(3, 4, 4), dist.get_world_size()
    with record(model, f"{directory}/{p}", modules="head"):
        x[2, 1, 0] += 0.1 * planted
        model(x.chunk(p, 1)[dist.get_rank()]).pow(2).sum().backward()


def test_calls_may_be_shards(tmp_path, capsys):
    for name, planted in (("same", False), ("planted", True)):
        for ranks in (1, 2):
            run_ranks(heads, ranks, str(tmp_path / name), planted)
    assert diff(tmp_path / "same/1", tmp_path / "same/2") == 0
    found = compare_runs(Run(tmp_path / "same/1"), Run(tmp_path / "same/2"))
    (rule,) = {row.rule for row in found}
    assert [row.key.tensor for row in found] == ["input", "output", "grad_output", "grad_input"]
    assert rule == "12 calls on each of 1 and 6 on each of 2, as shards"
    assert diff(tmp_path / "same/1", tmp_path / "planted/2") == 1
    assert "first difference  step 0, forward: head input\n" in capsys.readouterr().out

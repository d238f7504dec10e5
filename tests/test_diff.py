"""record and tpinv diff: the first module whose bytes differ is named, whatever the TP sizes, checkpointing or names of the two runs."""

import contextlib
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import tpinv
from tpinv import ReductionTree
from tpinv.cli import main
from tpinv.layers import shard
from tpinv.testing import assert_bitwise_equal, compare, record, run_ranks
from tpinv.testing.runs import Key, Run, compare_runs

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
        tpinv.layers.mark_sharded(self.weight, 0, stride)

    def forward(self, x):
        return _AllReduceBackward.apply(x) @ self.weight.t()


class StockRow(nn.Module):
    def __init__(self, inputs, outputs, **_):
        super().__init__()
        whole = torch.empty(outputs, inputs).uniform_(-0.2, 0.2)
        self.weight = nn.Parameter(shard(whole, 1, dist.get_rank(), dist.get_world_size()))
        tpinv.layers.mark_sharded(self.weight, 1)

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
    assert diff(parallel / "digests1", parallel / "digests4") == 1, "shards cannot be put together"
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


# -- on one rank ----------------------------------------------------------------------------------------------------------------


class OneUlp(torch.autograd.Function):
    """The identity, except for one element of the value (or of the gradient), which becomes the next number."""

    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        return _next(x) if where == "forward" else x.clone()

    @staticmethod
    def backward(ctx, dy):
        return _next(dy) if ctx.where == "backward" else dy, None


def _next(x):
    x = x.clone()
    x.view(-1)[5] = torch.nextafter(x.view(-1)[5], torch.tensor(torch.inf))
    return x


class Block(nn.Module):
    plant = "nowhere"

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8)

    def forward(self, x):
        return OneUlp.apply(x + self.fc2(self.act(self.fc1(x))), self.plant)


class Model(nn.Module):
    def __init__(self, checkpointed=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.last = Block(), Block(), Block()
        self.also_twice = self.twice  # a second name of one module
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in (self.first, self.twice, self.also_twice, self.last):
            if self.checkpointed:
                x = checkpoint(block, x, use_reentrant=self.checkpointed == "reentrant")
            else:
                x = block(x)
        return {"hidden": x, "scale": None}


def steps(model, path=None, prepare=lambda model, step: None, **options) -> list[torch.Tensor]:
    """Two steps of two micro-batches; returns all gradients, recorded or not."""
    torch.manual_seed(1)
    gradients = []
    recorder = record(model, path, **options) if path else None
    for step in range(2):
        model.zero_grad()
        prepare(model, step)
        for _ in range(2):
            model(torch.randn(4, 8, requires_grad=True))["hidden"].pow(2).sum().backward()
        gradients += [parameter.grad.clone() for parameter in model.parameters()]
        if recorder:
            recorder.step()
    if recorder:
        recorder.close()
    return gradients


def test_recording_changes_nothing(tmp_path):
    model = Model()
    plain, recorded, after = steps(Model()), steps(model, tmp_path / "run"), steps(model)
    for gradients in (recorded, after):
        for mine, expected in zip(gradients, plain, strict=True):
            assert_bitwise_equal(mine, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_calls_and_steps_are_in_order(tmp_path):
    steps(Model(), tmp_path / "run")
    keys = list(Run(tmp_path / "run").parts[0])
    forward = [key.module for key in keys if key.step == 1 and key.phase == "forward" and key.tensor == "output" and key.call < 2]
    blocks = [name for name in forward if name in ("", "first", "twice", "last")]
    assert blocks == ["first", "twice", "twice", "last", "", "first", "last", ""], "twice is called 4 times in two micro-batches"
    assert not any("also_twice" in key.module for key in keys)
    backward = [f"{key.module} {key.tensor}" for key in keys if key.phase == "backward" and key.step == 0][:8]
    names = ["last.fc2 grad_output", "last.fc2 grad_input", "last.act grad_output", "last.fc1 grad_output", "last.fc1 grad_input"]
    assert backward == ["last grad_output", " grad_output", *names, "last grad_input"], "act works in place and has no grad_input"
    phases = [key.phase for key in keys if key.step == 0]
    assert phases[0] == "parameter" and phases[-1] == "gradient" and "recompute" not in phases


@pytest.mark.parametrize("kind", ["reentrant", "without reentry"])
def test_checkpointed_modules_are_not_confused(kind, tmp_path, capsys):
    steps(Model(), tmp_path / "plain")
    steps(Model(kind), tmp_path / "checkpointed")
    equal = diff(tmp_path / "plain", tmp_path / "checkpointed") == 0
    printed = capsys.readouterr().out
    if kind == "reentrant":  # which runs a backward pass per call, so that a shared module's gradients are added in another order
        assert not equal and "first difference  step 0, gradient: twice.fc1 weight.grad\n" in printed
    else:
        assert equal, printed
    recomputed = [key for key in Run(tmp_path / "checkpointed").parts[0] if key.phase == "recompute"]
    assert {key.module for key in recomputed} >= {"first", "first.fc1", "twice.fc2"}

    def plant(model, step):
        model.twice.plant = "forward" if step else "nowhere"

    steps(Model(kind), tmp_path / "planted", plant)
    assert diff(tmp_path / "checkpointed", tmp_path / "planted") == 1
    assert "first difference  step 1, forward: twice output\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module, where, first",
    [
        ("last", "forward", "step 1, forward: last output"),
        ("last", "backward", "step 1, backward: last.fc2 grad_output"),
        ("first", "backward", "step 1, backward: first.fc2 grad_output"),
    ],
)
def test_one_planted_ulp(module, where, first, tmp_path, capsys):
    def plant(model, step):
        model.get_submodule(module).plant = where if step else "nowhere"

    steps(Model(), tmp_path / "a")
    steps(Model(), tmp_path / "b", plant)
    assert diff(tmp_path / "a", tmp_path / "b") == 1
    printed = capsys.readouterr().out
    assert f"first difference  {first}\n" in printed
    assert "1 of 32 elements differ in their bytes, first at [0, 5]" in printed
    assert "at most 1 ulp" in printed and "1         1 ████" in printed


def test_a_planted_parameter_and_gradient(tmp_path, capsys):
    def initial(model, step):
        if step == 0:
            model.last.fc1.weight.data = _next(model.last.fc1.weight.data)

    def gradient(model, step):
        if step == 0:
            model.first.fc2.bias.register_hook(_next)

    for name, prepare in (("a", lambda *_: None), ("initial", initial), ("gradient", gradient)):
        steps(Model(), tmp_path / name, prepare)
    assert diff(tmp_path / "a", tmp_path / "initial") == 1
    assert "first difference  step 0, parameter: last.fc1 weight\n" in capsys.readouterr().out
    assert diff(tmp_path / "a", tmp_path / "gradient") == 1
    assert "first difference  step 0, gradient: first.fc2 bias.grad\n" in capsys.readouterr().out


class Other(nn.Module):
    """Model under other names, [b, s, h] for [s, b, h], with one module more."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList([model.first.fc1, model.first.fc2])
        self.extra = nn.Identity()

    def forward(self, x):
        return self.extra(self.layers[1](self.layers[0](x.transpose(0, 1)).relu())).transpose(0, 1)


def test_other_names_and_layouts(tmp_path, capsys):
    model, x = Model().first, torch.randn(3, 2, 8)
    a, b = nn.Sequential(model.fc1, nn.ReLU(), model.fc2), Other(Model())
    for name, module in (("a", a), ("b", b)):
        with record(module, tmp_path / name):
            module(x)
    names = ["--map", r"^layers\.0$=0", "--map", r"^layers\.1$=2"]
    assert diff(tmp_path / "a", tmp_path / "b", *names) == 1, "extra and the ReLU are in one run only"
    assert "could not be compared, first step 0, forward: 1 input: only in" in capsys.readouterr().out
    assert diff(tmp_path / "a", tmp_path / "b", *names, "--partial") == 0
    rules = {row.rule for row in compare_runs(*(Run(tmp_path / name) for name in "aa"))}
    assert rules == {""}
    capsys.readouterr()
    assert diff(tmp_path / "a", tmp_path / "b", "--map", r"^layers\..$=0") == 2
    assert "two modules of" in capsys.readouterr().err


def test_what_is_recorded_can_be_chosen(tmp_path, capsys):
    steps(Model(), tmp_path / "some", modules=r"^last", keep=2000)
    run = Run(tmp_path / "some")
    assert {key.module.partition(".")[0] for key in run.parts[0]} == {"last"}
    kept = {part.digest: part.value for part in run.parts[0].values() if part.value is not None}
    assert 0 < sum(value.numel() * value.element_size() for value in kept.values()) <= 2000


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("a nowhere", "nowhere is no recording: there is no nowhere/rank0.pt"),
        ("a broken", "broken/rank0.pt cannot be read as a recording"),
        ("a stranger", "stranger/rank0.pt is not a 'tpinv recording 1'"),
        ("a half", "half holds ['rank0.pt'], but rank 0 was one of 2 ranks"),
        ("a unlike", "a and unlike have no tensor in common"),
        ("a a --map layers", "--map 'layers' must be OLD=NEW"),
        ("a a --map (=x", "map '(' to 'x' is no regular expression"),
        ("a a --json nowhere/rows.json", "--json nowhere/rows.json cannot be written"),
        ("a a --plot map.xyz", "--plot map.xyz must end in one of"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, module in (("a", nn.Linear(2, 2)), ("unlike", nn.Sequential(nn.Linear(2, 2)))):
        with record(module, name, modules="" if name == "a" else "0"):
            module(torch.randn(3, 2))
    for name in ("broken", "stranger", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/rank0.pt").write_bytes(b"not a file of torch")
    torch.save({"weight": torch.zeros(2)}, "stranger/rank0.pt")
    torch.save(torch.load("a/rank0.pt", weights_only=True) | {"ranks": 2}, "half/rank0.pt")
    assert main(["diff", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("tpinv diff: ") and message in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_a_directory_of_another_run_is_refused(tmp_path):
    (tmp_path / "rank1.pt").touch()
    with pytest.raises(ValueError, match=r"holds \['rank1.pt'\], which a run of 1 ranks does not write"):
        record(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="is no regular expression"):
        record(nn.Linear(2, 2), tmp_path / "new", modules="(")


# -- recordings made by hand ------------------------------------------------------------------------------------------------------


def written(path, *ranks: dict[str, torch.Tensor]):
    """A recording of each rank's {module: output}."""
    path.mkdir(parents=True)
    for rank, outputs in enumerate(ranks):
        recorder = record(nn.Identity(), path.parent / f"{path.name}-{rank}")
        recorder.rank, recorder.ranks = rank, len(ranks)
        for name, value in outputs.items():
            recorder._add("forward", name, "output", value)
        recorder.close()
        (path.parent / f"{path.name}-{rank}/rank{rank}.pt").rename(path / f"rank{rank}.pt")
    return path


WHOLE, BAD = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
HALVES = WHOLE.chunk(2, 2)


@pytest.mark.parametrize(
    "a, b, planted, rule",
    [
        ([WHOLE] * 4, WHOLE.chunk(4), "a", "shards of dimension 0, by the shapes; replicas of A"),
        (WHOLE.chunk(4), [WHOLE] * 4, "b", "shards of dimension 0, by the shapes; replicas of B"),
        (HALVES, [half.transpose(0, 1) for half in HALVES], "b", "dimensions 0 and 1 swapped"),
        (HALVES, [half.reshape(24, 4) for half in HALVES], "b", "reshaped"),
        ([WHOLE], [WHOLE.transpose(0, 1)] * 2, "b", "dimensions 0 and 1 swapped; replicas of B"),
        ([WHOLE] * 2, [WHOLE.reshape(24, 8)], "a", "reshaped; replicas of A"),
    ],
    ids=range(6),
)
def test_garbage_in_the_last_rank(a, b, planted, rule, tmp_path):
    runs = {"a": list(a), "b": list(b)}
    for garbage in (False, True):
        if garbage:
            runs[planted][-1] = -runs[planted][-1]
        paths = [written(tmp_path / f"{name}{garbage}", *({"m": t} for t in run)) for name, run in runs.items()]
        (found,) = compare_runs(*map(Run, paths))
        assert found.compared and found.differs == garbage
    assert found.rule == rule and found.difference.count


def test_what_the_first_rank_has_not_is_not_compared(tmp_path, capsys):
    a = written(tmp_path / "a", {"m": WHOLE}, {"m": WHOLE, "x": WHOLE})
    b = written(tmp_path / "b", {"m": WHOLE}, {"m": WHOLE, "x": BAD})
    assert diff(a, b) == 1
    printed = capsys.readouterr().out
    assert "1 could not be compared, first step 0, forward: x output: not on every rank" in printed
    assert diff(a, written(tmp_path / "c", {"m": WHOLE}, {"m": WHOLE})) == 1
    assert "first step 0, forward: x output: only in" in capsys.readouterr().out


def test_nothing_compared_is_not_equal(tmp_path, capsys):
    a = written(tmp_path / "a", {"m": WHOLE})
    assert diff(a, written(tmp_path / "b", {"m": WHOLE.bfloat16()}), "--partial") == 1
    assert "no tensor was compared" in capsys.readouterr().out
    assert diff(written(tmp_path / "c", {"m": WHOLE, "n": BAD}), written(tmp_path / "d", {"m": WHOLE.half(), "n": BAD}), "--partial") == 1


class Several(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x) + x.square()


class SideBySide(nn.Module):
    """Two modules of one input, each of which uses it several times."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Several(16, 16, 16), Several(16, 16, 16)
        self.x = nn.Parameter(torch.randn(8, 16))

    def forward(self):
        x = self.x.tanh()
        return x + self.a(x) + self.b(x)


def test_without_views_recording_changes_nothing_at_all(tmp_path):
    torch.manual_seed(0)
    model, gradients = SideBySide(), {}
    for name, options in (("plain", None), ("views", {}), ("no views", {"grad_input": False})):
        with record(model, tmp_path / name, **options) if options is not None else contextlib.nullcontext():
            (gradients[name],) = torch.autograd.grad(model().square().sum(), model.x)
    assert_bitwise_equal(gradients["no views"], gradients["plain"])
    assert compare(gradients["views"], gradients["plain"]), "the order of its additions is the docstring's"
    assert {key.tensor for key in Run(tmp_path / "no views").parts[0] if key.phase == "backward"} == {"grad_output"}


def test_the_last_update_is_recorded(tmp_path, capsys):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        with record(model, tmp_path / name) as recorder:
            model(torch.ones(2, 4)).sum().backward()
            recorder.step()
            torch.optim.SGD(model.parameters(), rate).step()
    assert diff(tmp_path / "a", tmp_path / "b") == 1
    assert "first difference  step 1, parameter: (model) weight\n" in capsys.readouterr().out

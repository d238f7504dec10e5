"""record and tpinv diff on one rank: a planted ulp is found where it is, whatever the checkpointing, names or layouts of the two runs."""

import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tpinv.cli import main
from tpinv.diff import Run, compare_runs
from tpinv.testing import assert_bitwise_equal, record


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def diff(*arguments) -> int:
    return main(["diff", *map(str, arguments)])


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
    assert "at most 1 ulp of the largest value" in printed or re.search(r"at most 0\.\d+ ulp of the largest value", printed)
    assert re.search(r"0-1 +1 ████", printed)


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
    assert diff(tmp_path / "a", tmp_path / "b", *names) == 2, "extra and the ReLU are in one run only"
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
        ("a stranger", "stranger/rank0.pt is not a 'tpinv recording 2'"),
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

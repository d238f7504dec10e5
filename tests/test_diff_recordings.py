"""tpinv diff on recordings made by hand, and what recording changes: replicas, ranks that lack a tensor, nothing in common, the last update."""

import contextlib

import pytest
import torch
from torch import nn

from tpinv.cli import main
from tpinv.diff import Run, compare_runs
from tpinv.testing import assert_bitwise_equal, compare, record


def diff(*arguments) -> int:
    return main(["diff", *map(str, arguments)])


def written(path, *ranks: dict[str, torch.Tensor]):
    """A recording of each rank's {module: output}."""
    path.mkdir(parents=True)
    for rank, outputs in enumerate(ranks):
        recorder = record(nn.Identity(), path.parent / f"{path.name}-{rank}")
        recorder.run, recorder.rank, recorder.ranks = "one", rank, len(ranks)
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
    assert diff(a, b) == 2
    printed = capsys.readouterr().out
    assert "1 could not be compared, first step 0, forward: x output: not on every rank" in printed
    assert diff(a, written(tmp_path / "c", {"m": WHOLE}, {"m": WHOLE})) == 2
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

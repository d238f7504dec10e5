"""tpinv verify --model: users' factories, what they may return, and every way in which one goes wrong in one line."""

import json
from pathlib import Path

import own_models
import pytest

from tpinv.cli import main
from tpinv.harness import own
from tpinv.testing import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(Path(__file__).parent.parent)


def verify(model: str, *arguments) -> int:
    return main(["verify", "--model", model, "--steps", "2", *map(str, arguments)])


def rows_of(file: Path, layers: str) -> list[dict]:
    return [row for row in json.loads(file.read_text())["rows"] if row["layers"] == layers and row["tp"] > 1]


def test_the_plain_example(tmp_path, capsys):
    """The same table, picture and status as for a framework, sequence parallelism and TP = 4 included."""
    rows, picture = tmp_path / "rows.json", tmp_path / "map.png"
    assert verify(f"{EXAMPLES}/verify_plain.py:build", "--tp", "4", "--sequence-parallel", "--json", rows, "--plot", picture) == 0
    assert "initial weights were the same bytes at every size" in capsys.readouterr().out
    assert all(row["differing"] > 5 for row in rows_of(rows, "stock")), "the twin is stock's arithmetic"
    assert all(row["differing"] == 0 and row["tensors"] > 30 for row in rows_of(rows, "tpinv"))
    losses = [row["losses"] for row in rows_of(rows, "stock") + rows_of(rows, "tpinv")]
    assert all(abs(a - b) < 1e-4 for loss in losses for a, b in zip(loss, losses[0], strict=True)), "of the same model"
    assert picture.stat().st_size > 5000


@pytest.mark.megatron
@pytest.mark.one_version
def test_the_megatron_example(tmp_path, capsys):
    """Its initial weights depend on TP: those of TP = 1 are loaded, and verify says so."""
    pytest.importorskip("megatron.core")
    rows = tmp_path / "rows.json"
    assert verify(f"{EXAMPLES}/verify_megatron.py:build", "--tp", "4", "--dtype", "bf16", "--json", rows) == 0
    assert "tpinv TP=4: 10 initial tensors depended on TP; it started from those of TP=1" in capsys.readouterr().out
    assert [row["loaded"] for row in rows_of(rows, "tpinv")] == [10] and rows_of(rows, "stock")[0]["differing"] > 20


@pytest.mark.torchtitan
def test_the_torchtitan_example(capsys):
    pytest.importorskip("torchtitan")
    assert verify(f"{EXAMPLES}/verify_torchtitan.py:build", "--tp", "2") == 0
    assert "(torchtitan)" in capsys.readouterr().out


def test_weights_drawn_per_rank_are_loaded_from_one(capsys):
    assert verify("own_models:drawn_per_rank", "--tp", "4") == 0
    assert "initial tensors depended on TP; it started from those of TP=1" in capsys.readouterr().out


def test_weights_that_nobody_knows_how_to_shard(capfd):
    assert verify("own_models:foreign_per_rank", "--tp", "2") == 2
    said = capfd.readouterr().err
    assert "the initial weight depends on TP and nothing says how it is sharded ((16, 48) at TP=1, (16, 24) at TP=2)" in said
    assert said.count("\n") == 1


def test_weights_by_functions_of_the_factory(capsys):
    assert verify("own_models:with_state", "--tp", "2") == 1, "the module itself is not covered"
    printed = capsys.readouterr()
    assert "stock TP=2: 1 initial tensors depended on TP" in printed.out and printed.err == ""


def test_what_tpinv_does_not_cover_is_status_1(capsys):
    assert verify("own_models:uncovered", "--tp", "4") == 1
    assert "tpinv differs: this is a bug, or a part of the model that tpinv does not cover" in capsys.readouterr().out


def test_what_cannot_be_compared_is_not_taken_for_equal(capsys):
    assert verify("own_models:odd_shapes", "--tp", "2") == 2
    printed = capsys.readouterr()
    assert "1 not compared" in printed.out and "not compared: step0/output.odd" in printed.out
    assert "1 tensors could not be compared" in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("raises", "own_models:raises raised on rank 0 of 1 (stock): KeyError in raises (own_models.py:"),
        ("raises_on_one_rank", "raised on rank 1 of 2 (stock): OSError in raises_on_one_rank (own_models.py:"),
    ],
)
def test_a_factory_that_raises_is_one_line(name, message, capfd):
    assert verify(f"own_models:{name}", "--tp", "2") == 2
    printed = capfd.readouterr().err
    assert message in printed and printed.count("\n") == 1, "no traceback of any rank, and no broken pipe"


WRONG = {
    "asks_for_more": "asks for checkpoint; verify passes, by keyword, any of tree, group, tp, sequence_parallel, stock",
    "returns_nothing": "returned None; return a model, (model, batches), or a dict of model, batches, loss",
    "returns_three": "returned a tuple of 3",
    "returns_unknown": "returned data, which verify does not know",
    "without_batches": "returned no batches, which a plain module needs",
    "empty": "batches is empty",
    "endless_number": "batches is a int",
    "of_another_dtype": "built parameters of bfloat16, and --dtype is fp32",
    "no_twin": "takes no argument stock: nothing would have to differ",
    "no_loss": "of which verify makes no loss",
    "returns_a_string": "returned a str as its model, which is no Module",
}


def test_a_factory_that_goes_wrong_is_told_how():
    """In one start of a rank; that the command line says it in one line is tested above."""
    for (name, message), said in zip(WRONG.items(), run_ranks(own_models.messages, 1, list(WRONG))[0], strict=True):
        assert message in said, name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["own_models"], "must be MODULE:FUNCTION"),
        (["tests.no_such_module:build"], "tests.no_such_module cannot be imported: ModuleNotFoundError"),
        (["tests/no_such_file.py:build"], "there is no file tests/no_such_file.py"),
        (["own_models:build"], "has no function build; it has batches, net, drawn_per_rank"),
        (["own_models:net", "--hidden", "64"], "--hidden would describe verify's own model"),
        (["own_models:net", "--sequence-parallel"], "takes no sequence_parallel"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert verify(*arguments, "--tp", "2") == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_which_framework_a_factory_is_of():
    assert own.framework_of(own.load_factory("own_models:net")) == "plain"
    for name in ("megatron", "torchtitan"):
        pytest.importorskip(name)
        assert own.framework_of(own.load_factory(f"{EXAMPLES}/verify_{name}.py:build")) == name

"""tpinv show, probe and verify: what they print and write, and their exit statuses."""

import json
import subprocess
import sys

import pytest

from tpinv.cli import main
from tpinv.cli import verify as verify_module

FINGERPRINT = "tpinv1-rfc6962-L{}-float32"
ROW = {"layers", "tp", "sp", "tensors", "differing", "first_difference", "max_ulp", "losses"}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def fake(monkeypatch):
    """``tpinv verify`` on a framework that trains nothing (tests/fake_framework.py); returns main with its arguments."""
    monkeypatch.setitem(verify_module.FRAMEWORKS, "megatron", "fake_framework")
    return lambda *arguments: main(["verify", "--tp", "1,2,4", *map(str, arguments)])


def test_show(capsys):
    assert main(["show", "--leaves", "24", "--tp", "3"]) == 0
    printed = capsys.readouterr().out
    assert FINGERPRINT.format(24) in printed and "3 ranks" in printed
    assert "rank 0  leaves 0..7  sends 1 value per element: [0,8)" in printed
    assert "rank 2  leaves 16..23  sends 1 value per element: [16,24)" in printed
    drawn = [[int(word) for word in line.split() if word.isdigit()] for line in printed.split("\n\n")[0].splitlines()[1:]]
    assert [leaves for leaves in drawn if leaves] == [[*range(16, 24)], [*range(16)]], "the last eight lie one level higher"
    assert printed.count("+") == 23, "a tree of 24 leaves has 23 additions"


def test_show_several_subtrees_per_rank(capsys):
    assert main(["show", "--leaves", "24", "--tp", "2"]) == 0
    assert "rank 0  leaves 0..11  sends 2 values per element: [0,8), [8,12)" in capsys.readouterr().out


@pytest.mark.parametrize("leaves", [1, 2])
def test_show_the_smallest_trees(leaves, capsys):
    assert main(["show", "--leaves", str(leaves), "--tp", str(leaves)]) == 0
    assert f"rank {leaves - 1}" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["tpinv.tree_all_reduce", "tpinv.tree_reduce_scatter", "tpinv.row_sum", "torch.cumsum"])
def test_probe_finds_the_promised_order(operation, capsys):
    assert main(["probe", operation, "--leaves", "6", "--tp", "3"]) == 0
    printed = capsys.readouterr().out
    assert "this is the promised order" in printed
    assert all(f"─ {leaf}\n" in "\n".join(line.rstrip() for line in printed.splitlines()) + "\n" for leaf in range(6))


@pytest.mark.parametrize("operation", ["torch.sum", "torch.matmul", "tpinv.matmul", "torch.mv", "all_reduce"])
def test_probe_draws_what_is_not_promised(operation, capsys):
    assert main(["probe", operation, "--leaves", "8", "--tp", "2"]) == 0
    assert "no order is promised here" in capsys.readouterr().out


def test_probe_tells_a_broken_promise(monkeypatch, capsys):
    from tpinv.cli import probe

    build = lambda arguments, pool: {"total": lambda values: values.flip(0).cumsum(0)[-1], "expected": probe._chain(4)}  # noqa: E731
    monkeypatch.setitem(probe.OPERATIONS, "backwards", (build, "a chain from the other end"))
    assert main(["probe", "backwards", "--leaves", "4"]) == 1
    assert "the promised order is (((0, 1), 2), 3)" in capsys.readouterr().out


def test_verify(fake, tmp_path, capsys):
    """The JSON file is what issue 2 says, key by key; the picture is a PNG."""
    rows, picture = tmp_path / "rows.json", tmp_path / "map.png"
    assert fake("--sequence-parallel", "--steps", 2, "--json", rows, "--plot", picture) == 0
    printed = capsys.readouterr().out
    assert "tpinv: the same bytes in all 16 comparisons; stock layers: 4 of them differ" in printed
    assert "stock TP=4 SP: 1 of 4 differ" in printed and "tpinv TP=4 SP: 0 of 4 differ" in printed  # as they come: there is no terminal
    assert "final/weight  (3 ulp; at most 3 anywhere)" in printed
    result = json.loads(rows.read_text())
    assert result.keys() == {"fingerprint", "ok", "rows"}
    assert result["fingerprint"] == FINGERPRINT.format(8) and result["ok"] is True
    assert all(row.keys() == ROW for row in result["rows"])
    layouts = [(1, False), (2, False), (2, True), (4, False), (4, True)]
    assert [(row["layers"], row["tp"], row["sp"]) for row in result["rows"]] == [(n, *at) for n in ("stock", "tpinv") for at in layouts]
    stock = {"layers": "stock", "tp": 4, "sp": True, "tensors": 4, "differing": 1, "first_difference": "final/weight", "max_ulp": 3}
    assert result["rows"][4] == {**stock, "losses": [2.0, 1.0]}
    assert result["rows"][9] == {**stock, "layers": "tpinv", "differing": 0, "first_difference": None, "max_ulp": 0, "losses": [2.0, 1.0]}
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_verify_fails_when_stock_does_not_differ(fake, tmp_path, capsys):
    """A comparison that cannot fail proves nothing."""
    rows, picture = tmp_path / "rows.json", tmp_path / "map.png"
    assert fake("--tied", "--json", rows, "--plot", picture) == 2, "1 means that bytes differ, and they do not"
    assert "the stock layers do not differ either, so this run proves nothing" in capsys.readouterr().err
    assert json.loads(rows.read_text())["ok"] is False
    assert picture.stat().st_size > 5000, "a picture without a difference in it"


@pytest.mark.parametrize("options", [["--qk-norm"], ["--qk-norm", "--tied"]])
def test_verify_fails_when_tpinv_differs(options, fake, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    assert fake(*options, "--json", rows) == 1
    assert "tpinv differs: this is a bug" in capsys.readouterr().out
    result = json.loads(rows.read_text())
    assert result["ok"] is False and [row["differing"] for row in result["rows"] if row["layers"] == "tpinv"] == [0, 1, 1]


def test_verify_refuses_an_unfair_start(fake, capsys):
    assert fake("--micro-batches", 2) == 2
    assert "stock TP=4 did not start from the weights of TP=1: ['initial/weight']" in capsys.readouterr().err


def test_verify_refuses_to_compare_other_tensors(fake, capsys):
    assert fake("--micro-batches", 3) == 2
    assert "stock TP=4 recorded other tensors than TP=1: ['another']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("show --leaves 99999999999", "is a tree too wide to draw; show at most 4096"),
        ("show --leaves 0", "leaves=0 must be an int of at least 1"),
        ("show --leaves 8 --tp 3", "3 ranks do not divide leaves=8"),
        ("show --tp 0", "0 ranks"),
        ("show --node-dtype float64", "float64"),
        ("probe torch.prod", "operation 'torch.prod' is unknown; use one of torch.sum, "),
        ("probe tpinv.tree_all_reduce --tp 3", "3 ranks do not divide leaves=8"),
        ("probe tpinv.tree_all_reduce --tp 0", "0 ranks"),
        ("probe torch.sum --leaves 0", "0"),
        ("probe torch.sum --leaves 1000", "1000"),
        ("verify --tp two", "--tp 'two' must be integers separated by commas, such as 1,2,4,8"),
        ("verify --plot rows.xyz", "--plot rows.xyz must end in one of"),
        ("verify --tp 1", "--tp '1' must name at least one size above 1"),
        ("verify --tp 0,2", "--tp '0,2' must name"),
        ("verify --tp 1,3", "3 ranks do not divide leaves=8"),
        ("verify --steps 0", "--steps 0 and --micro-batches 1 must be at least 1"),
        ("verify --json nowhere/rows.json", "--json nowhere/rows.json cannot be written: there is no directory nowhere"),
        ("verify --plot nowhere/map.png", "--plot nowhere/map.png cannot be written: there is no directory nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"tpinv {arguments.split()[0]}: ") and message in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_a_framework_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(verify_module.FRAMEWORKS, "megatron", "a_framework_that_is_not_there")
    assert main(["verify"]) == 2
    assert "pip install 'tpinv[megatron]'" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_the_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["verify", "--plot", str(tmp_path / "map.png")]) == 2
    assert "pip install 'tpinv[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["train"], ["verify", "--dtype", "fp8"], ["show", "--leaves", "many"]])
def test_what_cannot_be_parsed_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and "usage: tpinv" in capsys.readouterr().err


def test_as_a_module():
    refused = subprocess.run([sys.executable, "-m", "tpinv", "show", "--leaves", "0"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "leaves=0" in refused.stderr

"""Exit status 1 says that bytes differ and nothing else does; any other trouble is status 2 with one line on stderr, Ctrl-C is 130."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tpinv.cli import diff as diff_module
from tpinv.cli import main
from tpinv.cli import verify as verify_module
from tpinv.testing import record


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    # The first pool of this process starts the fork server, which imports what any pool of these tests has named: Megatron warns there.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")


@pytest.fixture
def fake(monkeypatch):
    """``tpinv verify`` on a framework that trains nothing (tests/fake_framework.py)."""
    monkeypatch.setitem(verify_module.FRAMEWORKS, "megatron", "fake_framework")
    return lambda *arguments: main(["verify", "--tp", "2", "--steps", "1", *map(str, arguments)])


@pytest.fixture
def untrained(monkeypatch):
    """Fails if anything is trained: whatever is wrong shall be said before the work."""

    def trained(*_, **__):
        raise AssertionError("it was trained")

    monkeypatch.setattr(verify_module, "_compare_all", trained)


def one_line(capsys, command: str) -> str:
    said = capsys.readouterr().err
    assert said.startswith(f"tpinv {command}: ") and said.count("\n") == 1 and len(said) < 600, said
    return said


def a_recording(path, ranks: int = 1, **fields):
    """A recording of a linear, on as many ranks as asked for, all of one run, with ``fields`` set."""
    for rank in range(ranks):
        torch.manual_seed(0)
        linear = nn.Linear(4, 4)
        recorder = record(linear, f"{path}-{rank}")
        linear(torch.ones(2, 4)).sum().backward()
        recorder.run, recorder.rank, recorder.ranks = "this run", rank, ranks
        recorder.close()
        os.makedirs(path, exist_ok=True)
        os.rename(f"{path}-{rank}/rank{rank}.pt", f"{path}/rank{rank}.pt")
    for name, value in fields.items():
        edit(f"{path}/rank0.pt", **{name: value})
    return path


def edit(file: str, drop: str | None = None, **fields) -> None:
    recording = torch.load(file, weights_only=True) | fields
    recording.pop(drop, None)
    torch.save(recording, file)


# -- outputs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["json", "plot"])
def test_outputs_are_tried_before_the_work(option, untrained, capsys):
    os.mkdir("directory.png")
    assert main(["verify", f"--{option}", "directory.png"]) == 2
    assert f"--{option} directory.png cannot be written: it is a directory" in one_line(capsys, "verify")
    assert main(["verify", f"--{option}", ""]) == 2
    assert "it has no name" in one_line(capsys, "verify")
    assert main(["verify", f"--{option}", "x" * 300 + ".png"]) == 2
    assert "File name too long" in one_line(capsys, "verify")
    assert os.listdir() == ["directory.png"], "trying leaves nothing behind"


def test_two_outputs_in_one_file(untrained, capsys):
    assert main(["verify", "--json", "map.png", "--plot", "./map.png"]) == 2
    assert "--json and --plot are one file" in one_line(capsys, "verify")


def test_a_full_disk(fake, capsys):
    """/dev/full takes every open and no byte. The table was printed; the status is not that of bytes that differ."""
    assert fake("--json", "/dev/full") == 2
    assert "No space left on device" in one_line(capsys, "verify")
    a = a_recording("a")
    assert main(["diff", a, a, "--json", "/dev/full"]) == 2
    assert "No space left on device" in one_line(capsys, "diff")


def test_a_full_disk_is_seen_before_the_work(untrained, monkeypatch, capsys):
    class Full:
        def __init__(self, **_):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", Full)
    assert main(["verify", "--json", "rows.json"]) == 2
    assert "--json rows.json cannot be written: No space left on device" in one_line(capsys, "verify")


def test_a_file_is_left_as_it_is_until_there_is_a_new_one(untrained):
    Path("rows.json").write_text("of the last run")
    assert main(["verify", "--json", "rows.json"]) == 2, "untrained stops it after the check"
    assert Path("rows.json").read_text() == "of the last run" and os.listdir() == ["rows.json"]


# -- numbers --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("verify --num-layers -1", "--num-layers -1 must be at least 1"),
        ("verify --num-layers 0", "--num-layers 0 must be at least 1"),
        ("verify --hidden -5", "--hidden -5 must be at least 1"),
        ("verify --timeout -1", "--timeout -1 must be a positive number of seconds"),
        ("verify --timeout nan", "--timeout nan must be"),
        ("verify --timeout inf", "--timeout inf must be"),
        ("verify --micro-batches 0", "--micro-batches 0 must be at least 1"),
        ("verify --tp 0", "--tp '0' must name at least one size above 1, and none below 1"),
        ("verify --tp 2,2", "--tp '2,2' names a size twice"),
        ("verify --tp 2,-4", "none below 1"),
        ("verify --tp 1.5", "must be integers"),
        ("verify --leaves 0", "leaves=0 must be an int of at least 1"),
        ("verify --tp 1,3", "3 ranks do not divide leaves=8"),
        ("verify --framework plain", "--framework plain has no model of its own"),
        ("verify --framework torchtitan --recompute", "--recompute cannot be chosen for torchtitan"),
        ("show --leaves -1", "leaves=-1"),
        ("show --leaves 8 --tp -2", "-2 ranks"),
        ("probe torch.sum --leaves -1", "leaves=-1"),
        ("doctor --leaves 0", "leaves=0"),
        ("doctor --tokens -1", "--tokens -1 must be at least 1"),
        ("diff a a --rows -1", "--rows -1 must be at least 0"),
    ],
)
def test_numbers_that_no_run_has(arguments, message, untrained, monkeypatch, capsys):
    a_recording("a")
    if "torchtitan" in arguments:
        pytest.importorskip("torchtitan")
        monkeypatch.undo()
        monkeypatch.setattr("tpinv.testing.RankPool.run", lambda *_, **__: pytest.fail("it was trained"))
    assert main(arguments.split()) == 2
    assert message in one_line(capsys, arguments.split()[0])


# -- packages, interrupts, failing ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["verify", "diff a a", "show", "probe", "leaves --tp 2"])
def test_without_rich(command, monkeypatch, capsys):
    name = f"tpinv.cli.{command.split()[0]}"
    for module in [name, "rich", *(loaded for loaded in sys.modules if loaded.startswith("rich."))]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(command.split()) == 2
    assert "rich" in one_line(capsys, command.split()[0])


def test_without_numpy(monkeypatch, capsys):
    """matplotlib cannot be imported then: said before the work."""
    for module in [loaded for loaded in sys.modules if loaded.partition(".")[0] in ("numpy", "matplotlib")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "numpy", None)
    a_recording("a")
    assert main(["diff", "a", "a", "--plot", "map.png"]) == 2
    assert "--plot needs matplotlib" in one_line(capsys, "diff")


def test_an_error_that_nobody_expected(monkeypatch, capsys):
    def broken(_):
        raise KeyError("digest")

    monkeypatch.setattr(diff_module, "Run", broken)
    assert main(["diff", "a", "a"]) == 2
    assert "unexpected KeyError: 'digest'; --traceback shows where" in one_line(capsys, "diff")
    assert main(["diff", "a", "a", "--traceback"]) == 2
    assert 'raise KeyError("digest")' in capsys.readouterr().err


def test_doctor_of_vllm_is_about_no_bytes(monkeypatch, capsys):
    doctor = pytest.importorskip("tpinv.integrations.vllm.doctor")
    monkeypatch.setattr(doctor, "findings", lambda: [(False, "no plugin")])
    assert main(["doctor", "--vllm"]) == 2
    assert "vLLM would not run on tpinv here" in one_line(capsys, "doctor")


def test_nobody_reads_the_output(monkeypatch, capsys):
    """``tpinv show | head``: rich would leave with status 1."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["show", "--leaves", "512"]) == 2
    monkeypatch.undo()
    assert capsys.readouterr().err == "tpinv show: nobody reads the output any more\n"


def test_a_rank_of_another_command_that_fails(monkeypatch, capfd):
    """Not verify's: the pool's own message holds a traceback."""
    from tpinv.cli import probe

    monkeypatch.setitem(probe.OPERATIONS, "broken", (lambda arguments, pool: pool.run(divide, 2), "a rank that fails"))
    assert main(["probe", "broken"]) == 2
    said = capfd.readouterr().err
    assert "raised ZeroDivisionError: division by zero; --traceback shows where" in said and said.count("\n") == 1, said


def divide() -> float:
    return 1 / (torch.distributed.get_rank() - 1)


def test_ctrl_c(fake, capfd):
    """The signal reaches the parent while ranks train (here: sleep)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        assert fake("--steps", 600, "--micro-batches", 4, "--timeout", 30) == 130
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    said = capfd.readouterr().err
    assert said == "tpinv verify: interrupted\n"


def test_a_failed_rank_is_one_line(fake, capfd):
    """Rank 1 raises while rank 0 waits for it: nobody's traceback, nobody's broken pipe."""
    assert fake("--micro-batches", 5) == 2
    said = capfd.readouterr().err
    assert "rank 1 of stock TP=2: ZeroDivisionError in train (fake_framework.py:" in said and said.count("\n") == 1, said


def test_a_run_that_takes_too_long(fake, capfd):
    assert fake("--steps", 600, "--micro-batches", 4, "--timeout", 2) == 2
    said = capfd.readouterr().err
    assert "did not finish within 2.0 s" in said and said.count("\n") == 1


# -- recordings -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["run", "rank", "ranks", "fingerprints", "versions", "events", "tensors"])
def test_a_recording_with_a_missing_key(key, capsys):
    a_recording("a"), a_recording("b")
    edit("b/rank0.pt", drop=key)
    assert main(["diff", "a", "b"]) == 2
    assert f"b/rank0.pt is damaged: {key} missing" in one_line(capsys, "diff")


@pytest.mark.parametrize("key", ["step", "phase", "module", "tensor", "call", "digest", "shape", "dtype", "mark", "stride"])
def test_an_event_with_a_missing_key(key, capsys):
    a_recording("a"), a_recording("b")
    events = torch.load("b/rank0.pt", weights_only=True)["events"]
    del events[0][key]
    edit("b/rank0.pt", events=events)
    assert main(["diff", "a", "b"]) == 2
    assert f"b/rank0.pt is damaged: an event has no proper '{key}'" in one_line(capsys, "diff")


def test_files_that_are_no_recordings(capsys):
    a_recording("a")
    for name, write in (("empty", b""), ("text", b"rows"), ("cut", Path("a/rank0.pt").read_bytes()[:500])):
        os.mkdir(name)
        Path(name, "rank0.pt").write_bytes(write)
        assert main(["diff", "a", name]) == 2
        assert f"{name}/rank0.pt cannot be read as a recording" in one_line(capsys, "diff")
    os.makedirs("directory/rank0.pt")
    assert main(["diff", "a", "directory"]) == 2
    one_line(capsys, "diff")


def test_swapped_ranks(capsys):
    a_recording("a", 2), a_recording("b", 2)
    os.rename("b/rank0.pt", "b/rank"), os.rename("b/rank1.pt", "b/rank0.pt"), os.rename("b/rank", "b/rank1.pt")
    assert main(["diff", "a", "b"]) == 2
    assert "b/rank0.pt was written by rank 1: files were renamed or swapped" in one_line(capsys, "diff")


@pytest.mark.parametrize(
    "field, value, message", [("run", "another", "is of another run than"), ("ranks", 4, "is of another number of ranks than")]
)
def test_files_of_other_runs(field, value, message, capsys):
    a_recording("a", 2), a_recording("b", 2)
    edit("b/rank1.pt", **{field: value})
    assert main(["diff", "a", "b"]) == 2
    assert f"b/rank1.pt {message}" in one_line(capsys, "diff")


def test_other_fingerprints(capsys):
    """Orders that cannot agree are refused; stock layers, which have none, can be compared with anything."""
    a_recording("a", fingerprints=["tpinv1-rfc6962-L8-float32"]), a_recording("b", fingerprints=["tpinv1-rfc6962-L4-float32"])
    assert main(["diff", "a", "b"]) == 2
    assert "a and b add in different orders and cannot agree: tpinv1-rfc6962-L8-float32 and" in one_line(capsys, "diff")
    a_recording("stock")
    assert main(["diff", "a", "stock"]) == 0


def test_other_versions_are_told(capsys):
    a_recording("a"), a_recording("b", versions={"torch": "1.0", "tpinv": "0", "device": "cpu"})
    assert main(["diff", "a", "b"]) == 0
    assert "A and B have other versions of torch: " in capsys.readouterr().out


def test_a_recording_says_what_it_is_of(tmp_path):
    from tpinv import ColumnParallelLinear, ReductionTree
    from tpinv.contract import fingerprint

    tree = ReductionTree(4)
    with record(ColumnParallelLinear(4, 4, tree=tree), "new"):
        pass
    recording = torch.load("new/rank0.pt", weights_only=True)
    assert recording["fingerprints"] == [fingerprint(tree)] and recording["versions"]["torch"] == str(torch.__version__)
    with record(nn.Linear(4, 4), "other"):
        pass
    assert torch.load("other/rank0.pt", weights_only=True)["run"] != recording["run"]


# -- what differs, and by how much ------------------------------------------------------------------------------------------------------


def outputs(path: str, tensor: torch.Tensor) -> str:
    recorder = record(nn.Identity(), path)
    recorder._add("forward", "m", "output", tensor)
    recorder.close()
    return path


def test_distances_can_rank_tensors(capsys):
    """Near zero and across it there are thousands of millions of floats; of the tensor's own scale they are nothing."""
    a = torch.tensor([1.0, 1e-9, 2.0])
    outputs("a", a), outputs("b", torch.tensor([1.0, -1e-9, 2.0]))
    assert main(["diff", "a", "b", "--json", "rows.json"]) == 1
    first = json.loads(Path("rows.json").read_text())["first"]
    assert 0 < first["max_ulp"] < 0.01 and first["ulp_histogram"] == [1] and first["nonfinite"] == 0
    outputs("c", torch.tensor([1.5, 1e-9, 2.0]))
    assert main(["diff", "a", "c", "--json", "rows.json"]) == 1
    assert json.loads(Path("rows.json").read_text())["first"]["max_ulp"] == 0.5 / 2.0**-22


def test_nan_is_named(capsys):
    outputs("a", torch.tensor([1.0, 3.0, 2.0])), outputs("b", torch.tensor([1.0, torch.nan, 2.0]))
    assert main(["diff", "a", "b", "--json", "rows.json", "--plot", "map.png"]) == 1
    assert "at most NaN or inf in 1 of the largest value" in capsys.readouterr().out
    first = json.loads(Path("rows.json").read_text())["first"]
    assert (first["b"], first["max_ulp"], first["nonfinite"]) == ("nan", 0.0, 1)


def test_verify_names_nan(fake, capsys):
    assert fake("--micro-batches", 6, "--json", "rows.json", "--plot", "map.png") == 0
    assert "final/weight  (NaN or inf in 1, 1 ulp; at most NaN or inf anywhere)" in capsys.readouterr().out
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [row["max_ulp"] for row in rows] == [0.0, "NaN or inf", 0.0, 0.0]

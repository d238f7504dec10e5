"""The tuner's decisions, on a CPU: a stand-in for the GPU computes every launch with the reference and keeps a clock."""

import contextlib
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tpinv import reference
from tpinv.kernels.gemm import sm90, tuner, verification
from tpinv.kernels.gemm import triton_gemm as gemm
from tpinv.kernels.gemm.problem import make_problems
from tpinv.runtime import state
from tpinv.tree import ReductionTree

TREE = ReductionTree(4)


class Gpu:
    """Costs and faults of configurations; one clock that replaying a graph moves on."""

    def __init__(self):
        self.clock, self.wrong, self.fast, self.launched, self.capturing = 0.0, set(), None, [], None

    def launch(self, problem, config, blocks=None, masked=False):
        self.launched.append(config)
        if self.capturing is not None:
            self.capturing.append(config)
        values = reference.tree_product(problem.a, problem.b.t(), TREE, 0, 1)
        root = reference.finish(values, TREE, TREE.subtrees(0, 1), problem.out.dtype)
        problem.out.copy_(problem.out + root if problem.accumulate else root)
        if config in self.wrong and not masked:
            problem.out.neg_()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    gpu = Gpu()

    class Graph:
        def __init__(self):
            self.configs = []

        def replay(self):
            gpu.clock += sum(0.5 if config == gpu.fast else 1.0 for config in self.configs)

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        gpu.capturing = graph.configs
        yield
        gpu.capturing = None

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = gpu.clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setenv("TPINV_CACHE", str(tmp_path))
    for name, value in {
        "is_current_stream_capturing": lambda: False, "get_device_capability": lambda device: (9, 0), "CUDAGraph": Graph,
        "graph": capture, "Event": Event, "synchronize": lambda: None, "get_device_name": lambda device: "a GPU of paper",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(sm90.cuda, "missing", lambda name: None)
    monkeypatch.setattr(sm90, "compile_ahead", lambda macros: None)
    monkeypatch.setattr(verification, "launch", gpu.launch)
    state.clear()
    yield gpu
    state.clear()


def forget():
    state.device_state(None).choices.clear()


def problem(rows=40, start=0, length=128):
    k = 4 * length
    x, w = torch.randn(rows, 1024).bfloat16()[:, start : start + k], torch.randn(72, k).bfloat16()
    out = torch.full((1, rows, 72), float("nan"), dtype=torch.bfloat16)
    return make_problems(x, w, out, None, TREE, 0, 1, 1, "ieee")[0]


def test_the_fastest_is_chosen_and_remembered(gpu, monkeypatch):
    for gpu.fast in tuner.candidates(problem())[::2]:
        monkeypatch.setattr(tuner, "_path", lambda device, name=gpu.fast.name: tuner.cuda.cache_dir() / name)
        p = problem()
        tuner.run(p)
        assert tuner.choice(p) == gpu.fast and not p.out.isnan().any()
        gpu.launched.clear()
        tuner.run(problem())
        assert gpu.launched == [gpu.fast]  # no second tuning
        forget()
        slower, gpu.fast = gpu.fast, None
        tuner.run(problem())
        assert tuner.choice(problem()) == slower  # from the disk
        assert [row["config"] for row in tuner.table(None).values()] == [slower.name]
        forget()


def test_other_bits_are_struck_off(gpu):
    gpu.fast, *rest = tuner.candidates(problem())
    gpu.wrong = {gpu.fast}
    tuner.run(p := problem())
    assert tuner.choice(p) in rest
    assert len(verification.struck_off()) == 1 and verification.struck_off()[0].startswith(gpu.fast.name)


def test_when_all_disagree_the_canonical_configuration_runs(gpu):
    gpu.wrong = set(tuner.candidates(problem()))
    tuner.run(p := problem())
    assert tuner.choice(p) == gemm.CANONICAL


@pytest.mark.parametrize("faulty", [False, True])
def test_choosing_adds_nothing_to_the_callers_sums(gpu, faulty):
    """However many candidates were verified and timed, one launch added to them; and those that add wrongly are found out."""
    p = replace(problem(), out=torch.randn(40, 72), accumulate=True)
    gpu.fast, *rest = tuner.candidates(p)
    gpu.wrong = {gpu.fast} if faulty else set()
    before, root = p.out.clone(), torch.zeros(40, 72)
    gpu.launch(replace(p, out=root), gemm.CANONICAL)
    tuner.run(p)
    assert torch.equal(p.out, before + root) and len(gpu.launched) > 4 * len(rest)
    assert (tuner.choice(p) in rest) == faulty
    assert tuner.choice(replace(p, accumulate=False)) is None, "a choice of its own"


def test_without_timing_the_first_verified_one_is_taken(gpu, monkeypatch):
    monkeypatch.setenv("TPINV_TUNE", "0")
    first, second, *_ = tuner.candidates(problem())
    gpu.wrong = {first}
    tuner.run(p := problem())
    assert tuner.choice(p) == second


def test_fewer_rows_borrow_what_many_had_timed(gpu, monkeypatch):
    monkeypatch.setenv("TPINV_TUNE", "largest")
    options = tuner.candidates(problem(rows=2000))
    gpu.fast = options[-1]
    tuner.run(problem(rows=2000))
    timed = len(gpu.launched)
    gpu.fast = options[0]  # which timing would find
    for rows in (1500, 600):
        gpu.launched.clear()
        tuner.run(problem(rows=rows))
        assert gpu.launched == [options[-1]] and tuner.choice(problem(rows=rows)) is None
    for rows in (300, 200):  # too few for that: timed
        gpu.launched.clear()
        tuner.run(problem(rows=rows))
        assert tuner.choice(problem(rows=rows)) == gpu.fast and timed > len(options)
    monkeypatch.setenv("TPINV_TUNE", "1")
    tuner.run(problem(rows=1500))
    assert tuner.choice(problem(rows=1500)) == gpu.fast


def test_a_kernel_that_errs_only_without_masks_is_struck_off(gpu, monkeypatch):
    """Leaves of 128 are whole steps, whose loads have no masks: another kernel than the one for ragged leaves."""
    monkeypatch.setenv("TPINV_TUNE", "0")
    monkeypatch.setattr(tuner, "candidates", gemm.candidates)
    first, second, *_ = gemm.candidates(problem())
    right = gpu.launch

    def launch(problem, config, blocks=None, masked=False):
        right(problem, config, blocks, masked)
        if config == first and not masked and problem.length % config.k == 0:
            problem.out.neg_()

    monkeypatch.setattr(verification, "launch", launch)
    tuner.run(p := problem())
    assert tuner.choice(p) == second
    tuner.run(p := problem(length=120))
    assert tuner.choice(p) == first


def test_a_capture_neither_tunes_nor_runs_what_was_not_verified(gpu, monkeypatch):
    verified, *_ = tuner.candidates(problem())[1:]
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="run the model once before capturing"):
            tuner.run(problem())
        assert not gpu.launched
    assert verification.verify(problem(), verified)
    gpu.launched.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="before capturing"):
        tuner.run(p := problem())
    assert gpu.launched == [verified] and tuner.choice(p) is None
    with pytest.raises(RuntimeError, match="run the model once before capturing"):
        tuner.run(problem(start=1))  # another kernel than the one that was verified


def test_where_even_the_canonical_configuration_depends_on_the_layout(gpu):
    gpu.wrong = {*tuner.candidates(problem()), gemm.CANONICAL}
    with pytest.raises(RuntimeError, match="no kernel computes .* with one set of bytes on this GPU"):
        tuner.run(problem())


def test_a_choice_is_for_its_addresses_and_strides(gpu):
    """x that starts in the middle of 16 bytes cannot go where an aligned x of the same shape went."""
    gpu.fast = tuner.candidates(problem())[0]
    tuner.run(problem())
    tuner.run(p := problem(start=1))
    assert isinstance(gpu.fast, sm90.Sm90Config) and isinstance(tuner.choice(p), gemm.TritonConfig)


def test_the_probe_shows_another_order_in_bf16(gpu):
    """Half of its rows cancel: there nearly every element is a rounding error, which depends on the order."""
    probe = verification.make_probe(problem(), gemm.CANONICAL)
    k = probe.a.shape[1]
    chain = probe.a.float() @ probe.b.float().t()
    halves = sum(probe.a[:, i : i + k // 8].float() @ probe.b[:, i : i + k // 8].float().t() for i in range(0, k, k // 8))
    assert (chain.bfloat16() != halves.bfloat16())[1::2].float().mean() > 0.5
    assert chain.isfinite().all()


def test_numbers_of_rows_share_choices(gpu):
    same = lambda *rows: len({tuner._shape_class(problem(r)) for r in rows}) == 1  # noqa: E731
    assert same(1, 16) and same(17, 32) and same(100, 128) and same(129, 200, 256)
    assert not same(16, 17) and not same(128, 129) and not same(256, 257)

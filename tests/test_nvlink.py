"""The collectives over shared memory, as far as no GPU is needed: the order on symbols, what all ranks decide alike, and that the
sources compile. test_nvlink_gpu.py runs them."""

import contextlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hostile import hostile

from tpinv import (
    ReductionTree,
    reduce_add_rms_norm,
    rms_norm,
    row_parallel_add_rms_norm,
    row_parallel_linear,
    tree_all_reduce,
    tree_reduce_scatter,
)
from tpinv.collectives import nvlink, resolve, schedule, select_all_reduce, symmetric
from tpinv.reference import torch_node_dtype
from tpinv.runtime import cuda
from tpinv.testing import assert_bitwise_equal, run_ranks

PAIRS = [(leaves, p) for leaves in (1, 2, 3, 4, 5, 6, 8, 12, 20, 24, 40, 56) for p in range(2, 17) if leaves % p == 0]


@pytest.mark.parametrize("leaves, p", PAIRS)
def test_the_tables_are_the_rank_part_of_the_tree(leaves, p):
    tree = ReductionTree(leaves)
    nodes = [node for rank in range(p) for node in tree.subtrees(rank, p)]
    expected = tree.finish({node: i for i, node in enumerate(nodes)}, lambda left, right: (left, right))
    merges = schedule.finish_merges(tree, p)
    assert len(merges) == len(nodes) and merges != (0,) * len(merges)
    table, stack = schedule.octal(merges), []
    for value in range(len(merges)):  # finish() of the CUDA source
        stack.append(value)
        for _ in range(table >> 3 * value & 7):
            right = stack.pop()
            stack.append((stack.pop(), right))
    assert stack == [expected]
    first = schedule.first_values(tree, p)
    assert [nodes[first[rank] : first[rank + 1]] for rank in range(p)] == [list(tree.subtrees(rank, p)) for rank in range(p)]


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("p, values", [(2, 2), (2, 4), (3, 3), (6, 6), (8, 8), (8, 16)])
def test_launches_cover_every_slice_and_fit_their_slots(p, values, scatter):
    algorithms = set()
    for packs in (1, 2, 5, 1000, 4099, 65_536, 1 << 20, 5_000_001):
        packs = packs * p if scatter else packs
        for algorithm in (None, "two_shot"):
            plan = schedule.plan(packs, p, values, 8, scatter, algorithm)
            algorithms.add(plan.algorithm)
            covered = [i for start, count in plan.launches for i in (start, start + count)]
            assert covered[0] == 0 and covered[1:-1:2] == covered[2:-1:2] and all(count > 0 for _, count in plan.launches)
            length = plan.launches[0][1]
            if plan.algorithm == "one_shot":
                assert covered == [0, packs // p if scatter else packs] and plan.slice == (packs // p if scatter else 0)
                assert values * length * 32 <= plan.slot_bytes == schedule.INBOX_BYTES
            else:
                assert covered[-1] == plan.slice == -(-packs // p)
                assert max(count for _, count in plan.launches) * values * 16 <= plan.slot_bytes <= schedule.BULK_BYTES
                assert plan.gathered_bytes == (0 if scatter else length * p * 8)
    assert algorithms == {"one_shot", "two_shot"}


def test_words_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit in a slot of 4194304; use two_shot"):
        schedule.plan(1 << 20, 2, 2, 8, False, "one_shot")


def test_a_tree_with_too_many_values_takes_the_process_group():
    assert nvlink.refuses(ReductionTree(56), 8, torch.bfloat16) == "24 subtree values are more than 21"
    assert nvlink.refuses(ReductionTree(24), 8, torch.float64) == "an output of torch.float64"
    assert nvlink.refuses(ReductionTree(24), 8, torch.bfloat16) is None


FACT = symmetric.Facts("host", "gpu0", ("gpu0", "gpu1"), False, 132, "auto", None, None)


def pair(**second):
    return [FACT, symmetric.Facts(**{**vars(FACT), "device": "gpu1", **second})]


def test_the_ranks_decide_alike():
    assert symmetric.decide(pair()) == symmetric.Decision("cuda", "every rank can map every other rank's memory", 256)
    for change, reason in (
        ({"off": "TPINV_NVLINK=0"}, "rank 1: TPINV_NVLINK=0"),
        ({"host": "other"}, "the ranks are on several hosts: ['host', 'other']"),
        ({"device": "gpu0"}, "ranks share a GPU; TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 allows that"),
        ({"reachable": ("gpu1",)}, f"the GPU of rank 1 cannot map the memory of rank 0's, or does not see it: {symmetric._SEE_ALL}"),
        ({"no_cuda": "no NVRTC"}, "rank 1: no NVRTC"),
    ):
        assert symmetric.decide(pair(**change)) == symmetric.Decision(None, reason)
    assert symmetric.decide([FACT] * 17).backend is None
    shared = symmetric.Facts(**{**vars(FACT), "overlap": True})
    assert symmetric.decide([shared] * 8).blocks == 33  # ranks that share a GPU must fit on it together
    for timeout in ("abc", "inf", "0", "nan", "-1"):
        with pytest.raises(ValueError, match=f"TPINV_TIMEOUT is '{timeout}' on rank 1; set it to seconds"):
            symmetric.decide(pair(timeout=timeout))
    zero, one = (symmetric.Facts(**{**vars(shared), "wanted": wanted}) for wanted in "01")
    assert symmetric.decide([zero, zero]) == symmetric.Decision(None, "TPINV_CUDA=0") and symmetric.decide([one, one]).backend == "cuda"
    with pytest.raises(ValueError, match=r"TPINV_CUDA is \['0', 'auto'\] on the ranks of one group"):
        symmetric.decide(pair(wanted="0"))
    with pytest.raises(ValueError, match="TPINV_CUDA=1 asks for csrc/tree_reduce.cu, but rank 0: no NVRTC"):
        symmetric.decide([symmetric.Facts(**{**vars(shared), "wanted": "1", "no_cuda": "no NVRTC"})] * 2)


class Stream:
    """A fake one: an event is its stream's name."""

    def __init__(self, name: str, capturing: bool = False):
        self.cuda_stream, self.capturing, self.waits = name, capturing, []

    def record_event(self):
        return self.cuda_stream

    def wait_event(self, event):
        self.waits.append(event)


def test_turns_are_kept_across_a_capture(monkeypatch):
    current = []

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1].capturing)

    def call(stream):
        with on(stream):
            turns.next(stream)
        return stream

    for open_still in (False, True):  # while the eager call on C is made
        turns = symmetric.Turns()
        a, b, c, d = Stream("A"), Stream("B", True), Stream("C"), Stream("D", True)
        call(a), call(b)
        b.capturing = open_still
        assert call(c).waits == ["A"] and call(c).waits == ["A"]
        assert call(d).waits == (["B"] if open_still else [])
        a.capturing = True
        assert call(a).waits == ["D"]  # not for the eager C


def test_what_a_kernel_reported_is_printed_at_exit():
    """Also when the process ends before the thread that watches looks again."""
    program = """
from tpinv.collectives import symmetric
workspaces = [symmetric.Workspace.__new__(symmetric.Workspace) for _ in range(2)]
for workspace in workspaces:
    workspace.rank, workspace.size, workspace.timeout, workspace._report = 0, 2, 2.0, [0] * 6
    symmetric._watched.append(symmetric.weakref.ref(workspace))
symmetric._start_watching()
for what, workspace in zip((1, 2), workspaces):
    workspace._report = [1, 1, what, 0, 0, 3]
raise RuntimeError("CUDA error: unspecified launch failure")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "unspecified launch failure" in done.stderr
    waited, at_once = done.stdout.splitlines()
    assert "rank 0 of 2 waited 2 s for rank 1" in waited and "two collectives of one group ran at once on rank 0 of 2" in at_once


def no_memory():
    """One rank has none: all ranks are told, and none waits in the rendezvous."""
    import torch.distributed._symmetric_memory as symmetric_memory

    def empty(*_, **__):
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return torch.empty(8)

    symmetric_memory.empty, torch.cuda.synchronize = empty, lambda device: None
    with pytest.raises(RuntimeError, match="rank 1 has no 8 bytes to share: out of memory$"):
        symmetric.Shared(8, resolve(), torch.device("cpu"))


def test_a_scalar_is_selected():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in ((), (0, 3), (3, 0), (2, 3)):
            x = torch.full(shape, -0.0, dtype=dtype)
            assert_bitwise_equal(select_all_reduce(x, torch.tensor(True), resolve()), x)


def compiled():
    """On p gloo ranks: the operator under torch.compile, its fake kernel, and the fused form without a GPU."""
    tree, group = ReductionTree(24), resolve()
    mine = hostile("exponents", (len(tree.subtrees(group.rank, group.size)), 48, 5), torch_node_dtype(tree), group.rank)

    def both(values):
        doubled = values * 2
        return tree_all_reduce(doubled, tree=tree, out_dtype=torch.bfloat16) + 1, tree_reduce_scatter(doubled, tree=tree)

    expected, actual = both(mine), torch.compile(both, fullgraph=True, backend="aot_eager")(mine)
    for name, e, a in zip(("all", "scattered"), expected, actual, strict=True):
        assert_bitwise_equal(a, e, name)
    arguments = (mine, tree.leaves, tree.node_dtype, group.group.group_name, torch.bfloat16)
    for scatter in (False, True):
        torch.library.opcheck(torch.ops.tpinv.tree_reduce.default, (*arguments, scatter))
    residual, weight = torch.randn(48, 5, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.rand(5)
    with torch.inference_mode():
        hidden, normed = reduce_add_rms_norm(mine, residual, weight, 1e-6, tree=tree)
        assert_bitwise_equal(hidden, residual + tree_all_reduce(mine, tree=tree, out_dtype=torch.bfloat16))
        assert_bitwise_equal(normed, rms_norm(hidden, weight, 1e-6, tree=tree))
        x, w = (hostile("normal", shape, torch.bfloat16, group.rank) for shape in ((48, 48 // group.size), (5, 48 // group.size)))
        hidden, normed = row_parallel_add_rms_norm(x, w, residual, weight, 1e-6, tree=tree)
        assert_bitwise_equal(hidden, residual + row_parallel_linear(x, w, tree=tree))
        assert_bitwise_equal(normed, rms_norm(hidden, weight, 1e-6, tree=tree))
    with pytest.raises(ValueError, match=r"values \(\d, 48, 5\), residual \(48, 5\), weight \(4,\) must be"):
        reduce_add_rms_norm(mine, residual, weight[:4], tree=tree)
    weight.requires_grad_()
    for function, arguments in ((reduce_add_rms_norm, (mine, residual, weight)), (row_parallel_add_rms_norm, (x, w, residual, weight))):
        with pytest.raises(ValueError, match="has no gradient; use the separate operations"):
            function(*arguments, tree=tree)
    no_memory()


@pytest.mark.parametrize("p", [2, 6])
def test_compiled(p):
    run_ranks(compiled, p, timeout=120)


def test_the_host_fills_the_struct_that_the_kernel_reads():
    text = cuda.source(symmetric.SOURCE)
    body = re.search(r"struct Params \{(.*?)\n\};", text, re.S).group(1)
    body = re.sub(r"//[^\n]*|\[[^\]]*\]", "", body)
    names = [re.split(r"[\s*]+", part.strip())[-1] for line in body.split(";") if line.strip() for part in line.split(",")]
    assert names == [name for name, _ in nvlink._params_type(4)._fields_]
    assert f"kMaxBlocks = {symmetric.MAX_BLOCKS};" in text
    for name in ("residual", "count", "slot_bytes"):  # 8-byte fields lie where a C compiler puts them
        assert getattr(nvlink._params_type(4), name).offset % 8 == 0


class Pretended(symmetric.Workspace):
    """A workspace of rank 1 of 2 whose bulk memory lies at 1000, then at 2000 ..."""

    def __init__(self):
        self.rank, self.size, self.device, self.blocks = 1, 2, torch.device("cuda", 0), 264
        self.timeout, self.bulk_bytes, self.calls = 9.0, schedule.BULK_BYTES, {}
        self.flags, self.inbox, self._bulk, self._kept = (100, 200), (300, 400), (0, 0, (0, 0)), []
        self.epochs, self.report = torch.ones(1, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)

    def _new(self, size):
        self._kept.append(size)
        return 1000 * len(self._kept), 1000 * len(self._kept) + 1

    def enter(self):
        return 7


def test_a_repeated_collective_launches_what_a_first_one_would(monkeypatch):
    """Addresses are new every time, and those of the workspace when it has grown."""
    launched = []
    monkeypatch.setattr(nvlink, "_function", lambda *names: names[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "launch", lambda *a: launched.append((*a[:5], {n: getattr(a[5], n) for n, _ in a[5]._fields_})))
    tree, workspace = ReductionTree(24), Pretended()
    cases = [((2, 6, 100), torch.bfloat16, True), ((2, 8 << 20), torch.float32, False), ((2, 3, 5), torch.bfloat16, False)]

    def call(workspace, values, out_dtype, scatter, algorithm="two_shot"):
        launched.clear()
        out = nvlink.tree_reduce(workspace, values, tree, out_dtype, scatter, algorithm)
        found = [(*sizes, {n: list(v) if hasattr(v, "__len__") else v for n, v in params.items()}) for *sizes, params in launched]
        for *_, params in found:
            assert params["out"] == out.data_ptr() and (params["values"] == values.data_ptr()) == (values[0].numel() * 4 % 16 == 0)
            params["out"] = params["values"] = params["epochs"] = params["claim"] = params["report"] = None
        return out.shape, found

    for shape, out_dtype, scatter in cases:
        first = call(workspace, torch.zeros(shape), out_dtype, scatter)
        assert first[0] == ((shape[1] // 2, *shape[2:]) if scatter else shape[1:]) and all(f[4] == 7 for f in first[1])
        assert call(workspace, torch.zeros(shape), out_dtype, scatter) == first
    assert len(workspace.calls) == len(cases) and len(workspace._kept) == 2
    grown = call(workspace, torch.zeros(cases[0][0]), *cases[0][1:])
    assert [params["slots"] for *_, params in grown[1]] == [[2000, 2001]]
    fresh = Pretended()
    fresh._bulk = workspace._bulk
    assert call(fresh, torch.zeros(cases[0][0]), *cases[0][1:]) == grown
    assert call(workspace, torch.zeros(cases[0][0]), *cases[0][1:], "one_shot")[1][0][5]["slots"] == [300, 400]
    failing, works = Pretended(), nvlink._Call._prepare
    monkeypatch.setattr(nvlink._Call, "_prepare", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        call(failing, torch.zeros(cases[0][0]), *cases[0][1:])
    monkeypatch.setattr(nvlink._Call, "_prepare", works)
    assert len(call(failing, torch.zeros(cases[0][0]), *cases[0][1:])[1]) == 1  # it is launched after all
    workspace.timeout = 2.0
    assert call(workspace, torch.zeros(cases[0][0]), *cases[0][1:])[1][0][5]["timeout_ns"] == 2_000_000_000


MACROS = [(ReductionTree(8, "bfloat16"), 4, 1), (ReductionTree(24), 3, 2), (ReductionTree(2), 2, 0)]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("tree, p, per_thread", MACROS, ids=str)
def test_the_source_compiles_with_its_own_headers_alone(tree, p, per_thread, tmp_path):
    macros = dict(nvlink._macros(tree, p, torch.bfloat16, per_thread))
    options = [f"-D{name}={value}" for name, value in macros.items()]
    done = subprocess.run(
        [
            "nvcc",
            "-arch=sm_90",
            "-std=c++17",
            "-cubin",
            "-Werror",
            "all-warnings",
            *options,
            "-o",
            tmp_path / "out",
            cuda.source_path(symmetric.SOURCE),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

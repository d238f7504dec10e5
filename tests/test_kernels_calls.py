"""What a repeated call launches is what a first one would: same kernels, same arguments, the new addresses. On pretended GPU functions."""

import contextlib
import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from tpinv.kernels.gemm import calls, sm90, tuner, verification
from tpinv.kernels.gemm import triton_gemm as gemm
from tpinv.kernels.gemm.problem import make_problems
from tpinv.runtime import cuda, state
from tpinv.runtime.launch import entry
from tpinv.tree import ReductionTree

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def launched(monkeypatch):
    """A list of all launches: kernel, sizes, tensor maps, parameters without the addresses of scratch memory."""
    found = []

    def launch(function, *sizes_maps_params):
        *others, params = sizes_maps_params
        copy = sm90._Params.from_buffer_copy(params)
        copy.scratch = copy.parts = copy.arrivals = None
        found.append((function, *others, bytes(copy)))

    def run(p, config, masked=False):
        tensors = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (p.a, p.b, p.out)]
        static = (p.leaves, p.length, p.pieces, p.piece_stride, p.merges, p.splits, p.node_bf16, p.precision, p.accumulate)
        found.append((config, *tensors, p.bias is not None and p.bias.data_ptr(), static))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "missing", lambda source: None)
    monkeypatch.setattr(cuda, "load", lambda *arguments: arguments)
    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "tensor_map", lambda *arguments: arguments)
    monkeypatch.setattr(gemm, "run", run)
    for module, name, value in (
        (verification, "verify", True), (verification, "equal", True), (tuner, "_load", {}), (tuner, "_store", None), (tuner, "compile_ahead", None),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *arguments, value=value: value)
    state.clear()
    kept().multiprocessors = 132
    yield found
    state.clear()


def kept() -> state.DeviceState:
    """Of the pretended GPU, whose tensors are the CPU's."""
    return state.device_state(None)


CASES = {
    "forward": (4096, 512, 1024, "row", BF16, (8, "float32", 0, 1, 1), {}),
    "two values of a rank": (700, 192, 520, "row", FP32, (24, "float32", 1, 4, 1), {}),
    "three, bf16 nodes": (700, 192, 520, "column", BF16, (24, "bfloat16", 1, 4, 1), {}),
    "fused siblings": (300, 256, 264, "column", BF16, (8, "float32", 0, 1, 2), {}),
    "with a bias": (40, 256, 328, "row", BF16, (8, "float32", 0, 1, 1), {"bias": True}),
    "wgrad": (600, 520, 328, "both", FP32, (1, "float32", 0, 1, 1), {"accumulate": True}),
    "wgrad of few features": (40, 520, 136, "both", FP32, (1, "float32", 0, 1, 1), {"accumulate": True}),
}


@pytest.mark.parametrize("pick", [0, -1], ids=["first", "last"])  # candidate: sm90, Triton for few rows
@pytest.mark.parametrize("case", CASES)
def test_a_repeated_call_launches_what_a_first_one_would(case, pick, launched, monkeypatch):
    rows, k, cols, layout, out_dtype, tree, options = CASES[case]
    monkeypatch.setattr(tuner, "_times", lambda problem, configs: {config: config != configs[pick] for config in configs})
    planes = len(ReductionTree(*tree[:2]).subtrees(*tree[2:4]))

    def operands():
        a = torch.zeros(k, rows, dtype=BF16).t() if layout == "both" else torch.zeros(rows, k, dtype=BF16)
        b = torch.zeros(k, cols, dtype=BF16) if layout != "row" else torch.zeros(cols, k, dtype=BF16).t()
        bias = torch.zeros(cols, dtype=out_dtype) if options.get("bias") else None
        return a, b, torch.zeros(planes, rows, cols, dtype=out_dtype), bias

    several = [operands() for _ in range(3)]  # all alive, so at other addresses
    accumulate = options.get("accumulate", False)
    for arguments in several:
        launched.clear()
        calls.run(*arguments, *tree, "ieee", accumulate)
    repeated = list(launched)
    launched.clear()
    a, b, out, bias = arguments
    for problem in make_problems(a, b.t(), out, bias, ReductionTree(*tree[:2]), *tree[2:], "ieee"):
        problem = dataclasses.replace(problem, accumulate=accumulate)
        verification.launch(problem, tuner.choice(problem))
    assert repeated == launched and len(launched) == planes
    assert len(kept().calls) == 1


def test_a_call_is_kept_for_its_shapes_strides_and_alignments(launched, monkeypatch):
    monkeypatch.setattr(tuner, "_times", lambda problem, configs: {config: 0.0 for config in configs})
    storage, w = torch.zeros(65 * 520, dtype=BF16), torch.zeros(264, 512, dtype=BF16).t()
    call = lambda x: calls.run(x, w, torch.zeros(1, len(x), 264, dtype=BF16), None, 8, "float32", 0, 1, 1, "ieee")  # noqa: E731
    for x in (storage[: 64 * 512].view(64, 512), storage[4 : 4 + 64 * 512].view(64, 512), storage.view(65, 520)[:64, :512]):
        call(x)
    assert len(kept().calls) == 3
    kinds = [isinstance(launches[0].config, sm90.Sm90Config) for launches in kept().calls.values()]
    assert kinds == [True, False, True]  # copies need 16 bytes


def test_forgotten_choices_and_captures(launched, monkeypatch):
    """New choices are asked for; a capture that meets a new shape keeps nothing."""
    monkeypatch.setattr(tuner, "_times", lambda problem, configs: {config: 0.0 for config in configs})
    x, w = torch.zeros(64, 512, dtype=BF16), torch.zeros(264, 512, dtype=BF16).t()
    call = lambda: calls.run(x, w, torch.zeros(1, 64, 264, dtype=BF16), None, 8, "float32", 0, 1, 1, "ieee")  # noqa: E731
    call()
    kept().forget()
    call()
    assert len(kept().choices) == 1
    kept().forget()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the model once before capturing"):
        call()
    monkeypatch.setattr(verification, "known", lambda problem, config: isinstance(config, gemm.TritonConfig))
    with pytest.warns(UserWarning, match="meets a new shape while a CUDA graph is captured"):
        call()
    assert not kept().calls and isinstance(launched[-1][0], gemm.TritonConfig)


class Jit:
    """What Triton's decorator returns: compiles at the first launch with arguments of a kind, and knows its signature."""

    arg_names = ["x_ptr", "y_ptr", "rows", "length", "eps", "BLOCK", "CENTER"]
    do_not_specialize = ["length"]

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return Compiled()

        class Compiled:
            def __getitem__(_, grid):
                return lambda *arguments, stream: self.launched.append((grid, arguments, stream))

        return run


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: (device, "stream"), raising=False)


def test_a_triton_kernel_is_bound_once(device):
    jit = Jit()
    kernel, x, y = entry(jit), torch.zeros(64), torch.zeros(64)
    for eps in (0.1, 0.2):
        kernel[7, 2](x, y, 5, 6, eps, BLOCK=64, CENTER=False, num_warps=4)
    assert jit.compiled == [((7, 2), (x, y, 5, 6, 0.1), {"BLOCK": 64, "CENTER": False, "num_warps": 4})]
    assert jit.launched == [((7, 2, 1, 1), (x.data_ptr(), y.data_ptr(), 5, 6, 0.2, 64, False), (3, "stream"))]
    assert kernel.arg_names is jit.arg_names


def test_a_triton_kernel_is_bound_for_each_kind_of_arguments(device, monkeypatch):
    """Whatever Triton might specialize on: a number (unless it is told not to), an alignment, a dtype, a constant, an option, a device."""
    jit, x = Jit(), torch.zeros(64)
    kernel = entry(jit)

    def launch(x=x, rows=5, length=7, eps=0.1, **constants):
        kernel[(1,)](x, x, rows, length, eps, **{"BLOCK": 64, "CENTER": False, "num_warps": 4} | constants)

    kinds = [{}, {"rows": 1}, {"rows": 16}, {"x": x[1:]}, {"x": x.bfloat16()}, {"x": None}, {"eps": 1}, {"length": 1 << 31}]
    kinds += [{"CENTER": True}, {"BLOCK": 32}, {"num_warps": 8}]
    for _ in range(2):
        for kind in kinds:
            launch(**kind)
    assert len(jit.compiled) == len(jit.launched) == len(kinds)
    launch(length=16)
    assert len(jit.compiled) == len(kinds)
    with monkeypatch.context() as instrumented:
        instrumented.setattr(knobs.compilation, "instrumentation_mode", "proton")
        launch()
        assert len(jit.compiled) == len(kinds) + 1
    launch()
    assert len(jit.compiled) == len(kinds) + 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 4)
    launch()
    assert len(jit.compiled) == len(kinds) + 2
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 0)  # what is kept of tensors elsewhere must not serve
    launch()
    assert len(jit.compiled) == len(kinds) + 3


def test_a_triton_kernel_whose_constants_have_no_names_is_refused(device):
    with pytest.raises(TypeError, match=r"wants \['BLOCK', 'CENTER'\] by name, got \['CENTER'\]"):
        jit = Jit()
        jit.fn = test_a_triton_kernel_is_bound_once
        entry(jit)[(1,)](torch.zeros(1), torch.zeros(1), 1, 2, 1.0, CENTER=False)


def test_nothing_is_kept_where_nothing_is_compiled():
    """Triton's interpreter, on a CPU."""
    jit = Jit()
    for _ in range(2):
        entry(jit)[(1,)](torch.zeros(1), torch.zeros(1), 1, 2, 1.0, BLOCK=1, CENTER=False)
    assert len(jit.compiled) == 2 and not jit.launched


def test_dynamo_leaves_a_launch_alone():
    """It must not take what it cannot trace there for an error of the user's."""
    kernel = entry(Jit())

    def function(x):
        y = x * 2
        try:
            kernel[(1,)](y, y, 1, 2, 1.0, BLOCK=1, CENTER=False)
        except TypeError:
            return y * 0
        return y.cos()

    x = torch.ones(3)
    assert torch.equal(torch.compile(function, backend="eager")(x), (x * 2).cos())

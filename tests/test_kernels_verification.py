"""What is verified is what runs: everything compiled into a kernel is in the key, and the probe has all of it in common with the problem."""

import itertools
import random
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tpinv.kernels.gemm import sm90, tuner, verification
from tpinv.kernels.gemm import triton_gemm as gemm
from tpinv.kernels.gemm.problem import Problem, make_problems
from tpinv.runtime import cuda
from tpinv.runtime.launch import kind
from tpinv.tree import ReductionTree

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# What differs between launches and is not in the key of what was verified, with the reason why it need not be.
NOT_COMPILED_IN = {
    "parts_ptr": "memory of torch's allocator, always aligned, or out_ptr",
    "arrivals_ptr": "counters of the device, always aligned, or out_ptr",
    "merges_ptr": "a table of the device, always aligned; its entries are in numerics()",
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cuda, "missing", lambda name: None)


def operand(rows, k, dtype, layout, shift, pad):
    """A view [rows, k] in one of many layouts, ``shift`` elements after an aligned address."""
    size = (rows + pad) * (2 * k + pad) + 64
    flat = torch.zeros(size if layout != "wide" else 2 * size, dtype=dtype)[shift:]
    if layout == "row":
        return flat.as_strided((rows, k), (k + pad, 1))
    if layout == "column":
        return flat.as_strided((rows, k), (1, rows + pad))
    if layout == "wide":
        return flat.as_strided((rows, k), (2 * k + pad, 2))
    return flat.as_strided((rows, k), (0, 1))  # one row, expanded


def problem(
    rows=40, cols=72, length=136, leaves=8, pieces=1, dtype=BF16, out_dtype=BF16, layouts=("row", "row"), shift=0, pad=0, bias=False,
    out_pad=0, accumulate=False, node="float32", precision="ieee",
) -> Problem:  # fmt: skip
    k = leaves * length * pieces
    a, b = (operand(n, k, dtype, layout, shift, pad) for n, layout in zip((rows, cols), layouts, strict=True))
    out = torch.zeros(1, rows * (cols + out_pad) + 16, dtype=out_dtype)[:, shift:].as_strided((1, rows, cols), (1, cols + out_pad, 1))
    bias = torch.zeros(cols + 8, dtype=out_dtype)[shift : shift + cols] if bias else None
    (made,) = make_problems(a, b, out, bias, ReductionTree(leaves, node), 0, 1, pieces, precision)
    return replace(made, accumulate=accumulate)


def every(p: Problem):
    return [gemm.canonical(p), *tuner.candidates(p), *gemm.candidates(p)]


def test_everything_compiled_in_is_in_the_key():
    p = problem(bias=True)
    options = ("num_warps", "num_stages")
    names = {name for name, _ in gemm.compiled(p, gemm.CANONICAL)}
    assert gemm.tree_gemm_kernel.do_not_specialize == gemm._ANY_NUMBER
    assert names | NOT_COMPILED_IN.keys() == {*gemm.tree_gemm_kernel.arg_names, *options} and not names & NOT_COMPILED_IN.keys()
    legend = re.search(r"with these macros:\n(.*?)\n\n", cuda.source(sm90.SOURCE), re.S).group(1)
    config = sm90.candidates(p)[0]
    assert {name for name, _ in sm90.compiled(p, config)} == set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", legend))
    assert verification._key(p, config)[-1] == sm90.compiled(p, config)


def test_what_triton_compiles_in_of_an_argument_follows_from_its_kind():
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    storage = torch.zeros(64)
    tensors = [x[i:] for x in (storage, storage.bfloat16(), storage.half()) for i in (0, 1, 4, 8)]
    numbers = [0, 1, 2, 15, 16, 17, 48, 2**31 - 1, 2**31, 2**31 + 16, 2**31 + 1, 2**40]
    for specialized in (True, False):
        seen: dict = {}
        for argument in tensors + numbers:
            if isinstance(argument, int) or specialized:
                seen.setdefault(kind(argument, specialized), set()).add(
                    native_specialize_impl(CUDABackend, argument, False, specialized, True)
                )
        assert all(len(kinds) == 1 for kinds in seen.values()), seen


CHANGES = [
    {"length": 192}, {"length": 144}, {"pad": 3}, {"layouts": ("column", "row")}, {"layouts": ("row", "column")}, {"layouts": ("wide", "row")},
    {"shift": 1}, {"bias": True}, {"dtype": FP16, "out_dtype": FP16}, {"out_dtype": FP32}, {"out_pad": 8}, {"pieces": 2}, {"leaves": 4},
    {"node": "bfloat16"}, {"dtype": FP32, "out_dtype": FP32, "precision": "tf32"}, {"cols": 1}, {"length": 1}, {"accumulate": True, "out_dtype": FP32},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_kernel_is_another_key(change):
    """One verdict must not serve both; and where Triton's code differs, one choice must not either."""
    one, other = problem(), problem(**change)
    config = gemm.TritonConfig(64, 64, 64, 4, 3)
    assert verification._key(one, config) != verification._key(other, config)
    assert tuner._shape_class(one) != tuner._shape_class(other)


def test_masks_are_in_the_key():
    """A leaf of 320 is a whole number of steps of 64, and not of 128."""
    p = problem(length=320)
    masks = {config.k: dict(gemm.compiled(p, config))["RAGGED"] for config in gemm.candidates(p)}
    assert masks[128] and not dict(gemm.compiled(p, gemm.CANONICAL))["RAGGED"]


def random_problem(rng: random.Random) -> Problem:
    dtype = rng.choice((BF16, FP16, FP32))
    out_dtype = rng.choice((dtype, FP32))
    leaves = rng.choice((1, 1, 2, 3, 8, 24))
    accumulate = out_dtype == FP32 and leaves == 1 and rng.random() < 0.5
    return problem(
        rows=rng.choice((1, 2, 16, 17, 40, 200)), cols=rng.choice((1, 8, 71, 72)),
        length=rng.choice((1, 2, 7, 16, 24, 64, 72, 128, 192, 200)), leaves=leaves, pieces=rng.choice((1, 1, 2, 3)),
        dtype=dtype, out_dtype=out_dtype, layouts=tuple(rng.choice(("row", "row", "column", "wide", "expanded")) for _ in range(2)),
        shift=rng.choice((0, 0, 0, 1, 2, 4, 8)), pad=rng.choice((0, 0, 1, 8, 16)), bias=not accumulate and rng.random() < 0.4,
        out_pad=rng.choice((0, 0, 1, 8, 24)), accumulate=accumulate, node=rng.choice(("float32", "bfloat16")),
        precision=rng.choice(("ieee", "tf32")) if dtype == FP32 else "ieee",
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_the_probe_means_the_same_kernel(seed):
    rng = random.Random(seed)
    for _ in range(12):
        p = random_problem(rng)
        for config in dict.fromkeys(every(p)):
            probe = verification.make_probe(p, config)
            assert verification.compiled(probe, config) == verification.compiled(p, config), (p, config)
            assert (probe.numerics()[0], probe.numerics()[3:]) == (p.numerics()[0], p.numerics()[3:])
            if isinstance(config, sm90.Sm90Config):
                assert sm90.refuses(probe) is None and sm90.fits(probe, config), (p, config)
            assert probe.out.data_ptr() != p.out.data_ptr() and probe.a.isfinite().all() and probe.b.isfinite().all()
            mine = verification._poisoned(probe)
            assert verification.compiled(mine, config) == verification.compiled(p, config)


def test_the_dense_twin_of_a_probe_holds_the_same_numbers():
    for layouts in itertools.product(("row", "column", "wide", "expanded"), repeat=2):
        p = problem(layouts=layouts, shift=3, pad=5, bias=True, length=72)
        probe = verification.make_probe(p, gemm.CANONICAL)
        dense = verification._dense(probe)
        assert torch.equal(dense.a, probe.a) and torch.equal(dense.b, probe.b) and torch.equal(dense.bias, probe.bias)
        for t in (dense.a, dense.b, dense.out):
            assert t.is_contiguous() and t.data_ptr() % 16 == 0


def test_a_stride_that_no_small_probe_has_is_decided_on_the_operands(monkeypatch):
    """Past 2^31 Triton counts in 64 bits, which is another kernel."""
    p = problem(leaves=1, length=64)
    far = torch.zeros(40 * 64, dtype=BF16)
    wide = replace(p, a=far.as_strided((1, 64), (1 << 31, 1)), out=p.out[:1])
    config = gemm.TritonConfig(16, 32, 128, 4, 5)
    launched = []
    monkeypatch.setattr(
        verification, "launch", lambda problem, config, blocks=None, masked=False: (launched.append(problem), problem.out.zero_())
    )
    assert verification.verify(wide, config) and any(x.a is wide.a for x in launched)
    launched.clear()
    assert verification.verify(p, config) and not any(x.a is p.a for x in launched)


def test_an_output_of_the_same_kind_leaves_the_callers_alone():
    for p in (problem(out_pad=24, shift=1), problem(cols=1), problem(rows=1, out_pad=8)):
        mine = verification.empty_output(p.out)
        assert mine.shape == p.out.shape and kind(mine) == kind(p.out) and mine.stride(1) == 1
        assert kind(mine.stride(0)) == kind(p.out.stride(0))
        mine.fill_(1.0)
        assert not p.out.any()

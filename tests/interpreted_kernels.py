"""The Triton kernels under Triton's interpreter, on a CPU. Run by test_kernels_interpreter.py in a process of its own."""

import itertools
from dataclasses import replace

import fast_interpreter  # noqa: F401
import pytest
import torch

from tpinv import reference
from tpinv.kernels.gemm import triton_gemm as gemm
from tpinv.kernels.gemm import verification
from tpinv.kernels.gemm.problem import make_problems
from tpinv.kernels.rows import add_norm, norm, rope, sums
from tpinv.runtime import state
from tpinv.testing import assert_bitwise_equal, order_probe, tree_shape
from tpinv.tree import ReductionTree


def product(a, b, tree, rank=0, ranks=1, *, parts=1, swap=False, pieces=1, bias=None, dtype=torch.float32):
    """a [R, k], b [k, C] -> [S, R, C], and whether ``parts`` was possible for every subtree."""
    out = torch.full((len(tree.subtrees(rank, ranks)), a.shape[0], b.shape[1]), float("nan"), dtype=dtype)
    problems = make_problems(a, b.t(), out, bias, tree, rank, ranks, pieces, "ieee")
    if not all(parts in problem.splits for problem in problems):
        pytest.skip(f"{tree.fingerprint} has no {parts} equal subtrees at rank {rank} of {ranks}")
    for problem in problems:
        gemm.run(problem, gemm.TritonConfig(16, 16, 16, 4, 1, parts, swap))
    return out


@pytest.mark.parametrize(
    "leaves, parts, swap", [(1, 1, False), (3, 1, True), (6, 1, False), (12, 1, False), *((8, p, p == 4) for p in (1, 2, 4, 8))]
)
def test_probe_finds_the_contract(leaves, parts, swap):
    tree, length = ReductionTree(leaves), 24

    def total(values):  # [B, leaves]: one value at the start of each leaf, ones in b
        a = torch.zeros(len(values), leaves, length)
        a[:, :, 3] = values
        return product(a.flatten(1), torch.ones(leaves * length, 5), tree, parts=parts, swap=swap)[0, :, 2]

    assert order_probe(total, leaves, batched=True) == tree_shape(tree)


@pytest.mark.parametrize("leaves, ranks, pieces", [(8, 2, 2), (8, 8, 1), (24, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_exact_on_integers(leaves, ranks, pieces, dtype):
    """Small integers add up exactly in any order: shapes, masks, leaves, pieces and strides must all be right."""
    tree, rows, cols, length = ReductionTree(leaves), 19, 37, 24
    k = leaves // ranks * length * pieces
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-3, 4, (k, rows), generator=g).to(dtype).t()  # a transposed view
    b = torch.randint(-3, 4, (k, 2 * cols), generator=g).to(dtype)[:, ::2]  # and a strided one
    for rank in range(ranks):
        values = product(a, b, tree, rank, ranks, pieces=pieces)
        assert_bitwise_equal(values, reference.tree_product(a, b, tree, rank, ranks, stride=pieces), f"rank {rank}")


def test_bias_comes_after_the_rounding_of_the_root():
    tree, half = ReductionTree(2), torch.float16
    a, b = torch.tensor([[1.0, 2.0**-11]]).repeat_interleave(8, 1).to(half), torch.zeros(16, 1, dtype=half)
    b[0] = b[8] = 1.0  # root 1 + 2^-11, which rounds to 1 in fp16; adding the bias before would give 2^-11
    bias = torch.tensor([-1.0], dtype=half)
    assert product(a, b, tree, bias=bias, dtype=half).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("swap", [False, True])
def test_a_chain_is_added_without_rounding(dtype, swap):
    """Row 1: 1 + 2^-11 would be 1 in fp16, which takes 2^-11 from the sum."""
    a, b = torch.zeros(19, 40, dtype=dtype), torch.randn(40, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    a[1, :2], b[:2, :9] = torch.tensor([1.0, 2.0**-11]), 1.0
    a[2:, 5:] = torch.randn(17, 35, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = torch.randn(19, 37, generator=torch.Generator().manual_seed(2))
    before[1], before[0] = -1.0, -0.0
    buffer = torch.zeros(19, 80)
    total = buffer[:, 4:41].copy_(before)
    (problem,) = make_problems(a, b.t(), total.unsqueeze(0), None, ReductionTree(1), 0, 1, 1, "ieee")
    gemm.run(replace(problem, accumulate=True), gemm.TritonConfig(16, 16, 16, 4, 1, 1, swap))
    assert_bitwise_equal(total, before + product(a, b, ReductionTree(1), swap=swap, dtype=torch.float32)[0])
    assert total[1, 0].item() == 2.0**-11
    assert not buffer[:, :4].any() and not buffer[:, 41:].any(), "what lies beside it"


@pytest.mark.parametrize("tokens, leaves, ranks", itertools.product((0, 5, 77, 1200), (1, 24), (1, 2)))
def test_column_sum_has_the_bytes_of_the_reference(tokens, leaves, ranks):
    if leaves % ranks:
        pytest.skip("ranks must divide leaves")
    tree, tokens = ReductionTree(leaves), tokens // ranks
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 40, generator=g) * torch.exp2(torch.randint(-20, 20, (tokens, 40), generator=g).float())
    x[::3, 1] = -0.0
    for rank in range(ranks):
        actual, expected = sums.column_sum(x, tree, rank, ranks), reference.tree_sum(x, tree, rank, ranks, dim=0)
        assert_bitwise_equal(actual, expected, f"{tokens} tokens, rank {rank} of {ranks}")
    if tokens > 100:
        assert not torch.equal(x.sum(0), actual[0])  # the stock sum adds in another order


@pytest.mark.parametrize("length", [32, 40])
@pytest.mark.parametrize("layout", ["row", "column", "wide"])
def test_verification_runs_the_kernel_of_the_problem(layout, length, monkeypatch):
    """It passes on every layout; and one that errs only in the kernel that this problem compiles to is found out."""
    monkeypatch.setattr(verification, "_ROWS", 20)
    monkeypatch.setattr(verification, "_COLS", 24)
    tree, rows, k = ReductionTree(2), 5, 2 * length
    flat = torch.zeros(4 * rows * k + 8)[1:]
    strides = {"row": (k + 3, 1), "column": (1, rows), "wide": (2 * k, 2)}[layout]
    a, b = flat.as_strided((rows, k), strides), torch.zeros(7, k)
    (problem,) = make_problems(a, b, torch.zeros(1, rows, 7), None, tree, 0, 1, 1, "ieee")
    config = gemm.TritonConfig(64, 64, 32, 4, 1)
    state.clear()
    assert verification.verify(problem, config) and verification.verify(problem, replace(config, parts=2, swap=True))
    state.clear()
    compiled, run = gemm.compiled(problem, config), gemm.run

    def errs(problem, config, masked=False):
        run(problem, config, masked)
        if not masked and gemm.compiled(problem, config) == compiled:
            problem.out.neg_()

    monkeypatch.setattr(gemm, "run", errs)
    assert not verification.verify(problem, config) and len(verification.struck_off()) == 1
    state.clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [32, 20])
def test_rope_has_the_bytes_of_torchs_operators(dtype, interleaved, turned):
    """In place in views of one tensor, as q and k come; what is not turned stays, and so do the values behind them."""
    generator = torch.Generator().manual_seed(0)
    width, heads, key_heads, tokens = 32, 3, 1, 7
    qkv = torch.randn(tokens, (heads + 2 * key_heads) * width, generator=generator).to(dtype)
    table = torch.randn(50, turned, generator=generator).to(dtype)
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    expected = qkv.clone()
    cos, sin = (t.unsqueeze(1) for t in table[positions].chunk(2, -1))
    x = expected.view(tokens, -1, width)[:, : heads + key_heads]
    first, second = (x[..., :turned:2], x[..., 1:turned:2]) if interleaved else x[..., :turned].chunk(2, -1)
    left, right = first * cos - second * sin, second * cos + first * sin
    first.copy_(left), second.copy_(right)
    q, k, _ = qkv.split((heads * width, key_heads * width, key_heads * width), -1)
    rope.rotate(q, k, positions, table, width, interleaved=interleaved)
    assert_bitwise_equal(qkv, expected)
    alone = qkv.clone()
    rope.rotate(q, None, positions, table, width, interleaved=interleaved)
    assert_bitwise_equal(qkv[:, heads * width :], alone[:, heads * width :])
    assert not torch.equal(qkv, alone)
    rope.rotate(q[:0], k[:0], positions[:0], table, width)
    with pytest.raises(ValueError, match="they must be"):
        rope.rotate(q.double(), k, positions, table, width)
    with pytest.raises(ValueError, match="width 16"):
        rope.rotate(q, k, positions, table, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("cols", [4104, 48])
def test_residual_and_norm_in_one_launch_have_the_bytes_of_two(dtype, cols):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, cols, generator=generator).mul_(9.0).to(dtype) for _ in range(2))
    weight = torch.randn(cols, generator=generator).to(dtype)
    y, hidden = add_norm.add_norm(x, residual, weight, 1e-5)
    assert_bitwise_equal(hidden, x + residual)
    assert_bitwise_equal(y, norm.norm(x + residual, weight, None, 1e-5, False))
    if dtype == torch.float16:  # the norm of the sum before it is rounded is another one
        unrounded = norm.norm(x.float() + residual.float(), weight, None, 1e-5, False)
        assert not torch.equal(y, unrounded.to(dtype))
    with pytest.raises(ValueError, match="they must be"):
        add_norm.add_norm(x, residual.double(), weight, 1e-5)

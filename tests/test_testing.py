"""The proofs we ship must themselves be able to fail."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tpinv import ReductionTree
from tpinv.testing import RankError, RankPool, assert_bitwise_equal, compare, order_probe, run_ranks, tree_shape, ulp_distance

# -- bytes ----------------------------------------------------------------------------------------------------------------


def test_bytes_not_values():
    nan = torch.tensor([math.nan])
    assert not compare(nan, nan.clone())
    assert compare(torch.tensor([0.0]), torch.tensor([-0.0])).count == 1
    other_nan = (nan.view(torch.int32) + 1).view(torch.float32)
    assert compare(nan, other_nan).count == 1


def test_a_difference_names_count_place_values_and_distance():
    a = torch.arange(6.0).view(2, 3)
    b = a.clone()
    b[1, 0], b[1, 2] = math.nextafter(3.0, 4.0), 5.5
    b[1, 0] = torch.nextafter(a[1, 0], torch.tensor(9.0))
    difference = compare(a, b)
    assert (difference.count, difference.total, difference.index, difference.actual, difference.expected) == (
        2,
        6,
        (1, 0),
        3.0,
        3.000000238418579,
    )
    assert difference.max_ulp == 1 << 20
    with pytest.raises(AssertionError, match=r"logits: 2 of 6 elements differ in their bytes, first at \[1, 0\]: 3.0 != 3.0000002"):
        assert_bitwise_equal(a, b, "logits")
    assert str(compare(a, a)) == "the same bytes in all 6 elements" and not compare(a, a)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
def test_every_dtype_and_layout(dtype):
    a = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    b = a.clone()
    b[1, 1] = 0
    assert not compare(a, a.clone()) and compare(a, b).count == 1
    assert not compare(a.t(), a.t().contiguous())
    assert not compare(a[:0], b[:0])
    assert compare(a[1, 1], b[1, 1]).index in ((), (0,))


def test_shape_and_dtype_must_agree():
    for other in (torch.zeros(3, 1), torch.zeros(3, dtype=torch.float16)):
        with pytest.raises(AssertionError, match="only tensors of one shape and dtype"):
            assert_bitwise_equal(torch.zeros(3), other)


def test_ulp_distance():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        tiny = torch.finfo(dtype).smallest_normal
        a, b = (torch.tensor(v).to(dtype) for v in ([0.0, 1.0, tiny, -tiny], [-0.0, 1.0, -tiny, -tiny]))
        first, same, across, equal = ulp_distance(a, b).tolist()
        assert (first, same, equal) == (1, 0, 0)
        assert across == 2 * int(tiny / torch.finfo(dtype).tiny * (1 / torch.finfo(dtype).eps)) + 1


# -- probe ----------------------------------------------------------------------------------------------------------------


def left_to_right(x):
    return sum(x.unbind()[1:], x[0])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 24])
def test_probe_finds_known_trees(n):
    chain = 0
    for i in range(1, n):
        chain = (chain, i)
    assert order_probe(left_to_right, n) == chain
    tree = ReductionTree(n)
    assert order_probe(lambda x: tree.reduce(x.unbind(), torch.add), n) == tree_shape(tree)
    assert tree_shape(ReductionTree(3)) == ((0, 1), 2)


def test_probe_sees_strided_and_reversed_orders():
    assert order_probe(lambda x: (x[0] + x[2]) + (x[1] + x[3]), 4) == ((0, 2), (1, 3))
    assert order_probe(lambda x: left_to_right(x.flip(0)), 4) == (0, (1, (2, 3)))


def test_probe_sees_fused_sums():
    """A tensor core adds a few products at once and rounds once: one node with several children."""

    def fused(x):
        big = x[:4].abs() > 2
        return x[:4][big].sum() if big.any() else x[:4].sum()

    assert order_probe(fused, 4) == (0, 1, 2, 3)
    assert order_probe(lambda x: fused(x) + x[4], 5) == ((0, 1, 2, 3), 4)


def test_probe_in_one_call():
    calls = []
    order_probe(lambda x: calls.append(x.shape) or x.cumsum(1)[:, -1], 6, batched=True)
    assert calls == [(16, 6)]


@pytest.mark.parametrize(
    "total, message",
    [
        (lambda x: x[:-1].sum(), "sum of 5 ones came out as 4.0"),
        (lambda x: 2 * x.sum(), "sum of 5 ones came out as 10.0"),
        (lambda x: torch.tensor(math.fsum(x.tolist())), "fit no tree"),  # nothing is swallowed: exact or compensated
        (lambda x: x.max() * 5, "fit no tree"),
    ],
)
def test_probe_refuses_what_is_no_sum_of_floats(total, message):
    with pytest.raises(ValueError, match=message):
        order_probe(total, 5)


def test_probe_refuses_an_order_that_changes():
    calls = iter(range(10**6))
    with pytest.raises(ValueError, match="fit no tree"):
        order_probe(lambda x: left_to_right(x if next(calls) % 2 else x.flip(0)), 6)
    for wrong in (0, 257):
        with pytest.raises(ValueError, match=r"must be in \[1, 256\]"):
            order_probe(torch.sum, wrong)


# -- ranks ----------------------------------------------------------------------------------------------------------------


def who(extra):
    total = torch.tensor([dist.get_rank()])
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "pid": os.getpid(), "sum": total, "extra": extra}


def fail(rank):
    if dist.get_rank() == rank:
        raise KeyError("the cause")
    dist.barrier()


def hang(rank):
    if dist.get_rank() == rank:
        time.sleep(60)
    dist.barrier()


def die(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def unpicklable():
    return lambda: None


def test_results_come_in_rank_order_from_reused_workers():
    first, second = run_ranks(who, 3, torch.ones(2)), run_ranks(who, 2, "x")
    assert [r["rank"] for r in first] == [0, 1, 2] and all(r["sum"].item() == 3 for r in first)
    assert [r["pid"] for r in second] == [r["pid"] for r in first][:2]
    assert second[0]["extra"] == "x" and os.getpid() not in {r["pid"] for r in first}


def test_failures_name_rank_and_cause_and_the_pool_goes_on():
    with RankPool() as pool:
        pool.run(who, 2, None)
        for function, args, message in (
            (fail, (1,), r"^rank 1 of 2 raised KeyError: 'the cause'\nTraceback.*KeyError: 'the cause'"),
            (hang, (0,), r"did not finish within 3.0 s|rank 1 of 2 raised.*imed? ?out"),
            (die, (1,), "^rank 1 of 2 died with exit code 7$"),
            (unpicklable, (), "raised.*pickle"),
        ):
            began = time.monotonic()
            with pytest.raises(RankError, match="(?s)" + message):
                pool.run(function, 2, *args, timeout=3.0 if function is hang else 60.0)
            assert time.monotonic() - began < 30
            assert [r["rank"] for r in pool.run(who, 2, None)] == [0, 1]


def test_of_several_failures_the_first_is_told():
    failures = {
        0: (2.0, "RuntimeError: lost", "trace 0"),
        1: (1.0, "KeyError: 'the cause'", "trace 1"),
        2: (3.0, "ValueError: x", "trace 2"),
    }
    ready, pipe = multiprocessing.Pipe(), multiprocessing.Pipe()
    ready[1].send((False, failures[1]))  # heard of later than of rank 0, but raised earlier
    told = RankPool()._first_failure({0: failures[0], 2: failures[2]}, {pipe[0]: 0, ready[0]: 1, object(): 2}, {})
    assert told == "rank 1 of 3 raised KeyError: 'the cause' (then ranks 0, 2 raised as well)\ntrace 1"


def interrupted(how: str) -> subprocess.CompletedProcess:
    """A process whose pool runs ranks of which one fails, or which is interrupted, as Ctrl-C does, while they run."""
    script = f"""
import os, signal, threading, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_testing
from tpinv.testing import RankPool
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    with RankPool() as pool:
        pool.run(test_testing.who, 3, None)
        if {how == "interrupt"}:
            threading.Timer(1, lambda: os.killpg(0, signal.SIGINT)).start()
        try:
            pool.run(test_testing.fail if {how == "fail"} else test_testing.soon, 3, 1)
        except (KeyboardInterrupt, RuntimeError) as error:
            print(type(error).__name__, str(error).partition(chr(10))[0])
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, start_new_session=True)


def soon(_):
    """Ends on every rank after the parent has gone."""
    time.sleep(2)


@pytest.mark.parametrize(
    ("how", "said"), [("fail", "RankError rank 1 of 3 raised KeyError: 'the cause'"), ("interrupt", "KeyboardInterrupt")]
)
def test_workers_say_nothing_of_a_parent_that_has_gone(how, said):
    done = interrupted(how)
    assert done.stdout.startswith(said) and done.stdout.count("\n") == 1, done
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr


def test_a_worker_killed_between_runs_is_replaced():
    with RankPool() as pool:
        os.kill(pool.run(who, 2, None)[1]["pid"], signal.SIGKILL)
        time.sleep(0.5)
        assert [r["rank"] for r in pool.run(who, 2, None)] == [0, 1]


def test_close_ends_the_workers():
    pool = RankPool()
    (result,) = pool.run(who, 1, None)
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(result["pid"], 0)
    with pytest.raises(ValueError, match="ranks=0 must be at least 1"):
        pool.run(who, 0, None)

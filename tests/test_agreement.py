"""What one rank refuses, all refuse, and all make the same call: the same error on every rank within seconds, and the group goes on."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tpinv import ReductionTree, contract, tree_all_reduce, tree_reduce_scatter
from tpinv.collectives import agree, agreement, all_gather, all_max, comparison, refuse, resolve, select_all_reduce, select_reduce_scatter
from tpinv.collectives.board import Board
from tpinv.collectives.group import state_of
from tpinv.testing import RankError, run_ranks

T8, T16 = ReductionTree(8), ReductionTree(16)
SECONDS = 20  # within which every rank must have its error


def said(function, *args, **kwargs) -> str:
    """What a call raises: "ValueError: ...", or "" if nothing. Not later than SECONDS."""
    began = time.monotonic()
    try:
        function(*args, **kwargs)
        return ""
    except Exception as error:
        assert time.monotonic() - began < SECONDS
        return f"{type(error).__name__}: {error}"


def values(ranks, tree=T8, *shape, extra=0, dtype=torch.float32, **kwargs):
    """Ones of this rank's subtrees, ``extra`` of them too many."""
    return torch.ones(len(tree.subtrees(ranks.rank, ranks.size)) + extra, *(shape or (4,)), dtype=dtype, **kwargs)


def one_sum(ranks, odd, **differ):
    """tree_all_reduce with other arguments where ``odd``."""
    settings = {"tree": T8, "shape": (4,), "out_dtype": None, "extra": 0, "dtype": torch.float32, **(differ if odd else {})}
    tree, out_dtype = settings["tree"], settings["out_dtype"]
    x = values(ranks, tree if isinstance(tree, ReductionTree) else T8, *settings["shape"], extra=settings["extra"], dtype=settings["dtype"])
    return tree_all_reduce(x, tree=tree, out_dtype=out_dtype, group=ranks)


def owned_rows(ranks, rows=24):
    return (torch.arange(rows) % ranks.size == ranks.rank).unsqueeze(1)


# name -> (what to call, given the ranks and whether this one is the odd one; what every rank must say of it). ODD stands for the odd rank.
DIFFER = {
    "tree": (lambda r, odd: one_sum(r, odd, tree=T16), "tree: tpinv1-rfc6962-L8-float32 on .*, tpinv1-rfc6962-L16-float32 on rank ODD"),
    "node dtype": (
        lambda r, odd: one_sum(r, odd, tree=ReductionTree(8, "bfloat16"), dtype=torch.bfloat16),
        "tree: tpinv1-rfc6962-L8-float32 on .*L8-bfloat16 on rank ODD; out_dtype: torch.float32 on .*, torch.bfloat16 on rank ODD",
    ),
    "tokens": (lambda r, odd: one_sum(r, odd, shape=(6,)), r"shape: \(4,\) on .*, \(6,\) on rank ODD"),
    "empty": (lambda r, odd: one_sum(r, odd, shape=(0,)), r"shape: \(4,\) on .*, \(0,\) on rank ODD"),
    "out_dtype": (lambda r, odd: one_sum(r, odd, out_dtype=torch.float16), "out_dtype: torch.float32 on .*, torch.float16 on rank ODD"),
    "function": (
        lambda r, odd: (tree_reduce_scatter if odd else tree_all_reduce)(values(r, T8, 8), tree=T8, group=r),
        "function: tree_all_reduce on .*, tree_reduce_scatter on rank ODD",
    ),
    "gather": (lambda r, odd: all_gather(torch.ones(2 + odd, 3), r), r"shape: \(2, 3\) on .*, \(3, 3\) on rank ODD"),
    "gather dim": (lambda r, odd: all_gather(torch.ones(3, 3), r, dim=int(odd)), "dim: 0 on .*, 1 on rank ODD"),
    "gather dtype": (
        lambda r, odd: all_gather(torch.ones(4, dtype=torch.int32 if odd else torch.float32), r),
        "dtype: torch.float32 on .*, torch.int32 on rank ODD",
    ),
    "maximum": (lambda r, odd: all_max(torch.ones(2 + odd), r), r"shape: \(2,\) on .*, \(3,\) on rank ODD"),
    "selection": (lambda r, odd: select_all_reduce(torch.ones(24, 2 + odd), owned_rows(r), r), r"\(24, 2\) on .*, \(24, 3\) on rank ODD"),
    "a call of its own": (
        lambda r, odd: agree(r, "f", {"sequence_parallel": odd, "eps": [1e-5, 1e-6][odd], "stride": [1, 2]}),
        "sequence_parallel: False on .*, True on rank ODD; eps: 1e-05 on .*, 1e-06 on rank ODD",
    ),
}
REFUSED = {  # what the odd rank says; the others that it refused, and the same
    "subtrees": (lambda r, odd: one_sum(r, odd, extra=1), "tree_all_reduce", "must hold one value for each of this rank's . subtrees"),
    "node dtype": (lambda r, odd: one_sum(r, odd, dtype=torch.float16), "tree_all_reduce", "values are torch.float16 but the nodes of"),
    "integers": (lambda r, odd: one_sum(r, odd, out_dtype=torch.int32), "tree_all_reduce", "out_dtype=torch.int32 cannot hold a sum"),
    "float8": (lambda r, odd: one_sum(r, odd, out_dtype=torch.float8_e4m3fn), "tree_all_reduce", "out_dtype=torch.float8_e4m3fn cannot"),
    "no tree": (lambda r, odd: one_sum(r, odd, tree=None), "tree_all_reduce", "tree is None; pass a tpinv.ReductionTree"),
    "a number": (lambda r, odd: one_sum(r, odd, tree=8), "tree_all_reduce", "tree is 8; pass a tpinv.ReductionTree"),
    "leaves": (
        lambda r, odd: tree_all_reduce(torch.ones(1, 4), tree=ReductionTree(9) if odd else T8, group=r),
        "tree_all_reduce",
        "ranks do not divide leaves=9",
    ),
    "gradient": (
        lambda r, odd: tree_all_reduce(values(r, requires_grad=odd), tree=T8, group=r),
        "tree_all_reduce",
        "require a gradient, which this collective does not have",
    ),
    "rows": (
        lambda r, odd: tree_reduce_scatter(values(r, T8, 8 + odd), tree=T8, group=r),
        "tree_reduce_scatter",
        "ranks must divide dimension 1",
    ),
    "no dimension": (lambda r, odd: all_gather(torch.ones(()) if odd else torch.ones(2), r), "all_gather", "has no dimension 0"),
    "owned": (
        lambda r, odd: select_all_reduce(torch.ones(24, 2), owned_rows(r, 23 if odd else 24), r),
        "select_all_reduce",
        "must be a bool tensor that broadcasts",
    ),
    "owned rows": (
        lambda r, odd: select_reduce_scatter(torch.ones(24 + odd, 2), owned_rows(r, 24 + odd), r),
        "select_reduce_scatter",
        "ranks must divide dimension 0",
    ),
    "another error": (lambda r, odd: agree(r, "g", {"a": 1}, [].pop if odd else None), "g", "IndexError: pop from empty list"),
}


def board_only(on: bool = True):
    """As where ranks are on several machines, or communicate on GPUs: no line, and calls that are known are not compared."""
    return mock.patch.object(comparison, "Line", side_effect=OSError("no such sockets")) if on else contextlib.nullcontext()


def in_turn(with_line: bool):
    """{(kind, case, odd rank, known before): what this rank's call says}. One group for all; after each case it must still sum."""
    out = {}
    with board_only(not with_line):
        ranks = resolve()
        whole = sum(len(T8.subtrees(rank, ranks.size)) for rank in range(ranks.size))
        for kind, cases in (("differ", DIFFER), ("refused", REFUSED)):
            for name, (call, *_) in cases.items():
                for odd in (0, ranks.size - 1):
                    out[kind, name, odd, False] = said(call, ranks, ranks.rank == odd)
                    if with_line:  # without, who knows a signature would be in its collective by now
                        assert said(call, ranks, False) == ""
                        out[kind, name, odd, True] = said(call, ranks, ranks.rank == odd)
                    assert one_sum(ranks, True, shape=(len(out) + 10,)).tolist() == [whole] * (len(out) + 10)
        assert (state_of(ranks).line is not None) == with_line
    return out


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("with_line", [True, False], ids=["line", "board"])
def test_one_error_on_every_rank_and_then_on(with_line, p):
    results = run_ranks(in_turn, p, with_line)
    assert len(results[0]) == (4 if with_line else 2) * (len(DIFFER) + len(REFUSED))
    for kind, name, odd, known in results[0]:
        texts = [result[kind, name, odd, known] for result in results]
        if kind == "differ":
            assert len(set(texts)) == 1, texts
            wanted = DIFFER[name][1].replace("ODD", str(odd)) if odd else "the ranks differ in call"  # rank 0 is named first
            assert re.match("ValueError: the ranks differ in call", texts[0]) and re.search(wanted, texts[0]), texts[0]
        else:
            _, function, wanted = REFUSED[name]
            assert re.search(wanted, texts[odd]), texts[odd]
            others = {text for rank, text in enumerate(texts) if rank != odd}
            (text,) = others
            error, _, message = texts[odd].partition(": ")
            assert re.match(f"{'Runtime' if error != 'ValueError' else 'Value'}Error: rank {odd} of {p} refused {function}", text), text
            assert message in text


def all_refuse():
    """Refused by all and caught, again and again; then by the last rank alone; then on: nothing stale is read."""
    ranks = resolve()
    own = [said(one_sum, ranks, True, extra=1) for _ in range(40)]
    good = one_sum(ranks, True, shape=(3,)).tolist()
    last = said(one_sum, ranks, ranks.rank == ranks.size - 1, extra=1)
    return own, good, last, one_sum(ranks, True, shape=(5,)).shape


@pytest.mark.parametrize("p", [2, 4])
def test_a_refusal_by_all_is_over(p):
    for rank, (own, good, last, shape) in enumerate(run_ranks(all_refuse, p)):
        assert len(set(own)) == 1 and "must hold one value for each" in own[0] and "refused" not in own[0]
        assert good == [p] * 3 and shape == (5,)
        assert ("refused" in last) == (rank != p - 1) and f"rank {p - 1} of {p}" in last


class Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, refuses):
        ctx.refuses = refuses
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        one_sum(resolve(), ctx.refuses, extra=1)
        return dy, None


def backward():
    ranks = resolve()
    x = torch.ones(3, requires_grad=True)
    first = said(Odd.apply(x, False).sum().backward)
    return first, said(Odd.apply(x, ranks.rank == 1).sum().backward)


def test_a_refusal_in_backward():
    results = run_ranks(backward, 4)
    assert [first for first, _ in results] == [""] * 4
    for rank, (_, text) in enumerate(results):
        assert "must hold one value" in text and ("rank 1 of 4 refused tree_all_reduce" in text) == (rank != 1)


# -- without a line: who knows a signature is in its collective when a peer refuses or differs -------------------------------------------


def in_the_collective(how: str):
    """The call is known to all but differs, or is refused, on the last rank alone. In a group of its own, which is given up."""
    group = dist.new_group(list(range(dist.get_world_size())))
    with board_only():
        ranks = resolve(group)
        assert one_sum(ranks, False).shape == (4,)
        odd = ranks.rank == ranks.size - 1
        text = said(one_sum, ranks, odd, **({"extra": 1} if how == "refused" else {"shape": (6,)}))
        after = said(one_sum, ranks, False)
    began = time.monotonic()
    dist.barrier()  # of the default group, which goes on
    dist.destroy_process_group(group)
    return text, after, time.monotonic() - began


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("how", ["refused", "new"])
def test_a_wait_in_a_collective_ends(how, p):
    results = run_ranks(in_the_collective, p, how)
    for rank, (text, after, seconds) in enumerate(results):
        if how == "new":
            assert re.search(rf"ValueError: the ranks differ in call 2 .*shape: \(4,\) on .*, \(6,\) on rank {p - 1}", text), text
        else:
            assert "must hold one value" in text and (f"rank {p - 1} of {p} refused" in text) == (rank != p - 1), text
        assert after.startswith("RuntimeError") and seconds < SECONDS


def late(with_line: bool):
    """A rank that comes after seconds is waited for, one that does not come within TPINV_TIMEOUT is named, and learns of it."""
    group = dist.new_group([0, 1])
    with board_only(not with_line), mock.patch.dict(os.environ, TPINV_TIMEOUT="3"):
        ranks = resolve(group)
        if ranks.rank == 1:
            time.sleep(2)
        first = said(agree, ranks, "f", {"a": 1})
        if ranks.rank == 1:
            time.sleep(5)
        second = said(one_sum, ranks, False)
    dist.barrier()
    return first, second


@pytest.mark.parametrize("with_line", [True, False], ids=["line", "board"])
def test_a_rank_that_is_late(with_line):
    (first, text), (other_first, other_text) = run_ranks(late, 2, with_line)
    assert first == other_first == ""
    assert (
        "RuntimeError: rank 0 waited 3 s for rank 1 of 2 in call 2 of the group, tree_all_reduce: rank 1 was last seen at its call 1, f"
        in text
    )
    assert other_text == text


def a_slow_look() -> str:
    """Rank 0 waits long enough to look around and is slow at it; meanwhile its peers come, go on, and wait in their next call, which they
    post. What they announced lies on rank 0's line by then."""
    ranks = resolve()
    agree(ranks, "f", {"a": 1})
    state = state_of(ranks)
    if ranks.rank == 0:
        status = state.board.status
        state.board.status = lambda rank: (time.sleep(0.7), status(rank))[1]
    else:
        time.sleep(comparison.LOOK + 0.3)
    with mock.patch.object(agreement, "PATIENCE", 0.1):
        found = said(agree, ranks, "f", {"a": 2}) or said(agree, ranks, "f", {"a": 3})
    posted = [state.board.status(rank)["call"] for rank in range(1, ranks.size)]
    return found or ("" if ranks.rank or 3 in posted else f"no peer has waited in its next call: {posted}")


def test_a_peer_that_goes_on_while_this_rank_looks_around():
    """New to one rank and past at another is no error where calls are announced."""
    assert run_ranks(a_slow_look, 4) == [""] * 4


def dying(with_line: bool, where: str, path: str):
    with board_only(not with_line):
        ranks = resolve()
        agree(ranks, "f", {"a": 1})
        if ranks.rank == 1:
            os._exit(3)
        text = said(agree, ranks, "f", {"a": 2}) if where == "agree" else said(one_sum, ranks, False)
    Path(path, str(ranks.rank)).write_text(text)
    time.sleep(10)


@pytest.mark.parametrize(("with_line", "where"), [(True, "agree"), (False, "agree")])
def test_a_rank_that_dies(tmp_path, with_line, where):
    with pytest.raises(RankError, match="rank 1 of 2 died with exit code 3"):
        run_ranks(dying, 2, with_line, where, str(tmp_path))
    assert re.match(r"RuntimeError: rank 1 of 2 has ended", (tmp_path / "0").read_text())


RANK = """
import sys, torch, torch.distributed as dist
from tpinv import ReductionTree, tree_all_reduce
from tpinv.collectives import comparison

rank, path, with_line = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "line"
if not with_line:
    def no_line(*_):
        raise OSError
    comparison.Line = no_line
dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
tree_all_reduce(torch.ones(1, 4), tree=ReductionTree(2))
if rank == 1:
    raise KeyError("of its own")
tree_all_reduce(torch.ones(1, 4), tree=ReductionTree(2))
"""


@pytest.mark.parametrize("how", ["line", "board"])
def test_processes_that_end_by_an_error(tmp_path, how):
    """Rank 1 ends by an error that has nothing to do with the group; rank 0 says so, and both exit."""
    start = [[sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), how] for rank in range(2)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in start]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert "KeyError: 'of its own'" in said[1]
    wanted = "RuntimeError: rank 1 of 2 has ended (KeyError: 'of its own'); the others wait for it in call 2 of the group, tree_all_reduce"
    assert wanted in said[0], said[0]


# -- groups ------------------------------------------------------------------------------------------------------------------------------


def meshes():
    """Of dp 2 x tp 2 one tensor-parallel group refuses; the other one, and dp, go on."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp, tp = resolve(mesh["dp"]), resolve(mesh["tp"])
    texts = [said(one_sum, tp, dist.get_rank() == 3, extra=1), said(one_sum, dp, False), said(one_sum, tp, False)]
    return texts


def test_groups_are_apart():
    results = run_ranks(meshes, 4)
    assert [texts[0] == "" for texts in results] == [True, True, False, False]
    assert "rank 1 of 2 refused" in results[2][0]
    assert all(texts[1:] == ["", ""] for texts in results)


@pytest.mark.parametrize("kind", ["hash", "file", "prefix"])
def test_a_group_that_is_made_again_reads_nothing_old(tmp_path, kind):
    """Over a store that still holds what the group before it has written. (Whole groups are not made again here: gloo, too, leaves its
    addresses in the store, and may read the old ones.)"""
    store = dist.FileStore(str(tmp_path / "store"), 2) if kind == "file" else dist.HashStore()
    store = dist.PrefixStore("group", store) if kind == "prefix" else store
    for generation in (1, 2, 3):
        boards = [Board(store, rank, 2) for rank in range(2)]
        assert [board.generation for board in boards] == [generation] * 2
        assert boards[1].read(1, 0) is None and boards[1].status(0) is None and not boards[1].has(1, [0])
        boards[0].post(1, "f", {"refused": f"in {generation}"})
        assert boards[1].read(1, 0) == {"refused": f"in {generation}"} and boards[1].has(1, [0])
        assert boards[1].status(0)["refusals"] == [{"at": 1, "refused": f"in {generation}"}]
        boards[0].delete_posts_before(2)
        assert boards[1].read(1, 0) is None


def introductions():
    ranks = resolve()
    odd = ranks.rank == 1
    comparison._introduction.cache_clear()
    try:
        with mock.patch.object(comparison, "chip", lambda device: "H100" if odd else "A100"):
            chips = said(agree, ranks, "f", {"a": 1})
        comparison._introduction.cache_clear()
        with mock.patch.object(contract, "table_digest", lambda: "0" * 8 if odd else "1" * 8):
            tables = said(agree, ranks, "f", {"a": 1})
        comparison._introduction.cache_clear()
        with mock.patch.object(torch, "__version__", "2.99" if odd else "2.98"):
            versions = said(agree, ranks, "f", {"a": 1})
    finally:
        comparison._introduction.cache_clear()
    return chips, tables, versions, said(agree, ranks, "f", {"a": 1})


def test_what_is_one_for_all_calls():
    for chips, tables, versions, good in run_ranks(introductions, 2):
        assert "chip: A100 on rank 0, H100 on rank 1" in chips
        assert "table of sums: 11111111 on rank 0, 00000000 on rank 1" in tables
        assert "torch version: 2.98 on rank 0, 2.99 on rank 1" in versions
        assert good == ""


def many(with_line: bool):
    with board_only(not with_line), mock.patch.object(agreement, "KNOWN", 8):
        ranks = resolve()
        state = state_of(ranks)
        for i in range(60):
            agree(ranks, "f", {"a": i})
            agree(ranks, "f", {"a": 0})
        keys = state.board._store.num_keys()
        for i in range(60):
            agree(ranks, "f", {"a": -i})
        dist.barrier()
        return len(state.known), state.board._store.num_keys() - keys


@pytest.mark.parametrize("with_line", [True, False], ids=["line", "board"])
def test_what_is_kept_is_bounded(with_line):
    for known, keys in run_ranks(many, 2, with_line):
        assert known == 8 and abs(keys) <= 4


def one_rank():
    ranks = resolve()
    agree(ranks, "f", {"a": 1})
    with pytest.raises(ValueError, match="no"):
        agree(ranks, "f", {"a": 1}, refuses)
    refuse(ranks, "f", ValueError("no"))


def refuses():
    raise ValueError("no")


def test_one_rank_only_checks():
    one_rank()
    run_ranks(one_rank, 1)


def traced():
    """Dynamo traces a call without its agreement; a graph agrees when it runs."""
    ranks = resolve()
    graph = torch.compile(lambda x: tree_all_reduce(x, tree=T8) + 1, backend="eager", fullgraph=True)
    before = state_of(ranks).calls
    first = graph(values(ranks)).tolist()
    calls = state_of(ranks).calls - before
    gather = torch.compile(lambda x: all_gather(x, ranks), backend="eager", fullgraph=True)
    return first, calls, gather(torch.ones(2)).tolist(), said(graph, values(ranks, T8, 4 + ranks.rank))


def test_under_compile():
    for first, calls, gathered, text in run_ranks(traced, 2):
        assert first == [3.0] * 4 and calls == 1 and gathered == [1.0] * 4
        assert "shape: (4,) on rank 0, (5,) on rank 1" in text


def seen_from_a_watching_thread() -> tuple[str | None, str | None]:
    """What ends a wait on a GPU: rank 1 refuses a call that rank 0 knew and is in."""
    ranks = resolve()
    agree(ranks, "f", {"a": 1})
    state = state_of(ranks)
    refusals = agreement.Refusals(state)
    if ranks.rank == 1:
        refuse(ranks, "f", ValueError("of its own"))
        dist.barrier()
        return refusals.look(), None  # its own is none
    state.calls += 1  # the call that it knows, past the agreement
    early = refusals.look()
    dist.barrier()
    deadline, late = time.monotonic() + 20, None
    while late is None and time.monotonic() < deadline:
        time.sleep(0.2)
        late = refusals.look()
    return early, late


def test_a_thread_that_watches_for_refusals():
    (early, late), (own, _) = run_ranks(seen_from_a_watching_thread, 2)
    assert early is None and own is None
    assert "rank 1 of 2 refused f (call 2 of the group): of its own" in late

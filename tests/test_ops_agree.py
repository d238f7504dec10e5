"""What one rank refuses, all refuse, and ranks that disagree are told so, whatever the function: shapes, dtypes, trees, settings, labels,
needs of gradients. Every rank raises a ValueError within seconds; none waits for a timeout."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import tpinv
from tpinv import ReductionTree, optim
from tpinv.ops import gather_last_dim
from tpinv.testing import run_ranks

TREE = ReductionTree(8)
ODD = ReductionTree(16)


def column(rank, **options):
    x = options.pop("x", torch.ones(4, 16))
    w = torch.ones(8, 16, dtype=getattr(x, "dtype", None)).requires_grad_(options.pop("gradient", True))
    return tpinv.column_parallel_linear(x, w, **{"tree": TREE, **options})


def warmed_column(rank, **options):
    """After a call that agrees: True has the hash of 1."""
    column(rank, group=options["group"], stride=1)
    return column(rank, **options)


def row(rank, **options):
    x = options.pop("x", torch.ones(4, 8))
    return tpinv.row_parallel_linear(x, torch.ones(6, 8, dtype=x.dtype), **{"tree": TREE, **options})


def norm(rank, function=tpinv.rms_norm, rows=4, **options):
    x = options.pop("x", torch.ones(rows, 8))
    return function(x, torch.ones(8), **{"tree": TREE, "sequence_parallel": True, **options})


def groupless_norm(rank, group, **options):
    return norm(rank, **options)


def no_weight(rank, main_grad=None, **options):
    weight = torch.ones(8, 16)
    weight.main_grad = torch.zeros(8, 16) if main_grad is None else main_grad
    options = {"weight": weight, "tree": TREE, "gradient_accumulation_fusion": True, **options}
    return tpinv.column_parallel_linear(torch.ones(4, 16), **options)


def parameter() -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return weight


def gradients(rank, **options):
    return tpinv.grad_norm(**{"x": [parameter()], **options})


def clip(rank, max_norm=1.0, **options):
    return tpinv.clip_grad_norm_([parameter()], max_norm, **options)


def norm_of(rank, **options):
    return optim.norm_of(**{"tensors": [torch.ones(3)], **options})


def loss(rank, function=tpinv.vocab_parallel_cross_entropy, label=1, rows=4, **options):
    return function(torch.ones(rows, 8), torch.full((rows,), label), **{"tree": TREE, **options})


def embed(rank, top=1, **options):
    return tpinv.vocab_parallel_embedding(torch.tensor([0, top]), torch.ones(8, 4), **options)


def add_norm(rank, eps=1e-5, rows=4, **options):
    return tpinv.reduce_add_rms_norm(torch.ones(1, rows, 8), torch.ones(rows, 8), torch.ones(8), eps, tree=TREE, **options)


# name -> what rank 1 of 2 does otherwise than rank 0: (function, options of rank 0, options of rank 1, what the error says)
CASES: dict[str, tuple[Callable, dict, dict, str]] = {
    "another tree": (column, {}, {"tree": ODD}, "leaves"),
    "other nodes": (row, {}, {"tree": ReductionTree(8, "bfloat16")}, "node_dtype"),
    "sequence parallel on one, column": (column, {"sequence_parallel": True}, {}, "sequence_parallel"),
    "sequence parallel on one, row": (row, {}, {"sequence_parallel": True}, "sequence_parallel"),
    "sequence parallel on one, embedding": (embed, {}, {"sequence_parallel": True}, "sequence_parallel"),
    "other tokens, column": (column, {}, {"x": torch.ones(5, 16)}, "x"),
    "other tokens, row": (row, {}, {"x": torch.ones(5, 8)}, "x"),
    "other dtypes, column": (column, {}, {"x": torch.ones(4, 16).bfloat16()}, "dtype"),
    "other dtypes, row": (row, {"x": torch.ones(4, 8).half()}, {}, "dtype"),
    "a frozen weight": (column, {}, {"gradient": False}, "gradient"),
    "another stride": (column, {}, {"stride": 2}, "stride"),
    "uneven rows, rms_norm": (norm, {"rows": 3}, {"rows": 2}, "x"),
    "uneven rows, layer_norm": (norm, {"rows": 3, "function": tpinv.layer_norm}, {"rows": 2, "function": tpinv.layer_norm}, "x"),
    "another eps": (norm, {}, {"eps": 1e-6}, "eps"),
    "tokens or heads": (norm, {}, {"sequence_parallel": False, "heads_parallel": True}, "heads_parallel"),
    "sequence parallel on one, rms_norm": (norm, {}, {"sequence_parallel": False}, "sequence_parallel: True on rank 0, False on rank 1"),
    "heads on one, layer_norm": (
        norm,
        {"function": tpinv.layer_norm, "sequence_parallel": False, "heads_parallel": True},
        {"function": tpinv.layer_norm, "sequence_parallel": False},
        "heads_parallel: True on rank 0, False on rank 1",
    ),
    "another smoothing": (loss, {}, {"label_smoothing": 0.1}, "label_smoothing"),
    "another ignore_index": (loss, {}, {"ignore_index": -1}, "ignore_index"),
    "other rows, loss": (loss, {}, {"rows": 5}, "logits"),
    "other rows, add_norm": (add_norm, {}, {"rows": 5}, "values"),
    "another eps, add_norm": (add_norm, {}, {"eps": 1e-6}, "eps"),
    "another function": (loss, {}, {"function": tpinv.vocab_parallel_log_probs, "rows": 3}, "logits"),
    # refused by one rank alone
    "a label": (loss, {}, {"label": 99}, "ignore_index=-100"),
    "a label of -1": (loss, {}, {"label": -1}, "ignore_index=-100"),
    "a label, log-probs": (
        loss,
        {"function": tpinv.vocab_parallel_log_probs},
        {"function": tpinv.vocab_parallel_log_probs, "label": 99},
        "target",
    ),
    "an id": (embed, {}, {"top": 16}, "ids"),
    "an id of nobody's": (embed, {}, {"top": 99}, "ids"),
    "no tree": (column, {}, {"tree": None}, "ReductionTree"),
    "a number as a tree": (row, {}, {"tree": 8}, "ReductionTree"),
    "a number as a norm's tree": (norm, {}, {"tree": 8}, "ReductionTree"),
    "a number as a loss's tree": (loss, {}, {"tree": 8}, "ReductionTree"),
    "a negative eps": (norm, {}, {"eps": -1.0}, "eps"),
    "a negative eps, add_norm": (add_norm, {}, {"eps": -1.0}, "eps"),
    "no main_grad": (column, {}, {"gradient_accumulation_fusion": True}, "main_grad"),
    "float64": (row, {}, {"x": torch.ones(4, 8).double()}, "float64"),
    "a list": (column, {}, {"x": [1.0, 2.0]}, "x of column_parallel_linear is list; pass a dense torch.Tensor"),
    "nothing": (norm, {}, {"x": None}, "x of rms_norm is NoneType"),
    "a sparse tensor": (column, {}, {"x": torch.ones(4, 16).to_sparse()}, "x of column_parallel_linear is torch.sparse_coo"),
    "no weight to add to": (no_weight, {}, {"weight": None}, "weight is a NoneType"),
    "a main_grad that is none": (no_weight, {}, {"main_grad": 5}, "not 5"),
    "no stride": (column, {"gather_output": True}, {"gather_output": True, "stride": None}, "stride=None"),
    "no flag": (norm, {}, {"sequence_parallel": None}, "sequence_parallel=None"),
    "no flag and no group": (groupless_norm, {}, {"sequence_parallel": None}, "sequence_parallel=None"),
    "gradients of nothing": (gradients, {}, {"x": None}, "not of a NoneType"),
    "gradients of a name": (gradients, {}, {"x": "model"}, "not of a str"),
    "a norm of no type": (gradients, {}, {"norm_type": None}, "norm_type=None"),
    "many limits": (clip, {}, {"max_norm": torch.ones(2)}, "max_norm="),
    "a norm of nothing": (norm_of, {}, {"tensors": None}, "NoneType"),
    "a meta tensor": (column, {}, {"x": torch.ones(4, 16, device="meta")}, "several devices"),
    "a flag for a number": (warmed_column, {}, {"stride": True}, "stride=True of column_parallel_linear is a bool; pass a whole number"),
    "a fraction": (warmed_column, {}, {"stride": 1.0}, "stride=1.0 of column_parallel_linear is a float"),
    "a list for a flag": (row, {}, {"sequence_parallel": []}, "sequence_parallel=[] of row_parallel_linear is a list; pass True or False"),
    "a text for a number": (loss, {}, {"ignore_index": "-1"}, "ignore_index='-1' of vocab_parallel_cross_entropy is a str"),
    "a weight that does not fit": (column, {}, {"x": torch.ones(4, 15)}, "do not fit"),
    "blocks that a gather would interleave": (column, {}, {"stride": 2, "gather_output": True}, "gather_output"),
}


def outcome(case: Callable[[int], object]) -> tuple[str, str, float]:
    started = time.monotonic()
    try:
        case(dist.get_rank())
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "", "", time.monotonic() - started


def every_case() -> dict:
    """Each in a group of its own: an error ends a group's agreement on nothing but that call."""
    rank, found = dist.get_rank(), {}
    for name, (function, *options, _) in CASES.items():
        group = dist.new_group([0, 1])
        found[name] = outcome(lambda rank, f=function, o=options[rank], g=group: f(rank, group=g, **o))
    return found


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(every_case, 2, timeout=400)


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_raise_a_value_error_soon(name, outcomes):
    for rank in (0, 1):
        kind, message, seconds = outcomes[rank][name]
        assert kind == "ValueError", f"rank {rank}: {kind} {message}"
        assert CASES[name][-1] in message, message
        assert seconds < 10


AT_FOUR = [
    "an id of nobody's",
    "a label",
    "no tree",
    "a negative eps",
    "float64",
    "sequence parallel on one, rms_norm",
    "a list for a flag",
]


def at_four() -> dict:
    """Rank 2 does what rank 1 does in CASES, the others what rank 0 does there, each in a group that has not communicated yet."""
    found = {}
    for name in AT_FOUR:
        function, *options, _ = CASES[name]
        group, mine = dist.new_group(list(range(4))), {**options[dist.get_rank() == 2]}
        found[name] = outcome(lambda rank, f=function, o=mine, g=group: f(rank, group=g, **o))
    return found


def test_four_ranks_raise_a_value_error_soon():
    for rank, found in enumerate(run_ranks(at_four, 4, timeout=100)):
        for name, (kind, message, seconds) in found.items():
            assert kind == "ValueError" and seconds < 10, f"{name} on rank {rank}: {kind} {message}"
            assert "rank 2" in message or rank == 2, message


def fewer_gradients() -> torch.Tensor:
    """One rank asks for the weight's gradient alone. What backward computes is decided by what requires one, so this is no disagreement."""
    x, w = torch.ones(4, 16, requires_grad=True), torch.ones(8, 16, requires_grad=True)
    y = tpinv.column_parallel_linear(x, w, tree=TREE)
    return torch.autograd.grad(y.sum(), [w, x] if dist.get_rank() == 0 else [w])[0]


def test_a_rank_may_ask_for_fewer_gradients():
    one, other = run_ranks(fewer_gradients, 2)
    assert torch.equal(one, other)


def agreeing() -> list[float]:
    """Calls that are alike, in several groups and shapes, with gradients: no error, and no store traffic once they are known."""
    rank, times = dist.get_rank(), []
    for _ in range(3):
        started = time.monotonic()
        for rows in (4, 6):
            x = torch.ones(rows, 16, requires_grad=True)
            y = gather_last_dim(column(rank, x=x, sequence_parallel=True))
            y.sum().backward()
        times.append(time.monotonic() - started)
    return times


def test_ranks_that_agree_go_on():
    assert all(len(times) == 3 for times in run_ranks(agreeing, 2))

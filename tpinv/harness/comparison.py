"""One run against TP = 1 of the same layers, tensor by tensor, on rank 0 of the worker processes, where the recordings are.

A recording maps names to whole tensors, in the order in which they were computed, or to the ranks' parts (:class:`tpinv.diff.Part`, one
for each rank) where only shapes tell how they belong together. What is named initial/... was there before training.
"""

import dataclasses
import hashlib
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from tpinv.diff import Comparison, Key, Part, compare_parts
from tpinv.testing import Difference, compare

Recording = dict[str, "Tensor | list[Part]"]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --dtype
LOADED = "initial weights that were loaded"  # of a recording: their number


class HarnessError(RuntimeError):
    """What went wrong on a rank, in one line. The parent finds it at the end of the rank's traceback."""


@dataclass
class Row:
    """One run, compared with TP = 1 of the same layers."""

    layers: str
    tp: int
    sp: bool
    tensors: int
    differing: int
    first_difference: str | None
    first_distance: str  # Difference.distance
    max_ulp: float  # infinite where something is NaN or infinite in one of them
    losses: list[float]
    ulps: dict[str, float | None] = field(default_factory=dict)  # None: the same bytes; NaN: not compared
    not_compared: dict[str, str] = field(default_factory=dict)  # name -> why
    loaded: int = 0  # initial tensors that depended on TP and were replaced by those of TP = 1


_first: Recording = {}  # on rank 0: what TP = 1 of the same layers recorded


def train_and_compare(train: Callable, settings, given_first: bool = False) -> Row | None:
    """Trains on this rank. Rank 0, which trains at every size, keeps the recording of TP = 1 and compares the others with it where they
    are. ``given_first``: ``train`` is also given that recording (empty at TP = 1 and on other ranks), to load its weights."""
    try:
        if settings.tp == 1:
            _first.clear()
        recording = train(settings, _first) if given_first else train(settings)
        if recording is None:
            return None
        if settings.tp == 1:
            _first.update(recording)
        return compare_with_first(settings.layers, settings.tp, settings.sequence_parallel, recording, _first, DTYPES[settings.dtype])
    except HarnessError:
        _be_quiet()
        raise
    except Exception as error:
        _be_quiet()
        raise HarnessError(f"rank {dist.get_rank()} of {settings.layers} TP={settings.tp}: {describe(error)}") from error


def _be_quiet() -> None:
    """The parent tells what this rank raises, and ends it. What it and its peers would say on the way down comes after that message."""
    sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)


def describe(error: BaseException) -> str:
    """``ValueError in build (model.py:12): message``, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].name} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}{where}: {error}".split())


def compare_with_first(layers: str, size: int, sp: bool, recording: Recording, reference: Recording, dtype: torch.dtype) -> Row:
    """What was drawn before training must be equal, or the comparison would be unfair: HarnessError.

    Distances are in ulps of ``dtype``, that of the run, also where a tensor of it is kept in a finer one (logits, gradients): a bf16 run
    has rounded to bf16 all the way, and only so can its tensors be ranked.
    """
    ulps: dict[str, float | None] = {}
    distances: dict[str, str] = {}
    unknown: dict[str, str] = {}
    unfair = []
    recording, reference = dict(recording), {name: value for name, value in reference.items() if name != LOADED}
    loaded = int(recording.pop(LOADED, 0))
    if recording.keys() != reference.keys():
        raise HarnessError(f"{layers} TP={size} recorded other tensors than TP=1: {sorted(recording.keys() ^ reference.keys())}")
    for name, expected in reference.items():
        found = compare_recorded(name, recording[name], expected)
        if name.startswith("initial/"):
            unfair += [name] if found.differs or not found.compared else []
            continue
        ulps[name] = None
        if not found.compared:
            ulps[name], unknown[name] = math.nan, found.rule
        elif found.differs:
            difference = _in_ulps_of(dtype, found.difference, recording[name])
            ulps[name] = math.inf if difference.nonfinite else difference.max_ulp
            distances[name] = difference.distance
    if unfair:
        raise HarnessError(f"{layers} TP={size} did not start from the weights of TP=1: {unfair}")
    first = next(iter(distances), None)
    losses = [_scalar(value) for name, value in recording.items() if name.endswith("/loss")]
    largest = max((ulps[name] for name in distances), default=0.0)
    return Row(
        layers, size, sp, len(ulps), len(distances), first, distances.get(first, ""), largest, losses, ulps, unknown, loaded
    )  # fmt: skip


def compare_recorded(name: str, actual, expected) -> Comparison:
    """Whole tensors by their bytes, parts by the rules of ``tpinv diff``."""
    key = Key(0, "", "", name, 0)
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            shapes = [f"{tuple(t.shape)} {t.dtype}" for t in (actual, expected)]
            return Comparison(key, f"{shapes[0]} against {shapes[1]} at TP=1", compared=False)
        difference = compare(actual, expected)
        return Comparison(key, "", differs=bool(difference), difference=difference or None)
    actual, expected = ([part(value)] if isinstance(value, Tensor) else value for value in (actual, expected))
    return compare_parts(key, expected, actual)


def _in_ulps_of(dtype: torch.dtype, difference: Difference, value: Tensor | list[Part]) -> Difference:
    own = value.dtype if isinstance(value, Tensor) else value[0].value.dtype
    if not own.is_floating_point or torch.finfo(own).eps >= torch.finfo(dtype).eps:
        return difference
    return dataclasses.replace(difference, max_ulp=difference.max_ulp * torch.finfo(own).eps / torch.finfo(dtype).eps)


def _scalar(value) -> float:
    return (value if isinstance(value, Tensor) else value[0].value).item()


def part(tensor: Tensor, mark: tuple[int, int] | None = None) -> Part:
    """One rank's part of a tensor; ``mark`` is its sharded dimension with its stride, where that is known."""
    value = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return Part(digest.hexdigest(), tuple(value.shape), str(value.dtype), mark, 1, value)

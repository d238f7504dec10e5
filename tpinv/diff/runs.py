"""Recorded runs, as :mod:`tpinv.testing.record` writes them: a directory with a file for each rank, which must be of one run."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tpinv.testing.record import FORMAT


class Key(NamedTuple):
    """Which tensor: the ``call``-th that was recorded under this name in this phase of this step."""

    step: int
    phase: str
    module: str
    tensor: str
    call: int

    def __str__(self) -> str:
        call = f", call {self.call + 1}" if self.call else ""
        return f"step {self.step}, {self.phase}: {self.module or '(model)'} {self.tensor}{call}"


@dataclass(frozen=True)
class Part:
    """One rank's tensor. ``value`` is None when only its digest was kept."""

    digest: str
    shape: tuple[int, ...]
    dtype: str
    mark: tuple[int, int] | None
    stride: int
    value: Tensor | None


class Run:
    """A directory of recordings, one file per rank. ValueError when it is not that, not complete, or not of one run.

    Attributes:
        ranks: their number.
        fingerprints: of the trees that the model held, sorted; none for stock layers.
        versions: of torch and tpinv, and the device, as rank 0 had them.
        parts: for each rank, what it recorded.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        names = sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []
        if "rank0.pt" not in names:
            raise ValueError(
                f"{self.path} is no recording: there is no {os.path.join(self.path, 'rank0.pt')}; tpinv.testing.record writes one"
            )
        first = _load(os.path.join(self.path, "rank0.pt"))
        self.ranks, self.fingerprints, self.versions = first["ranks"], first["fingerprints"], first["versions"]
        if set(names) != {f"rank{rank}.pt" for rank in range(self.ranks)}:
            raise ValueError(f"{self.path} holds {names}, but rank 0 was one of {self.ranks} ranks; record every rank into one directory")
        files = [first, *(_load(os.path.join(self.path, f"rank{rank}.pt")) for rank in range(1, self.ranks))]
        for rank, file in enumerate(files):
            name = os.path.join(self.path, f"rank{rank}.pt")
            if file["rank"] != rank:
                raise ValueError(f"{name} was written by rank {file['rank']}: files were renamed or swapped; restore their names")
            for field, what in (
                ("run", "of another run"),
                ("ranks", "of another number of ranks"),
                ("fingerprints", "made with another tree"),
            ):
                if file[field] != first[field]:
                    raise ValueError(f"{name} is {what} than rank0.pt: {file[field]} and {first[field]}; record every rank of one run")
        self.parts: list[dict[Key, Part]] = [dict(_parts(file)) for file in files]

    def __getitem__(self, key: Key) -> list[Part]:
        return [parts[key] for parts in self.parts]

    @property
    def keys(self) -> list[Key]:
        """What every rank recorded, in the order of rank 0."""
        return [key for key in self.parts[0] if all(key in parts for parts in self.parts)]

    @property
    def any_keys(self) -> dict[Key, None]:
        """What any rank recorded, in the order of rank 0 and then of the others."""
        return dict.fromkeys(key for parts in self.parts for key in parts)


FIELDS = {"run": str, "rank": int, "ranks": int, "fingerprints": list, "versions": dict, "events": list, "tensors": dict}


def _load(path: str) -> dict:
    try:
        file = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen types for a file that is not its own
        raise ValueError(f"{path} cannot be read as a recording: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(file, dict) or file.get("format") != FORMAT:
        found = f"; it says {file['format']!r}" if isinstance(file, dict) and "format" in file else ""
        raise ValueError(f"{path} is not a {FORMAT!r}{found}; record it with this version of tpinv")
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(file.get(name), kind)]:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or of another type; record it again")
    try:
        dict(_parts(file))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: an event has no proper {error}; record it again") from error
    return file


def _parts(file: dict) -> Iterator[tuple[Key, Part]]:
    for event in file["events"]:
        mark = event["mark"] and tuple(event["mark"])
        value = file["tensors"].get(event["digest"])
        key = Key(*(event[field] for field in Key._fields))
        yield key, Part(event["digest"], tuple(event["shape"]), event["dtype"], mark, event["stride"], value)


def renamed(run: Run, rules: Sequence[tuple[str, str]]) -> None:
    """Renames the modules of ``run``: (regular expression, replacement), one after the other.

    ValueError when two become one, or when one is no regular expression.
    """
    if not rules:
        return
    for rank, parts in enumerate(run.parts):
        new = {}
        for key, part in parts.items():
            module = key.module
            for pattern, replacement in rules:
                try:
                    module = re.sub(pattern, replacement, module)
                except re.error as error:
                    raise ValueError(f"map {pattern!r} to {replacement!r} is no regular expression with its replacement: {error}") from None
            renamed_key = key._replace(module=module)
            if renamed_key in new:
                raise ValueError(f"two modules of {run.path} become {module!r} by the map; make its patterns tell them apart")
            new[renamed_key] = part
        run.parts[rank] = new

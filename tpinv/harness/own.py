"""``tpinv verify --model my_package.my_module:build``: what a user's factory is given, and what it may return. docs/verify.md is for users.

The factory is called once in every run, on every rank, with those of these keyword arguments that its signature names:

    tree                 the ReductionTree of --leaves
    group                the tensor-parallel ProcessGroup, of ``tp`` ranks (the default group: there are no others)
    tp                   its size
    sequence_parallel    whether this run shards activations over tokens; to be named if --sequence-parallel is given
    stock                True in the runs of the stock twin. Without it verify makes the twin (harness/stock.py, or by not converting)
    device, dtype        torch.device and torch.dtype of --device and --dtype
    sizes                all tensor-parallel sizes that are compared, so that one model fits every one of them
    steps, micro_batches of the run
    seed                 what torch's generator was seeded with just before the call, the same everywhere

It returns a model, or (model, batches), or a dict with "model" and any of the fields of :class:`Case`.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpinv.harness.comparison import DTYPES, HarnessError, describe
from tpinv.tree import ReductionTree

FRAMEWORKS = {"megatron": ("megatron.core",), "torchtitan": ("torchtitan",)}


@dataclass(frozen=True)
class OwnRun:
    """One run of the comparison. ``sizes`` are all tensor-parallel sizes compared."""

    model: str  # MODULE:FUNCTION
    layers: str  # "stock" or "tpinv"
    tp: int
    sequence_parallel: bool
    sizes: tuple[int, ...]
    leaves: int = 8
    dtype: str = "fp32"
    steps: int = 5
    micro_batches: int = 1
    device: str = "cpu"
    seed: int = 1234

    @property
    def tree(self) -> ReductionTree:
        return ReductionTree(self.leaves)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")


@dataclass
class Case:
    """What a factory returned.

    Attributes:
        model: the module (Megatron: a GPTModel; TorchTitan: a Trainer.Config, ModelSpec or a model's Config).
        batches: what the model is called with, one after the other and from the start again where there are fewer than steps x
            micro-batches: a dict of keyword arguments, a tuple of positional ones, or a tensor.
        loss: loss(output, batch) -> scalar. Default: the output if it is a scalar, its "loss" if it has one, else the mean of its squares.
        optimizer: optimizer(parameters) -> torch.optim.Optimizer, default AdamW(lr=1e-3); for Megatron an OptimizerConfig.
        clip: gradients are clipped to this norm; None: they are not. The norm is recorded in any case.
        shards: {regular expression on a parameter's name: dimension, or (dimension, stride)} of parameters whose modules do not say how
            they are sharded, or None for one that is replicated.
        state: state(model) -> {name: whole tensor}, the same keys on every rank: what to compare and to load instead of the parameters;
            then ``load`` is needed too.
        load: load(model, {name: whole tensor}): gives this rank's model its part of them.
        convert: Megatron: keyword arguments for convert, such as tokenizer_vocab_size.
    """

    model: Any
    batches: Iterable | None = None
    loss: Callable | None = None
    optimizer: Callable | None = None
    clip: float | None = 1.0
    shards: Mapping[str, Any] | None = None
    state: Callable | None = None
    load: Callable | None = None
    convert: Mapping[str, Any] | None = None

    def take(self, count: int) -> list:
        """The first ``count`` batches, from the start again where there are fewer."""
        try:
            batches = list(itertools.islice(self.batches, count))
        except TypeError:
            raise ValueError(
                f"batches is a {type(self.batches).__name__}; return something to iterate over, such as a list of tuples"
            ) from None
        if not batches:
            raise ValueError("batches is empty; return at least one")
        return [batches[i % len(batches)] for i in range(count)]

    def shard_of(self, name: str):
        """(dimension, stride), None for replicated, or KeyError where ``shards`` says nothing about the parameter."""
        for pattern, dim in (self.shards or {}).items():
            if re.search(pattern, name):
                return (dim, 1) if isinstance(dim, int) else dim and tuple(dim)
        raise KeyError(name)


@functools.cache
def load_factory(model: str) -> Callable:
    """The function named by ``package.module:function`` or ``path/file.py:function``. ValueError naming what is missing."""
    where, colon, name = model.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"--model {model!r} must be MODULE:FUNCTION, such as my_package.my_module:build or path/file.py:build")
    try:
        if where.endswith(".py"):
            module = _load_file(where)
        else:
            if (here := os.getcwd()) not in sys.path:  # a console script does not look there
                sys.path.insert(0, here)
            module = importlib.import_module(where)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise ValueError(f"--model {model!r}: {where} cannot be imported: {describe(error)}") from error
    factory = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise ValueError(f"--model {model!r}: {where} has no function {name}; it has {', '.join(_functions(module)) or 'none'}")
    return factory


def _load_file(path: str):
    """A file as a module of its own name, with its directory on the path, as ``python file.py`` has it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    directory, name = os.path.dirname(os.path.abspath(path)), os.path.basename(path)[: -len(".py")]
    if directory not in sys.path:
        sys.path.insert(0, directory)
    spec = importlib.util.spec_from_file_location(f"tpinv_verify_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _functions(module) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]


def framework_of(factory: Callable) -> str:
    """megatron or torchtitan if the factory's module has imported names of it, else plain."""
    names = getattr(inspect.unwrap(factory), "__globals__", None) or vars(sys.modules[factory.__module__])
    homes = {str(getattr(value, "__module__", None) or getattr(value, "__name__", "")) for value in list(names.values())}
    homes |= {
        home.replace("tpinv.integrations.", "").replace("megatron", "megatron.core", 1)
        for home in homes
        if home.startswith("tpinv.integrations.")
    }
    for framework, packages in FRAMEWORKS.items():
        if any(home == package or home.startswith(f"{package}.") for home in homes for package in packages):
            return framework
    return "plain"


def call_factory(run: OwnRun, group=None) -> tuple[Case, bool]:
    """The case that the factory makes for this run, and whether it makes its stock twin by itself. ValueError for what it asks or returns,
    HarnessError with its own error."""
    factory = load_factory(run.model)
    offered = {
        "tree": run.tree, "group": dist.group.WORLD if group is None else group, "tp": run.tp, "sequence_parallel": run.sequence_parallel,
        "stock": run.layers == "stock", "device": run.torch_device, "dtype": DTYPES[run.dtype], "sizes": run.sizes, "steps": run.steps,
        "micro_batches": run.micro_batches, "seed": run.seed,
    }  # fmt: skip
    parameters = inspect.signature(factory).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unknown = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in offered
    ]
    unknown += [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty and p.name in offered]
    if unknown:
        raise ValueError(f"{run.model} asks for {', '.join(unknown)}; verify passes, by keyword, any of {', '.join(offered)}")
    if run.sequence_parallel and not takes_all and "sequence_parallel" not in named:
        raise ValueError(f"--sequence-parallel: {run.model} takes no sequence_parallel, so it could not build that; add the argument")
    torch.manual_seed(run.seed)
    try:
        returned = factory(**{name: value for name, value in offered.items() if takes_all or name in named})
    except Exception as error:  # whatever the user's code raises
        raise HarnessError(f"{run.model} raised on rank {dist.get_rank()} of {run.tp} ({run.layers}): {describe(error)}") from error
    return _case(run.model, returned), takes_all or "stock" in named


def _case(model: str, returned) -> Case:
    known = [field.name for field in fields(Case)]
    if isinstance(returned, dict):
        if unknown := sorted(map(str, returned.keys() - set(known))):
            raise ValueError(f"{model} returned {', '.join(unknown)}, which verify does not know; a dict may hold {', '.join(known)}")
        if "model" not in returned:
            raise ValueError(f'{model} returned a dict without "model"')
        return Case(**returned)
    if isinstance(returned, tuple):
        if len(returned) != 2:
            raise ValueError(
                f"{model} returned a tuple of {len(returned)}; return a model, (model, batches), or a dict of {', '.join(known)}"
            )
        return Case(*returned)
    if returned is None:
        raise ValueError(f"{model} returned None; return a model, (model, batches), or a dict of {', '.join(known)}")
    return Case(returned)


def require_module(run: OwnRun, model, kind: type = nn.Module) -> None:
    if not isinstance(model, kind):
        raise ValueError(f"{run.model} returned a {type(model).__name__} as its model, which is no {kind.__name__}")


def require_dtype(run: OwnRun, model: nn.Module) -> None:
    """ValueError for a model that did not follow --dtype."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if dtypes and DTYPES[run.dtype] not in dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"{run.model} built parameters of {names}, and --dtype is {run.dtype}; take dtype and follow it, or say another --dtype"
        )

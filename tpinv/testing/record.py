"""Records what flows through any torch model, stock ones included, so that two runs can be compared afterwards: ``tpinv diff A B``.

>>> with record(model, "runs/tp4") as recorder:                     # every rank; writes runs/tp4/rank0.pt, rank1.pt, ...
...     for batch in batches:
...         loss(model(batch)).backward()
...         recorder.step()                                         # before zero_grad and the optimizer
...         optimizer.step()

Hooks only look; one thing of the arithmetic can change. A module's inputs are replaced by views of themselves, because the gradient
of a view is this module's own, where the gradient of the tensor would be the sum over everything that uses it (a module that
overwrites its input has none). Where a module uses its input several times and others use it too (attention and MLP side by side,
shared experts), the gradients are then added in another order, (a + b) + c as a + (b + c): record both runs, or none, or say
``grad_input=False``, which makes no views. Of each step, in the order in which things happen:

    parameter   every parameter, when the step's first module is called
    forward     each module's input and output
    recompute   the same while a backward pass runs: activation checkpointing calls the module again
    backward    each module's grad_output and grad_input, from the last module to the first
    gradient    every parameter's gradient (main_grad where Megatron keeps it there), at ``step()``

and the parameters once more at the end, after the last optimizer step. Buffers, and what no module computes, are not recorded.

Tensors are kept by the digest of their bytes, so that one module's output, which is the next one's input, is kept once. Each rank's
file says which run it is of (an id that rank 0 draws and the others read from the process group's store), its rank and their number,
the fingerprints of the model's trees, and the versions: ``tpinv diff`` refuses files of different runs and orders that cannot agree.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpinv.contract import fingerprint
from tpinv.tree import ReductionTree

FORMAT = "tpinv recording 2"
RUN_ID_WAIT = timedelta(seconds=60)  # for the first rank to begin its recording


class record:
    """Installs the hooks; :meth:`close`, or leaving the ``with`` block, removes them and writes this rank's file.

    Args:
        model: any module. Compiled parts are seen from outside only.
        path: a directory, one for the run. With data parallelism, one for each replica of the model.
        group: the tensor-parallel ProcessGroup (default: the default group, or one rank without any).
        modules: regular expression; only modules whose name it matches somewhere are recorded.
        keep: bytes of tensors that a rank keeps. Beyond them, and from the start with 0, only shapes and digests are recorded: enough
            to say that a tensor differs, not by how much, nor to put shards together.
        shards: {regular expression on "module/tensor": dimension, or (dimension, stride)} of tensors that are sharded. Parameters
            and their gradients carry Megatron's marks; for the rest ``tpinv diff`` goes by the shapes.
        grad_input: record the gradients of modules' inputs, which takes views of them (above).

    Raises:
        ValueError: the directory holds another run's files, or a name is no regular expression.
    """

    def __init__(
        self, model: nn.Module, path: str | os.PathLike, *, group=None, modules: str = "", keep: int = 4 << 30,
        shards: Mapping[str, int | tuple[int, int]] | None = None, grad_input: bool = True,
    ):  # fmt: skip
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if distributed else (0, 1)
        if self.rank < 0:
            raise ValueError("record: this rank is not in the group; call it on the group's ranks only")
        self.path, self.keep, self._grad_input = os.fspath(path), keep, grad_input
        os.makedirs(self.path, exist_ok=True)
        if strangers := sorted(set(os.listdir(self.path)) - {f"rank{rank}.pt" for rank in range(self.ranks)}):
            raise ValueError(f"{self.path} holds {strangers}, which a run of {self.ranks} ranks does not write; use an empty directory")
        try:
            chosen = re.compile(modules)
            self.shards = {re.compile(name): (dim, 1) if isinstance(dim, int) else tuple(dim) for name, dim in (shards or {}).items()}
        except re.error as error:
            raise ValueError(f"{error.pattern!r} is no regular expression: {error}") from None
        self.run = _run_id(group, self.path) if self.ranks > 1 else uuid.uuid4().hex
        self.fingerprints = sorted({fingerprint(tree) for tree in _trees(model)})
        self._step, self._dirty, self._warned = 0, False, False
        self._events: list[dict] = []
        self._tensors: dict[str, Tensor] = {}
        self._calls: Counter = Counter()
        # Marks of parameters that a wrapper copies are lost; these names and strides are the model's own.
        self._parameters = [(name, p) for name, p in model.named_parameters() if chosen.search(name.rpartition(".")[0])]
        self._hooks, self._marks = [], {}
        for name, module in model.named_modules():
            self._marks |= {f"{name}.{parameter}".lstrip("."): mark for parameter, mark in _marks(module).items()}
            if chosen.search(name):
                stride = max((mark[1] for mark in _marks(module).values() if mark), default=1)
                self._hooks += [
                    module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                    module.register_forward_hook(self._after(name, stride)),
                ]

    def __enter__(self) -> "record":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def step(self) -> None:
        """Ends a step: records the gradients of the parameters, and whatever follows belongs to the next step."""
        for name, parameter in self._parameters:
            gradient = parameter.grad if parameter.grad is not None else getattr(parameter, "main_grad", None)
            if gradient is not None:
                self._add_parameter("gradient", name, ".grad", parameter, gradient)
        self._step, self._dirty = self._step + 1, False
        self._calls.clear()

    def close(self) -> None:
        """Removes the hooks and writes the file. A step that was begun is ended first."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._dirty:
            self.step()
        if self._step:
            self._add_parameters()
        versions = {"torch": str(torch.__version__), "tpinv": importlib.metadata.version("tpinv"), "device": _device(self._parameters)}
        recording = {"format": FORMAT, "run": self.run, "rank": self.rank, "ranks": self.ranks, "fingerprints": self.fingerprints}
        recording |= {"versions": versions, "events": self._events, "tensors": self._tensors}
        torch.save(recording, os.path.join(self.path, f"rank{self.rank}.pt"))

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _before(self, module: str):
        def hook(_, args: tuple, kwargs: dict):
            if not self._dirty:
                self._dirty = True
                self._add_parameters()
            inputs = {str(i): value for i, value in enumerate(args)} | kwargs
            for name, tensor in named_tensors(inputs, "input"):
                self._add(_forward_phase(), module, name, tensor)
                where = next((at for at, value in inputs.items() if value is tensor), None)
                # A parameter, or a tensor that carries attributes, must reach the module as what it is.
                if self._grad_input and where is not None and type(tensor) is Tensor and _has_gradient(tensor) and not vars(tensor):
                    inputs[where] = self._watch(tensor.view_as(tensor), module, f"grad_{name}")
            return tuple(inputs[str(i)] for i in range(len(args))), {key: inputs[key] for key in kwargs}

        return hook

    def _after(self, module: str, stride: int):
        def hook(_, args: tuple, output):
            for name, tensor in named_tensors(output, "output"):
                self._add(_forward_phase(), module, name, tensor, stride=stride)
                if _has_gradient(tensor):
                    self._watch(tensor, module, f"grad_{name}", stride)

        return hook

    def _watch(self, tensor: Tensor, module: str, name: str, stride: int = 1) -> Tensor:
        tensor.register_hook(lambda gradient: self._add("backward", module, name, gradient, stride=stride))
        return tensor

    # -- what is kept ------------------------------------------------------------------------------------------------

    def _add_parameters(self) -> None:
        for name, parameter in self._parameters:
            self._add_parameter("parameter", name, "", parameter, parameter)

    def _add_parameter(self, phase: str, full_name: str, suffix: str, parameter: nn.Parameter, value: Tensor) -> None:
        module, _, name = full_name.rpartition(".")
        self._add(phase, module, name + suffix, value, mark=self._marks.get(full_name))

    def _add(self, phase: str, module: str, name: str, tensor: Tensor, *, mark: tuple[int, int] | None = None, stride: int = 1) -> None:
        """``mark``: the tensor is sharded, on this dimension with this stride. ``stride``: if it is, that of its last dimension."""
        with torch.no_grad():
            if hasattr(tensor, "full_tensor"):  # a DTensor, whose import takes a second for those who have none
                tensor, mark = tensor.full_tensor(), None
            value = tensor.detach().to("cpu", copy=True).contiguous()
        mark = next((mark for pattern, mark in self.shards.items() if pattern.search(f"{module}/{name}")), mark)
        digest = _digest(value)
        size = value.numel() * value.element_size()
        if digest not in self._tensors and size <= self.keep:
            self._tensors[digest] = value
            self.keep -= size
        elif digest not in self._tensors and self.keep and not self._warned:
            self._warned = True
            warnings.warn(
                f"recording {self.path}: keep is used up in step {self._step} at {module}/{name}; digests only from here", stacklevel=2
            )
        call = self._calls[phase, module, name]
        self._calls[phase, module, name] += 1
        self._events.append(
            {
                "step": self._step,
                "phase": phase,
                "module": module,
                "tensor": name,
                "call": call,
                "digest": digest,
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "mark": mark and list(mark),
                "stride": stride,
            }  # fmt: skip
        )


def _run_id(group, path: str) -> str:
    """The same random string on every rank of the group, by its store: no collective, which ranks that do not record would miss."""
    store = dist.distributed_c10d._get_default_store()
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    name = f"tpinv.testing.record/{','.join(map(str, ranks))}"
    turn = store.add(f"{name}/{dist.get_rank()}", 1)  # each rank counts its own recordings
    key = f"{name}/run{turn}"
    if dist.get_rank(group) == 0:
        store.set(key, uuid.uuid4().hex)
    try:
        store.wait([key], RUN_ID_WAIT)
    except RuntimeError as error:
        raise RuntimeError(
            f"record({path!r}): rank {ranks[0]} did not begin its recording {turn} within {RUN_ID_WAIT}; record on every rank"
        ) from error
    return store.get(key).decode()


def _trees(model: nn.Module) -> set[ReductionTree]:
    """Those that the model's modules hold, by whatever name."""
    return {
        tree
        for module in model.modules()
        for tree in (*vars(module).values(), getattr(module, "tree", None))
        if isinstance(tree, ReductionTree)
    }


def _device(parameters: list[tuple[str, nn.Parameter]]) -> str:
    device = next((parameter.device for _, parameter in parameters), torch.device("cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _marks(module: nn.Module) -> dict[str, tuple[int, int] | None]:
    """Of the module's own parameters: (dimension, stride) that it is cut on, or None."""
    if hasattr(module, "parameter_shardings"):
        return {name: None if s.dim is None else (s.dim, s.stride) for name, s in module.parameter_shardings().items()}
    marked = {name: p for name, p in module.named_parameters(recurse=False) if getattr(p, "tensor_model_parallel", False)}
    return {name: (p.partition_dim, p.partition_stride) for name, p in marked.items()}


def _has_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _forward_phase() -> str:
    return "forward" if torch._C._current_graph_task_id() == -1 else "recompute"


def _digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


def named_tensors(value, name: str) -> list[tuple[str, Tensor]]:
    """The tensors in nested arguments or results. A single one is called ``name`` alone, as (y, None) and y are the same to a reader."""
    found = list(_walk(value, ""))
    return [(name, tensor) for _, tensor in found] if len(found) == 1 else [(name + path, tensor) for path, tensor in found]


def _walk(value, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from _walk(inner, f"{path}.{i}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), f"{path}.{field.name}")

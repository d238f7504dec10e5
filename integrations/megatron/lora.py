"""LoRA on the parallel linears of a converted model: y + alpha/rank (x A^T) B^T, the same bytes at every tensor-parallel size.

A [rank, K], B [N, rank]; the base is frozen. Beside a column-parallel linear A is whole on every rank and B is cut on N; beside a
row-parallel one A is cut on K and B is whole:

                  h = x A^T                       y = h B^T                 dh = dy B               dA, dB
    column        local: K is whole               local                     TREE over N, cut by p   over tokens, whole
    row           TREE over K, cut by p           local                     local                   over tokens, whole

Both products are tpinv's linears, so these sums are those of a linear of that shape. Under sequence parallelism tokens are gathered before A of
a column-parallel linear, and the rank's own rows taken from a row-parallel one's adapter: dA and dB see all tokens on every rank.
"""

import math
import zlib
from collections.abc import Collection

import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from tpinv import functional
from tpinv.collectives import Ranks, all_gather, resolve
from tpinv.integrations.megatron import converted, layers, te
from tpinv.sharding import shard

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class LoRAAdapter(layers.TreeBound, nn.Module):
    """A and B of one linear, and their product. ``scale`` is alpha / rank."""

    owned = frozenset({"a", "b"})

    def __init__(self, linear: nn.Module, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.column = isinstance(linear, layers.TPInvariantColumnParallelLinear)
        self.tree, self.tp_group, self.ranks, self.scale = linear.tree, linear.tp_group, resolve(linear.tp_group), scale
        self.cut_stride = linear.tpinv_stride if self.column else 1
        self.sequence_parallel = linear.sequence_parallel and self.ranks.size > 1
        self.converted = True
        bound = 1 / math.sqrt(linear.input_size)
        whole = torch.empty(rank, linear.input_size).uniform_(-bound, bound, generator=generator)  # not a function of the ranks
        a = whole if self.column else shard(whole, 1, self.ranks.rank, self.ranks.size)
        self.a = nn.Parameter(a.to(linear.weight.device, linear.weight.dtype))
        self.b = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0], rank))
        converted.mark(self.a, self.parameter_sharding()["a"])
        converted.mark(self.b, self.parameter_sharding()["b"])

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        return {"a": None, "b": (0, self.cut_stride)} if self.column else {"a": (1, 1), "b": None}

    def forward(self, x: Tensor) -> Tensor:
        self.require_converted()
        if self.column:
            x = _GatherRows.apply(x, self.ranks) if self.sequence_parallel else x
            h = functional.row_parallel_linear(x, self.a, tree=self.tree, group=layers.ALONE)
            y = functional.column_parallel_linear(h, self.b, tree=self.tree, group=self.ranks, stride=self.cut_stride)
        else:
            h = functional.row_parallel_linear(x, self.a, tree=self.tree, group=self.ranks)
            y = functional.column_parallel_linear(h, self.b, tree=self.tree, group=layers.ALONE)
            y = _OwnRows.apply(y, self.ranks) if self.sequence_parallel else y
        return y * self.scale

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        cut = {name: where[0] for name, where in self.parameter_sharding().items() if where}
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        state = make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, cut, sharded_offsets, **groups)
        if self.cut_stride == 2:  # SwiGLU's gate and up, each cut by itself
            state[f"{prefix}b"] = apply_swiglu_sharded_factory(state[f"{prefix}b"], sharded_offsets)
        return state


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; the gradient is the same on every rank, so a rank's part of it is its own rows."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_gather(x.detach(), ranks)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy.chunk(ctx.ranks.size)[ctx.ranks.rank].contiguous(), None


class _OwnRows(torch.autograd.Function):
    """This rank's rows of what is the same on every rank; the gradient is put together from all."""

    @staticmethod
    def forward(ctx, y: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return y.chunk(ranks.size)[ranks.rank].contiguous()

    @staticmethod
    def backward(ctx, dy: Tensor):
        return all_gather(dy.contiguous(), ctx.ranks), None


class _Adapted:
    """A converted linear with an adapter, its module ``lora``."""

    own_modules = frozenset({"lora"})

    def forward(self, input_: Tensor, *args, **kwargs):
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self.lora(input_), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        lora = self._modules.pop("lora")  # the stock method takes all that the module holds for its own weight and bias
        try:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self._modules["lora"] = lora
        return state | lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)


class LoRAColumnParallelLinear(_Adapted, layers.TPInvariantColumnParallelLinear):
    """TPInvariantColumnParallelLinear with a LoRA adapter."""


class LoRARowParallelLinear(_Adapted, layers.TPInvariantRowParallelLinear):
    """TPInvariantRowParallelLinear with a LoRA adapter."""


ADAPTED = {
    layers.TPInvariantColumnParallelLinear: LoRAColumnParallelLinear,
    layers.TPInvariantRowParallelLinear: LoRARowParallelLinear,
}


def add_lora(
    model: nn.Module | list[nn.Module], *, rank: int, alpha: float, targets: Collection[str] = TARGETS, seed: int = 0
) -> nn.Module | list[nn.Module]:
    """Freezes a converted model and hangs adapters on its linears, in place. Before DistributedDataParallel and the optimizer are built.

    Args:
        model: what convert returned, not wrapped in DistributedDataParallel yet.
        rank: of the adapters. alpha: they are scaled by alpha / rank.
        targets: the last part of the names of the linears.
        seed: A is drawn uniformly within 1/sqrt(K), whole and then cut, the same at every tensor-parallel size; B is zero.

    Returns:
        ``model``. The adapters are ``NAME.lora.a`` and ``NAME.lora.b``; Megatron's distributed checkpoints hold and reshard them.

    Raises:
        ValueError: a model that was not converted or is wrapped already, no linear of these names, one that has an adapter, or gathers its
            output, or shares its weight.
    """
    chunks = model if isinstance(model, list) else [model]
    if not all(converted.is_converted(chunk) for chunk in chunks):
        raise ValueError("add_lora needs a converted model; call convert(model, tree=tree) first")
    if any(hasattr(module, "ddp_config") for chunk in chunks for module in chunk.modules()):
        raise ValueError("DistributedDataParallel has made its buffers of the frozen weights; call add_lora before the model is wrapped")
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    found = [(name, m) for chunk in chunks for name, m in chunk.named_modules() if name.rsplit(".", 1)[-1] in targets]
    problems = [f"{name}: {problem}" for name, linear in found if (problem := _problem(linear))]
    if problems or not found:
        listed = "\n".join(f"  - {problem}" for problem in problems or [f"no linear is called {' or '.join(targets)}"])
        raise ValueError(f"these linears cannot have adapters:\n{listed}")
    for chunk in chunks:
        chunk.requires_grad_(False)
    for name, linear in found:
        kind = next(adapted for base, adapted in ADAPTED.items() if isinstance(linear, base))
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.removeprefix("module.").encode()))
        linear.__class__ = kind
        linear.lora = LoRAAdapter(linear, rank, alpha / rank, generator)
    return model


def _problem(linear: nn.Module) -> str | None:
    if isinstance(linear, _Adapted):
        return "has an adapter already; choose other targets"
    if te.is_linear(linear):
        return "is TransformerEngine's linear, for which there are no adapters; build the model from the local spec"
    if not isinstance(linear, tuple(ADAPTED)):
        return f"{type(linear).__name__} is no converted linear; choose other targets"
    if getattr(linear, "gather_output", False) or linear.weight is None:
        return "gathers its output, or has no weight of its own; choose other targets"
    return None

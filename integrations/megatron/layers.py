"""Megatron-Core's layers with tpinv's arithmetic: subclasses that override ``forward`` and nothing else.

They build, name, shard, initialise and checkpoint their parameters exactly as their stock bases do (whatever the version of
Megatron-Core), so a built module becomes one by changing its ``__class__`` (convert.py), and a spec by naming it (specs.py).
Each carries its ``tree``: as a class attribute of the subclass that ``bind`` makes, or set on the instance by ``convert``.

A bias is always added inside and never left to the caller: the gradient that autograd would give it there is ``torch.sum``, whose order
depends on the shard's width, and under sequence parallelism only a part of the tokens. A caller that asked for it by ``skip_bias_add``
gets a vector of its shape and dtype that holds -0.0, the one number that changes no bit of what it is added to.
"""

import collections
import copy
import functools

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.mlp import MLP
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from tpinv import functional
from tpinv.collectives import Ranks
from tpinv.integrations.megatron.guard import ACTIVATIONS
from tpinv.ops.marks import KeepsMarks
from tpinv.sharding import Sharded, Sharding
from tpinv.tree import ReductionTree

ALONE = Ranks(None, 0, 1)


class TreeBound(KeepsMarks, Sharded):
    """A class that needs a tree. ``bind`` returns the subclass for one tree, which Megatron can then build without knowing of it."""

    tree: ReductionTree
    ranks = None  # set by convert
    converted = False  # set by convert: until then the embedding, the output layer and the loss may be stock

    @classmethod
    @functools.cache
    def bind(cls, tree: ReductionTree) -> type:
        return type(cls.__name__, (cls,), {"tree": tree, "__module__": cls.__module__, "__doc__": cls.__doc__})

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        """Parameter name -> (dimension, stride) of its shards over ``tp_group``, or None: whole on every rank, and so is its gradient."""
        return {}

    def parameter_shardings(self) -> dict[str, Sharding]:
        if self.ranks is None:
            return {}
        held = {name: cut for name, cut in self.parameter_sharding().items() if self._parameters.get(name) is not None}
        return {name: Sharding(self.ranks, *(cut or (None,))) for name, cut in held.items()}

    def require_converted(self) -> None:
        if problems := foreign_parts(self):
            raise ValueError(f"{type(self).__name__} has changed since it was converted: {'; '.join(problems)}")
        if not self.converted:
            raise ValueError(
                f"this {type(self).__name__} was built from tpinv's spec, but its model was not converted: the embedding, the output "
                "layer and the loss are in no spec; call convert(model, tree=tree) once the model is built"
            )


OWNED = frozenset({"weight", "bias"})  # what a class may own, unless it says otherwise


def foreign_parts(module: torch.nn.Module, kind: type | None = None) -> list[str]:
    """For a module that is of tpinv's class ``kind`` or will be. What hangs under a module that computes with a weight and a bias and would be left out of its sums, such as a LoRA adapter."""
    owned, own_modules = (getattr(kind or module, name, default) for name, default in (("owned", OWNED), ("own_modules", ())))
    kind, problems = type(module).__name__, []
    parameters = module._parameters.keys() - owned
    if foreign := sorted(name for name in parameters if module._parameters[name] is not None):
        problems.append(f"{kind} does not know its parameters {', '.join(foreign)}; for adapters, use add_lora")
    if foreign := sorted(module._modules.keys() - own_modules):
        problems.append(f"{kind} does not know its modules {', '.join(foreign)}; for adapters, use add_lora")
    return problems


def refuse(module: torch.nn.Module, arguments: dict) -> None:
    """Arguments of other versions of Megatron-Core, which could mean anything."""
    if unknown := sorted(name for name, value in arguments.items() if value is not None):
        raise ValueError(f"{type(module).__name__} does not know {', '.join(unknown)}; pass None")


def fuses_main_grad(linear: torch.nn.Module, weight: Tensor) -> bool:
    """Whether dW goes straight into ``weight.main_grad``, in float32 and unrounded: always where there is such a buffer, whatever
    config.gradient_accumulation_fusion says, so that no bit depends on it; of tied embeddings too, which Megatron marks ``zero_out_wgrad``.

    Not for a weight of another module without that mark, and not under Megatron-FSDP, which makes its own buffers.
    """
    return (
        (weight is linear.weight or getattr(weight, "zero_out_wgrad", False))
        and hasattr(weight, "grad_added_to_main_grad")
        and getattr(getattr(weight, "main_grad", None), "dtype", None) == torch.float32
        and not hasattr(weight, "__fsdp_param__")
    )


def mark_shared_weights(modules: list[torch.nn.Module]) -> None:
    """Sets Megatron's mark for parameters that are used more than once, also where it is not Megatron that shares them."""
    owners = collections.Counter(id(parameter) for module in modules for parameter in module.parameters(recurse=False))
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if owners[id(parameter)] > 1:
                parameter.zero_out_wgrad = True


def stride_of(linear: ColumnParallelLinear) -> int:
    """2 for SwiGLU's fc1. Megatron says it with a mark on the weight; a converted linear knows it itself."""
    if "tpinv_stride" in vars(linear):
        return linear.tpinv_stride
    return getattr(linear.weight, "partition_stride", 1)  # check_modules has seen to it that the mark is there


def neutral_like(bias: Tensor) -> Tensor:
    """What a caller that adds the bias itself gets for one that is in the output already."""
    return torch.full_like(bias, -0.0, requires_grad=False)


def neutral_bias(linear: torch.nn.Module) -> Tensor | None:
    return neutral_like(linear.bias) if linear.skip_bias_add and linear.bias is not None else None


class TPInvariantColumnParallelLinear(TreeBound, ColumnParallelLinear):
    """ColumnParallelLinear: dgrad is a tree over out-features. SwiGLU's fc1 is the one with stride 2."""

    def __init__(self, *args, stride: int = 1, **kwargs):
        super().__init__(*args, stride=stride, **kwargs)
        self.tpinv_stride = stride  # Megatron keeps it only as a mark on the weight, which loading may drop

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        return {"weight": (0, self.tpinv_stride), "bias": (0, self.tpinv_stride)}

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        self.require_converted()
        weight = self.weight if weight is None else weight
        if weight is None or tuple(weight.shape) != (self.output_size_per_partition, self.input_size):
            found = None if weight is None else tuple(weight.shape)
            raise ValueError(f"weight of shape {found} must be {(self.output_size_per_partition, self.input_size)}; pass it to forward")
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        output = functional.column_parallel_linear(
            input_,
            weight,
            self.bias,
            tree=self.tree,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            stride=self.tpinv_stride,
            gather_output=gather,
            gradient_accumulation_fusion=fuses_main_grad(self, weight),
        )
        return output, neutral_bias(self)


class TPInvariantRowParallelLinear(TreeBound, RowParallelLinear):
    """RowParallelLinear: the forward is a tree over in-features; the bias's gradient is complete on every rank."""

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        return {"weight": (1, 1), "bias": None}

    def forward(self, input_: Tensor):
        self.require_converted()
        output = functional.row_parallel_linear(
            input_,
            self.weight,
            self.bias,
            tree=self.tree,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel and self.tp_group.size() > 1,
            gradient_accumulation_fusion=fuses_main_grad(self, self.weight),
        )
        return output, neutral_bias(self)


def replace_activation(mlp: MLP) -> None:
    """On a CPU, torch's activations depend on the width of the shard (ops/activation.py). The config is the module's own copy."""
    activation = mlp.config.activation_func
    mlp.config = copy.copy(mlp.config)
    mlp.config.activation_func = mlp.activation_func = ACTIVATIONS.get(activation, activation)


class TPInvariantSwiGLU(MLP):
    """An MLP whose SwiGLU is one kernel each way, on a GPU. The linears have added their biases."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, padding_mask=None, **others):
        """padding_mask is for routers: a dense MLP has no use for it."""
        refuse(self, others)
        if per_token_scale is not None:
            raise ValueError("per_token_scale belongs to mixture of experts, which is not covered")
        intermediate, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(functional.swiglu(intermediate))


def fuse_swiglu(mlp: MLP) -> None:
    """Where the module computes silu(gate) * up and nothing else."""
    config = mlp.config
    plain = not getattr(config, "glu_linear_offset", 0.0) and getattr(config, "activation_func_clamp_value", None) is None
    if type(mlp) is MLP and plain and config.gated_linear_unit and config.activation_func is torch.nn.functional.silu:
        mlp.__class__ = TPInvariantSwiGLU


class TPInvariantVocabParallelEmbedding(TreeBound, VocabParallelEmbedding):
    """VocabParallelEmbedding: selects in the forward, sums tokens in the order (sequence, batch) in the backward, SP or not."""

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        return {"weight": (0, 1)}

    def forward(self, input_: Tensor):
        self.require_converted()
        scatter = self.reduce_scatter_embeddings and self.tp_group.size() > 1
        output = functional.vocab_parallel_embedding(input_.t(), self.weight, group=self.tp_group, sequence_parallel=scatter)
        return output if self.reduce_scatter_embeddings else output.transpose(0, 1)


class TPInvariantEmbedding(torch.nn.Embedding):
    """Learned positions, whole on every rank: gradients in token order instead of torch's atomics."""

    def forward(self, input_: Tensor) -> Tensor:
        return functional.vocab_parallel_embedding(input_, self.weight, group=ALONE)


class _NormMixin(TreeBound):
    """What a norm must know beside its parameters: who shares its rows."""

    tp_group = None
    rows_by_sequence = False
    rows_by_heads = False

    def share_rows(self, tp_group, *, by_sequence: bool = False, by_heads: bool = False) -> None:
        """Rows are sharded over ``tp_group`` by sequence or heads, or not at all. ``by_heads`` orders the rows, so also at TP = 1."""
        self.tp_group, self.rows_by_sequence, self.rows_by_heads = tp_group, by_sequence, by_heads

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        return {"weight": None, "bias": None}

    def _rows(self) -> dict:
        return {
            "tree": self.tree,
            "group": self.tp_group,
            "sequence_parallel": self.rows_by_sequence,
            "heads_parallel": self.rows_by_heads,
        }


class TPInvariantRMSNorm(_NormMixin, torch.nn.RMSNorm):
    """RMSNorm whose weight gradient is a tree over the rows of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return functional.rms_norm(x, self.weight, eps, **self._rows())


class TPInvariantLayerNorm(_NormMixin, torch.nn.LayerNorm):
    """LayerNorm whose parameter gradients are trees over the rows of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight, self.bias, self.eps, **self._rows())


class TPInvariantNorm(TreeBound):
    """Builds the norm that ``config.normalization`` names, as Megatron's WrappedTorchNorm does, also under sequence parallelism."""

    by_heads = False

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        kinds = {"RMSNorm": TPInvariantRMSNorm, "LayerNorm": TPInvariantLayerNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization={config.normalization!r} is not covered; use one of {sorted(kinds)}")
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        norm = kinds[config.normalization].bind(cls.tree)(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        group = get_tensor_model_parallel_group_if_none(None)
        norm.share_rows(group, by_sequence=config.sequence_parallel and group.size() > 1 and not cls.by_heads, by_heads=cls.by_heads)
        return norm


class TPInvariantQKNorm(TPInvariantNorm):
    """The same for q_layernorm and k_layernorm: one weight for all heads, and the heads are sharded."""

    by_heads = True

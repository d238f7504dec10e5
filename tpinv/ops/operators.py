"""The functions of a transformer block as torch operators: opaque to torch.compile(fullgraph=True), and one entry each in the save set
of selective activation checkpointing. The bits are those of the functions, which compute them.

    torch.ops.tpinv.column_parallel_linear    row_parallel_linear    rms_norm    swiglu    core_attention    packed_attention

An operator takes what a graph can hold: tensors, numbers, and the tree and the group by their names ("" is a single rank).
"""

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from tpinv.collectives import Ranks, resolve
from tpinv.ops import activation, attention, linear, norm, products
from tpinv.ops.shapes import unit_stride
from tpinv.reference import attention as reference_attention
from tpinv.tree import ReductionTree

ALONE = Ranks(None, 0, 1)
_library = torch.library.Library("tpinv", "FRAGMENT")


def group_name(ranks: Ranks) -> str:
    return ranks.group.group_name if ranks.size > 1 else ""


def _ranks(name: str) -> Ranks:
    return resolve(_resolve_process_group(name)) if name else ALONE


def _operator(signature: str, compute, shape) -> None:
    """Defines an operator of any device, without a gradient. ``shape`` makes its result from fake tensors."""
    name = "tpinv::" + signature.split("(")[0]
    _library.define(signature, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, torch.no_grad()(compute), "CompositeExplicitAutograd")
    torch.library.register_fake(name, shape, lib=_library)


def _gradient(name: str, setup, backward) -> None:
    """Gives an operator its gradient, as torch.library.register_autograd does; that takes a reader of schemas and other generality
    along, which cost the host more than a small product does."""
    operator = getattr(torch.ops.tpinv, name).default

    def below_autograd(*arguments_keyset):
        *arguments, keyset = arguments_keyset
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments_keyset):
            result = below_autograd(*arguments_keyset)
            setup(ctx, arguments_keyset[:-1], result)
            return result

        @staticmethod
        def backward(ctx, *dy):
            gradients = backward(ctx, *dy)
            return *(gradients if isinstance(gradients, tuple) else (gradients,)), None

    def dispatched(keyset, *arguments):
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        return (Differentiable.apply if wanted else below_autograd)(*arguments, keyset)

    Differentiable.__name__ = Differentiable.__qualname__ = f"tpinv_{name}"
    _library.impl(f"tpinv::{name}", dispatched, "Autograd", with_keyset=True)


def _like(dy, *inputs_and_needs) -> list[Tensor]:
    *inputs, needs = inputs_and_needs
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, need in zip(inputs, needs, strict=True) if need]


def _needed(gradients, needs: list[bool]) -> list[Tensor]:
    return [gradient for gradient, need in zip(gradients, needs, strict=False) if need]


def _spread(gradients: list[Tensor], needs: list[bool], arguments: int) -> tuple:
    gradients = iter(gradients)
    return (*(next(gradients) if need else None for need in needs), *([None] * (arguments - len(needs))))


# -- linears: (x, weight, bias, leaves, node_dtype, group, sequence_parallel[, stride]) -------------------------------------


def _column(x, weight, bias, leaves, node_dtype, group, sequence_parallel, stride):
    settings = ReductionTree(leaves, node_dtype), _ranks(group), sequence_parallel, stride
    linear.check_column(x, weight, bias, *settings)
    return linear.column_forward(x, weight, bias, *settings)


def _column_shape(x, weight, bias, leaves, node_dtype, group, sequence_parallel, stride):
    tokens, *rest = x.shape[:-1]
    return x.new_empty(tokens * (_ranks(group).size if sequence_parallel else 1), *rest, weight.shape[0])


def _column_backward(dy, x, weight, needs, leaves, node_dtype, group, sequence_parallel, stride):
    settings = ReductionTree(leaves, node_dtype), _ranks(group), sequence_parallel, stride
    return _needed(linear.column_backward(dy, x, weight, needs, *settings), needs)


def _row(x, weight, bias, leaves, node_dtype, group, sequence_parallel):
    settings = ReductionTree(leaves, node_dtype), _ranks(group), sequence_parallel
    linear.check_row(x, weight, bias, *settings)
    return linear.row_forward(x, weight, bias, *settings)


def _row_shape(x, weight, bias, leaves, node_dtype, group, sequence_parallel):
    tokens, *rest = x.shape[:-1]
    return x.new_empty(tokens // (_ranks(group).size if sequence_parallel else 1), *rest, weight.shape[0])


def _row_backward(dy, x, weight, needs, leaves, node_dtype, group, sequence_parallel):
    settings = ReductionTree(leaves, node_dtype), _ranks(group), sequence_parallel
    return _needed(linear.row_backward(dy, x, weight, needs, *settings), needs)


def _linear_gradient_shapes(dy, x, weight, needs, *_):
    bias = weight[:, 0]
    return _like(dy, x, weight, bias, needs)


def _linear_setup(ctx, inputs, output):
    x, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _linear_gradient(operator):
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad[:3])
        gradients = operator(dy, *ctx.saved_tensors, needs, *ctx.settings)
        return _spread(gradients, needs, 3 + len(ctx.settings))

    return backward


_SETTINGS = "int leaves, str node_dtype, str group, bool sequence_parallel"
for _name, _more, *_functions, _backward in (
    ("column_parallel_linear", ", int stride", _column, _column_shape, _column_backward),
    ("row_parallel_linear", "", _row, _row_shape, _row_backward),
):
    _operator(f"{_name}(Tensor x, Tensor weight, Tensor? bias, {_SETTINGS}{_more}) -> Tensor", *_functions)
    _backward_schema = f"{_name}_backward(Tensor dy, Tensor x, Tensor weight, bool[] needs, {_SETTINGS}{_more}) -> Tensor[]"
    _operator(_backward_schema, _backward, _linear_gradient_shapes)
    _gradient(_name, _linear_setup, _linear_gradient(getattr(torch.ops.tpinv, f"{_name}_backward")))


# -- rms_norm ---------------------------------------------------------------------------------------------------------------


def _rms_norm(x, weight, eps, leaves, group, sequence_parallel, heads_parallel):
    ranks = _ranks(group) if sequence_parallel or heads_parallel else ALONE
    norm.check(x, weight, None, ReductionTree(leaves), ranks, sequence_parallel, heads_parallel)
    return norm.forward(x, weight, None, eps, False)


def _rms_norm_backward(dy, x, weight, needs, eps, leaves, group, sequence_parallel, heads_parallel):
    ranks = _ranks(group) if sequence_parallel or heads_parallel else ALONE
    return _needed(norm.backward(dy, x, weight, (*needs, False), eps, False, ReductionTree(leaves), ranks, heads_parallel, None), needs)


def _rms_norm_setup(ctx, inputs, output):
    x, weight, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradient(ctx, dy):
    needs = list(ctx.needs_input_grad[:2])
    return _spread(torch.ops.tpinv.rms_norm_backward(dy, *ctx.saved_tensors, needs, *ctx.settings), needs, 7)


_SETTINGS = "float eps, int leaves, str group, bool sequence_parallel, bool heads_parallel"
_operator(
    f"rms_norm(Tensor x, Tensor weight, {_SETTINGS}) -> Tensor",
    _rms_norm,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_operator(
    f"rms_norm_backward(Tensor dy, Tensor x, Tensor weight, bool[] needs, {_SETTINGS}) -> Tensor[]",
    _rms_norm_backward,
    lambda dy, x, weight, needs, *_: _like(dy, x, weight, needs),
)
_gradient("rms_norm", _rms_norm_setup, _rms_norm_gradient)


# -- swiglu -----------------------------------------------------------------------------------------------------------------


def _swiglu(x):
    if products.on_gpu(x):
        activation.check_swiglu(x)
        return activation.swiglu_forward(x)
    return activation.swiglu(x).contiguous()


def _swiglu_backward(dy, x):
    if products.on_gpu(x):
        return activation.swiglu_backward(dy, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(activation.swiglu(leaf), leaf, dy)[0]


_operator("swiglu(Tensor x) -> Tensor", _swiglu, lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
_operator("swiglu_backward(Tensor dy, Tensor x) -> Tensor", _swiglu_backward, lambda dy, x: x.new_empty(x.shape))
_gradient(
    "swiglu",
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, dy: torch.ops.tpinv.swiglu_backward(dy, *ctx.saved_tensors),
)


# -- core_attention: query [sq, b, h, d], key and value [sk, b, g, d]; packed_attention: [t, h, d] and [u, g, d] ---------


def _attention(query, key, value, scale, causal):
    attention.check(query, key, value, scale, causal)
    return attention.backend(query)[0](*map(unit_stride, (query, key, value)), scale, causal)


def _attention_shape(query, key, value, scale, causal):
    sq, batch, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, sq, dtype=torch.float32)


def _attention_backward(dout, query, key, value, out, lse, scale, causal):
    return attention.backend(query)[1](*map(unit_stride, (query, key, value)), out, lse, unit_stride(dout), scale, causal)


def _packed_attention(query, key, value, cu_q, cu_k, first_q, first_k, longest_q, longest_k, scale, causal):
    pack = attention.check_packed(query, key, value, cu_q, cu_k, first_q, first_k, longest_q, longest_k, scale, causal)
    out, lse = attention.backend(query)[0](*(unit_stride(t).unsqueeze(1) for t in (query, key, value)), scale, causal, pack)
    return out.squeeze(1), lse


def _packed_shape(query, *_):
    return query.new_empty(query.shape), query.new_empty(1, query.shape[1], query.shape[0], dtype=torch.float32)


def _packed_attention_backward(dout, query, key, value, out, lse, cu_q, cu_k, first_q, first_k, longest_q, longest_k, scale, causal):
    query, key, value, out, dout = (unit_stride(t).unsqueeze(1) for t in (query, key, value, out, dout))
    pack = reference_attention.Pack(*(t.contiguous() for t in (cu_q, cu_k, first_q, first_k)), longest_q, longest_k)
    gradients = attention.backend(query)[1](query, key, value, out, lse, dout, scale, causal, pack)
    return tuple(gradient.squeeze(1) for gradient in gradients)


def _attention_setup(ctx, inputs, output):
    query, key, value, *others = inputs
    ctx.settings = [x for x in others if not isinstance(x, Tensor)]
    ctx.save_for_backward(query, key, value, *output, *(x for x in others if isinstance(x, Tensor)))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_gradient(operator):
    def backward(ctx, dout, _):
        arguments = *ctx.saved_tensors, *ctx.settings
        return *operator(dout, *arguments), *[None] * (len(arguments) - 5)

    return backward


_OPERANDS = "Tensor query, Tensor key, Tensor value"
for _name, _settings, _compute, _compute_backward, _shape in (
    ("core_attention", "float scale, bool causal", _attention, _attention_backward, _attention_shape),
    (
        "packed_attention",
        "Tensor cu_seqlens_q, Tensor cu_seqlens_kv, Tensor first_q, Tensor first_kv, SymInt max_seqlen_q, SymInt max_seqlen_kv, "
        "float scale, bool causal",
        _packed_attention,
        _packed_attention_backward,
        _packed_shape,
    ),
):
    _operator(f"{_name}({_OPERANDS}, {_settings}) -> (Tensor, Tensor)", _compute, _shape)
    _operator(
        f"{_name}_backward(Tensor dout, {_OPERANDS}, Tensor out, Tensor lse, {_settings}) -> (Tensor, Tensor, Tensor)",
        _compute_backward,
        lambda dout, *inputs: tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:3]),
    )
    _gradient(_name, _attention_setup, _attention_gradient(getattr(torch.ops.tpinv, f"{_name}_backward")))

"""Weight gradients straight into ``main_grad``, the float32 buffer that Megatron-Core keeps beside a parameter.

    main_grad[n, k] += float32(dW[n, k] rounded to the weight's dtype)          one fp32 addition

That is what ``main_grad.add_(weight.grad)`` makes of it after backward, so fused and unfused are the same bytes; fused, a third less
memory is read and written. The agreement with whoever owns the buffer is Megatron's (gradient_accumulation_fusion): its hooks are to run as
ever, so they find a tensor without meaning in the place of the gradient, and ``weight.grad_added_to_main_grad`` tells them that there is
nothing left to add. A gradient that the weight gets from elsewhere in the same backward pass would be lost with it: that is an error.
"""

import functools
import weakref

import torch
from torch import Tensor

from tpinv.collectives import Ranks
from tpinv.ops import products
from tpinv.tree import ReductionTree


def check(weight: Tensor) -> None:
    """ValueError unless ``weight`` has a buffer of its shape in float32."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != torch.float32 or buffer.shape != weight.shape or buffer.device != weight.device:
        found = "none" if buffer is None else f"{buffer.dtype} {tuple(buffer.shape)} on {buffer.device}"
        raise ValueError(
            f"gradient_accumulation_fusion adds to weight.main_grad, which must be float32 {tuple(weight.shape)} on {weight.device}, "
            f"not {found}; allocate it before the forward, or pass gradient_accumulation_fusion=False"
        )


def accumulates(node) -> bool:
    """Whether this backward pass is one that ends in .grad at ``node``, the weight's AccumulateGrad. ``torch.autograd.grad`` does
    not: it wants the gradient itself, or none, and nobody expects it to change a buffer."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # how torch says that autograd.grad was asked for this leaf
        return False


def add(weight: Tensor, dy: Tensor, x: Tensor, tree: ReductionTree, ranks: Ranks, *, dim: int, stride: int = 1) -> Tensor:
    """Adds dW = dy^T x to ``weight.main_grad``; dimension ``dim`` of dW is the sharded one. Returns what autograd gets instead.

    A weight that a backward pass meets a second time is a ValueError: autograd would have added both gradients in the weight's
    dtype before the buffer sees them, and the first one is in it already.
    """
    backward = torch._C._current_graph_task_id()
    if getattr(weight, "tpinv_fused_in", None) == backward:
        raise ValueError(
            f"weight {tuple(weight.shape)} is used twice in one backward pass, where gradient_accumulation_fusion would round other sums; "
            "pass gradient_accumulation_fusion=False (with Megatron-Core, set weight.zero_out_wgrad = True)"
        )
    if not hasattr(weight, "tpinv_fused_in"):
        weight.register_hook(_only_the_stand_in(weakref.ref(weight)))
    weight.tpinv_fused_in = backward
    products.add_local_product(weight.main_grad, dy.t(), x, tree, ranks, dim=dim, stride=stride)
    weight.grad_added_to_main_grad = True
    return _zero(weight.dtype, weight.device).expand_as(weight)  # autograd never adds to an expanded tensor in place


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _only_the_stand_in(reference: weakref.ref):
    """A hook of a weight: sees the sum of all that autograd has for it, before it is accumulated."""

    @torch.utils.hooks.unserializable_hook
    def hook(grad: Tensor) -> Tensor | None:
        weight = reference()
        if weight.tpinv_fused_in != torch._C._current_graph_task_id():  # this pass has added nothing: what comes is left to the hooks
            weight.grad_added_to_main_grad = False
            return None
        if grad.data_ptr() != _zero(weight.dtype, weight.device).data_ptr():
            raise ValueError(
                f"weight {tuple(weight.shape)} gets a gradient from elsewhere too, or through a hook, where gradient_accumulation_fusion has "
                "added its linear's already; pass gradient_accumulation_fusion=False (with Megatron-Core, set weight.zero_out_wgrad = True)"
            )
        return torch.empty_like(weight)

    return hook

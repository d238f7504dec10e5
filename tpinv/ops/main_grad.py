"""Weight gradients straight into ``main_grad``, the float32 buffer that Megatron-Core keeps beside a parameter.

    main_grad[n, k] += dW[n, k]          the chain over tokens as it is in fp32, one fp32 addition

as TransformerEngine's and Apex's kernels have it: not ``main_grad.add_(weight.grad)``, which rounds to the weight's dtype in between and
reads and writes a third more memory. The agreement with whoever owns the buffer is Megatron's (gradient_accumulation_fusion): its hooks are
to run as ever, so they find a zero that has no meaning in the place of the gradient, and ``weight.grad_added_to_main_grad`` tells them that
there is nothing left to add. A gradient that the weight gets from elsewhere in the same backward pass would be lost with it: that is an
error, unless the weight has Megatron's mark for shared weights, ``zero_out_wgrad``: then the hooks add what else there is.

In a CUDA graph the addition is captured too, also where the graph's owner takes gradients with ``torch.autograd.grad``, as Megatron's and
TransformerEngine's do. Its replays hand out zeros, so it does not matter whether somebody adds those.

What sees to that is a hook on the weight (``_Guard``). Copies, ``load_state_dict(assign=True)`` and swapped tensors carry over names and
numbers, not hooks, so nothing is remembered under a name: every forward and every addition asks whether this very tensor has its own.
"""

import collections
import functools

import torch
from torch import Tensor

from tpinv.collectives import Ranks
from tpinv.ops import products
from tpinv.tree import ReductionTree


def check(weight: Tensor) -> None:
    """ValueError unless ``weight`` has a buffer of its shape in float32."""
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"gradient_accumulation_fusion adds to weight.main_grad, and weight is a {type(weight).__name__}; pass a parameter"
        )
    buffer = getattr(weight, "main_grad", None)
    if not isinstance(buffer, Tensor) or buffer.dtype != torch.float32 or buffer.shape != weight.shape or buffer.device != weight.device:
        is_tensor = isinstance(buffer, Tensor)
        found = f"{buffer.dtype} {tuple(buffer.shape)} on {buffer.device}" if is_tensor else "none" if buffer is None else repr(buffer)
        raise ValueError(
            f"gradient_accumulation_fusion adds to weight.main_grad, which must be float32 {tuple(weight.shape)} on {weight.device}, "
            f"not {found}; allocate it before the forward, or pass gradient_accumulation_fusion=False"
        )
    if weight.requires_grad and weight.is_leaf and not torch.compiler.is_compiling():
        _guard(weight)
        if not _is_capturing(weight):
            _zero(weight.dtype, weight.device)  # in a graph's memory it would not stay zero


def accumulates(node, weight: Tensor) -> bool:
    """Whether this backward pass is one that ends in .grad at ``node``, the weight's AccumulateGrad. ``torch.autograd.grad`` does
    not: it wants the gradient itself, or none, and nobody expects it to change a buffer; but in a CUDA graph, where it is how Megatron
    captures a backward pass."""
    if _is_capturing(weight):
        return True
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # how torch says that autograd.grad was asked for this leaf
        return False


def add(weight: Tensor, dy: Tensor, x: Tensor, tree: ReductionTree, ranks: Ranks, *, dim: int, stride: int = 1) -> Tensor:
    """Adds dW = dy^T x to ``weight.main_grad``; dimension ``dim`` of dW is the sharded one. Returns what autograd gets instead.

    A weight that a backward pass meets a second time is a ValueError: autograd would have added both gradients in the weight's
    dtype before the buffer sees them, and the first one is in it already. Not so with ``zero_out_wgrad``: each is added, unrounded.
    """
    backward, guard = torch._C._current_graph_task_id(), _guard(weight)
    if guard.added_in == backward and not _is_shared(weight):
        raise ValueError(
            f"weight {tuple(weight.shape)} is used twice in one backward pass, where gradient_accumulation_fusion would round other sums; "
            "pass gradient_accumulation_fusion=False (with Megatron-Core, set weight.zero_out_wgrad = True)"
        )
    guard.added_in = backward
    products.add_local_product(weight.main_grad, dy.t(), x, tree, ranks, dim=dim, stride=stride)
    weight.grad_added_to_main_grad = True
    return _zero(weight.dtype, weight.device).expand_as(weight)  # autograd never adds to an expanded tensor in place


def _is_shared(weight: Tensor) -> bool:
    return getattr(weight, "zero_out_wgrad", False)


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


class _Guard:
    """A hook of a weight: sees the sum of all that autograd has for it, before it is accumulated.

    It holds the weight strongly (the two are collected together): a tensor with a weak reference cannot be swapped, which
    ``torch.__future__.set_swap_module_params_on_conversion`` does.
    """

    __torch_unserializable__ = True  # torch.save leaves it out and does not warn

    def __init__(self, weight: Tensor):
        self.weight, self.added_in = weight, None  # the backward pass that has added to main_grad

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return collections.OrderedDict, ()  # in a pickle nothing, and nothing that torch.load(weights_only=True) refuses

    def __call__(self, grad: Tensor) -> Tensor | None:
        weight = self.weight
        if self.added_in != torch._C._current_graph_task_id():  # this pass has added nothing: what comes is left to the hooks
            weight.grad_added_to_main_grad = False
            return None
        if _is_shared(weight):
            return None  # zeros and what comes from elsewhere, which Megatron's hook adds
        if grad.data_ptr() != _zero(weight.dtype, weight.device).data_ptr():
            raise ValueError(
                f"weight {tuple(weight.shape)} gets a gradient from elsewhere too, or through a hook, where gradient_accumulation_fusion has "
                "added its linear's already; pass gradient_accumulation_fusion=False (with Megatron-Core, set weight.zero_out_wgrad = True)"
            )
        return None if _is_capturing(weight) else torch.empty_like(weight)


def _guard(weight: Tensor) -> _Guard:
    """The guard of this very tensor, put there if it has none. Swapping tensors leaves the dict of hooks behind with a tensor that no
    longer calls them, but takes the attribute away; copies and new parameters have neither."""
    guard = getattr(weight, "tpinv_guard", None)
    if isinstance(guard, _Guard) and guard.weight is weight:
        return guard
    if weight._backward_hooks is not None:
        for key in [key for key, hook in weight._backward_hooks.items() if isinstance(hook, _Guard)]:
            del weight._backward_hooks[key]
        weight._backward_hooks = weight._backward_hooks  # torch registers the dict with the tensor that it is assigned to
    weight.tpinv_guard = guard = _Guard(weight)
    weight.register_hook(guard)
    weight.grad_added_to_main_grad = False  # by this tensor nothing was, whatever a copied mark says
    return guard

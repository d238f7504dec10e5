"""Gradient norm and clipping that do not depend on how parameters are sharded.

The sum of squares is exact. The square of a float32 has at most 48 significant bits, so every term is an integer times a power
of two; the terms are added as integers into 39 limbs of 16 bits that span the whole range of float32 squares. Integer
addition commutes and associates, so no tree is needed: any sharding, any order and an integer all-reduce of 41
numbers give the same limbs, hence the same norm. (A GPU counts in other limbs, kernels/rows/squares.py: as exact, but the float64 may
round differently.) Distributed optimizers that cut tensors in the middle of a row are served too.
The limbs become one float64, its square root one float32; nothing waits for the host.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpinv import reference
from tpinv.collectives import Ranks, all_max, resolve

LIMB_BITS = 16
LOWEST_EXPONENT = -352  # of limb 0: below 2^-298 * 2^-48, the last bit of the smallest square
LIMBS = 39  # up to 2^(16 * 39 - 352), above the largest square
PIECE = 1 << 22  # elements squared at a time, to bound the scratch memory


def grad_norm(parameters: Tensor | Iterable[Tensor], *, group=None, norm_type: float = 2.0) -> Tensor:
    """Norm of all gradients of a model whose parameters are sharded over ``group`` or replicated on it.

    Args:
        parameters: those with ``grad`` None are skipped. A parameter with the attribute ``tensor_model_parallel`` True (set by
            tpinv's and Megatron's layers) is this rank's shard; any other is replicated, and counted on rank 0 alone.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        norm_type: 2.0 or inf.

    Returns:
        float32 scalar, the same on every rank and for every group size. NaN if any gradient is NaN, else inf if any is inf.

    Raises:
        ValueError: another norm_type, or gradients that are not float32, bfloat16 or float16.
    """
    ranks = resolve(group)
    parameters = _as_list(parameters)
    counted = [p for p in parameters if ranks.rank == 0 or getattr(p, "tensor_model_parallel", False)]
    device = parameters[0].device if parameters else None
    return norm_of([p.grad for p in counted if p.grad is not None], group=ranks, norm_type=norm_type, device=device)


def norm_of(tensors: Iterable[Tensor], *, group=None, norm_type: float = 2.0, device: torch.device | None = None) -> Tensor:
    """Norm of all elements held by all ranks of ``group`` together. ``tensors`` are those that this rank counts: pass a replicated
    tensor on one rank only. Result and errors as in :func:`grad_norm`. ``device`` is that of the result if there are no tensors."""
    ranks, tensors = resolve(group), list(tensors)
    for i, t in enumerate(tensors):
        reference.check_dtypes(**{f"tensors[{i}]": t})
    if any(isinstance(t, DTensor) for t in tensors):
        raise ValueError("DTensors know their own sharding; pass their local shards (t.to_local()) and mark them tensor_model_parallel")
    device = tensors[0].device if tensors else device or _device_of(ranks)
    if norm_type == float("inf"):
        tops = [t.detach().abs().amax().float() for t in tensors if t.numel()]
        top = torch.stack(tops).amax() if tops else torch.zeros((), device=device)
        return all_max(top.unsqueeze(0), ranks).squeeze(0)
    if norm_type != 2.0:
        raise ValueError(f"norm_type={norm_type} must be 2.0 or inf")
    if device.type == "cuda":
        return _norm_on_gpu(tensors, ranks, device)
    limbs = torch.zeros(LIMBS + 2, dtype=torch.int64, device=device)
    for t in tensors:
        for piece in t.detach().reshape(-1).split(PIECE):
            _add_squares(limbs, piece)
    if ranks.size > 1:
        dist.all_reduce(limbs, group=ranks.group)
    exponents = LOWEST_EXPONENT + LIMB_BITS * torch.arange(LIMBS, dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for term in (limbs[:LIMBS].double() * torch.exp2(exponents)).unbind(0):
        total = total + term  # from the smallest limb up: one fixed order, a rounding only above 53 bits
    infinite, nan = limbs[LIMBS:].unbind(0)
    total = total.masked_fill(infinite > 0, float("inf")).masked_fill(nan > 0, float("nan"))
    return total.sqrt().float()


def _norm_on_gpu(tensors: list[Tensor], ranks: Ranks, device: torch.device) -> Tensor:
    """The same sum in wider limbs, by one kernel a tensor (kernels/rows/squares.py)."""
    from tpinv.kernels.rows import squares

    with torch.cuda.device(device):
        counters = squares.counters(device)
        for t in tensors:
            squares.add_squares(counters, t.detach())
        if ranks.size > 1:
            dist.all_reduce(counters, group=ranks.group)
        return squares.total(counters).sqrt().float()


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, *, group=None, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales all gradients in place by min(1, max_norm / (norm + 1e-6)) and returns the norm before.

    Arguments as in :func:`grad_norm`; the coefficient is computed in float32 and is the same on every rank and for every group size.

    Raises:
        ValueError: max_norm not above 0, or as in :func:`grad_norm`.
        RuntimeError: ``error_if_nonfinite`` and the norm is inf or NaN (as torch.nn.utils.clip_grad_norm_ does).
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be above 0; leave the call out to not clip")
    parameters = _as_list(parameters)
    norm = grad_norm(parameters, group=group, norm_type=norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"the total norm of the gradients is {norm.item()}, so it cannot be clipped")
    scale_to_norm_([p.grad for p in parameters if p.grad is not None], max_norm, norm)
    return norm


def scale_to_norm_(grads: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Multiplies ``grads`` in place by min(1, max_norm / (norm + 1e-6)), computed in float32 from their float32 ``norm``. Torch rounds it
    to the dtype of a bfloat16 or float16 gradient first, here as in its own clipping."""
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    alike = defaultdict(list)
    for grad in grads:
        alike[grad.device, grad.dtype].append(grad)
    for (device, dtype), tensors in alike.items():
        torch._foreach_mul_(tensors, coefficient.to(device, dtype))


def _device_of(ranks: Ranks) -> torch.device:
    """Where a rank that counts no tensor must take part in the all-reduce: where its peers do."""
    cuda = ranks.group is not None and "nccl" in dist.get_backend(ranks.group)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _as_list(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _add_squares(limbs: Tensor, x: Tensor) -> None:
    """Adds the exact squares of ``x`` to ``limbs`` [LIMBS + 2]: the last two count infinities and NaNs."""
    square = x.double().square()  # exact: 24 + 24 bits
    finite = square.isfinite()
    limbs[LIMBS] += square.isinf().sum()
    limbs[LIMBS + 1] += square.isnan().sum()
    mantissa, exponent = torch.frexp(square.masked_fill(~finite, 0.0))
    integer = torch.ldexp(mantissa, torch.tensor(48, device=x.device)).long()  # below 2^48, exact
    position = exponent.long() - 48 - LOWEST_EXPONENT
    integer <<= position % LIMB_BITS  # below 2^63
    limb = position // LIMB_BITS
    for i in range(4):
        limbs.index_add_(0, limb + i, (integer >> (LIMB_BITS * i)) & ((1 << LIMB_BITS) - 1))

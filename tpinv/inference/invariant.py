"""``with tpinv.inference.invariant_mode():`` any torch model's rows depend on themselves alone, not on the batch around them.

For models that are not built of tpinv's layers: inside the context, operators whose bits follow the batch are computed by others that
do not follow it. One process, no tensor parallelism. A row alone then has the bytes it has in a batch, and a decode those of a prefill.

    products          mm, addmm, bmm, baddbmm, mv, linear, matmul    one fp32 chain over k (kernels on a GPU), rounded once; a bias after it
    softmax           softmax, log_softmax, logsumexp                the maximum is exact, the sum a tree over single elements
    sums              sum, mean                                      the same tree, in fp32
    norms             rms_norm, layer_norm                           tpinv.functional's
    attention         scaled_dot_product_attention                   by leaves, causal or not; keys that padding hides are left out
    elementwise       sigmoid, silu, gelu, tanh, exp2, softplus,     on a CPU, whose vector code and scalar code differ: always whole
                      pow, rsqrt, ...                                vectors, computed in pieces of one size

float32 stays float32, float64 and integers are torch's own business. What is known to follow the batch and is not covered (_UNCOVERED)
warns once a context. Compiled code does not pass here: torch.compile a model outside.

Two modes of torch make it: one sees functions (attention, norms), the other operators below autograd, so that gradients pass through.
Both belong to the thread, nest, and end with the context, whatever is raised. A mode is off inside its own handlers.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tpinv import functional, kernels, reference
from tpinv.ops import products
from tpinv.tree import ReductionTree

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TREE = ReductionTree(1)
_PIECE = 1 << 14  # elements: whole vectors on every CPU, and too few for torch to split over threads


@contextlib.contextmanager
def invariant_mode() -> Iterator[None]:
    """The context. Nested ones change nothing. See the module's docstring for what is covered."""
    with _Functions(), _Operators():
        yield


# -- products -----------------------------------------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, k] @ b [k, C] -> [M, C], a row at a time as far as bytes are concerned."""
    if a.shape[1:] != b.shape[:1] or a.dtype != b.dtype:
        return torch.mm(a, b)  # which says what does not fit
    if products.on_gpu(a):
        return kernels.matmul(a, b)
    return reference.chain_matmul(a, b).to(a.dtype)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    y = _product(a, b)
    y = y if alpha == 1 else y * alpha
    return y if beta == 0 else y + (bias if beta == 1 else bias * beta)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[0] != b.shape[0]:
        return torch.bmm(a, b)
    parts = [_product(x, y) for x, y in zip(a.unbind(0), b.unbind(0), strict=True)]
    return torch.stack(parts) if parts else a.new_empty(0, a.shape[1], b.shape[2])


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    y = _bmm(a, b)
    y = y if alpha == 1 else y * alpha
    return y if beta == 0 else y + (bias if beta == 1 else bias * beta)


def _mv(a: Tensor, x: Tensor) -> Tensor:
    return _product(a, x.unsqueeze(1)).squeeze(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return _product(x.unsqueeze(0), y.unsqueeze(1)).view(())


# -- sums and softmax ---------------------------------------------------------------------------------------------------------------


def _sum(x: Tensor, dim=None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    dims, most = [dim] if isinstance(dim, int) else list(dim or range(x.dim())), max(x.dim(), 1)
    if odd := [d for d in dims if not -most <= d < most]:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-most}, {most - 1}], but got {odd[0]})")
    if len(dims := sorted(d % most for d in dims)) > len(set(dims)):
        raise RuntimeError(f"a dim appears multiple times in the list of dims {dim}")
    if not x.dim():
        return x.to(dtype or x.dtype, copy=True)
    flat = x.movedim(dims, list(range(-len(dims), 0))).flatten(x.dim() - len(dims))
    y = reference.row_sum(flat).to(dtype or x.dtype)
    return y.view([1 if d in dims else n for d, n in enumerate(x.shape)]) if keepdim else y


def _mean(x: Tensor, dim=None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    total = _sum(x, dim, keepdim, dtype=torch.float32)
    return (total / (x.numel() / max(total.numel(), 1) if x.numel() else 0.0)).to(dtype or x.dtype)


def _exponentials(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x - max and the sum of its exponential, in fp32; the sum keeps ``dim``."""
    wide = x.float()
    top = wide.amax(dim, keepdim=True)
    shifted = wide - top.masked_fill(top == -torch.inf, 0.0)
    return shifted, reference.pairwise_sum(shifted.exp(), dim).unsqueeze(dim)


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    if not x.numel() or not x.dim():
        return torch.ones_like(x)
    shifted, total = _exponentials(x, dim)
    return (shifted.exp() / total).to(torch.float32 if half_to_float else x.dtype)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    if not x.numel() or not x.dim():
        return torch.zeros_like(x)
    shifted, total = _exponentials(x, dim)
    return (shifted - total.log()).to(torch.float32 if half_to_float else x.dtype)


def _logsumexp(x: Tensor, dim, keepdim: bool = False) -> Tensor:
    dims = [dim] if isinstance(dim, int) else list(dim)
    top = x.float().amax(dims, keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)
    y = _sum((x.float() - top).exp(), dims, True).log() + top
    return (y if keepdim else y.squeeze(dims)).to(x.dtype)


# -- elementwise, on a CPU ----------------------------------------------------------------------------------------------------------


def _in_pieces(operator, *given, **keywords):
    """``operator`` of tensors, broadcast to one shape, and of numbers, in contiguous pieces of one size, the last filled up."""
    shape = torch.broadcast_shapes(*(t.shape for t in given if isinstance(t, Tensor)))
    size, count = _PIECE, shape.numel()
    if not count:
        return operator(*given, **keywords)
    flat = []
    for t in given:
        if isinstance(t, Tensor) and t.dim():
            padded = t.new_ones(-(-count // size) * size)
            padded[:count] = t.expand(shape).reshape(-1)
            t = padded.split(size)
        flat.append(t)
    pieces = [operator(*(f[i] if isinstance(f, tuple) else f for f in flat), **keywords) for i in range(-(-count // size))]
    whole = lambda parts: torch.cat([part.view(-1) for part in parts])[:count].view(shape)  # noqa: E731
    return tuple(map(whole, zip(*pieces, strict=True))) if isinstance(pieces[0], tuple) else whole(pieces)


_ELEMENTWISE = (
    aten.sigmoid, aten.silu, aten.gelu, aten.tanh, aten.exp2, aten.softplus, aten.pow, aten.rsqrt, aten.erf, aten.mish, aten.elu,
    aten.log1p, aten.expm1, aten.log_sigmoid_forward, aten.sigmoid_backward, aten.silu_backward, aten.gelu_backward,
    aten.tanh_backward, aten.softplus_backward, aten.log_sigmoid_backward, aten.celu, aten.sinh, aten.cosh, aten.atanh, aten.atan2,
    aten.logaddexp, aten.logaddexp2, aten.xlogy, aten.igamma, aten.igammac, aten.special_i0e, aten.softshrink,
    aten.ldexp,
)  # fmt: skip
_COVERED: dict[object, Callable] = {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.bmm: _bmm,
    aten.baddbmm: _baddbmm,
    aten.mv: _mv,
    aten.dot: _dot,
    aten.sum: _sum,
    aten.mean: _mean,
    aten._softmax: _softmax,
    aten._log_softmax: _log_softmax,
    aten.logsumexp: _logsumexp,
}
# Known to follow the batch, the width of a shard or the run, and not covered.
_UNCOVERED = {
    "convolution", "convolution_overrideable", "mkldnn_convolution", "_grouped_mm", "mkldnn_rnn_layer", "_cudnn_rnn", "index_add", "scatter_add", "index_put",
    "embedding_dense_backward", "var", "std", "var_mean", "linalg_vector_norm", "_scaled_mm", "cumsum", "_int_mm", "addmv", "addbmm",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_flash_attention_forward", "_efficient_attention_forward", "_fused_rms_norm",
    "native_layer_norm", "native_group_norm", "native_batch_norm", "linalg_vecdot", "_trilinear", "_cdist_forward", "_euclidean_dist",
}  # fmt: skip


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.warned: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = operator.overloadpacket
        if not any(isinstance(x, Tensor) and x.dtype in _FLOATS for x in args):
            return operator(*args, **kwargs)
        out = kwargs.pop("out", None)
        inplace = packet.__name__.endswith("_") and not packet.__name__.startswith("_")
        base = getattr(aten, packet.__name__[:-1], packet) if inplace else packet
        compute = _COVERED.get(base)
        if compute is None and base in _ELEMENTWISE and all(t.device.type == "cpu" for t in args if isinstance(t, Tensor)):
            plain = base if inplace or out is not None else operator  # the packet picks the overload that returns a new tensor
            compute = lambda *given, **keywords: _in_pieces(plain, *given, **keywords)  # noqa: E731
        if compute is None or any(isinstance(x, Tensor) and x.dtype not in _FLOATS for x in args):
            self._warn(packet.__name__)
            return operator(*args, **kwargs) if out is None else operator(*args, out=out, **kwargs)
        result = compute(*args, **kwargs)
        target = args[0] if inplace else out
        return result if target is None else target.copy_(result)

    def _warn(self, name: str) -> None:
        if name in _UNCOVERED and name not in self.warned:
            self.warned.add(name)
            warnings.warn(f"aten.{name} may follow the batch and is not covered by tpinv's invariant_mode", stacklevel=3)


# -- functions ----------------------------------------------------------------------------------------------------------------------


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        replacement = _FUNCTIONS.get(function)
        if replacement is not None:
            with _disable_current_modes():
                found = replacement(*args, **(kwargs or {}))
            if found is not None:
                return found
        return function(*args, **(kwargs or {}))


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor | None:
    """[..., h, sq, d] as torch has it. None where tpinv has no attention: dropout, a bias that is added, a mask that is not causal
    once the keys are gone that no query sees."""
    masks = attn_mask is None or attn_mask.dtype == torch.bool
    fits = query.dim() == 4 and key.shape == value.shape and query.shape[-1] == key.shape[-1] and query.dtype in _FLOATS
    if dropout_p or not masks or not fits or not key.shape[2]:
        return None
    sequences = []
    for b in range(len(query)):
        q, k, v = query[b], key[b], value[b]
        mask = _seen(attn_mask, b, q, k) if attn_mask is not None else None
        if is_causal and (q.shape[1] != k.shape[1] or (mask is not None and mask.dim() == 2)):
            # torch counts from the first query, not from the last, and takes both masks together
            causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
            mask = causal if mask is None else mask & causal
        one = _one_sequence(q, k, v, mask, is_causal, scale)
        if one is None:
            return None
        sequences.append(one)
    return torch.stack(sequences)


def _seen(mask: Tensor, b: int, query: Tensor, key: Tensor) -> Tensor:
    """The mask of sequence b, [sq, sk], which must be the same for all heads to be known."""
    whole = mask.expand(*([1] * (4 - mask.dim())), *mask.shape) if mask.dim() < 4 else mask
    whole = whole[b if whole.shape[0] > 1 else 0]
    if whole.shape[0] > 1 and not bool((whole == whole[:1]).all()):
        return whole.new_zeros(0)
    return whole[0].expand(query.shape[1], key.shape[1])


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor | None:
    """q [h, sq, d], k and v [g, sk, d] -> [h, sq, d]. Rows that see nothing are zero."""
    rows, keys = slice(0, q.shape[1]), slice(0, k.shape[1])
    if mask is not None:
        if mask.dim() != 2:
            return None
        seeing, seen = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if not len(seeing):
            return torch.zeros_like(q)
        rows, keys = (slice(int(found[0]), int(found[-1]) + 1) for found in (seeing, seen))
        inner = mask[rows, keys]
        later = inner.shape[1] - inner.shape[0]  # keys before the first query
        causal = not bool(inner.all())
        if causal and (later < 0 or not torch.equal(inner, torch.ones_like(inner).tril(later))):
            return None
    inputs = (t.transpose(0, 1).unsqueeze(1) for t in (q[:, rows], k[:, keys], v[:, keys]))
    y = functional.core_attention(*inputs, causal=causal, scale=scale).squeeze(1).transpose(0, 1)
    return F.pad(y, (0, 0, rows.start, q.shape[1] - rows.stop))


def _rms_norm(x, normalized_shape, weight=None, eps=None) -> Tensor | None:
    if len(normalized_shape) != 1 or weight is None or x.dtype not in _FLOATS:
        return None
    return functional.rms_norm(x, weight, torch.finfo(x.dtype).eps if eps is None else eps, tree=_TREE)


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor | None:
    if len(normalized_shape) != 1 or weight is None or x.dtype not in _FLOATS:
        return None
    return functional.layer_norm(x, weight, bias, eps, tree=_TREE)


_FUNCTIONS = {
    F.scaled_dot_product_attention: _attention,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: lambda x, shape, weight=None, bias=None, eps=1e-5, _=True: _layer_norm(x, shape, weight, bias, eps),
}

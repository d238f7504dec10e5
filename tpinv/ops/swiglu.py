"""SwiGLU (arXiv 2002.05202) with the bits of silu(gate) * up; on a GPU one kernel each way."""

from torch import Tensor

from tpinv import reference
from tpinv.ops import products
from tpinv.ops.registry import register
from tpinv.ops.shapes import output, rows


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x = [gate, up] side by side in the last dimension: [..., 2 F] -> [..., F]. silu is rounded to x's dtype before
    it is multiplied, as in the two steps, whose bits these are. ValueError for an odd last dimension or another dtype than silu takes;
    RuntimeError in a backward pass with create_graph=True. Autocast changes nothing."""
    return OPERATOR.of_one(x)


def _check(x) -> None:
    reference.check_dtypes(x=x)
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x {tuple(x.shape)} must hold gate and up side by side: an even last dimension")


def _forward(x) -> Tensor:
    y = products.rows_backend("activation", x).swiglu(rows(x).contiguous())
    return output(y, (*x.shape[:-1], y.shape[-1]))


def _backward(dy, x, needs) -> tuple:
    dx = products.rows_backend("activation", x).swiglu_backward(rows(x).contiguous(), rows(dy).contiguous())
    return (dx.view(x.shape),)


OPERATOR = register(
    "swiglu(Tensor x) -> Tensor",
    check=_check,
    forward=_forward,
    fake=lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    backward=_backward,
    kept="x",
    gradients="x",
)

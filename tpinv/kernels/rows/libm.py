"""exp, erf and tanh with the bits of torch's on a GPU. Triton's own ``tl.exp`` is the fast one: it loses bits of large arguments."""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no libdevice


@triton.jit
def exp(x):
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def erf(x):
    if INTERPRETED:
        return tl.erf(x)
    else:
        return libdevice.erf(x)


@triton.jit
def tanh(x):
    if INTERPRETED:
        return 1.0 - tl.div_rn(tl.zeros_like(x) + 2.0, tl.exp(2.0 * x) + 1.0)
    else:
        return libdevice.tanh(x)

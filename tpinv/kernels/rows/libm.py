"""exp with the bits of torch's on a GPU. Triton's own ``tl.exp`` is the fast one: it loses bits of large arguments."""

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

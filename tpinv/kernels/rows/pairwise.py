"""The left-complete binary tree over the elements of a row, inside one program: what reference.row_sum is, in registers.

Neighbours are added, level by level. Each level is a sum over an axis of two, and an addition of two numbers has one result
whatever the layout, so the compiler may place elements in registers, lanes and warps as it likes. ``tl.sum`` over the whole row
would add in an order that follows that placement.

A row whose length is no power of two is filled up with -0.0, which added to anything leaves it as it is, -0.0 included:
that is skipping absent elements, hence the left-complete tree. (Triton makes +0.0 of a literal -0.0.)

Kernels that use this must be launched with ``enable_fp_fusion=False``: a contracted a * b + c is another rounding.
"""

import triton
import triton.language as tl


@triton.jit
def absent(like):
    """-0.0 in the shape of ``like``."""
    return tl.full(like.shape, -2147483648, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def row_tree(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] fp32, COLUMNS a power of two -> [ROWS]."""
    if COLUMNS == 1:
        return tl.reshape(x, (ROWS,))
    else:
        return row_tree(tl.sum(tl.reshape(x, (ROWS, COLUMNS // 2, 2)), axis=2), ROWS, COLUMNS // 2)

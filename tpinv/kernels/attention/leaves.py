"""What every forward kernel of attention is made of: the contract of reference/attention.py in registers.

A kernel walks a row's keys block by block (:func:`step`), closes a leaf by merging it into its node's total (:func:`merge`), and a node
into the tree. Which kernel does it, over how many rows at once, in which layout of registers, with keys from a tensor or from pages, is
not in the bits: the products' chains do not depend on tiles, maxima are exact, the sum over a block is a fixed tree
(:func:`block_sum`), and multiply-adds are written out, contraction off (``enable_fp_fusion=False``).
"""

import triton
import triton.language as tl

from tpinv import contract

BLOCK = tl.constexpr(contract.ATTENTION_BLOCK)
NODE = tl.constexpr(contract.ATTENTION_NODE)
LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
_LIMIT = tl.constexpr(contract.TANH_LIMIT)
_TANH = tuple(zip(contract.TANH_P, contract.TANH_Q, strict=True))
_T0, _T1, _T2, _T3, _T4 = (tl.constexpr(p) for p, _ in _TANH)
_B0, _B1, _B2, _B3, _B4 = (tl.constexpr(q) for _, q in _TANH)


@triton.jit
def block_sum(p, ROWS: tl.constexpr):
    """p [ROWS, 64] -> [ROWS]: columns in distance 1, 8, 16, 32, 2, 4 are added, in that order (contract.ATTENTION_ROW). Each level is a
    sum over an axis of two, which has one result in any layout. In a tensor core's accumulator the first four lie within a thread."""
    p = tl.sum(tl.reshape(p, (ROWS, 8, 4, 2)), 3)
    p = tl.sum(tl.reshape(p, (ROWS, 4, 2, 4)), 2)
    p = tl.sum(tl.reshape(p, (ROWS, 2, 2, 4)), 2)
    p = tl.sum(p, 1)
    p = tl.sum(tl.reshape(p, (ROWS, 2, 2)), 2)
    return tl.sum(p, 1)


@triton.jit
def finite(top):
    """``top``, or 0 of a row that has seen nothing: -inf - -inf is no number."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def tanh(x):
    """tanh as reference/attention.py computes it: operations of IEEE 754 alone, hence one result in every kernel."""
    x = tl.where(x > _LIMIT, _LIMIT, x)  # a NaN stays one, which minima and maxima would drop
    x = tl.where(x < -_LIMIT, -_LIMIT, x)
    z = x * x
    nothing = tl.zeros_like(x)
    p = tl.fma(nothing + _T4, z, nothing + _T3)
    q = tl.fma(nothing + _B4, z, nothing + _B3)
    p, q = tl.fma(p, z, nothing + _T2), tl.fma(q, z, nothing + _B2)
    p, q = tl.fma(p, z, nothing + _T1), tl.fma(q, z, nothing + _B1)
    p, q = tl.fma(p, z, nothing + _T0), tl.fma(q, z, nothing + _B0)
    u = tl.div_rn(x * p, q)
    u = tl.where(u > 1.0, 1.0, u)
    return tl.where(u < -1.0, -1.0, u)


@triton.jit
def with_sink(acc, total, top, sinks_ptr, head):
    """What a head's sink adds to its rows, behind all keys: one more, of no value. acc, total and top as in :func:`merge`."""
    sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
    return merge(acc, total, top, tl.zeros_like(acc), 1.0, sink)


@triton.jit
def merge(acc, total, top, right_acc, right_total, right_top):
    """Left and right -> both. acc [ROWS, WIDTH] or [WIDTH], total and top [ROWS] or numbers."""
    new_top = tl.maximum(top, right_top)
    shift = finite(new_top)
    a, b = tl.exp2(top - shift), tl.exp2(right_top - shift)
    total = tl.fma(total, a, right_total * b)
    if len(acc.shape) == 2:
        acc = tl.fma(acc, tl.broadcast_to(a[:, None], acc.shape), right_acc * b[:, None])
    else:
        acc = tl.fma(acc, tl.zeros_like(acc) + a, right_acc * b)
    return acc, total, new_top


@triton.jit
def step(q, k, v, acc, total, top, leaf_acc, leaf_total, leaf_top, begins, seen, scale, inner, MASKED: tl.constexpr, MERGES: tl.constexpr):
    """One block: q [ROWS, WIDTH], k and v [BLOCK, WIDTH], acc [ROWS, WIDTH], total and top [ROWS]. MASKED: ``seen`` [ROWS, BLOCK] says what
    a row sees; what it does not must be finite in v. MERGES: the block may be the one that ``begins`` a leaf; the one before is merged.
    ``inner``: None, or scores are capped (Options.factors).

    The merge stands behind a product that it does not depend on: there the one before, into leaf_acc, has been waited for. At the end of a
    loop's body it would still be on its way; reading it there makes the compiler wait for every single instruction of both products. And
    it stands before the softmax, which a branch in its middle would cut in two for the scheduler."""
    scores = tl.dot(q, k.T, input_precision="ieee")
    if MERGES:
        if begins:
            acc, total, top = merge(acc, total, top, leaf_acc, leaf_total, leaf_top)
            leaf_acc = tl.zeros_like(leaf_acc)
            leaf_total = tl.zeros_like(leaf_total)
            leaf_top = tl.full(leaf_top.shape, float("-inf"), tl.float32)
    if inner is not None:
        scores = tanh(scores * inner)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(leaf_top, tl.max(scores, 1) * scale)
    shift = finite(new_top)
    p = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + scale, tl.zeros_like(scores) - shift[:, None]))
    shrink = tl.exp2(leaf_top - shift)
    leaf_total = tl.fma(leaf_total, shrink, block_sum(p, q.shape[0]))
    leaf_acc = leaf_acc * shrink[:, None]
    leaf_acc = tl.dot(p.to(v.dtype), v, leaf_acc, input_precision="ieee")
    return acc, total, top, leaf_acc, leaf_total, new_top


@triton.jit
def quotient(acc, total):
    """acc / total, [ROWS, WIDTH] or [WIDTH]; zero where nothing was seen, and never -0.0."""
    total = tl.where(total == 0.0, 1.0, total)
    if len(acc.shape) == 2:
        return tl.div_rn(acc, tl.broadcast_to(total[:, None], acc.shape)) + 0.0
    else:
        return tl.div_rn(acc, tl.zeros_like(acc) + total) + 0.0


@triton.jit
def tile(ptr, row, rows, stride, dim, DIM: tl.constexpr, MASKED: tl.constexpr = True):
    """Rows [ROWS, DIM padded]; zeros past the end. MASKED: rows may lie past the end."""
    at = ptr + row[:, None].to(tl.int64) * stride + dim[None, :]
    if dim.shape[0] != DIM:
        return tl.load(at, mask=(row[:, None] < rows) & (dim[None, :] < DIM), other=0.0)
    elif MASKED:
        return tl.load(at, mask=row[:, None] < rows, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def tile_from(ptr, row, low, rows, stride, dim, DIM: tl.constexpr):
    """:func:`tile`, zeros before row ``low`` too."""
    at = ptr + row[:, None].to(tl.int64) * stride + dim[None, :]
    return tl.load(at, mask=((row >= low) & (row < rows))[:, None] & (dim[None, :] < DIM), other=0.0)


@triton.jit
def key_block(k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, at, low, keys, dim, DIM: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """Keys ``at`` and on, BLOCK of them, with their values. PAGE 0: rows of a tensor in distance k_s, v_s. Otherwise positions of pages, in
    distance k_s, v_s in a page, pages in distance k_b, v_b; table_ptr: int32, the request's pages. ``low``: None, or, with MASKED, the first
    key that is looked at: those before it are zero."""
    key = at + tl.arange(0, BLOCK)
    if PAGE == 0 and MASKED and low is not None:
        return tile_from(k_ptr, key, low, keys, k_s, dim, DIM), tile_from(v_ptr, key, low, keys, v_s, dim, DIM)
    elif PAGE == 0:
        return tile(k_ptr, key, keys, k_s, dim, DIM, MASKED), tile(v_ptr, key, keys, v_s, dim, DIM, MASKED)
    elif PAGE // BLOCK * BLOCK == PAGE:  # a block lies in one page
        page = tl.load(table_ptr + at // PAGE).to(tl.int64)
        row = at % PAGE + tl.arange(0, BLOCK)
        rows = keys - at // PAGE * PAGE
        if MASKED and low is not None:
            first = low - at // PAGE * PAGE
            k = tile_from(k_ptr + page * k_b, row, first, rows, k_s, dim, DIM)
            v = tile_from(v_ptr + page * v_b, row, first, rows, v_s, dim, DIM)
        else:
            k = tile(k_ptr + page * k_b, row, rows, k_s, dim, DIM, MASKED)
            v = tile(v_ptr + page * v_b, row, rows, v_s, dim, DIM, MASKED)
        return k, v
    else:
        inside = key < keys
        if MASKED and low is not None:
            inside = inside & (key >= low)
        page = tl.load(table_ptr + key // PAGE, mask=inside, other=0).to(tl.int64)
        row = (key % PAGE).to(tl.int64)
        k_at = k_ptr + (page * k_b + row * k_s)[:, None] + dim[None, :]
        v_at = v_ptr + (page * v_b + row * v_s)[:, None] + dim[None, :]
        if MASKED or dim.shape[0] != DIM:
            mask = inside[:, None] & (dim[None, :] < DIM)
            return tl.load(k_at, mask=mask, other=0.0), tl.load(v_at, mask=mask, other=0.0)
        else:
            return tl.load(k_at), tl.load(v_at)


@triton.jit
def walk(
    q, acc, total, top, leaf_acc, leaf_total, leaf_top, start, stop, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim, scale,
    inner, window, low, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Blocks from ``start`` to ``stop``, keys of one node: leaf_* go on, and are merged into acc, total and top where the next begins, unless
    LEAF is 0, because they are of one leaf.
    ``sees`` [ROWS]: with CAUSAL, how many keys a row sees, or, with a ``window``, that many of them, the last ones, none before ``low``."""
    for at in range(start, stop, BLOCK):
        k, v = key_block(k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, at, low, keys, dim, DIM, PAGE, MASKED)
        seen = True
        if MASKED:
            key = at + tl.arange(0, BLOCK)
            if CAUSAL:
                seen = key[None, :] < tl.minimum(sees, keys)[:, None]
                if window is not None:
                    seen = seen & (key[None, :] >= (sees - window)[:, None])
            else:
                seen = tl.broadcast_to((key < keys)[None, :], (q.shape[0], BLOCK))
        begins = False
        if LEAF:
            begins = at % LEAF == 0
        acc, total, top, leaf_acc, leaf_total, leaf_top = step(
            q, k, v, acc, total, top, leaf_acc, leaf_total, leaf_top, begins, seen, scale, inner, MASKED, LEAF > 0
        )
    return acc, total, top, leaf_acc, leaf_total, leaf_top


@triton.jit
def walk_window(
    q, acc, total, top, leaf_acc, leaf_total, leaf_top, start, stop, first, last, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr,
    dim, scale, inner, window, DIM: tl.constexpr, PAGE: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """:func:`walk` of a tile whose first row sees ``first`` keys but for the window, and its last row ``last``: the blocks that some row sees,
    and of them without a mask those that all rows see all of. ``start`` is a block's first key."""
    low = tl.maximum(first - window, 0)
    start = tl.maximum(start, low // BLOCK * BLOCK)
    begin = tl.maximum(start, tl.minimum(stop, (tl.maximum(last - window, 0) + BLOCK - 1) // BLOCK * BLOCK))
    whole = tl.maximum(begin, tl.minimum(tl.minimum(first, keys), stop) // BLOCK * BLOCK)
    acc, total, top, leaf_acc, leaf_total, leaf_top = walk(
        q, acc, total, top, leaf_acc, leaf_total, leaf_top, start, begin, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim, scale,
        inner, window, low, True, True, DIM, PAGE, LEAF,
    )  # fmt: skip
    acc, total, top, leaf_acc, leaf_total, leaf_top = walk(
        q, acc, total, top, leaf_acc, leaf_total, leaf_top, begin, whole, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim, scale,
        inner, window, low, False, True, DIM, PAGE, LEAF,
    )  # fmt: skip
    return walk(
        q, acc, total, top, leaf_acc, leaf_total, leaf_top, whole, stop, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim, scale,
        inner, window, low, True, True, DIM, PAGE, LEAF,
    )  # fmt: skip

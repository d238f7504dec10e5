"""csrc/tree_reduce.cu in Triton, for GPUs or machines where that cannot be compiled: the same memory, the same bits, slower.

Ordering. one_shot: an 8-byte word carries 4 bytes of payload and the flag of this call; it is stored and loaded by one relaxed
access of system scope, which is single-copy atomic, so who sees the flag sees the payload. two_shot: all stores, then a block
barrier, then one thread's atomic exchange with release at system scope, cumulative over the barrier; the receiver polls by
an atomic with acquire at system scope, then a block barrier. Why two slots are enough is explained in the CUDA source.

All payload is handled as 4-byte words: one fp32 node, or two bf16 nodes side by side.
"""

import triton
import triton.language as tl

MAX_BLOCKS = tl.constexpr(256)


@triton.jit
def _add(left, right, NODE_BF16: tl.constexpr):
    """left + right in fp32, rounded once to the node dtype; words in, words out."""
    if NODE_BF16:
        low = ((left << 16).to(tl.float32, bitcast=True) + (right << 16).to(tl.float32, bitcast=True)).to(tl.bfloat16)
        high = ((left & -65536).to(tl.float32, bitcast=True) + (right & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
        low_bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low_bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return (left.to(tl.float32, bitcast=True) + right.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def _store_root(out_ptr, at, words, mask, NODE_BF16: tl.constexpr):
    """Rounds the root once to the output dtype. ``at`` counts words."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if NODE_BF16:
        tl.store(out_ptr + 2 * at, (words << 16).to(tl.float32, bitcast=True).to(dtype), mask=mask)
        tl.store(out_ptr + 2 * at + 1, (words & -65536).to(tl.float32, bitcast=True).to(dtype), mask=mask)
    else:
        tl.store(out_ptr + at, words.to(tl.float32, bitcast=True).to(dtype), mask=mask)


@triton.jit
def _now():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _waited(began, timeout, report, epochs_ptr, sender, what, seen, expected):
    """Called again and again by a wait that has not ended; in the end it tells the host and traps."""
    if _now() - began > timeout:
        if tl.atomic_xchg(epochs_ptr + MAX_BLOCKS, 1) == 0:
            to = report.to(tl.pointer_type(tl.int64))
            tl.store(to + 1, sender.to(tl.int64))
            tl.store(to + 2, what)
            tl.store(to + 3, tl.program_id(0).to(tl.int64))
            tl.store(to + 4, seen.to(tl.int64))
            tl.store(to + 5, expected.to(tl.int64))
            tl.debug_barrier()
            tl.atomic_xchg(to, 1, sem="release", scope="sys")
            tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _store_words(address, words):
    tl.inline_asm_elementwise(
        "st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0;", "=r,l,l", [address, words], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_words(address):
    return tl.inline_asm_elementwise("ld.relaxed.sys.global.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _receive(address, flag, began, timeout, report, epochs_ptr, sender):
    words = _load_words(address)
    late = tl.sum(((words >> 32) != flag).to(tl.int32), 0)
    while late > 0:
        words = _load_words(address)
        late = tl.sum(((words >> 32) != flag).to(tl.int32), 0)
        _waited(began, timeout, report, epochs_ptr, sender, 1, tl.min(words >> 32, 0), flag)
    return words.to(tl.int32)


@triton.jit
def _owner(first_ptr, value: tl.constexpr, RANKS: tl.constexpr):
    owner = 0
    for r in tl.static_range(1, RANKS):
        owner += (tl.load(first_ptr + r) <= value).to(tl.int32)
    return owner


@triton.jit
def _word_node(
    K: tl.constexpr, own, slot, at, count, values_ptr, value_words, own_at, flag, began, timeout, report, epochs_ptr, first_ptr, rank,
    RANKS: tl.constexpr, VALUES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, NODE_BF16: tl.constexpr,
):  # fmt: skip
    """Node K of the tree above the ranks: a value that was sent in words, or the sum of its children."""
    if K < VALUES:
        owner = _owner(first_ptr, K, RANKS)
        if owner == rank:
            words = tl.load(values_ptr + (K - own) * value_words + own_at)
        else:
            words = _receive(slot + (K * count + at) * 8, flag, began, timeout, report, epochs_ptr, owner)
        return words
    else:
        left = _word_node(LEFT >> 6 * K & 63, own, slot, at, count, values_ptr, value_words, own_at, flag, began, timeout, report, epochs_ptr, first_ptr, rank, RANKS, VALUES, LEFT, RIGHT, NODE_BF16)  # fmt: skip
        right = _word_node(RIGHT >> 6 * K & 63, own, slot, at, count, values_ptr, value_words, own_at, flag, began, timeout, report, epochs_ptr, first_ptr, rank, RANKS, VALUES, LEFT, RIGHT, NODE_BF16)  # fmt: skip
        return _add(left, right, NODE_BF16)


@triton.jit
def _count_call(epochs_ptr, epoch):
    """Ends a launch: the next one counts on; program 0 counts for the blocks that were not launched."""
    tl.debug_barrier()  # every thread has read the epoch
    tl.store(epochs_ptr + tl.program_id(0), epoch + 1)
    if tl.program_id(0) == 0:
        others = tl.arange(0, MAX_BLOCKS)
        tl.store(epochs_ptr + others, tl.zeros([MAX_BLOCKS], tl.int64) + (epoch + 1), mask=others >= tl.num_programs(0))


_UNSPECIALIZED = ["slot_bytes", "value_words", "slice_words", "start_words", "count_words", "rank", "report", "timeout"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def one_shot_kernel(
    peers_ptr, first_ptr, values_ptr, out_ptr, epochs_ptr, report, timeout, slot_bytes, value_words, slice_words, count_words, rank,
    RANKS: tl.constexpr, VALUES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, NODE_BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """peers_ptr: int64 [3][RANKS], addresses of flags, slots, gathered. values_ptr: int32 words."""
    epoch = tl.load(epochs_ptr + tl.program_id(0))
    flag = epoch % 0x7FFFFFFF + 1
    slot = epoch % 2 * slot_bytes
    own = tl.load(first_ptr + rank)
    owned = tl.load(first_ptr + rank + 1) - own
    count = count_words.to(tl.int64)
    for start in range(tl.program_id(0) * BLOCK, count_words, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        at = tl.where(at < count_words, at, 0).to(tl.int64)  # lanes past the end repeat word 0, to the same effect
        for s in range(owned):
            for k in tl.static_range(1, RANKS):
                peer = (rank + k) % RANKS
                words = tl.load(values_ptr + s * value_words.to(tl.int64) + peer.to(tl.int64) * slice_words + at)
                packed = (words.to(tl.int64) & 0xFFFFFFFF) | (flag << 32)
                _store_words(tl.load(peers_ptr + RANKS + peer) + slot + ((own + s) * count + at) * 8, packed)
    began = _now()
    mine = tl.load(peers_ptr + RANKS + rank) + slot
    for start in range(tl.program_id(0) * BLOCK, count_words, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = tl.where(i < count_words, i, 0).to(tl.int64)
        own_at = rank.to(tl.int64) * slice_words + at
        root = _word_node(2 * VALUES - 2, own, mine, at, count, values_ptr, value_words, own_at, flag, began, timeout, report, epochs_ptr, first_ptr, rank, RANKS, VALUES, LEFT, RIGHT, NODE_BF16)  # fmt: skip
        _store_root(out_ptr, at, root, i < count_words, NODE_BF16)
    _count_call(epochs_ptr, epoch)


@triton.jit
def _signal(peers_ptr, rank, value, RANKS: tl.constexpr):
    """What this program has stored so far is visible to whoever acquires ``value`` or more."""
    tl.debug_barrier()
    for k in tl.static_range(1, RANKS):
        flags = tl.load(peers_ptr + (rank + k) % RANKS).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(flags + tl.program_id(0) * RANKS + rank, value, sem="release", scope="sys")


@triton.jit
def _wait(peers_ptr, rank, value, timeout, report, epochs_ptr, RANKS: tl.constexpr):
    """Returns when every peer's program of this index has signalled ``value`` or more."""
    began = _now()
    flags = tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int64)) + tl.program_id(0) * RANKS
    for k in tl.static_range(1, RANKS):
        peer = (rank + k) % RANKS
        seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")
        while seen < value:
            seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")
            _waited(began, timeout, report, epochs_ptr, peer, 0, seen, value)
    tl.debug_barrier()


@triton.jit
def _pack_node(
    K: tl.constexpr, own, owned, slot_ptr, at, count, values_ptr, value_words, own_at, mask,
    VALUES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, NODE_BF16: tl.constexpr,
):  # fmt: skip
    """Node K of the tree above the ranks: a value that has arrived, or the sum of its children."""
    if K < VALUES:
        if (own <= K) & (own + owned > K):
            words = tl.load(values_ptr + (K - own) * value_words + own_at, mask=mask, other=0)
        else:
            words = tl.load(slot_ptr + K * count + at, mask=mask, other=0)
        return words
    else:
        left = _pack_node(LEFT >> 6 * K & 63, own, owned, slot_ptr, at, count, values_ptr, value_words, own_at, mask, VALUES, LEFT, RIGHT, NODE_BF16)  # fmt: skip
        right = _pack_node(RIGHT >> 6 * K & 63, own, owned, slot_ptr, at, count, values_ptr, value_words, own_at, mask, VALUES, LEFT, RIGHT, NODE_BF16)  # fmt: skip
        return _add(left, right, NODE_BF16)


@triton.jit
def _slice_count(value_words, slice_words, start_words, count_words, rank):
    """Words of this launch in the slice of ``rank``; at most zero when the value ends before it."""
    left = min(value_words - rank.to(tl.int64) * slice_words, slice_words) - start_words
    return min(left, count_words)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def two_shot_kernel(
    peers_ptr, first_ptr, values_ptr, out_ptr, epochs_ptr, report, timeout, slot_bytes, value_words, slice_words, start_words, count_words,
    rank, RANKS: tl.constexpr, VALUES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, NODE_BF16: tl.constexpr,
    GATHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As the kernel of this name in the CUDA source, without its overlap of chunks."""
    out_type: tl.constexpr = tl.pointer_type(out_ptr.dtype.element_ty)
    per_word: tl.constexpr = 2 if NODE_BF16 else 1
    epoch = tl.load(epochs_ptr + tl.program_id(0))
    value = (epoch << 20) + 1
    slot = epoch % 2 * slot_bytes
    own = tl.load(first_ptr + rank)
    owned = tl.load(first_ptr + rank + 1) - own
    count = count_words.to(tl.int64)
    step = tl.num_programs(0) * BLOCK
    begin = tl.program_id(0) * BLOCK
    for k in tl.static_range(1, RANKS):
        peer = (rank + k) % RANKS
        stop = _slice_count(value_words, slice_words, start_words, count_words, peer)
        to = tl.multiple_of((tl.load(peers_ptr + RANKS + peer) + slot).to(tl.pointer_type(tl.int32)), 4)
        source = tl.multiple_of(values_ptr + peer.to(tl.int64) * slice_words + start_words, 4)
        for s in range(owned):
            for start in range(begin, count_words, step):
                at = tl.multiple_of(start, 4) + tl.arange(0, BLOCK)
                words = tl.load(source + s * value_words.to(tl.int64) + at, mask=at < stop)
                tl.store(to + (own + s) * count + at, words, mask=at < stop)
    _signal(peers_ptr, rank, value, RANKS)
    _wait(peers_ptr, rank, value, timeout, report, epochs_ptr, RANKS)
    mine = rank.to(tl.int64) * slice_words + start_words
    stop = _slice_count(value_words, slice_words, start_words, count_words, rank)
    received = (tl.load(peers_ptr + RANKS + rank) + slot).to(tl.pointer_type(tl.int32))
    for start in range(begin, count_words, step):
        at = start + tl.arange(0, BLOCK)
        mask = at < stop
        root = _pack_node(2 * VALUES - 2, own, owned, received, at, count, values_ptr, value_words, mine + at, mask, VALUES, LEFT, RIGHT, NODE_BF16)  # fmt: skip
        if GATHER:
            _store_root(out_ptr, mine + at, root, mask, NODE_BF16)
            for k in tl.static_range(1, RANKS):
                theirs = tl.load(peers_ptr + 2 * RANKS + (rank + k) % RANKS).to(out_type)
                _store_root(theirs, rank * count + at, root, mask, NODE_BF16)
        else:
            _store_root(out_ptr, start_words + at, root, mask, NODE_BF16)
    if GATHER:
        _signal(peers_ptr, rank, value + 1, RANKS)
        _wait(peers_ptr, rank, value + 1, timeout, report, epochs_ptr, RANKS)
        for k in tl.static_range(1, RANKS):
            peer = (rank + k) % RANKS
            stop = _slice_count(value_words, slice_words, start_words, count_words, peer) * per_word
            gathered = tl.load(peers_ptr + 2 * RANKS + rank).to(out_type) + peer * count * per_word
            out = out_ptr + (peer.to(tl.int64) * slice_words + start_words) * per_word
            for start in range(begin * per_word, count_words * per_word, step * per_word):
                at = start + tl.arange(0, BLOCK * per_word)
                tl.store(out + at, tl.load(gathered + at, mask=at < stop), mask=at < stop)
    _count_call(epochs_ptr, epoch)

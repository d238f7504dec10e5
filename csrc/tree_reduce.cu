// Tree all-reduce and reduce-scatter between the GPUs of one NVLink domain, by remote stores.
//
// Every rank holds the values of its maximal subtrees. It stores them into the memory of the ranks that need them, each of
// which adds all values up by the rank part of the tree. Nothing is staged on the sender's side: the values are read where
// the product left them. The tree is not in this file: tpinv/tree.py says, for every value from left to right, how many
// pending values are merged after it (MERGES), and finish() below obeys that table with a stack.
//
//     one_shot          every value to every peer, each of which finishes the whole tree       latency: one way, once
//     one_shot_norm     the same by rows, then residual add and RMSNorm on the row just finished
//     two_shot          slice q of every value to rank q, which finishes slice q and stores it to all: two ways, least traffic
//
// one_shot with slice > 0 and two_shot_scatter are reduce-scatters: they stop at the finished slice.
//
// Ordering, one_shot. A word of 8 bytes carries 4 bytes of payload and the flag of this call. It is written and read by one
// relaxed access of system scope, which is single-copy atomic: who sees the flag sees the payload. No fence, no barrier. Flags
// repeat after 2^32 - 1 calls; a stale word passes for a fresh one only if nothing was stored there for exactly so many.
//
// Ordering, two_shot. All threads of a block store payload; bar.sync; one thread per peer stores the flag with st.release.sys,
// which is cumulative over the bar.sync: the payload of the whole block is visible before the flag. The receiver polls with
// ld.acquire.sys in one thread per peer, then bar.sync: all its threads see the payload.
//
// Reuse. `epoch` counts the calls of a group, equally on all ranks. No rank ends call e before every peer has begun it (it needs
// something from each), and a peer begins e after it has ended e - 1. So whoever stores for call e knows that everybody
// has done with e - 2: two slots, taken in turn, are enough, and no call ends with a barrier. What is stored in the second half
// of two_shot needs no second slot: the receiver's first half of the same call has been seen by then.
//
// A wait is bounded: after timeout_ns the block reports rank, slot, seen and expected to the host and traps, because values
// that never came must not be returned. Nor must those of another call: two launches of one group that run at once (a graph replayed
// beside other calls) would share epoch and slot, so block 0 marks the group busy and traps when it is already.
//
// Compiled at run time (NVRTC, which is given include/) with these macros:
//   RANKS       p                                        MERGES    octal digit t: pending values merged after value t
//   VALUES      of all ranks, at most 21                 OUT       0 fp32, 1 bf16, 2 fp16: the root is rounded to it once
//   NODE_BF16   0: nodes are fp32, 1: bf16               WEIGHT    of the norm, as OUT
//   PER_THREAD  packs of a row and thread of one_shot_norm; 0: without it

#include "include/numbers.cuh"

constexpr int kMaxBlocks = 256;
constexpr int kElems = NODE_BF16 ? 8 : 4;              // a pack is 16 bytes of a value
constexpr int kOutWords = kElems * (OUT ? 2 : 4) / 4;  // and this many 4-byte words of the sum
constexpr int kUnroll = VALUES <= 2 ? 4 : VALUES <= 4 ? 2 : 1;
constexpr int kBatch = VALUES < 8 ? VALUES : 8;        // values polled together
static_assert(VALUES <= 21, "the table of merges is 64 bits");

struct alignas(kOutWords == 2 ? 8 : 16) OutPack { u32 word[kOutWords]; };

struct Params {
    u64 flags[RANKS];          // per rank: u64 [kMaxBlocks][RANKS], by block and sender
    u64 slots[RANKS];          // per rank: two slots that values are stored to
    u64 gathered[RANKS];       // per rank: where finished slices are stored to
    u64 slot_bytes;
    const uint4* values;       // [own values][packs]
    OutPack* out;
    u64* epochs;               // [kMaxBlocks], one copy a block, equal between launches
    u64* claim;                // 0 until a block reports; behind it 1 while a call runs
    volatile u64* report;      // host memory: done, sender, 0 chunk, 1 word, 2 busy or 3 called off, block, seen, expected; from it: call it off
    u64 timeout_ns;
    long long packs;           // of a value
    long long slice;           // packs from one rank's slice to the next; 0: every rank finishes everything
    long long start, count;    // the part of a slice that this launch does
    int rank, chunk;           // chunk: packs of a thread
    int first[RANKS + 1];      // index of each rank's first value
    const OutPack* residual;   // one_shot_norm: [rows][row_packs]
    OutPack* normed;
    const void* weight;
    float eps, inverse_width;
    int rows, row_packs;
};

// -- numbers ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 narrow(float x) { return OUT == 1 ? to_bf16(x) : to_fp16(x); }
__device__ __forceinline__ float widen(u32 x) { return OUT == 1 ? from_bf16(x & 0xffff) : from_fp16(x & 0xffff); }

/* add_node of numbers.cuh, by conversions of one value: the faster ones of two would cost registers that this kernel has not */
__device__ __forceinline__ float node(float left, float right) {
    const float sum = __fadd_rn(left, right);
    return NODE_BF16 ? from_bf16(to_bf16(sum)) : sum;
}

__device__ __forceinline__ void unpack(const uint4& v, float (&x)[kElems]) {
    const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kElems; i++)
        x[i] = NODE_BF16 ? (i % 2 ? __uint_as_float(word[i / 2] & 0xffff0000u) : from_bf16(word[i / 2])) : __uint_as_float(word[i]);
}

__device__ __forceinline__ OutPack round_out(const float (&x)[kElems]) {
    OutPack out;
#pragma unroll
    for (int i = 0; i < kOutWords; i++)
        out.word[i] = OUT == 0 ? __float_as_uint(x[i]) : narrow(x[2 * i % kElems]) | narrow(x[(2 * i + 1) % kElems]) << 16;
    return out;
}

/* The order of additions: for each value from left to right merge as many pending ones as the table says, then push. */
__device__ __forceinline__ void finish(const uint4 (&v)[VALUES], float (&root)[kElems]) {
    float stack[VALUES][kElems];
    int top = 0;
#pragma unroll
    for (int t = 0; t < VALUES; t++) {
        unpack(v[t], stack[top]);
#pragma unroll
        for (int m = 0; m < (int)(MERGES >> 3 * t & 7); m++, top--)
#pragma unroll
            for (int i = 0; i < kElems; i++) stack[top - 1][i] = node(stack[top - 1][i], stack[top][i]);
        top++;
    }
#pragma unroll
    for (int i = 0; i < kElems; i++) root[i] = stack[0][i];
}

// -- signals ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u64 now() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

__device__ __noinline__ void give_up(const Params& p, int sender, int what, u64 seen, u64 expected) {
    if (atomicExch(p.claim, 1ull) == 0) {
        p.report[1] = sender, p.report[2] = what, p.report[3] = blockIdx.x, p.report[4] = seen, p.report[5] = expected;
        __threadfence_system();
        p.report[0] = 1;
        __threadfence_system();
        asm volatile("trap;");
    }
    while (true) __nanosleep(1000000);  // another block reports, and its trap ends this one too
}

constexpr u64 kPatience = 10000000;  // nanoseconds after which a wait asks the host's memory, which is far away

/* Called again and again by a wait that has not ended. The host ends it where it knows that the peer will not come. */
__device__ __noinline__ void waited(const Params& p, u64 began, int sender, int what, u64 seen, u64 expected) {
    const u64 waited = now() - began;
    if (waited >= p.timeout_ns) give_up(p, sender, what, seen, expected);
    if (waited >= kPatience && p.report[6]) give_up(p, sender, 3, seen, expected);
}

__device__ __forceinline__ void store_word2(u64 address, u64 first, u64 second) {
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}
__device__ __forceinline__ ulonglong2 load_word2(u64 address) {
    ulonglong2 w;
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(w.x), "=l"(w.y) : "l"(address) : "memory");
    return w;
}

/* For all threads: what this block has stored so far is visible to whoever acquires `value` or more. */
__device__ __forceinline__ void signal(const Params& p, u64 value) {
    __syncthreads();
    if (threadIdx.x < RANKS && threadIdx.x != p.rank) {
        const u64 flag = p.flags[threadIdx.x] + (blockIdx.x * RANKS + p.rank) * 8;
        asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
    }
}

/* For all threads: returns when every peer's block of this index has signalled `value` or more. */
__device__ __forceinline__ void wait(const Params& p, u64 value) {
    if (threadIdx.x < RANKS && threadIdx.x != p.rank) {
        const u64 flag = p.flags[p.rank] + (blockIdx.x * RANKS + threadIdx.x) * 8;
        u64 seen, began = 0;
        for (u32 polls = 0;; polls++) {
            asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
            if (seen >= value) break;
            if (began == 0) began = now();
            if (polls % 1024 == 1023) waited(p, began, threadIdx.x, 0, seen, value);
        }
    }
    __syncthreads();
}

/* Begins a launch. Its epoch, the same in all blocks. */
__device__ __forceinline__ u64 begin_call(const Params& p) {
    const u64 epoch = p.epochs[blockIdx.x];
    if (blockIdx.x == 0 && threadIdx.x == 0 && atomicExch(p.claim + 1, 1ull)) give_up(p, p.rank, 2, 0, 0);
    return epoch;
}

/* Ends a launch: the next one counts on. Blocks that were not launched have no thread of their own; block 0 counts for them. */
__device__ __forceinline__ void count_call(const Params& p, u64 epoch) {
    __syncthreads();  // every thread has read the epoch
    if (threadIdx.x == 0) p.epochs[blockIdx.x] = epoch + 1;
    if (blockIdx.x == 0 && threadIdx.x == 0) p.claim[1] = 0;
    if (blockIdx.x == 0)
        for (int b = gridDim.x + threadIdx.x; b < kMaxBlocks; b += blockDim.x) p.epochs[b] = epoch + 1;
}

// -- one shot --------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 flag_of(u64 epoch) { return (u32)(epoch % 0xffffffffull) + 1; }  // never the zero of fresh memory

/* Packs of values in words: value t, pack i at (t * count + i) * 32 of the slot. */
__device__ __forceinline__ void send_words(const Params& p, u64 slot, u32 flag, long long i) {
    const u64 high = (u64)flag << 32;
    const int first = p.first[p.rank], own = p.first[p.rank + 1] - first;
    for (int s = 0; s < own; s++) {
        const u64 at = slot + ((first + s) * p.count + i) * 32;
        uint4 v = p.values[s * p.packs + i];
#pragma unroll
        for (int k = 1; k < RANKS; k++) {
            const int peer = p.rank + k < RANKS ? p.rank + k : p.rank + k - RANKS;  // not everybody to the same one at a time
            if (p.slice) v = p.values[s * p.packs + peer * p.slice + i];
            store_word2(p.slots[peer] + at, high | v.x, high | v.y);
            store_word2(p.slots[peer] + at + 16, high | v.z, high | v.w);
        }
    }
}

__device__ __forceinline__ void receive_words(const Params& p, u64 slot, u32 flag, long long i, uint4 (&v)[VALUES]) {
    const int first = p.first[p.rank], last = p.first[p.rank + 1];
    const u64 base = p.slots[p.rank] + slot + i * 32;
#pragma unroll
    for (int t0 = 0; t0 < VALUES; t0 += kBatch) {
        ulonglong2 low[kBatch], high[kBatch];
        u64 began = 0;
        for (u32 polls = 0;; polls++) {
            int missing = -1;
            u32 seen = 0;
#pragma unroll
            for (int k = 0; k < kBatch; k++)
                if (t0 + k < VALUES && (t0 + k < first || t0 + k >= last)) {
                    low[k] = load_word2(base + (t0 + k) * p.count * 32);
                    high[k] = load_word2(base + (t0 + k) * p.count * 32 + 16);
                }
#pragma unroll
            for (int k = 0; k < kBatch; k++)
                if (t0 + k < VALUES && (t0 + k < first || t0 + k >= last)) {
                    const u32 f[4] = {(u32)(low[k].x >> 32), (u32)(low[k].y >> 32), (u32)(high[k].x >> 32), (u32)(high[k].y >> 32)};
                    if (f[0] != flag || f[1] != flag || f[2] != flag || f[3] != flag) missing = t0 + k, seen = f[0];
                }
            if (missing < 0) break;
            if (began == 0) began = now();
            if (polls % 1024 == 1023) {
                int sender = 0;
                while (p.first[sender + 1] <= missing) sender++;
                waited(p, began, sender, 1, seen, flag);
            }
        }
#pragma unroll
        for (int k = 0; k < kBatch; k++)
            if (t0 + k < VALUES) {
                const int t = t0 + k;
                if (t < first || t >= last) v[t] = make_uint4(low[k].x, low[k].y, high[k].x, high[k].y);
                else v[t] = p.values[(t - first) * p.packs + p.rank * p.slice + i];
            }
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) one_shot(const __grid_constant__ Params p) {
    const u64 epoch = begin_call(p);
    const u32 flag = flag_of(epoch);
    const u64 slot = epoch % 2 * p.slot_bytes;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
    for (long long i = first; i < p.count; i += step) send_words(p, slot, flag, i);
    for (long long i = first; i < p.count; i += step) {
        uint4 v[VALUES];
        float root[kElems];
        receive_words(p, slot, flag, i, v);
        finish(v, root);
        p.out[i] = round_out(root);
    }
    count_call(p, epoch);
}

// -- one shot, residual and norm -------------------------------------------------------------------------------------------------

#if PER_THREAD > 0
constexpr int kRun = PER_THREAD * kElems;  // consecutive elements of a thread

__device__ __forceinline__ float weight_at(const void* weight, int i) {
    if (WEIGHT == 0) return ((const float*)weight)[i];
    const u32 h = ((const unsigned short*)weight)[i];
    return WEIGHT == 1 ? from_bf16(h) : from_fp16(h);
}

__device__ __forceinline__ float element(const OutPack& pack, int i) {
    return OUT == 0 ? __uint_as_float(pack.word[i % kOutWords]) : widen(pack.word[i / 2 % kOutWords] >> (i % 2 * 16));
}

/* hidden = residual + sum, rounded; normed = hidden / sqrt(mean(hidden^2) + eps) * weight, rounded. A block per row and turn.
   The squares are added by the left-complete binary tree over the row's elements: pairs in a thread, then lanes, then warps.
   Past the row's end there are zeros, which change no sum of squares. */
extern "C" __global__ void __launch_bounds__(512) one_shot_norm(const __grid_constant__ Params p) {
    __shared__ float warps[2][32];
    const u64 epoch = begin_call(p);
    const u32 flag = flag_of(epoch);
    const u64 slot = epoch % 2 * p.slot_bytes;
    const int first = threadIdx.x * PER_THREAD, lane = threadIdx.x % 32;
    for (int row = blockIdx.x; row < p.rows; row += gridDim.x)
        for (int k = 0; k < PER_THREAD; k++)
            if (first + k < p.row_packs) send_words(p, slot, flag, (long long)row * p.row_packs + first + k);
    int turn = 0;
    for (int row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
        float hidden[kRun], squares[kRun];
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            float sum[kElems] = {};
            if (first + k < p.row_packs) {
                const long long i = (long long)row * p.row_packs + first + k;
                const OutPack residual = p.residual[i];
                uint4 v[VALUES];
                receive_words(p, slot, flag, i, v);
                finish(v, sum);
                const OutPack reduced = round_out(sum);
#pragma unroll
                for (int e = 0; e < kElems; e++) sum[e] = __fadd_rn(element(residual, e), element(reduced, e));
                const OutPack rounded = round_out(sum);
                p.out[i] = rounded;
#pragma unroll
                for (int e = 0; e < kElems; e++) sum[e] = element(rounded, e);
            }
#pragma unroll
            for (int e = 0; e < kElems; e++) hidden[k * kElems + e] = sum[e], squares[k * kElems + e] = __fmul_rn(sum[e], sum[e]);
        }
#pragma unroll
        for (int width = 1; width < kRun; width *= 2)
#pragma unroll
            for (int i = 0; i < kRun; i += 2 * width) squares[i] = __fadd_rn(squares[i], squares[i + width]);
        float total = squares[0];
#pragma unroll
        for (int width = 1; width < 32; width *= 2) total = __fadd_rn(total, __shfl_xor_sync(~0u, total, width));
        if (lane == 0) warps[turn][threadIdx.x / 32] = total;
        __syncthreads();  // warps[turn] is complete; the other turn's was read before it
        total = lane < blockDim.x / 32 ? warps[turn][lane] : 0.0f;
#pragma unroll
        for (int width = 1; width < 32; width *= 2) total = __fadd_rn(total, __shfl_xor_sync(~0u, total, width));
        const float scale = rsqrtf(__fadd_rn(__fmul_rn(total, p.inverse_width), p.eps));
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++)
            if (first + k < p.row_packs) {
                float y[kElems];
#pragma unroll
                for (int e = 0; e < kElems; e++)
                    y[e] = __fmul_rn(__fmul_rn(hidden[k * kElems + e], scale), weight_at(p.weight, (first + k) * kElems + e));
                p.normed[(long long)row * p.row_packs + first + k] = round_out(y);
            }
    }
    count_call(p, epoch);
}
#endif

// -- two shot --------------------------------------------------------------------------------------------------------------------

/* Packs of this launch in the slice of `rank`: [0, the smaller of count and what is left of the value). */
__device__ __forceinline__ long long slice_count(const Params& p, int rank) {
    const long long left = p.packs - rank * p.slice, whole = left < p.slice ? left : p.slice;
    return whole - p.start < p.count ? whole - p.start : p.count;
}

/* Slice `peer` of this rank's values, chunk [begin, end), into the peer's slot: value t, pack i at (t * count + i) * 16. */
__device__ __forceinline__ void send_slices(const Params& p, u64 slot, long long begin, long long end) {
    const int first = p.first[p.rank], own = p.first[p.rank + 1] - first;
#pragma unroll 1
    for (int k = 1; k < RANKS; k++) {
        const int peer = p.rank + k < RANKS ? p.rank + k : p.rank + k - RANKS;
        const long long stop = end < slice_count(p, peer) ? end : slice_count(p, peer);
#pragma unroll 1
        for (int s = 0; s < own; s++) {
            const uint4* from = p.values + s * p.packs + peer * p.slice + p.start;
            uint4* to = (uint4*)(p.slots[peer] + slot) + (first + s) * p.count;
            for (long long i = begin + threadIdx.x; i < stop; i += 4 * blockDim.x) {
                uint4 v[4];
#pragma unroll
                for (int u = 0; u < 4; u++)
                    if (i + u * blockDim.x < stop) v[u] = from[i + u * blockDim.x];
#pragma unroll
                for (int u = 0; u < 4; u++)
                    if (i + u * blockDim.x < stop) to[i + u * blockDim.x] = v[u];
            }
        }
    }
}

/* Finishes chunk [begin, end) of this rank's slice: into out, and with GATHER to every peer. */
template <bool GATHER>
__device__ __forceinline__ void finish_slice(const Params& p, u64 slot, long long begin, long long end) {
    const int first = p.first[p.rank], last = p.first[p.rank + 1];
    const long long mine = p.rank * p.slice + p.start, stop = end < slice_count(p, p.rank) ? end : slice_count(p, p.rank);
    const uint4* received = (const uint4*)(p.slots[p.rank] + slot);
    for (long long i = begin + threadIdx.x; i < stop; i += kUnroll * blockDim.x) {
        uint4 v[kUnroll][VALUES];
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
#pragma unroll
            for (int t = 0; t < VALUES; t++)
                if (const long long at = i + u * blockDim.x; at < stop)
                    v[u][t] = t < first || t >= last ? received[t * p.count + at] : p.values[(t - first) * p.packs + mine + at];
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
            if (const long long at = i + u * blockDim.x; at < stop) {
                float root[kElems];
                finish(v[u], root);
                const OutPack sum = round_out(root);
                p.out[(GATHER ? mine : p.start) + at] = sum;
                if (GATHER)
#pragma unroll
                    for (int k = 1; k < RANKS; k++) {
                        const int peer = p.rank + k < RANKS ? p.rank + k : p.rank + k - RANKS;
                        ((OutPack*)p.gathered[peer])[p.rank * p.count + at] = sum;
                    }
            }
    }
}

/* Chunk [begin, end) of the peers' finished slices, which they have stored here, into out. */
__device__ __forceinline__ void collect_slices(const Params& p, long long begin, long long end) {
#pragma unroll 1
    for (int k = 1; k < RANKS; k++) {
        const int peer = p.rank + k < RANKS ? p.rank + k : p.rank + k - RANKS;
        const long long stop = end < slice_count(p, peer) ? end : slice_count(p, peer);
        const OutPack* from = (const OutPack*)p.gathered[p.rank] + peer * p.count;
        OutPack* to = p.out + peer * p.slice + p.start;
        for (long long i = begin + threadIdx.x; i < stop; i += 4 * blockDim.x) {
            OutPack v[4];
#pragma unroll
            for (int u = 0; u < 4; u++)
                if (i + u * blockDim.x < stop) v[u] = from[i + u * blockDim.x];
#pragma unroll
            for (int u = 0; u < 4; u++)
                if (i + u * blockDim.x < stop) to[i + u * blockDim.x] = v[u];
        }
    }
}

/* Chunks go round robin over blocks. One flag a turn tells the peers two things: chunk c + 1 has been sent, and with GATHER chunk c
   is finished and stored. So the stores of the next chunk are on the wire while this block waits for the last one. */
template <bool GATHER>
__device__ __forceinline__ void slices(const Params& p) {
    const u64 epoch = begin_call(p), base = epoch << 20;
    const u64 slot = epoch % 2 * p.slot_bytes;
    const long long size = (long long)p.chunk * blockDim.x, turn = size * gridDim.x, offset = size * blockIdx.x;
    const int chunks = (int)((p.count + turn - 1) / turn);  // the same for all blocks and ranks: all signal all chunks
    send_slices(p, slot, offset, offset + size);
    signal(p, base + 1);
    for (int c = 0; c < chunks; c++) {
        const long long begin = c * turn + offset;
        if (c + 1 < chunks) send_slices(p, slot, begin + turn, begin + turn + size);
        wait(p, base + c + 1);
        finish_slice<GATHER>(p, slot, begin, begin + size);
        if (GATHER || c + 1 < chunks) signal(p, base + c + 2);
        if (GATHER && c > 0) collect_slices(p, begin - turn, begin - turn + size);
    }
    if (GATHER) {
        wait(p, base + chunks + 1);
        collect_slices(p, (chunks - 1) * turn + offset, (chunks - 1) * turn + offset + size);
    }
    count_call(p, epoch);
}

extern "C" __global__ void __launch_bounds__(256, 2) two_shot(const __grid_constant__ Params p) { slices<true>(p); }
extern "C" __global__ void __launch_bounds__(256, 2) two_shot_scatter(const __grid_constant__ Params p) { slices<false>(p); }

// Gradients of attention's keys and values for Hopper: the bytes of dkv_kernel in kernels/attention/backward.py, a query head's part of each.
//
// A block has 128 keys of a query head, 64 for each of two consumer warpgroups, and walks the queries that see them in blocks of 64. One warp
// drives the copy engine through STAGES slots of queries and output gradients, another one brings the logarithms and delta of their rows. Scores
// lie with keys as rows, so that weights and their gradients are the left operands of both sums straight from registers:
//
//     S^T = K Q^T    dP^T = V dO^T    P = exp2(S scale - lse)    dV += P^T dO    dS = P (dP - delta)    dK += dS^T Q
//
// While weights are made of S, dP is computed; while dS is made, dV; and the next block's S and dP follow dK without a wait, but no product is
// under way from one turn of the loop to the next, which ptxas does not follow (C7514). Registers of a thread: WIDTH / 2 of each sum, 32 of S and
// of dP, 16 words of P and of dS.
//
// Contraction is off by construction: every product and sum is an intrinsic that is rounded once.
//
// Compiled at run time (NVRTC, which is given include/) for sm_90a with these macros:
//   WIDTH 64 | 128       of a head, filled up with zeros       STAGES       slots of 64 queries and output gradients
//   IN_FP16              operands are fp16, else bf16          CAUSAL       0 | 1
//   PARTS                1: sums are stored in fp32, to be added over the heads of a group; 0: rounded to the operands' type

#include "include/barriers.cuh"
#include "include/numbers.cuh"
#include "include/attention_products.cuh"
#include "include/attention_schedule.h"

struct Params {
    void *dk, *dv;         // unit stride in the width
    const float *lse, *delta;  // [sequences, heads, queries]
    long long out_row, out_batch, out_head;
    int queries, keys, per_group, width;
    float scale, out_scale;    // of scores, log2(e) included; of dk
    Grid grid;             // tiles of 128 keys
};

// Blocks of queries that see any of the 64 keys from `key` on: from `first` on; from `whole` on all of them see all.
struct Span {
    int first, whole;
};
__device__ __forceinline__ Span span_of(const Params& p, int key) {
    if (!CAUSAL) return {0, 0};
    const int behind = key - (p.keys - p.queries);  // the first row that sees the first key
    return {max(0, behind) / kBlock, (max(0, behind + kBlock - 1) + kBlock - 1) / kBlock};
}

struct Ring {
    u32 full, empty;       // addresses of barriers
    int slot;
    u32 phase;
    __device__ __forceinline__ void step() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
};

// Of a slot: logarithms, then products with the outputs, of its rows.
struct Rows {
    float lse[kBlock], delta[kBlock];
};

struct Consumer {
    const Params& p;
    u32 keys, values, slots;   // lower halves of descriptors: of this warpgroup's; of the first slot
    const Rows* rows;
    Ring ring;
    int lane, key, offset;     // first of the two rows of keys that are this thread's; keys - queries
    int slot, done;            // what is worked on, and what was before
    float scores[32], slopes[32], dk[kOut], dv[kOut];
    u32 weights[16], gradients[16];

    __device__ __forceinline__ u32 slot_at(int which) { return slots + which * (2 * kTileBytes / 16); }
    __device__ __forceinline__ void release(int which) {
        if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ring.empty + 8 * which) : "memory");
    }
    __device__ __forceinline__ void skip() {
        barrier_wait(ring.full + 8 * ring.slot, ring.phase);
        __syncwarp();
        release(ring.slot);
        ring.step();
    }

    // Issues S and dP of the next block.
    __device__ __forceinline__ void begin() {
        barrier_wait(ring.full + 8 * ring.slot, ring.phase);
        slot = ring.slot;
        ring.step();
        const u32 q = slot_at(slot), dout = q + kTileBytes / 16;
        pin(scores);
        pin(slopes);
        fence_products();
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
            const u32 inside = (k / 4 * kBox + k % 4 * 32) / 16;
            multiply_qk(scores, operand(keys + inside), operand(q + inside), k > 0);
        }
        commit_products();
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
            const u32 inside = (k / 4 * kBox + k % 4 * 32) / 16;
            multiply_qk(slopes, operand(values + inside), operand(dout + inside), k > 0);
        }
        commit_products();
    }
    // Issues the product of the last dS and its queries.
    __device__ __forceinline__ void accumulate() {
        done = slot;
        const u32 q = slot_at(slot);
        pin(dk);
        pin(gradients);
        fence_products();
#pragma unroll
        for (int k = 0; k < kBlock / 16; k++) multiply_pv(dk, gradients + 4 * k, operand(q + k * 2048 / 16), 1);
        commit_products();
    }

    // What begin() began becomes dS, and is in dV. x[4 j + c]: row 8 j + 2 (lane % 4) + c % 2 of queries, key lane / 4, or 8 below for c >= 2.
    template <bool FIRST>
    __device__ __forceinline__ void settle(int block, bool masked) {
        const u32 dout = slot_at(slot) + kTileBytes / 16;
        const float2* of_rows = reinterpret_cast<const float2*>(rows[slot].lse) + lane % 4;
        float2 x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = of_rows[4 * j];
        wait_products<1>();
        pin(scores);
        if constexpr (!FIRST) {
            pin(dk);
            pin(gradients);
            release(done);
        }
#pragma unroll
        for (int i = 0; i < 32; i++) scores[i] = exp2_of(__fmaf_rn(scores[i], p.scale, -(i % 2 ? x[i / 4].y : x[i / 4].x)));
        if (masked) {
            const int from = key - offset - block * kBlock - lane % 4 * 2;  // the first row that sees it, counted from this thread's first on
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (8 * (i / 4) + i % 2 < from + 8 * (i / 2 % 2)) scores[i] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) weights[i] = pack<kFormat>(scores[2 * i], scores[2 * i + 1]);
        pin(dv);
        pin(weights);
        fence_products();
#pragma unroll
        for (int k = 0; k < kBlock / 16; k++) multiply_pv(dv, weights + 4 * k, operand(dout + k * 2048 / 16), 1);
        commit_products();
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = of_rows[kBlock / 2 + 4 * j];
        wait_products<1>();
        pin(slopes);
#pragma unroll
        for (int i = 0; i < 16; i++)
            gradients[i] = pack<kFormat>(__fmul_rn(scores[2 * i], __fsub_rn(slopes[2 * i], x[i / 2].x)),
                                         __fmul_rn(scores[2 * i + 1], __fsub_rn(slopes[2 * i + 1], x[i / 2].y)));
        pin(gradients);
        wait_products<0>();
        pin(dv);
        pin(weights);
    }

    __device__ __forceinline__ void finish() {
        accumulate();
        wait_products<0>();
        pin(dk);
        pin(gradients);
        release(done);
    }
};

__device__ __forceinline__ void store(const Params& p, const Consumer& c, const TileIndex& at) {
    const long long to = at.sequence * p.out_batch + at.head * p.out_head + c.key * p.out_row;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (c.key + 8 * r >= p.keys) continue;
#pragma unroll
        for (int j = 0; j < kOut / 4; j++) {
            const int column = 8 * j + c.lane % 4 * 2, i = 4 * j + 2 * r;
            if (column >= p.width) continue;
            const long long there = to + 8 * r * p.out_row + column;
            const float2 dk = make_float2(__fmul_rn(c.dk[i], p.out_scale), __fmul_rn(c.dk[i + 1], p.out_scale));
#if PARTS
            *reinterpret_cast<float2*>((float*)p.dk + there) = dk;
            *reinterpret_cast<float2*>((float*)p.dv + there) = make_float2(c.dv[i], c.dv[i + 1]);
#else
            *reinterpret_cast<u32*>((char*)p.dk + 2 * there) = pack<kFormat>(dk.x, dk.y);
            *reinterpret_cast<u32*>((char*)p.dv + 2 * there) = pack<kFormat>(c.dv[i], c.dv[i + 1]);
#endif
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    dkv(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v,
        const __grid_constant__ TensorMap map_dout, const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    char* shared = raw + (-smem_address(raw) & 1023);      // the swizzle repeats every 1024 bytes
    char* slots = shared + 4 * kTileBytes;                 // behind keys and values of both warpgroups
    Rows* rows = (Rows*)(slots + STAGES * 2 * kTileBytes);
    const u32 full = smem_address(rows + STAGES), empty = full + STAGES * 8, ready = empty + STAGES * 8;
    const int warp = uniform(threadIdx.x / 32), group = warp / 4, lane = threadIdx.x % 32;
    TileIndex at = tile_at(p.grid, blockIdx.x);
    const int tile = p.grid.tiles - 1 - at.tile, key = tile * 2 * kGroupRows;  // the first keys are seen by most rows
    const int blocks = (p.queries + kBlock - 1) / kBlock, begin = span_of(p, key).first;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 2);   // both producers, then the bytes
            barrier_init(empty + 8 * s, 8);  // consumer warps
        }
        barrier_init(ready, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (group == 2) {  // ---- producers
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        Ring ring{full, empty, 0, 0};
        if (warp == 8 && lane == 0) {
            barrier_expect(ready, 4 * kTileBytes);
            for (int i = 0; i < 2 * kHalves; i++) {  // of both warpgroups
                const u32 to = smem_address(shared) + i * kBox;
                const int row = key + i / kHalves * kGroupRows, column = i % kHalves * 64, head = at.head / p.per_group;
                copy(to, &map_k, ready, column, row, head, at.sequence);
                copy(to + 2 * kTileBytes, &map_v, ready, column, row, head, at.sequence);
            }
            for (int block = begin; block < blocks; block++, ring.step()) {
                barrier_wait(ring.empty + 8 * ring.slot, ring.phase ^ 1);
                const u32 bar = ring.full + 8 * ring.slot, to = smem_address(slots) + ring.slot * 2 * kTileBytes;
                barrier_expect(bar, 2 * kTileBytes);
                for (int i = 0; i < kHalves; i++) copy(to + i * kBox, &map_q, bar, 64 * i, block * kBlock, at.head, at.sequence);
                for (int i = 0; i < kHalves; i++) copy(to + kTileBytes + i * kBox, &map_dout, bar, 64 * i, block * kBlock, at.head, at.sequence);
            }
        } else if (warp == 9) {
            const long long first = ((long long)at.sequence * p.grid.heads + at.head) * p.queries;
            float lse[2], delta[2];
            auto fetch = [&](int block) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = block * kBlock + 32 * i + lane;
                    const bool real = row < p.queries;
                    lse[i] = real ? p.lse[first + row] : __uint_as_float(0x7f800000);  // exp2(0 - inf) = 0 behind the end
                    delta[i] = real ? p.delta[first + row] : 0.0f;
                }
            };
            fetch(begin);
            for (int block = begin; block < blocks; block++, ring.step()) {
                barrier_wait(ring.empty + 8 * ring.slot, ring.phase ^ 1);
#pragma unroll
                for (int i = 0; i < 2; i++) rows[ring.slot].lse[32 * i + lane] = lse[i], rows[ring.slot].delta[32 * i + lane] = delta[i];
                __syncwarp();
                if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ring.full + 8 * ring.slot) : "memory");
                if (block + 1 < blocks) fetch(block + 1);
            }
        }
    } else {  // ---- consumers
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int mine = key + group * kGroupRows;
        const Span span = span_of(p, mine);
        const int first = mine < p.keys ? min(span.first, blocks) : blocks;
        Consumer c{p};
        c.keys = operand_at(smem_address(shared) + group * kTileBytes);
        c.values = operand_at(smem_address(shared) + (2 + group) * kTileBytes);
        c.slots = operand_at(smem_address(slots));
        c.rows = rows;
        c.ring = Ring{full, empty, 0, 0};
        c.lane = lane, c.key = mine + warp % 4 * 16 + lane / 4, c.offset = p.keys - p.queries;
#pragma unroll
        for (int i = 0; i < kOut; i++) c.dk[i] = c.dv[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) c.scores[i] = c.slopes[i] = 0.0f;
        pin(c.dk);  // registers of their own, none of them copied while products run
        pin(c.dv);
        pin(c.scores);
        pin(c.slopes);
        for (int block = begin; block < first; block++) c.skip();
        if (first < blocks) {
            barrier_wait(ready, 0);
            c.begin();
            c.settle<true>(first, first < span.whole);
            for (int block = first + 1; block < blocks; block++) {
                c.accumulate();
                c.begin();
                c.settle<false>(block, block < span.whole);
            }
            c.finish();
        }
        store(p, c, at);
    }
}

// Attention's forward by leaves for Hopper: the bytes of kernels/attention/forward.py, whose contract is reference/attention.py.
//
// A block: two consumer warpgroups of 64 queries each, one producer warp that drives the copy engine through STAGES slots of 64 keys or
// values. Persistent: the producer takes the next tile when it has copied all of one, so that copies run on across leaves and tiles.
//
// A warpgroup gives the tensor cores the scores of block i + 1 and then the values of block i, and computes the weights of i + 1 while the
// latter are on their way. The two take turns at giving (PINGPONG), so that one's products run under the other's exponentials.
//
// Registers of a thread: WIDTH / 2 of the leaf, 32 scores, 16 words of weights, and WIDTH / 2 of the node. A leaf is merged into its node
// where any other block's running sum is rescaled, between a product and the next, when the tensor cores are the other warpgroup's: the
// boundary costs one multiply-add for a value more than a block in the middle. Nodes that wait for their sibling are in scratch, every
// thread's values its own.
//
// Contraction is off by construction: every product and sum is an intrinsic that is rounded once.
//
// Compiled at run time (NVRTC, which is given include/) for sm_90a with these macros:
//   WIDTH 64 | 128       of a head, filled up with zeros       STAGES       slots of 64 keys or values
//   IN_FP16              inputs and output fp16, else bf16     CAUSAL       0 | 1
//   PACKED               sequences one behind another          TREE         more than one node of keys
//   LEAF_BLOCKS, NODE_BLOCKS   blocks of a leaf, of a node     PINGPONG     0 | 1

#include "include/barriers.cuh"
#include "include/numbers.cuh"
#include "include/attention_products.cuh"
#include "include/attention_schedule.h"

constexpr int kVecs = kOut / 4;
constexpr int kConsumers = 256;

struct Params {
    void* out;             // unit stride in the width
    float* lse;            // [sequences or 1, heads, q_rows]
    float4* scratch;       // TREE: [blocks of threads][levels][kVecs + 1][kConsumers]
    u32* turn;             // [2]: the next tile, blocks that are done. Zero before and after every launch
    const int* cu_q;       // PACKED: where each sequence's queries and keys begin in counting ...
    const int* cu_k;
    const int* first_q;    // ... and in the tensors
    const int* first_k;
    const void* v;         // PACKED: for the last values of a sequence
    long long out_row, out_batch, out_head, v_row, v_head;
    int q_rows, k_rows, per_group, levels, width;
    float scale;           // includes log2(e)
    Grid grid;
};

struct Tile {
    int row, queries, keys, blocks;   // first query of the tile, in its sequence; row < 0: there is none
    int q_at, k_at, head, batch;      // where the sequence begins in the tensors
};

// -- the contract's arithmetic ------------------------------------------------------------------------------------------------------

#define kNone __uint_as_float(0xff800000)  // -inf

// Of 0 or more, as libdevice has it.
__device__ __forceinline__ float log2_of(float x) {
    const bool small = x < 1.17549435e-38f;
    const float a = small ? __fmul_rn(x, 8388608.0f) : x;
    const int e = (__float_as_int(a) - 1060439283) & -8388608;
    const float whole = __fmaf_rn((float)e, 1.1920928955078125e-7f, small ? -23.0f : 0.0f);
    const float m = __fadd_rn(__int_as_float(__float_as_int(a) - e), -1.0f);
    const u32 coefficients[9] = {0xBE2C7F30, 0x3E2FCF2A, 0xBE374E43, 0x3E520BF4, 0xBE763C8B, 0x3E93BF99, 0xBEB8AA49, 0x3EF6384A, 0xBF38AA3B};
    float t = __uint_as_float(0x3DC6B27F);
#pragma unroll
    for (int i = 0; i < 9; i++) t = __fmaf_rn(t, m, __uint_as_float(coefficients[i]));
    t = __fmul_rn(m, __fmul_rn(m, t));
    const float log = __fadd_rn(whole, __fmaf_rn(m, __uint_as_float(0x3FB8AA3B), t));
    if (__float_as_uint(a) >= 0x7F800000) return __fmaf_rn(a, __uint_as_float(0x7F800000), __uint_as_float(0x7F800000));
    return a == 0.0f ? kNone : log;
}
// `top`, or 0 of a row that has seen nothing: -inf - -inf is no number.
__device__ __forceinline__ float finite(float top) { return top == kNone ? 0.0f : top; }

// What some of the keys make of a thread's two rows, but for the sum of weighted values.
struct Part {
    float top[2], total[2];
    __device__ __forceinline__ void clear() { top[0] = top[1] = kNone, total[0] = total[1] = 0.0f; }
};
struct Factors {
    float left[2], right[2];
};
// Left becomes both; what their sums are multiplied with.
__device__ __forceinline__ Factors merge(Part& left, const Part& right) {
    Factors f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float top = fmaxf(left.top[r], right.top[r]), shift = finite(top);
        f.left[r] = exp2_of(__fsub_rn(left.top[r], shift)), f.right[r] = exp2_of(__fsub_rn(right.top[r], shift));
        left.total[r] = __fmaf_rn(left.total[r], f.left[r], __fmul_rn(right.total[r], f.right[r]));
        left.top[r] = top;
    }
    return f;
}
__device__ __forceinline__ float merged(float left, float right, const Factors& f, int i) {
    return __fmaf_rn(left, f.left[i / 2 % 2], __fmul_rn(right, f.right[i / 2 % 2]));
}

// Scores of a block become weights; `shrink` is what the running sum is multiplied with. s[4 j + c]: columns 8 j + 2 (lane % 4) + c % 2,
// row lane / 4, or 8 below for c >= 2.
__device__ __forceinline__ void weigh(float (&s)[32], Part& leaf, float (&shrink)[2], float scale) {
    float most[2], shift[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
        for (int j = 1; j < 8; j++) even = fmaxf(even, s[4 * j + 2 * r]), odd = fmaxf(odd, s[4 * j + 2 * r + 1]);
        most[r] = fmaxf(even, odd);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
        const float top = fmaxf(leaf.top[r], __fmul_rn(most[r], scale));
        shift[r] = finite(top);
        shrink[r] = exp2_of(__fsub_rn(leaf.top[r], shift[r]));
        leaf.top[r] = top;
    }
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = exp2_of(__fmaf_rn(s[i], scale, -shift[i / 2 % 2]));
#pragma unroll
    for (int r = 0; r < 2; r++) {  // columns in distance 1, 8, 16, 32, then 2 and 4 across lanes
        float sum[8];
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = __fadd_rn(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
#pragma unroll
        for (int width = 4; width > 0; width /= 2)
#pragma unroll
            for (int j = 0; j < width; j++) sum[j] = __fadd_rn(sum[2 * j], sum[2 * j + 1]);
        sum[0] = __fadd_rn(sum[0], __shfl_xor_sync(~0u, sum[0], 1));
        sum[0] = __fadd_rn(sum[0], __shfl_xor_sync(~0u, sum[0], 2));
        leaf.total[r] = __fmaf_rn(leaf.total[r], shrink[r], sum[0]);
    }
}

// -- a warpgroup --------------------------------------------------------------------------------------------------------------------

struct Ring {  // of slots, of which `full` and `empty` are the barriers
    u32 full, empty, slots, operands;  // addresses; of the first slot as an operand
    int slot;
    u32 phase;
    __device__ __forceinline__ void step() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
};

// In its tile, of the first of the two rows that are this thread's.
__device__ __forceinline__ int row_of_thread() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

struct Consumer {
    const Params& p;
    Ring ring;
    u32 queries;           // this warpgroup's: lower half of a descriptor
    int group, lane;
    int own, whole;        // blocks; those that need no mask
    int keys, sees;        // of the sequence; that this thread's first row sees
    u32 q_empty;
    float4* node_part;     // this thread's of the node, but for the sum, in shared memory: it is needed once a leaf
    float scores_[32], sum[kOut];
    u32 weights[16];
    float node[kOut];
    Part leaf;
    Factors factors;
    float shrink[2];
    int keys_slot, values_slot;

    __device__ __forceinline__ void turn_begin() {
#if PINGPONG
        asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
#endif
    }
    __device__ __forceinline__ void turn_end() {
#if PINGPONG
        asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory");
#endif
    }
    __device__ __forceinline__ void release(int slot) {
        if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ring.empty + 8 * slot) : "memory");
    }
    __device__ __forceinline__ void skip(int count) {
        for (; count > 0; count--) {
            barrier_wait(ring.full + 8 * ring.slot, ring.phase);
            __syncwarp();
            release(ring.slot);
            ring.step();
        }
    }

    __device__ __forceinline__ void scores(int) {
        barrier_wait(ring.full + 8 * ring.slot, ring.phase);
        const u32 at = ring.operands + ring.slot * (kTileBytes / 16);
        pin(scores_);
        fence_products();
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
            const u32 inside = (k / 4 * kBox + k % 4 * 32) / 16;
            multiply_qk(scores_, operand(queries + inside), operand(at + inside), k > 0);
        }
        commit_products();
        keys_slot = ring.slot;
        ring.step();
    }

    __device__ __forceinline__ void mask(int block) {
        if (block < whole) return;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int seen = keys;
            if (CAUSAL) seen = min(seen, sees + 8 * r);
            seen -= block * kBlock + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int c = 0; c < 2; c++)
                    if (8 * j + c >= seen) scores_[4 * j + 2 * r + c] = kNone;
        }
    }

    __device__ __forceinline__ void settle_first() {
        wait_products<0>();
        pin(scores_);
        release(keys_slot);
        if (own == 1) release_queries();
        mask(0);
        weigh(scores_, leaf, shrink, p.scale);
        pack_weights();
    }
    __device__ __forceinline__ void settle(int block) {
        wait_products<1>();
        pin(scores_);
        release(keys_slot);
        if (block == own - 1) release_queries();
        mask(block);
        if (block % LEAF_BLOCKS == 0) {  // the leaf before has all its weights
            merge_part();
            leaf.clear();
        }
        weigh(scores_, leaf, shrink, p.scale);
    }
    __device__ __forceinline__ void pack_weights() {
#pragma unroll
        for (int i = 0; i < 16; i++) weights[i] = pack<kFormat>(scores_[2 * i], scores_[2 * i + 1]);
    }

    // -- the node

    __device__ __forceinline__ Part part_of_node() {
        const float4 x = *node_part;
        return {{x.x, x.y}, {x.z, x.w}};
    }
    __device__ __forceinline__ void set_part_of_node(const Part& x) { *node_part = make_float4(x.top[0], x.top[1], x.total[0], x.total[1]); }
    // What the leaf adds to the node but for its sum, which follows by `factors`.
    __device__ __forceinline__ void merge_part() {
        Part node = part_of_node();
        factors = merge(node, leaf);
        set_part_of_node(node);
    }
    __device__ __forceinline__ void clear_node() {
        *node_part = make_float4(kNone, kNone, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < kOut; i++) node[i] = 0.0f;
    }
    // node = node, sum
    __device__ __forceinline__ void merge_leaf() {
#pragma unroll
        for (int i = 0; i < kOut; i++) node[i] = merged(node[i], sum[i], factors, i);
    }
    __device__ __forceinline__ float4 node_vec(int i) {
        return make_float4(node[4 * i], node[4 * i + 1], node[4 * i + 2], node[4 * i + 3]);
    }
    __device__ __forceinline__ void set_node_vec(int i, float4 x) {
        node[4 * i] = x.x, node[4 * i + 1] = x.y, node[4 * i + 2] = x.z, node[4 * i + 3] = x.w;
    }
#if TREE
    // This thread's values at `level` of the nodes that wait.
    __device__ __forceinline__ float4* parked(int level) {
        return p.scratch + ((long long)blockIdx.x * p.levels + level) * (kVecs + 1) * kConsumers + threadIdx.x;
    }
    // node = the value parked at `level`, node
    __device__ __forceinline__ void merge_parked(int level) {
        const float4* from = parked(level);
        const float4 scalars = from[kVecs * kConsumers];
        Part left = {{scalars.x, scalars.y}, {scalars.z, scalars.w}};
        const Factors f = merge(left, part_of_node());
        set_part_of_node(left);
#pragma unroll
        for (int i = 0; i < kVecs; i++) {
            const float4 x = from[i * kConsumers], y = node_vec(i);
            set_node_vec(i, make_float4(merged(x.x, y.x, f, 0), merged(x.y, y.y, f, 1), merged(x.z, y.z, f, 2), merged(x.w, y.w, f, 3)));
        }
    }
    // The node before block `next` is done: it is merged with what waits for it, and waits.
    __device__ __forceinline__ void close_node(int next) {
        int level = __popc(next / NODE_BLOCKS - 1);
        for (int turn = next / NODE_BLOCKS - 1; turn % 2 == 1; turn /= 2) merge_parked(--level);
        float4* to = parked(level);
#pragma unroll
        for (int i = 0; i < kVecs; i++) to[i * kConsumers] = node_vec(i);
        to[kVecs * kConsumers] = *node_part;
        clear_node();
    }
#endif

    // -- queries

    __device__ __forceinline__ void release_queries() {
        if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(q_empty) : "memory");
    }
    __device__ __forceinline__ void begin_tile() {
        clear_node();
        leaf.clear();
#pragma unroll
        for (int i = 0; i < kOut; i++) sum[i] = 0.0f;
        __syncwarp();  // every lane has read the tile
        if (own == 0) release_queries();
    }

    // -- values

    // Issues the product of the weights of `block` and its values. No register of it may be touched from the issue of the scores on.
    __device__ __forceinline__ void accumulate(int block) {
        barrier_wait(ring.full + 8 * ring.slot, ring.phase);
        const u32 at = ring.operands + ring.slot * (kTileBytes / 16);
        const int keep = block % LEAF_BLOCKS != 0;
        pin(sum);
        pin(weights);
        fence_products();
#pragma unroll
        for (int k = 0; k < kBlock / 16; k++) multiply_pv(sum, weights + 4 * k, operand(at + k * 2048 / 16), k > 0 || keep);
        commit_products();
        values_slot = ring.slot;
        ring.step();
    }
    __device__ __forceinline__ void complete() {
        wait_products<0>();
        pin(sum);
        pin(weights);
        release(values_slot);
    }
    // The same, then makes weights and running sum ready for block `next`. The wait is in both branches: where they part, it cannot be
    // scheduled before what hides it.
    __device__ __forceinline__ void proceed(int next) {
        if (next % LEAF_BLOCKS != 0) {
            complete();
            pack_weights();
#pragma unroll
            for (int i = 0; i < kOut; i++) sum[i] = __fmul_rn(sum[i], shrink[i / 2 % 2]);
        } else {
            complete();
            pack_weights();
            merge_leaf();
#if TREE
            if (next % NODE_BLOCKS == 0) close_node(next);
#endif
        }
    }
};

// -- results ------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 pick(const u32 (&w)[4], int i) {
    const u32 low = i & 1 ? w[1] : w[0], high = i & 1 ? w[3] : w[2];
    return i & 2 ? high : low;
}
// The last leaf and what waits go into the root, which is divided once, rounded once, and stored: a quad of lanes trades words, so that
// each has 16 bytes of a row.
__device__ __forceinline__ void finish(const Params& p, Consumer& c, const Tile& shared) {
    const Tile tile = shared;
    const int t = c.lane % 4, first = tile.row + row_of_thread();
    float total[2], lse[2];
    if (c.own > 0) {
        c.merge_part();
        c.merge_leaf();
#if TREE
        for (int level = __popc((c.own - 1) / NODE_BLOCKS) - 1; level >= 0; level--) c.merge_parked(level);
#endif
    }
    const Part root = c.part_of_node();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        lse[r] = __fadd_rn(root.top[r], log2_of(root.total[r]));
        total[r] = root.total[r] == 0.0f ? 1.0f : root.total[r];
        const int row = first + 8 * r;
        if (p.lse != nullptr && t == 0 && row < tile.queries)
            p.lse[((long long)tile.batch * p.grid.heads + tile.head) * p.q_rows + tile.q_at + row] = lse[r];
    }
    char* to = (char*)p.out + 2 * (tile.batch * p.out_batch + tile.head * p.out_head + (tile.q_at + first) * p.out_row);
#pragma unroll
    for (int m = 0; m < kVecs / 4; m++) {  // 32 columns
        u32 words[2][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float4 x = c.node_vec(4 * m + j);
            words[0][j] = pack<kFormat>(__fadd_rn(__fdiv_rn(x.x, total[0]), 0.0f), __fadd_rn(__fdiv_rn(x.y, total[0]), 0.0f));
            words[1][j] = pack<kFormat>(__fadd_rn(__fdiv_rn(x.z, total[1]), 0.0f), __fadd_rn(__fdiv_rn(x.w, total[1]), 0.0f));
        }
        const int column = 32 * m + 8 * t;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            u32 got[4];  // got[i]: from the lane i away
#pragma unroll
            for (int i = 0; i < 4; i++) got[i] = __shfl_xor_sync(~0u, pick(words[r], t ^ i), i);
            if (first + 8 * r < tile.queries && column < p.width)
                *(uint4*)(to + 2 * (8 * r * p.out_row + column)) = make_uint4(pick(got, t), pick(got, t ^ 1), pick(got, t ^ 2), pick(got, t ^ 3));
        }
    }
}

// -- the producer -------------------------------------------------------------------------------------------------------------------

// The item's tile; blocks is 0 where nothing is to be done.
__device__ __forceinline__ Tile find_tile(const Params& p, int item) {
    const TileIndex at = tile_at(p.grid, item);
    Tile t{at.tile * 2 * kGroupRows, p.q_rows, p.k_rows, 0, 0, 0, at.head, at.sequence};
#if PACKED
    t.queries = p.cu_q[at.sequence + 1] - p.cu_q[at.sequence], t.keys = p.cu_k[at.sequence + 1] - p.cu_k[at.sequence];
    t.q_at = p.first_q[at.sequence], t.k_at = p.first_k[at.sequence], t.batch = 0;
#endif
    t.blocks = max(reach(t.row, t.queries, t.keys, CAUSAL).blocks, reach(t.row + kGroupRows, t.queries, t.keys, CAUSAL).blocks);
    return t;
}

// The last values of a sequence in a pack: zeros behind them, since what lies there may be no number. By all lanes.
__device__ __forceinline__ void copy_last_values(const Params& p, const Tile& t, int block, char* to, int lane) {
    const char* from = (const char*)p.v + 2 * ((t.k_at + (long long)block * kBlock) * p.v_row + (t.head / p.per_group) * p.v_head);
    for (int i = lane; i < kBlock * WIDTH / 8; i += 32) {
        const int row = i / (WIDTH / 8), column = i % (WIDTH / 8) * 8;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (block * kBlock + row < t.keys && column < p.width) x = *(const uint4*)(from + 2 * (row * p.v_row + column));
        *(uint4*)(to + column / 64 * kBox + row * 128 + ((column / 8 % 8) ^ (row % 8)) * 16) = x;
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
}

// -- the kernel ---------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(384, 1)
    attention(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v,
              const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    char* shared = (char*)(((u64)raw + 1023) & ~1023ull);  // the swizzle repeats every 1024 bytes
    char* slots = shared + 2 * kTileBytes;                 // behind the queries of both warpgroups
    float4* parts = (float4*)(slots + STAGES * kTileBytes);
    Tile* tiles = (Tile*)(parts + kConsumers);             // of each warpgroup, two in turn: one that is worked on stays
    const u32 full = smem_address(tiles + 4), empty = full + STAGES * 8, q_full = empty + STAGES * 8, q_empty = q_full + 16;
    const int warp = uniform(threadIdx.x / 32), group = warp / 4, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);   // the producer's, then the bytes
            barrier_init(empty + 8 * s, 8);  // consumer warps
        }
        for (int g = 0; g < 2; g++) {
            barrier_init(q_full + 8 * g, 1);
            barrier_init(q_empty + 8 * g, 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (group == 2) {  // ---- producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == 8) {
            Ring ring{full, empty, smem_address(slots), 0, 0, 0};
            u32 q_phase = 0;
            const int work = tile_count(p.grid);
            auto hand_over = [&](int g, const Tile& t) {
                barrier_wait(q_empty + 8 * g, q_phase ^ 1);
                if (lane == 0) {
                    tiles[2 * q_phase + g] = t;
                    const u32 bar = q_full + 8 * g;
                    if (t.row < 0) {
                        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
                    } else {
                        barrier_expect(bar, kTileBytes);
                        for (int i = 0; i < kHalves; i++)
                            copy(smem_address(shared) + g * kTileBytes + i * kBox, &map_q, bar, 64 * i, t.q_at + t.row + g * kGroupRows, t.head, t.batch);
                    }
                }
            };
            auto bring = [&](const Tile& t, const Copy& c) {
                barrier_wait(ring.empty + 8 * ring.slot, ring.phase ^ 1);
                const u32 bar = ring.full + 8 * ring.slot;
#if PACKED
                if (c.values && (c.block + 1) * kBlock > t.keys) {
                    copy_last_values(p, t, c.block, slots + ring.slot * kTileBytes, lane);
                    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
                } else
#endif
                if (lane == 0) {
                    barrier_expect(bar, kTileBytes);
                    const TensorMap* map = c.values ? &map_v : &map_k;
                    for (int i = 0; i < kHalves; i++)
                        copy(ring.slots + ring.slot * kTileBytes + i * kBox, map, bar, 64 * i, t.k_at + c.block * kBlock, t.head / p.per_group, t.batch);
                }
                __syncwarp();
                ring.step();
            };
            for (int item = blockIdx.x; item < work;) {
                const Tile t = find_tile(p, item);
                if (t.row < t.queries) {
                    const int copies = 2 * t.blocks;
                    if (copies > 0) bring(t, copy_at(t.blocks, 0));
                    hand_over(0, t), hand_over(1, t);
                    q_phase ^= 1;
                    for (int i = 1; i < copies; i++) bring(t, copy_at(t.blocks, i));
                }
                int next = 0;
                if (lane == 0) next = atomicAdd(p.turn, 1) + gridDim.x;
                item = __shfl_sync(~0u, next, 0);
            }
            Tile none{};
            none.row = -1;
            hand_over(0, none), hand_over(1, none);
            if (lane == 0) {
                __threadfence();
                if (atomicAdd(p.turn + 1, 1) == gridDim.x - 1) p.turn[0] = p.turn[1] = 0;
            }
        }
    } else {  // ---- consumers
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Consumer c{p};
        c.ring = Ring{full, empty, 0, operand_at(smem_address(slots)), 0, 0};
        c.queries = operand_at(smem_address(shared) + group * kTileBytes);
        c.group = group, c.lane = lane;
        c.q_empty = q_empty + 8 * group;
        c.node_part = parts + threadIdx.x;
        u32 q_phase = 0;
        int turn = 0;
#if PINGPONG
        if (group == 1) c.turn_end();
#endif
        while (true) {
            barrier_wait(q_full + 8 * group, q_phase);
            q_phase ^= 1;
            const Tile& t = tiles[2 * turn + group];
            turn ^= 1;
            const int first = uniform(t.row), row = first + group * kGroupRows;
            if (first < 0) break;
            const Reach r = reach(row, uniform(t.queries), uniform(t.keys), CAUSAL);
            c.own = r.blocks, c.whole = r.whole, c.keys = t.keys, c.sees = first + row_of_thread() + t.keys - t.queries + 1;
            c.begin_tile();
            walk_blocks(c.own, uniform(t.blocks), c);
            finish(p, c, t);
        }
#if PINGPONG
        if (group == 0) c.turn_begin();  // the other's last
#endif
    }
}

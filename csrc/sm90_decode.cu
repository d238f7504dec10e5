// Attention of few queries over many keys in pages, for Hopper: kernels/attention/decode.py in one launch.
//
// A unit of work is a tile of rows (queries by heads of a key head's group, 8 NT of them) and a leaf of 512 keys, or a node of 8 leaves. The
// contract (tpinv/reference/attention.py) fixes what is added to what, not when a product happens. So of a leaf's up to 8 blocks each
// consumer warp scores one, all at once; the running maxima are prefixes of the blocks' maxima, and maxima are exact; then each
// warp takes the chain over all blocks for 16 columns of the values. Keys and values are the rows of A in both products, tokens the columns
// of B: scores^T = K Q^T, acc^T = V^T P^T.
//
//     warp 11          brings blocks of keys, then of values, through STAGES stages of 64 rows by the copy engine, running ahead over leaves
//                      and units, and the rows of the queries
//     warps 0 ... 7    warp w: scores of block w; maxima to shared memory; barrier; P, its sum and the rescales to shared memory; barrier; the
//                      chain over the blocks for columns 16 w ...; the merge into the node's total; that to shared memory
//     warps 8 ... 10   take it from there: divide, or store the part and merge what is complete
//
// Who finishes a node's last leaf merges the node, who finishes a request's last node merges those by tree.py's tree and divides: whoever
// it is, it finds the same parts and adds them in the contract's order. Counters start at zero and are left at zero.
//
// Compiled at run time (NVRTC, which is given include/) for sm_90a with these macros:
//   DIM      width of a head, a multiple of 16 up to 256        NT       tiles of 8 rows
//   STAGES   depth of the copy pipeline                          FP16     0 bf16, 1 fp16
//   SHARED_BYTES, PARAMS_BYTES                                   of a launch, of its structure on the host
//   BLOCK_KEYS, LEAF_KEYS, NODE_LEAVES                           of the contract, the sum over a block's keys included

#include "include/barriers.cuh"
#include "include/numbers.cuh"

typedef long long i64;

constexpr int kBlock = BLOCK_KEYS, kLeaf = LEAF_KEYS, kLeafBlocks = kLeaf / kBlock, kNode = NODE_LEAVES;
static_assert(kBlock == 64 && kLeafBlocks == 8, "a consumer warp takes one block of a leaf");
static_assert(2 * STAGES >= kLeafBlocks, "a warp tells only two turns of a stage apart");
constexpr int kIn = FP16 ? kFp16 : kBf16;
constexpr int kRows = 8 * NT;
constexpr int kConsumers = 256, kMergers = 96, kThreads = kConsumers + kMergers + 32;
constexpr int kBoxes = (DIM + 63) / 64;                    // of 64 columns: a copy brings one of 16 rows, swizzled
constexpr int kBoxBytes = kBlock * 128, kStageBytes = kBoxes * kBoxBytes, kCopyBytes = 16 * 128;
constexpr int kQueryPitch = 2 * DIM + 16;                  // bytes of a row of queries in shared memory
constexpr int kColumnTiles = DIM / 16, kTiles = (kColumnTiles + 7) / 8;  // of the values, and of those a warp's
constexpr int kMost = 1024;                                // requests
constexpr int kVectors = DIM / 4;                          // float4s of a row

struct Params {
    const char* q;
    char* out;
    float *acc, *sums;
    int* arrived;                                          // of nodes, then [requests, tiles, heads]
    const int *table, *starts, *lens;
    i64 q_s, q_h, o_s, o_h, table_s;                       // elements
    int requests, tokens, heads, per_group, most, longest, page, causal, elsewhere, enough, limit, tiles, nodes;
    float scale;
};

// What is in shared memory behind the stages.
struct Shared {
    alignas(16) uint2 p[kLeafBlocks][4][NT][32];           // P as fragments of B
    alignas(16) float top[kLeafBlocks][kRows];             // a block's maximum
    alignas(16) float tops[kLeafBlocks][kRows];            // the running one, scaled
    alignas(16) float shrink[kLeafBlocks][kRows];
    alignas(16) float sum[kLeafBlocks][kRows];
    alignas(16) float acc[kRows][DIM];                     // a finished unit
    alignas(16) float sums[2][kRows];
    alignas(16) char queries[2][kRows][kQueryPitch];       // of a unit and the next
    alignas(8) unsigned long long full[STAGES], empty[STAGES], asked[2], read[2];  // the latter two: of queries
    int ends[2][kMost];                                    // units of a key head up to a request and in it: of leaves, of nodes
    int starts[kMost + 1], lens[kMost];                    // here, since whoever asks the L2 cache waits behind all copies
    int units, whole, last;
};

static_assert(sizeof(Params) == PARAMS_BYTES, "the host's structure is another");
static_assert(1023 + STAGES * kStageBytes + sizeof(Shared) <= SHARED_BYTES, "the host reserves too little");

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float larger(float a, float b) {
    float y;
    asm("max.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
__device__ __forceinline__ float nothing() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float finite(float top) { return top == nothing() ? 0.0f : top; }

__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ u32 transpose(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (kIn == kBf16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void barrier_arrive_many(u32 bar, u32 count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
__device__ __forceinline__ void mergers_meet() { asm volatile("bar.sync 2, 96;" ::: "memory"); }
// A finished unit changes hands.
__device__ __forceinline__ void finished_arrive() { asm volatile("bar.arrive 3, 352;" ::: "memory"); }
__device__ __forceinline__ void finished_wait() { asm volatile("bar.sync 3, 352;" ::: "memory"); }
__device__ __forceinline__ void taken_arrive() { asm volatile("bar.arrive 4, 352;" ::: "memory"); }
__device__ __forceinline__ void taken_wait() { asm volatile("bar.sync 4, 352;" ::: "memory"); }

// The stages: the n-th block copied is in stage n mod STAGES.
struct Turn {
    u32 stage, phase;
    __device__ __forceinline__ void advance(int by) {
        stage += by;
        while (stage >= STAGES) stage -= STAGES, phase ^= 1;
    }
};

struct Unit {
    int request, index, head;              // index among all units of a key head
    int tile, tiles, start, stop;          // keys, those that any row sees
    int q_at, queries, keys, parts;        // parts of a row in all
};

__device__ __forceinline__ bool refused(const Params& a, int queries, int keys) {
    return keys > a.longest || queries > a.most || (a.causal && keys < queries && keys > 0);
}

__device__ __forceinline__ Unit unit_of(const Params& a, const Shared& s, int item) {
    Unit u;
    u.index = item / a.heads, u.head = item - u.index * a.heads;
    const int* ends = s.ends[s.whole];
    int low = 0, high = a.requests - 1;    // the first request that ends behind it
    while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > u.index) high = middle; else low = middle + 1;
    }
    u.request = low;
    const int inside = u.index - (low ? ends[low - 1] : 0), size = s.whole ? kLeaf * kNode : kLeaf;
    u.q_at = s.starts[low], u.queries = s.starts[low + 1] - u.q_at, u.keys = s.lens[low];
    u.tiles = (u.queries * a.per_group + kRows - 1) / kRows;
    u.tile = inside % u.tiles;
    u.start = inside / u.tiles * size;
    u.parts = (u.keys + size - 1) / size;
    u.stop = min(u.keys, u.start + size);
    if (a.causal) u.stop = max(u.start, min(u.stop, u.keys - u.queries + (u.tile * kRows + kRows - 1) / a.per_group + 1));
    return u;
}

// -- copies -------------------------------------------------------------------------------------------------------------------------

// Where 16 positions are: lane i of the producer knows it of positions 16 i ... 16 i + 15 of a leaf.
struct Place {
    int page, row;
};

__device__ __forceinline__ Place place_of(const Params& a, const Unit& u, int start, int lane) {
    const int position = start + 16 * lane;
    if (start >= u.stop || position >= u.keys) return {0, 0};
    const int ordinal = position / a.page;
    return {a.table[u.request * a.table_s + ordinal], position - ordinal * a.page};
}

__device__ __forceinline__ void copy_blocks(
    const TensorMap* map, const Place& place, int head, int blocks, int left, Turn& turn, u32 stages, Shared& s, int lane
) {
    // left: keys from the leaf's first on.
    for (int block = 0; block < blocks; block++) {
        const u32 full = smem_address(&s.full[turn.stage]), to = stages + turn.stage * kStageBytes;
        barrier_wait(smem_address(&s.empty[turn.stage]), turn.phase ^ 1);
        const int groups = min(4, (left - block * kBlock + 15) / 16), group = lane / kBoxes, box = lane % kBoxes;
        if (lane == 0) barrier_expect(full, groups * kBoxes * kCopyBytes);
        __syncwarp();
        const int page = __shfl_sync(0xffffffffu, place.page, (4 * block + group) % 32);
        const int row = __shfl_sync(0xffffffffu, place.row, (4 * block + group) % 32);
        if (group < groups) copy(to + box * kBoxBytes + group * kCopyBytes, map, full, 64 * box, head, row, page);
        turn.advance(1);
    }
}

__device__ __forceinline__ void produce(const Params& a, const TensorMap* map_k, const TensorMap* map_v, Shared& s, u32 stages, int lane) {
    Turn turn = {0, 0};
    const int everything = s.units * a.heads;
    int item = blockIdx.x, order = 0;
    if (item >= everything) return;
    Unit u = unit_of(a, s, item);
    Place place = place_of(a, u, u.start, lane);
    while (item < everything) {
        const int next_item = item + gridDim.x;
        const Unit next = next_item < everything ? unit_of(a, s, next_item) : u;
        if (u.start < u.stop) {
            const int rows = min(kRows, u.queries * a.per_group - u.tile * kRows), buffer = order % 2;
            const u32 asked = smem_address(&s.asked[buffer]);
            barrier_wait(smem_address(&s.read[buffer]), (order / 2 & 1) ^ 1);
            order++;
            if (lane == 0) barrier_expect(asked, rows * 2 * DIM);
            __syncwarp();
            if (lane < rows) {
                const int row = u.tile * kRows + lane, query = row / a.per_group;
                const char* from = a.q + 2 * ((u.q_at + query) * a.q_s + (u.head * a.per_group + row % a.per_group) * a.q_h);
                copy_bulk(smem_address(s.queries[buffer][lane]), from, 2 * DIM, asked);
            }
            for (int start = u.start; start < u.stop; start += kLeaf) {
                const int blocks = (min(u.stop, start + kLeaf) - start + kBlock - 1) / kBlock, left = u.keys - start;
                const Place here = place;  // the next leaf's is looked up meanwhile
                place = start + kLeaf < u.stop ? place_of(a, u, start + kLeaf, lane) : place_of(a, next, next.start, lane);
                copy_blocks(map_k, here, u.head, blocks, left, turn, stages, s, lane);
                copy_blocks(map_v, here, u.head, blocks, left, turn, stages, s, lane);
            }
        } else {
            place = place_of(a, next, next.start, lane);
        }
        u = next, item = next_item;
    }
}

// -- merges -------------------------------------------------------------------------------------------------------------------------

struct Part {
    float4 acc;
    float total, top;
};

__device__ __forceinline__ Part no_part() { return {make_float4(0.0f, 0.0f, 0.0f, 0.0f), 0.0f, nothing()}; }

__device__ __forceinline__ Part merge(const Part& left, const Part& right) {
    Part r;
    r.top = larger(left.top, right.top);
    const float shift = finite(r.top), a = exp2_of(__fsub_rn(left.top, shift)), b = exp2_of(__fsub_rn(right.top, shift));
    r.total = __fmaf_rn(left.total, a, __fmul_rn(right.total, b));
    r.acc.x = __fmaf_rn(left.acc.x, a, __fmul_rn(right.acc.x, b));
    r.acc.y = __fmaf_rn(left.acc.y, a, __fmul_rn(right.acc.y, b));
    r.acc.z = __fmaf_rn(left.acc.z, a, __fmul_rn(right.acc.z, b));
    r.acc.w = __fmaf_rn(left.acc.w, a, __fmul_rn(right.acc.w, b));
    return r;
}

__device__ __forceinline__ float quotient(float acc, float total) { return __fadd_rn(__fdiv_rn(acc, total == 0.0f ? 1.0f : total), 0.0f); }

// Slot of a part: acc [kRows, DIM]; sums [4, kRows]: total and top of a leaf, of a node.
__device__ __forceinline__ Part load_part(const Params& a, i64 slot, int row, int column, int kind) {
    Part r;
    r.acc = __ldcg(reinterpret_cast<const float4*>(a.acc + (slot * kRows + row) * DIM) + column);
    r.total = __ldcg(a.sums + (slot * 4 + 2 * kind) * kRows + row);
    r.top = __ldcg(a.sums + (slot * 4 + 2 * kind + 1) * kRows + row);
    return r;
}

__device__ __forceinline__ char* out_row(const Params& a, const Unit& u, int row) {
    return a.out + 2 * ((u.q_at + row / a.per_group) * a.o_s + (u.head * a.per_group + row % a.per_group) * a.o_h);
}

__device__ __forceinline__ void store_quotient(const Params& a, const Unit& u, int row, int column, const Part& part) {
    u32* to = reinterpret_cast<u32*>(out_row(a, u, u.tile * kRows + row)) + 2 * column;
    to[0] = pack<kIn>(quotient(part.acc.x, part.total), quotient(part.acc.y, part.total));
    to[1] = pack<kIn>(quotient(part.acc.z, part.total), quotient(part.acc.w, part.total));
}

// Whether this block is the last of `count` to arrive; what all of them stored before is then visible to all of its mergers.
__device__ __forceinline__ bool arrives_last(int* counter, int count, Shared& s, int thread) {
    mergers_meet();
    if (thread == 0) {
        int before;
        asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        if (before == count - 1) *counter = 0;  // nobody else comes; the next launch finds it at zero
        s.last = before == count - 1;
    }
    mergers_meet();
    return s.last;
}

__device__ __forceinline__ void merge_node(const Params& a, const Unit& u, int rows, int leaves, i64 slot, i64 step, bool only, int thread) {
    constexpr int kTogether = 2;           // vectors of a thread whose parts are under way at once
    for (int i = thread; i < rows * kVectors; i += kTogether * kMergers) {
        Part parts[kTogether][kNode];
#pragma unroll
        for (int j = 0; j < kTogether; j++) {
            const int at = min(i + j * kMergers, rows * kVectors - 1), row = at / kVectors, column = at - row * kVectors;
#pragma unroll
            for (int leaf = 0; leaf < kNode; leaf++)  // without a branch: the last one again instead of none
                parts[j][leaf] = load_part(a, slot + min(leaf, leaves - 1) * step, row, column, 0);
        }
#pragma unroll
        for (int j = 0; j < kTogether; j++) {
            const int at = i + j * kMergers, row = at / kVectors, column = at - row * kVectors;
            if (row >= rows) break;
            Part node = no_part();
#pragma unroll
            for (int leaf = 0; leaf < kNode; leaf++)
                if (leaf < leaves) node = merge(node, parts[j][leaf]);
            if (only) {
                store_quotient(a, u, row, column, node);
            } else {
                __stcg(reinterpret_cast<float4*>(a.acc + (slot * kRows + row) * DIM) + column, node.acc);
                if (column == 0) {
                    __stcg(a.sums + (slot * 4 + 2) * kRows + row, node.total);
                    __stcg(a.sums + (slot * 4 + 3) * kRows + row, node.top);
                }
            }
        }
    }
}

// The append-only tree of tree.py by a carry counter: level l waits while bit l of the number of nodes so far is set.
__device__ __forceinline__ void merge_root(const Params& a, const Unit& u, int rows, int nodes, i64 slot, i64 step, int thread) {
    constexpr int kLevels = 8, kAhead = 8;
    for (int i = thread; i < rows * kVectors; i += kMergers) {
        const int row = i / kVectors, column = i - row * kVectors;
        Part waiting[kLevels], parts[kAhead], part = no_part();
#pragma unroll
        for (int level = 0; level < kLevels; level++) waiting[level] = no_part();
        for (int first = 0; first < nodes; first += kAhead) {
#pragma unroll
            for (int j = 0; j < kAhead; j++)
                parts[j] = load_part(a, slot + min(first + j, nodes - 1) * step, row, column, 1);
#pragma unroll
            for (int j = 0; j < kAhead; j++) {
                const int node = first + j;
                if (node >= nodes) break;
                part = parts[j];
                bool carries = true;
#pragma unroll
                for (int level = 0; level < kLevels; level++) {
                    const bool there = node >> level & 1;
                    if (there && (carries || node == nodes - 1)) part = merge(waiting[level], part);
                    if (!there && carries) waiting[level] = part;
                    carries = carries && there;
                }
            }
        }
        store_quotient(a, u, row, column, part);
    }
}

// What becomes of a finished unit.
__device__ __forceinline__ void merge_units(const Params& a, Shared& s, int thread) {
    const int everything = s.units * a.heads;
    for (int item = blockIdx.x; item < everything; item += gridDim.x) {
        const Unit u = unit_of(a, s, item);
        const int rows = min(kRows, u.queries * a.per_group - u.tile * kRows);
        const i64 slot = (i64)u.index * a.heads + u.head, step = (i64)u.tiles * a.heads;
        const int in_node = s.whole ? 1 : kNode, part = u.start / (s.whole ? kLeaf * kNode : kLeaf), node = part / in_node;
        const int leaves = min(in_node, u.parts - node * in_node), nodes = (u.parts + in_node - 1) / in_node;
        finished_wait();
        for (int i = thread; i < rows * kVectors; i += kMergers) {
            const int row = i / kVectors, column = i - row * kVectors;
            const Part found = {reinterpret_cast<const float4*>(s.acc[row])[column], s.sums[0][row], s.sums[1][row]};
            if (u.parts == 1) {
                store_quotient(a, u, row, column, found);
            } else {
                const int kind = leaves == 1;
                __stcg(reinterpret_cast<float4*>(a.acc + (slot * kRows + row) * DIM) + column, found.acc);
                if (column == 0) {
                    __stcg(a.sums + (slot * 4 + 2 * kind) * kRows + row, found.total);
                    __stcg(a.sums + (slot * 4 + 2 * kind + 1) * kRows + row, found.top);
                }
            }
        }
        if (item + gridDim.x < everything) taken_arrive();
        if (u.parts == 1) continue;
        const i64 node_slot = slot - (part - node * in_node) * step, first_slot = slot - part * step;
        if (leaves > 1) {
            const int nodes_before = (u.request ? s.ends[1][u.request - 1] : 0) + node * u.tiles + u.tile;
            if (!arrives_last(a.arrived + nodes_before * a.heads + u.head, leaves, s, thread)) continue;
            merge_node(a, u, rows, leaves, node_slot, step, nodes == 1, thread);
        }
        if (nodes > 1 && arrives_last(a.arrived + a.nodes + (u.request * a.tiles + u.tile) * a.heads + u.head, nodes, s, thread))
            merge_root(a, u, rows, nodes, first_slot, step * in_node, thread);
    }
    // Rows that no unit computes: of no request, of a request without keys, and of one that is refused.
    for (int request = blockIdx.x; request <= a.requests; request += gridDim.x) {
        const int from = s.starts[request];
        int to = a.tokens;
        u32 value = 0;
        if (request < a.requests) {
            to = s.starts[request + 1];
            const int keys = s.lens[request];
            const bool refuses = refused(a, to - from, keys);
            if (!refuses && keys > 0) continue;
            if (refuses && to - from > a.most && a.elsewhere) continue;
            if (refuses) value = kIn == kBf16 ? 0x7fc07fc0u : 0x7e007e00u;  // NaN
        }
        const int heads = a.heads * a.per_group;
        for (i64 i = thread; i < (i64)(to - from) * heads * (DIM / 2); i += kMergers) {
            const i64 row = i / (DIM / 2);
            reinterpret_cast<u32*>(a.out + 2 * ((from + row / heads) * a.o_s + row % heads * a.o_h))[i % (DIM / 2)] = value;
        }
    }
}

// -- products -----------------------------------------------------------------------------------------------------------------------

// Where 16 bytes of a stage are: chunk 0 ... DIM / 8 - 1 of a row. Copies swizzle them within 8 rows.
__device__ __forceinline__ u32 chunk_at(u32 stage, int row, int chunk) {
    return stage + chunk / 8 * kBoxBytes + row * 128 + ((chunk % 8 ^ row % 8) << 4);
}

__device__ __forceinline__ void score_block(const char (*queries)[kQueryPitch], float (&c)[4][NT][4], u32 stage, int lane) {
    const int g = lane / 4, t = lane % 4, row = lane % 16, half = lane / 16;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.0f;
    u32 keys[2][4][4], q[2][NT][2];
    auto load = [&](int step) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) q[step % 2][n][i] = *reinterpret_cast<const u32*>(queries[8 * n + g] + 32 * step + 16 * i + 4 * t);
#pragma unroll
        for (int m = 0; m < 4; m++) load_matrices(keys[step % 2][m], chunk_at(stage, 16 * m + row, 2 * step + half));
    };
    load(0);
#pragma unroll
    for (int step = 0; step < kColumnTiles; step++) {
        if (step + 1 < kColumnTiles) load(step + 1);
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int n = 0; n < NT; n++) multiply(c[m][n], keys[step % 2][m], q[step % 2][n][0], q[step % 2][n][1]);
    }
}

__device__ __forceinline__ float across(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

__device__ __forceinline__ void consume(const Params& a, Shared& s, u32 stages, int thread) {
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;  // of a fragment
    const int everything = s.units * a.heads;
    Turn turn = {0, 0};
    int order = 0;                         // of units that have blocks
    for (int item = blockIdx.x; item < everything; item += gridDim.x) {
        const Unit u = unit_of(a, s, item);
        const char (*queries)[kQueryPitch] = s.queries[order % 2];
        int sees[NT][2];                   // keys, of rows 8 n + 2 t and the next
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                sees[n][i] = a.causal ? min(u.keys, u.keys - u.queries + (u.tile * kRows + 8 * n + 2 * t + i) / a.per_group + 1) : u.keys;
        float acc[kTiles][NT][4], total[NT][2], top[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) total[n][i] = 0.0f, top[n][i] = nothing();
#pragma unroll
            for (int j = 0; j < kTiles; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[j][n][i] = 0.0f;
        }
        for (int start = u.start; start < u.stop; start += kLeaf) {
            const int blocks = (min(u.stop, start + kLeaf) - start + kBlock - 1) / kBlock;
            float c[4][NT][4];             // c[m][n][2 h + i]: key 16 m + 8 h + g of the block, row 8 n + 2 t + i
            if (warp < blocks) {
                Turn mine = turn;
                mine.advance(warp);
                if (start == u.start) barrier_wait(smem_address(&s.asked[order % 2]), order / 2 & 1);
                // With fewer stages than blocks this one's may still wait for an earlier block, and a phase not begun looks like one that is over.
                if (STAGES < kLeafBlocks && warp >= STAGES) barrier_wait(smem_address(&s.full[mine.stage]), mine.phase ^ 1);
                barrier_wait(smem_address(&s.full[mine.stage]), mine.phase);
                score_block(queries, c, stages + mine.stage * kStageBytes, lane);
                __syncwarp();
                if (lane == 0) barrier_arrive_many(smem_address(&s.empty[mine.stage]), 8);
                const int first = start + warp * kBlock + g;
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float most = nothing();
#pragma unroll
                        for (int m = 0; m < 4; m++)
#pragma unroll
                            for (int h = 0; h < 2; h++) {
                                if (first + 16 * m + 8 * h >= sees[n][i]) c[m][n][2 * h + i] = nothing();
                                most = larger(most, c[m][n][2 * h + i]);
                            }
                        most = larger(most, across(most, 4));
                        most = larger(most, across(most, 8));
                        most = larger(most, across(most, 16));
                        if (g == 0) s.top[warp][8 * n + 2 * t + i] = most;
                    }
            }
            consumers_meet();              // the maxima are there; the leaf before is done with everything else in s
            if (warp < blocks) {
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int row = 8 * n + 2 * t + i;
                        float before = nothing(), now;
#pragma unroll
                        for (int b = 0; b < kLeafBlocks - 1; b++)
                            if (b < warp) before = larger(before, __fmul_rn(s.top[b][row], a.scale));
                        now = larger(before, __fmul_rn(s.top[warp][row], a.scale));
                        const float shift = finite(now);
                        float of_eight[8];
#pragma unroll
                        for (int j = 0; j < 8; j++) {
                            float& x = c[j / 2][n][2 * (j % 2) + i];
                            x = exp2_of(__fmaf_rn(x, a.scale, -shift));
                            of_eight[j] = __fadd_rn(x, across(x, 4));  // columns in distance 1
                        }
#pragma unroll
                        for (int d = 1; d < 8; d *= 2)                 // 8, 16, 32
#pragma unroll
                            for (int j = 0; j < 8; j += 2 * d) of_eight[j] = __fadd_rn(of_eight[j], of_eight[j + d]);
                        float sum = of_eight[0];
                        sum = __fadd_rn(sum, across(sum, 8));          // 2
                        sum = __fadd_rn(sum, across(sum, 16));         // 4
                        if (g == 0) {
                            s.tops[warp][row] = now;
                            s.shrink[warp][row] = exp2_of(__fsub_rn(before, shift));
                            s.sum[warp][row] = sum;
                        }
                    }
#pragma unroll
                for (int m = 0; m < 4; m++)
#pragma unroll
                    for (int n = 0; n < NT; n++)
                        s.p[warp][m][n][lane] = make_uint2(transpose(pack<kIn>(c[m][n][0], c[m][n][1])),
                                                           transpose(pack<kIn>(c[m][n][2], c[m][n][3])));
            }
            consumers_meet();              // P, its sums and the rescales are there; the maxima have been read
            if (start + kLeaf >= u.stop) { // and so have the queries
                if (thread == 0) barrier_arrive_many(smem_address(&s.read[order % 2]), 1);
                order++;
            }
            turn.advance(blocks);
            float leaf[kTiles][NT][4], leaf_total[NT][2];
#pragma unroll
            for (int n = 0; n < NT; n++) {
                leaf_total[n][0] = leaf_total[n][1] = 0.0f;
#pragma unroll
                for (int j = 0; j < kTiles; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) leaf[j][n][i] = 0.0f;
            }
            for (int b = 0; b < blocks; b++) {
                u32 values[4][kTiles][4];
                uint2 p[4][NT];
                barrier_wait(smem_address(&s.full[turn.stage]), turn.phase);
                const u32 stage = stages + turn.stage * kStageBytes;
                const int left = u.keys - start - b * kBlock - 2 * t;  // keys from this thread's first on
#pragma unroll
                for (int m = 0; m < 4; m++) {
#pragma unroll
                    for (int j = 0; j < kTiles; j++)
                        if (warp + 8 * j < kColumnTiles)
                            load_transposed(values[m][j], chunk_at(stage, 16 * m + lane / 16 * 8 + lane % 8, 2 * (warp + 8 * j) + lane / 8 % 2));
#pragma unroll
                    for (int n = 0; n < NT; n++) p[m][n] = s.p[b][m][n][lane];
                }
                __syncwarp();
                if (lane == 0) barrier_arrive_many(smem_address(&s.empty[turn.stage]), 1);
                turn.advance(1);
                if (u.keys - start - b * kBlock < kBlock) {            // what lies behind the last key may be NaN
#pragma unroll
                    for (int m = 0; m < 4; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int key = 16 * m + i / 2 * 8;
                            const u32 kept = (key < left ? 0xffffu : 0) | (key + 1 < left ? 0xffff0000u : 0);
#pragma unroll
                            for (int j = 0; j < kTiles; j++) values[m][j][i] &= kept;
                        }
                }
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const float2 shrink = *reinterpret_cast<const float2*>(&s.shrink[b][8 * n + 2 * t]);
                    const float2 sum = *reinterpret_cast<const float2*>(&s.sum[b][8 * n + 2 * t]);
                    leaf_total[n][0] = __fmaf_rn(leaf_total[n][0], shrink.x, sum.x);
                    leaf_total[n][1] = __fmaf_rn(leaf_total[n][1], shrink.y, sum.y);
#pragma unroll
                    for (int j = 0; j < kTiles; j++) {
                        leaf[j][n][0] = __fmul_rn(leaf[j][n][0], shrink.x), leaf[j][n][1] = __fmul_rn(leaf[j][n][1], shrink.y);
                        leaf[j][n][2] = __fmul_rn(leaf[j][n][2], shrink.x), leaf[j][n][3] = __fmul_rn(leaf[j][n][3], shrink.y);
                    }
                }
#pragma unroll
                for (int m = 0; m < 4; m++)
#pragma unroll
                    for (int j = 0; j < kTiles; j++)
                        if (warp + 8 * j < kColumnTiles)
#pragma unroll
                            for (int n = 0; n < NT; n++) multiply(leaf[j][n], values[m][j], p[m][n].x, p[m][n].y);
            }
#pragma unroll
            for (int n = 0; n < NT; n++)   // the chain over the leaves of a node
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float right_top = s.tops[blocks - 1][8 * n + 2 * t + i], new_top = larger(top[n][i], right_top);
                    const float shift = finite(new_top), x = exp2_of(__fsub_rn(top[n][i], shift)), y = exp2_of(__fsub_rn(right_top, shift));
                    total[n][i] = __fmaf_rn(total[n][i], x, __fmul_rn(leaf_total[n][i], y));
                    top[n][i] = new_top;
#pragma unroll
                    for (int j = 0; j < kTiles; j++)
#pragma unroll
                        for (int h = 0; h < 2; h++)
                            acc[j][n][2 * h + i] = __fmaf_rn(acc[j][n][2 * h + i], x, __fmul_rn(leaf[j][n][2 * h + i], y));
                }
        }
        // acc[j][n][2 h + i]: column 16 (warp + 8 j) + 8 h + g, row 8 n + 2 t + i
        if (item != blockIdx.x) taken_wait();
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = 8 * n + 2 * t + i;
#pragma unroll
                for (int j = 0; j < kTiles; j++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        if (warp + 8 * j < kColumnTiles) s.acc[row][16 * (warp + 8 * j) + 8 * h + g] = acc[j][n][2 * h + i];
                if (warp == 0 && g == 0) s.sums[0][row] = total[n][i], s.sums[1][row] = top[n][i];
            }
        finished_arrive();
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v, const __grid_constant__ Params a) {
    extern __shared__ char dynamic[];
    char* memory = dynamic + (-smem_address(dynamic) & 1023);  // what a swizzle repeats after
    Shared& s = *reinterpret_cast<Shared*>(memory + STAGES * kStageBytes);
    const int thread = threadIdx.x;
    if (thread == kThreads - 1) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&map_k) : "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"(&map_v) : "memory");
    }
    if (thread < STAGES) {
        barrier_init(smem_address(&s.full[thread]), 1);
        barrier_init(smem_address(&s.empty[thread]), 8);
    }
    if (thread == 32) {
        for (int i = 0; i < 2; i++) barrier_init(smem_address(&s.asked[i]), 1), barrier_init(smem_address(&s.read[i]), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (thread < STAGES) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");  // of a launch that overlaps the kernel before; else nothing
    for (int request = thread; request < a.requests; request += kThreads) {
        const int start = a.starts[request], queries = a.starts[request + 1] - start, keys = a.lens[request];
        const int tiles = refused(a, queries, keys) ? 0 : (queries * a.per_group + kRows - 1) / kRows;
        s.starts[request] = start, s.lens[request] = keys;
        if (request == a.requests - 1) s.starts[request + 1] = start + queries;
        s.ends[0][request] = tiles * ((keys + kLeaf - 1) / kLeaf);
        s.ends[1][request] = tiles * ((keys + kLeaf * kNode - 1) / (kLeaf * kNode));
    }
    __syncthreads();
    if (thread < 32) {                     // sums of all before
        int sums[2] = {0, 0};
        for (int first = 0; first < a.requests; first += 32)
#pragma unroll
            for (int kind = 0; kind < 2; kind++) {
                int x = first + thread < a.requests ? s.ends[kind][first + thread] : 0;
#pragma unroll
                for (int d = 1; d < 32; d *= 2) {
                    const int other = __shfl_up_sync(0xffffffffu, x, d);
                    if (thread >= d) x += other;
                }
                x += sums[kind];
                if (first + thread < a.requests) s.ends[kind][first + thread] = x;
                sums[kind] = __shfl_sync(0xffffffffu, x, 31);
            }
        if (thread == 0) {
            s.whole = sums[1] * a.heads >= a.enough || sums[0] * a.heads > a.limit;
            s.units = s.whole ? sums[1] : sums[0];
        }
    }
    __syncthreads();
    const u32 stages = smem_address(memory);
    if (thread < kConsumers) consume(a, s, stages, thread);
    else if (thread < kConsumers + kMergers) merge_units(a, s, thread - kConsumers);
    else produce(a, &map_k, &map_v, s, stages, thread - kConsumers - kMergers);
}

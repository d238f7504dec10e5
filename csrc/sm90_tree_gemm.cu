// Tree GEMM for Hopper: out = A B over k, where k is cut into leaves and the leaves are added by the contract's tree.
//
// The tree itself is not in this file. tpinv/tree.py says, for every leaf, how many pending values are merged after it
// (ReductionTree.merges); the host passes that table and this kernel obeys it with a stack.
//
// Registers are the whole problem. A thread of a consumer warpgroup holds BN/2 accumulators of its 64 x BN half tile, and
// a tree of L leaves keeps up to log2(L) finished values pending. Up to BN = 192 there are two sets of accumulators: a leaf that
// waits for its sibling waits where it was accumulated, and the sum of the two is merged further, parked or stored while the
// tensor cores are already busy with the next leaf. What waits longer is held where there is room, from the bottom of the stack:
//
//     BN <=  64    positions 0 and 1 in registers, then
//     BN  = 128    position 0 in registers (192 with both accumulators), then
//                  one position in shared memory when SHARED_SLOTS = 1, the others in global scratch, in practice L2
//     BN  = 192    all positions in scratch
//     BN  = 256    one set of accumulators; what the next leaf is merged with half in registers, half in shared memory;
//                  the others in scratch
//
// From 192 columns on no register is free to have many loads in flight, so parked values come back through the copy
// pipeline: the producer knows the table too and brings them in pieces of a stage, behind the stages of the leaf that they
// are merged with. Every value is private to a thread. While one warpgroup merges, the other one keeps the tensor cores busy
// with the stages it is ahead.
//
// What a product is added to (ACCUMULATE, a chain alone) comes through the copy pipeline too, behind the last stage of its tile.
//
// One block: two consumer warpgroups (128 rows), one producer warp that drives the copy engine through STAGES stages of
// 64 k. With CLUSTER = 2 two blocks share a column of tiles and each multicasts half of B. Persistent over units; a unit
// is a tile, or, in the last partial wave, one of SPLIT subtrees of a tile, whose values the last arriver adds.
//
// Compiled at run time (NVRTC, which is given include/) for sm_90a with these macros:
//   BN 16 ... 256        columns of a tile           STAGES       depth of the copy pipeline
//   CLUSTER 1 | 2        blocks that share B         DEPTH        positions of the stack, 7 at most (host: stack_depth)
//   A_MAJOR, B_MAJOR     0: k contiguous, 1: rows of A (columns of B) contiguous
//   IN_FP16              inputs fp16, else bf16      OUT          0 fp32, 1 bf16, 2 fp16
//   BIAS                 a bias follows the root     SWAP         rows of A are the output's columns: for few tokens, W is A
//   ACCUMULATE           the root is added to the output, which is fp32
//   NODE_BF16            leaves and nodes are rounded to bf16      SHARED_SLOTS 0 | 1      SPLIT 1 | 2 | 4 | 8
//   EVERY_LANE_ARRIVES   1 for compute-sanitizer, whose racecheck does not see that a warp's arrival follows all of its lanes' loads

#include "include/barriers.cuh"
#include "include/numbers.cuh"
#include "include/schedule.h"

constexpr int kBM = 128, kBK = 64;
constexpr int kRegs = BN / 2;                                     // accumulators of a thread
constexpr bool kPiped = BN >= 192;                                // parked values come back through the pipeline
constexpr Waiting kWaits = BN < 192 ? kInStack : BN == 192 ? kParked : kHeldParked;
constexpr int kRoom = BN <= 64 ? 2 : BN == 192 ? 0 : 1;           // positions of the stack that fit in registers ...
constexpr int kHeld = DEPTH < kRoom ? DEPTH : kRoom;              // ... and are needed
constexpr int kHeldShared = (DEPTH > 0 && BN == 256) ? 64 : 0;    // how many values of a held position are in shared memory
constexpr int kHeldRegs = kRegs - kHeldShared;
constexpr int kConsumers = 256;                                   // threads of the two consumer warpgroups
constexpr int kBytesA = kBM * kBK * 2, kBytesB = BN * kBK * 2;
constexpr int kSlotVecs = kRegs / 4;                              // a slot is float4[kSlotVecs][kConsumers]
constexpr int kSlots = DEPTH - kHeld;                             // positions that are not in registers
constexpr int kSharedSlots = kSlots > 0 && !kPiped ? SHARED_SLOTS : 0;
constexpr int kVecBytes = kConsumers * 16;                        // one float4 of every thread
constexpr int kBoxes = BN / 32;                                   // of the fp32 output of a tile: 128 rows of 32 columns,
constexpr int kBoxesStage = 1 + kBytesB / kBytesA;                // as large as a stage's A part
constexpr int kVecsA = kBytesA / kVecBytes, kPieceVecs = kVecsA + kBytesB / kVecBytes;  // of a stage's A part, of a stage

struct Params {
    void* out;                // [rows, cols], row stride out_stride elements
    const void* bias;         // [cols] in the output dtype, or null
    float4* scratch;          // positions that have no other place: [blocks][DEPTH][kSlotVecs][kConsumers]
    float4* parts;            // values of split tiles: [tiles][SPLIT][CLUSTER][kSlotVecs][kConsumers]
    u32* arrivals;            // [tiles][CLUSTER][2], zero before and after every launch
    long long out_stride;
    Schedule schedule;
};

// -- matrix instructions ----------------------------------------------------------------------------------------------------------

// Descriptor of a 128-byte swizzled operand. `leading` is the distance of 64-element blocks along rows when rows are
// contiguous (unused when k is); the next 8 lines follow after 1024 bytes either way. Its low word holds the address in units of 16 bytes:
// what lies further on is had by adding to it. In a cluster, a shared address has the block's number above the bits that are kept.
__device__ __forceinline__ u32 low_word(u32 address, u32 leading) { return (address & 0x3ffff) >> 4 | leading >> 4 << 16; }
__device__ __forceinline__ u64 operand(u32 low) { return (u64)(1024 >> 4 | 1u << 30) << 32 | low; }
// What every lane has the same of, said so that the compiler knows it too: descriptors are then made where it costs no vector register
// and no move between register files (attempts 9 and 10 of docs/benchmarks.md).
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(~0u, x, 0); }
// The compiler would rather compute some values anew at every use.
__device__ __forceinline__ u32 keep(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define P10(tens) "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define P60 P10() P10(1) P10(2) P10(3) P10(4) P10(5)
#if BN == 16
#define ACCUMULATORS "%0, %1, %2, %3, %4, %5, %6, %7"
#define OPERANDS "%8, %9", "%10"
#define DALL D8(0)
#elif BN == 32
#define ACCUMULATORS P10() "%10, %11, %12, %13, %14, %15"
#define OPERANDS "%16, %17", "%18"
#define DALL D8(0), D8(8)
#elif BN == 64
#define ACCUMULATORS P10() P10(1) P10(2) "%30, %31"
#define OPERANDS "%32, %33", "%34"
#define DALL D32(0)
#elif BN == 128
#define ACCUMULATORS P60 "%60, %61, %62, %63"
#define OPERANDS "%64, %65", "%66"
#define DALL D32(0), D32(32)
#elif BN == 192
#define ACCUMULATORS P60 P10(6) P10(7) P10(8) "%90, %91, %92, %93, %94, %95"
#define OPERANDS "%96, %97", "%98"
#define DALL D32(0), D32(32), D32(64)
#else
#define ACCUMULATORS P60 P10(6) P10(7) P10(8) P10(9) P10(10) P10(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define OPERANDS "%128, %129", "%130"
#define DALL D32(0), D32(32), D32(64), D32(96)
#endif
#if IN_FP16
#define IN_TYPE "f16"
#else
#define IN_TYPE "bf16"
#endif
#define WGMMA_(ab, flag)                                                                                                       \
    "{\n.reg .pred keep;\nsetp.ne.b32 keep, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" STRING(BN) "k16.f32." IN_TYPE "." \
    IN_TYPE " {" ACCUMULATORS "}, " ab ", keep, 1, 1, " STRING(A_MAJOR) ", " STRING(B_MAJOR) ";\n}\n"
#define WGMMA(operands) WGMMA_(operands)

// d = a b, plus d when `keep`: 64 x BN x 16, one step of a leaf's chain.
__device__ __forceinline__ void wgmma(float (&d)[kRegs], u64 a, u64 b, int keep) {
    asm volatile(WGMMA(OPERANDS) : DALL : "l"(a), "l"(b), "r"(keep));
}
// Keeps the compiler from moving uses of the accumulators across the asynchronous instructions around this point.
__device__ __forceinline__ void pin(float (&d)[kRegs]) {
#pragma unroll
    for (int i = 0; i < kRegs; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// -- roundings ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float round_out(float x) { return round_to<OUT>(x); }
__device__ __forceinline__ float add(float left, float right) { return add_node<NODE_BF16>(left, right); }
__device__ __forceinline__ float4 add(float4 l, float4 r) {
    return make_float4(add(l.x, r.x), add(l.y, r.y), add(l.z, r.z), add(l.w, r.w));
}
__device__ __forceinline__ float bias_at(const void* bias, int col) {
    if (OUT == 0) return ((const float*)bias)[col];
    const u32 h = ((const unsigned short*)bias)[col];
    return OUT == 1 ? from_bf16(h) : from_fp16(h);
}

// -- a warpgroup's results ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float4 four(const float (&x)[kRegs], int i) { return make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]); }
__device__ __forceinline__ void set_four(float (&x)[kRegs], int i, float4 v) { x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w; }

// The root: rounded once to the output dtype, then the bias is added and rounded once more. value(j) gives a thread's four
// values of columns 8 j .. 8 j + 7: two neighbours in one row, two in the row 8 below.
template <class Value>
__device__ __forceinline__ void store_root(const Params& p, int row0, int col0, int lane, Value value) {
    const int q = lane & 3;
    const int row = row0 + lane / 4;
    const bool inside[2] = {row < p.schedule.rows, row + 8 < p.schedule.rows};
#pragma unroll
    for (int j = 0; j < BN / 8; j += 2) {
        const float4 left = value(j), right = value(j + 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float v[4] = {half ? left.z : left.x, half ? left.w : left.y, half ? right.z : right.x, half ? right.w : right.y};
            const int col = col0 + j * 8 + q * 2;
#if SWAP  // the tile lies transposed in the output: a column here is a token
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = col + (i & 1) + (i >> 1) * 8, feature = row + 8 * half;
                if (!inside[half] || token >= p.schedule.cols) continue;
                const float x = BIAS ? round_out(v[i]) + bias_at(p.bias, feature) : v[i];
                const long long at = (long long)token * p.out_stride + feature;
#if OUT == 0
                ((float*)p.out)[at] = x;
#else
                ((unsigned short*)p.out)[at] = (unsigned short)pack<OUT>(x, x);
#endif
            }
            continue;
#endif
            const long long line = (long long)(row + 8 * half) * p.out_stride;
#if BIAS && !SWAP
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int c = col + (i & 1) + (i >> 1) * 8;
                if (c < p.schedule.cols) v[i] = round_out(v[i]) + bias_at(p.bias, c);
            }
#endif
#if OUT == 0
            float* out = (float*)p.out + line;
            if (inside[half] && col < p.schedule.cols) *(float2*)(out + col) = make_float2(v[0], v[1]);
            if (inside[half] && col + 8 < p.schedule.cols) *(float2*)(out + col + 8) = make_float2(v[2], v[3]);
#else
            // Neighbours swap halves, so that four lanes write 32 consecutive bytes.
            const u32 mine = pack<OUT>(v[0], v[1]), next = pack<OUT>(v[2], v[3]);
            const u32 got = __shfl_xor_sync(0xffffffffu, q & 1 ? mine : next, 1);
            const int c = col0 + j * 8 + (q & 1 ? 8 : 0) + (q & 2) * 2;
            if (inside[half] && c < p.schedule.cols)
                *(uint2*)((unsigned short*)p.out + line + c) = q & 1 ? make_uint2(got, next) : make_uint2(mine, got);
#endif
        }
    }
}

// -- the stack ------------------------------------------------------------------------------------------------------------------

struct Stack {
    float held[kHeld > 0 ? kHeld : 1][kHeldRegs];
    float4 *shared_held, *shared, *scratch;  // this thread's first element of each
    int pending;                             // values on the stack; when kPiped, in scratch
};

// x = held value + x. A pending value is the left operand: it lies left in the tree.
__device__ __forceinline__ void merge_held(Stack& stack, int at, float (&x)[kRegs]) {
#pragma unroll
    for (int i = 0; i < kHeldRegs; i++) x[i] = add(stack.held[at][i], x[i]);
#pragma unroll
    for (int i = 0; i < kHeldShared / 4; i++)
        set_four(x, kHeldRegs / 4 + i, add(stack.shared_held[i * kConsumers], four(x, kHeldRegs / 4 + i)));
}
__device__ __forceinline__ void hold(Stack& stack, int at, const float (&x)[kRegs]) {
#pragma unroll
    for (int i = 0; i < kHeldRegs; i++) stack.held[at][i] = x[i];
#pragma unroll
    for (int i = 0; i < kHeldShared / 4; i++) stack.shared_held[i * kConsumers] = four(x, kHeldRegs / 4 + i);
}

// x = pending value + x, for tiles up to 128 columns.
__device__ __forceinline__ void pop(Stack& stack, float (&x)[kRegs]) {
    const int position = --stack.pending;
    if (position < kHeld) {
#pragma unroll
        for (int at = 0; at < kHeld; at++)
            if (position == at) merge_held(stack, at, x);
    } else if (position - kHeld < kSharedSlots) {
#pragma unroll
        for (int i = 0; i < kSlotVecs; i++) set_four(x, i, add(stack.shared[i * kConsumers], four(x, i)));
    } else {
        const float4* from = stack.scratch + (long long)(position - kHeld) * kSlotVecs * kConsumers;
#pragma unroll
        for (int i = 0; i < kSlotVecs; i++) set_four(x, i, add(from[i * kConsumers], four(x, i)));
    }
}

__device__ __forceinline__ void push(Stack& stack, const float (&x)[kRegs]) {
    const int position = stack.pending++;
    if (position < kHeld) {
#pragma unroll
        for (int at = 0; at < kHeld; at++)
            if (position == at) hold(stack, at, x);
    } else {
        const int slot = position - kHeld;
        float4* to = slot < kSharedSlots ? stack.shared : stack.scratch + (long long)slot * kSlotVecs * kConsumers;
#pragma unroll
        for (int i = 0; i < kSlotVecs; i++) to[i * kConsumers] = four(x, i);
    }
}

// Publishes a subtree's value; whoever arrives last adds all of them, so no block ever waits for another.
__device__ __forceinline__ void publish(const Params& p, float (&x)[kRegs], const Unit& u, int cta, int warpgroup, int row0, int col0) {
    const int thread = threadIdx.x;
    const long long tile = u.tile - p.schedule.whole, next = (long long)CLUSTER * kSlotVecs * kConsumers;
    float4* parts = p.parts + ((tile * SPLIT) * CLUSTER + cta) * kSlotVecs * kConsumers + thread;
#pragma unroll
    for (int i = 0; i < kSlotVecs; i++) parts[u.part * next + i * kConsumers] = four(x, i);
    __threadfence();
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");  // the whole warpgroup has stored
    __shared__ u32 arrived[2];
    u32* arrivals = p.arrivals + (tile * CLUSTER + cta) * 2 + warpgroup;
    if (thread % 128 == 0) arrived[warpgroup] = atomicAdd(arrivals, 1);
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
    const bool last = arrived[warpgroup] == SPLIT - 1;
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");  // read before the next unit writes it
    if (!last) return;
    __threadfence();
    if (thread % 128 == 0) *arrivals = 0;
    store_root(p, row0, col0, thread % 32, [&](int i) {
        float4 v[SPLIT];
#pragma unroll
        for (int s = 0; s < SPLIT; s++) v[s] = __ldcg(parts + s * next + i * kConsumers);
#pragma unroll
        for (int width = SPLIT / 2; width > 0; width /= 2)
#pragma unroll
            for (int s = 0; s < width; s++) v[s] = add(v[2 * s], v[2 * s + 1]);
        return v[0];
    });
}

__device__ __forceinline__ void round_leaf(float (&x)[kRegs]) {
    if (NODE_BF16) {
#pragma unroll
        for (int i = 0; i < kRegs; i++) x[i] = round_to<NODE_BF16>(x[i]);
    }
}

// The root of a unit.
__device__ __forceinline__ void finish(const Params& p, float (&x)[kRegs], const Leaf& done, int cta, int warpgroup) {
    const Unit u = unit_at<SPLIT>(p.schedule, done.index);
    const int row0 = (u.m * CLUSTER + cta) * kBM + warpgroup * 64 + threadIdx.x / 32 % 4 * 16, col0 = u.n * BN;
    if (SPLIT > 1 && done.index >= p.schedule.whole) publish(p, x, u, cta, warpgroup, row0, col0);
    else store_root(p, row0, col0, threadIdx.x % 32, [&](int i) { return four(x, i); });
}

// -- what schedule.h works with: the kernel's lambdas by its names -----------------------------------------------------------------

template <class Copy, class Bring, class Want>
struct ProducerMachine {
    Copy& copy_step;
    Bring& bring;
    Want& want;
};
template <class Copy, class Bring, class Want>
ProducerMachine(Copy&, Bring&, Want&) -> ProducerMachine<Copy, Bring, Want>;

template <class Begin, class Rest, class Complete, class Sum, class Unpark, class Park, class Finish>
struct HeldMachine {
    Stack& stack;
    Begin& begin;
    Rest& accumulate_rest;
    Complete& complete;
    Sum& sum;
    Unpark& unpark;
    Park& park;
    Finish& finish;
    __device__ __forceinline__ void merge_held(float (&x)[kRegs]) { ::merge_held(stack, 0, x); }
    __device__ __forceinline__ void hold(const float (&x)[kRegs]) { ::hold(stack, 0, x); }
};
template <class... T>
HeldMachine(Stack&, T&...) -> HeldMachine<T...>;

template <class Begin, class Rest, class Complete, class Sum, class Unpark, class Park, class Finish, class Second, class Settled, class Move, class Sibling>
struct PairsMachine {
    Stack& stack;
    Begin& begin;
    Rest& accumulate_rest;
    Complete& complete;
    Sum& sum;
    Unpark& unpark;
    Park& park;
    Finish& finish;
    Second& second;
    Settled& settled;
    Move& move_to_second;
    Sibling& accumulate_sibling;
    __device__ __forceinline__ void pop(float (&x)[kRegs]) { ::pop(stack, x); }
    __device__ __forceinline__ void push(const float (&x)[kRegs]) { ::push(stack, x); }
};
template <class... T>
PairsMachine(Stack&, T&...) -> PairsMachine<T...>;

// -- the kernel -------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(384, 1)
#if CLUSTER > 1
    __cluster_dims__(CLUSTER, 1, 1)
#endif
    tree_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_out,
              const __grid_constant__ Params p) {  // map_out is for ACCUMULATE
    extern __shared__ char raw[];
    char* shared = (char*)(((u64)raw + 1023) & ~1023ull);  // the swizzle repeats every 1024 bytes
    char* stage_a = shared;
    char* stage_b = shared + STAGES * kBytesA;
    float4* shared_slot = (float4*)(stage_b + STAGES * kBytesB);
    float4* shared_held = shared_slot + kSharedSlots * kSlotVecs * kConsumers;
    const u32 full = smem_address(shared_held + kHeldShared / 4 * kConsumers), empty = full + STAGES * 8, parked = empty + STAGES * 8;

    const int warpgroup = same_in_warp(threadIdx.x / 128), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int cta = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0;
    const int units = units_of<SPLIT>(p.schedule);
    const int first_unit = blockIdx.x / CLUSTER, unit_step = gridDim.x / CLUSTER;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);              // the producer's expect, then the bytes
            barrier_init(empty + 8 * s, 8 * CLUSTER * (EVERY_LANE_ARRIVES ? 32 : 1));  // consumer warps of every block that B went to
        }
        for (int s = 0; s < DEPTH; s++) barrier_init(parked + 8 * s, 8);  // every consumer warp has parked a value in slot s
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");

    int stage = 0;
    u32 phase = 0;
    if (warpgroup == 2) {  // ---- producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(ACCUMULATE ? 40 : 24));
        if (warp == 8 && lane == 0) {
#if ACCUMULATE
            int sum_row = -1, sum_col = 0;  // the tile whose output is due
            auto want = [&](const Unit& u) { sum_row = (u.m * CLUSTER + cta) * kBM, sum_col = u.n * BN; };
            auto bring = [&]() {
                if (sum_row < 0) return;
                for (int first = 0; first < kBoxes; first += kBoxesStage) {
                    const u32 bar = full + 8 * stage;
                    const int boxes = min(kBoxesStage, kBoxes - first);
                    barrier_wait(empty + 8 * stage, phase ^ 1);
                    barrier_expect(bar, boxes * kBytesA);
                    for (int i = 0; i < boxes; i++) {
                        const char* to = i == 0 ? stage_a + stage * kBytesA : stage_b + stage * kBytesB + (i - 1) * kBytesA;
                        copy(smem_address(to), &map_out, bar, sum_col + 32 * (first + i), sum_row, 0, 0);
                    }
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
                sum_row = -1;
            };
#else
            const char* scratch = (const char*)(p.scratch + (long long)blockIdx.x * DEPTH * kSlotVecs * kConsumers);
            int in_scratch = 0;   // parked values, and a bit per slot: the phase of its barrier
            u32 slot_phases = 0;
            Parking due{0, false};
            auto want = [&](const Parking& after) { due = after; };
            auto bring = [&]() {
                if (!kPiped || DEPTH == 0) return;
                for (; due.unpark > 0; due.unpark--) {
                    const int slot = --in_scratch;
                    barrier_wait(parked + 8 * slot, slot_phases >> slot & 1);
                    slot_phases ^= 1 << slot;
                    for (int first = 0; first < kSlotVecs; first += kPieceVecs) {
                        const int vecs = min(kPieceVecs, kSlotVecs - first), vecs_a = min(kVecsA, vecs);
                        const char* from = scratch + (slot * kSlotVecs + first) * kVecBytes;
                        const u32 bar = full + 8 * stage;
                        barrier_wait(empty + 8 * stage, phase ^ 1);
                        barrier_expect(bar, vecs * kVecBytes);
                        copy_bulk(smem_address(stage_a) + stage * kBytesA, from, vecs_a * kVecBytes, bar);
                        if (vecs > vecs_a)
                            copy_bulk(smem_address(stage_b) + stage * kBytesB, from + vecs_a * kVecBytes, (vecs - vecs_a) * kVecBytes, bar);
                        if (++stage == STAGES) stage = 0, phase ^= 1;
                    }
                }
                in_scratch += due.park;
                due.park = false;
            };
#endif
            auto copy_step = [&](const Unit& u, int leaf, int piece, int step) {
                const int row0 = (u.m * CLUSTER + cta) * kBM, col0 = u.n * BN;
                const u32 bar = full + 8 * stage;
                barrier_wait(empty + 8 * stage, phase ^ 1);
                barrier_expect(bar, kBytesA + kBytesB);
                const u32 to_a = smem_address(stage_a) + stage * kBytesA, to_b = smem_address(stage_b) + stage * kBytesB;
                const int k = step * kBK;
#if A_MAJOR == 0
                copy(to_a, &map_a, bar, k, leaf, piece, row0);
#else
                for (int i = 0; i < kBM / 64; i++) copy(to_a + i * kBK * 128, &map_a, bar, row0 + 64 * i, k, leaf, piece);
#endif
#if B_MAJOR == 0 && CLUSTER == 1
                copy(to_b, &map_b, bar, k, leaf, piece, col0);
#elif B_MAJOR == 0
                copy_to_both(to_b + cta * (kBytesB / 2), &map_b, bar, k, leaf, piece, col0 + cta * (BN / 2));
#elif CLUSTER == 1
                for (int i = 0; i < BN / 64; i++) copy(to_b + i * kBK * 128, &map_b, bar, col0 + 64 * i, k, leaf, piece);
#else
                for (int i = 0; i < BN / 64; i++)
                    copy_to_both(to_b + i * kBK * 128 + cta * (kBK / 2) * 128, &map_b, bar, col0 + 64 * i, k + cta * (kBK / 2), leaf, piece);
#endif
                if (++stage == STAGES) stage = 0, phase ^= 1;
            };
            ProducerMachine machine{copy_step, bring, want};
            produce<SPLIT, kWaits, (DEPTH > 0), (ACCUMULATE > 0)>(p.schedule, units, first_unit, unit_step, machine);
        }
    } else {  // ---- consumers
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ACCUMULATE ? 232 : 240));
        float acc[kRegs];
        Stack stack;
        stack.shared = shared_slot + threadIdx.x;
        stack.shared_held = shared_held + threadIdx.x;
        stack.scratch = p.scratch + (long long)blockIdx.x * DEPTH * kSlotVecs * kConsumers + threadIdx.x;
        stack.pending = 0;
        int before = -1;  // the stage that was read last
        // A consumer warp is done with a stage, in every block that the stage's B went to.
        const u32 empty_there = keep(address_in_block(empty, lane % CLUSTER));
        const bool arrives = keep(lane < CLUSTER);
        auto arrive_empty = [&](int at) {
#if EVERY_LANE_ARRIVES
            for (int i = 0; i < CLUSTER; i++) barrier_arrive(address_in_block(empty + 8 * at, i));
#else
            if (arrives) barrier_arrive(empty_there + 8 * at);
#endif
        };
        // The same after loads: without the fence some are still under way when the copy engine writes again.
        auto hand_back = [&](int at) {
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            arrive_empty(at);
        };
        const int length = p.schedule.pieces * p.schedule.steps;
        const u32 operand_a = low_word(smem_address(stage_a) + warpgroup * 8192, A_MAJOR ? kBK * 128 : 16);  // 64 rows either way
        const u32 operand_b = low_word(smem_address(stage_b), B_MAJOR ? kBK * 128 : 16);

        auto issue = [&](float (&cur)[kRegs], bool more) {
            barrier_wait(full + 8 * stage, phase);
            const u32 at_a = operand_a + stage * (kBytesA / 16), at_b = operand_b + stage * (kBytesB / 16);
            pin(cur);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < kBK / 16; k++)
                wgmma(cur, operand(at_a + k * (A_MAJOR ? 128 : 2)), operand(at_b + k * (B_MAJOR ? 128 : 2)), more || k > 0);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        };
        // All steps but the newest one are done: the stage of the one before is free in every block that shares B.
        auto release = [&]() {
            if (before >= 0) arrive_empty(before);
            before = stage;
            if (++stage == STAGES) stage = 0, phase ^= 1;
        };
        auto know = [&]() { stage = same_in_warp(stage), phase = same_in_warp(phase), before = same_in_warp(before); };
        auto rest = [&](float (&cur)[kRegs], int from) {
            know();
            for (int step = from; step < length; step++) {
                issue(cur, true);
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                pin(cur);
                release();
            }
        };
        auto drain = [&](float (&last)[kRegs]) {
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            pin(last);
            if (before >= 0) arrive_empty(before);
            before = -1;
        };

        // x = parked value + x, from the pipeline. The step that was issued last may be in flight, on other registers.
        auto unpark = [&](float (&x)[kRegs]) {
            --stack.pending;
#pragma unroll
            for (int first = 0; first < kSlotVecs; first += kPieceVecs) {
                barrier_wait(full + 8 * stage, phase);
                const float4* part_a = (const float4*)(stage_a + stage * kBytesA) + threadIdx.x;
                const float4* part_b = (const float4*)(stage_b + stage * kBytesB) + threadIdx.x;
#pragma unroll
                for (int i = 0; i < kPieceVecs && first + i < kSlotVecs; i++)
                    set_four(x, first + i, add(i < kVecsA ? part_a[i * kConsumers] : part_b[(i - kVecsA) * kConsumers], four(x, first + i)));
                hand_back(stage);
                if (++stage == STAGES) stage = 0, phase ^= 1;
                if (before >= 0) drain(acc);  // the producer cannot go round while that stage is kept
            }
        };
        // x = what is in the output + the root, one fp32 addition. In the swizzled boxes the 16 bytes c of line r lie at c ^ r % 8.
        auto add_root = [&](float (&x)[kRegs]) {
            const int line = warpgroup * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
            for (int first = 0; first < kBoxes; first += kBoxesStage) {
                barrier_wait(full + 8 * stage, phase);
#pragma unroll
                for (int i = 0; i < kBoxesStage && first + i < kBoxes; i++) {
                    const u32 box = smem_address(i == 0 ? stage_a + stage * kBytesA : stage_b + stage * kBytesB + (i - 1) * kBytesA);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const u32 at = box + line * 128 + ((2 * j + (lane & 3) / 2) ^ (lane / 4)) * 16 + (lane & 1) * 8;
                        const float2 above = load_shared(at), below = load_shared(at + 8 * 128);
                        float* to = x + 4 * (4 * (first + i) + j);
                        to[0] = __fadd_rn(above.x, to[0]), to[1] = __fadd_rn(above.y, to[1]);
                        to[2] = __fadd_rn(below.x, to[2]), to[3] = __fadd_rn(below.y, to[3]);
                    }
                }
                hand_back(stage);
                if (++stage == STAGES) stage = 0, phase ^= 1;
                if (before >= 0) drain(acc);  // the producer cannot go round while that stage is kept
            }
        };
        auto park = [&](const float (&x)[kRegs]) {
            float4* to = stack.scratch + (long long)stack.pending * kSlotVecs * kConsumers;
#pragma unroll
            for (int i = 0; i < kSlotVecs; i++) to[i * kConsumers] = four(x, i);
            barrier_arrive_parked(parked + 8 * stack.pending++, lane);
        };
        auto finish_unit = [&](float (&x)[kRegs], const Leaf& done) {
#if ACCUMULATE
            add_root(x);
#endif
            finish(p, x, done, cta, warpgroup);
        };
        auto sum = [&]() -> float (&)[kRegs] { return acc; };
        auto begin = [&]() { know(), issue(acc, false), release(); };
        auto accumulate_rest = [&]() { rest(acc, 1); };
        auto complete = [&]() { drain(acc), round_leaf(acc); };
        Leaves<SPLIT> leaves(p.schedule, units, first_unit, unit_step);
#if BN <= 192
        float sibling[kRegs];  // the sibling of the leaf in acc, then the value of both
        auto second = [&]() -> float (&)[kRegs] { return sibling; };
        auto settled = [&]() { pin(sibling), __syncwarp(); };
        auto move_to_second = [&]() {
#pragma unroll
            for (int i = 0; i < kRegs; i++) sibling[i] = acc[i];
        };
        auto accumulate_sibling = [&]() {
            know();
            issue(sibling, false);
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            release();
            rest(sibling, 1);
            drain(sibling);
            pin(acc);
            round_leaf(acc);
            round_leaf(sibling);
#pragma unroll
            for (int i = 0; i < kRegs; i++) sibling[i] = add(acc[i], sibling[i]);
        };
        PairsMachine machine{stack, begin, accumulate_rest, complete, sum, unpark, park, finish_unit, second, settled, move_to_second, accumulate_sibling};
#else
        HeldMachine machine{stack, begin, accumulate_rest, complete, sum, unpark, park, finish_unit};
#endif
        consume<SPLIT, kWaits, (DEPTH > 0)>(p.schedule, leaves, machine);
    }
    // A block must not exit while its neighbour can still arrive at its barriers.
    __syncwarp();
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Products of attention's kernels for Hopper (wgmma): 64 rows of a warpgroup, operands in shared memory swizzled by 128 bytes, in boxes of 64
// columns. Whoever includes it has included numbers.cuh, and defines WIDTH (64 or 128) and IN_FP16.
#pragma once

constexpr int kOut = WIDTH / 2;                     // accumulators of a thread: 64 rows by WIDTH over 128 threads
constexpr int kHalves = WIDTH / 64;                 // boxes of 64 columns
constexpr int kBox = 64 * 128;                      // bytes of 64 rows of a box
constexpr int kTileBytes = kHalves * kBox;          // of 64 keys, values, or queries
constexpr int kFormat = IN_FP16 ? kFp16 : kBf16;

// The same in all lanes, and known to be: products must not lie in branches that lanes could take differently.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Descriptor of a 128-byte swizzled operand: its lower half, to which bytes / 16 can be added. Boxes of 64 columns are kBox apart, which is
// read where the width is not what is summed over; 8 rows follow after 1024 bytes.
__device__ __forceinline__ u32 operand_at(u32 address) { return (address & 0x3ffff) >> 4 | (kBox >> 4) << 16; }
__device__ __forceinline__ u64 operand(u32 lower) { return (u64)lower | (u64)(1024 >> 4) << 32 | 1ull << 62; }

#if IN_FP16
#define IN_TYPE "f16"
#else
#define IN_TYPE "bf16"
#endif
#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define P10(tens) "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define P32 P10() P10(1) P10(2) "%30, %31"
#define P64 P10() P10(1) P10(2) P10(3) P10(4) P10(5) "%60, %61, %62, %63"
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define WGMMA(n, accumulators, ab, flag, majors)                                                                             \
    "{\n.reg .pred keep;\nsetp.ne.b32 keep, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" STRING(n) "k16.f32." IN_TYPE "." \
    IN_TYPE " {" accumulators "}, " ab ", keep, 1, 1" majors ";\n}\n"

// d = q k^T over 16 of the width, plus d when `keep`: 64 queries by 64 keys.
__device__ __forceinline__ void multiply_qk(float (&d)[32], u64 q, u64 k, int keep) {
    asm volatile(WGMMA(64, P32, "%32, %33", "%34", ", 0, 0") : D32(0) : "l"(q), "l"(k), "r"(keep));
}
// d = p v over 16 keys, plus d when `keep`: 64 queries by WIDTH. Values lie with the width contiguous.
__device__ __forceinline__ void multiply_pv(float (&d)[kOut], const u32* p, u64 v, int keep) {
#if WIDTH == 128
    asm volatile(WGMMA(128, P64, "{%64, %65, %66, %67}, %68", "%69", ", 1")
                 : D32(0), D32(32) : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(keep));
#else
    asm volatile(WGMMA(64, P32, "{%32, %33, %34, %35}, %36", "%37", ", 1")
                 : D32(0) : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(keep));
#endif
}
// Keeps the compiler from moving uses of registers across the asynchronous instructions around this point.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(u32 (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i])::"memory");
}
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Conversions between number formats. Every one rounds to nearest, ties to even, once.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

enum Format { kFp32 = 0, kBf16 = 1, kFp16 = 2 };  // as the host writes them in macros

__device__ __forceinline__ float from_bf16(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float from_fp16(u32 x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)x));
    return f;
}
__device__ __forceinline__ u32 to_fp16(float x) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
__device__ __forceinline__ u32 to_bf16(float x) {
    unsigned short h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

// Two values in one word, `low` in its lower half. Format is kBf16 or kFp16.
template <int FORMAT>
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    if constexpr (FORMAT == kFp16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// The value that x is in FORMAT.
template <int FORMAT>
__device__ __forceinline__ float round_to(float x) {
    if constexpr (FORMAT == kFp16) {
        float r;
        asm("{\n.reg .f16 h;\ncvt.rn.f16.f32 h, %1;\ncvt.f32.f16 %0, h;\n}\n" : "=f"(r) : "f"(x));
        return r;
    } else if constexpr (FORMAT == kBf16) {
        return from_bf16(pack<kBf16>(x, x));  // four times as fast as the conversion of one
    } else {
        return x;
    }
}

// A node of the contract's tree: left + right, one fp32 addition, rounded once to the node format.
template <int NODE>
__device__ __forceinline__ float add_node(float left, float right) { return round_to<NODE>(__fadd_rn(left, right)); }

// Vectors of 64 bytes, with AVX512-VNNI.
#pragma once

#include <immintrin.h>

#include "vnni.h"

namespace sqap {
namespace {

struct Avx512 {
    using Vector = __m512i;
    using Reals = __m512;
    static constexpr int64_t BYTES = 64, TOKENS = 14;  // 28 sums and 2 weights of 32 registers

    static constexpr bool SIXTEEN_ROWS = true;

    // The first four 32-bit words of sixteen rows, turned into columns. Rows 0, 4, 8 and 12 are read into the four
    // lanes of one register, and so on: what is left is a 4 x 4 transpose in each lane.
    static void columns(const uint8_t* rows, int64_t row_bytes, Vector (&to)[4]) {
        const auto lane = [&](int r) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + r * row_bytes));
        };
        Vector lanes[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            lanes[i] = _mm512_inserti32x4(_mm512_castsi128_si512(lane(i)), lane(4 + i), 1);
            lanes[i] = _mm512_inserti32x4(_mm512_inserti32x4(lanes[i], lane(8 + i), 2), lane(12 + i), 3);
        }
        const Vector a = _mm512_unpacklo_epi32(lanes[0], lanes[1]), b = _mm512_unpacklo_epi32(lanes[2], lanes[3]),
                     c = _mm512_unpackhi_epi32(lanes[0], lanes[1]), d = _mm512_unpackhi_epi32(lanes[2], lanes[3]);
        to[0] = _mm512_unpacklo_epi64(a, b);
        to[1] = _mm512_unpackhi_epi64(a, b);
        to[2] = _mm512_unpacklo_epi64(c, d);
        to[3] = _mm512_unpackhi_epi64(c, d);
    }

    static Vector spread(int32_t value) { return _mm512_set1_epi32(value); }
    static Vector zero() { return _mm512_setzero_si512(); }
    static Vector load(const void* at) { return _mm512_loadu_si512(at); }
    static void store(void* at, Vector v) { _mm512_storeu_si512(at, v); }
    static Vector dot(Vector sum, Vector w, Vector x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Vector low_halves(Vector v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static Vector high_halves(Vector v) { return low_halves(_mm512_srli_epi16(v, 4)); }
    static Vector flip(Vector v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
    static Reals no_reals() { return _mm512_setzero_ps(); }
    static Reals add_scaled(Reals sum, Vector v, const float* a, const float* b) {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), _mm512_mul_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b)), sum);
    }
    static void add_scaled(float* to, Vector v, float a, const float* b) {
        const Reals scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_loadu_ps(b));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(scaled, _mm512_set1_ps(a), _mm512_loadu_ps(to)));
    }
    static float total(Reals v) { return _mm512_reduce_add_ps(v); }
    static int32_t total(Vector v) { return _mm512_reduce_add_epi32(v); }

    // In assembly, since GCC would broadcast into a register that it has not, and spill the sums.
    static void add_products(Vector& s0, Vector& s1, Vector w0, Vector w1, const int8_t* four) {
        const auto& word = *reinterpret_cast<const int32_t(*)[1]>(four);
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(s0) : "v"(w0), "m"(word));
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(s1) : "v"(w1), "m"(word));
    }
};

inline bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

}  // namespace
}  // namespace sqap

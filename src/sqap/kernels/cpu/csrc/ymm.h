// Vectors of 32 bytes, as AVX2 and AVX-VNNI have them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sqap {
namespace {

struct Ymm {
    using Vector = __m256i;
    using Reals = __m256;
    static constexpr int64_t BYTES = 32;

    static Vector spread(int32_t value) { return _mm256_set1_epi32(value); }
    static Vector zero() { return _mm256_setzero_si256(); }
    static Vector load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
    static void store(void* at, Vector v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }
    static Vector low_halves(Vector v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static Vector high_halves(Vector v) { return low_halves(_mm256_srli_epi16(v, 4)); }
    static Vector flip(Vector v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }

    static Reals no_reals() { return _mm256_setzero_ps(); }
    static Reals add_scaled(Reals sum, Vector v, const float* a, const float* b) {
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), _mm256_mul_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b)), sum);
    }
    static void add_scaled(float* to, Vector v, float a, const float* b) {
        const Reals scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_loadu_ps(b));
        _mm256_storeu_ps(to, _mm256_fmadd_ps(scaled, _mm256_set1_ps(a), _mm256_loadu_ps(to)));
    }
    static float total(Reals v) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
    }

    static int32_t total(Vector v) {
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        return _mm_cvtsi128_si32(four);
    }
};

}  // namespace
}  // namespace sqap

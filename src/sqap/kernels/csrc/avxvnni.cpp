#include <cpuid.h>
#include <immintrin.h>

#include "vnni.h"

namespace sqap {
namespace {

struct Avx {
    using Vector = __m256i;
    static constexpr int64_t BYTES = 32, TOKENS = 6;  // 12 sums, 2 weights and an activation of 16 registers

    static Vector zero() { return _mm256_setzero_si256(); }
    static Vector load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
    static void store(void* at, Vector v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }
    static Vector dot(Vector sum, Vector w, Vector x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
    static Vector low_halves(Vector v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static Vector high_halves(Vector v) { return low_halves(_mm256_srli_epi16(v, 4)); }
    static Vector flip(Vector v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }

    static int32_t total(Vector v) {
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        return _mm_cvtsi128_si32(four);
    }

    static void add_products(Vector& s0, Vector& s1, Vector w0, Vector w1, const int8_t* four) {
        int32_t word;
        std::memcpy(&word, four, 4);
        const Vector x = _mm256_set1_epi32(word);
        s0 = dot(s0, w0, x);
        s1 = dot(s1, w1, x);
    }
};

bool has_avxvnni() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool runs_here() {
    static const bool found = has_avxvnni();  // in a virtual machine, to ask takes as long as a small product
    return found;
}

}  // namespace

const Path avxvnni = {"avxvnni", runs_here, quantize, linear<Vnni<Avx>>, matmul<Vnni<Avx>>};

}  // namespace sqap

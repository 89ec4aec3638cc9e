// AVX2 multiplies unsigned bytes by signed ones and adds neighbours in 16 bits, which saturate: safe for weights of
// four bits, whose sums of eight products stay below 2^15. Eight-bit weights are multiplied four bits at a time.

#include "layer.h"
#include "ymm.h"

namespace sqap {
namespace {

struct Avx2 : Ymm, ByQuads {
    static constexpr int64_t MR = 4, NR = 16;
    static constexpr bool UNSIGNED = true, FOUR_BITS_ONLY = true, SCALED_ROWS = true, SCALED_TILES = true;
    static constexpr int64_t SAFE = 8;  // 8 * 2 * 15 * 128 < 2^15

    // In assembly, since GCC would add into another register and move it back, and spill the sums for want of them.
    static void add(__m256i& sums, __m256i products) { asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(products)); }

    // Sums of up to SAFE quads, in 16 bits.
    __attribute__((always_inline)) static inline void add_quads(const uint8_t* panel, const int8_t* a, int64_t quads,
                                                                __m256i (&sums)[MR][2]) {
#pragma GCC unroll 4
        for (int i = 0; i < MR; i++) sums[i][0] = sums[i][1] = zero();
        for (int64_t j = 0; j < quads; j++) {
            const __m256i w0 = load(panel + j * NR * 4), w1 = load(panel + j * NR * 4 + 32);
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) {
                int32_t four;
                std::memcpy(&four, a + (j * MR + i) * 4, 4);
                const __m256i x = _mm256_set1_epi32(four);
                add(sums[i][0], _mm256_maddubs_epi16(w0, x));
                add(sums[i][1], _mm256_maddubs_epi16(w1, x));
            }
        }
    }

    static void tile(const uint8_t* panel, const int8_t* a, int64_t quads, int32_t* acc) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int64_t q = 0; q < quads; q += SAFE) {
            __m256i sums[MR][2];
            add_quads(panel + q * NR * 4, a + q * MR * 4, least(SAFE, quads - q), sums);
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) {
                int32_t* to = acc + i * NR;
                store(to, _mm256_add_epi32(load(to), _mm256_madd_epi16(sums[i][0], ones)));
                store(to + 8, _mm256_add_epi32(load(to + 8), _mm256_madd_epi16(sums[i][1], ones)));
            }
        }
    }

    static void tile_scaled(const uint8_t* panel, const int8_t* a, int64_t quads, const int32_t* offsets,
                            const float* tokens, const float* channels, float* totals) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int64_t q = 0; q < quads; q += SAFE) {
            __m256i sums[MR][2];
            add_quads(panel + q * NR * 4, a + q * MR * 4, least(SAFE, quads - q), sums);
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) {
                const __m256i offset = _mm256_set1_epi32(q == 0 ? offsets[i] : 0);
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(sums[i][h], ones), offset);
                    add_scaled(totals + i * NR + h * 8, sum, tokens[i], channels + h * 8);
                }
            }
        }
    }

    static int32_t dot4(const uint8_t* row, const int8_t* even, const int8_t* odd, int64_t bytes) {
        __m256i sums = _mm256_setzero_si256();
        each_block<32>(row, bytes, [&](const uint8_t* at, int64_t j) {
            const __m256i block = load(at);
            const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low_halves(block), load(even + j)),
                                                   _mm256_maddubs_epi16(high_halves(block), load(odd + j)));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        });
        return total(sums);
    }

    static __m256i dot(__m256i sum, __m256i w, __m256i x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    }

    static float dot4_scaled(const ScaledRow& r) { return sqap::dot4_scaled<Avx2>(r); }

    static int32_t dot8(const uint8_t* row, const int8_t* q, int64_t bytes) {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i low = _mm256_setzero_si256(), high = low;
        each_block<32>(row, bytes, [&](const uint8_t* at, int64_t j) {
            const __m256i w = flip(load(at)), x = load(q + j);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_maddubs_epi16(low_halves(w), x), ones));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_maddubs_epi16(high_halves(w), x), ones));
        });
        return total(low) + 16 * total(high);
    }
};

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const Path avx2 = {"avx2", runs_here, quantize, linear<Avx2>, matmul<Avx2>, layer<Avx2>, look<Avx2>, pack<Avx2>};

}  // namespace sqap

// VNNI: vpdpbusd multiplies four unsigned bytes by four signed ones and adds them to 32 bits, in one instruction.
// The same code for vectors of 32 bytes (AVX-VNNI) and of 64 (AVX512-VNNI); `V` says how.
#pragma once

#include "layer.h"

namespace sqap {
namespace {

template <class V>
struct Vnni : ByQuads {
    using Vector = typename V::Vector;
    static constexpr int64_t MR = V::TOKENS, WIDTH = V::BYTES / 4, NR = 2 * WIDTH;
    static constexpr bool UNSIGNED = true, FOUR_BITS_ONLY = false, SCALED_ROWS = true, SCALED_TILES = true;
    static constexpr bool SIXTEEN_ROWS = V::SIXTEEN_ROWS;

    static void columns(const uint8_t* rows, int64_t row_bytes, Vector (&to)[4]) { V::columns(rows, row_bytes, to); }

    __attribute__((always_inline)) static inline void add_quads(const uint8_t* panel, const int8_t* a, int64_t quads,
                                                                Vector (&sums)[MR][2]) {
        for (int64_t q = 0; q < quads; q++) {
            const Vector w0 = V::load(panel + q * NR * 4), w1 = V::load(panel + q * NR * 4 + V::BYTES);
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) V::add_products(sums[i][0], sums[i][1], w0, w1, a + (q * MR + i) * 4);
        }
    }

    static void tile(const uint8_t* panel, const int8_t* a, int64_t quads, int32_t* acc) {
        Vector sums[MR][2];
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            sums[i][0] = V::load(acc + i * NR);
            sums[i][1] = V::load(acc + i * NR + WIDTH);
        }
        add_quads(panel, a, quads, sums);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            V::store(acc + i * NR, sums[i][0]);
            V::store(acc + i * NR + WIDTH, sums[i][1]);
        }
    }

    static void tile_scaled(const uint8_t* panel, const int8_t* a, int64_t quads, const int32_t* offsets,
                            const float* tokens, const float* channels, float* totals) {
        Vector sums[MR][2];
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) sums[i][0] = sums[i][1] = V::spread(offsets[i]);
        add_quads(panel, a, quads, sums);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            V::add_scaled(totals + i * NR, sums[i][0], tokens[i], channels);
            V::add_scaled(totals + i * NR + WIDTH, sums[i][1], tokens[i], channels + WIDTH);
        }
    }

    static int32_t dot4(const uint8_t* row, const int8_t* even, const int8_t* odd, int64_t bytes) {
        Vector low = V::zero(), high = V::zero();
        each_block<V::BYTES>(row, bytes, [&](const uint8_t* at, int64_t j) {
            const Vector block = V::load(at);
            low = V::dot(low, V::low_halves(block), V::load(even + j));
            high = V::dot(high, V::high_halves(block), V::load(odd + j));
        });
        return V::total(low) + V::total(high);
    }

    static float dot4_scaled(const ScaledRow& r) { return sqap::dot4_scaled<V>(r); }

    static int32_t dot8(const uint8_t* row, const int8_t* q, int64_t bytes) {
        Vector sums = V::zero();
        each_block<V::BYTES>(row, bytes, [&](const uint8_t* at, int64_t j) {
            sums = V::dot(sums, V::flip(V::load(at)), V::load(q + j));
        });
        return V::total(sums);
    }
};

}  // namespace
}  // namespace sqap

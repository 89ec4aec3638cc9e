// Plain C++, for processors that no other path is for.

#include "layer.h"

namespace sqap {
namespace {

struct Portable : ByQuads {
    static constexpr int64_t MR = 4, NR = 16;
    static constexpr bool UNSIGNED = false, FOUR_BITS_ONLY = false, SCALED_ROWS = false, SCALED_TILES = false;

    static void tile(const uint8_t* panel, const int8_t* a, int64_t quads, int32_t* acc) {
        for (int64_t q = 0; q < quads; q++) {
            const auto* w = reinterpret_cast<const int8_t*>(panel) + q * NR * 4;
            for (int64_t i = 0; i < MR; i++) {
                const int8_t* x = a + (q * MR + i) * 4;
                for (int64_t j = 0; j < NR; j++) {
                    acc[i * NR + j] += w[4 * j] * x[0] + w[4 * j + 1] * x[1] + w[4 * j + 2] * x[2] + w[4 * j + 3] * x[3];
                }
            }
        }
    }

    static int32_t dot4(const uint8_t* row, const int8_t* even, const int8_t* odd, int64_t bytes) {
        int32_t sum = 0;
        for (int64_t j = 0; j < bytes; j++) sum += (row[j] & 15) * even[j] + (row[j] >> 4) * odd[j];
        return sum;
    }

    static int32_t dot8(const uint8_t* row, const int8_t* q, int64_t bytes) {
        int32_t sum = 0;
        for (int64_t j = 0; j < bytes; j++) sum += (row[j] ^ 128) * q[j];
        return sum;
    }
};

}  // namespace

const Path portable = {"portable", [] { return true; }, quantize, linear<Portable>, matmul<Portable>,
                       layer<Portable>, look<Portable>, pack<Portable>};

}  // namespace sqap

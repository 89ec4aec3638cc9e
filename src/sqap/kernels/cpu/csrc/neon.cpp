// ARM's dot product: four signed bytes by four signed bytes, added to 32 bits, for four channels at a time.

#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "layer.h"

namespace sqap {
namespace {

struct Neon : ByQuads {
    static constexpr int64_t MR = 12, NR = 8;  // 24 sums, 2 weights and 3 activations of 32 registers
    static constexpr bool UNSIGNED = false, FOUR_BITS_ONLY = false, SCALED_ROWS = false, SCALED_TILES = false;

    static void tile(const uint8_t* panel, const int8_t* a, int64_t quads, int32_t* acc) {
        int32x4_t sums[MR][2];
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++) {
            sums[i][0] = vld1q_s32(acc + i * NR);
            sums[i][1] = vld1q_s32(acc + i * NR + 4);
        }
        for (int64_t q = 0; q < quads; q++) {
            const int8_t* w = reinterpret_cast<const int8_t*>(panel) + q * NR * 4;
            const int8x16_t channels[2] = {vld1q_s8(w), vld1q_s8(w + 16)};
#pragma GCC unroll 3
            for (int i = 0; i < MR; i += 4) {
                const int8x16_t x = vld1q_s8(a + (q * MR + i) * 4);
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++) {
                    sums[i][v] = vdotq_laneq_s32(sums[i][v], channels[v], x, 0);
                    sums[i + 1][v] = vdotq_laneq_s32(sums[i + 1][v], channels[v], x, 1);
                    sums[i + 2][v] = vdotq_laneq_s32(sums[i + 2][v], channels[v], x, 2);
                    sums[i + 3][v] = vdotq_laneq_s32(sums[i + 3][v], channels[v], x, 3);
                }
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++) {
            vst1q_s32(acc + i * NR, sums[i][0]);
            vst1q_s32(acc + i * NR + 4, sums[i][1]);
        }
    }

    static int32_t dot4(const uint8_t* row, const int8_t* even, const int8_t* odd, int64_t bytes) {
        int32x4_t sums = vdupq_n_s32(0);
        each_block<16>(row, bytes, [&](const uint8_t* at, int64_t j) {
            const uint8x16_t block = vld1q_u8(at);
            const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(block, vdupq_n_u8(15)));
            const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(block, 4));
            sums = vdotq_s32(vdotq_s32(sums, low, vld1q_s8(even + j)), high, vld1q_s8(odd + j));
        });
        return vaddvq_s32(sums);
    }

    static int32_t dot8(const uint8_t* row, const int8_t* q, int64_t bytes) {
        int32x4_t sums = vdupq_n_s32(0), levels = sums;
        each_block<16>(row, bytes, [&](const uint8_t* at, int64_t j) {
            const int8x16_t x = vld1q_s8(q + j);
            sums = vdotq_s32(sums, vreinterpretq_s8_u8(vld1q_u8(at)), x);
            levels = vdotq_s32(levels, vdupq_n_s8(1), x);
        });
        return vaddvq_s32(sums) + 128 * vaddvq_s32(levels);  // of weights counted from -128
    }
};

bool runs_here() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple processor that runs macOS on ARM
#endif
}

}  // namespace

const Path neon = {"neon", runs_here, quantize, linear<Neon>, matmul<Neon>, layer<Neon>, look<Neon>, pack<Neon>};

}  // namespace sqap

// What this processor can do at most, for gemm.py: c++ -O3 -std=c++17 -pthread gemm_ceilings.cpp -o ceilings
//
//     ceilings PATH THREADS
//
// prints {"peak_gops", "peak_fp32_gflops", "bandwidth_gbs"} as JSON. PATH is one of sqap's kernels; a path without
// dot products of its own has a bandwidth and no peaks. A multiplication and an addition are two operations.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int PEAKS_TRIED = 20, READS_TRIED = 64;

// Operations of a whole loop, so that a measurement lasts some milliseconds.
using Loop = double (*)();

// Makes the compiler believe that a register has changed, at no cost: without it equal sums are computed once.
#if defined(__x86_64__)
#define CHANGED(x) asm volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define CHANGED(x) asm volatile("" : "+w"(x))
#endif

#if defined(__x86_64__)

// The chain of sqap's AVX2 path, in registers: eight products of bytes are added up in 16 bits, then widened to 32.
// The additions count as nothing, since they are what the instruction set takes to add products up.
__attribute__((target("avx2"))) double integers_avx2() {
    constexpr int STEPS = 100000, SUMS = 6, SAFE = 8;
    __m256i w = _mm256_set1_epi8(1), x = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1), wide[SUMS], narrow[SUMS];
#pragma GCC unroll 6
    for (int i = 0; i < SUMS; i++) wide[i] = _mm256_setzero_si256();
    for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 6
        for (int i = 0; i < SUMS; i++) narrow[i] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int j = 0; j < SAFE; j++) {
            CHANGED(w);
#pragma GCC unroll 6
            for (int i = 0; i < SUMS; i++) {
                CHANGED(x);
                narrow[i] = _mm256_add_epi16(narrow[i], _mm256_maddubs_epi16(w, x));
                CHANGED(narrow[i]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < SUMS; i++) wide[i] = _mm256_add_epi32(wide[i], _mm256_madd_epi16(narrow[i], ones));
    }
#pragma GCC unroll 6
    for (int i = 0; i < SUMS; i++) CHANGED(wide[i]);
    return double(STEPS) * SUMS * SAFE * 32 * 2;
}

// One instruction after the other into twelve sums, as many as hide its latency.
#define LOOP(NAME, TARGET, TYPE, ZERO, STEP, PRODUCTS)                                   \
    __attribute__((target(TARGET))) double NAME() {                                      \
        constexpr int STEPS = 1000000, SUMS = 12;                                        \
        TYPE w = ZERO, x = ZERO, sums[SUMS];                                             \
        _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) sums[i] = ZERO;          \
        for (int step = 0; step < STEPS; step++) {                                       \
            CHANGED(w);                                                                  \
            CHANGED(x);                                                                  \
            _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) {                    \
                sums[i] = STEP;                                                          \
                CHANGED(sums[i]);                                                        \
            }                                                                            \
        }                                                                                \
        _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) CHANGED(sums[i]);        \
        return double(STEPS) * SUMS * PRODUCTS * 2;                                      \
    }

LOOP(floats_avx2, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(w, x, sums[i]), 8)
LOOP(floats_avx512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(w, x, sums[i]), 16)
LOOP(integers_avx512vnni, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(),
     _mm512_dpbusd_epi32(sums[i], w, x), 64)
#if defined(__clang__) || __GNUC__ >= 11
LOOP(integers_avxvnni, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), _mm256_dpbusd_avx_epi32(sums[i], w, x), 32)
// AMX's tiles belong to a thread, which configures and releases them; Linux wants to be asked for them, once.
__attribute__((target("amx-tile,amx-int8"))) double integers_amx() {
    struct alignas(64) {
        uint8_t palette = 1, rest[15] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    if (!allowed) return 0;
    constexpr int STEPS = 20000;
    _tile_loadconfig(&config);
    for (int step = 0; step < STEPS; step++) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_release();
    return double(STEPS) * 4 * 16 * 16 * 64 * 2;
}
#else
constexpr Loop integers_avxvnni = nullptr, integers_amx = nullptr;
#endif

#elif defined(__aarch64__)

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
double integers_neon() {
    constexpr int STEPS = 1000000, SUMS = 12;
    int8x16_t w = vdupq_n_s8(1), x = w;
    int32x4_t sums[SUMS];
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) sums[i] = vdupq_n_s32(0);
    for (int step = 0; step < STEPS; step++) {
        CHANGED(w);
        CHANGED(x);
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++) {
            sums[i] = vdotq_s32(sums[i], w, x);
            CHANGED(sums[i]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) CHANGED(sums[i]);
    return double(STEPS) * SUMS * 16 * 2;
}
#pragma GCC pop_options

double floats_neon() {
    constexpr int STEPS = 1000000, SUMS = 12;
    float32x4_t w = vdupq_n_f32(0), x = w, sums[SUMS];
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) sums[i] = w;
    for (int step = 0; step < STEPS; step++) {
        CHANGED(w);
        CHANGED(x);
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++) {
            sums[i] = vfmaq_f32(sums[i], w, x);
            CHANGED(sums[i]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) CHANGED(sums[i]);
    return double(STEPS) * SUMS * 4 * 2;
}

#endif

struct Peaks {
    const char* path;
    Loop integers, floats;
};

const Peaks PEAKS[] = {
#if defined(__x86_64__)
    {"amx", integers_amx, floats_avx512},
    {"avx512vnni", integers_avx512vnni, floats_avx512},
    {"avxvnni", integers_avxvnni, floats_avx2},
    {"avx2", integers_avx2, floats_avx2},
#elif defined(__aarch64__)
    {"neon", integers_neon, floats_neon},
#endif
    {"", nullptr, nullptr},
};

// The most that all threads together did in a second, over a few repetitions that they start at the same time.
double rate(int threads, int repeats, const std::function<double(int)>& work) {
    double best = 0;
    for (int repeat = 0; repeat < repeats; repeat++) {
        std::atomic<int> waiting{threads};
        std::vector<double> done(threads);
        std::vector<std::thread> team;
        std::vector<std::chrono::steady_clock::time_point> begun(threads), ended(threads);
        for (int t = 0; t < threads; t++)
            team.emplace_back([&, t] {
                waiting--;
                while (waiting) {}
                begun[t] = std::chrono::steady_clock::now();
                done[t] = work(t);
                ended[t] = std::chrono::steady_clock::now();
            });
        double total = 0;
        for (int t = 0; t < threads; t++) {
            team[t].join();
            total += done[t];
        }
        const auto first = *std::min_element(begun.begin(), begun.end());
        const auto last = *std::max_element(ended.begin(), ended.end());
        best = std::max(best, total / std::chrono::duration<double>(last - first).count());
    }
    return best;
}

// Every thread reads an array of its own, larger than any cache, a piece at a time: short enough that some pieces
// are read without another job in between.
double read_rate(int threads) {
    constexpr size_t WORDS = size_t(256) << 17, PIECE = WORDS / 16;  // 256 MiB and 16 MiB
    std::vector<std::vector<uint64_t>> arrays(threads, std::vector<uint64_t>(WORDS, 1));
    std::vector<size_t> next(threads, 0);
    std::atomic<uint64_t> sink{0};
    return rate(threads, READS_TRIED, [&](int t) {
        uint64_t sums[8] = {};
        const uint64_t* at = arrays[t].data() + next[t];
        next[t] = (next[t] + PIECE) % WORDS;
        for (size_t i = 0; i < PIECE; i += 8)
            for (int j = 0; j < 8; j++) sums[j] += at[i + j];
        for (uint64_t sum : sums) sink += sum;
        return double(PIECE) * sizeof(uint64_t);
    });
}

void print(const char* name, Loop loop, int threads) {
    if (loop)
        std::printf("\"%s\": %.1f, ", name, rate(threads, PEAKS_TRIED, [&](int) { return loop(); }) / 1e9);
    else
        std::printf("\"%s\": null, ", name);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return std::fprintf(stderr, "usage: ceilings PATH THREADS\n"), 2;
    const int threads = std::atoi(arguments[2]);
    const Peaks* peaks = PEAKS;
    while (*peaks->path && std::strcmp(peaks->path, arguments[1]) != 0) peaks++;
    std::printf("{");
    print("peak_gops", peaks->integers, threads);
    print("peak_fp32_gflops", peaks->floats, threads);
    std::printf("\"bandwidth_gbs\": %.1f}\n", read_rate(threads) / 1e9);
}

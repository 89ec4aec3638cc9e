#include <cpuid.h>

#include "vnni.h"
#include "ymm.h"

namespace sqap {
namespace {

struct Avx : Ymm {
    static constexpr bool SIXTEEN_ROWS = false;
    static constexpr int64_t TOKENS = 6;  // 12 sums, 2 weights and an activation of 16 registers

    static Vector dot(Vector sum, Vector w, Vector x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }

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
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool runs_here() {
    static const bool found = has_avxvnni();  // in a virtual machine, to ask takes as long as a small product
    return found;
}

}  // namespace

const Path avxvnni = {"avxvnni", runs_here, quantize, linear<Vnni<Avx>>, matmul<Vnni<Avx>>, layer<Vnni<Avx>>, look<Vnni<Avx>>, pack<Vnni<Avx>>};

}  // namespace sqap

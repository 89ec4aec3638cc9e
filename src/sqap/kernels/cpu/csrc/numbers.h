// Small functions on integers and floats.
//
// Like everything that a path includes, they are compiled for its processor, in a namespace of its own: no function of
// the standard library may be instantiated beside them, lest the linker keep a copy that other processors cannot run.
#pragma once

#include <cstdint>
#include <cstring>

// Eight 32-bit lanes of two vectors, by number.
#if defined(__clang__)
#define SQAP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
// Comparing two vectors gives one of integers as wide as what they hold, which a mask must be.
#define SQAP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif

namespace sqap {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }
inline int64_t divisor(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// To nearest, ties to even, as torch.round: for magnitudes up to 2^22, in any vector width.
inline float nearest(float x) {
    constexpr float shift = 12582912.0f;
    return (x + shift) - shift;
}

inline float to_float(const float* x) { return *x; }
inline float to_float(const uint16_t* x) {
    const uint32_t bits = static_cast<uint32_t>(*x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void from_float(float value, float* y) { *y = value; }
inline void from_float(float value, uint16_t* y) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    *y = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
}  // namespace sqap

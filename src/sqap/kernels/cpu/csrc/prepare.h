// A token's channels on their way to the grid: a norm, or an activation function and a product with another row; then
// Hadamard matrices.
#pragma once

#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "numbers.h"
#include "path.h"

namespace sqap {
namespace {

// The widest vectors of 32-bit lanes that the path has.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef float Eight __attribute__((vector_size(32)));

inline Bytes to_bytes(Ints x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Bytes>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)  // GCC would take them one by one
    typedef int8_t Four __attribute__((vector_size(32)));
    Four bytes;
    std::memcpy(&bytes, &x, sizeof x);
    bytes = SQAP_SHUFFLE(bytes, bytes, 0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20,
                         24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    Bytes lowest;
    std::memcpy(&lowest, &bytes, sizeof lowest);
    return lowest;
#else
    return __builtin_convertvector(x, Bytes);
#endif
}

inline Floats spread(float x) { return x - Floats{}; }

inline Floats nearest(Floats x) {
    const Floats shift = spread(12582912.0f);
    return (x + shift) - shift;
}

// e^x for x up to 88, within 2e-7 of it: 2^n e^r, with |r| up to ln 2 / 2.
inline Floats exponential(Floats x) {
    x = x < -87.0f ? spread(-87.0f) : x > 88.0f ? spread(88.0f) : x;
    const Floats n = nearest(x * 1.44269504f);
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
    Floats sum = spread(1.9875691500e-4f);
    sum = sum * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    return sum * scale;
}

// Within 2e-7 (Abramowitz and Stegun 7.1.26).
inline Floats error_function(Floats x) {
    const Floats size = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * size);
    Floats sum = t * 1.061405429f - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    const Floats value = 1.0f - sum * t * exponential(-x * x);
    return x < 0.0f ? -value : value;
}

inline Floats activate(Function function, Floats x) {
    switch (function) {
        case Function::silu: return x / (1.0f + exponential(-x));
        case Function::gelu: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
        case Function::gelu_tanh: return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
        default: return x;
    }
}

inline Floats load_floats(const float* x) {
    Floats v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

inline Floats load_floats(const uint16_t* x) {
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = to_float(x + i);
    return v;
}

// The function of x, times what there is to multiply it by.
template <Function F, class T>
void apply(const T* x, const T* times, int64_t count, float* to) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        Floats v = activate(F, load_floats(x + j));
        if (times != nullptr) v *= load_floats(times + j);
        std::memcpy(to + j, &v, sizeof v);
    }
    if (j < count) {
        T last[2][LANES] = {};
        std::memcpy(last[0], x + j, (count - j) * sizeof(T));
        if (times != nullptr) std::memcpy(last[1], times + j, (count - j) * sizeof(T));
        float done[LANES];
        apply<F>(last[0], times != nullptr ? last[1] : nullptr, LANES, done);
        std::memcpy(to + j, done, (count - j) * sizeof(float));
    }
}

// Sums and differences of pairs of lanes, as the three smallest of Sylvester's matrices go together.
inline Eight hadamard_of_eight(Eight v) {
    const Eight ones = {1, -1, 1, -1, 1, -1, 1, -1}, twos = {1, 1, -1, -1, 1, 1, -1, -1},
                 fours = {1, 1, 1, 1, -1, -1, -1, -1};
    v = SQAP_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6) + v * ones;
    v = SQAP_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5) + v * twos;
    return SQAP_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3) + v * fours;
}

inline void butterfly(float* a, float* b) {
    Eight x, y;
    std::memcpy(&x, a, sizeof x);
    std::memcpy(&y, b, sizeof y);
    const Eight sum = x + y, difference = x - y;
    std::memcpy(a, &sum, sizeof sum);
    std::memcpy(b, &difference, sizeof difference);
}

// One block times the orthonormal Sylvester-Hadamard matrix of its size, a power of two, in place.
inline void hadamard(float* x, int64_t size) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    if (size < 8) {
        for (int64_t half = 1; half < size; half *= 2) {
            for (int64_t j = 0; j < size; j++) {
                if (j & half) continue;
                const float a = x[j], b = x[j + half];
                x[j] = a + b, x[j + half] = a - b;
            }
        }
        for (int64_t j = 0; j < size; j++) x[j] *= scale;
        return;
    }
    for (int64_t j = 0; j < size; j += 8) {
        Eight v;
        std::memcpy(&v, x + j, sizeof v);
        v = hadamard_of_eight(v) * scale;
        std::memcpy(x + j, &v, sizeof v);
    }
    for (int64_t half = 8; half < size; half *= 2) {
        for (int64_t start = 0; start < size; start += 2 * half) {
            for (int64_t j = start; j < start + half; j += 8) butterfly(x + j, x + j + half);
        }
    }
}

// Sum of the squares of what `center` leaves.
template <class T>
float squares(const T* x, int64_t count, float center) {
    Floats sums = {};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        const Floats v = load_floats(x + j) - center;
        sums += v * v;
    }
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    for (; j < count; j++) sum += (to_float(x + j) - center) * (to_float(x + j) - center);
    return sum;
}

template <class T>
float mean(const T* x, int64_t count) {
    Floats sums = {};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) sums += load_floats(x + j);
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    for (; j < count; j++) sum += to_float(x + j);
    return sum / static_cast<float>(count);
}

template <class T>
void normalize(const Norm& norm, const T* x, int64_t count, float* to) {
    const float center = norm.kind == Norm::layer ? mean(x, count) : 0.0f;
    const float scale = 1.0f / std::sqrt(squares(x, count, center) / static_cast<float>(count) + norm.eps);
    for (int64_t j = 0; j < count; j++) {
        float v = (to_float(x + j) - center) * scale;
        if (norm.weight != nullptr) v *= norm.weight[j];
        to[j] = norm.bias != nullptr ? v + norm.bias[j] : v;
    }
}

template <class T>
void apply(Function function, const T* x, const T* times, int64_t count, float* to) {
    switch (function) {
        case Function::silu: return apply<Function::silu>(x, times, count, to);
        case Function::gelu: return apply<Function::gelu>(x, times, count, to);
        case Function::gelu_tanh: return apply<Function::gelu_tanh>(x, times, count, to);
        default: return apply<Function::none>(x, times, count, to);
    }
}

// Token i as it is to be quantized, (k).
template <class T>
void prepare(const Activations& a, int64_t i, float* to) {
    const T* x = static_cast<const T*>(a.x) + i * a.k;
    const T* times = a.times != nullptr ? static_cast<const T*>(a.times) + i * a.k : nullptr;
    if (a.norm != nullptr) {
        normalize(*a.norm, x, a.k, to);
    } else {
        apply(a.function, x, times, a.k, to);
    }
    if (a.hadamard > 1) {
        for (int64_t j = 0; j < a.k; j += a.hadamard) hadamard(to + j, a.hadamard);
    }
}

}  // namespace
}  // namespace sqap

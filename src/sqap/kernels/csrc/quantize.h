// Activations to levels: `sqap.quantization.grid.quantize_activation`, bit by bit.
#pragma once

#include "numbers.h"
#include "path.h"
#include "threads.h"

namespace sqap {
namespace {

constexpr float TINY = 1.17549435e-38f;

// Smallest and largest of `count` values; NaN if one is.
template <class T>
void extremes(const T* x, int64_t count, float& low, float& high) {
    constexpr int LANES = 16;
    float lows[LANES], highs[LANES], poison = 0;
    for (int i = 0; i < LANES; i++) lows[i] = highs[i] = to_float(x);
    int64_t j = 0;
    float poisons[LANES] = {};
    for (; j + LANES <= count; j += LANES) {
        for (int i = 0; i < LANES; i++) {
            const float v = to_float(x + j + i);
            lows[i] = v < lows[i] ? v : lows[i];
            highs[i] = v > highs[i] ? v : highs[i];
            poisons[i] += v * 0.0f;
        }
    }
    for (; j < count; j++) {
        const float v = to_float(x + j);
        lows[0] = v < lows[0] ? v : lows[0];
        highs[0] = v > highs[0] ? v : highs[0];
        poisons[0] += v * 0.0f;
    }
    low = lows[0], high = highs[0];
    for (int i = 0; i < LANES; i++) {
        low = lows[i] < low ? lows[i] : low;
        high = highs[i] > high ? highs[i] : high;
        poison += poisons[i];
    }
    low += poison, high += poison;
}

struct Grid {
    float scale;
    int32_t zero_point;
};

inline Grid make_grid(float low, float high, int bits, bool symmetric) {
    const float most = static_cast<float>(1 << (bits - 1));
    if (symmetric) {
        const float magnitude = high > -low ? high : -low;
        float scale = magnitude / (bits == 4 ? most : most - 1);
        scale = scale < TINY ? TINY : scale;
        return {bits == 4 && high > -low ? -scale : scale, 0};
    }
    const float steps = 2 * most - 1;
    const float bottom = low > 0 ? 0 : low, top = high < 0 ? 0 : high;
    float scale = top / steps - bottom / steps;
    scale = scale < TINY ? TINY : scale;
    const float ratio = bottom / scale;  // of -255 to 0, or no number at all
    return {scale, ratio == ratio ? static_cast<int32_t>(-most - nearest(ratio)) : 0};
}

template <class T>
void round_levels(const T* x, int64_t count, const Grid& grid, int bits, bool symmetric, int8_t* q) {
    const float most = static_cast<float>(1 << (bits - 1));
    const float low = symmetric && bits == 8 ? 1 - most : -most, high = most - 1;
    const float shift = static_cast<float>(grid.zero_point);
    for (int64_t j = 0; j < count; j++) {
        float v = to_float(x + j) / grid.scale;
        // A limit beyond the grid keeps what is not finite from overflowing below.
        v = v < -512.0f ? -512.0f : v > 512.0f ? 512.0f : v == v ? v : 0.0f;
        v = nearest(v) + shift;
        v = v < low ? low : v > high ? high : v;
        q[j] = static_cast<int8_t>(static_cast<int32_t>(v));
    }
}

// Levels of a range of tokens; with one scale for the tensor, on the grid given.
template <class T>
void quantize_rows(const Activations& a, const Levels& levels, int64_t first, int64_t last, const Grid* whole) {
    const T* x = static_cast<const T*>(a.x);
    const int64_t groups = a.groups(), size = a.k / groups;
    for (int64_t i = first * groups; i < last * groups; i++) {
        Grid grid;
        if (whole != nullptr) {
            grid = *whole;
        } else {
            float low, high;
            extremes(x + i * size, size, low, high);
            grid = make_grid(low, high, a.bits, a.symmetric);
        }
        round_levels(x + i * size, size, grid, a.bits, a.symmetric, levels.q + i * size);
        levels.scale[i] = grid.scale;
        if (levels.zero_point != nullptr) levels.zero_point[i] = grid.zero_point;
    }
}

template <class T>
void quantize_as(const Activations& a, const Levels& levels) {
    if (a.m == 0 || a.k == 0) return;
    Grid grid, *whole = nullptr;
    if (a.group == 0) {
        float low, high;
        extremes(static_cast<const T*>(a.x), a.m * a.k, low, high);
        grid = make_grid(low, high, a.bits, a.symmetric);
        whole = &grid;
    }
    const int64_t step = 1 + (a.m - 1) / (4 * threads());
    parallel((a.m + step - 1) / step, [&](int64_t task) {
        quantize_rows<T>(a, levels, task * step, least(a.m, (task + 1) * step), whole);
    });
}

inline void quantize(const Activations& a, const Levels& levels) {
    a.dtype == Dtype::f32 ? quantize_as<float>(a, levels) : quantize_as<uint16_t>(a, levels);
}

}  // namespace
}  // namespace sqap

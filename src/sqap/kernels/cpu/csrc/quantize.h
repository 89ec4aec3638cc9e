// Activations to levels: `sqap.quantization.grid.quantize_activation`, bit by bit.
#pragma once

#include "numbers.h"
#include "memory.h"
#include "path.h"
#include "prepare.h"
#include "threads.h"

namespace sqap {
namespace {

constexpr float TINY = 1.17549435e-38f;

// Smallest and largest of `count` values; NaN if one is not finite.
template <class T>
void extremes(const T* x, int64_t count, float& low, float& high) {
    Floats lows = spread(to_float(x)), highs = lows, poisons = {};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        const Floats v = load_floats(x + j);
        lows = v < lows ? v : lows;
        highs = v > highs ? v : highs;
        poisons += v * 0.0f;
    }
    float poison = 0;
    low = highs[0], high = lows[0];
    for (int i = 0; i < LANES; i++) {
        low = lows[i] < low ? lows[i] : low;
        high = highs[i] > high ? highs[i] : high;
        poison += poisons[i];
    }
    for (; j < count; j++) {
        const float v = to_float(x + j);
        low = v < low ? v : low;
        high = v > high ? v : high;
        poison += v * 0.0f;
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
    const float most = static_cast<float>(1 << (bits - 1)), scale = grid.scale;
    const float shift = static_cast<float>(grid.zero_point);
    // The grid's ends are whole numbers: cut before it is rounded, a value rounds to the same.
    const float low = (symmetric && bits == 8 ? 1 - most : -most) - shift, high = most - 1 - shift;
    const Floats lows = spread(low), highs = spread(high);
    const auto round = [=](Floats v) {
        v /= scale;
        v = v < highs ? v : highs;  // what is no number, too
        return nearest(v > lows ? v : lows) + shift;
    };
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        const Bytes levels = to_bytes(__builtin_convertvector(round(load_floats(x + j)), Ints));
        std::memcpy(q + j, &levels, sizeof levels);
    }
    for (; j < count; j++) q[j] = static_cast<int8_t>(round(spread(to_float(x + j)))[0]);
}

// Levels of token i, (k), with a scale for every group; with one scale for the tensor, on the grid given.
template <class T>
void quantize_token(const Activations& a, const T* x, int64_t i, const Levels& levels, const Grid* whole) {
    const int64_t groups = a.groups(), size = a.k / groups;
    for (int64_t g = 0; g < groups; g++) {
        Grid grid;
        if (whole != nullptr) {
            grid = *whole;
        } else {
            float low, high;
            extremes(x + g * size, size, low, high);
            grid = make_grid(low, high, a.bits, a.symmetric);
        }
        const int64_t at = i * groups + g;
        round_levels(x + g * size, size, grid, a.bits, a.symmetric, levels.q + at * size);
        levels.scale[at] = grid.scale;
        if (levels.zero_point != nullptr) levels.zero_point[at] = grid.zero_point;
    }
}

// Calls body(i) for every token, in a few tasks for each thread.
template <class Body>
void each_token(int64_t m, Body body) {
    const int64_t step = 1 + (m - 1) / (4 * threads());
    parallel((m + step - 1) / step, [&](int64_t task) {
        for (int64_t i = task * step; i < least(m, (task + 1) * step); i++) body(i);
    });
}

template <class T>
void quantize_as(const Activations& a, const Levels& levels) {
    if (a.m == 0 || a.k == 0) return;
    const T* x = static_cast<const T*>(a.x);
    if (a.ready()) {
        Grid grid;
        if (a.group == 0) {
            float low, high;
            extremes(x, a.m * a.k, low, high);
            grid = make_grid(low, high, a.bits, a.symmetric);
        }
        const Grid* whole = a.group == 0 ? &grid : nullptr;
        each_token(a.m, [&](int64_t i) { quantize_token(a, x + i * a.k, i, levels, whole); });
    } else if (a.group != 0) {
        each_token(a.m, [&](int64_t i) {
            auto* row = buffer<float>(Slot::row, a.k);
            prepare<T>(a, i, row);
            quantize_token(a, row, i, levels, nullptr);
        });
    } else {  // the scale is known when the last token is
        auto* rows = buffer<float>(Slot::rows, a.m * a.k);
        each_token(a.m, [&](int64_t i) { prepare<T>(a, i, rows + i * a.k); });
        quantize_as<float>({rows, Dtype::f32, a.m, a.k, a.bits, a.symmetric, a.group}, levels);
    }
}

inline void quantize(const Activations& a, const Levels& levels) {
    a.dtype == Dtype::f32 ? quantize_as<float>(a, levels) : quantize_as<uint16_t>(a, levels);
}

}  // namespace
}  // namespace sqap

// The quantized linear: quantize activations, multiply integers, dequantize the sums, apply the epilogue.
//
//   y = residual + gain * (scale_token * scale_channel * (sum - zero_point * sum of the weight's levels) + bias)
//
// Three loops, by shape:
//   linear_many         more than FEW tokens: panels of unpacked weights, see products.h
//   linear_few          up to FEW tokens, no groups: a dot product per row and token, weights read once
//   linear_few_scaled   up to FEW tokens, groups of whole words: the same with scales per group
#pragma once

#include <type_traits>

#include "memory.h"
#include "numbers.h"
#include "path.h"
#include "products.h"
#include "quantize.h"
#include "threads.h"

namespace sqap {
namespace {

constexpr int64_t FEW = 4;    // most tokens for which weights are not unpacked into panels
constexpr int64_t ROWS = 64;  // output channels per task for few tokens

// Sum of one output channel's signed levels over input channels [first, last).
inline int64_t sum_levels(const Weight& w, int64_t row, int64_t first, int64_t last) {
    const uint8_t* data = w.data + row * w.row_bytes();
    int64_t sum = 0;
    for (int64_t j = first; j < last; j++) {
        sum += w.bits == 8 ? static_cast<int8_t>(data[j]) : ((data[j / 2] >> (j % 2 * 4)) & 15) - 8;
    }
    return sum;
}

// Repeats values (m, groups) of groups as values (m, segments) of segments; `segments` is a multiple of `groups`.
template <class T>
const T* for_segments(const T* values, Slot slot, int64_t m, int64_t groups, int64_t segments) {
    if (values == nullptr || groups == segments) return values;
    T* wide = buffer<T>(slot, m * segments);
    for (int64_t i = 0; i < m * groups; i++) {
        for (int64_t s = 0; s < segments / groups; s++) wide[i * (segments / groups) + s] = values[i];
    }
    return wide;
}

// The epilogue of token i and `count` output channels from n0 on: bias, gain, residual, then the output's type.
// Inlined, so that a full panel's count is a compile-time constant.
template <class T>
__attribute__((always_inline)) inline void finish(const Output& out, int64_t n, int64_t i, int64_t n0, int64_t count, float* values) {
    if (out.bias != nullptr) {
        for (int64_t j = 0; j < count; j++) values[j] += out.bias[n0 + j];
    }
    if (out.gain != nullptr) {
        for (int64_t j = 0; j < count; j++) values[j] *= out.gain[n0 + j];
    }
    if (out.residual != nullptr) {
        for (int64_t j = 0; j < count; j++) values[j] += out.residual[i * n + n0 + j];
    }
    T* y = static_cast<T*>(out.y) + i * n + n0;
    for (int64_t j = 0; j < count; j++) from_float(values[j], y + j);
}

// The `Isa` whose tiles are used for weights with scales per group: `Isa` itself unless specialised.
template <class Isa>
struct ForGroups {
    using Type = Isa;
};

// Levels are `packed` already where the product before this one had the same, and weights of the same kind.
template <class Isa, class T>
void linear_many(const Activations& a, const Weight& w, const Output& out, const Levels& levels, bool packed) {
    constexpr int64_t MR = Isa::MR, NR = Isa::NR;
    const int64_t segment = divisor(a.group ? a.group : a.k, w.k / w.groups), segments = w.k / segment;
    if constexpr (!std::is_same_v<Isa, typename ForGroups<Isa>::Type>) {
        if (segments > 1) return linear_many<typename ForGroups<Isa>::Type, T>(a, w, out, levels, packed);
    }
    const float* token_scales = for_segments(levels.scale, Slot::token_scales, a.m, a.groups(), segments);
    const int32_t* zeros = for_segments(levels.zero_point, Slot::token_zeros, a.m, a.groups(), segments);
    const auto fill = [&](int64_t n0, int64_t count, float* to) {
        for (int64_t s = 0; s < segments; s++) {
            for (int64_t j = 0; j < NR; j++) {
                const int64_t row = n0 + least(j, count - 1);
                to[s * NR + j] = w.shared ? *w.scale : w.scale[row * w.groups + s * w.groups / segments];
            }
        }
    };
    Products<Isa> products(levels.q, a.m, w, segment, packed);
    if constexpr (Isa::SCALED_TILES) {
        if (products.takes_scales() && zeros == nullptr) {
            products.run_scaled(token_scales, fill, [&](int64_t n0, int64_t count, float* totals) {
                for (int64_t i = 0; i < a.m; i++) finish<T>(out, w.n, i, n0, count, totals + i * NR);
            });
            return;
        }
    }
    const auto begin = [&](int64_t n0, int64_t count) {
        // The panel's channel scales and sums of levels, both (segments, NR).
        auto* scales = buffer<float>(Slot::panel_scales, segments * NR);
        fill(n0, count, scales);
        auto* sums = zeros != nullptr ? buffer<int32_t>(Slot::panel_sums, segments * NR) : nullptr;
        for (int64_t at = 0; sums != nullptr && at < segments * NR; at++) {
            const int64_t s = at / NR, row = n0 + least(at % NR, count - 1);
            sums[at] = static_cast<int32_t>(sum_levels(w, row, s * segment, (s + 1) * segment));
        }
        auto* totals = buffer<float>(Slot::total, segments > 1 ? (a.m + MR) * NR : 0);
        return [=, &a, &w, &out](int64_t tile, int64_t s, const int32_t* acc) {
            for (int64_t r = 0; r < least(MR, a.m - tile * MR); r++) {
                const int64_t i = tile * MR + r;
                const int32_t* sum = acc + r * NR;
                const float* channel = scales + s * NR;
                const float token = token_scales[i * segments + s];
                float values[NR];
                if (zeros == nullptr) {
                    for (int64_t j = 0; j < NR; j++) values[j] = static_cast<float>(sum[j]) * token * channel[j];
                } else {
                    const int32_t zero = zeros[i * segments + s];
                    for (int64_t j = 0; j < NR; j++) {
                        values[j] = static_cast<float>(sum[j] - zero * sums[s * NR + j]) * token * channel[j];
                    }
                }
                if (segments > 1) {
                    float* total = totals + i * NR;
                    if (s == 0) {
                        std::memcpy(total, values, sizeof values);
                        continue;
                    }
                    for (int64_t j = 0; j < NR; j++) values[j] += total[j];
                    if (s + 1 < segments) {
                        std::memcpy(total, values, sizeof values);
                        continue;
                    }
                }
                if (count == NR) {
                    finish<T>(out, w.n, i, n0, NR, values);
                } else {
                    finish<T>(out, w.n, i, n0, count, values);
                }
            }
        };
    };
    products.run(begin);
}

// Calls body(block, j) for every `WIDTH` bytes of a row, j their offset; the last block is padded with zeros.
template <int64_t WIDTH, class Body>
void each_block(const uint8_t* row, int64_t bytes, Body body) {
    int64_t j = 0;
    for (; j + WIDTH <= bytes; j += WIDTH) body(row + j, j);
    if (j < bytes) {
        uint8_t rest[WIDTH] = {};
        std::memcpy(rest, row + j, bytes - j);
        body(rest, j);
    }
}

// The operands of one dot product: a row of 4-bit weights and a token, each with a scale per 32-bit word (8 channels).
struct ScaledRow {
    const uint8_t* row;
    const int8_t *even, *odd;  // the token's levels of even and of odd channels
    int64_t bytes;             // of the row
    const int32_t* offsets;    // minus 8 times the token's sum of levels, per word: weights are stored as q + 8
    const float *token, *channel;
};

// The dot product: each lane scales its words' sums to float32; lanes are summed once at the end.
template <class V>
float dot4_scaled(const ScaledRow& r) {
    typename V::Reals sum = V::no_reals();
    each_block<V::BYTES>(r.row, r.bytes, [&](const uint8_t* at, int64_t j) {
        const typename V::Vector block = V::load(at);
        typename V::Vector words = V::load(r.offsets + j / 4);
        words = V::dot(words, V::low_halves(block), V::load(r.even + j));
        words = V::dot(words, V::high_halves(block), V::load(r.odd + j));
        sum = V::add_scaled(sum, words, r.token + j / 4, r.channel + j / 4);
    });
    return V::total(sum);
}

// Up to FEW tokens, 4-bit weights, groups of whole words: every row is read once.
template <class Isa, class T>
void linear_few_scaled(const Activations& a, const Weight& w, const Output& out, const Levels& levels) {
    const int64_t bytes = w.row_bytes(), padded = round_up(bytes, 64), words = padded / 4;
    auto* packed = buffer<int8_t>(Slot::packed, 2 * a.m * padded);  // even channels, then odd ones
    auto* offsets = buffer<int32_t>(Slot::sums, a.m * words);
    auto* tokens = buffer<float>(Slot::token_scales, a.m * words);
    std::memset(packed, 0, 2 * a.m * padded);
    std::memset(offsets, 0, a.m * words * sizeof(int32_t));
    std::memset(tokens, 0, a.m * words * sizeof(float));
    for (int64_t i = 0; i < a.m; i++) {
        for (int64_t j = 0; j < a.k; j++) {
            const int8_t q = levels.q[i * a.k + j];
            packed[(2 * i + j % 2) * padded + j / 2] = q;
            offsets[i * words + j / 8] -= 8 * q;
            tokens[i * words + j / 8] = levels.scale[i * a.groups() + j * a.groups() / a.k];
        }
    }
    parallel((w.n + ROWS - 1) / ROWS, [&](int64_t task) {
        auto* channels = buffer<float>(Slot::panel_scales, words);
        const int64_t group = w.k / w.groups / 8;  // in words
        for (int64_t j = w.k / 8; j < words; j++) channels[j] = 0;
        for (int64_t n = task * ROWS; n < least(w.n, (task + 1) * ROWS); n++) {
            for (int64_t g = 0; g < w.groups; g++) {
                const float scale = w.shared ? *w.scale : w.scale[n * w.groups + g];
                float* to = channels + g * group;
                int64_t j = 0;
                for (; j + 4 <= group; j += 4) to[j] = to[j + 1] = to[j + 2] = to[j + 3] = scale;
                for (; j < group; j++) to[j] = scale;
            }
            for (int64_t i = 0; i < a.m; i++) {
                const int8_t* even = packed + 2 * i * padded;
                float value = Isa::dot4_scaled({w.data + n * bytes, even, even + padded, bytes, offsets + i * words,
                                                tokens + i * words, channels});
                finish<T>(out, w.n, i, n, 1, &value);
            }
        }
    });
}

// Up to FEW tokens, no groups: every row is read once.
template <class Isa, class T>
void linear_few(const Activations& a, const Weight& w, const Output& out, const Levels& levels) {
    const int64_t bytes = w.row_bytes(), padded = round_up(bytes, 64);
    const int64_t halves = w.bits == 4 ? 2 : 1;  // even channels, then odd ones
    auto* packed = buffer<int8_t>(Slot::packed, a.m * halves * padded);
    int32_t sums[FEW];
    for (int64_t i = 0; i < a.m; i++) {
        int8_t* to = packed + i * halves * padded;
        std::memset(to, 0, halves * padded);
        sums[i] = 0;
        for (int64_t j = 0; j < a.k; j++) {
            to[j % halves * padded + j / halves] = levels.q[i * a.k + j];
            sums[i] += levels.q[i * a.k + j];
        }
    }
    parallel((w.n + ROWS - 1) / ROWS, [&](int64_t task) {
        for (int64_t n = task * ROWS; n < least(w.n, (task + 1) * ROWS); n++) {
            const uint8_t* row = w.data + n * bytes;
            const int64_t row_sum = levels.zero_point != nullptr ? sum_levels(w, n, 0, w.k) : 0;
            for (int64_t i = 0; i < a.m; i++) {
                const int8_t* q = packed + i * halves * padded;
                int32_t sum = w.bits == 4 ? Isa::dot4(row, q, q + padded, bytes) - 8 * sums[i]
                                          : Isa::dot8(row, q, bytes) - 128 * sums[i];
                if (levels.zero_point != nullptr) sum -= static_cast<int32_t>(levels.zero_point[i] * row_sum);
                float value = static_cast<float>(sum) * levels.scale[i] * w.scale[w.shared ? 0 : n];
                finish<T>(out, w.n, i, n, 1, &value);
            }
        }
    });
}

// Activations on their integer grid, in this thread's buffers.
inline Levels quantized(const Activations& a) {
    const int64_t grids = a.m * a.groups();
    const Levels levels{buffer<int8_t>(Slot::levels, a.m * a.k), buffer<float>(Slot::scales, grids),
                        a.symmetric ? nullptr : buffer<int32_t>(Slot::zero_points, grids)};
    quantize(a, levels);
    return levels;
}

// The linear of activations that are quantized already, and maybe `packed`, too.
template <class Isa>
void multiply(const Activations& a, const Levels& levels, const Weight& w, const Output& out, bool packed = false) {
    if (a.m == 0 || w.n == 0) return;
    if (a.m <= FEW && (a.groups() > 1 || w.groups > 1)) {
        const bool whole_words = w.k / w.groups % 8 == 0 && a.k / a.groups() % 8 == 0;
        if constexpr (Isa::SCALED_ROWS) {
            if (w.bits == 4 && a.symmetric && whole_words) {
                out.dtype == Dtype::f32 ? linear_few_scaled<Isa, float>(a, w, out, levels)
                                        : linear_few_scaled<Isa, uint16_t>(a, w, out, levels);
                return;
            }
        }
    }
    const bool few = a.m <= FEW && a.groups() == 1 && w.groups == 1;
    if (out.dtype == Dtype::f32) {
        few ? linear_few<Isa, float>(a, w, out, levels) : linear_many<Isa, float>(a, w, out, levels, packed);
    } else {
        few ? linear_few<Isa, uint16_t>(a, w, out, levels) : linear_many<Isa, uint16_t>(a, w, out, levels, packed);
    }
}

template <class Isa>
void linear(const Activations& a, const Weight& w, const Output& out) {
    multiply<Isa>(a, quantized(a), w, out);
}

// Exact int32 products y (m, n) of levels q (m, k), for tests.
template <class Isa>
void matmul(const int8_t* q, int64_t m, const Weight& w, int32_t* y) {
    constexpr int64_t MR = Isa::MR, NR = Isa::NR;
    if (m == 0 || w.n == 0) return;
    Products<Isa>(q, m, w, w.k).run([=](int64_t n0, int64_t count) {
        return [=](int64_t tile, int64_t, const int32_t* acc) {
            for (int64_t r = 0; r < least(MR, m - tile * MR); r++) {
                std::memcpy(y + (tile * MR + r) * w.n + n0, acc + r * NR, count * sizeof(int32_t));
            }
        };
    });
}

}  // namespace
}  // namespace sqap

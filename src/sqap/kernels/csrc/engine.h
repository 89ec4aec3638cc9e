// The linear on integers, for any processor: everything but the innermost products, which `Isa` brings.
//
// Weights stay as they are stored. For many tokens, a panel of Isa::NR output channels is unpacked at a time into
// a buffer that fits a cache, in the order in which the products read it, and multiplied with all tokens; for few
// tokens, rows are multiplied as they are read.
//
// Channels go in fours (quads). Of eight 4-bit channels, which fill a 32-bit word, the even ones make the first
// quad and the odd ones the second, so that a mask and a shift unpack them; activations are packed in that order.
//
// Each path includes this file into a translation unit compiled for its processor: no standard library function
// may be instantiated here, lest the linker keep a copy that other processors cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory.h"
#include "path.h"
#include "threads.h"

namespace sqap {
namespace {

constexpr int64_t BLOCK = 1024;  // channels of a panel unpacked at a time
constexpr int64_t FEW = 4;       // tokens up to which rows are multiplied as they are read
constexpr int64_t ROWS = 64;     // rows per task for few tokens
constexpr float TINY = 1.17549435e-38f;

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

inline int64_t sum_levels(const Weight& w, int64_t row, int64_t first, int64_t last) {
    const uint8_t* data = w.data + row * w.row_bytes();
    int64_t sum = 0;
    for (int64_t j = first; j < last; j++) {
        sum += w.bits == 8 ? static_cast<int8_t>(data[j]) : ((data[j / 2] >> (j % 2 * 4)) & 15) - 8;
    }
    return sum;
}

// Eight rows of eight 32-bit words, turned into columns.
typedef uint32_t Words __attribute__((vector_size(32)));

#if defined(__clang__)
#define SQAP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SQAP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

inline void transpose(Words* w) {
    Words pairs[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = SQAP_SHUFFLE(w[i], w[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = SQAP_SHUFFLE(w[i], w[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    Words fours[8];  // words 0, 4 | 1, 5 | 2, 6 | 3, 7 of rows 0 to 3, then of rows 4 to 7
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = SQAP_SHUFFLE(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = SQAP_SHUFFLE(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; i++) {
        w[i] = SQAP_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        w[i + 4] = SQAP_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// The products of levels (m, k) with a weight, one segment of the channels after the other: a segment is as long
// as both keep one scale.
template <class Isa>
class Products {
  public:
    static constexpr int64_t MR = Isa::MR, NR = Isa::NR;

    Products(const int8_t* q, int64_t m, const Weight& weight, int64_t segment)
        : q_(q), m_(m), w_(weight), segment_(segment), padded_(round_up(segment, 8)),
          segments_(weight.k / segment), tiles_((m + MR - 1) / MR),
          packed_(buffer<int8_t>(Slot::packed, tiles_ * MR * segments_ * padded_)),
          sums_(buffer<int32_t>(Slot::sums, tiles_ * MR * segments_)) {
        parallel(tiles_, [&](int64_t tile) { pack(tile); });
    }

    // Calls store(n0, count, segment, acc) for every panel and segment: acc (tokens, NR) holds exact products of
    // `count` output channels from n0 on. A panel's segments come in order, in one thread.
    template <class Store>
    void run(Store store) {
        parallel((w_.n + NR - 1) / NR, [&](int64_t index) {
            const int64_t n0 = index * NR, count = least(NR, w_.n - n0);
            auto* panel = buffer<uint8_t>(Slot::panel, BLOCK * NR);
            auto* acc = buffer<int32_t>(Slot::acc, tiles_ * MR * NR);
            for (int64_t s = 0; s < segments_; s++) {
                multiply(n0, count, s, panel, acc);
                store(n0, count, s, acc);
            }
        });
    }

  private:
    static constexpr int32_t offset(int bits) { return !Isa::UNSIGNED ? 0 : bits == 4 ? 8 : 128; }

    void multiply(int64_t n0, int64_t count, int64_t s, uint8_t* panel, int32_t* acc) {
        // Where 8-bit products do not fit, the upper four bits are multiplied first, and then the lower ones.
        const int planes = w_.bits == 8 && Isa::FOUR_BITS_ONLY ? 2 : 1;
        for (int64_t t = 0; t < tiles_ * MR; t++) {
            const int32_t start = -offset(w_.bits) * sums_[t * segments_ + s];
            // Multiplied by 16 between the planes: sixteen times the start must come back out.
            for (int64_t j = 0; j < NR; j++) acc[t * NR + j] = planes == 1 ? start : start / 16;
        }
        for (int plane = 0; plane < planes; plane++) {
            for (int64_t i = 0; plane == 1 && i < tiles_ * MR * NR; i++) acc[i] *= 16;
            for (int64_t k = 0; k < padded_; k += BLOCK) {
                const int64_t quads = least(BLOCK, padded_ - k) / 4;
                unpack(n0, count, s, k, quads, planes == 1 ? -1 : 4 * (1 - plane), panel);
                for (int64_t t = 0; t < tiles_; t++) {
                    const int8_t* a = packed_ + (t * segments_ + s) * MR * padded_ + k * MR;
                    Isa::tile(panel, a, quads, acc + t * MR * NR);
                }
            }
        }
    }

    // Channels k to k + 4 * quads of segment s, as (quads, NR, 4); `shift` picks four bits of eight, -1 all.
    void unpack(int64_t n0, int64_t count, int64_t s, int64_t k, int64_t quads, int shift, uint8_t* panel) {
        const int64_t width = w_.bits == 4 ? 2 : 4;  // bytes of a quad as stored
        const int64_t bytes = least(quads * width, (segment_ - k) * width / 4);
        const uint8_t* rows = w_.data + n0 * w_.row_bytes() + (s * segment_ + k) * width / 4;
        for (int64_t r = 0; r < NR; r += 8) {
            for (int64_t at = 0; at < quads * width; at += 32) {
                Words words[8] = {};
                if (r + 8 <= count && at + 32 <= bytes) {
                    for (int i = 0; i < 8; i++) std::memcpy(&words[i], rows + (r + i) * w_.row_bytes() + at, 32);
                } else {
                    for (int64_t i = 0; i < least(8, count - r) && at < bytes; i++) {
                        std::memcpy(&words[i], rows + (r + i) * w_.row_bytes() + at, least(32, bytes - at));
                    }
                }
                transpose(words);
                uint8_t* to = panel + (at / width * NR + r) * 4;
                for (int64_t j = 0; j < least(32 / width, quads - at / width); j++) {
                    put(w_.bits == 4 ? words[j / 2] >> (j % 2 * 4) : words[j], shift, to + j * NR * 4);
                }
            }
        }
    }

    // A quad of eight output channels, unpacked but for the bytes beside its own.
    void put(Words quad, int shift, uint8_t* to) const {
        if (w_.bits == 4) {
            quad &= 0x0f0f0f0fu;
            // Minus eight in each byte, without borrowing from its neighbour.
            if (!Isa::UNSIGNED) quad = ((quad | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
        } else if (shift >= 0) {
            quad = (quad ^ 0x80808080u) >> shift & 0x0f0f0f0fu;
        } else if (Isa::UNSIGNED) {
            quad ^= 0x80808080u;
        }
        std::memcpy(to, &quad, 32);
    }

    // A tile of MR tokens as (segments, quads, MR, 4), zeros where there is no token or channel; and their sums.
    void pack(int64_t tile) {
        int8_t* to = packed_ + tile * segments_ * MR * padded_;
        for (int64_t r = 0; r < MR; r++) {
            const int64_t token = tile * MR + r;
            for (int64_t s = 0; s < segments_; s++) {
                const int8_t* from = q_ + token * w_.k + s * segment_;
                const int64_t count = token < m_ ? segment_ : 0;
                int8_t* start = to + s * MR * padded_ + r * 4;
                for (int64_t j = 0; j < padded_; j += 8) {
                    uint64_t eight = 0;
                    if (j < count) std::memcpy(&eight, from + j, least(8, count - j));
                    const uint32_t first = w_.bits == 4 ? every_other(eight) : static_cast<uint32_t>(eight);
                    const uint32_t second = static_cast<uint32_t>(w_.bits == 4 ? every_other(eight >> 8) : eight >> 32);
                    std::memcpy(start + j * MR, &first, 4);
                    std::memcpy(start + (j + 4) * MR, &second, 4);
                }
                int32_t sum = 0;
                for (int64_t j = 0; j < count; j++) sum += from[j];
                sums_[token * segments_ + s] = sum;
            }
        }
    }

    static uint32_t every_other(uint64_t bytes) {
        bytes &= 0x00ff00ff00ff00ffu;
        bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
        return static_cast<uint32_t>(bytes | bytes >> 16);
    }

    const int8_t* q_;
    const int64_t m_;
    const Weight w_;
    const int64_t segment_, padded_, segments_, tiles_;
    int8_t* packed_;
    int32_t* sums_;
};

template <class Isa, class T>
void linear_as(const Activations& a, const Weight& w, const Output& out, const Levels& levels) {
    const int64_t a_size = a.group ? a.group : a.k, w_size = w.k / w.groups;
    const int64_t segment = divisor(a_size, w_size), segments = w.k / segment;
    T* y = static_cast<T*>(out.y);
    Products<Isa> products(levels.q, a.m, w, segment);
    products.run([&](int64_t n0, int64_t count, int64_t s, const int32_t* acc) {
        constexpr int64_t NR = Isa::NR;
        int32_t row_sums[NR];
        float scales[NR];
        for (int64_t j = 0; j < count; j++) {
            scales[j] = w.shared ? *w.scale : w.scale[(n0 + j) * w.groups + s * segment / w_size];
            if (levels.zero_point != nullptr) {
                row_sums[j] = static_cast<int32_t>(sum_levels(w, n0 + j, s * segment, (s + 1) * segment));
            }
        }
        auto* total = buffer<float>(Slot::total, segments > 1 ? a.m * NR : 0);
        for (int64_t i = 0; i < a.m; i++) {
            const int64_t g = i * a.groups() + (a.group ? s * segment / a.group : 0);
            const float scale = levels.scale[g];
            const int32_t zero_point = levels.zero_point != nullptr ? levels.zero_point[g] : 0;
            float values[NR];
            for (int64_t j = 0; j < count; j++) {
                int32_t sum = acc[i * NR + j];
                if (zero_point) sum -= zero_point * row_sums[j];
                values[j] = static_cast<float>(sum) * scale * scales[j];
            }
            if (segments > 1) {
                float* so_far = total + i * NR;
                for (int64_t j = 0; j < count; j++) so_far[j] = (s ? so_far[j] : 0.0f) + values[j];
                if (s + 1 < segments) continue;
                std::memcpy(values, so_far, count * sizeof(float));
            }
            for (int64_t j = 0; j < count; j++) {
                from_float(out.bias != nullptr ? values[j] + out.bias[n0 + j] : values[j], y + i * w.n + n0 + j);
            }
        }
    });
}

// Few tokens and no groups: every row is read once, and multiplied as it is.
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
    T* y = static_cast<T*>(out.y);
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
                if (out.bias != nullptr) value += out.bias[n];
                from_float(value, y + i * w.n + n);
            }
        }
    });
}

template <class Isa>
void linear(const Activations& a, const Weight& w, const Output& out) {
    if (a.m == 0 || w.n == 0) return;
    const int64_t grids = a.m * a.groups();
    const Levels levels{buffer<int8_t>(Slot::levels, a.m * a.k), buffer<float>(Slot::scales, grids),
                        a.symmetric ? nullptr : buffer<int32_t>(Slot::zero_points, grids)};
    quantize(a, levels);
    const bool few = a.m <= FEW && a.groups() == 1 && w.groups == 1;
    if (out.dtype == Dtype::f32) {
        few ? linear_few<Isa, float>(a, w, out, levels) : linear_as<Isa, float>(a, w, out, levels);
    } else {
        few ? linear_few<Isa, uint16_t>(a, w, out, levels) : linear_as<Isa, uint16_t>(a, w, out, levels);
    }
}

template <class Isa>
void matmul(const int8_t* q, int64_t m, const Weight& w, int32_t* y) {
    if (m == 0 || w.n == 0) return;
    Products<Isa>(q, m, w, w.k).run([&](int64_t n0, int64_t count, int64_t, const int32_t* acc) {
        for (int64_t i = 0; i < m; i++) {
            std::memcpy(y + i * w.n + n0, acc + i * Isa::NR, count * sizeof(int32_t));
        }
    });
}

}  // namespace
}  // namespace sqap

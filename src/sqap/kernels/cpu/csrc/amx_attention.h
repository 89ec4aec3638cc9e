// Softmax attention of an encoder with AMX-BF16. Queries, keys, values and weights are rounded to bfloat16; products are
// added up, and the softmax is computed, in 32 bits.
//
// A task packs the keys and values of one head into tiles, and goes through its queries, SIDE at a time:
//
//   1. scores = queries * keys^T, CHUNK_KEYS keys at a time, and each query's largest score
//   2. weights = 2^(score - largest), and their sums, CHUNK_KEYS keys at a time;
//      mixed += weights * values
//   3. each row of mixed is divided by its sum
//
// log2(e) / sqrt(head_dim) is in the queries. All scores of SIDE queries stay in the L2 cache, a chunk of them in L1.
#pragma once

#include "attention.h"
#include "avx512.h"

namespace sqap {
namespace {

constexpr int64_t SIDE = 32;         // rows and columns of four tiles of sums
constexpr int64_t CHUNK_KEYS = 256;  // a multiple of SIDE
constexpr int64_t PAIRS = 16 * 32;   // values of a tile of bfloat16: 16 rows of 32
constexpr int64_t SUMS = 16 * 16;    // values of a tile of sums

// Up to sixteen floats, zeros behind the last one.
inline __m512 some(const float* x, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0), x);
}

// Thirty-two values times a factor as bfloat16, zeros behind the last one.
inline __m512i rounded(const float* x, int64_t count, __m512 factor) {
    const __m512 low = _mm512_mul_ps(some(x, count), factor), high = _mm512_mul_ps(some(x + 16, count - 16), factor);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Each of sixteen values as bfloat16, in the lower half of a word.
inline __m512i rounded_words(__m512 x) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// One head's keys and values in tiles, zeros behind the last key and the last channel.
struct PackedHead {
    int64_t keys, padded;  // padded to a multiple of SIDE
    int64_t dim, width;    // channels, padded to a multiple of SIDE
    uint16_t* key_tiles;   // (padded / 16, width / 32) tiles; a row has two channels of each of sixteen keys
    uint16_t* value_tiles; // (padded / 32, width / 16) tiles; a row has sixteen channels of each of two keys

    const uint16_t* keys_at(int64_t j, int64_t d) const { return key_tiles + (j / 16 * (width / 32) + d / 32) * PAIRS; }
    const uint16_t* values_at(int64_t j, int64_t d) const {
        return value_tiles + (j / 32 * (width / 16) + d / 16) * PAIRS;
    }
};

inline PackedHead pack_head(const Attention& a, int64_t start, int64_t kv, int64_t keys) {
    const int64_t padded = round_up(keys, SIDE), dim = a.head_dim, width = round_up(dim, SIDE);
    const PackedHead head{keys, padded, dim, width, buffer<uint16_t>(Slot::keys, padded * width),
                          buffer<uint16_t>(Slot::values, padded * width)};
    const float *k = a.k + start * a.kv_stride + kv * dim, *v = a.v + start * a.kv_stride + kv * dim;
    uint16_t* to = head.key_tiles;
    for (int64_t j = 0; j < padded; j += 16) {
        for (int64_t d = 0; d < width; d += 32) {
            alignas(64) __m512i rows[16];
            for (int64_t r = 0; r < 16; r++) {
                rows[r] = j + r < keys ? rounded(k + (j + r) * a.kv_stride + d, dim - d, _mm512_set1_ps(1.0f))
                                       : _mm512_setzero_si512();
            }
            for (int64_t four = 0; four < 4; four++, to += 4 * 32) {
                __m512i columns[4];
                Avx512::columns(reinterpret_cast<const uint8_t*>(rows) + 16 * four, 64, columns);
                for (int64_t i = 0; i < 4; i++) _mm512_storeu_si512(to + 32 * i, columns[i]);
            }
        }
    }
    to = head.value_tiles;
    for (int64_t j = 0; j < padded; j += 32) {
        for (int64_t d = 0; d < width; d += 16) {
            for (int64_t r = j; r < j + 32; r += 2, to += 32) {
                const float* row = v + r * a.kv_stride + d;
                const __m512i even = rounded_words(some(row, r < keys ? dim - d : 0));
                const __m512i odd = rounded_words(some(row + a.kv_stride, r + 1 < keys ? dim - d : 0));
                _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
        }
    }
    return head;
}

// GCC does not know that loads of tiles read memory: all that was written must be there.
inline void tiles_written() { asm volatile("" ::: "memory"); }

inline void no_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// scores (keys / 16, SIDE, 16) of queries (SIDE, width) with keys [first, last).
inline void score_tiles(const PackedHead& head, const uint16_t* queries, int64_t first, int64_t last, float* scores) {
    const int64_t width = head.width, row = width * static_cast<int64_t>(sizeof(uint16_t));
    tiles_written();
    for (int64_t j = first; j < last; j += SIDE) {
        no_sums();
        for (int64_t d = 0; d < width; d += 32) {
            _tile_loadd(4, queries + d, row);
            _tile_loadd(5, queries + 16 * width + d, row);
            _tile_loadd(6, head.keys_at(j, d), 64);
            _tile_loadd(7, head.keys_at(j + 16, d), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        float* to = scores + j * SIDE;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + SUMS, 64);
        _tile_stored(2, to + 2 * SUMS, 64);
        _tile_stored(3, to + 3 * SUMS, 64);
    }
}

// The keys behind the last one get a score that makes their weights zero.
inline void hide(const PackedHead& head, float* scores) {
    for (int64_t j = head.keys / 16 * 16; j < head.padded; j += 16) {
        const int64_t seen = head.keys > j ? head.keys - j : 0;
        const auto hidden = static_cast<__mmask16>(0xffff << seen);
        for (int64_t r = 0; r < SIDE; r++) {
            _mm512_mask_storeu_ps(scores + j * SIDE + r * 16, hidden, _mm512_set1_ps(HIDDEN));
        }
    }
}

// 2^x for x up to 0, within 8e-5 of it, which is a fiftieth of what rounding to bfloat16 takes away.
inline __m512 power_of_two(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x less the next whole number below
    __m512 sum = _mm512_set1_ps(0.0780245222f);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.2260671711f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.6958335266f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.9999252208f));
    return _mm512_scalef_ps(sum, x);
}

// For each of SIDE queries, sixteen numbers the largest or the sum of which is the query's.
typedef __m512 Rows[SIDE];

inline void raise(const float* scores, int64_t first, int64_t last, Rows& largest) {
    for (int64_t r = 0; r < SIDE; r++) {
        __m512 most = largest[r];
        for (int64_t j = first; j < last; j += 16) most = _mm512_max_ps(_mm512_loadu_ps(scores + j * SIDE + r * 16), most);
        largest[r] = most;
    }
}

// weights (keys / 32, SIDE, 32) of keys [first, last), and their sums.
inline void weigh(const float* scores, int64_t first, int64_t last, const float* largest, uint16_t* weights, Rows& sums) {
    for (int64_t r = 0; r < SIDE; r++) {
        const __m512 most = _mm512_set1_ps(largest[r]);
        __m512 sum = sums[r];
        for (int64_t j = first; j < last; j += 32) {
            const float* from = scores + j * SIDE + r * 16;
            const __m512 low = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(from), most));
            const __m512 high = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(from + 2 * SUMS), most));
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
            _mm512_storeu_si512(weights + (j - first) * SIDE + r * 32,
                                reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
        sums[r] = sum;
    }
}

// mixed (SIDE, width) += weights times the values of keys [first, last); the first keys' are all there is.
inline void mix_tiles(const PackedHead& head, const uint16_t* weights, int64_t first, int64_t last, float* mixed) {
    const int64_t width = head.width, row = width * static_cast<int64_t>(sizeof(float));
    tiles_written();
    for (int64_t d = 0; d < width; d += 32) {
        float* to = mixed + d;
        if (first == 0) {
            no_sums();
        } else {
            _tile_loadd(0, to, row);
            _tile_loadd(1, to + 16 * width, row);
            _tile_loadd(2, to + 16, row);
            _tile_loadd(3, to + 16 * width + 16, row);
        }
        for (int64_t j = first; j < last; j += 32) {
            _tile_loadd(4, weights + (j - first) * SIDE, 64);
            _tile_loadd(5, weights + (j - first) * SIDE + PAIRS, 64);
            _tile_loadd(6, head.values_at(j, d), 64);
            _tile_loadd(7, head.values_at(j, d + 16), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, row);
        _tile_stored(1, to + 16 * width, row);
        _tile_stored(2, to + 16, row);
        _tile_stored(3, to + 16 * width + 16, row);
    }
}

// Queries from `first` to `last` of one head. The thread's tiles have their shapes.
inline void attend_tiles(const Attention& a, int64_t tokens, int64_t batch, int64_t head, int64_t first, int64_t last) {
    const int64_t start = batch * tokens, dim = a.head_dim;
    const PackedHead packed = pack_head(a, start, head / (a.heads / a.kv_heads), tokens);
    auto* queries = buffer<uint16_t>(Slot::queries, SIDE * packed.width);
    auto* scores = buffer<float>(Slot::weights, SIDE * packed.padded);
    auto* weights = buffer<uint16_t>(Slot::chunk, SIDE * CHUNK_KEYS);
    auto* mixed = buffer<float>(Slot::total, SIDE * packed.width);
    const __m512 factor = _mm512_set1_ps(1.44269504f / std::sqrt(static_cast<float>(dim)));
    for (int64_t i = first; i < last; i += SIDE) {
        const int64_t count = least(SIDE, last - i);
        for (int64_t r = 0; r < SIDE; r++) {
            const float* q = a.q + (start + least(i + r, last - 1)) * a.q_stride + head * dim;
            for (int64_t d = 0; d < packed.width; d += 32) {
                _mm512_storeu_si512(queries + r * packed.width + d, rounded(q + d, dim - d, factor));
            }
        }
        Rows largest, sums;
        for (int64_t r = 0; r < SIDE; r++) largest[r] = _mm512_set1_ps(HIDDEN), sums[r] = _mm512_setzero_ps();
        for (int64_t j = 0; j < packed.padded; j += CHUNK_KEYS) {
            const int64_t end = least(j + CHUNK_KEYS, packed.padded);
            score_tiles(packed, queries, j, end, scores);
            if (end > packed.keys) hide(packed, scores);
            raise(scores, j, end, largest);
        }
        float most[SIDE];
        for (int64_t r = 0; r < SIDE; r++) most[r] = _mm512_reduce_max_ps(largest[r]);
        for (int64_t j = 0; j < packed.padded; j += CHUNK_KEYS) {
            const int64_t end = least(j + CHUNK_KEYS, packed.padded);
            weigh(scores, j, end, most, weights, sums);
            mix_tiles(packed, weights, j, end, mixed);
        }
        for (int64_t r = 0; r < count; r++) {
            const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sums[r]));
            float* to = a.mixed + (start + i + r) * a.heads * dim + head * dim;
            for (int64_t d = 0; d < dim; d += 16) {
                const auto there = static_cast<__mmask16>(dim - d >= 16 ? 0xffff : (1 << (dim - d)) - 1);
                _mm512_mask_storeu_ps(to + d, there, _mm512_mul_ps(_mm512_loadu_ps(mixed + r * packed.width + d), inverse));
            }
        }
    }
}

}  // namespace
}  // namespace sqap

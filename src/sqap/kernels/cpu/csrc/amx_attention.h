// Softmax attention of an encoder, or of an action expert behind a prefix, with AMX-BF16. Products are added up, and the
// softmax is computed, in 32 bits. Of an encoder, queries, keys, values and weights are rounded to bfloat16. Of an expert,
// each is a sum of two numbers of bfloat16 (`Split`), which leaves out a 65,536th, and a product is three:
//
//   (a + a') (b + b') = a b + a b' + a' b
//
// An encoder's task packs the keys and values of one head into tiles, and goes through its queries, SIDE at a time. A
// prefix's are packed before, and a task takes SIDE queries of all heads that share them:
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

// Thirty-two values as bfloat16, and what that leaves out.
struct Split {
    __m512i most, rest;

    Split(__m512 low, __m512 high) : most(join(low, high)) {
        const auto wide = [](__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); };
        rest = join(_mm512_sub_ps(low, wide(_mm512_castsi512_si256(most))),
                    _mm512_sub_ps(high, wide(_mm512_extracti64x4_epi64(most, 1))));
    }

    static __m512i join(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }
};

// One head's keys and values in tiles, zeros behind the last key and the last channel.
struct PackedHead {
    int64_t keys, padded;  // padded to a multiple of SIDE
    int64_t dim, width;    // channels, padded to a multiple of SIDE
    uint16_t* key_tiles;   // (padded / 16, width / 32) tiles; a row has two channels of each of sixteen keys
    uint16_t* value_tiles; // (padded / 32, width / 16) tiles; a row has sixteen channels of each of two keys
    int64_t rest;          // from a tile to what rounding left out of it; 0 where nothing has that

    const uint16_t* keys_at(int64_t j, int64_t d) const { return key_tiles + (j / 16 * (width / 32) + d / 32) * PAIRS; }
    const uint16_t* values_at(int64_t j, int64_t d) const {
        return value_tiles + (j / 32 * (width / 16) + d / 16) * PAIRS;
    }
};

// A key among others, turned already.
inline void put_key(const PackedHead& head, int64_t j, const float* row) {
    const __m512i places = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    for (int64_t d = 0; d < head.dim; d += 32) {
        const Split split(some(row + d, head.dim - d), some(row + d + 16, head.dim - d - 16));
        uint16_t* to = head.key_tiles + (j / 16 * (head.width / 32) + d / 32) * PAIRS + j % 16 * 2;
        _mm512_i32scatter_epi32(to, places, split.most, 4);
        _mm512_i32scatter_epi32(to + head.rest, places, split.rest, 4);
    }
}

inline void put_value(const PackedHead& head, int64_t j, const float* row) {
    for (int64_t d = 0; d < head.dim; d += 16) {
        const __m512 values = some(row + d, head.dim - d), none = _mm512_setzero_ps();
        const Split split(values, none);
        uint16_t* to = head.value_tiles + (j / 32 * (head.width / 16) + d / 16) * PAIRS + j % 32 / 2 * 32;
        for (const __m512i half : {split.most, split.rest}) {
            const __m512i words = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(half));
            _mm512_mask_storeu_epi16(to, j % 2 ? 0xaaaaaaaau : 0x55555555u, j % 2 ? _mm512_slli_epi32(words, 16) : words);
            to += head.rest;
        }
    }
}

// A block of a prefix, with room for the tokens behind it.
inline PackedHead head_of(const Prefix& p, int64_t index) {
    const int64_t padded = round_up(p.length + p.room, SIDE), width = round_up(p.head_dim, SIDE), at = index * p.block();
    return {p.length, padded, p.head_dim, width, reinterpret_cast<uint16_t*>(p.keys + at),
            reinterpret_cast<uint16_t*>(p.values + at), padded * width};
}

inline void pack_prefix_tiles(const float* keys, const float* values, int64_t blocks, const Prefix& p) {
    parallel(blocks, [&](int64_t index) {
        const PackedHead head = head_of(p, index);
        std::memset(head.key_tiles, 0, 2 * head.rest * sizeof(uint16_t));
        std::memset(head.value_tiles, 0, 2 * head.rest * sizeof(uint16_t));
        for (int64_t j = 0; j < p.length; j++) {
            put_key(head, j, keys + (index * p.length + j) * p.head_dim);
            put_value(head, j, values + (index * p.length + j) * p.head_dim);
        }
    });
}

inline PackedHead pack_head(const Attention& a, int64_t start, int64_t kv, int64_t keys) {
    const int64_t padded = round_up(keys, SIDE), dim = a.head_dim, width = round_up(dim, SIDE);
    const PackedHead head{keys, padded, dim, width, buffer<uint16_t>(Slot::keys, padded * width),
                          buffer<uint16_t>(Slot::values, padded * width), 0};
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

// sums += 32 rows, at `row` and `row + down`, `stride` bytes apart, times two tiles, at `tile` and `tile + right`.
__attribute__((always_inline)) inline void load_rows(const uint16_t* row, int64_t down, int64_t stride) {
    _tile_loadd(4, row, stride);
    _tile_loadd(5, row + down, stride);
}

__attribute__((always_inline)) inline void add_tiles(const uint16_t* tile, int64_t right) {
    _tile_loadd(6, tile, 64);
    _tile_loadd(7, tile + right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

// The same of rows and tiles that are split, whose rests are `behind` and `rest` further on.
__attribute__((always_inline)) inline void add_products(const uint16_t* row, int64_t down, int64_t stride, int64_t behind,
                                                        const uint16_t* tile, int64_t right, int64_t rest) {
    load_rows(row, down, stride);
    add_tiles(tile, right);
    if (rest == 0) return;
    add_tiles(tile + rest, right);
    load_rows(row + behind, down, stride);
    add_tiles(tile, right);
}

// scores (keys / 16, SIDE, 16) of queries (SIDE, width) with keys [first, last).
inline void score_tiles(const PackedHead& head, const uint16_t* queries, int64_t first, int64_t last, float* scores) {
    const int64_t width = head.width, row = width * static_cast<int64_t>(sizeof(uint16_t));
    tiles_written();
    for (int64_t j = first; j < last; j += SIDE) {
        no_sums();
        for (int64_t d = 0; d < width; d += 32) {
            add_products(queries + d, 16 * width, row, SIDE * width, head.keys_at(j, d), width / 32 * PAIRS, head.rest);
        }
        float* to = scores + j * SIDE;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + SUMS, 64);
        _tile_stored(2, to + 2 * SUMS, 64);
        _tile_stored(3, to + 3 * SUMS, 64);
    }
}

// Of keys [first, last), those behind the ones that a query has `seen` get a score that makes their weights zero.
inline void hide(const int64_t (&seen)[SIDE], int64_t first, int64_t last, float* scores) {
    for (int64_t r = 0; r < SIDE; r++) {
        for (int64_t j = seen[r] > first ? seen[r] / 16 * 16 : first; j < last; j += 16) {
            const auto hidden = static_cast<__mmask16>(0xffff << (seen[r] > j ? seen[r] - j : 0));
            _mm512_mask_storeu_ps(scores + j * SIDE + r * 16, hidden, _mm512_set1_ps(HIDDEN));
        }
    }
}

// 2^x for x up to 0, within 8e-5 of it, which is a fiftieth of what rounding to bfloat16 takes away; `exact`: within 2e-7.
inline __m512 power_of_two(__m512 x, bool exact) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x less the next whole number below
    if (exact) {
        __m512 sum = _mm512_set1_ps(0.0018774212f);
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.0089896858f));
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.0558260512f));
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.2401537011f));
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.6931530636f));
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.9999999253f));
        return _mm512_scalef_ps(sum, x);
    }
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

// weights (keys / 32, SIDE, 32) of keys [first, last), if they are `split` their rests behind them, and their sums.
__attribute__((always_inline)) inline void weigh(const float* scores, int64_t first, int64_t last, const float* largest,
                                                 bool split, uint16_t* weights, Rows& sums) {
    for (int64_t r = 0; r < SIDE; r++) {
        const __m512 most = _mm512_set1_ps(largest[r]);
        __m512 sum = sums[r];
        for (int64_t j = first; j < last; j += 32) {
            const float* from = scores + j * SIDE + r * 16;
            const __m512 low = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(from), most), split);
            const __m512 high = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(from + 2 * SUMS), most), split);
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
            uint16_t* to = weights + (j - first) * SIDE + r * 32;
            if (split) {
                const Split halves(low, high);
                _mm512_storeu_si512(to, halves.most);
                _mm512_storeu_si512(to + CHUNK_KEYS * SIDE, halves.rest);
            } else {
                _mm512_storeu_si512(to, Split::join(low, high));
            }
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
            add_products(weights + (j - first) * SIDE, PAIRS, 64, CHUNK_KEYS * SIDE, head.values_at(j, d), PAIRS, head.rest);
        }
        _tile_stored(0, to, row);
        _tile_stored(1, to + 16 * width, row);
        _tile_stored(2, to + 16, row);
        _tile_stored(3, to + 16 * width + 16, row);
    }
}

// `count` queries, up to SIDE, each of which sees the first `seen` keys. query(r) gives a query's channels, to(r) says
// where what it mixes goes. The thread's tiles have their shapes.
template <class Query, class To>
void attend_rows(const PackedHead& packed, int64_t count, const int64_t (&seen)[SIDE], Query query, To to) {
    const int64_t dim = packed.dim;
    int64_t fewest = seen[0], keys = seen[0];
    for (const int64_t s : seen) fewest = least(fewest, s), keys = s > keys ? s : keys;
    const int64_t padded = round_up(keys, SIDE);
    const bool split = packed.rest != 0;
    auto* queries = buffer<uint16_t>(Slot::queries, 2 * SIDE * packed.width);
    auto* scores = buffer<float>(Slot::weights, SIDE * padded);
    auto* weights = buffer<uint16_t>(Slot::chunk, 2 * SIDE * CHUNK_KEYS);
    auto* mixed = buffer<float>(Slot::total, SIDE * packed.width);
    const __m512 factor = _mm512_set1_ps(1.44269504f / std::sqrt(static_cast<float>(dim)));
    for (int64_t r = 0; r < SIDE; r++) {
        const float* q = query(least(r, count - 1));
        for (int64_t d = 0; d < packed.width; d += 32) {
            const Split halves(_mm512_mul_ps(some(q + d, dim - d), factor),
                               _mm512_mul_ps(some(q + d + 16, dim - d - 16), factor));
            _mm512_storeu_si512(queries + r * packed.width + d, halves.most);
            if (split) _mm512_storeu_si512(queries + (SIDE + r) * packed.width + d, halves.rest);
        }
    }
    Rows largest, sums;
    for (int64_t r = 0; r < SIDE; r++) largest[r] = _mm512_set1_ps(HIDDEN), sums[r] = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += CHUNK_KEYS) {
        const int64_t end = least(j + CHUNK_KEYS, padded);
        score_tiles(packed, queries, j, end, scores);
        if (end > fewest) hide(seen, j, end, scores);
        raise(scores, j, end, largest);
    }
    float most[SIDE];
    for (int64_t r = 0; r < SIDE; r++) most[r] = _mm512_reduce_max_ps(largest[r]);
    for (int64_t j = 0; j < padded; j += CHUNK_KEYS) {
        const int64_t end = least(j + CHUNK_KEYS, padded);
        split ? weigh(scores, j, end, most, true, weights, sums) : weigh(scores, j, end, most, false, weights, sums);
        mix_tiles(packed, weights, j, end, mixed);
    }
    for (int64_t r = 0; r < count; r++) {
        const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sums[r]));
        float* row = to(r);
        for (int64_t d = 0; d < dim; d += 16) {
            const auto there = static_cast<__mmask16>(dim - d >= 16 ? 0xffff : (1 << (dim - d)) - 1);
            _mm512_mask_storeu_ps(row + d, there, _mm512_mul_ps(_mm512_loadu_ps(mixed + r * packed.width + d), inverse));
        }
    }
}

// Queries from `first` to `last` of one head of an encoder.
inline void attend_tiles(const Attention& a, int64_t tokens, int64_t batch, int64_t head, int64_t first, int64_t last) {
    const int64_t start = batch * tokens, dim = a.head_dim;
    const PackedHead packed = pack_head(a, start, head / (a.heads / a.kv_heads), tokens);
    int64_t seen[SIDE];
    for (int64_t& s : seen) s = tokens;
    for (int64_t i = first; i < last; i += SIDE) {
        attend_rows(
            packed, least(SIDE, last - i), seen,
            [&](int64_t r) { return a.q + (start + i + r) * a.q_stride + head * dim; },
            [&](int64_t r) { return a.mixed + (start + i + r) * a.heads * dim + head * dim; });
    }
}

// The tokens' own keys and values behind the prefix of block `index`, which is a batch's and a key head's.
inline void put_own(const Attention& a, const Tokens& t, int64_t index) {
    const PackedHead head = head_of(*t.prefix, index);
    const int64_t start = index / a.kv_heads * t.tokens, kv = index % a.kv_heads * a.head_dim;
    auto* row = buffer<float>(Slot::row, a.head_dim);
    for (int64_t j = 0; j < t.tokens; j++) {
        turn(t, start + j, a.k + (start + j) * a.kv_stride + kv, a.head_dim, 1.0f, row);
        put_key(head, head.keys + j, row);
        put_value(head, head.keys + j, a.v + (start + j) * a.kv_stride + kv);
    }
}

// Queries from `first` on, up to SIDE, behind the prefix of block `index`. A token's queries of all heads that share its
// keys are adjacent.
inline void attend_behind(const Attention& a, const Tokens& t, int64_t index, int64_t first) {
    const PackedHead packed = head_of(*t.prefix, index);
    const int64_t share = a.heads / a.kv_heads, dim = a.head_dim, own = a.cross ? 0 : t.tokens;
    const int64_t start = index / a.kv_heads * t.tokens, heads = index % a.kv_heads * share;
    const int64_t count = least(SIDE, share * t.tokens - first);
    int64_t seen[SIDE];
    for (int64_t r = 0; r < SIDE; r++) {
        seen[r] = packed.keys + (a.causal ? (first + least(r, count - 1)) / share + 1 : own);
    }
    auto* row = buffer<float>(Slot::row, dim);
    const auto token = [&](int64_t r) { return start + (first + r) / share; };
    const auto head = [&](int64_t r) { return heads + (first + r) % share; };
    attend_rows(
        packed, count, seen,
        [&](int64_t r) {
            turn(t, token(r), a.q + token(r) * a.q_stride + head(r) * dim, dim, 1.0f, row);
            return row;
        },
        [&](int64_t r) { return a.mixed + (token(r) * a.heads + head(r)) * dim; });
}

}  // namespace
}  // namespace sqap

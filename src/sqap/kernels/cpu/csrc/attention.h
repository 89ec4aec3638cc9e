// Softmax attention in 32 bits, a few queries of a head at a time: their scores stay in a cache, and what some queries
// attend to is a by-product.
#pragma once

#if defined(__FMA__)
#include <immintrin.h>
#endif

#include "memory.h"
#include "prepare.h"
#include "threads.h"

namespace sqap {
namespace {

constexpr int64_t QUERIES = LANES == 16 ? 12 : 6;  // at a time: twice as many sums, of 32 registers or of 16
constexpr int64_t TILE = 2 * LANES;                // keys, or channels, at a time
constexpr int64_t CHUNK = 72;                      // queries per task, at least
constexpr float HIDDEN = -1e30f;                   // the score of a key that a query must not see

struct Attention {
    const float *q, *k, *v;  // rows of every token, `q_stride` and `kv_stride` apart, head after head
    int64_t q_stride, kv_stride;
    int64_t heads, kv_heads, head_dim;  // head_dim a multiple of 8
    bool causal, cross;  // cross: no keys of the tokens' own
    float* mixed;       // a row (heads * head_dim) for each query; null where only what rows attend to is wanted
    int64_t first = 0;  // the token whose query comes first in q, and its row in mixed
};

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                    reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<Floats>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                    reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// A query or key turned by its rotary position, times a factor.
inline void turn(const Tokens& t, int64_t token, const float* __restrict x, int64_t head_dim, float factor,
                 float* __restrict to) {
    if (t.cos == nullptr) {
        for (int64_t d = 0; d < head_dim; d++) to[d] = x[d] * factor;
        return;
    }
    const float *cos = t.cos + token * head_dim, *sin = t.sin + token * head_dim;
    const int64_t half = head_dim / 2;
    for (int64_t d = 0; d < half; d++) to[d] = (x[d] * cos[d] - x[d + half] * sin[d]) * factor;
    for (int64_t d = half; d < head_dim; d++) to[d] = (x[d] * cos[d] + x[d - half] * sin[d]) * factor;
}

// Rows (count, head_dim) of keys as tiles (keys / TILE, head_dim, TILE), behind `before` others; zeros behind the last one.
inline void pack_keys(const Attention& a, const Tokens& t, int64_t start, int64_t kv, int64_t count, float* row,
                      float* tiles, int64_t before = 0) {
    for (int64_t j = 0; j < round_up(before + count, TILE) - before; j++) {
        float* to = tiles + (before + j) / TILE * TILE * a.head_dim + (before + j) % TILE;
        if (j < count) {
            turn(t, start + j, a.k + (start + j) * a.kv_stride + kv * a.head_dim, a.head_dim, 1.0f, row);
        } else {
            std::memset(row, 0, a.head_dim * sizeof(float));
        }
        for (int64_t d = 0; d < a.head_dim; d++) to[d * TILE] = row[d];
    }
}

// Rows of values as tiles (head_dim / TILE, rows, TILE), of which the last may be empty in part, behind `before` others.
inline void pack_values(const Attention& a, int64_t start, int64_t kv, int64_t count, float* tiles, int64_t rows,
                        int64_t before = 0) {
    for (int64_t j = 0; j < count; j++) {
        const float* row = a.v + (start + j) * a.kv_stride + kv * a.head_dim;
        for (int64_t d = 0; d < a.head_dim; d += 8) {
            std::memcpy(tiles + (d / TILE * rows + before + j) * TILE + d % TILE, row + d, 8 * sizeof(float));
        }
    }
}

// scores (QUERIES, padded) of queries (QUERIES, head_dim) with `keys` keys, a multiple of TILE.
inline void score(const float* queries, const float* tiles, int64_t head_dim, int64_t padded, int64_t keys,
                  float* scores) {
    for (int64_t j = 0; j < keys; j += TILE) {
        Floats sums[QUERIES][2] = {};
        for (int64_t d = 0; d < head_dim; d++) {
            const float* tile = tiles + j * head_dim + d * TILE;
            const Floats first = load_floats(tile), second = load_floats(tile + LANES);
#pragma GCC unroll 12
            for (int64_t r = 0; r < QUERIES; r++) {
                const Floats q = spread(queries[r * head_dim + d]);
                sums[r][0] = multiply_add(q, first, sums[r][0]);
                sums[r][1] = multiply_add(q, second, sums[r][1]);
            }
        }
#pragma GCC unroll 12
        for (int64_t r = 0; r < QUERIES; r++) {
            store(scores + r * padded + j, sums[r][0]);
            store(scores + r * padded + j + LANES, sums[r][1]);
        }
    }
}

// e^(score - the largest) in place, next to nothing from `visible` on; returns what makes them add up to one.
inline float softmax(float* scores, int64_t visible, int64_t keys) {
    for (int64_t j = visible; j < keys; j++) scores[j] = HIDDEN;
    Floats highest = load_floats(scores), sums = {};
    for (int64_t j = LANES; j < keys; j += LANES) {
        const Floats v = load_floats(scores + j);
        highest = v > highest ? v : highest;
    }
    float most = highest[0], sum = 0;
    for (int i = 1; i < LANES; i++) most = highest[i] > most ? highest[i] : most;
    for (int64_t j = 0; j < keys; j += LANES) {
        const Floats v = exponential(load_floats(scores + j) - most);
        store(scores + j, v);
        sums += v;
    }
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return 1.0f / sum;
}

// `count` rows of the first V vectors of a tile of values, weighted by each query's row of weights (QUERIES, padded).
template <int V>
inline void mix(const float* weights, int64_t padded, const float* tile, int64_t count, const float* inverse,
                Floats (&mixed)[QUERIES][2]) {
    Floats sums[QUERIES][V] = {};
    for (int64_t j = 0; j < count; j++) {
        Floats values[V];
        for (int v = 0; v < V; v++) values[v] = load_floats(tile + j * TILE + v * LANES);
#pragma GCC unroll 12
        for (int64_t r = 0; r < QUERIES; r++) {
            const Floats weight = spread(weights[r * padded + j]);
            for (int v = 0; v < V; v++) sums[r][v] = multiply_add(weight, values[v], sums[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int64_t r = 0; r < QUERIES; r++) {
        for (int v = 0; v < V; v++) mixed[r][v] = sums[r][v] * inverse[r];
    }
}

// Queries from `first` to `last` of one head; adds what the wanted ones attend to to `received` (tokens).
inline void attend(const Attention& a, const Tokens& t, int64_t batch, int64_t head, int64_t first, int64_t last,
                   float* received) {
    const int64_t kv = head / (a.heads / a.kv_heads), start = batch * t.tokens, dim = a.head_dim;
    const int64_t before = t.prefix != nullptr ? t.prefix->length : 0, own = a.cross ? 0 : t.tokens;
    const int64_t keys = before + (a.causal ? last : own), padded = round_up(keys, TILE);
    auto* queries = buffer<float>(Slot::queries, QUERIES * dim);
    auto* weights = buffer<float>(Slot::weights, QUERIES * padded);
    float *key_tiles, *value_tiles = nullptr;
    int64_t rows = keys;  // of a tile of values
    if (t.prefix != nullptr) {
        const int64_t block = (batch * a.kv_heads + kv) * t.prefix->block();
        key_tiles = t.prefix->keys + block, value_tiles = t.prefix->values + block;
        rows = before + t.prefix->room;
    } else {
        key_tiles = buffer<float>(Slot::keys, dim * padded);
        pack_keys(a, t, start, kv, keys, queries, key_tiles);
        if (a.mixed != nullptr) {
            value_tiles = buffer<float>(Slot::values, round_up(dim, TILE) * keys);
            pack_values(a, start, kv, keys, value_tiles, rows);
        }
    }
    const float factor = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t i = first; i < last; i += QUERIES) {
        const int64_t count = least(QUERIES, last - i), seen = before + (a.causal ? i + count : own);
        for (int64_t r = 0; r < QUERIES; r++) {
            const int64_t token = start + least(i + r, last - 1);
            turn(t, token, a.q + (token - a.first) * a.q_stride + head * dim, dim, factor, queries + r * dim);
        }
        score(queries, key_tiles, dim, padded, round_up(seen, TILE), weights);
        float inverse[QUERIES];
        for (int64_t r = 0; r < QUERIES; r++) {
            const int64_t visible = a.causal ? least(before + i + r + 1, seen) : seen;
            inverse[r] = softmax(weights + r * padded, visible, round_up(seen, TILE));
            if (t.rows == nullptr || r >= count || !t.rows[i + r]) continue;
            for (int64_t j = 0; j < visible; j++) received[j] += weights[r * padded + j] * inverse[r];
        }
        for (int64_t d = 0; a.mixed != nullptr && d < dim; d += TILE) {
            Floats mixed[QUERIES][2];
            const float* tile = value_tiles + d * rows;
            dim - d > LANES ? mix<2>(weights, padded, tile, seen, inverse, mixed)
                            : mix<1>(weights, padded, tile, seen, inverse, mixed);
            for (int64_t r = 0; r < count; r++) {
                float* to = a.mixed + (start + i + r - a.first) * a.heads * dim + head * dim + d;
                std::memcpy(to, mixed[r], least(TILE, dim - d) * sizeof(float));
            }
        }
    }
}

// Turned keys, and values, for queries that come later.
inline void keep(const Attention& a, const Tokens& t) {
    parallel(t.batch * a.kv_heads, [&](int64_t task) {
        const int64_t start = task / a.kv_heads * t.tokens, kv = task % a.kv_heads * a.head_dim;
        for (int64_t j = 0; j < t.tokens; j++) {
            const int64_t from = (start + j) * a.kv_stride + kv, to = (task * t.tokens + j) * a.head_dim;
            turn(t, start + j, a.k + from, a.head_dim, 1.0f, t.keys + to);
            std::memcpy(t.values + to, a.v + from, a.head_dim * sizeof(float));
        }
    });
}

// Keys (turned) and values of a prefix, which are (batch * kv_heads, length, head_dim), into its tiles.
inline void pack_prefix(const Layer& l, const float* keys, const float* values, int64_t batch, const Prefix& p) {
    const Attention a{nullptr, keys, values, 0, l.head_dim, l.heads, l.kv_heads, l.head_dim, false, false, nullptr};
    parallel(batch * l.kv_heads, [&](int64_t task) {
        std::memset(p.keys + task * p.block(), 0, p.block() * sizeof(float));
        std::memset(p.values + task * p.block(), 0, p.block() * sizeof(float));
        auto* row = buffer<float>(Slot::queries, l.head_dim);
        pack_keys(a, {}, task * p.length, 0, p.length, row, p.keys + task * p.block());
        pack_values(a, task * p.length, 0, p.length, p.values + task * p.block(), p.length + p.room);
    });
}

// The tokens' own keys and values behind the prefix.
inline void pack_own(const Attention& a, const Tokens& t) {
    const Prefix& p = *t.prefix;
    parallel(t.batch * a.kv_heads, [&](int64_t task) {
        const int64_t start = task / a.kv_heads * t.tokens, kv = task % a.kv_heads;
        auto* row = buffer<float>(Slot::queries, a.head_dim);
        pack_keys(a, t, start, kv, t.tokens, row, p.keys + task * p.block(), p.length);
        pack_values(a, start, kv, t.tokens, p.values + task * p.block(), p.length + p.room, p.length);
    });
}

// What the wanted rows, all before `last`, attend to, times `share`, is added to t.received.
inline void look_at(const Attention& a, const Tokens& t, int64_t last, float share) {
    auto* received = buffer<float>(Slot::received, a.heads * t.tokens);
    std::memset(received, 0, a.heads * t.tokens * sizeof(float));
    parallel(a.heads, [&](int64_t head) { attend(a, t, 0, head, a.first, last, received + head * t.tokens); });
    for (int64_t head = 0; head < a.heads; head++) {
        for (int64_t j = 0; j < t.tokens; j++) t.received[j] += received[head * t.tokens + j] * share;
    }
}

// Queries per task of bidirectional attention: as many as leave four tasks for each thread, since each task packs all keys.
inline int64_t shared_chunk(const Attention& a, const Tokens& t, int64_t step) {
    const int64_t heads = t.batch * a.heads, parts = (4 * threads() + heads - 1) / heads;
    return round_up((t.tokens - a.first + parts - 1) / parts, step);
}

inline void attention(const Attention& a, const Tokens& t) {
    if (t.keys != nullptr) keep(a, t);
    if (t.prefix != nullptr && !a.cross) pack_own(a, t);
    // What rows attend to is added up task by task, so the tasks must be the same for any number of threads.
    const bool packed = t.prefix != nullptr, whole = !packed && (a.causal || t.rows != nullptr);
    const int64_t shared = whole ? 0 : shared_chunk(a, t, QUERIES);
    const int64_t chunk = shared > CHUNK || packed ? shared : CHUNK;
    const int64_t chunks = (t.tokens - a.first + chunk - 1) / chunk, tasks = t.batch * a.heads * chunks;
    float* received = nullptr;
    if (t.rows != nullptr) {
        received = buffer<float>(Slot::received, tasks * t.tokens);
        std::memset(received, 0, tasks * t.tokens * sizeof(float));
    }
    parallel(tasks, [&](int64_t task) {
        const int64_t first = a.first + task % chunks * chunk, head = task / chunks % a.heads, batch = task / chunks / a.heads;
        float* sums = received != nullptr ? received + task * t.tokens : nullptr;
        attend(a, t, batch, head, first, least(t.tokens, first + chunk), sums);
    });
    if (t.rows == nullptr) return;
    int64_t rows = 0;
    for (int64_t i = 0; i < t.tokens; i++) rows += t.rows[i];
    const float share = 1.0f / static_cast<float>(a.heads * rows);
    std::memset(t.received, 0, t.batch * t.tokens * sizeof(float));
    for (int64_t task = 0; task < tasks; task++) {
        float* to = t.received + task / chunks / a.heads * t.tokens;
        for (int64_t j = 0; j < t.tokens; j++) to[j] += received[task * t.tokens + j] * share;
    }
}

}  // namespace
}  // namespace sqap

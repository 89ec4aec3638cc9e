// Integer matrix product of quantized activations with packed weights. `Isa` provides the innermost tile.
//
// Weights stay packed in memory. Each task unpacks a panel of Isa::NR output channels into a buffer that fits the L1 or
// L2 cache, and multiplies it with all tokens, a tile of Isa::MR tokens at a time.
//
//   Stored weights, row n at 4 bits: a 32-bit word holds eight input channels, the even ones in the low nibbles.
//
//       byte 0   byte 1   byte 2   byte 3
//       k0 k1    k2 k3    k4 k5    k6 k7
//
//   A quad is four input channels, one byte each. A mask gives a word's first quad, a shift and a mask its second:
//
//       word & 0x0f0f0f0f        k0 k2 k4 k6
//       word >> 4 & 0x0f0f0f0f   k1 k3 k5 k7
//
//   Panel, (quads, NR, 4) bytes: one row of the drawing is one or more vector registers.
//
//       n0: k0 k2 k4 k6 | n0 + 1: k0 k2 k4 k6 | ... | n0 + NR - 1: k0 k2 k4 k6
//       n0: k1 k3 k5 k7 | n0 + 1: k1 k3 k5 k7 | ...
//
//   Packed activations of one tile, (segments, channels / DEPTH, MR, DEPTH) bytes, channels in the panel's order.
//   With DEPTH = 4:
//
//       token 0: k0 k2 k4 k6 | token 1: k0 k2 k4 k6 | ... | token MR - 1: k0 k2 k4 k6
//       token 0: k1 k3 k5 k7 | ...
//
//   Isa::tile: acc (MR, NR) int32 += for every quad, dot(quad of the token, quad of the output channel).
//
// At 8 bits a word is one quad, in its stored order. The price of unpacking is shared by all tokens of a tile column.
#pragma once

#include "memory.h"
#include "numbers.h"
#include "path.h"
#include "threads.h"

namespace sqap {
namespace {

constexpr int64_t BLOCK = 1024;  // most input channels unpacked at a time

// Defaults of an `Isa`: dot products of quads, no thread state.
struct ByQuads {
    static constexpr int64_t DEPTH = 4;          // input channels of a token that are adjacent in packed activations
    static constexpr bool SIXTEEN_ROWS = false;  // whether Isa::columns transposes sixteen rows at a time
    static constexpr bool WHOLE_ROWS = false;    // whether Isa::pack_row packs DEPTH channels, Isa::first_tile sums from zero
    struct Session {};                           // constructed before a thread's first tile, destroyed after its last
};

typedef uint32_t Words __attribute__((vector_size(32)));

typedef uint32_t Quads __attribute__((vector_size(16)));
typedef int8_t Sixteen __attribute__((vector_size(16)));

// Transposes eight rows of eight 32-bit words in place.
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

// Products of quantized activations (m, k) with a weight (n, k), segment by segment. A segment is the longest run of
// input channels in which both the token's scale and the output channel's scale are constant.
template <class Isa>
class Products {
  public:
    static constexpr int64_t MR = Isa::MR, NR = Isa::NR, DEPTH = Isa::DEPTH;

    // `packed`: the buffers have the same activations from the products before, for a weight of the same kind.
    Products(const int8_t* q, int64_t m, const Weight& weight, int64_t segment, bool packed = false)
        : q_(q), m_(m), w_(weight), segment_(segment), padded_(round_up(segment, DEPTH > 8 ? DEPTH : 8)),
          segments_(weight.k / segment), tiles_((m + MR - 1) / MR),
          packed_(buffer<int8_t>(Slot::packed, tiles_ * MR * segments_ * padded_)),
          sums_(buffer<int32_t>(Slot::sums, tiles_ * MR * segments_)) {
        if (!packed) parallel(tiles_, [&](int64_t tile) { pack(tile); });
    }

    // For every panel of `count` output channels from n0 on, calls store = begin(n0, count), and then, for every tile
    // and every segment, store(tile, segment, acc) with the exact int32 products (MR, NR). One thread computes all of
    // a panel. The segments of a tile come in order.
    template <class Begin>
    void run(Begin begin) {
        parallel((w_.n + NR - 1) / NR, [&](int64_t index) {
            const int64_t n0 = index * NR, count = least(NR, w_.n - n0);
            const auto store = begin(n0, count);
            [[maybe_unused]] const typename Isa::Session session;
            if (padded_ <= BLOCK) {
                run_short(n0, count, store);
            } else {
                run_long(n0, count, store);
            }
        });
    }

    // Products with scales applied, summed over segments in float32. `token_scales` is (m, segments);
    // scales(n0, count, to) writes a panel's channel scales (segments, NR). Calls store(n0, count, totals) with the
    // panel's sums (tiles * MR, NR). Requires `takes_scales()`.
    template <class Scales, class Store>
    void run_scaled(const float* token_scales, const Scales& scales, const Store& store) {
        const int64_t places = tiles_ * segments_ * MR;  // (tiles, segments, MR)
        auto* tokens = buffer<float>(Slot::tile_scales, places);
        auto* offsets = buffer<int32_t>(Slot::tile_offsets, places);
        for (int64_t i = 0; i < tiles_ * MR; i++) {
            for (int64_t s = 0; s < segments_; s++) {
                const int64_t place = (i / MR * segments_ + s) * MR + i % MR;
                tokens[place] = i < m_ ? token_scales[i * segments_ + s] : 0.0f;
                offsets[place] = Isa::UNSIGNED ? -8 * sums_[i * segments_ + s] : 0;
            }
        }
        parallel((w_.n + NR - 1) / NR, [&](int64_t index) {
            const int64_t n0 = index * NR, count = least(NR, w_.n - n0);
            auto* channels = buffer<float>(Slot::panel_scales, segments_ * NR);
            auto* totals = buffer<float>(Slot::total, tiles_ * MR * NR);
            auto* panel = buffer<uint8_t>(Slot::panel, 2 * BLOCK * NR);
            scales(n0, count, channels);
            std::memset(totals, 0, tiles_ * MR * NR * sizeof(float));
            [[maybe_unused]] const typename Isa::Session session;
            const int64_t step = padded_ == segment_ ? BLOCK / padded_ : 1;
            for (int64_t first = 0; first < segments_; first += step) {
                const int64_t last = least(segments_, first + step);
                unpack(n0, count, first * segment_, (last - first) * segment_, (last - first) * padded_ / 4,
                       Take::fours, panel);
                for (int64_t t = 0; t < tiles_; t++) {
                    for (int64_t s = first; s < last; s++) {
                        const int64_t place = (t * segments_ + s) * MR;
                        Isa::tile_scaled(panel + (s - first) * padded_ * NR, packed(t, s), padded_ / 4, offsets + place,
                                         tokens + place, channels + s * NR, totals + t * MR * NR);
                    }
                }
            }
            store(n0, count, totals);
        });
    }

    // Whether `run_scaled` applies: 4-bit weights, more than one segment, segments no longer than a panel.
    bool takes_scales() const { return w_.bits == 4 && segments_ > 1 && padded_ <= BLOCK; }

  private:
    // Passes over a weight. Where an instruction multiplies 4-bit weights only, an 8-bit weight takes two: its upper
    // four bits first, then its lower four.
    int planes() const { return w_.bits == 8 && Isa::FOUR_BITS_ONLY ? 2 : 1; }
    const int8_t* packed(int64_t tile, int64_t s) const { return packed_ + (tile * segments_ + s) * MR * padded_; }

    // For segments no longer than a panel: each tile's accumulator is complete after one panel.
    template <class Store>
    void run_short(int64_t n0, int64_t count, const Store& store) {
        const int64_t step = padded_ == segment_ ? BLOCK / padded_ : 1;
        auto* panel = buffer<uint8_t>(Slot::panel, 2 * BLOCK * NR);
        auto* acc = buffer<int32_t>(Slot::acc, MR * NR);
        for (int64_t first = 0; first < segments_; first += step) {
            const int64_t last = least(segments_, first + step);
            for (int plane = 0; plane < planes(); plane++) {
                unpack(n0, count, first * segment_, (last - first) * segment_, (last - first) * padded_ / 4,
                       take(plane), panel + plane * BLOCK * NR);
            }
            for (int64_t t = 0; t < tiles_; t++) {
                for (int64_t s = first; s < last; s++) {
                    begin_tile(t, s, panel + (s - first) * padded_ * NR, padded_ / 4, acc);
                    for (int plane = 1; plane < planes(); plane++) {
                        times_sixteen(acc);
                        const uint8_t* weights = panel + (plane * BLOCK + (s - first) * padded_) * NR;
                        Isa::tile(weights, packed(t, s), padded_ / 4, acc);
                    }
                    store(t, s, acc);
                }
            }
        }
    }

    // For segments longer than a panel: the accumulators of all tiles are kept from one panel to the next.
    template <class Store>
    void run_long(int64_t n0, int64_t count, const Store& store) {
        auto* panel = buffer<uint8_t>(Slot::panel, 2 * BLOCK * NR);
        auto* acc = buffer<int32_t>(Slot::acc, tiles_ * MR * NR);
        for (int64_t s = 0; s < segments_; s++) {
            for (int plane = 0; plane < planes(); plane++) {
                for (int64_t t = 0; plane == 1 && t < tiles_; t++) times_sixteen(acc + t * MR * NR);
                for (int64_t k = 0; k < padded_; k += BLOCK) {
                    const int64_t quads = least(BLOCK, padded_ - k) / 4;
                    unpack(n0, count, s * segment_ + k, segment_ - k, quads, take(plane), panel);
                    for (int64_t t = 0; t < tiles_; t++) {
                        if (plane == 0 && k == 0) {
                            begin_tile(t, s, panel, quads, acc + t * MR * NR);
                        } else {
                            Isa::tile(panel, packed(t, s) + k * MR, quads, acc + t * MR * NR);
                        }
                    }
                }
            }
            for (int64_t t = 0; t < tiles_; t++) store(t, s, acc + t * MR * NR);
        }
    }

    // Initial accumulators: minus the weights' unsigned offset (8 or 128) times the token's sum of levels.
    void start(int64_t tile, int64_t s, int32_t* acc) const {
        const int32_t offset = !Isa::UNSIGNED ? 0 : w_.bits == 4 ? 8 : planes() == 1 ? 128 : 128 / 16;
        for (int64_t r = 0; r < MR; r++) {
            const int32_t value = offset == 0 ? 0 : -offset * sums_[(tile * MR + r) * segments_ + s];
            for (int64_t j = 0; j < NR; j++) acc[r * NR + j] = value;
        }
    }

    // A tile's first products, with what the sums start from.
    void begin_tile(int64_t tile, int64_t s, const uint8_t* panel, int64_t quads, int32_t* acc) const {
        if constexpr (Isa::WHOLE_ROWS) {
            Isa::first_tile(panel, packed(tile, s), quads, acc);
        } else {
            start(tile, s, acc);
            Isa::tile(panel, packed(tile, s), quads, acc);
        }
    }

    static void times_sixteen(int32_t* acc) {
        for (int64_t i = 0; i < MR * NR; i++) acc[i] *= 16;
    }

    // What is unpacked from a word: 4-bit levels, 8-bit levels, or the lower or upper four bits of 8-bit levels.
    enum class Take { fours, eights, lower, upper };

    Take take(int plane) const {
        if (w_.bits == 4) return Take::fours;
        return planes() == 1 ? Take::eights : plane == 0 ? Take::upper : Take::lower;
    }

    // Unpacks up to 4 * quads of the `channels` input channels from k on into `panel` (quads, NR, 4).
    void unpack(int64_t n0, int64_t count, int64_t k, int64_t channels, int64_t quads, Take how, uint8_t* panel) const {
        switch (how) {
            case Take::fours: return unpack<Take::fours>(n0, count, k, channels, quads, panel);
            case Take::eights: return unpack<Take::eights>(n0, count, k, channels, quads, panel);
            case Take::lower: return unpack<Take::lower>(n0, count, k, channels, quads, panel);
            case Take::upper: return unpack<Take::upper>(n0, count, k, channels, quads, panel);
        }
    }

    template <Take HOW>
    void unpack(int64_t n0, int64_t count, int64_t k, int64_t channels, int64_t quads, uint8_t* panel) const {
        constexpr int64_t WIDTH = HOW == Take::fours ? 2 : 4;  // bytes of a quad as stored
        const int64_t bytes = least(quads * WIDTH, channels * WIDTH / 4), row_bytes = w_.row_bytes();
        const uint8_t* rows = w_.data + n0 * row_bytes + k * WIDTH / 4;
        int64_t done = 0;  // bytes of sixteen rows that were unpacked together
        for (int64_t r = 0; r < NR; r += 8) {
            if constexpr (Isa::SIXTEEN_ROWS) {
                if (r % 16 == 0) {
                    for (done = 0; r + 16 <= count && done + 16 <= bytes; done += 16) {
                        put_sixteen<HOW>(rows + r * row_bytes + done, row_bytes, panel + (done / WIDTH * NR + r) * 4);
                    }
                }
            }
            for (int64_t at = done; at < quads * WIDTH; at += 32) {
                uint8_t* to = panel + (at / WIDTH * NR + r) * 4;
                Words words[8];
                if (r + 8 <= count && at + 32 <= bytes) {
#pragma GCC unroll 8
                    for (int i = 0; i < 8; i++) std::memcpy(&words[i], rows + (r + i) * row_bytes + at, 32);
                    put<HOW>(words, to, 32 / WIDTH);
                } else {
                    std::memset(words, 0, sizeof words);
                    for (int64_t i = 0; i < least(8, count - r) && at < bytes; i++) {
                        std::memcpy(&words[i], rows + (r + i) * row_bytes + at, least(32, bytes - at));
                    }
                    put<HOW>(words, to, least(32 / WIDTH, quads - at / WIDTH));
                }
            }
        }
    }

    // Writes the quads of four words of sixteen rows.
    template <Take HOW>
    __attribute__((always_inline)) static inline void put_sixteen(const uint8_t* rows, int64_t row_bytes, uint8_t* to) {
        typedef uint32_t Wide __attribute__((vector_size(64)));
        constexpr int PER_WORD = HOW == Take::fours ? 2 : 1;
        typename Isa::Vector columns[4];
        Isa::columns(rows, row_bytes, columns);
#pragma GCC unroll 8
        for (int j = 0; j < 4 * PER_WORD; j++) {
            Wide words;
            std::memcpy(&words, &columns[j / PER_WORD], sizeof words);
            words = quad_of<HOW>(words >> (j % PER_WORD * 4));
            std::memcpy(to + j * NR * 4, &words, sizeof words);
        }
    }

    // Writes up to `count` quads of eight rows of words. Inlined, so that a full count is a compile-time constant.
    template <Take HOW>
    __attribute__((always_inline)) static inline void put(Words* words, uint8_t* to, int64_t count) {
        constexpr int64_t PER_WORD = HOW == Take::fours ? 2 : 1;
        transpose(words);
#pragma GCC unroll 16
        for (int64_t j = 0; j < 8 * PER_WORD; j++) {
            const Words quad = quad_of<HOW>(words[j / PER_WORD] >> (j % PER_WORD * 4));
            if (j < count) std::memcpy(to + j * NR * 4, &quad, 32);
        }
    }

    // One quad of as many output channels as the vector has words, from words shifted into place.
    template <Take HOW, class Vector>
    static Vector quad_of(Vector quad) {
        if (HOW == Take::fours) {
            quad &= 0x0f0f0f0fu;
            // Subtracts eight from each byte without a borrow from its neighbour.
            return Isa::UNSIGNED ? quad : ((quad | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
        }
        if (HOW == Take::eights) return Isa::UNSIGNED ? quad ^ 0x80808080u : quad;
        return (quad ^ 0x80808080u) >> (HOW == Take::upper ? 4 : 0) & 0x0f0f0f0fu;
    }

    // Packs a tile of MR tokens as (segments, padded_ / DEPTH, MR, DEPTH), with zeros where there is no token or
    // channel, and sums each token's levels per segment where weights are stored without a sign.
    void pack(int64_t tile) {
        for (int64_t s = 0; s < segments_; s++) {
            const int8_t* from = q_ + tile * MR * w_.k + s * segment_;
            int8_t* to = packed_ + (tile * segments_ + s) * MR * padded_;
            for (int64_t r = 0; r < MR;) {
                const bool four = DEPTH == 4 && r + 4 <= least(MR, m_ - tile * MR);
                int64_t done = 0;
                if constexpr (Isa::WHOLE_ROWS) {
                    const int64_t whole = tile * MR + r < m_ ? segment_ / DEPTH * DEPTH : 0;
                    for (; done < whole; done += DEPTH) {
                        Isa::pack_row(from + r * w_.k + done, w_.bits, to + done * MR + r * DEPTH);
                    }
                }
                for (; four && done + 16 <= segment_; done += 16) {
                    pack_four(from + r * w_.k + done, to + done * MR + r * DEPTH);
                }
                for (const int64_t last = r + (four ? 4 : 1); r < last; r++) {
                    const int64_t token = tile * MR + r, count = token < m_ ? segment_ : 0;
                    pack_one(from + r * w_.k, done, count, to + r * DEPTH);
                    int32_t sum = 0;
                    for (int64_t j = 0; Isa::UNSIGNED && j < count; j++) sum += from[r * w_.k + j];
                    if (Isa::UNSIGNED) sums_[token * segments_ + s] = sum;
                }
            }
        }
    }

    // Packs one token's channels from `first` on.
    void pack_one(const int8_t* from, int64_t first, int64_t count, int8_t* to) const {
        const auto place = [&](int64_t j) { return to + j / DEPTH * DEPTH * MR + j % DEPTH; };
        for (int64_t j = first; j < padded_; j += 8) {
            uint64_t eight = 0;
            if (j < count) std::memcpy(&eight, from + j, least(8, count - j));
            const uint32_t low = w_.bits == 4 ? every_other(eight) : static_cast<uint32_t>(eight);
            const uint32_t high = static_cast<uint32_t>(w_.bits == 4 ? every_other(eight >> 8) : eight >> 32);
            std::memcpy(place(j), &low, 4);
            std::memcpy(place(j + 4), &high, 4);
        }
    }

    // Packs sixteen channels of four tokens.
    void pack_four(const int8_t* from, int8_t* to) const {
        Quads rows[4];
        for (int64_t r = 0; r < 4; r++) {
            Sixteen row;
            std::memcpy(&row, from + r * w_.k, sizeof row);
            if (w_.bits == 4) row = SQAP_SHUFFLE(row, row, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
            std::memcpy(&rows[r], &row, sizeof row);
        }
        const Quads a = SQAP_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5), b = SQAP_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5),
                    c = SQAP_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7), d = SQAP_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
        const Quads columns[4] = {SQAP_SHUFFLE(a, b, 0, 1, 4, 5), SQAP_SHUFFLE(a, b, 2, 3, 6, 7),
                                  SQAP_SHUFFLE(c, d, 0, 1, 4, 5), SQAP_SHUFFLE(c, d, 2, 3, 6, 7)};
        for (int64_t j = 0; j < 4; j++) std::memcpy(to + j * 4 * MR, &columns[j], sizeof columns[j]);
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

}  // namespace
}  // namespace sqap

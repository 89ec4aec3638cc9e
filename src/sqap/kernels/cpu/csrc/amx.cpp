// AMX-INT8 multiplies tiles: 16 tokens by 16 output channels, 64 channels of each in one instruction. Few tokens and
// groups are left to AVX512-VNNI, which every processor with AMX has. An encoder's attention is AMX-BF16's.

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "amx_attention.h"
#include "avx512.h"

namespace sqap {
namespace {

// As ldtilecfg reads it: eight tiles, each of 16 rows of 64 bytes.
struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr Config CONFIG;

struct Amx {
    static constexpr int64_t MR = 32, NR = 32, DEPTH = 64;
    static constexpr bool UNSIGNED = false, FOUR_BITS_ONLY = false, SCALED_ROWS = true, SCALED_TILES = false;
    static constexpr bool SIXTEEN_ROWS = true, WHOLE_ROWS = true;
    using Vector = Avx512::Vector;
    static constexpr auto columns = Avx512::columns;
    static constexpr auto dot4 = Vnni<Avx512>::dot4;
    static constexpr auto dot4_scaled = Vnni<Avx512>::dot4_scaled;
    static constexpr auto dot8 = Vnni<Avx512>::dot8;

    // A thread's tiles have no shape but in a session; between ours it may have one of PyTorch's.
    struct Session {
        Session() { _tile_loadconfig(&CONFIG); }
        ~Session() { _tile_release(); }
    };

    // DEPTH channels of a token in the panel's order.
    static void pack_row(const int8_t* from, int bits, int8_t* to) {
        const auto within_eight = _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
        const Vector row = Avx512::load(from);
        Avx512::store(to, bits == 4 ? _mm512_shuffle_epi8(row, _mm512_broadcast_i32x4(within_eight)) : row);
    }

    static void tile(const uint8_t* panel, const int8_t* a, int64_t quads, int32_t* acc) {
        tiles_written();
        _tile_loadd(0, acc, ROW);
        _tile_loadd(1, acc + 16, ROW);
        _tile_loadd(2, acc + 16 * NR, ROW);
        _tile_loadd(3, acc + 16 * NR + 16, ROW);
        add_products(panel, a, quads, acc);
    }

    static void first_tile(const uint8_t* panel, const int8_t* a, int64_t quads, int32_t* acc) {
        tiles_written();
        no_sums();
        add_products(panel, a, quads, acc);
    }

  private:
    static constexpr int64_t ROW = NR * 4;  // bytes, of the panel and of the sums

    __attribute__((always_inline)) static inline void add_products(const uint8_t* panel, const int8_t* a, int64_t quads,
                                                                   int32_t* acc) {
        for (int64_t q = 0; q < quads; q += DEPTH / 4) {
            const int8_t* next = a + (q + DEPTH / 4) * MR * 4;  // maybe behind the last: to prefetch it does no harm
            for (int64_t line = 0; line < MR; line++) __builtin_prefetch(next + line * DEPTH);
            _tile_loadd(4, a + q * MR * 4, DEPTH);
            _tile_loadd(5, a + q * MR * 4 + 16 * DEPTH, DEPTH);
            _tile_loadd(6, panel + q * ROW, ROW);
            _tile_loadd(7, panel + q * ROW + 64, ROW);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, acc, ROW);
        _tile_stored(1, acc + 16, ROW);
        _tile_stored(2, acc + 16 * NR, ROW);
        _tile_stored(3, acc + 16 * NR + 16, ROW);
    }
};

// A tile's sums would be stored and scaled for every group: AVX512-VNNI, which scales them in registers, is faster.
template <>
struct ForGroups<Amx> {
    using Type = Vnni<Avx512>;
};

// Bidirectional attention without rotary positions, of which nothing is kept, is rounded to bfloat16: an encoder's. So
// is attention behind a prefix: an action expert's.
template <>
struct Attends<Amx> {
    static void run(const Attention& a, const Tokens& t) {
        if (t.prefix != nullptr) return behind(a, t);
        const bool encoder = !a.causal && t.cos == nullptr && t.rows == nullptr && t.keys == nullptr && a.first == 0;
        if (!encoder || t.tokens < SIDE) return attention(a, t);
        const int64_t chunk = shared_chunk(a, t, SIDE), chunks = (t.tokens + chunk - 1) / chunk;
        parallel(t.batch * a.heads * chunks, [&](int64_t task) {
            const int64_t first = task % chunks * chunk, head = task / chunks % a.heads;
            const Amx::Session session;
            attend_tiles(a, t.tokens, task / chunks / a.heads, head, first, least(t.tokens, first + chunk));
        });
    }

    static void behind(const Attention& a, const Tokens& t) {
        const int64_t blocks = t.batch * a.kv_heads, rows = a.heads / a.kv_heads * t.tokens;
        const int64_t tasks = (rows + SIDE - 1) / SIDE;  // of a block
        if (!a.cross) parallel(blocks, [&](int64_t index) { put_own(a, t, index); });
        parallel(blocks * tasks, [&](int64_t task) {
            const Amx::Session session;
            attend_behind(a, t, task / tasks, task % tasks * SIDE);
        });
    }

    static void pack(const Layer& l, const float* keys, const float* values, int64_t batch, const Prefix& p) {
        pack_prefix_tiles(keys, values, batch * l.kv_heads, p);
    }
};

bool has_amx() {
    constexpr unsigned TILES = 1u << 24, INT8 = 1u << 25, BF16 = 1u << 22, AVX512_BF16 = 1u << 5;
    unsigned a, b, c, d;
    if (!has_avx512vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & TILES) || !(d & INT8) || !(d & BF16)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
#if defined(__linux__)
    // Tiles make a thread's saved state 8 KiB larger; Linux wants to be asked, once for the process.
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool runs_here() {
    static const bool found = has_amx();
    return found;
}

}  // namespace

const Path amx = {"amx", runs_here, quantize, linear<Amx>, matmul<Amx>, layer<Amx>, look<Amx>, pack<Amx>};

}  // namespace sqap

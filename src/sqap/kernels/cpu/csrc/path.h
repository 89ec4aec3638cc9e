// What a path is: the linear's arithmetic compiled for one kind of processor.
#pragma once

#include <cstdint>

namespace sqap {

enum class Dtype { f32, bf16 };
enum class Function { none, silu, gelu, gelu_tanh };

// LayerNorm or RMSNorm of a token.
struct Norm {
    enum Kind { layer, rms } kind;
    const float* weight;  // (k) or null
    const float* bias;    // (k) or null
    float eps;
};

// Activations (m, k), what is done to them first, and the grid that they are to be quantized on.
struct Activations {
    const void* x;
    Dtype dtype;
    int64_t m, k;
    int bits;         // 4 or 8
    bool symmetric;
    int64_t group;    // channels that share a scale; k is one scale per token, 0 one for the whole tensor
    const Norm* norm = nullptr;
    Function function = Function::none;
    const void* times = nullptr;  // (m, k), what the function's results are multiplied by; or null
    int64_t hadamard = 1;         // size of the Hadamard matrices that then rotate the channels

    int64_t groups() const { return group ? k / group : 1; }
    bool ready() const {
        return norm == nullptr && function == Function::none && times == nullptr && hadamard == 1;
    }
};

// Activations as levels: about scale * (q - zero_point).
struct Levels {
    int8_t* q;            // (m, k)
    float* scale;         // (m, groups); per tensor (m, 1), all the same
    int32_t* zero_point;  // as scale; null on a symmetric grid
};

// Weights (n, k), row by row as they are stored: 8 bits as int8, 4 bits as q + 8, two to a byte.
struct Weight {
    const uint8_t* data;
    int64_t n, k;
    int bits;
    const float* scale;  // (n, groups), or a single one
    int64_t groups;
    bool shared;         // one scale for all

    int64_t row_bytes() const { return bits == 4 ? k / 2 : k; }
};

// residual + gain * (product + bias)
struct Output {
    void* y;  // (m, n)
    Dtype dtype;
    const float* bias;                // (n) or null
    const float* gain = nullptr;      // (n) or null
    const float* residual = nullptr;  // (m, n) or null; may be y
};

// A weight, and the grid of what it is multiplied by, as in `Activations`.
struct Linear {
    Weight weight;
    const float* bias;
    int bits;
    bool symmetric;
    int64_t group;
    int64_t hadamard;
};

// A pre-norm layer: x += gain1 * out(attention(in(norm1(x)))), then x += gain2 * down(function(up(norm2(x)))).
struct Layer {
    Norm norm1, norm2;
    Linear in[3];  // queries, keys and values, each on its own, or all from the first
    bool fused_in;
    Linear out;
    Linear up[2];  // the second, if gated, multiplies the function's results
    bool gated;
    Function function;
    Linear down;
    const float *gain1, *gain2;          // (width) or null
    int64_t heads, kv_heads, head_dim;
    bool causal;
    bool cross;  // only queries, from in[0]: keys and values are a prefix's alone
};

// Keys and values that the tokens of many calls attend to, each (batch * kv_heads) blocks of a path's tiles, whose order
// is the path's own. A call puts those of its own tokens behind the `length` that are there.
struct Prefix {
    float *keys, *values;
    int64_t length, room;  // tokens before a call's own, and how many of these there may be
    int64_t head_dim;

    // Floats of a block, whatever the path: tiles have up to 32 keys and up to 32 channels.
    int64_t block() const { return (length + room + 31) / 32 * 32 * ((head_dim + 31) / 32 * 32); }
};

// What a layer is given, and where it puts what it makes of it.
struct Tokens {
    const float* x;  // (batch * tokens, width)
    float* y;        // the same, from `first` on; null for a look ahead
    int64_t batch, tokens;
    const float *cos, *sin;  // of rotary positions, (batch * tokens, head_dim); or null
    const uint8_t* rows;     // (tokens), whose attention is wanted; or null
    float* received;         // (batch, tokens), what they attend to, averaged over heads and rows
    float *keys, *values;    // (batch, kv_heads, tokens, head_dim), for later queries; or null
    int64_t first;           // tokens before it are keys and values alone; 0 in a batch
    const Prefix* prefix;    // what all tokens attend to beside their own; or null
};

struct Path {
    const char* name;
    bool (*runs_here)();
    void (*quantize)(const Activations&, const Levels&);
    void (*linear)(const Activations&, const Weight&, const Output&);
    void (*matmul)(const int8_t* q, int64_t m, const Weight&, int32_t* y);
    void (*layer)(const Layer&, const Tokens&);
    void (*look)(const Layer* const*, int64_t count, const Tokens&);
    // Keys (turned) and values (batch, kv_heads, length, head_dim) into the tiles of a prefix.
    void (*pack)(const Layer&, const float* keys, const float* values, int64_t batch, const Prefix&);
};

extern const Path portable;
#if defined(__x86_64__)
extern const Path avx2, avxvnni, avx512vnni, amx;
#elif defined(__aarch64__)
extern const Path neon;
#endif

// All that were compiled, the fastest first.
inline constexpr const Path* PATHS[] = {
#if defined(__x86_64__)
    &amx, &avx512vnni, &avxvnni, &avx2,
#elif defined(__aarch64__)
    &neon,
#endif
    &portable,
};

}  // namespace sqap

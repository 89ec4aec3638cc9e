// A whole transformer layer: norms, products, attention and residuals, with nothing in between but its own buffers.
#pragma once

#include <initializer_list>

#include "attention.h"
#include "engine.h"

namespace sqap {
namespace {

inline bool same_grid(const Linear& a, const Linear& b) {
    return a.bits == b.bits && a.symmetric == b.symmetric && a.group == b.group && a.hadamard == b.hadamard;
}

// What is done to the tokens that a linear is given.
struct Before {
    const Norm* norm = nullptr;
    Function function = Function::none;
    const float* times = nullptr;
};

// Products of the same tokens with several weights, quantized once where the grid is the same.
template <class Isa>
void multiply_all(const float* x, int64_t m, const Before& before, const Linear* linears, const Output* outputs,
                  int64_t count) {
    Levels levels{};
    for (int64_t i = 0; i < count; i++) {
        const Linear& l = linears[i];
        const Activations a{x, Dtype::f32, m, l.weight.k, l.bits, l.symmetric, l.group,
                            before.norm, before.function, before.times, l.hadamard};
        const bool quantized_before = i > 0 && same_grid(l, linears[i - 1]);
        if (!quantized_before) levels = quantized(a);
        const bool packed = quantized_before && l.weight.bits == linears[i - 1].weight.bits &&
                            l.weight.groups == linears[i - 1].weight.groups;
        multiply<Isa>(a, levels, l.weight, outputs[i], packed);
    }
}

// How an `Isa` attends, and packs a prefix for it: in 32 bits, unless specialised.
template <class Isa>
struct Attends {
    static void run(const Attention& a, const Tokens& t) { attention(a, t); }
    static void pack(const Layer& l, const float* keys, const float* values, int64_t batch, const Prefix& p) {
        pack_prefix(l, keys, values, batch, p);
    }
};

template <class Isa>
void pack(const Layer& l, const float* keys, const float* values, int64_t batch, const Prefix& p) {
    Attends<Isa>::pack(l, keys, values, batch, p);
}

template <class Isa>
void layer(const Layer& l, const Tokens& t) {
    const int64_t m = t.batch * t.tokens, n = m - t.first, hidden = l.up[0].weight.n;
    const int64_t queries = l.heads * l.head_dim, keys = l.cross ? 0 : l.kv_heads * l.head_dim;
    auto* in = buffer<float>(Slot::in, m * (queries + 2 * keys));
    auto* mixed = buffer<float>(Slot::mixed, m * queries);
    auto* middle = buffer<float>(Slot::hidden, 2 * m * hidden);
    float *q = in, *k = in + queries, *v = k + keys;
    int64_t q_stride = queries + 2 * keys, kv_stride = q_stride;
    if (!l.fused_in) {
        k = in + m * queries, v = k + m * keys;
        q_stride = queries, kv_stride = keys;
    }
    const Output ins[] = {{q, Dtype::f32, l.in[0].bias}, {k, Dtype::f32, l.in[1].bias}, {v, Dtype::f32, l.in[2].bias}};
    const float* x = t.x + t.first * l.in[0].weight.k;
    if (t.first == 0) {
        multiply_all<Isa>(t.x, m, {&l.norm1}, l.in, ins, l.fused_in || l.cross ? 1 : 3);
    } else {
        multiply_all<Isa>(t.x, m, {&l.norm1}, l.in + 1, ins + 1, 2);
        if (n > 0) multiply_all<Isa>(x, n, {&l.norm1}, l.in, ins, 1);
    }
    Attends<Isa>::run({q, k, v, q_stride, kv_stride, l.heads, l.kv_heads, l.head_dim, l.causal, l.cross, mixed, t.first}, t);
    if (n == 0) return;
    const Output out{t.y, Dtype::f32, l.out.bias, l.gain1, x};
    multiply_all<Isa>(mixed, n, {}, &l.out, &out, 1);

    const Output ups[] = {{middle, Dtype::f32, l.up[0].bias}, {middle + n * hidden, Dtype::f32, l.up[1].bias}};
    multiply_all<Isa>(t.y, n, {&l.norm2}, l.up, ups, l.gated ? 2 : 1);
    const Output down{t.y, Dtype::f32, l.down.bias, l.gain2, t.y};
    multiply_all<Isa>(middle, n, {nullptr, l.function, l.gated ? middle + n * hidden : nullptr}, &l.down, &down, 1);
}

inline bool same_norm(const Norm& a, const Norm& b, int64_t width) {
    const auto same = [&](const float* x, const float* y) {
        return x == y || (x != nullptr && y != nullptr && std::memcmp(x, y, width * sizeof(float)) == 0);
    };
    return a.kind == b.kind && a.eps == b.eps && same(a.weight, b.weight) && same(a.bias, b.bias);
}

// Of a batch of one: what the wanted rows would attend to in each of some layers, were the tokens the input of all;
// averaged over layers, heads and rows. Tokens are quantized once for all layers whose norms and grids are the same.
template <class Isa>
void look(const Layer* const* layers, int64_t count, const Tokens& t) {
    int64_t first = 0, last = t.tokens, rows = 0;
    while (first < last && !t.rows[first]) first++;
    while (last > first && !t.rows[last - 1]) last--;
    for (int64_t i = first; i < last; i++) rows += t.rows[i];
    std::memset(t.received, 0, t.tokens * sizeof(float));
    Levels levels{};
    const Linear* before = nullptr;
    const Norm* norm = nullptr;
    for (int64_t i = 0; i < count && rows > 0; i++) {
        const Layer& l = *layers[i];
        const int64_t width = l.in[0].weight.k, queries = l.heads * l.head_dim, keys = l.kv_heads * l.head_dim;
        auto* q = buffer<float>(Slot::in, (last - first) * queries + t.tokens * keys);
        float* k = q + (last - first) * queries;
        for (const bool asks : {false, true}) {
            const Linear& in = l.in[asks ? 0 : 1];
            Activations a{t.x, Dtype::f32, t.tokens, width, in.bits, in.symmetric, in.group,
                          &l.norm1, Function::none, nullptr, in.hadamard};
            if (before == nullptr || !same_grid(in, *before) || !same_norm(l.norm1, *norm, width)) levels = quantized(a);
            before = &in, norm = &l.norm1;
            Levels taken = levels;
            if (asks) {
                const int64_t skipped = first * a.groups();
                a.x = t.x + first * width, a.m = last - first;
                taken = {levels.q + first * width, levels.scale + skipped,
                         levels.zero_point != nullptr ? levels.zero_point + skipped : nullptr};
            }
            multiply<Isa>(a, taken, in.weight, {asks ? q : k, Dtype::f32, in.bias});
        }
        const float share = 1.0f / static_cast<float>(count * l.heads * rows);
        look_at({q, k, nullptr, queries, keys, l.heads, l.kv_heads, l.head_dim, l.causal, false, nullptr, first}, t, last, share);
    }
}

}  // namespace
}  // namespace sqap

// What sqap.kernels calls. Arrays come as addresses and numbers of bytes, since a small product takes less time than
// looking at five tensors; what does not change between calls is bound once.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "path.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

using sqap::Array;
using sqap::Path;
using sqap::PATHS;

const Path& find(const std::string& name) {
    for (const Path* path : PATHS) {
        if (name == path->name && path->runs_here()) return *path;
    }
    throw std::invalid_argument("no path called " + name + " runs on this processor");
}

std::vector<std::string> paths() {
    std::vector<std::string> found;
    for (const Path* path : PATHS) {
        if (path->runs_here()) found.emplace_back(path->name);
    }
    return found;
}

std::vector<std::string> compiled() {
    std::vector<std::string> found;
    for (const Path* path : PATHS) found.emplace_back(path->name);
    return found;
}

sqap::Dtype dtype(bool half) { return half ? sqap::Dtype::bf16 : sqap::Dtype::f32; }

// To a thread that has run nothing of PyTorch's yet, OpenMP offers every core. PyTorch passes on how many threads it
// was told to use when it is asked for their number.
void settle_threads() {
    thread_local bool settled = false;
    if (settled) return;
    nb::module_::import_("torch").attr("get_num_threads")();
    settled = true;
}

int threads() {
    settle_threads();
    return sqap::threads();
}

// Runs `compute` while other threads of Python's may run, too.
template <class Compute>
void run(Compute compute) {
    settle_threads();
    nb::gil_scoped_release release;
    compute();
}

// A linear and the path that it runs on.
struct BoundLinear {
    const Path* path;
    sqap::Linear linear;

    BoundLinear(const std::string& path, const Array& weight, int weight_bits, int64_t n, int64_t k, const Array& scale,
                int64_t groups, bool shared, const Array& bias, int bits, bool symmetric, int64_t group,
                int64_t hadamard)
        : path(&find(path)), linear{sqap::weight_of(weight, weight_bits, n, k), nullptr, bits, symmetric, group, hadamard} {
        linear.weight.groups = groups, linear.weight.shared = shared;
        sqap::check(linear);
        linear.weight.scale = shared ? sqap::values_of<float>("a weight's scale", scale, {1})
                                     : sqap::values_of<float>("a weight's scales", scale, {n, groups});
        linear.bias = sqap::values_or_null<float>("a bias", bias, {n});
    }

    sqap::Activations activations(const Array& x, bool half, int64_t m, int function, const Array& times) const {
        const int64_t k = linear.weight.k;
        sqap::Activations a{sqap::values_of("inputs", x, dtype(half), {m, k}), dtype(half), m, k, linear.bits,
                            linear.symmetric, linear.group};
        a.function = sqap::function_of(function), a.hadamard = linear.hadamard;
        if (times.first != 0) a.times = sqap::values_of("factors", times, dtype(half), {m, k});
        return a;
    }

    void multiply(const Array& x, bool half, int64_t m, int function, const Array& times, const Array& y) const {
        const sqap::Activations a = activations(x, half, m, function, times);
        const sqap::Output out{sqap::values_of("outputs", y, dtype(half), {m, linear.weight.n}), dtype(half),
                               linear.bias};
        run([&] { path->linear(a, linear.weight, out); });
    }

    void quantize(const Array& x, bool half, int64_t m, int function, const Array& times, const Array& q,
                  const Array& scale, const Array& zero_point) const {
        const sqap::Activations a = activations(x, half, m, function, times);
        const sqap::Levels levels{
            sqap::values_of<int8_t>("levels", q, {m, a.k}), sqap::values_of<float>("scales", scale, {m, a.groups()}),
            a.symmetric ? nullptr : sqap::values_of<int32_t>("zero points", zero_point, {m, a.groups()})};
        run([&] { path->quantize(a, levels); });
    }
};

// A norm whose width is the layer's that it is for.
struct BoundNorm {
    bool rms;
    Array weight, bias;
    float eps;

    sqap::Norm of(int64_t width) const {
        return {rms ? sqap::Norm::rms : sqap::Norm::layer, sqap::values_or_null<float>("a norm's weight", weight, {width}),
                sqap::values_or_null<float>("a norm's bias", bias, {width}), eps};
    }
};

// A prefix in the tiles of the path that it was packed for.
struct BoundPrefix {
    const Path* path;
    int64_t batch, kv_heads;
    sqap::Prefix prefix;

    // Whether a layer's own `tokens` fit behind it.
    void check(const Path* of, const sqap::Layer& layer, int64_t count, int64_t tokens) const {
        sqap::require(of == path && layer.kv_heads == kv_heads && layer.head_dim == prefix.head_dim && count == batch,
                      "a prefix was packed for another layer");
        sqap::require(tokens <= prefix.room, "there are more tokens than a prefix has room for");
    }
};

// A layer and the path that it runs on.
struct BoundLayer {
    const Path* path;
    sqap::Layer layer{};

    BoundLayer(const std::vector<BoundLinear>& in, const BoundLinear& out, const std::vector<BoundLinear>& up,
               const BoundLinear& down, const BoundNorm& norm1, const BoundNorm& norm2, const Array& gain1,
               const Array& gain2, int function, int64_t heads, int64_t kv_heads, int64_t head_dim, bool causal,
               bool cross)
        : path(out.path) {
        sqap::require(in.size() == 1 || (in.size() == 3 && !cross), "a layer has one linear or three before attention");
        sqap::require(up.size() == 1 || up.size() == 2, "an MLP has one linear or two before its function");
        for (std::size_t i = 0; i < in.size(); i++) layer.in[i] = in[i].linear;
        for (std::size_t i = 0; i < up.size(); i++) layer.up[i] = up[i].linear;
        layer.out = out.linear, layer.down = down.linear;
        layer.fused_in = in.size() == 1 && !cross, layer.cross = cross, layer.gated = up.size() == 2;
        layer.function = sqap::function_of(function);
        layer.heads = heads, layer.kv_heads = kv_heads, layer.head_dim = head_dim, layer.causal = causal;
        sqap::check(layer);
        const int64_t width = layer.in[0].weight.k;
        layer.norm1 = norm1.of(width), layer.norm2 = norm2.of(width);
        layer.gain1 = sqap::values_or_null<float>("a gain", gain1, {width});
        layer.gain2 = sqap::values_or_null<float>("a gain", gain2, {width});
    }

    void call(const Array& x, const Array& y, int64_t batch, int64_t tokens, const Array& cos, const Array& sin,
              const Array& rows, const Array& received, const Array& keys, const Array& values, int64_t first,
              const BoundPrefix* prefix) const {
        sqap::require(prefix == nullptr ? !layer.cross : rows.first == 0 && keys.first == 0 && first == 0,
                      "behind a prefix, and only there, a layer may be without keys of its own, and nothing is kept or left out");
        sqap::require(first >= 0 && first <= tokens, "the first token that is wanted is none of them");
        sqap::require(first == 0 || (batch == 1 && !layer.fused_in && rows.first == 0),
                      "a part of the tokens is wanted of one observation, of a layer with queries of their own, without rows");
        sqap::require((cos.first == 0) == (sin.first == 0), "there are cosines without sines, or sines without cosines");
        sqap::require((keys.first == 0) == (values.first == 0), "there is room for keys without values, or for values without keys");
        const int64_t width = layer.in[0].weight.k, head_dim = layer.head_dim;
        sqap::Tokens t{sqap::values_of<float>("inputs", x, {batch, tokens, width}),
                       sqap::values_of<float>("outputs", y, {batch, tokens - first, width}), batch, tokens};
        t.first = first;
        t.cos = sqap::values_or_null<float>("cosines", cos, {batch, tokens, head_dim});
        t.sin = sqap::values_or_null<float>("sines", sin, {batch, tokens, head_dim});
        t.rows = sqap::values_or_null<uint8_t>("rows", rows, {tokens});
        if (t.rows != nullptr) t.received = sqap::values_of<float>("what rows attend to", received, {batch, tokens});
        t.keys = sqap::values_or_null<float>("keys", keys, {batch, layer.kv_heads, tokens, head_dim});
        t.values = sqap::values_or_null<float>("values", values, {batch, layer.kv_heads, tokens, head_dim});
        if (prefix != nullptr) {
            prefix->check(path, layer, batch, layer.cross ? 0 : tokens);
            t.prefix = &prefix->prefix;
        }
        if (batch > 0 && tokens > 0) run([&] { path->layer(layer, t); });
    }
};

// Keys (turned) and values of a prefix in the tiles of the layer's path, in `tiles`, which has room for both.
BoundPrefix pack(const BoundLayer& bound, const Array& keys, const Array& values, int64_t batch, int64_t length,
                 int64_t room, const Array& tiles) {
    const int64_t kv_heads = bound.layer.kv_heads, head_dim = bound.layer.head_dim;
    sqap::require(batch > 0 && length > 0 && room >= 0, "a prefix has at least one token");
    sqap::bytes_of(sizeof(float), {batch, kv_heads, length, head_dim});
    sqap::require(room <= INT32_MAX && length <= INT32_MAX, "a prefix is too long");
    BoundPrefix found{bound.path, batch, kv_heads, {nullptr, nullptr, length, room, head_dim}};
    sqap::Prefix& prefix = found.prefix;
    prefix.keys = sqap::values_of<float>("tiles", tiles, {2, batch * kv_heads, prefix.block()});
    prefix.values = prefix.keys + batch * kv_heads * prefix.block();
    const auto* k = sqap::values_of<float>("a prefix's keys", keys, {batch, kv_heads, length, head_dim});
    const auto* v = sqap::values_of<float>("a prefix's values", values, {batch, kv_heads, length, head_dim});
    run([&] { bound.path->pack(bound.layer, k, v, batch, prefix); });
    return found;
}

// What rows would attend to in each of some layers.
void look(const std::vector<const BoundLayer*>& bound, const Array& x, int64_t tokens, const Array& cos, const Array& sin,
          const Array& rows, const Array& received) {
    sqap::require(!bound.empty(), "there are no layers to look at");
    std::vector<const sqap::Layer*> layers;
    const sqap::Layer& first = bound.front()->layer;
    for (const BoundLayer* b : bound) {
        sqap::require(b->path == bound.front()->path, "layers to look at run on different paths");
        sqap::require(!b->layer.fused_in && !b->layer.cross, "layers to look at have queries and keys of their own");
        sqap::require(b->layer.in[0].weight.k == first.in[0].weight.k && b->layer.head_dim == first.head_dim,
                      "layers to look at differ in width");
        layers.push_back(&b->layer);
    }
    sqap::Tokens t{sqap::values_of<float>("inputs", x, {tokens, first.in[0].weight.k}), nullptr, 1, tokens};
    t.cos = sqap::values_of<float>("cosines", cos, {tokens, first.head_dim});
    t.sin = sqap::values_of<float>("sines", sin, {tokens, first.head_dim});
    t.rows = sqap::values_of<uint8_t>("rows", rows, {tokens});
    t.received = sqap::values_of<float>("what rows attend to", received, {tokens});
    run([&] { bound.front()->path->look(layers.data(), static_cast<int64_t>(layers.size()), t); });
}

void matmul(const std::string& path, const Array& q, int64_t m, int64_t k, const Array& weight, int weight_bits,
            int64_t n, const Array& y) {
    const Path& chosen = find(path);
    const sqap::Weight w = sqap::weight_of(weight, weight_bits, n, k);
    auto* levels = sqap::values_of<int8_t>("levels", q, {m, k});
    auto* sums = sqap::values_of<int32_t>("products", y, {m, n});
    run([&] { chosen.matmul(levels, m, w, sums); });
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("paths", paths, "Paths that run on this processor, the fastest first.");
    module.def("compiled", compiled, "Paths that were compiled.");
    module.def("threads", threads, "How many threads a product uses: as many as PyTorch's.");
    module.def("release_team", sqap::release_team, "Ends the OpenMP threads that the calling thread has started.");
    module.def("matmul", matmul);
    module.def("look", look);
    module.def("pack", pack);
    module.def("block", [](int64_t tokens, int64_t head_dim) {
        return sqap::Prefix{nullptr, nullptr, tokens, 0, head_dim}.block();
    }, "Floats of a block of a prefix's tiles.");
    nb::class_<BoundPrefix>(module, "Prefix");
    nb::class_<BoundNorm>(module, "Norm");
    module.def("norm", [](bool rms, const Array& weight, const Array& bias, float eps) {
        return BoundNorm{rms, weight, bias, eps};
    });
    nb::class_<BoundLinear>(module, "Linear")
        .def(nb::init<const std::string&, const Array&, int, int64_t, int64_t, const Array&, int64_t, bool,
                      const Array&, int, bool, int64_t, int64_t>())
        .def("__call__", &BoundLinear::multiply)
        .def("quantize", &BoundLinear::quantize);
    nb::class_<BoundLayer>(module, "Layer")
        .def(nb::init<const std::vector<BoundLinear>&, const BoundLinear&, const std::vector<BoundLinear>&,
                      const BoundLinear&, const BoundNorm&, const BoundNorm&, const Array&, const Array&, int, int64_t,
                      int64_t, int64_t, bool, bool>())
        .def("__call__", &BoundLayer::call, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
}

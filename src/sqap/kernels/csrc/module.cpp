// What sqap.kernels calls, which has checked its arguments: arrays come as addresses, since a small product takes
// less time than looking at five tensors; what does not change between calls is bound once.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "path.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

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

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

sqap::Dtype dtype(bool half) { return half ? sqap::Dtype::bf16 : sqap::Dtype::f32; }

// A linear and the path that it runs on.
struct BoundLinear {
    const Path* path;
    sqap::Linear linear;

    BoundLinear(const std::string& path, uintptr_t weight, int weight_bits, int64_t n, int64_t k, uintptr_t scale,
                int64_t groups, bool shared, uintptr_t bias, int bits, bool symmetric, int64_t group, int64_t hadamard)
        : path(&find(path)), linear{{pointer<uint8_t>(weight), n, k, weight_bits, pointer<float>(scale), groups, shared},
                                    pointer<float>(bias), bits, symmetric, group, hadamard} {}

    sqap::Activations activations(uintptr_t x, bool half, int64_t m, int function, uintptr_t times) const {
        return {pointer<void>(x), dtype(half), m, linear.weight.k, linear.bits, linear.symmetric, linear.group,
                nullptr, static_cast<sqap::Function>(function), pointer<void>(times), linear.hadamard};
    }

    void multiply(uintptr_t x, bool half, int64_t m, int function, uintptr_t times, uintptr_t y) const {
        nb::gil_scoped_release release;
        path->linear(activations(x, half, m, function, times), linear.weight,
                     {pointer<void>(y), dtype(half), linear.bias});
    }

    void quantize(uintptr_t x, bool half, int64_t m, int function, uintptr_t times, uintptr_t q, uintptr_t scale,
                  uintptr_t zero_point) const {
        nb::gil_scoped_release release;
        path->quantize(activations(x, half, m, function, times),
                       {pointer<int8_t>(q), pointer<float>(scale), pointer<int32_t>(zero_point)});
    }
};

sqap::Norm norm(bool rms, uintptr_t weight, uintptr_t bias, float eps) {
    return {rms ? sqap::Norm::rms : sqap::Norm::layer, pointer<float>(weight), pointer<float>(bias), eps};
}

// A layer and the path that it runs on.
struct BoundLayer {
    const Path* path;
    sqap::Layer layer{};

    BoundLayer(const std::vector<BoundLinear>& in, const BoundLinear& out, const std::vector<BoundLinear>& up,
               const BoundLinear& down, const sqap::Norm& norm1, const sqap::Norm& norm2, uintptr_t gain1,
               uintptr_t gain2, int function, int64_t heads, int64_t kv_heads, int64_t head_dim, bool causal)
        : path(out.path) {
        layer.norm1 = norm1, layer.norm2 = norm2;
        for (std::size_t i = 0; i < in.size(); i++) layer.in[i] = in[i].linear;
        for (std::size_t i = 0; i < up.size(); i++) layer.up[i] = up[i].linear;
        layer.out = out.linear, layer.down = down.linear;
        layer.fused_in = in.size() == 1, layer.gated = up.size() == 2;
        layer.gain1 = pointer<float>(gain1), layer.gain2 = pointer<float>(gain2);
        layer.function = static_cast<sqap::Function>(function);
        layer.heads = heads, layer.kv_heads = kv_heads, layer.head_dim = head_dim, layer.causal = causal;
    }

    void run(uintptr_t x, uintptr_t y, int64_t batch, int64_t tokens, uintptr_t cos, uintptr_t sin, uintptr_t rows,
             uintptr_t received, uintptr_t keys, uintptr_t values) const {
        nb::gil_scoped_release release;
        path->layer(layer, {pointer<float>(x), pointer<float>(y), batch, tokens, pointer<float>(cos),
                            pointer<float>(sin), pointer<uint8_t>(rows), pointer<float>(received),
                            pointer<float>(keys), pointer<float>(values)});
    }
};

void matmul(const std::string& path, uintptr_t q, int64_t m, int64_t k, uintptr_t weight, int weight_bits, int64_t n,
            uintptr_t y) {
    const Path& chosen = find(path);
    nb::gil_scoped_release release;
    chosen.matmul(pointer<int8_t>(q), m, {pointer<uint8_t>(weight), n, k, weight_bits, nullptr, 1, false},
                  pointer<int32_t>(y));
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("paths", paths, "Paths that run on this processor, the fastest first.");
    module.def("compiled", compiled, "Paths that were compiled.");
    module.def("threads", sqap::threads, "How many threads a product uses: as many as PyTorch's.");
    module.def("matmul", matmul);
    module.def("norm", norm);
    nb::class_<sqap::Norm>(module, "Norm");
    nb::class_<BoundLinear>(module, "Linear")
        .def(nb::init<const std::string&, uintptr_t, int, int64_t, int64_t, uintptr_t, int64_t, bool, uintptr_t, int,
                      bool, int64_t, int64_t>())
        .def("__call__", &BoundLinear::multiply)
        .def("quantize", &BoundLinear::quantize);
    nb::class_<BoundLayer>(module, "Layer")
        .def(nb::init<const std::vector<BoundLinear>&, const BoundLinear&, const std::vector<BoundLinear>&,
                      const BoundLinear&, const sqap::Norm&, const sqap::Norm&, uintptr_t, uintptr_t, int, int64_t,
                      int64_t, int64_t, bool>())
        .def("__call__", &BoundLayer::run);
}

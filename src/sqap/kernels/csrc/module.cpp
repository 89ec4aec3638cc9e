// What sqap.kernels calls, which has checked its arguments: arrays come as addresses, since a small product takes
// less time than looking at five tensors.

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

sqap::Activations activations(uintptr_t x, bool half, int64_t m, int64_t k, int bits, bool symmetric, int64_t group,
                              int function, uintptr_t times, int64_t hadamard) {
    return {pointer<void>(x), dtype(half), m, k, bits, symmetric, group, static_cast<sqap::Function>(function),
            pointer<void>(times), hadamard};
}

void quantize(const std::string& path, uintptr_t x, bool half, int64_t m, int64_t k, int bits, bool symmetric,
              int64_t group, int function, uintptr_t times, int64_t hadamard, uintptr_t q, uintptr_t scale,
              uintptr_t zero_point) {
    const Path& chosen = find(path);
    nb::gil_scoped_release release;
    chosen.quantize(activations(x, half, m, k, bits, symmetric, group, function, times, hadamard),
                    {pointer<int8_t>(q), pointer<float>(scale), pointer<int32_t>(zero_point)});
}

void linear(const std::string& path, uintptr_t x, bool half, int64_t m, int64_t k, int bits, bool symmetric,
            int64_t group, int function, uintptr_t times, int64_t hadamard, uintptr_t weight, int weight_bits,
            int64_t n, uintptr_t scale, int64_t groups, bool shared, uintptr_t bias, uintptr_t y) {
    const Path& chosen = find(path);
    nb::gil_scoped_release release;
    chosen.linear(activations(x, half, m, k, bits, symmetric, group, function, times, hadamard),
                  {pointer<uint8_t>(weight), n, k, weight_bits, pointer<float>(scale), groups, shared},
                  {pointer<void>(y), dtype(half), pointer<float>(bias)});
}

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
    module.def("quantize", quantize);
    module.def("linear", linear);
    module.def("matmul", matmul);
}

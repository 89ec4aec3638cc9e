// What Python sees. Arrays are those of PyTorch or NumPy, read and written in place.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
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
using Any = nb::ndarray<nb::device::cpu, nb::c_contig>;
using Levels = nb::ndarray<int8_t, nb::ndim<2>, nb::device::cpu, nb::c_contig>;
using Packed = nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu, nb::c_contig>;
using Floats = nb::ndarray<float, nb::ndim<2>, nb::device::cpu, nb::c_contig>;
using Bias = nb::ndarray<const float, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using Integers = nb::ndarray<int32_t, nb::ndim<2>, nb::device::cpu, nb::c_contig>;

// The fastest first.
const Path* const PATHS[] = {
#if defined(__x86_64__)
    &sqap::avx512vnni, &sqap::avxvnni, &sqap::avx2,
#elif defined(__aarch64__)
    &sqap::neon,
#endif
    &sqap::portable,
};

const Path& find(const std::string& name) {
    for (const Path* path : PATHS) {
        if (name == path->name && path->runs_here()) return *path;
    }
    throw std::invalid_argument("no path called " + name + " runs on this processor");
}

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

sqap::Dtype dtype(const Any& array) {
    if (array.dtype() == nb::dtype<float>()) return sqap::Dtype::f32;
    const auto found = array.dtype();
    require(found.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && found.bits == 16 && found.lanes == 1,
            "activations must be float32 or bfloat16");
    return sqap::Dtype::bf16;
}

sqap::Activations activations(const Any& x, int bits, bool symmetric, int64_t group) {
    require(x.ndim() == 2, "activations must have two dimensions");
    const auto k = static_cast<int64_t>(x.shape(1));
    require(k > 0, "activations must have channels");
    require(bits == 4 || bits == 8, "activations have 4 or 8 bits");
    require(group >= 0 && (group == 0 || k % group == 0), "the group size must divide the channels");
    return {x.data(), dtype(x), static_cast<int64_t>(x.shape(0)), k, bits, symmetric, group};
}

sqap::Weight weights(const Packed& weight, int bits, int64_t k) {
    require(bits == 4 || bits == 8, "weights have 4 or 8 bits");
    require(bits == 8 || k % 2 == 0, "channels of 4-bit weights come in pairs");
    require(static_cast<int64_t>(weight.shape(1)) == (bits == 4 ? k / 2 : k), "weight and activations do not fit");
    return {weight.data(), static_cast<int64_t>(weight.shape(0)), k, bits, nullptr, 1, false};
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

void quantize(const std::string& path, const Any& x, int bits, bool symmetric, int64_t group, Levels q, Floats scale,
              std::optional<Integers> zero_point) {
    const auto a = activations(x, bits, symmetric, group);
    const auto fits = [&](const auto& array, int64_t width) {
        return static_cast<int64_t>(array.shape(0)) == a.m && static_cast<int64_t>(array.shape(1)) == width;
    };
    require(fits(q, a.k) && fits(scale, a.groups()), "levels or scales have the wrong shape");
    require(symmetric != zero_point.has_value(), "zero points go with an asymmetric grid");
    require(!zero_point || fits(*zero_point, a.groups()), "zero points have the wrong shape");
    const sqap::Levels levels{q.data(), scale.data(), zero_point ? zero_point->data() : nullptr};
    const Path& chosen = find(path);
    nb::gil_scoped_release release;
    chosen.quantize(a, levels);
}

void linear(const std::string& path, const Any& x, const Packed& weight, const Floats& scale,
            const std::optional<Bias>& bias, const Any& y, int weight_bits, int bits, bool symmetric, int64_t group) {
    const auto a = activations(x, bits, symmetric, group);
    auto w = weights(weight, weight_bits, a.k);
    const auto rows = static_cast<int64_t>(scale.shape(0)), groups = static_cast<int64_t>(scale.shape(1));
    require((rows == w.n || (rows == 1 && groups == 1)) && groups > 0 && a.k % groups == 0, "scales do not fit the weight");
    require(weight_bits == 8 || a.k / groups % 2 == 0, "groups of 4-bit weights must be even");
    require(!bias || static_cast<int64_t>(bias->shape(0)) == w.n, "the bias does not fit the weight");
    require(y.ndim() == 2 && static_cast<int64_t>(y.shape(0)) == a.m && static_cast<int64_t>(y.shape(1)) == w.n,
            "the output has the wrong shape");
    w.scale = scale.data(), w.groups = groups, w.shared = rows != w.n || (rows == 1 && groups == 1);
    const sqap::Output out{y.data(), dtype(y), bias ? bias->data() : nullptr};
    const Path& chosen = find(path);
    nb::gil_scoped_release release;
    chosen.linear(a, w, out);
}

void matmul(const std::string& path, const Levels& q, const Packed& weight, Integers y, int weight_bits) {
    const auto w = weights(weight, weight_bits, static_cast<int64_t>(q.shape(1)));
    require(w.k > 0, "activations must have channels");
    require(y.shape(0) == q.shape(0) && static_cast<int64_t>(y.shape(1)) == w.n, "the output has the wrong shape");
    const Path& chosen = find(path);
    nb::gil_scoped_release release;
    chosen.matmul(q.data(), static_cast<int64_t>(q.shape(0)), w, y.data());
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("paths", paths, "Paths that run on this processor, the fastest first.");
    module.def("compiled", compiled, "Paths that were compiled.");
    module.def("threads", sqap::threads, "How many threads a product uses: as many as PyTorch's.");
    module.def("quantize", quantize, nb::arg("path"), nb::arg("x"), nb::arg("bits"), nb::arg("symmetric"),
               nb::arg("group"), nb::arg("q"), nb::arg("scale"), nb::arg("zero_point").none());
    module.def("linear", linear, nb::arg("path"), nb::arg("x"), nb::arg("weight"), nb::arg("scale"),
               nb::arg("bias").none(), nb::arg("y"), nb::arg("weight_bits"), nb::arg("bits"), nb::arg("symmetric"),
               nb::arg("group"));
    module.def("matmul", matmul, nb::arg("path"), nb::arg("q"), nb::arg("weight"), nb::arg("y"), nb::arg("weight_bits"));
}

// Every path that runs here against plain loops, without Python: for sanitizers, and for other processors under an
// emulator. Prints the paths that were checked.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "path.h"

namespace {

uint32_t state = 1;
uint32_t random_bits() { return state = state * 1664525u + 1013904223u; }
float random_float() { return static_cast<float>(random_bits() >> 8) / (1 << 23) - 1.0f; }

[[noreturn]] void fail(const char* path, const char* what, int bits, int64_t m, int64_t k, int64_t n) {
    std::printf("%s: %s differ (%d bits, %d tokens, %d to %d channels)\n", path, what, bits, static_cast<int>(m),
                static_cast<int>(k), static_cast<int>(n));
    std::exit(1);
}

int64_t level(const std::vector<uint8_t>& data, int bits, int64_t row_bytes, int64_t row, int64_t j) {
    if (bits == 8) return static_cast<int8_t>(data[row * row_bytes + j]);
    return ((data[row * row_bytes + j / 2] >> (j % 2 * 4)) & 15) - 8;
}

void check(const sqap::Path& path, int bits, int64_t m, int64_t k, int64_t n, int64_t groups, bool symmetric) {
    const int64_t row_bytes = bits == 4 ? k / 2 : k;
    std::vector<uint8_t> data(n * row_bytes);
    for (auto& byte : data) byte = static_cast<uint8_t>(random_bits() >> 24);
    std::vector<float> scale(n * groups), x(m * k), y(m * n), bias(n), a_scale(m);
    for (auto& value : scale) value = random_float() + 2;
    for (auto& value : x) value = random_float() + 0.25f;
    for (auto& value : bias) value = random_float();
    std::vector<int8_t> q(m * k);
    std::vector<int32_t> zero(m), sums(m * n);
    const sqap::Weight weight{data.data(), n, k, bits, scale.data(), groups, false};
    const sqap::Activations activations{x.data(), sqap::Dtype::f32, m, k, 8, symmetric, k};
    path.quantize(activations, {q.data(), a_scale.data(), symmetric ? nullptr : zero.data()});
    path.matmul(q.data(), m, weight, sums.data());
    path.linear(activations, weight, {y.data(), sqap::Dtype::f32, bias.data()});
    for (int64_t i = 0; i < m; i++) {
        for (int64_t r = 0; r < n; r++) {
            int64_t sum = 0;
            double value = bias[r], size = 1;
            for (int64_t j = 0; j < k; j++) {
                const int64_t w = level(data, bits, row_bytes, r, j);
                sum += w * q[i * k + j];
                const double term = static_cast<double>(a_scale[i]) * scale[r * groups + j * groups / k] * w *
                                    (q[i * k + j] - (symmetric ? 0 : zero[i]));
                value += term, size += std::fabs(term);
            }
            if (sum != sums[i * n + r]) fail(path.name, "products", bits, m, k, n);
            if (std::fabs(value - y[i * n + r]) > 1e-6 * size) fail(path.name, "outputs", bits, m, k, n);
        }
    }
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{1, 2, 1}, {1, 96, 70}, {3, 66, 17}, {5, 32, 33}, {16, 2080, 40}, {37, 160, 50}};
    for (const sqap::Path* path : sqap::PATHS) {
        if (!path->runs_here()) continue;
        for (const auto& [m, k, n] : shapes) {
            for (int bits : {4, 8}) {
                for (bool symmetric : {true, false}) {
                    check(*path, bits, m, k, n, 1, symmetric);
                    if (k % 32 == 0) check(*path, bits, m, k, n, k / 32, symmetric);
                }
            }
        }
        std::printf("%s\n", path->name);
    }
    return 0;
}

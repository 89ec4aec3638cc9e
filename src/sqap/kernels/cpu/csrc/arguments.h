// What Python hands over, looked at before it is used: arrays come as addresses, and nothing else says that one is as
// large as it should be.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "path.h"

namespace sqap {

// The address of an array's first byte, 0 of none, and how many bytes there are.
using Array = std::pair<uintptr_t, int64_t>;

inline void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

// Bytes of an array of so many values of `size` bytes each.
inline int64_t bytes_of(int64_t size, std::initializer_list<int64_t> sizes) {
    int64_t all = size;
    for (const int64_t count : sizes) {
        require(count >= 0 && !__builtin_mul_overflow(all, count, &all), "a size is negative or too large");
    }
    return all;
}

// The array's values, of which there must be as many as the sizes say.
template <class T>
T* values_of(const char* name, const Array& array, std::initializer_list<int64_t> sizes) {
    const int64_t needed = bytes_of(sizeof(T), sizes);
    const bool there = array.first != 0 || needed == 0;
    if (!there || array.second != needed) {
        const std::string has = there ? std::to_string(array.second) + " bytes" : "no bytes";
        throw std::invalid_argument(std::string(name) + ": " + has + " where " + std::to_string(needed) + " are needed");
    }
    return reinterpret_cast<T*>(array.first);
}

// The same, or null where there is no array.
template <class T>
T* values_or_null(const char* name, const Array& array, std::initializer_list<int64_t> sizes) {
    return array.first == 0 ? nullptr : values_of<T>(name, array, sizes);
}

// Values of a type that is known when it runs.
inline void* values_of(const char* name, const Array& array, Dtype dtype, std::initializer_list<int64_t> sizes) {
    if (dtype == Dtype::f32) return values_of<float>(name, array, sizes);
    return values_of<uint16_t>(name, array, sizes);
}

inline Function function_of(int number) {
    require(number >= 0 && number <= static_cast<int>(Function::gelu_tanh), "there is no such function");
    return static_cast<Function>(number);
}

inline Weight weight_of(const Array& data, int bits, int64_t n, int64_t k) {
    require(bits == 4 || bits == 8, "a weight has 4 or 8 bits");
    require(bits == 8 || k % 2 == 0, "a weight of 4 bits has an even number of input channels");
    Weight weight{nullptr, n, k, bits, nullptr, 1, false};
    weight.data = values_of<uint8_t>("a weight", data, {n, weight.row_bytes()});
    return weight;
}

// Whether grids, groups and Hadamard matrices fit the weight.
inline void check(const Linear& l) {
    const int64_t k = l.weight.k, groups = l.weight.groups;
    require(l.bits == 4 || l.bits == 8, "an activation has 4 or 8 bits");
    require(k > 0 && groups > 0 && k % groups == 0, "the groups of a weight do not divide its input channels");
    require(l.group >= 0 && (l.group == 0 || k % l.group == 0),
            "the groups of an activation do not divide its channels");
    require(l.weight.bits == 8 || (k / groups % 2 == 0 && l.group % 2 == 0),
            "with weights of 4 bits, a group has an even number of channels");
    require(l.hadamard > 0 && (l.hadamard & (l.hadamard - 1)) == 0 && k % l.hadamard == 0,
            "a Hadamard matrix has a power of two of channels, which divides a token's");
}

// Whether the linears of a layer fit each other; how many there are of `in` and `up`, it says itself.
inline void check(const Layer& l) {
    const int64_t width = l.in[0].weight.k, queries = l.heads * l.head_dim, keys = l.kv_heads * l.head_dim;
    require(l.heads > 0 && l.kv_heads > 0 && l.heads % l.kv_heads == 0, "key heads do not divide query heads");
    require(l.head_dim > 0 && l.head_dim % 8 == 0, "a head's width must be a multiple of 8");
    if (l.cross) {
        require(!l.fused_in && l.in[0].weight.n == queries, "queries do not fit the heads");
        require(!l.causal, "a prefix has no order that queries of a layer without keys could keep");
    } else if (l.fused_in) {
        require(l.in[0].weight.n == queries + 2 * keys, "queries, keys and values do not fit the heads");
    } else {
        require(l.in[0].weight.n == queries && l.in[1].weight.n == keys && l.in[2].weight.n == keys &&
                    l.in[1].weight.k == width && l.in[2].weight.k == width,
                "queries, keys and values do not fit the heads");
    }
    require(l.out.weight.k == queries && l.out.weight.n == width, "the output projection does not fit the heads");
    require(l.up[0].weight.k == width && l.down.weight.k == l.up[0].weight.n && l.down.weight.n == width,
            "the MLP does not fit the layer's width");
    require(!l.gated || (l.up[1].weight.k == width && l.up[1].weight.n == l.up[0].weight.n),
            "the MLP's gate does not fit what it multiplies");
}

}  // namespace sqap

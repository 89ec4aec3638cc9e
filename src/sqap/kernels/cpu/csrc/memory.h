// Working memory that every thread keeps, so that a step allocates nothing once it has run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sqap {

enum class Slot {
    row, rows, levels, scales, zero_points, token_scales, token_zeros, packed, sums,  // of the activations
    tile_scales, tile_offsets,
    panel, panel_scales, panel_sums, acc, total,                  // of the output channels at work
    in, mixed, hidden, received, keys, values, queries, weights, chunk,  // of a layer
    count
};

// At least `bytes` bytes at a multiple of 64: the calling thread's, until it asks for the same slot again.
void* buffer(Slot slot, std::size_t bytes);

template <class T>
T* buffer(Slot slot, int64_t count) {
    return static_cast<T*>(buffer(slot, static_cast<std::size_t>(count) * sizeof(T)));
}

}  // namespace sqap

// Working memory that every thread keeps, so that a step allocates nothing once it has run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sqap {

enum class Slot { levels, scales, zero_points, packed, sums, panel, acc, total, count };

// At least `bytes` bytes at a multiple of 64: the calling thread's, until it asks for the same slot again.
void* buffer(Slot slot, std::size_t bytes);

template <class T>
T* buffer(Slot slot, int64_t count) {
    return static_cast<T*>(buffer(slot, static_cast<std::size_t>(count) * sizeof(T)));
}

}  // namespace sqap

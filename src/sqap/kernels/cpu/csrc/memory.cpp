#include "memory.h"

#include <cstdlib>
#include <new>

namespace sqap {
namespace {

struct Buffers {
    void* data[static_cast<int>(Slot::count)] = {};
    std::size_t size[static_cast<int>(Slot::count)] = {};

    ~Buffers() {
        for (void* one : data) std::free(one);
    }
};

thread_local Buffers buffers;

}  // namespace

void* buffer(Slot slot, std::size_t bytes) {
    const int i = static_cast<int>(slot);
    if (buffers.size[i] < bytes || buffers.data[i] == nullptr) {
        std::free(buffers.data[i]);
        buffers.size[i] = 0;
        const std::size_t rounded = (bytes + 64) / 64 * 64;
        buffers.data[i] = std::aligned_alloc(64, rounded);
        if (buffers.data[i] == nullptr) throw std::bad_alloc();
        buffers.size[i] = rounded;
    }
    return buffers.data[i];
}

}  // namespace sqap

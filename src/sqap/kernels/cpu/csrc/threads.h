// Parallel loops on the threads that PyTorch has already.
#pragma once

#include <cstdint>

namespace sqap {

// Calls body(context, task) for every task below `tasks`, in no order, from several threads at a time. What one of the
// calls throws, this throws when all threads are done; tasks that had not begun by then are left out.
void parallel(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

// How many threads a loop uses.
int threads();

template <class Body>
void parallel(int64_t tasks, Body body) {
    parallel(tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

}  // namespace sqap

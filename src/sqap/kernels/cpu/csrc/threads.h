// Parallel loops on the threads that PyTorch has already.
#pragma once

#include <cstdint>

namespace sqap {

// Calls body(context, task) for every task below `tasks`, in no order, from several threads at a time. What one of the
// calls throws, this throws when all threads are done; tasks that had not begun by then are left out.
void parallel(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

// How many threads a loop uses.
int threads();

// Ends the threads that the calling thread's loops have started; its next loop starts them again.
//
// While all teams of the process together have more threads than there are cores, libgomp lets a thread that waits
// for its team sleep at once instead of spinning. So a team that is idle slows down the loops of every other thread.
void release_team();

template <class Body>
void parallel(int64_t tasks, Body body) {
    parallel(tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

}  // namespace sqap

// A second pool of threads beside PyTorch's would fight it for the cores: an OpenMP thread spins for a while
// after each of PyTorch's loops, and ours would after each of ours. So the loops run in the team of the OpenMP
// runtime that is loaded already, through libgomp's interface, which LLVM's and Intel's runtimes have too. Where
// there is none, they run in the calling thread.

#include "threads.h"

#include <dlfcn.h>
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <string>

namespace sqap {
namespace {

struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
    int (*pause)(int) = nullptr;  // libgomp's
};

void note_library(const char* library, std::string& path) {
    const char* file = std::strrchr(library, '/');
    if (file == nullptr) return;
    for (const char* name : {"/libgomp", "/libomp", "/libiomp"}) {
        if (std::strncmp(file, name, std::strlen(name)) == 0) {
            // PyTorch's own, where another package has brought one too.
            if (path.empty() || std::strstr(library, "torch") != nullptr) path = library;
        }
    }
}

// The OpenMP runtime among the libraries that are loaded; empty if there is none.
std::string runtime_path() {
    std::string path;
#if defined(__APPLE__)
    for (uint32_t i = 0; i < _dyld_image_count(); i++) {
        const char* library = _dyld_get_image_name(i);
        if (library != nullptr) note_library(library, path);  // another thread may have closed it meanwhile
    }
#else
    const auto note = [](dl_phdr_info* info, size_t, void* found) {
        note_library(info->dlpi_name, *static_cast<std::string*>(found));
        return 0;
    };
    dl_iterate_phdr(note, &path);
#endif
    return path;
}

Runtime find_runtime() {
    const std::string path = runtime_path();
    Runtime found;
    void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return found;
    found.max_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
    found.in_parallel = reinterpret_cast<int (*)()>(dlsym(library, "omp_in_parallel"));
    if (found.max_threads != nullptr && found.in_parallel != nullptr) {
        found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    }
    // LLVM's runtime stops the teams of all threads, and has no such limit to spinning.
    if (path.find("/libgomp") != std::string::npos) {
        found.pause = reinterpret_cast<int (*)(int)>(dlsym(library, "omp_pause_resource_all"));
    }
    return found;
}

const Runtime& runtime() {
    static const Runtime found = find_runtime();
    return found;
}

struct Loop {
    int64_t tasks;
    void (*body)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure = nullptr;  // the first one
};

// An exception must not leave the OpenMP runtime, which would end the process: it waits for the caller.
void work(void* shared) {
    auto& loop = *static_cast<Loop*>(shared);
    try {
        for (int64_t task; (task = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;) {
            loop.body(loop.context, task);
        }
    } catch (...) {
        loop.next.store(loop.tasks, std::memory_order_relaxed);  // the rest is not wanted any more
        if (!loop.failed.exchange(true)) loop.failure = std::current_exception();
    }
}

}  // namespace

int threads() { return runtime().parallel != nullptr ? runtime().max_threads() : 1; }

void release_team() {
    constexpr int SOFT = 1;  // omp_pause_soft
    if (runtime().pause != nullptr) runtime().pause(SOFT);  // does nothing inside a loop
}

void parallel(int64_t tasks, void (*body)(void*, int64_t), void* context) {
    Loop loop{tasks, body, context};
    const int64_t team = std::min<int64_t>(threads(), tasks);
    if (team <= 1 || runtime().in_parallel()) {
        work(&loop);
    } else {
        runtime().parallel(work, &loop, static_cast<unsigned>(team), 0);
    }
    if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace sqap

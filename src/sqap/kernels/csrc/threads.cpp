// A second pool of threads beside PyTorch's would fight it for the cores: an OpenMP thread spins for a while
// after each of PyTorch's loops, and ours would after each of ours. So the loops run in the team of the OpenMP
// runtime that is loaded already, through libgomp's interface, which LLVM's and Intel's runtimes have too. Where
// there is none, they run in the calling thread.

#include "threads.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

namespace sqap {
namespace {

struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;
};

int note_library(dl_phdr_info* info, size_t, void* found) {
    const char* file = std::strrchr(info->dlpi_name, '/');
    if (file == nullptr) return 0;
    for (const char* name : {"/libgomp", "/libomp", "/libiomp"}) {
        if (std::strncmp(file, name, std::strlen(name)) == 0) {
            auto* path = static_cast<std::string*>(found);
            // PyTorch's own, where another package has brought one too.
            if (path->empty() || std::strstr(info->dlpi_name, "torch") != nullptr) *path = info->dlpi_name;
        }
    }
    return 0;
}

Runtime find_runtime() {
    std::string path;
    dl_iterate_phdr(note_library, &path);
    Runtime found;
    void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return found;
    found.max_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
    found.in_parallel = reinterpret_cast<int (*)()>(dlsym(library, "omp_in_parallel"));
    if (found.max_threads != nullptr && found.in_parallel != nullptr) {
        found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
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
};

void work(void* shared) {
    auto& loop = *static_cast<Loop*>(shared);
    for (int64_t task; (task = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;) {
        loop.body(loop.context, task);
    }
}

}  // namespace

int threads() { return runtime().parallel != nullptr ? runtime().max_threads() : 1; }

void parallel(int64_t tasks, void (*body)(void*, int64_t), void* context) {
    Loop loop{tasks, body, context};
    const int64_t team = std::min<int64_t>(threads(), tasks);
    if (team <= 1 || runtime().in_parallel()) {
        work(&loop);
    } else {
        runtime().parallel(work, &loop, static_cast<unsigned>(team), 0);
    }
}

}  // namespace sqap

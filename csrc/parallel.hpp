// Distributes rows over the threads of OpenMP. The caller passes the number of threads, which is torch's. A single
// thread runs without a parallel region.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pydistill {

// A forked child inherits the bookkeeping of the thread pool, but not its threads, and would hang if it used it.
inline bool& in_forked_child() {
  static bool forked = false;
  return forked;
}
inline void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child() = true; });
  (void)registered;
#endif
}

inline int usable_threads(int threads) {
#if defined(_OPENMP)
  return in_forked_child() ? 1 : std::max(1, threads);
#else
  (void)threads;
  return 1;
#endif
}

// The number of shares that the rows are divided into, one per thread.
inline int row_shares(int64_t rows, int64_t elements, int threads) {
  constexpr int64_t elements_per_thread = 32768;  // for fewer elements, waking a thread costs more than it saves
  const int64_t useful = std::min(rows, elements / elements_per_thread);
  return int(std::min<int64_t>(usable_threads(threads), std::max<int64_t>(1, useful)));
}

// Throws std::bad_alloc if there is no memory to start `threads` threads. Otherwise libgomp would end the process.
inline void check_memory_for_threads(int threads) {
#if defined(_OPENMP) && defined(__linux__)
  thread_local int started = 1;  // each calling thread has its own pool, which shrinks if it runs a smaller team
  if (threads > started) {
    constexpr size_t bookkeeping = size_t(64) << 10;  // freed below, so that libgomp can allocate the memory
    const std::unique_ptr<char[]> small(new char[bookkeeping]);
    size_t stack = 0;
    pthread_attr_t attributes;
    if (pthread_getattr_default_np(&attributes) != 0) throw std::bad_alloc();
    pthread_attr_getstacksize(&attributes, &stack);
    pthread_attr_destroy(&attributes);
    const size_t bytes = size_t(threads - started) * stack;
    void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    munmap(stacks, bytes);
  }
  started = threads;
#else
  (void)threads;
#endif
}

// Calls f(share, begin, end) for contiguous shares of [0, rows). f must not throw: an exception that leaves a
// parallel region ends the process.
template <class F>
void for_row_shares(int64_t rows, int shares, F f) {
  if (shares == 1) return f(0, int64_t(0), rows);
  check_memory_for_threads(shares);
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(shares)
  for (int share = 0; share < shares; ++share) f(share, rows * share / shares, rows * (share + 1) / shares);
#endif
}

}  // namespace pydistill

// Rows over threads. The number comes from torch; one thread means no parallel region at all.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pydistill {

// A forked child inherits the thread pool's bookkeeping but not its threads: using the pool there hangs.
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

// f(begin, end) on contiguous shares of [0, rows).
template <class F>
void for_row_ranges(int64_t rows, int64_t elements, int threads, F f) {
  constexpr int64_t elements_per_thread = 32768;  // below that, waking a thread costs more than it saves
  const int64_t useful = std::min(rows, elements / elements_per_thread);
  const int n = int(std::min<int64_t>(usable_threads(threads), std::max<int64_t>(1, useful)));
  if (n == 1) return f(int64_t(0), rows);
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(n)
  for (int part = 0; part < n; ++part) f(rows * part / n, rows * (part + 1) / n);
#endif
}

}  // namespace pydistill

// Memory: the arrays of a call, allocated or beside a guard page. Touching the guard page, a byte before the first
// or after the last element, ends the program.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace pydistill::driver {

class GuardedPages {
 public:
  explicit GuardedPages(size_t capacity) {
    page_ = size_t(sysconf(_SC_PAGESIZE));
    capacity_ = (capacity + page_ - 1) / page_ * page_;
    void* mapped = mmap(nullptr, capacity_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    start_ = static_cast<char*>(mapped) + page_;
    if (mprotect(start_, capacity_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  ~GuardedPages() { munmap(start_ - page_, capacity_ + 2 * page_); }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  size_t capacity() const { return capacity_; }
  char* after_guard() const { return start_; }
  char* before_guard(size_t bytes) const { return start_ + capacity_ - bytes; }

 private:
  size_t page_, capacity_;
  char* start_;
};

enum class Place { allocator, before_guard, after_guard };

// One array for each role, allocated anew by every call of place().
class Memory {
 public:
  explicit Memory(Place where) : where_(where) {}

  // A copy of `values`; null if there are none.
  template <class T>
  T* place(size_t role, const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    char* to = array(role, values.size() * sizeof(T));
    std::memcpy(to, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<T*>(to);
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p); }
  };

  char* array(size_t role, size_t bytes) {
    if (where_ == Place::allocator) {
      allocated_.at(role).reset(static_cast<char*>(::operator new(bytes)));
      return allocated_[role].get();
    }
    std::unique_ptr<GuardedPages>& pages = guarded_.at(role);
    if (!pages || pages->capacity() < bytes) pages = std::make_unique<GuardedPages>(bytes);
    return where_ == Place::before_guard ? pages->before_guard(bytes) : pages->after_guard();
  }

  Place where_;
  std::array<std::unique_ptr<char, Free>, 16> allocated_;
  std::array<std::unique_ptr<GuardedPages>, 16> guarded_;
};

}  // namespace pydistill::driver

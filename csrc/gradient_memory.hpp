// GradientMemory: memory for a large gradient, reused in the next step. To get new pages from the system takes as
// long as the kernel. Therefore the largest buffer is kept when its owner frees it; the system may reclaim the
// pages of a kept buffer if it needs them (MADV_FREE).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pydistill {

class GradientMemory {
 public:
  explicit GradientMemory(size_t bytes) : bytes_(bytes) {
    Pages* kept = kept_pages().exchange(nullptr);
    if (kept && kept->bytes < bytes) keep(std::exchange(kept, nullptr));
    pages_ = kept ? kept : map(bytes);
    if (!pages_) {  // the kept buffer counts towards a limit on the address space, so release it and try again
      release();
      pages_ = map(bytes);
    }
    if (!pages_) throw std::bad_alloc();
  }
  ~GradientMemory() { keep(pages_); }
  GradientMemory(const GradientMemory&) = delete;
  GradientMemory& operator=(const GradientMemory&) = delete;

  void* data() const { return pages_->data; }
  size_t bytes() const { return bytes_; }

  // Returns the kept buffer to the system.
  static void release() { unmap(kept_pages().exchange(nullptr)); }

 private:
  struct Pages {
    void* data;
    size_t bytes;
  };

  // The kept buffer, or null. It is exchanged atomically: a forked child could inherit a lock in its locked state.
  static std::atomic<Pages*>& kept_pages() {
    static std::atomic<Pages*> pages{nullptr};
    return pages;
  }

  // Keeps the larger of this buffer and the kept one. The size is read first: once the pointer is in kept_pages(),
  // another thread may take and free the buffer.
  static void keep(Pages* pages) {
#if defined(__linux__)
    madvise(pages->data, pages->bytes, MADV_FREE);
    size_t bytes = pages->bytes;
    for (Pages* other = kept_pages().exchange(pages); other; other = kept_pages().exchange(pages)) {
      if (other->bytes <= bytes) return unmap(other);
      pages = other, bytes = other->bytes;
    }
#else
    unmap(pages);
#endif
  }

#if defined(__linux__)
  // Maps whole huge pages, aligned to huge pages. Returns null if there is no memory.
  static Pages* map(size_t bytes) {
    constexpr size_t huge_page = size_t(2) << 20;
    if (bytes > std::numeric_limits<size_t>::max() - 2 * huge_page) return nullptr;
    const size_t size = (bytes + huge_page - 1) / huge_page * huge_page;
    std::unique_ptr<Pages> pages(new (std::nothrow) Pages);
    if (!pages) return nullptr;
    void* mapped = mmap(nullptr, size + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* start = static_cast<char*>(mapped);
    const size_t before = (huge_page - reinterpret_cast<uintptr_t>(start) % huge_page) % huge_page;
    if (before > 0) munmap(start, before);
    munmap(start + before + size, huge_page - before);
    madvise(start + before, size, MADV_HUGEPAGE);
    *pages = {start + before, size};
    return pages.release();
  }
  static void unmap(Pages* pages) {
    if (!pages) return;
    munmap(pages->data, pages->bytes);
    delete pages;
  }
#else
  static Pages* map(size_t bytes) {
    std::unique_ptr<Pages> pages(new (std::nothrow) Pages);
    void* data = pages ? ::operator new(bytes, std::align_val_t(64), std::nothrow) : nullptr;
    if (!data) return nullptr;
    *pages = {data, bytes};
    return pages.release();
  }
  static void unmap(Pages* pages) {
    if (!pages) return;
    ::operator delete(pages->data, std::align_val_t(64));
    delete pages;
  }
#endif

  Pages* pages_;
  size_t bytes_;
};

}  // namespace pydistill

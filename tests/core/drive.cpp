// core_driver SECTION...: tests of the core without Python, for sanitizers. tests/core/run builds and runs it.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "sections.hpp"

extern "C" [[gnu::weak]] void __sanitizer_set_death_callback(void (*callback)());

namespace pydistill::driver {
namespace {

int failures = 0;
const Call* current = nullptr;

void print_current() {
  if (current) std::fprintf(stderr, "the current call: %s\n", describe(*current).c_str());
}

struct Section {
  const char* name;
  std::string (*run)();
};
constexpr Section kSections[] = {
    {"calls", check_calls},     {"large", check_large},
    {"invalid", check_invalid}, {"allocations", check_allocations},
    {"threads", check_threads}, {"fork", check_fork},
};

int usage() {
  std::fprintf(stderr, "usage: core_driver SECTION... | plant overflow|guard|undefined|race|free; sections:");
  for (const Section& section : kSections) std::fprintf(stderr, " %s", section.name);
  std::fprintf(stderr, "\n");
  return 2;
}

bool run_section(const char* name) {
  for (const Section& section : kSections) {
    if (std::strcmp(section.name, name) != 0) continue;
    const auto start = std::chrono::steady_clock::now();
    const std::string done = section.run();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%s: %s, %.0f s\n", name, done.c_str(), elapsed.count());
    std::fflush(stdout);
    return true;
  }
  return false;
}

}  // namespace

void fail(const std::string& message) {
  std::fprintf(stderr, "FAILED: %s\n", message.c_str());
  if (++failures == 20) std::_Exit(1);
}

void set_current(const Call* call) { current = call; }

int main(int argc, char** argv) {
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(print_current);
  if (argc == 3 && std::strcmp(argv[1], "plant") == 0) {
    std::printf("planted %s, and no sanitizer reported it\n", plant(argv[2]).c_str());
    return 0;
  }
  if (argc < 2) return usage();
  for (int i = 1; i < argc; ++i)
    if (!run_section(argv[i])) return usage();
  return failures > 0;
}

}  // namespace pydistill::driver

int main(int argc, char** argv) { return pydistill::driver::main(argc, argv); }

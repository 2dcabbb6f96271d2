// Memory of the operations: scratch that threads keep, and huge pages for weights.

#pragma once

#include <ATen/ATen.h>

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace {

constexpr std::size_t kHugePage = 2 << 20;
constexpr std::int64_t kLine = 64;  // bytes

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Memory that this thread keeps between calls, as fresh pages would cost more than many a product.
template <typename T>
T* scratch(std::int64_t count) {
  static thread_local std::unique_ptr<T[], decltype(&std::free)> kept{nullptr, std::free};
  static thread_local std::int64_t size = 0;
  if (size < count) {
    kept.reset();
    size = 0;  // nothing is left if there is no memory
    void* memory = std::aligned_alloc(kLine, round_up(count * sizeof(T), kLine));
    if (!memory) throw std::bad_alloc();
    kept.reset(static_cast<T*>(memory));
    size = count;
  }
  return kept.get();
}

// Several arrays in one scratch memory: `add` says at which byte each begins.
struct Arrays {
  std::int64_t bytes = 0;

  template <typename T>
  std::int64_t add(std::int64_t count) {
    const std::int64_t start = bytes;
    bytes += round_up(count * sizeof(T), kLine);
    return start;
  }
};

// Memory of which a step reads every byte: in huge pages where Linux has some to give, since with
// small ones it would wait for addresses to be translated as much as for the bytes themselves.
at::Tensor in_huge_pages(std::int64_t count, const at::TensorOptions& options) {
  const std::size_t bytes = count * options.dtype().itemsize();
  if (bytes < kHugePage) return at::empty({count}, options);
  void* memory = nullptr;
  if (posix_memalign(&memory, kHugePage, bytes)) throw std::bad_alloc();
  madvise(memory, bytes, MADV_HUGEPAGE);  // an error leaves the pages small
  return at::from_blob(memory, {count}, &std::free, options);
}

}  // namespace

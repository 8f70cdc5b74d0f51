// Pages of memory that nobody has written yet.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jepa_fast {

// Lets the kernel back [data, data + bytes) with pages of 2 MB where it has not done so with small
// ones: a fault for each 4 KB can cost more than what is written there. Only a hint, which does
// nothing to memory that is in use, and is refused where a system allows no such pages.
inline void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void expect_writes(const torch::stable::Tensor& out) {
  expect_writes(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
}

}  // namespace jepa_fast

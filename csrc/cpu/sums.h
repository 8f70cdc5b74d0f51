// Sums over a row, and rows in the type that they are computed in.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "rows.h"

namespace jepa_fast {
namespace {

// Sums that run side by side: one alone would wait for its own additions, and round hundreds of times.
constexpr int64_t kLanes = 32;

// The sum of `term(i)`, which may also write: every i comes once, in order.
template <typename T, typename Term>
inline __attribute__((always_inline)) double sum_over(int64_t width, Term&& term) {
  T lanes[kLanes] = {};
  int64_t begin = 0;
  for (; begin + kLanes <= width; begin += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += term(begin + j);
  }
  for (int64_t j = 0; begin + j < width; ++j) lanes[j] += term(begin + j);
  double parts[4] = {};
  for (int64_t j = 0; j < kLanes; j += 8) {
    for (int64_t k = 0; k < 4; ++k) {
      parts[k] += static_cast<double>(lanes[j + k]) + static_cast<double>(lanes[j + k + 4]);
    }
  }
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

// `row` in the compute type: itself, or a copy in `scratch`.
template <typename T, typename From>
const T* widened(const From* row, std::vector<T>& scratch) {
  if constexpr (std::is_same_v<T, From>) {
    return row;
  } else {
    convert_row(scratch.data(), row, scratch.size());
    return scratch.data();
  }
}

}  // namespace
}  // namespace jepa_fast

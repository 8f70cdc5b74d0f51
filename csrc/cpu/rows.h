// Tokens as rows of memory, and patch indices into them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../common/floating.h"
#include "clones.h"

namespace jepa_fast {

using torch::stable::Tensor;

// A tensor [A, R, D] whose last dimension has no gaps.
struct Rows {
  char* data;
  int64_t outer, inner;  // bytes from one to the next
  int64_t count, width;  // R, D
  int64_t bytes;         // of a row

  explicit Rows(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        outer(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())),
        inner(tensor.stride(1) * static_cast<int64_t>(tensor.element_size())),
        count(tensor.size(1)),
        width(tensor.size(2)),
        bytes(tensor.size(2) * static_cast<int64_t>(tensor.element_size())) {}

  char* at(int64_t a, int64_t r) const { return data + a * outer + r * inner; }

  template <typename T>
  T* row(int64_t a, int64_t r) const {
    return reinterpret_cast<T*>(at(a, r));
  }
};

// A row that is read next lies wherever the index says, so the hardware does not see it coming.
inline void prefetch_row(const void* row, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// How many rows of `width` elements are worth a thread of their own.
inline int64_t row_grain(int64_t width) {
  constexpr int64_t kElements = 16384;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
}

// The values of a contiguous int32 or int64 tensor. Throws std::out_of_range where one is not in
// [0, size); the caller says which.
inline std::vector<int64_t> read_index(const Tensor& index, int64_t size) {
  std::vector<int64_t> values(index.numel());
  const auto read = [&](const auto* data) {
    bool inside = true;
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = data[i];
      inside &= values[i] >= 0 && values[i] < size;
    }
    if (!inside) throw std::out_of_range("an index is out of range");
  };
  if (index.scalar_type() == ScalarType::Int) {
    read(static_cast<const int32_t*>(index.const_data_ptr()));
  } else {
    read(static_cast<const int64_t*>(index.const_data_ptr()));
  }
  return values;
}

// For each row of a table, the places whose index names it, in ascending order: a counting sort.
struct Inverse {
  std::vector<int64_t> first;  // [rows + 1]
  std::vector<int64_t> place;

  // `row_of(i)` for the i-th of `places`.
  template <typename RowOf>
  Inverse(int64_t rows, int64_t places, RowOf&& row_of) : first(rows + 1), place(places) {
    for (int64_t i = 0; i < places; ++i) ++first[row_of(i) + 1];
    for (int64_t r = 0; r < rows; ++r) first[r + 1] += first[r];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < places; ++i) place[next[row_of(i)]++] = i;
  }
};

// Clones are of one file each: those of several files would not link.
namespace {

template <typename To, typename From>
JEPA_FAST_CLONES void convert_row(To* to, const From* from, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    to[i] = static_cast<To>(static_cast<Compute<From>>(from[i]));
  }
}

template <typename Sum, typename From>
JEPA_FAST_CLONES void add_row(Sum* sum, const From* from, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] += static_cast<Sum>(static_cast<Compute<From>>(from[i]));
}

}  // namespace
}  // namespace jepa_fast

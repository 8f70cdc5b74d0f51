// Panels of 32 columns, for the products of panel_product.h: to them and from them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "../common/floating.h"
#include "clones.h"
#include "pages.h"
#include "panel_product.h"

namespace jepa_fast {
// Clones are of one file each: those of several files would not link.
namespace {

constexpr int64_t kSlots = 16;  // floats of the widest vector

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// A row of any floating dtype (or of bytes), times `scale`, into one row of each panel.
template <typename From>
JEPA_FAST_CLONES void read_row(
    float* to, int64_t panel_stride, const void* row, int64_t width, float scale) {
  const From* from = static_cast<const From*>(row);
  for (; width > 0; width -= kPanel, from += kPanel, to += panel_stride) {
    if (width >= kPanel) {
      for (int64_t j = 0; j < kPanel; ++j) to[j] = static_cast<float>(from[j]) * scale;
    } else {
      for (int64_t j = 0; j < width; ++j) to[j] = static_cast<float>(from[j]) * scale;
      for (int64_t j = width; j < kPanel; ++j) to[j] = 0;
    }
  }
}

template <typename To>
JEPA_FAST_CLONES void write_row(void* row, const float* from, int64_t width) {
  To* to = static_cast<To*>(row);
  for (int64_t j = 0; j < width; ++j) to[j] = static_cast<To>(from[j]);
}

// Up to 32 rows of panels as the columns of one panel [width, 32], zero in those that are missing.
JEPA_FAST_CLONES void transpose(
    float* to, const float* from, int64_t panel_stride, int64_t rows, int64_t width) {
  for (int64_t first = 0; first < width; first += kPanel) {
    const float* panel = from + first / kPanel * panel_stride;
    const int64_t count = std::min(kPanel, width - first);
    for (int64_t i = 0; i < count; ++i) {
      float* row = to + (first + i) * kPanel;
      for (int64_t j = 0; j < rows; ++j) row[j] = panel[j * kPanel + i];
      for (int64_t j = rows; j < kPanel; ++j) row[j] = 0;
    }
  }
}

[[maybe_unused]] JEPA_FAST_CLONES void add_to(
    float* __restrict to, const float* __restrict from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

// Memory of whole vectors. What it holds does not matter yet, or is 0 where its size is given.
//
// It is from torch's allocator, so that whoever counts what a call takes sees it: torch's profiler does
// what the caller's thread asks for, and nothing of the others'.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) {
    reserve(size);
    std::fill(data(), data() + size, 0.0f);
  }

  void reserve(int64_t size) {
    if (size <= size_) return;
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    memory_ = torch::stable::empty({size}, ScalarType::Float, std::nullopt, cpu);
    expect_writes(*memory_);
    data_ = static_cast<float*>(memory_->mutable_data_ptr());
    size_ = size;
  }
  float* data() const { return data_; }

 private:
  std::optional<torch::stable::Tensor> memory_;
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// Hands out the memory of one piece, whole vectors at a time; without a piece it only counts.
class Arena {
 public:
  explicit Arena(float* memory = nullptr) : memory_(memory) {}

  float* take(int64_t size) {
    float* const taken = memory_ == nullptr ? nullptr : memory_ + taken_;
    taken_ += (size + kSlots - 1) / kSlots * kSlots;
    return taken;
  }
  int64_t taken() const { return taken_; }

 private:
  float* memory_;
  int64_t taken_ = 0;
};

// How many threads share `count` items, at the most.
inline int64_t threads_for(int64_t count) {
  return std::min<int64_t>(count, torch::stable::get_num_threads());
}

// Pieces of memory for threads or images.
class Pieces {
 public:
  Pieces(int64_t count, int64_t size) : size_((size + kSlots - 1) / kSlots * kSlots) {
    memory_.reserve(count * size_);
  }

  Arena at(int64_t i) const { return Arena(memory_.data() + i * size_); }
  // One that no thread has yet.
  Arena next() { return at(next_++); }
  void restart() { next_ = 0; }

 private:
  int64_t size_;
  Buffer memory_;
  std::atomic<int64_t> next_{0};
};

}  // namespace
}  // namespace jepa_fast

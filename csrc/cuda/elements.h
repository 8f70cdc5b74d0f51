// What the drivers of the EMA and of AdamW share: scalars that may lie on the device, elements moved
// in vectors, and what they draw.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../common/rounding.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

// A number on the device (float32 or float64), or one that the host knows.
struct Scalar {
  const void* device;
  bool is_double;
  double value;

  __device__ double get() const {
    if (device == nullptr) return value;
    return is_double ? *static_cast<const double*>(device) : *static_cast<const float*>(device);
  }
};

// What stochastic rounding draws from, on the device or known to the host.
struct Seed {
  const uint64_t* device;
  uint64_t value;

  __device__ uint64_t get() const { return device == nullptr ? value : *device; }
};

// Moved at once: by 16 bytes, or as many as there are.
template <typename T, int size>
struct alignas(size * sizeof(T) < 16 ? size * sizeof(T) : 16) Vector {
  T item[size];
};

// What `size` elements draw, starting at `first`: 1, or an even number where `first` is even.
template <bool stochastic, int size>
struct Random {
  uint32_t item[size] = {};

  __device__ Random(uint64_t stream, int64_t first) {
    if constexpr (stochastic && size == 1) {
      item[0] = static_cast<uint32_t>(rounding_pair(stream, first / 2) >> (first % 2 * 32));
    } else if constexpr (stochastic) {
#pragma unroll
      for (int j = 0; j < size; j += 2) {
        const uint64_t pair = rounding_pair(stream, (first + j) / 2);
        item[j] = static_cast<uint32_t>(pair);
        item[j + 1] = static_cast<uint32_t>(pair >> 32);
      }
    }
  }
};

// `values` in another dtype, at `i`; `out` is aligned to 16 bytes wherever there are several.
template <bool stochastic, int size, typename T>
__device__ void store_as(
    ScalarType dtype,
    void* out,
    int64_t i,
    const Vector<T, size>& values,
    uint64_t stream,
    int64_t first) {
  const auto store = [&](auto zero) {
    using Out = decltype(zero);
    Vector<Out, size> cast;
    const Random<stochastic && kNarrow<Out>, size> random(stream, first);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      cast.item[j] =
          round_to<Out, stochastic>(static_cast<Compute<T>>(values.item[j]), random.item[j]);
    }
    if constexpr (size == 1) {
      static_cast<Out*>(out)[i] = cast.item[0];
    } else {
      *reinterpret_cast<Vector<Out, size>*>(static_cast<Out*>(out) + i) = cast;
    }
  };
  switch (dtype) {
    case ScalarType::Float: return store(float{});
    case ScalarType::Double: return store(double{});
    case ScalarType::BFloat16: return store(BFloat16{});
    default: return store(Half{});
  }
}

// The row of a table that this thread block works on: the last whose first chunk is not after it.
template <typename Table>
__device__ __forceinline__ int row_of_block(const Table& table) {
  const int block = static_cast<int>(blockIdx.x);
  int row = 0;
  for (int end = table.count; end - row > 1;) {
    const int middle = (row + end) / 2;
    (table.first_chunk[middle] <= block ? row : end) = middle;
  }
  return row;
}

inline Scalar scalar_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  const void* data = tensor.const_data_ptr();
  return {
      tensor.is_cuda() ? data : nullptr,
      dtype == ScalarType::Double,
      tensor.is_cuda() ? 0.0 : read_scalar(dtype, data)};
}

inline std::optional<Seed> seed_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  const auto* data = static_cast<const uint64_t*>(tensor->const_data_ptr());
  return tensor->is_cuda() ? Seed{data, 0} : Seed{nullptr, *data};
}

}  // namespace
}  // namespace jepa_fast

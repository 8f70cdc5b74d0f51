// The exponential moving average of many tensors on a GPU, in one launch a pair of dtypes.
//
// The table of addresses travels as a kernel argument: no copy to the device, nothing to keep
// alive, and a CUDA graph captures it with the launch.
#include "../common/ema_update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "launch.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
// Elements a thread handles at once: 16 bytes of the narrowest type, several such of the others.
constexpr int kVector = 8;
constexpr int64_t kChunk = kThreads * kVector * 4;  // elements a thread block handles

// Since CUDA 12.1 a kernel takes up to 32764 bytes of arguments, 4096 before.
constexpr int kTableSize = CUDART_VERSION >= 12010 ? 900 : 100;

struct Table {
  void* target[kTableSize];
  const void* source[kTableSize];
  void* shadow[kTableSize];
  int64_t size[kTableSize];
  int32_t first_chunk[kTableSize];  // the first of the tensor's thread blocks in the grid
  int32_t count;
  int32_t shadow_item;  // bytes an element of the shadows
};

// A number on the device (float32 or float64), or one that the host knows.
struct Momentum {
  const void* device;
  bool is_double;
  double value;

  __device__ double get() const {
    if (device == nullptr) return value;
    return is_double ? *static_cast<const double*>(device) : *static_cast<const float*>(device);
  }
};

template <typename T, int size>
struct alignas(16) Vector {
  T item[size];
};

// `size` elements starting at `i`; `out` is aligned to 16 bytes wherever `size` is kVector.
template <int size, typename T>
__device__ void store_as(ScalarType dtype, void* out, int64_t i, const Vector<T, size>& values) {
  const auto store = [&](auto zero) {
    using Out = decltype(zero);
    Vector<Out, size> cast;
#pragma unroll
    for (int j = 0; j < size; ++j) {
      cast.item[j] = static_cast<Out>(static_cast<Compute<T>>(values.item[j]));
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

// One tensor's share of a thread block.
template <typename Target, typename Source>
struct Span {
  using T = Compute<Target>;
  Target* target;
  const Source* source;
  void* shadow;
  ScalarType shadow_dtype;

  __device__ bool aligned() const {
    const auto bits = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source) |
                      reinterpret_cast<uintptr_t>(shadow);
    return bits % 16 == 0;
  }

  // `size` elements starting at `i`: 1, or kVector where the span is aligned.
  template <int size>
  __device__ void update(int i, const EmaWeights<T>& weights) const {
    Vector<Target, size> values;
    Vector<Source, size> toward;
    if constexpr (size == 1) {
      values.item[0] = target[i];
      toward.item[0] = source[i];
    } else {
      values = *reinterpret_cast<const Vector<Target, size>*>(target + i);
      toward = *reinterpret_cast<const Vector<Source, size>*>(source + i);
    }
#pragma unroll
    for (int j = 0; j < size; ++j) {
      values.item[j] = static_cast<Target>(
          ema_element(static_cast<T>(values.item[j]), static_cast<T>(toward.item[j]), weights));
    }
    if constexpr (size == 1) {
      target[i] = values.item[0];
    } else {
      *reinterpret_cast<Vector<Target, size>*>(target + i) = values;
    }
    if (shadow != nullptr) store_as<size>(shadow_dtype, shadow, i, values);
  }
};

template <typename Target, typename Source>
__global__ void __launch_bounds__(kThreads, 3) ema_update_kernel(
    const __grid_constant__ Table table, const ScalarType shadow_dtype, const Momentum momentum) {
  const int block = static_cast<int>(blockIdx.x);
  int tensor = 0;  // the last whose first chunk is not after this block
  for (int end = table.count; end - tensor > 1;) {
    const int middle = (tensor + end) / 2;
    (table.first_chunk[middle] <= block ? tensor : end) = middle;
  }
  const int64_t begin = (block - table.first_chunk[tensor]) * kChunk;
  const int64_t left = table.size[tensor] - begin;
  const int size = static_cast<int>(left < kChunk ? left : kChunk);
  char* shadow = static_cast<char*>(table.shadow[tensor]);
  const Span<Target, Source> span{
      static_cast<Target*>(table.target[tensor]) + begin,
      static_cast<const Source*>(table.source[tensor]) + begin,
      shadow == nullptr ? nullptr : shadow + begin * table.shadow_item,
      shadow_dtype};
  const EmaWeights<Compute<Target>> weights(momentum.get());
  const int vectors = span.aligned() ? size / kVector : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    span.template update<kVector>(i * kVector, weights);
  }
#pragma unroll 1
  for (int i = vectors * kVector + threadIdx.x; i < size; i += kThreads) {
    span.template update<1>(i, weights);
  }
}

struct Dtypes {
  ScalarType target, source, shadow;

  bool operator<(const Dtypes& other) const {
    return std::tie(target, source, shadow) < std::tie(other.target, other.source, other.shadow);
  }
};

void launch(const Dtypes& dtypes, Table& table, int64_t blocks, Momentum momentum, cudaStream_t stream) {
  if (table.count == 0) return;
  table.shadow_item = item_size(dtypes.shadow);
  visit_pair(dtypes.target, dtypes.source, [&](auto target, auto source) {
    ema_update_kernel<typename decltype(target)::type, typename decltype(source)::type>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table, dtypes.shadow, momentum);
  });
  check_cuda(cudaGetLastError(), "ema_update_");
}

// targets[i], sources[i] and shadows[i] (where there are any) hold the same elements in the same
// order in memory, without gaps, all on the current device; momentum is there or on the host. There
// is at least one.
void ema_update_(
    std::vector<Tensor> targets,
    std::vector<Tensor> sources,
    std::vector<Tensor> shadows,
    Tensor momentum_scalar) {
  const cudaStream_t stream = current_stream(targets[0].get_device_index());
  const ScalarType momentum_dtype = momentum_scalar.scalar_type();
  const bool on_device = momentum_scalar.is_cuda();
  const Momentum momentum{
      on_device ? momentum_scalar.const_data_ptr() : nullptr,
      momentum_dtype == ScalarType::Double,
      on_device ? 0.0 : read_scalar(momentum_dtype, momentum_scalar.const_data_ptr())};

  std::map<Dtypes, std::vector<size_t>> groups;
  for (size_t t = 0; t < targets.size(); ++t) {
    const ScalarType shadow = shadows.empty() ? ScalarType::Float : shadows[t].scalar_type();
    groups[{targets[t].scalar_type(), sources[t].scalar_type(), shadow}].push_back(t);
  }
  for (const auto& [dtypes, members] : groups) {
    Table table = {};
    int64_t blocks = 0;
    for (const size_t t : members) {
      const int64_t size = targets[t].numel();
      const int64_t chunks = (size + kChunk - 1) / kChunk;
      if (chunks == 0) continue;
      if (table.count == kTableSize || blocks + chunks > INT32_MAX) {
        launch(dtypes, table, blocks, momentum, stream);
        table.count = 0;
        blocks = 0;
      }
      const int row = table.count++;
      table.target[row] = targets[t].mutable_data_ptr();
      table.source[row] = sources[t].const_data_ptr();
      table.shadow[row] = shadows.empty() ? nullptr : shadows[t].mutable_data_ptr();
      table.size[row] = size;
      table.first_chunk[row] = static_cast<int32_t>(blocks);
      blocks += chunks;
    }
    launch(dtypes, table, blocks, momentum, stream);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CUDA, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_));
}

}  // namespace jepa_fast

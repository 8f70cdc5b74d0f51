// The exponential moving average of many tensors on a GPU, in one launch a pair of dtypes.
//
// The table of addresses travels as a kernel argument: no copy to the device, nothing to keep
// alive, and a CUDA graph captures it with the launch.
#include "../common/ema_update.h"
#include "../common/rounding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "elements.h"
#include "launch.h"

namespace jepa_fast {
namespace {

constexpr int kThreads = 256;
// Elements a thread handles at once: 16 bytes of the narrowest type, several such of the others.
constexpr int kVector = 8;
constexpr int64_t kChunk = kThreads * kVector * 4;  // elements a thread block handles

// Since CUDA 12.1 a kernel takes up to 32764 bytes of arguments, 4096 before.
constexpr int kTableSize = CUDART_VERSION >= 12010 ? 800 : 100;

struct Table {
  void* target[kTableSize];
  const void* source[kTableSize];
  void* shadow[kTableSize];
  int64_t size[kTableSize];
  int32_t first_chunk[kTableSize];  // the first of the tensor's thread blocks in the grid
  int32_t number[kTableSize];       // of the tensor, among all of the call
  int32_t count;
  int32_t shadow_item;  // bytes an element of the shadows
};

// One tensor's share of a thread block.
template <typename Target, typename Source, bool stochastic>
struct Span {
  using T = Compute<Target>;
  Target* target;
  const Source* source;
  void* shadow;
  ScalarType shadow_dtype;
  int64_t begin;  // in the tensor
  uint64_t target_stream, shadow_stream;

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
    const Random<stochastic && kNarrow<Target>, size> random(target_stream, begin + i);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      values.item[j] = round_to<Target, stochastic>(
          ema_element(static_cast<T>(values.item[j]), static_cast<T>(toward.item[j]), weights),
          random.item[j]);
    }
    if constexpr (size == 1) {
      target[i] = values.item[0];
    } else {
      *reinterpret_cast<Vector<Target, size>*>(target + i) = values;
    }
    if (shadow != nullptr) {
      store_as<stochastic, size>(shadow_dtype, shadow, i, values, shadow_stream, begin + i);
    }
  }
};

template <typename Target, typename Source, bool stochastic>
__device__ __forceinline__ void update_chunk(
    const Table& table, const ScalarType shadow_dtype, const Scalar& momentum, const Seed& seed) {
  const int tensor = row_of_block(table);
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first_chunk[tensor]) * kChunk;
  const int64_t left = table.size[tensor] - begin;
  const int size = static_cast<int>(left < kChunk ? left : kChunk);
  char* shadow = static_cast<char*>(table.shadow[tensor]);
  const uint64_t number = 2 * static_cast<uint64_t>(table.number[tensor]);
  const Span<Target, Source, stochastic> span{
      static_cast<Target*>(table.target[tensor]) + begin,
      static_cast<const Source*>(table.source[tensor]) + begin,
      shadow == nullptr ? nullptr : shadow + begin * table.shadow_item,
      shadow_dtype,
      begin,
      stochastic ? rounding_stream(seed.get(), number) : 0,
      stochastic ? rounding_stream(seed.get(), number + 1) : 0};
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

template <typename Target, typename Source>
__global__ void __launch_bounds__(kThreads, 3) ema_update_kernel(
    const __grid_constant__ Table table, const ScalarType shadow_dtype, const Scalar momentum) {
  update_chunk<Target, Source, false>(table, shadow_dtype, momentum, Seed{});
}

template <typename Target, typename Source>
__global__ void __launch_bounds__(kThreads, 3) ema_update_stochastic_kernel(
    const __grid_constant__ Table table,
    const ScalarType shadow_dtype,
    const Scalar momentum,
    const Seed seed) {
  update_chunk<Target, Source, true>(table, shadow_dtype, momentum, seed);
}

struct Dtypes {
  ScalarType target, source, shadow;

  bool operator<(const Dtypes& other) const {
    return std::tie(target, source, shadow) < std::tie(other.target, other.source, other.shadow);
  }
};

void launch(
    const Dtypes& dtypes,
    Table& table,
    int64_t blocks,
    Scalar momentum,
    const std::optional<Seed>& seed,
    cudaStream_t stream) {
  if (table.count == 0) return;
  table.shadow_item = item_size(dtypes.shadow);
  visit_pair(dtypes.target, dtypes.source, [&](auto target, auto source) {
    using Target = typename decltype(target)::type;
    using Source = typename decltype(source)::type;
    const auto grid = static_cast<unsigned>(blocks);
    if (seed.has_value()) {
      ema_update_stochastic_kernel<Target, Source>
          <<<grid, kThreads, 0, stream>>>(table, dtypes.shadow, momentum, *seed);
    } else {
      ema_update_kernel<Target, Source>
          <<<grid, kThreads, 0, stream>>>(table, dtypes.shadow, momentum);
    }
  });
  check_cuda(cudaGetLastError(), "ema_update_");
}

// targets[i], sources[i] and shadows[i] (where there are any) hold the same elements in the same
// order in memory, without gaps, all on the current device; momentum and seed are there or on the
// host. There is at least one.
void ema_update_(
    std::vector<Tensor> targets,
    std::vector<Tensor> sources,
    std::vector<Tensor> shadows,
    Tensor momentum_scalar,
    std::optional<Tensor> rounding_seed) {
  const cudaStream_t stream = current_stream(targets[0].get_device_index());
  const Scalar momentum = scalar_of(momentum_scalar);
  const std::optional<Seed> seed = seed_of(rounding_seed);

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
        launch(dtypes, table, blocks, momentum, seed, stream);
        table.count = 0;
        blocks = 0;
      }
      const int row = table.count++;
      table.target[row] = targets[t].mutable_data_ptr();
      table.source[row] = sources[t].const_data_ptr();
      table.shadow[row] = shadows.empty() ? nullptr : shadows[t].mutable_data_ptr();
      table.size[row] = size;
      table.number[row] = static_cast<int32_t>(t);
      table.first_chunk[row] = static_cast<int32_t>(blocks);
      blocks += chunks;
    }
    launch(dtypes, table, blocks, momentum, seed, stream);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CUDA, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_));
}

}  // namespace jepa_fast

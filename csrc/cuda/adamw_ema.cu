// AdamW and the exponential moving average of many parameters on a GPU, in one launch a pair of
// dtypes.
//
// The table of addresses travels as a kernel argument, as in ema_update.cu. Learning rate, counts
// and what a GradScaler says are read on the device, so that a CUDA graph follows them.
#include "../common/adamw.h"
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
constexpr int64_t kChunk = kThreads * 32;  // elements a thread block handles

// Since CUDA 12.1 a kernel takes up to 32764 bytes of arguments, 4096 before.
constexpr int kTableSize = CUDART_VERSION >= 12010 ? 440 : 50;

struct Table {
  void* param[kTableSize];
  void* grad[kTableSize];
  void* exp_avg[kTableSize];
  void* exp_avg_sq[kTableSize];
  const float* step[kTableSize];
  void* target[kTableSize];  // null without
  void* shadow[kTableSize];
  int64_t size[kTableSize];
  int32_t first_chunk[kTableSize];  // the first of the parameter's thread blocks in the grid
  int32_t number[kTableSize];       // of the parameter, among all of the call
  int32_t count;
};

struct Options {
  AdamWOptions adamw;
  Scalar lr, weight_decay, momentum;
  const float* grad_scale;  // null without
  const float* found_inf;
  Seed seed;
  ScalarType shadow_dtype;
  int32_t shadow_item;  // bytes an element of the shadows
};

// One parameter's share of a thread block.
template <typename Param, typename Target, bool stochastic>
struct Span {
  using T = Compute<Param>;
  Param* param;
  Param* grad;
  Param* exp_avg;
  Param* exp_avg_sq;
  Target* target;
  void* shadow;
  ScalarType shadow_dtype;
  int64_t begin;  // in the parameter
  uint64_t param_stream, target_stream, shadow_stream;
  bool skipped, unscale;
  T scale;

  __device__ bool aligned() const {
    const auto bits = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
                      reinterpret_cast<uintptr_t>(exp_avg) |
                      reinterpret_cast<uintptr_t>(exp_avg_sq) |
                      reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(shadow);
    return bits % 16 == 0;
  }

  // `size` elements starting at `i`: 1, or as many as 16 bytes hold where the span is aligned.
  template <int size>
  __device__ void update(
      int i, const AdamWStep<T>& step, const EmaWeights<Compute<Target>>& weights) const {
    using Params = Vector<Param, size>;
    using Targets = Vector<Target, size>;
    Params p = *reinterpret_cast<const Params*>(param + i);
    if (!skipped) {
      Params g = *reinterpret_cast<const Params*>(grad + i);
      Params m = *reinterpret_cast<const Params*>(exp_avg + i);
      Params v = *reinterpret_cast<const Params*>(exp_avg_sq + i);
      const Random<stochastic && kNarrow<Param>, size> random(param_stream, begin + i);
#pragma unroll
      for (int j = 0; j < size; ++j) {
        T wide_p = static_cast<T>(p.item[j]), wide_g = static_cast<T>(g.item[j]);
        T wide_m = static_cast<T>(m.item[j]), wide_v = static_cast<T>(v.item[j]);
        if (unscale) {
          wide_g /= scale;
          g.item[j] = static_cast<Param>(wide_g);
          wide_g = static_cast<T>(g.item[j]);
        }
        adamw_element(wide_p, wide_g, wide_m, wide_v, step);
        p.item[j] = round_to<Param, stochastic>(wide_p, random.item[j]);
        m.item[j] = static_cast<Param>(wide_m);
        v.item[j] = static_cast<Param>(wide_v);
      }
      *reinterpret_cast<Params*>(param + i) = p;
      *reinterpret_cast<Params*>(exp_avg + i) = m;
      *reinterpret_cast<Params*>(exp_avg_sq + i) = v;
      if (unscale) *reinterpret_cast<Params*>(grad + i) = g;
    }
    if (target == nullptr) return;
    using W = Compute<Target>;
    Targets t = *reinterpret_cast<const Targets*>(target + i);
    const Random<stochastic && kNarrow<Target>, size> random(target_stream, begin + i);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      t.item[j] = round_to<Target, stochastic>(
          ema_element(
              static_cast<W>(t.item[j]), static_cast<W>(static_cast<T>(p.item[j])), weights),
          random.item[j]);
    }
    *reinterpret_cast<Targets*>(target + i) = t;
    if (shadow != nullptr) {
      store_as<stochastic, size>(shadow_dtype, shadow, i, t, shadow_stream, begin + i);
    }
  }
};

template <typename Param, typename Target, bool stochastic>
__device__ __forceinline__ void update_chunk(const Table& table, const Options& options) {
  using T = Compute<Param>;
  const int row = row_of_block(table);
  // Powers of the betas take long, and are the same for all threads.
  alignas(AdamWStep<T>) __shared__ unsigned char shared[sizeof(AdamWStep<T>)];
  auto& step = *reinterpret_cast<AdamWStep<T>*>(shared);
  if (threadIdx.x == 0) {
    step = AdamWStep<T>(
        options.adamw, options.lr.get(), options.weight_decay.get(), *table.step[row]);
  }
  __syncthreads();
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first_chunk[row]) * kChunk;
  const int64_t left = table.size[row] - begin;
  const int size = static_cast<int>(left < kChunk ? left : kChunk);
  auto* target = static_cast<Target*>(table.target[row]);
  auto* shadow = static_cast<char*>(table.shadow[row]);
  const uint64_t number = 3 * static_cast<uint64_t>(table.number[row]);
  const uint64_t seed = stochastic ? options.seed.get() : 0;
  const Span<Param, Target, stochastic> span{
      static_cast<Param*>(table.param[row]) + begin,
      static_cast<Param*>(table.grad[row]) + begin,
      static_cast<Param*>(table.exp_avg[row]) + begin,
      static_cast<Param*>(table.exp_avg_sq[row]) + begin,
      target == nullptr ? nullptr : target + begin,
      shadow == nullptr ? nullptr : shadow + begin * options.shadow_item,
      options.shadow_dtype,
      begin,
      stochastic ? rounding_stream(seed, number) : 0,
      stochastic ? rounding_stream(seed, number + 1) : 0,
      stochastic ? rounding_stream(seed, number + 2) : 0,
      options.found_inf != nullptr && *options.found_inf != 0.0f,
      options.grad_scale != nullptr,
      options.grad_scale == nullptr ? T(1) : static_cast<T>(*options.grad_scale)};
  const EmaWeights<Compute<Target>> weights(options.momentum.get());
  constexpr int kVector = 16 / sizeof(Param);
  const int vectors = span.aligned() ? size / kVector : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    span.template update<kVector>(i * kVector, step, weights);
  }
#pragma unroll 1
  for (int i = vectors * kVector + threadIdx.x; i < size; i += kThreads) {
    span.template update<1>(i, step, weights);
  }
}

template <typename Param, typename Target>
__global__ void __launch_bounds__(kThreads, 2) adamw_ema_kernel(
    const __grid_constant__ Table table, const __grid_constant__ Options options) {
  update_chunk<Param, Target, false>(table, options);
}

template <typename Param, typename Target>
__global__ void __launch_bounds__(kThreads, 2) adamw_ema_stochastic_kernel(
    const __grid_constant__ Table table, const __grid_constant__ Options options) {
  update_chunk<Param, Target, true>(table, options);
}

struct Dtypes {
  ScalarType param, target, shadow;

  bool operator<(const Dtypes& other) const {
    return std::tie(param, target, shadow) < std::tie(other.param, other.target, other.shadow);
  }
};

void launch(
    const Dtypes& dtypes,
    const Table& table,
    int64_t blocks,
    Options& options,
    bool stochastic,
    cudaStream_t stream) {
  if (table.count == 0) return;
  options.shadow_dtype = dtypes.shadow;
  options.shadow_item = static_cast<int32_t>(item_size(dtypes.shadow));
  visit_pair(dtypes.param, dtypes.target, [&](auto param, auto target) {
    using Param = typename decltype(param)::type;
    using Target = typename decltype(target)::type;
    const auto grid = static_cast<unsigned>(blocks);
    if (stochastic) {
      adamw_ema_stochastic_kernel<Param, Target><<<grid, kThreads, 0, stream>>>(table, options);
    } else {
      adamw_ema_kernel<Param, Target><<<grid, kThreads, 0, stream>>>(table, options);
    }
  });
  check_cuda(cudaGetLastError(), "adamw_ema_");
}

// All tensors of a parameter hold the same elements in the same order in memory, without gaps, on
// the current device; so do the steps, which count this update already, unless it is skipped.
// targets belong to the first parameters, and shadows, where there are any, to targets. There is at
// least one parameter.
void adamw_ema_(
    std::vector<Tensor> params,
    std::vector<Tensor> grads,
    std::vector<Tensor> exp_avgs,
    std::vector<Tensor> exp_avg_sqs,
    std::vector<Tensor> steps,
    std::vector<Tensor> targets,
    std::vector<Tensor> shadows,
    Tensor lr,
    Tensor weight_decay,
    Tensor momentum,
    std::optional<Tensor> grad_scale,
    std::optional<Tensor> found_inf,
    std::optional<Tensor> rounding_seed,
    double beta1,
    double beta2,
    double eps,
    bool maximize) {
  const cudaStream_t stream = current_stream(params[0].get_device_index());
  const std::optional<Seed> seed = seed_of(rounding_seed);
  const auto pointer = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
  };
  Options options{
      {beta1, beta2, eps, maximize},
      scalar_of(lr),
      scalar_of(weight_decay),
      scalar_of(momentum),
      pointer(grad_scale),
      pointer(found_inf),
      seed.value_or(Seed{}),
      ScalarType::Float,
      0};

  std::map<Dtypes, std::vector<size_t>> groups;
  for (size_t t = 0; t < params.size(); ++t) {
    const ScalarType param = params[t].scalar_type();
    const ScalarType target = t < targets.size() ? targets[t].scalar_type() : param;
    const ScalarType shadow = t < shadows.size() ? shadows[t].scalar_type() : ScalarType::Float;
    groups[{param, target, shadow}].push_back(t);
  }
  for (const auto& [dtypes, members] : groups) {
    Table table = {};
    int64_t blocks = 0;
    for (const size_t t : members) {
      const int64_t size = params[t].numel();
      const int64_t chunks = (size + kChunk - 1) / kChunk;
      if (chunks == 0) continue;
      if (table.count == kTableSize || blocks + chunks > INT32_MAX) {
        launch(dtypes, table, blocks, options, seed.has_value(), stream);
        table.count = 0;
        blocks = 0;
      }
      const int row = table.count++;
      table.param[row] = params[t].mutable_data_ptr();
      table.grad[row] = grads[t].mutable_data_ptr();
      table.exp_avg[row] = exp_avgs[t].mutable_data_ptr();
      table.exp_avg_sq[row] = exp_avg_sqs[t].mutable_data_ptr();
      table.step[row] = static_cast<const float*>(steps[t].const_data_ptr());
      table.target[row] = t < targets.size() ? targets[t].mutable_data_ptr() : nullptr;
      table.shadow[row] = t < shadows.size() ? shadows[t].mutable_data_ptr() : nullptr;
      table.size[row] = size;
      table.number[row] = static_cast<int32_t>(t);
      table.first_chunk[row] = static_cast<int32_t>(blocks);
      blocks += chunks;
    }
    launch(dtypes, table, blocks, options, seed.has_value(), stream);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CUDA, m) {
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_));
}

}  // namespace jepa_fast

// The exponential moving average of many tensors on the CPU, in one parallel region.
#include "../common/ema_update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clones.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;
// So that a block written for the target is still in the L1 cache when its shadow is made.
constexpr int64_t kBlock = 2048;

template <typename Target, typename Source>
JEPA_FAST_CLONES void update_row(
    void* target_row, const void* source_row, int64_t size, double momentum) {
  using T = Compute<Target>;
  auto* target = static_cast<Target*>(target_row);
  const auto* source = static_cast<const Source*>(source_row);
  const EmaWeights<T> weights(momentum);
  for (int64_t i = 0; i < size; ++i) {
    target[i] = static_cast<Target>(
        ema_element(static_cast<T>(target[i]), static_cast<T>(source[i]), weights));
  }
}

template <typename Shadow, typename Target>
JEPA_FAST_CLONES void cast_row(void* shadow_row, const void* target_row, int64_t size) {
  auto* shadow = static_cast<Shadow*>(shadow_row);
  const auto* target = static_cast<const Target*>(target_row);
  for (int64_t i = 0; i < size; ++i) {
    shadow[i] = static_cast<Shadow>(static_cast<Compute<Target>>(target[i]));
  }
}

// A tensor as a flat array of bytes.
struct Array {
  char* data = nullptr;
  int64_t item = 0;  // bytes an element

  char* at(int64_t i) const { return data + i * item; }
};

Array array_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), item_size(tensor.scalar_type())};
}

// One tensor's work: the arrays, and the row functions for their dtypes.
struct Update {
  Array target, source, shadow;
  void (*update)(void*, const void*, int64_t, double) = nullptr;
  void (*cast)(void*, const void*, int64_t) = nullptr;  // null without a shadow

  Update(const Tensor& to, const Tensor& from) : target(array_of(to)), source(array_of(from)) {
    update = visit_pair(to.scalar_type(), from.scalar_type(), [](auto t, auto s) {
      return &update_row<typename decltype(t)::type, typename decltype(s)::type>;
    });
  }

  void add_shadow(const Tensor& copy, const Tensor& of) {
    shadow = array_of(copy);
    cast = visit_pair(copy.scalar_type(), of.scalar_type(), [](auto s, auto t) {
      return &cast_row<typename decltype(s)::type, typename decltype(t)::type>;
    });
  }

  void run(int64_t begin, int64_t end, double momentum) const {
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t size = std::min(kBlock, end - i);
      update(target.at(i), source.at(i), size, momentum);
      if (cast != nullptr) cast(shadow.at(i), target.at(i), size);
    }
  }
};

// targets[i], sources[i] and shadows[i] (where there are any) hold the same elements in the same
// order in memory, without gaps.
void ema_update_(
    std::vector<Tensor> targets,
    std::vector<Tensor> sources,
    std::vector<Tensor> shadows,
    Tensor momentum_scalar) {
  const double momentum = read_scalar(momentum_scalar.scalar_type(), momentum_scalar.const_data_ptr());
  std::vector<Update> updates;
  std::vector<int64_t> ends;  // of each tensor, in the concatenation of all of them
  int64_t total = 0;
  for (size_t t = 0; t < targets.size(); ++t) {
    updates.emplace_back(targets[t], sources[t]);
    if (!shadows.empty()) updates.back().add_shadow(shadows[t], targets[t]);
    ends.push_back(total += targets[t].numel());
  }
  // One region for all tensors: entering one costs up to milliseconds on a loaded machine.
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++t) {
      const int64_t first = t == 0 ? 0 : ends[t - 1];
      const int64_t stop = std::min(end, ends[t]);
      updates[t].run(begin - first, stop - first, momentum);
      begin = stop;
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_));
}

}  // namespace jepa_fast

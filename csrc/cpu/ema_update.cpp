// The exponential moving average of many tensors on the CPU, in one parallel region.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "clones.h"
#include "unfused.h"

#include "../common/ema_update.h"
#include "../common/rounding.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;
// So that a block written for the target is still in the L1 cache when its shadow is made.
constexpr int64_t kBlock = 2048;

// `random` holds 32 bits for each element, and is not read where nothing is stochastic.
template <typename Target, typename Source, bool stochastic>
JEPA_FAST_CLONES void update_row(
    void* target_row,
    const void* source_row,
    const uint32_t* random,
    int64_t size,
    double momentum) {
  using T = Compute<Target>;
  auto* target = static_cast<Target*>(target_row);
  const auto* source = static_cast<const Source*>(source_row);
  const EmaWeights<T> weights(momentum);
  for (int64_t i = 0; i < size; ++i) {
    target[i] = round_to<Target, stochastic>(
        ema_element(static_cast<T>(target[i]), static_cast<T>(source[i]), weights),
        stochastic ? random[i] : 0);
  }
}

template <typename Shadow, typename Target, bool stochastic>
JEPA_FAST_CLONES void cast_row(
    void* shadow_row, const void* target_row, const uint32_t* random, int64_t size) {
  auto* shadow = static_cast<Shadow*>(shadow_row);
  const auto* target = static_cast<const Target*>(target_row);
  for (int64_t i = 0; i < size; ++i) {
    shadow[i] = round_to<Shadow, stochastic>(
        static_cast<Compute<Target>>(target[i]), stochastic ? random[i] : 0);
  }
}

JEPA_FAST_CLONES void draw_pairs(uint64_t* pairs, uint64_t stream, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pairs[i] = rounding_pair(stream, first + i);
}

// The bits that a block of elements draws.
struct Random {
  uint64_t pairs[kBlock / 2 + 1];

  // Those of `size` elements from the `first` on.
  const uint32_t* draw(uint64_t stream, int64_t first, int64_t size) {
    draw_pairs(pairs, stream, first / 2, (first + size + 1) / 2 - first / 2);
    return reinterpret_cast<const uint32_t*>(pairs) + first % 2;
  }
};

// A tensor as a flat array of bytes.
struct Array {
  char* data = nullptr;
  int64_t item = 0;  // bytes an element
  bool stochastic = false;
  uint64_t stream = 0;

  Array() = default;
  Array(const Tensor& tensor, const uint64_t* seed, uint64_t number)
      : data(static_cast<char*>(tensor.data_ptr())), item(item_size(tensor.scalar_type())) {
    stochastic = seed != nullptr && item == 2;
    if (stochastic) stream = rounding_stream(*seed, number);
  }

  char* at(int64_t i) const { return data + i * item; }

  const uint32_t* draw(Random& random, int64_t first, int64_t size) const {
    return stochastic ? random.draw(stream, first, size) : nullptr;
  }
};

// One tensor's work: the arrays, and the row functions for their dtypes.
struct Update {
  Array target, source, shadow;
  void (*update)(void*, const void*, const uint32_t*, int64_t, double) = nullptr;
  void (*cast)(void*, const void*, const uint32_t*, int64_t) = nullptr;  // null without a shadow

  Update(const Tensor& to, const Tensor& from, const uint64_t* seed, uint64_t number)
      : target(to, seed, 2 * number), source(from, nullptr, 0) {
    update = visit_pair(to.scalar_type(), from.scalar_type(), [&](auto t, auto s) {
      using Target = typename decltype(t)::type;
      using Source = typename decltype(s)::type;
      return target.stochastic ? &update_row<Target, Source, kNarrow<Target>>
                               : &update_row<Target, Source, false>;
    });
  }

  void add_shadow(const Tensor& copy, const Tensor& of, const uint64_t* seed, uint64_t number) {
    shadow = Array(copy, seed, 2 * number + 1);
    cast = visit_pair(copy.scalar_type(), of.scalar_type(), [&](auto s, auto t) {
      using Shadow = typename decltype(s)::type;
      using Target = typename decltype(t)::type;
      return shadow.stochastic ? &cast_row<Shadow, Target, kNarrow<Shadow>>
                               : &cast_row<Shadow, Target, false>;
    });
  }

  void run(int64_t begin, int64_t end, double momentum) const {
    Random random;
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t size = std::min(kBlock, end - i);
      update(target.at(i), source.at(i), target.draw(random, i, size), size, momentum);
      if (cast != nullptr) {
        cast(shadow.at(i), target.at(i), shadow.draw(random, i, size), size);
      }
    }
  }
};

// targets[i], sources[i] and shadows[i] (where there are any) hold the same elements in the same
// order in memory, without gaps.
void ema_update_(
    std::vector<Tensor> targets,
    std::vector<Tensor> sources,
    std::vector<Tensor> shadows,
    Tensor momentum_scalar,
    std::optional<Tensor> rounding_seed) {
  const double momentum = read_scalar(momentum_scalar.scalar_type(), momentum_scalar.const_data_ptr());
  const uint64_t* seed = nullptr;
  if (rounding_seed.has_value()) seed = static_cast<const uint64_t*>(rounding_seed->const_data_ptr());
  std::vector<Update> updates;
  std::vector<int64_t> ends;  // of each tensor, in the concatenation of all of them
  int64_t total = 0;
  for (size_t t = 0; t < targets.size(); ++t) {
    updates.emplace_back(targets[t], sources[t], seed, t);
    if (!shadows.empty()) updates.back().add_shadow(shadows[t], targets[t], seed, t);
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

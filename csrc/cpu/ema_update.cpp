// The exponential moving average of many tensors on the CPU, in one parallel region.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "ema_rows.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// One tensor's work: the arrays, and the row functions for their dtypes.
struct Update {
  Array target, source, shadow;
  UpdateFunction* update = nullptr;
  CastFunction* cast = nullptr;  // null without a shadow

  Update(const Tensor& to, const Tensor& from, const uint64_t* seed, uint64_t number)
      : target(to, seed, 2 * number), source(from, nullptr, 0) {
    update = update_function(to.scalar_type(), from.scalar_type(), target.stochastic);
  }

  void add_shadow(const Tensor& copy, const Tensor& of, const uint64_t* seed, uint64_t number) {
    shadow = Array(copy, seed, 2 * number + 1);
    cast = cast_function(copy.scalar_type(), of.scalar_type(), shadow.stochastic);
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
  const uint64_t* const seed = seed_in(rounding_seed);
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

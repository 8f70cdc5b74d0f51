// AdamW and the exponential moving average of many parameters on the CPU, in one parallel region.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "ema_rows.h"

#include "../common/adamw.h"

namespace jepa_fast {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 8192;

// What all rows of a parameter share.
struct RowStep {
  AdamWOptions options;
  double lr, weight_decay, step;
};

template <typename Param, bool stochastic>
JEPA_FAST_CLONES void adamw_row(
    void* param_row,
    const void* grad_row,
    void* exp_avg_row,
    void* exp_avg_sq_row,
    const uint32_t* random,
    int64_t size,
    const RowStep& row) {
  using T = Compute<Param>;
  auto* __restrict param = static_cast<Param*>(param_row);
  const auto* __restrict grad = static_cast<const Param*>(grad_row);
  auto* __restrict exp_avg = static_cast<Param*>(exp_avg_row);
  auto* __restrict exp_avg_sq = static_cast<Param*>(exp_avg_sq_row);
  const AdamWStep<T> step(row.options, row.lr, row.weight_decay, row.step);
  for (int64_t i = 0; i < size; ++i) {
    T p = static_cast<T>(param[i]), m = static_cast<T>(exp_avg[i]);
    T v = static_cast<T>(exp_avg_sq[i]);
    adamw_element(p, static_cast<T>(grad[i]), m, v, step);
    param[i] = round_to<Param, stochastic>(p, stochastic ? random[i] : 0);
    exp_avg[i] = static_cast<Param>(m);
    exp_avg_sq[i] = static_cast<Param>(v);
  }
}

template <typename Param>
JEPA_FAST_CLONES void unscale_row(void* grad_row, int64_t size, float scale) {
  using T = Compute<Param>;
  auto* grad = static_cast<Param*>(grad_row);
  for (int64_t i = 0; i < size; ++i) {
    grad[i] = static_cast<Param>(static_cast<T>(grad[i]) / static_cast<T>(scale));
  }
}

// One parameter's work. Without a target, or a shadow, their functions are null; where AdamW is
// skipped, its are.
struct Job {
  Array param, grad, exp_avg, exp_avg_sq, target, shadow;
  RowStep row = {};
  void (*adamw)(void*, const void*, void*, void*, const uint32_t*, int64_t, const RowStep&) =
      nullptr;
  void (*unscale)(void*, int64_t, float) = nullptr;
  UpdateFunction* update = nullptr;
  CastFunction* cast = nullptr;

  void run(int64_t begin, int64_t end, float scale, double momentum) const {
    Random random;
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t size = std::min(kBlock, end - i);
      if (unscale != nullptr) unscale(grad.at(i), size, scale);
      if (adamw != nullptr) {
        adamw(
            param.at(i), grad.at(i), exp_avg.at(i), exp_avg_sq.at(i),
            param.draw(random, i, size), size, row);
      }
      if (update != nullptr) {
        update(target.at(i), param.at(i), target.draw(random, i, size), size, momentum);
      }
      if (cast != nullptr) cast(shadow.at(i), target.at(i), shadow.draw(random, i, size), size);
    }
  }
};

double number_in(const Tensor& tensor) {
  return read_scalar(tensor.scalar_type(), tensor.const_data_ptr());
}

// All tensors of a parameter hold the same elements in the same order in memory, without gaps.
// targets belong to the first parameters, and shadows, where there are any, to targets.
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
    Tensor momentum_scalar,
    std::optional<Tensor> grad_scale,
    std::optional<Tensor> found_inf,
    std::optional<Tensor> rounding_seed,
    double beta1,
    double beta2,
    double eps,
    bool maximize) {
  const bool skipped = found_inf.has_value() && number_in(*found_inf) != 0.0;
  const float scale = grad_scale.has_value() ? static_cast<float>(number_in(*grad_scale)) : 1.0f;
  const double momentum = number_in(momentum_scalar);
  const AdamWOptions options{beta1, beta2, eps, maximize};
  RowStep row{options, number_in(lr), number_in(weight_decay), 0.0};
  const uint64_t* const seed = seed_in(rounding_seed);

  std::vector<Job> jobs(params.size());
  std::vector<int64_t> ends;  // of each parameter, in the concatenation of all of them
  int64_t total = 0;
  for (size_t t = 0; t < params.size(); ++t) {
    Job& job = jobs[t];
    const ScalarType dtype = params[t].scalar_type();
    job.param = Array(params[t], seed, 3 * t);
    if (!skipped) {
      job.grad = Array(grads[t], nullptr, 0);
      job.exp_avg = Array(exp_avgs[t], nullptr, 0);
      job.exp_avg_sq = Array(exp_avg_sqs[t], nullptr, 0);
      row.step = *static_cast<float*>(steps[t].mutable_data_ptr()) += 1.0f;
      job.row = row;
      visit_floating(dtype, [&](auto type) {
        using Param = typename decltype(type)::type;
        job.adamw = job.param.stochastic ? &adamw_row<Param, kNarrow<Param>> : &adamw_row<Param, false>;
        if (grad_scale.has_value()) job.unscale = &unscale_row<Param>;
      });
    }
    if (t < targets.size()) {
      job.target = Array(targets[t], seed, 3 * t + 1);
      job.update = update_function(targets[t].scalar_type(), dtype, job.target.stochastic);
    }
    if (t < shadows.size()) {
      job.shadow = Array(shadows[t], seed, 3 * t + 2);
      job.cast = cast_function(
          shadows[t].scalar_type(), targets[t].scalar_type(), job.shadow.stochastic);
    }
    ends.push_back(total += params[t].numel());
  }
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++t) {
      const int64_t first = t == 0 ? 0 : ends[t - 1];
      const int64_t stop = std::min(end, ends[t]);
      jobs[t].run(begin - first, stop - first, scale, momentum);
      begin = stop;
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_));
}

}  // namespace jepa_fast

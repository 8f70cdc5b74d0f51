// One element of AdamW, for the CPU and the CUDA driver alike.
#pragma once

#include <cmath>

#include "ema_update.h"

namespace jepa_fast {

struct AdamWOptions {
  double beta1, beta2, eps;
  bool maximize;
};

// What all elements of a parameter share, in the type that they are computed in.
template <typename T>
struct AdamWStep {
  EmaWeights<T> first;  // moment
  T beta2, one_minus_beta2, kept, step_size, inverse_root, eps, sign;

  JEPA_FAST_HOST_DEVICE AdamWStep(
      const AdamWOptions& options, double lr, double weight_decay, double step)
      : first(options.beta1),
        beta2(static_cast<T>(options.beta2)),
        one_minus_beta2(static_cast<T>(1.0 - options.beta2)),
        kept(static_cast<T>(1.0 - lr * weight_decay)),
        step_size(static_cast<T>(lr / (1.0 - pow(options.beta1, step)))),
        inverse_root(static_cast<T>(1.0 / sqrt(1.0 - pow(options.beta2, step)))),
        eps(static_cast<T>(options.eps)),
        sign(options.maximize ? T(-1) : T(1)) {}
};

// Correctly rounded, everywhere.
JEPA_FAST_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

JEPA_FAST_HOST_DEVICE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// In the order of operations of torch's fused AdamW, with one division less.
template <typename T>
JEPA_FAST_HOST_DEVICE void adamw_element(
    T& param, T grad, T& exp_avg, T& exp_avg_sq, const AdamWStep<T>& step) {
  grad *= step.sign;
  exp_avg = ema_element(exp_avg, grad, step.first);
  exp_avg_sq = rounded_product(exp_avg_sq, step.beta2) +
               rounded_product(rounded_product(step.one_minus_beta2, grad), grad);
  const T denominator = rounded_product(square_root(exp_avg_sq), step.inverse_root) + step.eps;
  param = rounded_product(param, step.kept) -
          rounded_product(step.step_size, exp_avg) / denominator;
}

}  // namespace jepa_fast

// One element of the exponential moving average, for the CPU and the CUDA driver alike.
#pragma once

#include "floating.h"

namespace jepa_fast {

// momentum * target + (1 - momentum) * source, as an interpolation from the nearer end: momentum 1
// keeps the target and momentum 0 takes the source, to the last bit, and equal ends stay equal.
template <typename T>
struct EmaWeights {
  T momentum;
  T one_minus_momentum;
  bool near_target;

  JEPA_FAST_HOST_DEVICE explicit EmaWeights(double momentum)
      : momentum(static_cast<T>(momentum)),
        one_minus_momentum(static_cast<T>(1.0 - momentum)),
        near_target(momentum > 0.5) {}
};

// Products are rounded before they are added, everywhere: what stochastic rounding draws depends on
// the last bit. (On the CPU the driver sees to it.)
JEPA_FAST_HOST_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

JEPA_FAST_HOST_DEVICE double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

template <typename T>
JEPA_FAST_HOST_DEVICE T ema_element(T target, T source, const EmaWeights<T>& weights) {
  const T step = source - target;
#if defined(__CUDA_ARCH__)
  return weights.near_target ? target + rounded_product(weights.one_minus_momentum, step)
                             : source - rounded_product(weights.momentum, step);
#else
  // The same without a branch, which would keep g++ from vectorising.
  const T weight = weights.near_target ? weights.one_minus_momentum : -weights.momentum;
  return (weights.near_target ? target : source) + weight * step;
#endif
}

}  // namespace jepa_fast

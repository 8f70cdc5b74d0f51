// One element of the exponential moving average, for the CPU and the CUDA driver alike.
#pragma once

#include "floating.h"

namespace jepa_fast {

// momentum * target + (1 - momentum) * source, as an interpolation from the nearer end: momentum 1
// keeps the target and momentum 0 takes the source, to the last bit, and equal ends stay equal.
template <typename T>
struct EmaWeights {
  bool near_target;
  T weight;  // of the step from target to source, with sign: to be added to the nearer end

  JEPA_FAST_HOST_DEVICE explicit EmaWeights(double momentum)
      : near_target(momentum > 0.5),
        weight(momentum > 0.5 ? static_cast<T>(1.0 - momentum) : -static_cast<T>(momentum)) {}
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
  return (weights.near_target ? target : source) + rounded_product(weights.weight, step);
}

}  // namespace jepa_fast

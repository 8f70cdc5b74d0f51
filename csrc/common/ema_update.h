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

  JEPA_FAST_HOST_DEVICE explicit EmaWeights(double momentum)
      : momentum(static_cast<T>(momentum)), one_minus_momentum(static_cast<T>(1.0 - momentum)) {}
};

template <typename T>
JEPA_FAST_HOST_DEVICE T ema_element(T target, T source, const EmaWeights<T>& weights) {
  const T step = source - target;
  return weights.momentum > T(0.5) ? target + weights.one_minus_momentum * step
                                   : source - weights.momentum * step;
}

}  // namespace jepa_fast

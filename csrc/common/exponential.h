// exp, log and what is made of them, in float32, for loops that are to be vectorised: no branches, no
// tables and no calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace jepa_fast {

// 2^n for n in [-126, 127]; any number for others, which come of NaN.
JEPA_FAST_HOST_DEVICE float power_of_two(int32_t n) {
  const uint32_t bits = (static_cast<uint32_t>(n) + 127u) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x) / 2^n, about 1, and n, for x in [-104, 89]; any numbers for others.
JEPA_FAST_HOST_DEVICE float reduced_exponential(float x, int32_t& n) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194442e-4f;  // few bits: n * high is exact
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23, whose neighbours are the whole numbers
  constexpr uint32_t kRounderBits = 0x4B400000;
  const float shifted = x * kLog2E + kRounder;
  const float whole = shifted - kRounder;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  n = static_cast<int32_t>(bits - kRounderBits);
  const float r = (x - whole * kLn2High) - whole * kLn2Low;
  float p = 1.98909911e-4f;  // (exp(r) - 1 - r) / r^2, interpolated at Chebyshev's nodes
  p = p * r + 1.39336498e-3f;
  p = p * r + 8.33331048e-3f;
  p = p * r + 4.16664667e-2f;
  p = p * r + 1.66666672e-1f;
  p = p * r + 0.5f;
  return p * (r * r) + r + 1.0f;
}

// exp(x) to 1 unit in the last place; 0 below all float32, infinity above, NaN for NaN.
JEPA_FAST_HOST_DEVICE float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  int32_t n;
  const float p = reduced_exponential(x, n);
  const int32_t half = n >> 1;  // 2^n itself may be no float32 where the product is one
  return p * power_of_two(half) * power_of_two(n - half);
}

// The same in fewer steps, for x in [-kSmallExponent, kSmallExponent].
constexpr float kSmallExponent = 87.0f;
JEPA_FAST_HOST_DEVICE float small_exponential(float x) {
  int32_t n;
  const float p = reduced_exponential(x, n);
  return p * power_of_two(n);
}

// exp(x) of x <= 0, in few steps; 0 instead of subnormal numbers.
JEPA_FAST_HOST_DEVICE float exponential_of_negative(float x) {
  const float result = small_exponential(x);
  return x < -kSmallExponent ? 0.0f : result;
}

// exp(x), at most 1e38, in few steps; 0 instead of subnormal numbers, NaN for NaN.
JEPA_FAST_HOST_DEVICE float bounded_exponential(float x) {
  constexpr float kLargestExponent = 87.4982335f;  // log(1e38), where 2^n is a float32 yet
  return exponential_of_negative(x > kLargestExponent ? kLargestExponent : x);
}

// log(x 2^more) to 1 unit in the last place, for x that is positive, finite and not subnormal.
JEPA_FAST_HOST_DEVICE float logarithm_of_normal(float x, int32_t more = 0) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194442e-4f;  // few bits: n * high is exact
  constexpr int32_t kRootOfHalf = 0x3F3504F3;
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  // x = 2^n (1 + f) with 1 + f from the square root of 1 / 2 to that of 2.
  const int32_t n = ((bits - kRootOfHalf) >> 23) + more;
  bits = ((bits - kRootOfHalf) & 0x007FFFFF) + kRootOfHalf;
  float f;
  memcpy(&f, &bits, sizeof f);
  f -= 1.0f;
  float p = 6.74649202e-2f;  // (log(1 + f) - f + f^2 / 2) / f^3, its greatest relative error least
  p = p * f - 1.16756158e-1f;
  p = p * f + 1.1888211e-1f;
  p = p * f - 1.24055978e-1f;
  p = p * f + 1.42195465e-1f;
  p = p * f - 1.66679952e-1f;
  p = p * f + 2.0002119e-1f;
  p = p * f - 2.50000096e-1f;
  p = p * f + 3.33333126e-1f;
  const float square = f * f, whole = static_cast<float>(n);
  const float rest = (f * square) * p - 0.5f * square + whole * kLn2Low;
  return whole * kLn2High + (f + rest);
}

// log(x) to 1 unit in the last place; minus infinity for 0, NaN below it and for NaN.
JEPA_FAST_HOST_DEVICE float logarithm(float x) {
  constexpr float kSmallestNormal = 1.17549435e-38f, kLargest = 3.40282347e38f;
  const bool is_subnormal = x < kSmallestNormal;
  const float normal = x * (is_subnormal ? 8388608.0f : 1.0f);  // 2^23
  const float log = logarithm_of_normal(normal, is_subnormal ? -23 : 0);
  const float end = x == 0 ? -HUGE_VALF : x > 0 ? x : NAN;
  return (x > 0) & (x <= kLargest) ? log : end;
}

// log(1 + exp(x)), to 3 units in the last place.
JEPA_FAST_HOST_DEVICE float softplus(float x) {
  const float u = exponential(x < 0 ? x : -x);
  // log(1 + u) = 2 artanh(u / (2 + u)), whose series ends soon below 1 / 3.
  const float s = u / (2.0f + u), square = s * s;
  float p = 1.0f / 15;
  p = p * square + 1.0f / 13;
  p = p * square + 1.0f / 11;
  p = p * square + 1.0f / 9;
  p = p * square + 1.0f / 7;
  p = p * square + 1.0f / 5;
  p = p * square + 1.0f / 3;
  const float log1p = 2.0f * (s + s * square * p);
  return (x < 0 ? 0.0f : x) + log1p;
}

// tanh(x), to 3 units in the last place.
JEPA_FAST_HOST_DEVICE float hyperbolic_tangent(float x) {
  const float size = std::fabs(x), square = x * x;
  // Near 0 the exponential's form would cancel.
  float p = -5.70498174e-3f;  // (tanh(x) / x - 1) / x^2, the greatest relative error of tanh least
  p = p * square + 2.06390824e-2f;
  p = p * square - 5.37397154e-2f;
  p = p * square + 1.33314416e-1f;
  p = p * square - 3.33332807e-1f;
  const float near = size + size * (square * p);
  const float most = size > 20.0f ? 20.0f : size;  // beyond, it is 1
  const float far = 1.0f - 2.0f / (small_exponential(2.0f * most) + 1.0f);
  return std::copysign(size < 0.625f ? near : far, x);
}

// 1 / (1 + exp(-x)).
JEPA_FAST_HOST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace jepa_fast

// Stochastic rounding to bfloat16 and float16, for the CPU and the CUDA driver alike: up with a
// probability equal to the fraction that is lost. What an element draws is a function of the seed,
// the number of its tensor and its own, so that all backends draw the same; jepa_fast/ops/_rounding.py
// is the specification.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "floating.h"
#include "random.h"

namespace jepa_fast {

template <typename T>
constexpr bool kNarrow = std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>;

// What a tensor's elements are drawn from.
JEPA_FAST_HOST_DEVICE uint64_t rounding_stream(uint64_t seed, uint64_t number) {
  return draw(draw(seed, 0) + number, 0);
}

// 32 bits of element 2 * pair in the low half, of element 2 * pair + 1 in the high one.
JEPA_FAST_HOST_DEVICE uint64_t rounding_pair(uint64_t stream, int64_t pair) {
  return draw(stream + static_cast<uint64_t>(pair), 0);
}

template <typename To, typename From>
JEPA_FAST_HOST_DEVICE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The bits of a neighbour of `x`. Infinities and NaN stay, and what is beyond the largest number is
// rounded to it or to infinity. No branches, and ints that are small: for vectors.
template <typename Narrow>
JEPA_FAST_HOST_DEVICE uint16_t neighbour(float x, uint32_t random) {
  constexpr uint32_t kInfinity = 0x7F800000u;
  const auto bits = same_bits<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if constexpr (std::is_same_v<Narrow, BFloat16>) {
    const uint32_t up = magnitude < kInfinity ? random & 0xFFFFu : 0u;
    const uint32_t quiet = magnitude > kInfinity ? 0x40u : 0u;
    return static_cast<uint16_t>(sign | quiet | ((magnitude + up) >> 16));
  } else {
    constexpr uint32_t kSmallestNormal = 0x38800000u;  // 2^-14
    const uint32_t other_bias = ((magnitude + (random & 0x1FFFu)) >> 13) - (112u << 10);
    const uint32_t normal = magnitude < kInfinity && other_bias < 0x7C00u ? other_bias : 0x7C00u;
    // Below it neighbours are 2^-24 apart.
    const uint32_t clamped = magnitude < kSmallestNormal ? magnitude : kSmallestNormal;
    const float steps = same_bits<float>(clamped) * 0x1p24f;
    const auto whole = static_cast<int32_t>(steps);
    const float threshold = static_cast<float>(static_cast<int32_t>(random >> 8)) * 0x1p-24f;
    const auto up = static_cast<int32_t>(steps - static_cast<float>(whole) > threshold);
    const auto subnormal = static_cast<uint32_t>(whole + up);
    const uint32_t quiet = magnitude > kInfinity ? 0x200u : 0u;
    // A choice by bits: g++ would make the computation of either conditional.
    const uint32_t is_small = 0u - static_cast<uint32_t>(magnitude < kSmallestNormal);
    return static_cast<uint16_t>(sign | quiet | (subnormal & is_small) | (normal & ~is_small));
  }
}

// `x` in the dtype `Out`: stochastically where that is asked for and `Out` is narrow.
template <typename Out, bool stochastic, typename T>
JEPA_FAST_HOST_DEVICE Out round_to(T x, uint32_t random) {
  if constexpr (stochastic && kNarrow<Out>) {
    return Out(neighbour<Out>(static_cast<float>(x), random), Out::from_bits());
  } else {
    return static_cast<Out>(x);
  }
}

}  // namespace jepa_fast

// A counter-based generator of random bits, the same on CPU and GPU: jepa_fast/ops/_random.py.
//
// splitmix64 (Steele, Lea and Flood, 2014): draw k of a stream needs no draw before it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace jepa_fast {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

JEPA_FAST_HOST_DEVICE uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// Draw number `counter` of the stream `key`.
JEPA_FAST_HOST_DEVICE uint64_t draw(uint64_t key, uint64_t counter) {
  return mix(key + (counter + 1) * kGolden);
}

// The key of sub-stream `value` of `key`; different values give different keys.
JEPA_FAST_HOST_DEVICE uint64_t fold(uint64_t key, uint64_t value) {
  return mix(key ^ mix(value + kGolden));
}

// 32 random bits scaled to [0, bound).
JEPA_FAST_HOST_DEVICE uint32_t below(uint32_t bits, uint32_t bound) {
  return static_cast<uint32_t>(static_cast<uint64_t>(bits) * bound >> 32);
}

}  // namespace jepa_fast

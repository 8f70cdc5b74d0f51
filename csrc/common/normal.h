// Standard normal numbers from a counter, the same on CPU and GPU: jepa_fast/ops/_normal.py says which.
//
// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) turns a key and a counter into four words, with no
// state in between; Box and Muller's transform (1958) turns two words into two normal numbers. For loops
// that are to be vectorised: no branches, no tables and no calls but the square root.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "exponential.h"
#include "host_device.h"

namespace jepa_fast {

// Four words of 32 bits: a counter, and what becomes of it.
struct Words {
  uint32_t x, y, z, w;
};

// `Lane` is what a word is held in: uint32_t, or uint64_t, which AVX-512 multiplies without unpacking.
template <typename Lane = uint32_t>
JEPA_FAST_HOST_DEVICE Words philox(uint64_t key, Words counter) {
  constexpr uint64_t kFirst = 0xD2511F53u, kSecond = 0xCD9E8D57u, kLow = 0xFFFFFFFFu;
  Lane low = static_cast<Lane>(key & kLow), high = static_cast<Lane>(key >> 32);
  Lane x = counter.x, y = counter.y, z = counter.z, w = counter.w;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = x * kFirst, second = z * kSecond;
    x = static_cast<Lane>(second >> 32) ^ y ^ low;
    y = static_cast<Lane>(second & kLow);
    z = static_cast<Lane>(first >> 32) ^ w ^ high;
    w = static_cast<Lane>(first & kLow);
    low = static_cast<Lane>((low + 0x9E3779B9u) & kLow);
    high = static_cast<Lane>((high + 0xBB67AE85u) & kLow);
  }
  return {
      static_cast<uint32_t>(x), static_cast<uint32_t>(y), static_cast<uint32_t>(z),
      static_cast<uint32_t>(w)};
}

// Two independent standard normal numbers from two words.
JEPA_FAST_HOST_DEVICE void normal_pair(uint32_t radius, uint32_t angle, float* first, float* second) {
  // In (0, 1], down to 2^-32: normal numbers go as far as 6.7.
  const float u = (static_cast<float>(static_cast<int32_t>(radius >> 1)) + 0.5f) * 0x1p-31f;
  const float r = std::sqrt(-2.0f * logarithm_of_normal(u));
  // Two bits of the angle say which quarter of the circle; the rest, f in [-1/2, 1/2], where in it.
  const float f = static_cast<float>(static_cast<int32_t>(angle << 2)) * 0x1p-32f;
  const float square = f * f;
  float p = -4.60165786e-3f;  // sin(pi / 2 f) / f
  p = p * square + 7.96800330e-2f;
  p = p * square - 6.45963490e-1f;
  const float sine = (p * square + 1.57079637f) * f * r;
  float q = 9.06703295e-4f;  // (cos(pi / 2 f) - 1) / f^2
  q = q * square - 2.08615139e-2f;
  q = q * square + 2.53669411e-1f;
  q = q * square - 1.23370051f;
  const float cosine = (q * square + 1.0f) * r;
  // A sign, and which axis the quarter lies on: by bits, since g++ would make either conditional.
  uint32_t a, b;
  memcpy(&a, &cosine, sizeof a);
  memcpy(&b, &sine, sizeof b);
  a ^= angle & 0x80000000u;
  const uint32_t different = (a ^ b) & (0u - (angle >> 30 & 1u));
  a ^= different;
  b ^= different;
  memcpy(first, &a, sizeof a);
  memcpy(second, &b, sizeof b);
}

// Numbers that are made together, from 16 counters of four words each: of a row, 64 in a line.
constexpr int64_t kNormalLanes = 16, kNormalGroup = 4 * kNormalLanes;

// What lane `lane` of group `group` of row `row` gives is in elements `lane`, 16, 32 and 48 further of the
// group. First its four words, in a loop of their own: one that does both takes longer.
template <typename Lane = uint32_t>
JEPA_FAST_HOST_DEVICE void draw_lane(
    uint64_t seed, uint64_t row, uint32_t group, uint32_t lane, float* out) {
  const Words words = philox<Lane>(
      seed, {static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), group, lane});
  memcpy(out + lane, &words.x, sizeof words.x);
  memcpy(out + kNormalLanes + lane, &words.y, sizeof words.y);
  memcpy(out + 2 * kNormalLanes + lane, &words.z, sizeof words.z);
  memcpy(out + 3 * kNormalLanes + lane, &words.w, sizeof words.w);
}

// Then, in their places, the numbers made of them.
JEPA_FAST_HOST_DEVICE void normal_lane(uint32_t lane, float* out) {
  float* const place = out + lane;
  Words words;
  memcpy(&words.x, place, sizeof words.x);
  memcpy(&words.y, place + kNormalLanes, sizeof words.y);
  memcpy(&words.z, place + 2 * kNormalLanes, sizeof words.z);
  memcpy(&words.w, place + 3 * kNormalLanes, sizeof words.w);
  normal_pair(words.x, words.y, place, place + kNormalLanes);
  normal_pair(words.z, words.w, place + 2 * kNormalLanes, place + 3 * kNormalLanes);
}

}  // namespace jepa_fast

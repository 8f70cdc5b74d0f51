// Rows of the exponential moving average and of casts, and the flat arrays that they go through.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "clones.h"
#include "unfused.h"

#include "../common/ema_update.h"
#include "../common/rounding.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

// So that a block written by one function is still in the L1 cache when the next one reads it.
constexpr int64_t kBlock = 2048;

// `random` holds 32 bits for each element, and is not read where nothing is stochastic.
template <typename Target, typename Source, bool stochastic>
JEPA_FAST_CLONES void update_row(
    void* target_row,
    const void* source_row,
    const uint32_t* random,
    int64_t size,
    double momentum) {
  using T = Compute<Target>;
  auto* target = static_cast<Target*>(target_row);
  const auto* source = static_cast<const Source*>(source_row);
  const EmaWeights<T> weights(momentum);
  for (int64_t i = 0; i < size; ++i) {
    target[i] = round_to<Target, stochastic>(
        ema_element(static_cast<T>(target[i]), static_cast<T>(source[i]), weights),
        stochastic ? random[i] : 0);
  }
}

template <typename Shadow, typename Target, bool stochastic>
JEPA_FAST_CLONES void cast_row(
    void* shadow_row, const void* target_row, const uint32_t* random, int64_t size) {
  auto* shadow = static_cast<Shadow*>(shadow_row);
  const auto* target = static_cast<const Target*>(target_row);
  for (int64_t i = 0; i < size; ++i) {
    shadow[i] = round_to<Shadow, stochastic>(
        static_cast<Compute<Target>>(target[i]), stochastic ? random[i] : 0);
  }
}

JEPA_FAST_CLONES void draw_pairs(uint64_t* pairs, uint64_t stream, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pairs[i] = rounding_pair(stream, first + i);
}

// The bits that a block of elements draws.
struct Random {
  uint64_t pairs[kBlock / 2 + 1];

  // Those of `size` elements from the `first` on.
  const uint32_t* draw(uint64_t stream, int64_t first, int64_t size) {
    draw_pairs(pairs, stream, first / 2, (first + size + 1) / 2 - first / 2);
    return reinterpret_cast<const uint32_t*>(pairs) + first % 2;
  }
};

// A tensor as a flat array of bytes.
struct Array {
  char* data = nullptr;
  int64_t item = 0;  // bytes an element
  bool stochastic = false;
  uint64_t stream = 0;

  Array() = default;
  Array(const Tensor& tensor, const uint64_t* seed, uint64_t number)
      : data(static_cast<char*>(tensor.data_ptr())), item(item_size(tensor.scalar_type())) {
    stochastic = seed != nullptr && item == 2;
    if (stochastic) stream = rounding_stream(*seed, number);
  }

  char* at(int64_t i) const { return data + i * item; }

  const uint32_t* draw(Random& random, int64_t first, int64_t size) const {
    return stochastic ? random.draw(stream, first, size) : nullptr;
  }
};

// A seed in host memory; null: nothing is stochastic.
[[maybe_unused]] const uint64_t* seed_in(const std::optional<Tensor>& seed) {
  return seed.has_value() ? static_cast<const uint64_t*>(seed->const_data_ptr()) : nullptr;
}

using UpdateFunction = void(void*, const void*, const uint32_t*, int64_t, double);
using CastFunction = void(void*, const void*, const uint32_t*, int64_t);

[[maybe_unused]] UpdateFunction* update_function(
    ScalarType target, ScalarType source, bool stochastic) {
  return visit_pair(target, source, [&](auto t, auto s) {
    using Target = typename decltype(t)::type;
    using Source = typename decltype(s)::type;
    return stochastic ? &update_row<Target, Source, kNarrow<Target>>
                      : &update_row<Target, Source, false>;
  });
}

[[maybe_unused]] CastFunction* cast_function(ScalarType shadow, ScalarType target, bool stochastic) {
  return visit_pair(shadow, target, [&](auto s, auto t) {
    using Shadow = typename decltype(s)::type;
    using Target = typename decltype(t)::type;
    return stochastic ? &cast_row<Shadow, Target, kNarrow<Shadow>>
                      : &cast_row<Shadow, Target, false>;
  });
}

}  // namespace
}  // namespace jepa_fast

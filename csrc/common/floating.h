// The floating-point types that kernels take, and the step from a runtime dtype to one of them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "host_device.h"

namespace jepa_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// What a kernel computes in for tensors of type T: float32, but float64 for float64.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct Type {
  using type = T;
};

// visitor(Type<T>{}) for the C++ type T of `dtype`.
template <typename Visitor>
auto visit_floating(ScalarType dtype, Visitor&& visitor) {
  switch (dtype) {
    case ScalarType::Float:
      return visitor(Type<float>{});
    case ScalarType::Double:
      return visitor(Type<double>{});
    case ScalarType::BFloat16:
      return visitor(Type<BFloat16>{});
    case ScalarType::Half:
      return visitor(Type<Half>{});
    default:
      throw std::invalid_argument("expected float32, float64, bfloat16 or float16");
  }
}

// Calls visitor(Type<A>{}, Type<B>{}) for the C++ types A and B of two dtypes.
template <typename Visitor>
auto visit_pair(ScalarType a, ScalarType b, Visitor&& visitor) {
  return visit_floating(a, [&](auto type_a) {
    return visit_floating(b, [&](auto type_b) { return visitor(type_a, type_b); });
  });
}

inline int64_t item_size(ScalarType dtype) {
  return visit_floating(
      dtype, [](auto type) -> int64_t { return sizeof(typename decltype(type)::type); });
}

// The value of one number of `dtype` in host memory.
inline double read_scalar(ScalarType dtype, const void* data) {
  return visit_floating(dtype, [&](auto type) {
    return static_cast<double>(*static_cast<const typename decltype(type)::type*>(data));
  });
}

}  // namespace jepa_fast

// Products of small float32 matrices, in one thread: for kernels that want the result while it is in
// the cache. The right-hand matrix and the result are panels of 32 columns, the left-hand one is made
// of panels, too, so that an array of panels serves as either, and transposed as well.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jepa_fast {

constexpr int64_t kPanel = 32;  // columns
// Longer sums are made of several, which rounds less.
constexpr int64_t kSummands = 64;

// A matrix [rows, depth]. Element (r, k) of its blocks of `block_depth` lies at r * kPanel + k, or at
// r + k * kPanel if it is transposed.
struct Left {
  const float* data;
  int64_t rows, depth;
  int64_t block_depth, block_stride;
};

namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define JEPA_FAST_HAS_ARCHITECTURES 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
#define JEPA_FAST_VECTOR 64
#define JEPA_FAST_ROWS 12
#include "panel_product.inl"
#undef JEPA_FAST_VECTOR
#undef JEPA_FAST_ROWS
}  // namespace v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define JEPA_FAST_VECTOR 32
#define JEPA_FAST_ROWS 6
#include "panel_product.inl"
#undef JEPA_FAST_VECTOR
#undef JEPA_FAST_ROWS
}  // namespace v3
#pragma GCC pop_options
#endif

namespace baseline {
#define JEPA_FAST_VECTOR 16
#define JEPA_FAST_ROWS 6
#include "panel_product.inl"
#undef JEPA_FAST_VECTOR
#undef JEPA_FAST_ROWS
}  // namespace baseline

using PanelProduct = void (*)(const Left&, const float*, int64_t, float*);

template <int row_stride, int step>
PanelProduct widest_product() {
#if defined(JEPA_FAST_HAS_ARCHITECTURES)
  if (__builtin_cpu_supports("x86-64-v4")) return &v4::panel_product<row_stride, step>;
  if (__builtin_cpu_supports("x86-64-v3")) return &v3::panel_product<row_stride, step>;
#endif
  return &baseline::panel_product<row_stride, step>;
}

// out [rows, kPanel] = left [rows, depth] right [depth, kPanel]. Only the first `columns` columns and
// up to a whole vector are multiplied, at least one; the rest is 0.
inline void multiply(const Left& left, const float* right, int64_t columns, float* out) {
  static const PanelProduct product = widest_product<kPanel, 1>();
  product(left, right, columns, out);
}

// The same for a left-hand matrix that lies transposed.
inline void multiply_transposed(const Left& left, const float* right, int64_t columns, float* out) {
  static const PanelProduct product = widest_product<1, kPanel>();
  product(left, right, columns, out);
}

}  // namespace
}  // namespace jepa_fast

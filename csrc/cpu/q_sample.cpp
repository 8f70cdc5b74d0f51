// Noised targets and the loss of what is predicted of them on the CPU: noise is drawn a row at a time, where
// it is needed, and stays in the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <numeric>
#include <optional>

#include "../common/normal.h"
#include "pages.h"
#include "rows.h"
#include "sums.h"

namespace jepa_fast {
namespace {

// The noise of row `row`, as many groups as it takes.
template <typename Lane>
JEPA_FAST_CLONES void draw_row(uint64_t seed, uint64_t row, int64_t groups, float* noise) {
  for (int64_t group = 0; group < groups; ++group) {
    float* const out = noise + group * kNormalGroup;
#pragma omp simd
    for (int lane = 0; lane < kNormalLanes; ++lane) draw_lane<Lane>(seed, row, group, lane, out);
  }
  for (int64_t group = 0; group < groups; ++group) {
    float* const out = noise + group * kNormalGroup;
#pragma omp simd
    for (int lane = 0; lane < kNormalLanes; ++lane) normal_lane(lane, out);
  }
}

using DrawRow = void (*)(uint64_t, uint64_t, int64_t, float*);

DrawRow fastest_draw() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512dq")) return &draw_row<uint64_t>;
#endif
  return &draw_row<uint32_t>;
}

// Rows of noise, one at a time.
class Noise {
 public:
  Noise(const Tensor& seed, int64_t first_row, int64_t width)
      : seed_(*static_cast<const uint64_t*>(seed.const_data_ptr())),
        first_row_(first_row),
        groups_((width + kNormalGroup - 1) / kNormalGroup),
        row_(groups_ * kNormalGroup) {}

  const float* row(int64_t i) {
    static const DrawRow draw_row = fastest_draw();
    draw_row(seed_, static_cast<uint64_t>(first_row_ + i), groups_, row_.data());
    return row_.data();
  }

 private:
  uint64_t seed_;
  int64_t first_row_, groups_;
  std::vector<float> row_;
};

template <typename To, typename From, typename T>
JEPA_FAST_CLONES void noised_row(
    const From* target, const float* e, T signal, T noise, int64_t width, To* x) {
  for (int64_t i = 0; i < width; ++i) {
    const T wide = static_cast<T>(static_cast<Compute<From>>(target[i]));
    x[i] = static_cast<To>(signal * wide + noise * static_cast<T>(e[i]));
  }
}

// target [T, D] by its strides; signal and noise [T] or [n, T], contiguous; x [.., T, D], contiguous.
void q_sample(
    Tensor target, Tensor signal, Tensor noise, Tensor seed, int64_t first_row, Tensor x) {
  const int64_t tokens = target.size(0), width = target.size(1), rows = signal.numel();
  const int64_t stride = target.stride(0);
  expect_writes(x);
  visit_floating(target.scalar_type(), [&](auto type) {
    using From = typename decltype(type)::type;
    using T = Compute<From>;
    const auto* from = static_cast<const From*>(target.const_data_ptr());
    const auto* kept = static_cast<const T*>(signal.const_data_ptr());
    const auto* added = static_cast<const T*>(noise.const_data_ptr());
    auto* const to = static_cast<From*>(x.data_ptr());
    torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
      Noise drawn(seed, first_row, width);
      for (int64_t i = begin; i < end; ++i) {
        noised_row(
            from + i % tokens * stride, drawn.row(i), kept[i], added[i], width, to + i * width);
      }
    });
  });
}

// The sum of a row's squared residuals, and what they are times `factor` if there is room for it.
template <bool with_target, bool with_slope, typename T>
JEPA_FAST_CLONES double squares(
    const T* prediction, const T* target, const float* e, T factor, int64_t width, T* slope) {
  return sum_over<T>(width, [&](int64_t i) {
    T residual = prediction[i];
    if constexpr (with_target) {
      residual -= target[i] - static_cast<T>(e[i]);
    } else {
      residual -= static_cast<T>(e[i]);
    }
    if constexpr (with_slope) slope[i] = residual * factor;
    return residual * residual;
  });
}

template <typename T>
using Squares = double (*)(const T*, const T*, const float*, T, int64_t, T*);

template <typename T>
Squares<T> choose(bool with_target, bool with_slope) {
  if (with_target) return with_slope ? &squares<true, true, T> : &squares<true, false, T>;
  return with_slope ? &squares<false, true, T> : &squares<false, false, T>;
}

// prediction [T, D] or [n, T, D], contiguous; target [T, D] in what it is computed in, by its strides; loss
// 0-dim. The loss's gradient goes to slope, if there is one: contiguous, of prediction's shape.
void denoising_loss(
    Tensor prediction,
    std::optional<Tensor> target,
    Tensor seed,
    int64_t first_row,
    Tensor loss,
    std::optional<Tensor> slopes) {
  const int64_t last = prediction.dim() - 1;
  const int64_t tokens = prediction.size(last - 1), width = prediction.size(last);
  const int64_t rows = last == 2 ? prediction.size(0) * tokens : tokens;
  const int64_t stride = target.has_value() ? target->stride(0) : 0;
  const double scale = 1.0 / static_cast<double>(std::max<int64_t>(1, rows * width));
  std::vector<double> sums(rows);
  if (slopes.has_value()) expect_writes(*slopes);

  visit_floating(prediction.scalar_type(), [&](auto type) {
    using From = typename decltype(type)::type;
    using T = Compute<From>;
    using Slope = std::conditional_t<std::is_same_v<From, Half>, float, From>;
    const auto* predicted = static_cast<const From*>(prediction.const_data_ptr());
    const T* wanted =
        target.has_value() ? static_cast<const T*>(target->const_data_ptr()) : nullptr;
    auto* const out = slopes.has_value() ? static_cast<Slope*>(slopes->data_ptr()) : nullptr;
    const Squares<T> squares_of = choose<T>(target.has_value(), slopes.has_value());
    const T factor = static_cast<T>(2 * scale);
    torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
      Noise drawn(seed, first_row, width);
      std::vector<T> wide_prediction(width), wide_slope(width);
      for (int64_t i = begin; i < end; ++i) {
        const From* const narrow = predicted + i * width;
        const T* const goal = wanted == nullptr ? nullptr : wanted + i % tokens * stride;
        const T* const row = widened<T>(narrow, wide_prediction);
        Slope* const to = out == nullptr ? nullptr : out + i * width;
        const float* const e = drawn.row(i);
        if constexpr (std::is_same_v<T, Slope>) {
          sums[i] = squares_of(row, goal, e, factor, width, to);
        } else {
          sums[i] = squares_of(row, goal, e, factor, width, wide_slope.data());
          if (to != nullptr) convert_row(to, wide_slope.data(), width);
        }
      }
    });
    // In the rows' order, whatever the threads' was.
    const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
    *static_cast<T*>(loss.data_ptr()) = static_cast<T>(sum * scale);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("q_sample", TORCH_BOX(&q_sample));
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
}

}  // namespace jepa_fast

// Gather, LayerNorm and loss on the CPU: predictions are read once a pass, targets are never stored.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <numeric>
#include <optional>

#include "pages.h"
#include "rows.h"
#include "sums.h"

namespace jepa_fast {
namespace {

enum Kind : int64_t { kSmoothL1, kL1, kL2, kL2Norm };

// How a target comes from the teacher's row: (x - mean) * scale.
template <typename T>
struct Norm {
  T mean = 0, scale = 1;

  inline __attribute__((always_inline)) T operator()(T x) const { return (x - mean) * scale; }
};

// Of LayerNorm without affine.
template <typename T>
JEPA_FAST_CLONES Norm<T> norm_of(const T* row, int64_t width, double eps) {
  Norm<T> norm;
  norm.mean = static_cast<T>(sum_over<T>(width, [&](int64_t i) { return row[i]; }) / width);
  const double squares = sum_over<T>(width, [&](int64_t i) {
    const T centred = row[i] - norm.mean;
    return centred * centred;
  });
  norm.scale = static_cast<T>(1 / std::sqrt(squares / width + eps));
  return norm;
}

// What a loss needs beside the rows.
template <typename T>
struct Options {
  int64_t width;
  T beta, inverse_beta;  // smooth L1's
  double scale;          // of the slope: 1 / tokens
};

// A token's loss before the mean over tokens, and its slope times `scale` if there is room for it.
template <Kind kind, bool with_slope, typename T>
JEPA_FAST_CLONES double token_loss(
    const T* prediction, const T* teacher, Norm<T> norm, Options<T> options, T* slope) {
  const int64_t width = options.width;
  const auto residual = [&](int64_t i) { return prediction[i] - norm(teacher[i]); };
  if constexpr (kind == kL2Norm) {
    const double squares = sum_over<T>(width, [&](int64_t i) {
      const T r = residual(i);
      return r * r;
    });
    const double length = std::sqrt(squares);
    if constexpr (with_slope) {  // the subgradient 0 where the residual is 0
      const T factor = static_cast<T>(length == 0 ? 0 : options.scale / length);
      for (int64_t i = 0; i < width; ++i) slope[i] = residual(i) * factor;
    }
    return length;
  }
  const T factor = static_cast<T>((kind == kL2 ? 2 : 1) * options.scale / width);
  const double sum = sum_over<T>(width, [&](int64_t i) {
    const T r = residual(i), distance = std::abs(r);
    if constexpr (kind == kSmoothL1) {
      if constexpr (with_slope) {
        const T ratio = r * options.inverse_beta, above = T(1) < ratio ? T(1) : ratio;
        slope[i] = (above < T(-1) ? T(-1) : above) * factor;
      }
      // 0.5 r^2 below beta and beta |r| - 0.5 beta^2 above; over beta below.
      const T inner = options.beta < distance ? options.beta : distance;
      return inner * (distance - T(0.5) * inner);
    } else if constexpr (kind == kL1) {
      if constexpr (with_slope) slope[i] = (r > 0 ? T(1) : r < 0 ? T(-1) : r) * factor;
      return distance;
    } else {
      if constexpr (with_slope) slope[i] = r * factor;
      return r * r;
    }
  });
  return sum / width / (kind == kSmoothL1 ? static_cast<double>(options.beta) : 1.0);
}

template <typename T>
using TokenLoss = double (*)(const T*, const T*, Norm<T>, Options<T>, T*);

template <typename T>
TokenLoss<T> choose(int64_t kind, bool with_slope) {
  switch (kind) {
    case kSmoothL1:
      return with_slope ? &token_loss<kSmoothL1, true, T> : &token_loss<kSmoothL1, false, T>;
    case kL1:
      return with_slope ? &token_loss<kL1, true, T> : &token_loss<kL1, false, T>;
    case kL2:
      return with_slope ? &token_loss<kL2, true, T> : &token_loss<kL2, false, T>;
    default:
      return with_slope ? &token_loss<kL2Norm, true, T> : &token_loss<kL2Norm, false, T>;
  }
}

// The tokens of a call: row i of the predictions, block-major, and what belongs to it.
struct Tokens {
  Rows prediction, teacher;  // [M * B, Kt, D], [B, N, D]
  std::vector<int64_t> patch;
  const bool* counts;  // null: all
  int64_t batch, blocks;

  Tokens(
      const Tensor& predictions,
      const Tensor& teachers,
      const Tensor& index,
      const std::optional<Tensor>& mask)
      : prediction(predictions),
        teacher(teachers),
        patch(read_index(index, teacher.count)),
        counts(mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr),
        batch(index.size(0)),
        blocks(index.size(1)) {}

  int64_t size() const { return patch.size(); }

  // Where token i's entry lies in index and mask, which are batch-major.
  int64_t place(int64_t i) const {
    const int64_t sequence = i / prediction.count;
    return (sequence % batch * blocks + sequence / batch) * prediction.count + i % prediction.count;
  }

  bool is_counted(int64_t i) const { return counts == nullptr || counts[place(i)]; }

  // 1 if none: the sum over them is 0 then.
  int64_t counted() const {
    if (counts == nullptr) return std::max<int64_t>(1, size());
    return std::max<int64_t>(1, std::count(counts, counts + size(), true));
  }

  template <typename From>
  From* prediction_row(int64_t i) const {
    return prediction.row<From>(i / prediction.count, i % prediction.count);
  }

  template <typename From>
  const From* teacher_row(int64_t i) const {
    return teacher.row<From>(i / prediction.count % batch, patch[place(i)]);
  }
};

// prediction [M * B, Kt, D], teacher [B, N, D]; index and mask [B, M, Kt], contiguous; loss 0-dim.
// The loss's gradient goes to slope, if there is one: contiguous, of prediction's shape.
void latent_loss(
    Tensor predictions,
    Tensor teachers,
    Tensor index,
    std::optional<Tensor> mask,
    int64_t kind,
    bool normalize,
    double beta,
    double eps,
    Tensor loss,
    std::optional<Tensor> slopes) {
  const Tokens tokens(predictions, teachers, index, mask);
  const int64_t width = tokens.prediction.width;
  const double scale = 1.0 / tokens.counted();
  std::vector<double> losses(tokens.size());
  if (slopes.has_value()) expect_writes(*slopes);

  const auto run = [&](auto prediction, auto teacher, auto slope) {
    using Prediction = typename decltype(prediction)::type;
    using Teacher = typename decltype(teacher)::type;
    using Slope = typename decltype(slope)::type;
    using T = Compute<Prediction>;
    const Options<T> options{width, static_cast<T>(beta), static_cast<T>(1 / beta), scale};
    auto* const out = slopes.has_value() ? static_cast<Slope*>(slopes->data_ptr()) : nullptr;
    const TokenLoss<T> loss_of = choose<T>(kind, out != nullptr);
    torch::stable::parallel_for(
        0, tokens.size(), row_grain(width), [&](int64_t begin, int64_t end) {
          std::vector<T> wide_target(width), wide_prediction(width), wide_slope(width);
          for (int64_t i = begin; i < end; ++i) {
            Slope* const to = out == nullptr ? nullptr : out + i * width;
            if (!tokens.is_counted(i)) {
              if (to != nullptr) std::fill(to, to + width, Slope(0));
              continue;
            }
            if (i + 1 < end) prefetch_row(tokens.teacher_row<Teacher>(i + 1), tokens.teacher.bytes);
            const T* target = widened<T>(tokens.teacher_row<Teacher>(i), wide_target);
            const T* predicted = widened<T>(tokens.prediction_row<Prediction>(i), wide_prediction);
            const Norm<T> norm = normalize ? norm_of(target, width, eps) : Norm<T>{};
            if constexpr (std::is_same_v<T, Slope>) {
              losses[i] = loss_of(predicted, target, norm, options, to);
            } else {
              losses[i] = loss_of(predicted, target, norm, options, wide_slope.data());
              if (to != nullptr) convert_row(to, wide_slope.data(), width);
            }
          }
        });
    // In the tokens' order, whatever the threads' was.
    const double sum = std::accumulate(losses.begin(), losses.end(), 0.0);
    *static_cast<T*>(loss.data_ptr()) = static_cast<T>(sum * scale);
  };
  visit_pair(predictions.scalar_type(), teachers.scalar_type(), [&](auto prediction, auto teacher) {
    // In float16 the slopes of many tokens would be 0.
    using Prediction = typename decltype(prediction)::type;
    using Slope = std::conditional_t<std::is_same_v<Prediction, Half>, float, Prediction>;
    run(prediction, teacher, Type<Slope>{});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("latent_loss", TORCH_BOX(&latent_loss));
}

}  // namespace jepa_fast

// Gather, LayerNorm and loss on the CPU: predictions are read once a pass, targets are never stored.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <numeric>
#include <optional>

#include "rows.h"

namespace jepa_fast {
namespace {

enum Kind : int64_t { kSmoothL1, kL1, kL2, kL2Norm };

// Sums run over this many elements in the compute type, and over those sums in float64.
constexpr int64_t kBlock = 128;
// Sums that do not wait for each other, as one addition takes several cycles.
constexpr int64_t kSums = 4;

template <typename T, typename Term>
inline __attribute__((always_inline)) double sum_over(int64_t width, Term&& term) {
  constexpr int64_t kPart = kBlock / kSums;
  double total = 0;
  int64_t begin = 0;
  for (; begin + kBlock <= width; begin += kBlock) {
    T a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = begin; i < begin + kPart; ++i) {
      a += term(i);
      b += term(i + kPart);
      c += term(i + 2 * kPart);
      d += term(i + 3 * kPart);
    }
    total += (a + b) + (c + d);
  }
  T rest = 0;
#pragma omp simd reduction(+ : rest)
  for (int64_t i = begin; i < width; ++i) rest += term(i);
  return total + rest;
}

// `row` in the compute type, after LayerNorm without affine if `normalize`.
template <typename T, typename From>
JEPA_FAST_CLONES void target_row(
    T* target, const From* row, int64_t width, bool normalize, double eps) {
  for (int64_t i = 0; i < width; ++i) target[i] = static_cast<T>(static_cast<Compute<From>>(row[i]));
  if (!normalize) return;
  const T mean = static_cast<T>(sum_over<T>(width, [&](int64_t i) { return target[i]; }) / width);
  const double squares = sum_over<T>(width, [&](int64_t i) {
    const T centred = target[i] - mean;
    return centred * centred;
  });
  const T scale = static_cast<T>(1 / std::sqrt(squares / width + eps));
  for (int64_t i = 0; i < width; ++i) target[i] = (target[i] - mean) * scale;
}

// A token's loss, before the mean over tokens.
template <typename T>
JEPA_FAST_CLONES double token_loss(
    Kind kind, const T* prediction, const T* target, int64_t width, T beta) {
  switch (kind) {
    case kSmoothL1:
      // 0.5 r^2 below beta and beta |r| - 0.5 beta^2 above, over beta.
      return sum_over<T>(
                 width,
                 [&](int64_t i) {
                   const T distance = std::abs(prediction[i] - target[i]);
                   const T inner = beta < distance ? beta : distance;
                   return inner * (distance - T(0.5) * inner);
                 }) /
             beta / width;
    case kL1:
      return sum_over<T>(width, [&](int64_t i) { return std::abs(prediction[i] - target[i]); }) /
             width;
    default: {
      const double squares = sum_over<T>(width, [&](int64_t i) {
        const T residual = prediction[i] - target[i];
        return residual * residual;
      });
      return kind == kL2 ? squares / width : std::sqrt(squares);
    }
  }
}

// The loss's slope times `scale`. `inverse_beta` is read for smooth L1.
template <typename T>
JEPA_FAST_CLONES void token_slope(
    Kind kind,
    T* slope,
    const T* prediction,
    const T* target,
    int64_t width,
    T inverse_beta,
    double scale) {
  if (kind == kSmoothL1) {
    const T factor = static_cast<T>(scale / width);
    for (int64_t i = 0; i < width; ++i) {
      const T residual = (prediction[i] - target[i]) * inverse_beta;
      const T above = T(1) < residual ? T(1) : residual;
      slope[i] = (above < T(-1) ? T(-1) : above) * factor;
    }
  } else if (kind == kL1) {
    const T factor = static_cast<T>(scale / width);
    for (int64_t i = 0; i < width; ++i) {
      const T residual = prediction[i] - target[i];
      slope[i] = (residual > 0 ? T(1) : residual < 0 ? T(-1) : residual) * factor;
    }
  } else {
    double factor = 2 * scale / width;
    if (kind == kL2Norm) {
      const double norm = token_loss(kind, prediction, target, width, T(0));
      factor = norm == 0 ? 0 : scale / norm;  // the subgradient 0 where the residual is 0
    }
    const T rounded = static_cast<T>(factor);
    for (int64_t i = 0; i < width; ++i) slope[i] = (prediction[i] - target[i]) * rounded;
  }
}

// `row` in the compute type: itself, or a copy in `scratch`.
template <typename T, typename From>
const T* widened(const From* row, std::vector<T>& scratch) {
  if constexpr (std::is_same_v<T, From>) {
    return row;
  } else {
    convert_row(scratch.data(), row, scratch.size());
    return scratch.data();
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

  const auto run = [&](auto prediction, auto teacher, auto slope) {
    using Prediction = typename decltype(prediction)::type;
    using Teacher = typename decltype(teacher)::type;
    using Slope = typename decltype(slope)::type;
    using T = Compute<Prediction>;
    const T narrow_beta = static_cast<T>(beta), inverse_beta = static_cast<T>(1 / beta);
    auto* const out = slopes.has_value() ? static_cast<Slope*>(slopes->data_ptr()) : nullptr;
    torch::stable::parallel_for(
        0, tokens.size(), row_grain(width), [&](int64_t begin, int64_t end) {
          std::vector<T> target_scratch(width), scratch(width);
          T* const target = target_scratch.data();
          for (int64_t i = begin; i < end; ++i) {
            Slope* const to = out == nullptr ? nullptr : out + i * width;
            if (!tokens.is_counted(i)) {
              if (to != nullptr) std::fill(to, to + width, Slope(0));
              continue;
            }
            target_row(target, tokens.teacher_row<Teacher>(i), width, normalize, eps);
            const T* predicted = widened<T>(tokens.prediction_row<Prediction>(i), scratch);
            losses[i] =
                token_loss<T>(static_cast<Kind>(kind), predicted, target, width, narrow_beta);
            if (to == nullptr) continue;
            if constexpr (std::is_same_v<T, Slope>) {
              token_slope<T>(
                  static_cast<Kind>(kind), to, predicted, target, width, inverse_beta, scale);
            } else {  // in place of the target, which has been read
              token_slope<T>(
                  static_cast<Kind>(kind), target, predicted, target, width, inverse_beta, scale);
              convert_row(to, target, width);
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

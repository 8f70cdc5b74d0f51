// Likelihoods of mixtures and their gradients on the CPU: parameters are read once a pass, and what
// lies between parameters and likelihood stays in the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cfloat>
#include <cmath>
#include <optional>

#include "../common/exponential.h"
#include "pages.h"
#include "rows.h"
#include "sums.h"

namespace jepa_fast {
namespace {

enum Family : int { kGaussian, kLogistic };
enum ScaleMap : int { kExp, kSoftplus };

// What Gaussian log-densities lack below, a coordinate: rounded at every term it would add up.
template <Family family>
constexpr double kConstant = family == kGaussian ? 0.91893853320467274 : 0.0;  // log(2 pi) / 2

// Scales stay normal numbers, whose exponents are what they say.
constexpr float kLargestScale = 1e38f, kSmallestFloor = FLT_MIN;

constexpr float kLn2 = 0.693147181f;
constexpr int32_t kBias = 127;  // of a float32's exponent

// A component at one coordinate of a target.
template <Family family, ScaleMap map>
struct Component {
  float scale, inverse, z, raw;

  inline __attribute__((always_inline)) Component(
      float target, float loc, float log_scale, float floor)
      : raw(map == kExp ? bounded_exponential(log_scale) : softplus(log_scale)) {
    if constexpr (map == kSoftplus) raw = raw > kLargestScale ? kLargestScale : raw;
    scale = floor + raw;
    inverse = 1.0f / scale;
    z = (target - loc) * inverse;
  }

  // The density, but for the constant, is exp(log_part) * factor with a factor in (1 / 2, 1]: the
  // logarithm of a scale's power of 2 is at hand.
  struct Parts {
    float log_part, factor;
  };

  inline __attribute__((always_inline)) Parts density() const {
    const int32_t n = (scale_bits() >> 23) - kBias;
    return {log_shape() - kLn2 * static_cast<float>(n), inverse * power_of_two(n)};
  }

  inline __attribute__((always_inline)) int32_t scale_bits() const {
    const float number = scale;
    int32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
  }

  // The slope of the density's potential, -d log p / dz.
  inline __attribute__((always_inline)) float potential_slope() const {
    if constexpr (family == kGaussian) {
      return z;
    } else {  // tanh(z / 2)
      const float decay = exponential(-std::abs(z));
      const float slope = (1.0f - decay) / (1.0f + decay);
      return z < 0 ? -slope : slope;
    }
  }

  inline __attribute__((always_inline)) float log_shape() const {
    if constexpr (family == kGaussian) {
      return -0.5f * z * z;
    } else {
      const float distance = std::abs(z);
      return -distance - 2.0f * softplus(-distance);
    }
  }

  // d scale / d log_scale.
  inline __attribute__((always_inline)) float stretch(float log_scale) const {
    return map == kExp ? raw : sigmoid(log_scale);
  }
};

// What belongs to one token, in float32; rows of components lie `stride` apart.
struct Token {
  const float* target;      // [D]
  const float* logits;      // [K], or K rows of D
  const float* loc;         // K rows of D
  const float* log_scale;   // K rows of D
  int64_t logit_stride, loc_stride, scale_stride;
  int64_t next_logits, next_loc, next_log_scale;  // from here to the next token's
};

// Where the gradients of one token go.
struct Gradient {
  float* target;  // null where none is wanted
  float* logits;
  float* loc;
  float* log_scale;
  int64_t logit_stride, loc_stride, scale_stride;
  int64_t next_logits, next_loc, next_log_scale;
};

struct Sizes {
  int64_t components, width;
  float floor;
};

// Joint events: one component for all coordinates of a token.

constexpr int64_t kFactors = 64;  // in [1, 2), whose product is a float32

// The log-density of a component, but for the constant. Scales are multiplied instead of the sum of
// their logarithms: powers of 2 as whole numbers, what is left of them in `product`.
template <Family family, ScaleMap map>
JEPA_FAST_CLONES double joint_log_density(
    const float* target, const float* loc, const float* log_scale, Sizes sizes) {
  double sum = 0;
  for (int64_t first = 0; first < sizes.width; first += kFactors * kLanes) {
    const int64_t end = std::min(sizes.width, first + kFactors * kLanes);
    float shape[kLanes] = {}, product[kLanes];
    int32_t power[kLanes] = {};
    std::fill(product, product + kLanes, 1.0f);
    const auto add = [&](int64_t j, int64_t i) __attribute__((always_inline)) {
      const Component<family, map> component(target[i], loc[i], log_scale[i], sizes.floor);
      const int32_t bits = component.scale_bits();
      const int32_t left = (bits & 0x007FFFFF) | kBias << 23;
      float factor;
      memcpy(&factor, &left, sizeof factor);
      shape[j] += component.log_shape();
      product[j] *= factor;
      power[j] += (bits >> 23) - kBias;
    };
    int64_t begin = first;
    for (; begin + kLanes <= end; begin += kLanes) {
#pragma omp simd
      for (int64_t j = 0; j < kLanes; ++j) add(j, begin + j);
    }
    for (int64_t j = 0; begin + j < end; ++j) add(j, begin + j);
    int64_t powers = 0;
    for (int64_t j = 0; j < kLanes; ++j) powers += power[j];
    sum -= M_LN2 * static_cast<double>(powers);
    sum += sum_over<float>(kLanes, [&](int64_t j) {
      return shape[j] - logarithm_of_normal(product[j]);
    });
  }
  return sum;
}

// The gradients of `weight` times a component's log-density, negated.
template <Family family, ScaleMap map>
JEPA_FAST_CLONES void joint_component_gradient(
    const float* target,
    const float* loc,
    const float* log_scale,
    Sizes sizes,
    float weight,
    float* loc_gradient,
    float* scale_gradient) {
#pragma omp simd
  for (int64_t j = 0; j < sizes.width; ++j) {
    const Component<family, map> component(target[j], loc[j], log_scale[j], sizes.floor);
    const float slope = component.potential_slope();
    const float stretch = component.stretch(log_scale[j]);
    loc_gradient[j] = -weight * slope * component.inverse;
    scale_gradient[j] = weight * (1.0f - component.z * slope) * component.inverse * stretch;
  }
}

JEPA_FAST_CLONES void subtract_row(float* from, const float* row, int64_t width) {
  for (int64_t j = 0; j < width; ++j) from[j] -= row[j];
}

// The log of the sum of exponentials; minus infinity where all are.
double log_sum_exp(const double* values, int64_t count) {
  const double top = *std::max_element(values, values + count);
  if (!std::isfinite(top)) return top;
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += std::exp(values[k] - top);
  return top + std::log(sum);
}

// The NLL of a token, and the components' posterior.
template <Family family, ScaleMap map>
double joint_nll(const Token& token, Sizes sizes, double* scratch, float* posterior) {
  double* const logits = scratch;
  double* const joint = scratch + sizes.components;
  for (int64_t k = 0; k < sizes.components; ++k) {
    logits[k] = token.logits[k];
    joint[k] = logits[k] + joint_log_density<family, map>(
                               token.target,
                               token.loc + k * token.loc_stride,
                               token.log_scale + k * token.scale_stride,
                               sizes);
  }
  const double evidence = log_sum_exp(joint, sizes.components);
  for (int64_t k = 0; k < sizes.components; ++k) {
    posterior[k] = static_cast<float>(std::exp(joint[k] - evidence));
  }
  const double constant = kConstant<family> * static_cast<double>(sizes.width);
  return log_sum_exp(logits, sizes.components) - evidence + constant;
}

template <Family family, ScaleMap map>
void joint_gradient(
    const Token& token,
    Sizes sizes,
    const float* posterior,
    float grad,
    double* scratch,
    const Gradient& out) {
  double* const logits = scratch;
  std::copy(token.logits, token.logits + sizes.components, logits);
  const double evidence = log_sum_exp(logits, sizes.components);
  for (int64_t k = 0; k < sizes.components; ++k) {
    const double prior = std::exp(logits[k] - evidence);
    out.logits[k] = static_cast<float>(grad * (prior - posterior[k]));
  }
  if (out.target != nullptr) std::fill(out.target, out.target + sizes.width, 0.0f);
  for (int64_t k = 0; k < sizes.components; ++k) {
    float* const loc = out.loc + k * out.loc_stride;
    float* const log_scale = out.log_scale + k * out.scale_stride;
    const float weight = grad * posterior[k];
    if (weight == 0) {  // as is common of all components but one; what it is made of stays unread
      std::fill(loc, loc + sizes.width, 0.0f);
      std::fill(log_scale, log_scale + sizes.width, 0.0f);
      continue;
    }
    joint_component_gradient<family, map>(
        token.target,
        token.loc + k * token.loc_stride,
        token.log_scale + k * token.scale_stride,
        sizes,
        weight,
        loc,
        log_scale);
    if (out.target != nullptr) subtract_row(out.target, loc, sizes.width);
  }
}

// Coordinate events: every coordinate draws a component of its own.

// Of a block so few numbers of so many rows are read that the hardware does not see them coming.
template <bool to_write = false>
inline void prefetch_block(const float* next, int64_t count) {
  constexpr int64_t kLine = 16;
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(next + i, to_write);
}

constexpr int64_t kBlock = 64;  // coordinates at a time: what is known of all their components fits
                                // into the first cache

// What is known of a block: for each component a row of kBlock numbers.
struct Block {
  std::vector<float> values;
  float *prior, *joint, *factor, *slope, *stretch;

  explicit Block(int64_t components) : values(5 * components * kBlock) {
    prior = values.data();
    joint = prior + components * kBlock;
    factor = joint + components * kBlock;
    slope = factor + components * kBlock;
    stretch = slope + components * kBlock;
  }
};

// The NLL of coordinates [first, first + count) of a token, and its gradients times `grad`.
template <Family family, ScaleMap map, bool with_gradient>
JEPA_FAST_CLONES double coordinate_block(
    const Token& token,
    Sizes sizes,
    int64_t first,
    int64_t count,
    const Block& block,
    float grad,
    const Gradient& out) {
  // Finite, so that no difference from them is infinity minus itself.
  alignas(64) float top_prior[kBlock], top_joint[kBlock], sum_prior[kBlock], sum_joint[kBlock];
  for (int64_t j = 0; j < count; ++j) {
    top_prior[j] = top_joint[j] = -FLT_MAX;
    sum_prior[j] = sum_joint[j] = 0.0f;
  }
  for (int64_t k = 0; k < sizes.components; ++k) {
    const float* const logits = token.logits + k * token.logit_stride + first;
    prefetch_block(logits + token.next_logits, count);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      top_prior[j] = top_prior[j] < logits[j] ? logits[j] : top_prior[j];
    }
  }
  const float* const target = token.target + first;
  for (int64_t k = 0; k < sizes.components; ++k) {
    const float* const logits = token.logits + k * token.logit_stride + first;
    const float* const loc = token.loc + k * token.loc_stride + first;
    const float* const log_scale = token.log_scale + k * token.scale_stride + first;
    float* const prior = block.prior + k * kBlock;
    float* const joint = block.joint + k * kBlock;
    float* const factor = block.factor + k * kBlock;
    float* const slope = block.slope + k * kBlock;
    float* const stretch = block.stretch + k * kBlock;
    prefetch_block(loc + token.next_loc, count);
    prefetch_block(log_scale + token.next_log_scale, count);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const Component<family, map> component(target[j], loc[j], log_scale[j], sizes.floor);
      // What all logits have in common would round the densities away.
      const float logit = logits[j] - top_prior[j];
      const auto density = component.density();
      joint[j] = logit + density.log_part;
      factor[j] = density.factor;
      top_joint[j] = top_joint[j] < joint[j] ? joint[j] : top_joint[j];
      const float share = exponential_of_negative(logit);
      prior[j] = share;
      sum_prior[j] += share;
      if constexpr (with_gradient) {
        const float potential = component.potential_slope();
        slope[j] = potential * component.inverse;
        stretch[j] =
            (1.0f - component.z * potential) * component.inverse * component.stretch(log_scale[j]);
      }
    }
  }
  for (int64_t k = 0; k < sizes.components; ++k) {
    float* const joint = block.joint + k * kBlock;
    const float* const factor = block.factor + k * kBlock;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      joint[j] = exponential_of_negative(joint[j] - top_joint[j]) * factor[j];
      sum_joint[j] += joint[j];
    }
  }
  if constexpr (with_gradient) {
    alignas(64) float share_prior[kBlock], target_gradient[kBlock];
    for (int64_t j = 0; j < count; ++j) {
      share_prior[j] = grad / sum_prior[j];
      target_gradient[j] = 0.0f;
    }
    for (int64_t k = 0; k < sizes.components; ++k) {
      const float* const prior = block.prior + k * kBlock;
      const float* const joint = block.joint + k * kBlock;
      const float* const slope = block.slope + k * kBlock;
      const float* const stretch = block.stretch + k * kBlock;
      float* const logit_gradient = out.logits + k * out.logit_stride + first;
      float* const loc_gradient = out.loc + k * out.loc_stride + first;
      float* const scale_gradient = out.log_scale + k * out.scale_stride + first;
      prefetch_block<true>(logit_gradient + out.next_logits, count);
      prefetch_block<true>(loc_gradient + out.next_loc, count);
      prefetch_block<true>(scale_gradient + out.next_log_scale, count);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        const float posterior = joint[j] / sum_joint[j] * grad;  // grad where there is but one
        logit_gradient[j] = prior[j] * share_prior[j] - posterior;
        // A component without a share has no gradient, however far off it is.
        const float by_target = posterior == 0 ? 0.0f : posterior * slope[j];
        loc_gradient[j] = -by_target;
        scale_gradient[j] = posterior == 0 ? 0.0f : posterior * stretch[j];
        target_gradient[j] += by_target;
      }
    }
    if (out.target != nullptr) std::copy(target_gradient, target_gradient + count, out.target + first);
  }
  return sum_over<float>(count, [&](int64_t j) {
    return logarithm(sum_prior[j] / sum_joint[j]) - top_joint[j];
  });
}

template <Family family, ScaleMap map, bool with_gradient>
double coordinate_nll(
    const Token& token, Sizes sizes, const Block& block, float grad, const Gradient& out) {
  double nll = kConstant<family> * static_cast<double>(sizes.width);
  for (int64_t first = 0; first < sizes.width; first += kBlock) {
    const int64_t count = std::min(kBlock, sizes.width - first);
    nll += coordinate_block<family, map, with_gradient>(
        token, sizes, first, count, block, grad, out);
  }
  return nll;
}

// Tensors as the functions above take them.

// A tensor [T, R, D], of which one token at a time is read, or written, in float32.
class Wide {
 public:
  explicit Wide(const Tensor& tensor) : rows_(tensor), dtype_(tensor.scalar_type()) {}

  // From one row to the next, in what `read` and `place` return.
  int64_t stride() const { return is_float() ? rows_.inner / int64_t{sizeof(float)} : rows_.width; }

  // Room that `read`, `place` and `write` need.
  std::vector<float> scratch() const {
    return std::vector<float>(is_float() ? 0 : rows_.count * rows_.width);
  }

  const float* read(int64_t token, std::vector<float>& scratch) const {
    if (is_float()) return rows_.row<float>(token, 0);
    visit_floating(dtype_, [&](auto type) {
      for (int64_t r = 0; r < rows_.count; ++r) {
        const auto* const row = rows_.row<typename decltype(type)::type>(token, r);
        convert_row(scratch.data() + r * rows_.width, row, rows_.width);
      }
    });
    return scratch.data();
  }

  // From a token to the next in what `read` returns; 0 if that is not where the next one lies.
  int64_t step() const { return is_float() ? rows_.outer / int64_t{sizeof(float)} : 0; }

  // Where a token's values are to be put, before `write` has them in the tensor.
  float* place(int64_t token, std::vector<float>& scratch) const {
    return is_float() ? rows_.row<float>(token, 0) : scratch.data();
  }

  void write(int64_t token, const std::vector<float>& scratch) const {
    if (is_float()) return;
    visit_floating(dtype_, [&](auto type) {
      for (int64_t r = 0; r < rows_.count; ++r) {
        auto* const row = rows_.row<typename decltype(type)::type>(token, r);
        convert_row(row, scratch.data() + r * rows_.width, rows_.width);
      }
    });
  }

 private:
  bool is_float() const { return dtype_ == ScalarType::Float; }

  Rows rows_;
  ScalarType dtype_;
};

struct Inputs {
  Wide target, logits, loc, log_scale;
};

// The gradients' tensors; a missing one is computed, and dropped.
struct Outputs {
  std::optional<Wide> target, logits, loc, log_scale;
};

std::optional<Wide> writable(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return Wide(*tensor);
}

struct Call {
  int64_t tokens;
  Sizes sizes;
  bool is_joint;
  bool is_logistic;
  bool is_softplus;

  Call(const Tensor& loc, bool joint, bool logistic, bool softplus, double floor)
      : tokens(loc.size(0)),
        sizes{loc.size(1), loc.size(2), std::max(kSmallestFloor, static_cast<float>(floor))},
        is_joint(joint),
        is_logistic(logistic),
        is_softplus(softplus) {}

  // visitor(family, map), both as compile-time constants.
  template <typename Visitor>
  void visit(Visitor&& visitor) const {
    const auto with_map = [&](auto family) {
      if (is_softplus) {
        visitor(family, std::integral_constant<ScaleMap, kSoftplus>{});
      } else {
        visitor(family, std::integral_constant<ScaleMap, kExp>{});
      }
    };
    if (is_logistic) {
      with_map(std::integral_constant<Family, kLogistic>{});
    } else {
      with_map(std::integral_constant<Family, kGaussian>{});
    }
  }
};

// What a thread needs to read tokens.
struct Reader {
  const Inputs& inputs;
  std::vector<float> target, logits, loc, log_scale;

  explicit Reader(const Inputs& from)
      : inputs(from),
        target(from.target.scratch()),
        logits(from.logits.scratch()),
        loc(from.loc.scratch()),
        log_scale(from.log_scale.scratch()) {}

  Token read(int64_t token, int64_t end) {
    const bool is_last = token + 1 == end;
    return {
        inputs.target.read(token, target),
        inputs.logits.read(token, logits),
        inputs.loc.read(token, loc),
        inputs.log_scale.read(token, log_scale),
        inputs.logits.stride(),
        inputs.loc.stride(),
        inputs.log_scale.stride(),
        is_last ? 0 : inputs.logits.step(),
        is_last ? 0 : inputs.loc.step(),
        is_last ? 0 : inputs.log_scale.step()};
  }
};

// One of a token's gradients: in its tensor, or in room of its own.
struct Slot {
  const std::optional<Wide>& tensor;
  std::vector<float> scratch;
  int64_t stride;

  Slot(const std::optional<Wide>& out, int64_t rows, int64_t width)
      : tensor(out),
        scratch(out.has_value() ? out->scratch() : std::vector<float>(rows * width)),
        stride(out.has_value() ? out->stride() : width) {}

  float* place(int64_t token) {
    return tensor.has_value() ? tensor->place(token, scratch) : scratch.data();
  }

  int64_t step() const { return tensor.has_value() ? tensor->step() : 0; }

  void write(int64_t token) const {
    if (tensor.has_value()) tensor->write(token, scratch);
  }
};

// Tensors of rows [T, R, D]: target R = 1; logits [T, 1, K] of joint events, else as loc and
// log_scale [T, K, D]. nll [T] and posterior [T, K] (of joint events) are float32.
void mixture_nll(
    Tensor target,
    Tensor logits,
    Tensor loc,
    Tensor log_scale,
    bool is_joint,
    bool is_logistic,
    bool is_softplus,
    double floor,
    Tensor nll,
    Tensor posterior) {
  const Call call(loc, is_joint, is_logistic, is_softplus, floor);
  const Sizes sizes = call.sizes;
  const Inputs inputs{Wide(target), Wide(logits), Wide(loc), Wide(log_scale)};
  auto* const losses = static_cast<float*>(nll.data_ptr());
  auto* const posteriors = static_cast<float*>(posterior.data_ptr());
  call.visit([&](auto family, auto map) {
    const auto run = [&](int64_t begin, int64_t end) {
      Reader reader(inputs);
      const Block block(is_joint ? 0 : sizes.components);
      std::vector<double> sums(2 * sizes.components);
      for (int64_t t = begin; t < end; ++t) {
        const Token token = reader.read(t, end);
        const double loss =
            is_joint ? joint_nll<family(), map()>(
                           token, sizes, sums.data(), posteriors + t * sizes.components)
                     : coordinate_nll<family(), map(), false>(token, sizes, block, 0.0f, {});
        losses[t] = static_cast<float>(loss);
      }
    };
    const int64_t grain = row_grain(sizes.components * sizes.width);
    torch::stable::parallel_for(0, call.tokens, grain, run);
  });
}

// grad [T] float32. Joint events need their posterior, or find it if it is not there. The gradients
// may be written over the inputs. nll [T], if there is one, is found on the way.
void mixture_nll_backward(
    Tensor grad,
    Tensor target,
    Tensor logits,
    Tensor loc,
    Tensor log_scale,
    std::optional<Tensor> posterior,
    bool is_joint,
    bool is_logistic,
    bool is_softplus,
    double floor,
    std::optional<Tensor> nll,
    std::optional<Tensor> grad_target,
    std::optional<Tensor> grad_logits,
    std::optional<Tensor> grad_loc,
    std::optional<Tensor> grad_log_scale) {
  const Call call(loc, is_joint, is_logistic, is_softplus, floor);
  const Sizes sizes = call.sizes;
  const Inputs inputs{Wide(target), Wide(logits), Wide(loc), Wide(log_scale)};
  const Outputs outputs{
      writable(grad_target), writable(grad_logits), writable(grad_loc), writable(grad_log_scale)};
  for (const auto* out : {&grad_target, &grad_logits, &grad_loc, &grad_log_scale}) {
    if (out->has_value()) expect_writes(**out);
  }
  const auto* const grads = static_cast<const float*>(grad.const_data_ptr());
  const auto* const posteriors =
      posterior.has_value() ? static_cast<const float*>(posterior->const_data_ptr()) : nullptr;
  auto* const losses = nll.has_value() ? static_cast<float*>(nll->data_ptr()) : nullptr;
  call.visit([&](auto family, auto map) {
    const auto run = [&](int64_t begin, int64_t end) {
      Reader reader(inputs);
      const int64_t logit_rows = is_joint ? 1 : sizes.components;
      const int64_t logit_width = is_joint ? sizes.components : sizes.width;
      Slot to_target(outputs.target, 1, sizes.width);
      Slot to_logits(outputs.logits, logit_rows, logit_width);
      Slot to_loc(outputs.loc, sizes.components, sizes.width);
      Slot to_log_scale(outputs.log_scale, sizes.components, sizes.width);
      const Block block(is_joint ? 0 : sizes.components);
      std::vector<double> sums(2 * sizes.components);
      std::vector<float> own_posterior(sizes.components);
      for (int64_t t = begin; t < end; ++t) {
        const Token token = reader.read(t, end);
        const bool is_last = t + 1 == end;
        const Gradient out{
            outputs.target.has_value() ? to_target.place(t) : nullptr,
            to_logits.place(t),
            to_loc.place(t),
            to_log_scale.place(t),
            to_logits.stride,
            to_loc.stride,
            to_log_scale.stride,
            is_last ? 0 : to_logits.step(),
            is_last ? 0 : to_loc.step(),
            is_last ? 0 : to_log_scale.step()};
        double loss = 0;
        if (is_joint) {
          const float* shares = own_posterior.data();
          if (posteriors != nullptr) {
            shares = posteriors + t * sizes.components;
          } else {
            loss = joint_nll<family(), map()>(token, sizes, sums.data(), own_posterior.data());
          }
          joint_gradient<family(), map()>(token, sizes, shares, grads[t], sums.data(), out);
        } else {
          loss = coordinate_nll<family(), map(), true>(token, sizes, block, grads[t], out);
        }
        if (losses != nullptr) losses[t] = static_cast<float>(loss);
        for (const Slot* slot : {&to_target, &to_logits, &to_loc, &to_log_scale}) slot->write(t);
      }
    };
    const int64_t grain = row_grain(sizes.components * sizes.width);
    torch::stable::parallel_for(0, call.tokens, grain, run);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("mixture_nll", TORCH_BOX(&mixture_nll));
  m.impl("mixture_nll_backward", TORCH_BOX(&mixture_nll_backward));
}

}  // namespace jepa_fast

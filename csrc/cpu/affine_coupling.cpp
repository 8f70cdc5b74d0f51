// Affine couplings on the CPU: each tensor is read or written once, forward and backward.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>

#include "../common/exponential.h"
#include "../common/rounding.h"
#include "pages.h"
#include "rows.h"

namespace jepa_fast {
namespace {

// `small`: |x| is kSmallExponent at the most.
template <bool small, typename T>
inline __attribute__((always_inline)) T exp_of(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::exp(x);
  } else {
    return small ? small_exponential(x) : exponential(x);
  }
}

template <typename T>
inline __attribute__((always_inline)) T tanh_of(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::tanh(x);
  } else {
    return hyperbolic_tangent(x);
  }
}

// All bits of a T set where a coordinate changes, none where it passes: loops need no branch then.
template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

template <typename T>
std::vector<Bits<T>> changing(const Tensor& mask) {
  const auto* passes = static_cast<const bool*>(mask.const_data_ptr());
  std::vector<Bits<T>> bits(mask.numel());
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = passes[i] ? 0 : ~Bits<T>(0);
  return bits;
}

// `value` where a coordinate changes; 0 where it passes, be the value infinite or NaN.
template <typename T>
inline __attribute__((always_inline)) T only(T value, Bits<T> changes) {
  return same_bits<T>(same_bits<Bits<T>>(value) & changes);
}

// One row. `scale` is the bound of log-scales, negative for the inverse. Returns the logdet.
template <bool inverse, bool small, typename T>
JEPA_FAST_CLONES double couple_row(
    const T* x, const T* raw_scale, const T* shift, const Bits<T>* changes, int64_t width, T scale, T* y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) {
    const T t = tanh_of(only(raw_scale[i], changes[i])), b = only(shift[i], changes[i]);
    const T factor = exp_of<small>(scale * t);
    y[i] = inverse ? (x[i] - b) * factor : x[i] * factor + b;
    sum += static_cast<double>(t);
  }
  return static_cast<double>(scale) * sum;
}

template <typename T>
struct Gradients {
  T *x, *raw_scale, *shift;
};

template <bool inverse, bool small, typename T>
JEPA_FAST_CLONES void couple_row_backward(
    const T* grad_y,
    T grad_logdet,
    const T* x,
    const T* raw_scale,
    const T* shift,
    const Bits<T>* changes,
    int64_t width,
    T scale,
    Gradients<T> grads) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const T t = tanh_of(only(raw_scale[i], changes[i]));
    const T along = grad_y[i] * exp_of<small>(scale * t);
    const T scaled = inverse ? x[i] - only(shift[i], changes[i]) : x[i];
    grads.x[i] = along;
    grads.raw_scale[i] = only((along * scaled + grad_logdet) * scale * (T(1) - t * t), changes[i]);
    grads.shift[i] = only(inverse ? -along : grad_y[i], changes[i]);
  }
}

// chooser(inverse, whether all exponents are small), as constants.
template <typename Chooser>
auto choose(bool inverse, double scale_bound, Chooser&& chooser) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (scale_bound <= kSmallExponent) return inverse ? chooser(yes, yes) : chooser(no, yes);
  return inverse ? chooser(yes, no) : chooser(no, no);
}

// A matrix of any dtype whose rows have no gaps.
struct Matrix {
  char* data = nullptr;  // null: the matrix is not there
  int64_t stride = 0;    // bytes from one row to the next
  int64_t width = 0;
  ScalarType dtype = ScalarType::Float;

  explicit Matrix(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        stride(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())),
        width(tensor.size(1)),
        dtype(tensor.scalar_type()) {}

  explicit Matrix(const std::optional<Tensor>& tensor) {
    if (tensor.has_value()) *this = Matrix(*tensor);
  }

  // visitor(row r, in its own type).
  template <typename Visitor>
  auto visit(int64_t r, Visitor&& visitor) const {
    return visit_floating(dtype, [&](auto type) {
      return visitor(reinterpret_cast<typename decltype(type)::type*>(data + r * stride));
    });
  }
};

// A row at a time of a matrix as T: in place where it has that type, else converted.
template <typename T>
class Row {
 public:
  explicit Row(const Matrix& matrix) : matrix_(matrix), converted_(matrix.width) {}

  const T* read(int64_t r) {
    return matrix_.visit(r, [&](auto* row) -> const T* {
      if constexpr (std::is_same_v<decltype(row), T*>) {
        return row;
      } else {
        convert_row(converted_.data(), row, matrix_.width);
        return converted_.data();
      }
    });
  }

  // Where row r may be written; `written` has to follow.
  T* place(int64_t r) {
    if (matrix_.data == nullptr) return converted_.data();
    return matrix_.visit(r, [&](auto* row) -> T* {
      if constexpr (std::is_same_v<decltype(row), T*>) {
        return row;
      } else {
        return converted_.data();
      }
    });
  }

  void written(int64_t r) {
    if (matrix_.data == nullptr) return;
    matrix_.visit(r, [&](auto* row) {
      if constexpr (!std::is_same_v<decltype(row), T*>) {
        convert_row(row, converted_.data(), matrix_.width);
      }
    });
  }

 private:
  const Matrix& matrix_;
  std::vector<T> converted_;
};

// visitor(Type<T>{}) for what tensors of this dtype are computed in.
template <typename Visitor>
void visit_compute(ScalarType dtype, Visitor&& visitor) {
  if (dtype == ScalarType::Double) {
    visitor(Type<double>{});
  } else {
    visitor(Type<float>{});
  }
}

// x, raw_scale, shift and y [T, D], rows without gaps; mask [D] and logdet [T], contiguous.
void affine_coupling(
    Tensor xs,
    Tensor raw_scales,
    Tensor shifts,
    Tensor mask,
    double scale_bound,
    bool inverse,
    Tensor ys,
    Tensor logdets) {
  const Matrix x(xs), raw_scale(raw_scales), shift(shifts), y(ys);
  expect_writes(ys);
  visit_compute(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const std::vector<Bits<T>> changes = changing<T>(mask);
    const T scale = static_cast<T>(inverse ? -scale_bound : scale_bound);
    auto* const logdet = static_cast<T*>(logdets.data_ptr());
    const auto couple = choose(inverse, scale_bound, [](auto inverse, auto small) {
      return &couple_row<inverse(), small(), T>;
    });
    torch::stable::parallel_for(0, xs.size(0), row_grain(x.width), [&](int64_t begin, int64_t end) {
      Row<T> from(x), scales(raw_scale), offsets(shift), to(y);
      for (int64_t r = begin; r < end; ++r) {
        logdet[r] = static_cast<T>(couple(
            from.read(r),
            scales.read(r),
            offsets.read(r),
            changes.data(),
            x.width,
            scale,
            to.place(r)));
        to.written(r);
      }
    });
  });
}

// As above; grad_y as x and grad_logdet as logdet. Gradients that nobody needs are left out.
void affine_coupling_backward(
    Tensor grad_ys,
    Tensor grad_logdets,
    Tensor xs,
    Tensor raw_scales,
    Tensor shifts,
    Tensor mask,
    double scale_bound,
    bool inverse,
    std::optional<Tensor> grad_xs,
    std::optional<Tensor> grad_raw_scales,
    std::optional<Tensor> grad_shifts) {
  const Matrix grad_y(grad_ys), x(xs), raw_scale(raw_scales), shift(shifts);
  const auto out = [&](const std::optional<Tensor>& tensor) {
    if (tensor.has_value()) expect_writes(*tensor);
    Matrix matrix(tensor);
    matrix.width = x.width;
    return matrix;
  };
  const Matrix grad_x = out(grad_xs), grad_raw_scale = out(grad_raw_scales);
  const Matrix grad_shift = out(grad_shifts);
  visit_compute(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const std::vector<Bits<T>> changes = changing<T>(mask);
    const T scale = static_cast<T>(inverse ? -scale_bound : scale_bound);
    const auto* const grad_logdet = static_cast<const T*>(grad_logdets.const_data_ptr());
    const auto backward = choose(inverse, scale_bound, [](auto inverse, auto small) {
      return &couple_row_backward<inverse(), small(), T>;
    });
    torch::stable::parallel_for(0, xs.size(0), row_grain(x.width), [&](int64_t begin, int64_t end) {
      Row<T> upstream(grad_y), from(x), scales(raw_scale), offsets(shift);
      Row<T> to_x(grad_x), to_raw_scale(grad_raw_scale), to_shift(grad_shift);
      for (int64_t r = begin; r < end; ++r) {
        backward(
            upstream.read(r),
            grad_logdet[r],
            from.read(r),
            scales.read(r),
            offsets.read(r),
            changes.data(),
            x.width,
            scale,
            {to_x.place(r), to_raw_scale.place(r), to_shift.place(r)});
        to_x.written(r);
        to_raw_scale.written(r);
        to_shift.written(r);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
}

}  // namespace jepa_fast

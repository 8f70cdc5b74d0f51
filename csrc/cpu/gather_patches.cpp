// Patches by index on the CPU, and the sums of their gradients.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "pages.h"
#include "rows.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace jepa_fast {
namespace {

// Writes rows of a table for one thread, past the caches if it is large: a line that is written whole
// then need not be read before, and of such a table little would be left in the caches to be read.
// Other threads see the rows once this is destroyed.
class RowWriter {
 public:
  RowWriter(const Rows& table, int64_t rows)
      : past_caches_(
            rows * table.bytes >= kLarge && table.bytes % kVector == 0 &&
            reinterpret_cast<uintptr_t>(table.data) % kVector == 0) {}
  RowWriter(const RowWriter&) = delete;
  RowWriter& operator=(const RowWriter&) = delete;
  ~RowWriter() {
#if defined(__SSE2__)
    if (past_caches_) _mm_sfence();
#endif
  }

  void copy(void* to, const void* from, int64_t bytes) const {
#if defined(__SSE2__)
    if (past_caches_) {
      auto* const out = static_cast<__m128i*>(to);
      const auto* const in = static_cast<const __m128i*>(from);
      for (int64_t i = 0; i < bytes / kVector; ++i) _mm_stream_si128(out + i, _mm_loadu_si128(in + i));
      return;
    }
#endif
    std::memcpy(to, from, bytes);
  }

  void clear(void* to, int64_t bytes) const {
#if defined(__SSE2__)
    if (past_caches_) {
      auto* const out = static_cast<__m128i*>(to);
      for (int64_t i = 0; i < bytes / kVector; ++i) _mm_stream_si128(out + i, _mm_setzero_si128());
      return;
    }
#endif
    std::memset(to, 0, bytes);
  }

 private:
  static constexpr int64_t kLarge = int64_t{8} << 20, kVector = 16;

  bool past_caches_;
};

// x [B, N, D], index [B, K] and out [B, K, D], the last two contiguous.
void gather_patches(Tensor x_tensor, Tensor index, Tensor out_tensor) {
  const Rows x(x_tensor), out(out_tensor);
  const std::vector<int64_t> patch = read_index(index, x.count);
  expect_writes(out_tensor);
  torch::stable::parallel_for(
      0, patch.size(), row_grain(x.width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (i + 1 < end) prefetch_row(x.at((i + 1) / out.count, patch[i + 1]), x.bytes);
          std::memcpy(out.data + i * out.bytes, x.at(i / out.count, patch[i]), x.bytes);
        }
      });
}

// The sum of a table's row over the gradients at `place`, in that order.
template <typename T>
void sum_places(
    T* out,
    const Rows& grad,
    const int64_t* place,
    int64_t count,
    std::vector<Compute<T>>& sum,
    const RowWriter& writer) {
  const auto row = [&](int64_t i) {
    return grad.template row<T>(place[i] / grad.count, place[i] % grad.count);
  };
  if (count == 0) {
    writer.clear(out, grad.bytes);
  } else if (count == 1) {
    writer.copy(out, row(0), grad.bytes);
  } else {
    convert_row(sum.data(), row(0), grad.width);
    for (int64_t i = 1; i < count; ++i) add_row(sum.data(), row(i), grad.width);
    convert_row(out, sum.data(), grad.width);
  }
}

// grad [B, K, D], index [B, K] and table [B, N, D], the last two contiguous.
void gather_patches_backward(Tensor grad_tensor, Tensor index, Tensor table_tensor) {
  const Rows grad(grad_tensor), table(table_tensor);
  const std::vector<int64_t> patch = read_index(index, table.count);
  const int64_t rows = index.size(0) * table.count;
  const Inverse inverse(rows, patch.size(), [&](int64_t i) {
    return i / grad.count * table.count + patch[i];
  });
  expect_writes(table_tensor);
  visit_floating(grad_tensor.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    torch::stable::parallel_for(0, rows, row_grain(table.width), [&](int64_t begin, int64_t end) {
      const RowWriter writer(table, rows);
      std::vector<Compute<T>> sum(table.width);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t first = inverse.first[r];
        if (r + 1 < end && inverse.first[r + 1] < inverse.first[r + 2]) {
          const int64_t next = inverse.place[inverse.first[r + 1]];
          prefetch_row(grad.at(next / grad.count, next % grad.count), grad.bytes);
        }
        sum_places<T>(
            reinterpret_cast<T*>(table.data + r * table.bytes),
            grad,
            inverse.place.data() + first,
            inverse.first[r + 1] - first,
            sum,
            writer);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches));
  m.impl("gather_patches_backward", TORCH_BOX(&gather_patches_backward));
}

}  // namespace jepa_fast

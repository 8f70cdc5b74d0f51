// Products of matrices for one instruction set: included by panel_product.h, once for each, in a
// namespace of its own and with these macros:
//   JEPA_FAST_VECTOR   bytes of a vector
//   JEPA_FAST_ROWS     rows whose sums fit into registers, two vectors of each

typedef float Vector __attribute__((vector_size(JEPA_FAST_VECTOR)));
typedef float Unaligned __attribute__((vector_size(JEPA_FAST_VECTOR), aligned(4)));
constexpr int kVectorWidth = JEPA_FAST_VECTOR / sizeof(float);

// The sums of `rows` rows and `vectors` vectors of a panel stay in registers.
template <int rows, int vectors, int row_stride, int step>
void block_product(const Left& left, int64_t first_row, const float* right, float* out) {
  const float* const data = left.data + first_row * row_stride;
  for (int64_t begin = 0; begin == 0 || begin < left.depth; begin += kSummands) {
    const int64_t end = std::min(left.depth, begin + kSummands);
    Vector sums[rows][vectors] = {};
    for (int64_t k = begin; k < end;) {
      const int64_t block = k / left.block_depth, in_block = k % left.block_depth;
      const float* values = data + block * left.block_stride + in_block * step;
      const int64_t steps = std::min(end - k, left.block_depth - in_block);
      for (int64_t i = 0; i < steps; ++i, values += step, right += kPanel) {
        Vector of_panel[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          of_panel[v] = *reinterpret_cast<const Unaligned*>(right + v * kVectorWidth);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sums[r][v] += values[r * row_stride] * of_panel[v];
        }
      }
      k += steps;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        Unaligned& to = *reinterpret_cast<Unaligned*>(out + r * kPanel + v * kVectorWidth);
        to = begin == 0 ? sums[r][v] : to + sums[r][v];
      }
    }
  }
}

template <int rows, int row_stride, int step>
void choose_rows(
    int64_t wanted, bool whole, const Left& left, int64_t first, const float* right, float* out) {
  if constexpr (rows > 1) {
    if (wanted < rows) {
      return choose_rows<rows - 1, row_stride, step>(wanted, whole, left, first, right, out);
    }
  }
  if (whole) {
    block_product<rows, 2, row_stride, step>(left, first, right, out);
  } else {
    block_product<rows, 1, row_stride, step>(left, first, right, out);
  }
}

template <int row_stride, int step>
void panel_product(const Left& left, const float* right, int64_t columns, float* out) {
  const int64_t blocks = (left.rows + JEPA_FAST_ROWS - 1) / JEPA_FAST_ROWS;
  for (int64_t i = 0; i < blocks; ++i) {
    // Evenly, as few rows at a time would wait for their own sums.
    const int64_t first = left.rows * i / blocks, rows = left.rows * (i + 1) / blocks - first;
    int64_t j = 0;
    for (; j < columns; j += 2 * kVectorWidth) {
      choose_rows<JEPA_FAST_ROWS, row_stride, step>(
          rows, columns - j > kVectorWidth, left, first, right + j, out + first * kPanel + j);
    }
    if (columns - (j - 2 * kVectorWidth) <= kVectorWidth) j -= kVectorWidth;
    for (int64_t r = first; r < first + rows && j < kPanel; ++r) {
      std::fill(out + r * kPanel + j, out + (r + 1) * kPanel, 0.0f);
    }
  }
}

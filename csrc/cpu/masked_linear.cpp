// A linear layer masked by degrees on the CPU, without the products that the mask would zero.
//
// In the order of their degrees, the inputs that an output sees are a prefix of all. Outputs make
// panels of 32, which are multiplied up to the longest prefix among them; weights beyond an output's
// own are zeros in the copy that is multiplied. Panels take outputs as they lie in memory where their
// degrees ascend, in one run or in several, as those of a head with several numbers a coordinate do,
// and else in the order of what they see.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "../common/floating.h"
#include "clones.h"
#include "pages.h"
#include "panels.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

// 32 or fewer columns of a row into a panel, zeros in the rest. Without an `order` they lie side by
// side from column `first` on; else they are the columns that the order has there.
template <typename T>
JEPA_FAST_CLONES void read_columns(
    float* to, const void* row, const int32_t* order, int64_t first, int64_t count) {
  const T* from = static_cast<const T*>(row);
  if (order != nullptr) {
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<float>(from[order[first + j]]);
  } else if (count == kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) to[j] = static_cast<float>(from[first + j]);
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<float>(from[first + j]);
  }
  for (int64_t j = count; j < kPanel; ++j) to[j] = 0;
}

template <typename T>
JEPA_FAST_CLONES void write_columns(
    void* row, const float* from, const int32_t* order, int64_t first, int64_t count) {
  T* to = static_cast<T*>(row);
  if (order != nullptr) {
    for (int64_t j = 0; j < count; ++j) to[order[first + j]] = static_cast<T>(from[j]);
  } else if (count == kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) to[first + j] = static_cast<T>(from[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) to[first + j] = static_cast<T>(from[j]);
  }
}

JEPA_FAST_CLONES void add_to_rows(float* to, const float* row, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i, to += kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) to[j] += row[j];
  }
}

// Adds the sums over the rows of a panel.
JEPA_FAST_CLONES void add_sums(double* to, const float* panel, int64_t rows) {
  for (int64_t begin = 0; begin < rows; begin += kSummands) {
    float sums[kPanel] = {};
    for (int64_t i = begin; i < std::min(rows, begin + kSummands); ++i) {
      for (int64_t j = 0; j < kPanel; ++j) sums[j] += panel[i * kPanel + j];
    }
    for (int64_t j = 0; j < kPanel; ++j) to[j] += static_cast<double>(sums[j]);
  }
}

// A matrix of a floating dtype, rows without gaps, whose columns are taken in another order.
struct Matrix {
  char* data;
  int64_t stride, item;  // bytes
  int64_t columns;
  const int32_t* order;  // null: as they lie
  void (*read_some)(float*, const void*, const int32_t*, int64_t, int64_t);
  void (*write_some)(void*, const float*, const int32_t*, int64_t, int64_t);

  Matrix(const Tensor& tensor, const std::vector<int32_t>& order)
      : data(static_cast<char*>(tensor.data_ptr())),
        stride(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())),
        item(static_cast<int64_t>(tensor.element_size())),
        columns(tensor.size(1)),
        order(order.empty() ? nullptr : order.data()) {
    visit_floating(tensor.scalar_type(), [this](auto type) {
      using T = typename decltype(type)::type;
      read_some = &read_columns<T>;
      write_some = &write_columns<T>;
    });
  }

  void read(float* to, int64_t row, int64_t first, int64_t count) const {
    read_some(to, data + row * stride, order, first, count);
  }
  void write(const float* from, int64_t row, int64_t first, int64_t count) const {
    write_some(data + row * stride, from, order, first, count);
  }
  // Zeros from column `first` of the order on.
  void clear(int64_t row, int64_t first) const {
    if (first == columns) return;  // a matrix without columns has no memory
    char* const to = data + row * stride;
    if (order == nullptr) {
      std::memset(to + first * item, 0, (columns - first) * item);
    } else {
      for (int64_t j = first; j < columns; ++j) std::memset(to + order[j] * item, 0, item);
    }
  }
};

std::vector<int64_t> read_degrees(const Tensor& degree) {
  std::vector<int64_t> values(degree.numel());
  if (degree.scalar_type() == ScalarType::Int) {
    const auto* const data = static_cast<const int32_t*>(degree.const_data_ptr());
    std::copy(data, data + values.size(), values.begin());
  } else {
    const auto* const data = static_cast<const int64_t*>(degree.const_data_ptr());
    std::copy(data, data + values.size(), values.begin());
  }
  return values;
}

// Outputs that are multiplied together, by their places in the order of outputs.
struct Panel {
  int64_t first, columns;
  int64_t depth;  // the most inputs that one of them sees
};

// Who sees what. An empty order is that in memory.
struct Plan {
  std::vector<int32_t> inputs, outputs;  // orders
  std::vector<int32_t> seen;             // inputs that the output at each place sees: so many first
  std::vector<Panel> panels;
  std::vector<int64_t> deepest_first;  // the panels

  Plan(const Tensor& in_degree, const Tensor& out_degree, bool strict) {
    seen = count_seen(in_degree, out_degree, strict);
    panels = make_panels(seen, true);
    const std::vector<int32_t> order = deepest(seen);
    std::vector<int32_t> sorted(seen.size());
    for (size_t i = 0; i < order.size(); ++i) sorted[i] = seen[order[i]];
    std::vector<Panel> of_sorted = make_panels(sorted, false);
    // Columns far apart take longer to write and to read, too.
    if (10 * cost(panels) > 11 * cost(of_sorted)) {
      outputs = order;
      seen = std::move(sorted);
      panels = std::move(of_sorted);
    }
    deepest_first.resize(panels.size());
    std::iota(deepest_first.begin(), deepest_first.end(), 0);
    std::stable_sort(deepest_first.begin(), deepest_first.end(), [this](int64_t a, int64_t b) {
      return panels[a].depth > panels[b].depth;
    });
  }

  int64_t output(int64_t place) const { return outputs.empty() ? place : outputs[place]; }

 private:
  std::vector<int32_t> count_seen(
      const Tensor& in_degree, const Tensor& out_degree, bool strict) {
    std::vector<int64_t> in = read_degrees(in_degree);
    if (!std::is_sorted(in.begin(), in.end())) {
      inputs.resize(in.size());
      std::iota(inputs.begin(), inputs.end(), 0);
      std::stable_sort(
          inputs.begin(), inputs.end(), [&](int32_t a, int32_t b) { return in[a] < in[b]; });
      std::sort(in.begin(), in.end());
    }
    const std::vector<int64_t> out = read_degrees(out_degree);
    std::vector<int32_t> found(out.size());
    auto end = in.begin();
    for (size_t i = 0; i < out.size(); ++i) {
      const int64_t degree = out[i];
      const auto is_further = [&] {
        return end != in.end() && (strict ? *end < degree : *end <= degree);
      };
      // Where degrees ascend, a few steps from the last one's end are faster than a search.
      if (i > 0 && degree < out[i - 1]) end = in.begin();
      for (int steps = 0; steps < 4 && is_further(); ++steps) ++end;
      if (is_further()) {
        end = strict ? std::lower_bound(end, in.end(), degree)
                     : std::upper_bound(end, in.end(), degree);
      }
      found[i] = static_cast<int32_t>(end - in.begin());
    }
    return found;
  }

  // The outputs, those that see the most first: a counting sort.
  static std::vector<int32_t> deepest(const std::vector<int32_t>& seen) {
    const int32_t most = seen.empty() ? 0 : *std::max_element(seen.begin(), seen.end());
    std::vector<int32_t> next(most + 2), order(seen.size());
    for (const int32_t count : seen) ++next[most - count + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (size_t i = 0; i < seen.size(); ++i) {
      order[next[most - seen[i]]++] = static_cast<int32_t>(i);
    }
    return order;
  }

  // 32 outputs each, or as far as their prefixes do not become shorter.
  static std::vector<Panel> make_panels(const std::vector<int32_t>& seen, bool by_runs) {
    std::vector<Panel> found;
    for (int64_t i = 0; i < static_cast<int64_t>(seen.size()); ++i) {
      const bool descends = by_runs && i > 0 && seen[i] < seen[i - 1];
      if (found.empty() || found.back().columns == kPanel || descends) found.push_back({i, 0, 0});
      ++found.back().columns;
      found.back().depth = std::max<int64_t>(found.back().depth, seen[i]);
    }
    return found;
  }

  // Vectors of columns, times what they are multiplied with.
  static int64_t cost(const std::vector<Panel>& panels) {
    int64_t sum = 0;
    for (const Panel& panel : panels) sum += (panel.columns + kSlots - 1) / kSlots * panel.depth;
    return sum;
  }
};

// As many multiplications take the time of copying one number.
constexpr int64_t kCopy = 32;

// run(i, scratch) for all items, each thread taking the next one when it has done its last. Work is
// counted in multiplications.
template <typename Scratch, typename Run>
void share_out(int64_t items, int64_t work, Run&& run) {
  constexpr int64_t kGrain = 1000000;  // a few times what a thread costs
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = std::min({items, threads, 1 + work / kGrain});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    Scratch scratch;
    for (int64_t i = next++; i < items; i = next++) run(i, scratch);
  });
}

// out [rows, 32] = left right, where the right-hand matrix has as many columns. Deep products are
// sums of several whose right-hand matrices stay in the cache.
void multiply_deep(const Left& left, const float* right, int64_t columns, Buffer& part, float* out) {
  constexpr int64_t kDepth = 1024;
  for (int64_t begin = 0; begin == 0 || begin < left.depth; begin += kDepth) {
    Left some = left;
    some.data += begin / left.block_depth * left.block_stride;
    some.depth = std::min(kDepth, left.depth - begin);
    if (begin == 0) {
      multiply(some, right, columns, out);
      continue;
    }
    part.reserve(left.rows * kPanel);
    multiply(some, right + begin * kPanel, columns, part.data());
    add_to(out, part.data(), left.rows * kPanel);
  }
}

struct Tiles {
  int64_t count, rows;

  // Of about `most` rows each.
  Tiles(int64_t tokens, int64_t most) : count((tokens + most - 1) / most), rows(tokens) {
    if (count > 0) rows = (tokens + count - 1) / count;
    if (rows > 0) count = (tokens + rows - 1) / rows;
  }
};

constexpr int64_t kTileRows = 96;

// x as panels [panels][tokens][32], in the order of the inputs: rows first .. end.
void read_inputs(float* to, const Matrix& x, int64_t tokens, int64_t first, int64_t end) {
  for (int64_t t = first; t < end; ++t) {
    for (int64_t column = 0; column < x.columns; column += kPanel) {
      const int64_t count = std::min(kPanel, x.columns - column);
      x.read(to + column * tokens + t * kPanel, t, column, count);
    }
  }
}

// x [T, I], weight [O, I], out [T, O], rows without gaps; the others contiguous.
void masked_linear(
    Tensor x_tensor,
    Tensor weight_tensor,
    std::optional<Tensor> bias_tensor,
    Tensor in_degree,
    Tensor out_degree,
    bool strict,
    Tensor out_tensor) {
  const Plan plan(in_degree, out_degree, strict);
  const Matrix x(x_tensor, plan.inputs), weight(weight_tensor, plan.inputs);
  const Matrix out(out_tensor, plan.outputs);
  expect_writes(out_tensor);
  const int64_t tokens = x_tensor.size(0), inputs = x.columns;
  const int64_t panels = static_cast<int64_t>(plan.panels.size());
  std::vector<int64_t> offset(panels + 1);
  for (int64_t p = 0; p < panels; ++p) offset[p + 1] = offset[p] + plan.panels[p].depth * kPanel;

  Buffer packed_x, packed_weight, bias(panels * kPanel);
  packed_x.reserve(std::max<int64_t>(1, panels_of(inputs) * tokens * kPanel));
  packed_weight.reserve(std::max<int64_t>(1, offset[panels]));
  if (bias_tensor.has_value()) {
    const char* const from = static_cast<const char*>(bias_tensor->const_data_ptr());
    for (int64_t p = 0; p < panels; ++p) {
      const Panel& panel = plan.panels[p];
      out.read_some(bias.data() + p * kPanel, from, out.order, panel.first, panel.columns);
    }
  }
  const Tiles tiles(tokens, kTileRows);
  struct Rows {
    float data[kPanel * kPanel];
  };
  share_out<Rows>(tiles.count + panels, kCopy * (tokens * inputs + offset[panels]), [&](int64_t i, Rows& rows) {
    if (i >= panels) {
      const int64_t first = (i - panels) * tiles.rows;
      read_inputs(packed_x.data(), x, tokens, first, std::min(tokens, first + tiles.rows));
      return;
    }
    const Panel& panel = plan.panels[i];
    for (int64_t place = 0; place < panel.depth; place += kPanel) {
      for (int64_t j = 0; j < panel.columns; ++j) {
        const int64_t seen = plan.seen[panel.first + j];
        weight.read(
            rows.data + j * kPanel, plan.output(panel.first + j), place,
            std::clamp<int64_t>(seen - place, 0, kPanel));
      }
      const int64_t width = std::min(kPanel, panel.depth - place);
      transpose(
          packed_weight.data() + offset[i] + place * kPanel, rows.data, 0, panel.columns, width);
    }
  });

  struct Scratch {
    Buffer out, part;
  };
  // Threads share a tile's panels where there are few tiles.
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t groups =
      std::clamp<int64_t>(wanted / std::max<int64_t>(1, tiles.count), 1, std::max<int64_t>(1, panels));
  share_out<Scratch>(
      tiles.count * groups, tokens * offset[panels], [&](int64_t item, Scratch& scratch) {
        const int64_t first = item / groups * tiles.rows;
        const int64_t rows = std::min(tiles.rows, tokens - first);
        scratch.out.reserve(rows * kPanel);
        float* const y = scratch.out.data();
        for (int64_t i = item % groups; i < panels; i += groups) {
          const int64_t p = plan.deepest_first[i];
          const Panel& panel = plan.panels[p];
          const Left left{
              packed_x.data() + first * kPanel, rows, panel.depth, kPanel, tokens * kPanel};
          multiply_deep(left, packed_weight.data() + offset[p], panel.columns, scratch.part, y);
          if (bias_tensor.has_value()) add_to_rows(y, bias.data() + p * kPanel, rows);
          for (int64_t t = 0; t < rows; ++t) {
            out.write(y + t * kPanel, first + t, panel.first, panel.columns);
          }
        }
      });
}

// The gradients that are there.
class Backward {
 public:
  Backward(
      const Plan& plan,
      const Tensor& grad,
      const Tensor& x,
      const Tensor& weight,
      const std::optional<Tensor>& dx,
      const std::optional<Tensor>& dweight,
      const std::optional<Tensor>& dbias)
      : plan_(plan),
        grad_(grad, plan.outputs),
        x_(x, plan.inputs),
        weight_(weight, plan.inputs),
        tokens_(x.size(0)),
        panels_(static_cast<int64_t>(plan.panels.size())),
        columns_of_panels_(panels_of(x.size(1))),
        tiles_(x.size(0), x.size(1) < grad.size(1) / 4 ? kTileRows / 2 : kTileRows) {
    if (dx.has_value()) dx_.emplace(*dx, plan.inputs);
    if (dweight.has_value()) dweight_.emplace(*dweight, plan.inputs);
    if (dbias.has_value()) dbias_ = &*dbias;
  }

  void run() {
    int64_t work = 0;
    for (const Panel& panel : plan_.panels) work += panel.depth * kPanel;
    copy_operands(work);
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t each = std::clamp<int64_t>(panels_ / (4 * threads), 1, 4);
    const int64_t groups = dweight_ || dbias_ != nullptr ? (panels_ + each - 1) / each : 0;
    const int64_t tiles = dx_ ? tiles_.count : 0;
    // The larger items first: those of the deepest panels, which come last where degrees ascend.
    share_out<Scratch>(groups + tiles, 2 * tokens_ * work, [&](int64_t i, Scratch& scratch) {
      if (i < groups) {
        const int64_t first = (plan_.outputs.empty() ? groups - 1 - i : i) * each;
        differentiate_weight(first, std::min(each, panels_ - first), scratch);
      } else {
        differentiate_input((i - groups) * tiles_.rows, scratch);
      }
    });
  }

 private:
  struct Scratch {
    Buffer grads, sums, part;
  };

  // How many panels, the deepest first, see an input of a panel of inputs.
  int64_t seeing(int64_t of_inputs) const {
    const auto end = std::partition_point(
        plan_.deepest_first.begin(), plan_.deepest_first.end(),
        [&](int64_t p) { return plan_.panels[p].depth > of_inputs * kPanel; });
    return end - plan_.deepest_first.begin();
  }

  // For each panel of inputs, the weights of the outputs that see some of it, the deepest first.
  void copy_operands(int64_t work) {
    offset_.assign(columns_of_panels_ + 1, 0);
    for (int64_t q = 0; q < columns_of_panels_; ++q) {
      seeing_.push_back(seeing(q));
      offset_[q + 1] = offset_[q] + seeing_[q] * kPanel * kPanel;
    }
    // Columns in another order are read once, row by row; else they are where they are needed.
    const bool copies_grad = !plan_.outputs.empty();
    if (copies_grad) packed_grad_.reserve(std::max<int64_t>(1, panels_ * tokens_ * kPanel));
    if (dx_) packed_weight_.reserve(std::max<int64_t>(1, offset_.back()));
    if (dweight_) packed_x_.reserve(std::max<int64_t>(1, columns_of_panels_ * tokens_ * kPanel));
    const int64_t tiles = dweight_ || copies_grad ? tiles_.count : 0;
    struct None {};
    share_out<None>(
        tiles + (dx_ ? panels_ : 0), kCopy * (work + tokens_ * x_.columns), [&](int64_t i, None&) {
          if (i < tiles) {
            const int64_t first = i * tiles_.rows;
            const int64_t end = std::min(tokens_, first + tiles_.rows);
            if (dweight_) read_inputs(packed_x_.data(), x_, tokens_, first, end);
            if (copies_grad) read_grads(packed_grad_.data() + first * kPanel, tokens_, first, end);
          } else {
            copy_weights(i - tiles);
          }
        });
  }

  // Rows first .. end of the gradient as panels [panels][stride][32], the deepest first.
  void read_grads(float* to, int64_t stride, int64_t first, int64_t end) const {
    for (int64_t t = first; t < end; ++t) {
      for (int64_t i = 0; i < panels_; ++i) {
        const Panel& panel = plan_.panels[plan_.deepest_first[i]];
        grad_.read(to + (i * stride + t - first) * kPanel, t, panel.first, panel.columns);
      }
    }
  }

  void copy_weights(int64_t rank) {
    const Panel& panel = plan_.panels[plan_.deepest_first[rank]];
    for (int64_t j = 0; j < kPanel; ++j) {
      const bool there = j < panel.columns;
      const int64_t row = there ? plan_.output(panel.first + j) : 0;
      const int64_t seen = there ? plan_.seen[panel.first + j] : 0;
      for (int64_t place = 0; place < panel.depth; place += kPanel) {
        float* const to = packed_weight_.data() + offset_[place / kPanel];
        const int64_t count = std::clamp<int64_t>(seen - place, 0, kPanel);
        weight_.read(to + (rank * kPanel + j) * kPanel, row, place, count);
      }
    }
  }

  void differentiate_input(int64_t first, Scratch& scratch) const {
    const int64_t rows = std::min(tiles_.rows, tokens_ - first);
    scratch.sums.reserve(rows * kPanel);
    const float* grads = packed_grad_.data() + first * kPanel;
    int64_t stride = tokens_ * kPanel;
    if (plan_.outputs.empty()) {
      scratch.grads.reserve(std::max<int64_t>(1, panels_ * rows * kPanel));
      read_grads(scratch.grads.data(), rows, first, first + rows);
      grads = scratch.grads.data();
      stride = rows * kPanel;
    }
    for (int64_t q = 0; q < columns_of_panels_; ++q) {
      const int64_t columns = std::min(kPanel, x_.columns - q * kPanel);
      const Left left{grads, rows, seeing_[q] * kPanel, kPanel, stride};
      float* const sums = scratch.sums.data();
      multiply_deep(left, packed_weight_.data() + offset_[q], columns, scratch.part, sums);
      for (int64_t t = 0; t < rows; ++t) {
        dx_->write(sums + t * kPanel, first + t, q * kPanel, columns);
      }
    }
  }

  // Of the weights and the bias of a few panels that follow on each other.
  void differentiate_weight(int64_t first, int64_t count, Scratch& scratch) const {
    constexpr int64_t kTokens = 512, kBlock = kPanel * kPanel;
    constexpr int64_t kMost = 4;
    double bias[kMost * kPanel] = {};
    const int64_t size = dweight_ ? columns_of_panels_ * kBlock : 0;
    scratch.grads.reserve(count * kTokens * kPanel);
    scratch.sums.reserve(std::max<int64_t>(1, count * size));
    scratch.part.reserve(kBlock);
    std::fill(scratch.sums.data(), scratch.sums.data() + count * size, 0.0f);
    for (int64_t begin = 0; begin < tokens_; begin += kTokens) {
      const int64_t rows = std::min(kTokens, tokens_ - begin);
      for (int64_t t = 0; plan_.outputs.empty() && t < rows; ++t) {
        for (int64_t i = 0; i < count; ++i) {
          const Panel& panel = plan_.panels[first + i];
          float* const to = scratch.grads.data() + (i * kTokens + t) * kPanel;
          grad_.read(to, begin + t, panel.first, panel.columns);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const Panel& panel = plan_.panels[first + i];
        const float* const grads =
            plan_.outputs.empty() ? scratch.grads.data() + i * kTokens * kPanel
                                  : packed_grad_.data() + ((first + i) * tokens_ + begin) * kPanel;
        if (dbias_ != nullptr) add_sums(bias + i * kPanel, grads, rows);
        if (!dweight_) continue;
        const Left left{grads, panel.columns, rows, kTokens, 0};
        for (int64_t place = 0; place < panel.depth; place += kPanel) {
          const float* const right = packed_x_.data() + place * tokens_ + begin * kPanel;
          const int64_t columns = std::min(kPanel, panel.depth - place);
          multiply_transposed(left, right, columns, scratch.part.data());
          float* const sums = scratch.sums.data() + i * size + place * kPanel;
          add_to(sums, scratch.part.data(), panel.columns * kPanel);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Panel& panel = plan_.panels[first + i];
      if (dbias_ != nullptr) {
        float sums[kPanel];
        std::copy(bias + i * kPanel, bias + (i + 1) * kPanel, sums);
        grad_.write_some(dbias_->data_ptr(), sums, grad_.order, panel.first, panel.columns);
      }
      for (int64_t j = 0; dweight_ && j < panel.columns; ++j) {
        const int64_t row = plan_.output(panel.first + j), seen = plan_.seen[panel.first + j];
        for (int64_t place = 0; place < seen; place += kPanel) {
          const float* const sums = scratch.sums.data() + i * size + place * kPanel + j * kPanel;
          dweight_->write(sums, row, place, std::min(kPanel, seen - place));
        }
        dweight_->clear(row, seen);
      }
    }
  }

  const Plan& plan_;
  const Matrix grad_, x_, weight_;
  const int64_t tokens_, panels_, columns_of_panels_;
  const Tiles tiles_;
  std::optional<Matrix> dx_, dweight_;
  const Tensor* dbias_ = nullptr;
  std::vector<int64_t> offset_, seeing_;
  Buffer packed_weight_, packed_x_, packed_grad_;
};

// As above; grad [T, O] rows without gaps, dx, dweight and dbias contiguous where they are wanted.
void masked_linear_backward(
    Tensor grad,
    Tensor x,
    Tensor weight,
    Tensor in_degree,
    Tensor out_degree,
    bool strict,
    std::optional<Tensor> dx,
    std::optional<Tensor> dweight,
    std::optional<Tensor> dbias) {
  for (const auto& out : {dx, dweight}) {
    if (out.has_value()) expect_writes(*out);
  }
  const Plan plan(in_degree, out_degree, strict);
  Backward(plan, grad, x, weight, dx, dweight, dbias).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward));
}

}  // namespace jepa_fast

// Consistency of patch-word similarities over layers on the CPU. The forward pass holds the cosines of
// all layers for a tile of tokens and words, the backward pass makes them again and holds their
// gradients for some of an image's tokens at a time, of one image a thread.
//
// A slice is a head of a layer; every slice is a product of its own, of rows of unit length. Layers
// meet in the passes over a tile, of which gradients need only signs: with them, the backward pass
// falls into slices again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "../common/exponential.h"
#include "../common/floating.h"
#include "clones.h"
#include "pages.h"
#include "panel_product.h"
#include "tokens_and_words.h"

namespace jepa_fast {
namespace {

// Divided, not multiplied by one over the length: a row of one number becomes 1 or -1, and rows that
// are alike in all layers stay so.
JEPA_FAST_CLONES void to_unit_length(
    float* x, int64_t panel_stride, int64_t rows, int64_t panels, const float* length) {
  for (int64_t panel = 0; panel < panels; ++panel, x += panel_stride) {
    for (int64_t i = 0; i < rows; ++i) {
      const float of_row = length[i];
      for (int64_t j = 0; j < kPanel; ++j) x[i * kPanel + j] /= of_row;
    }
  }
}

// Gradients of rows of unit length [panels][32][32] become those of the rows that they were made of.
JEPA_FAST_CLONES void through_length(
    float* grad,
    const float* unit,
    int64_t panel_stride,
    int64_t rows,
    int64_t panels,
    const float* length) {
  for (int64_t i = 0; i < rows; ++i) {
    float products[kPanel] = {};
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* g = grad + (panel * kPanel + i) * kPanel;
      const float* u = unit + panel * panel_stride + i * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) products[j] += g[j] * u[j];
    }
    double sum = 0;
    for (int64_t j = 0; j < kPanel; ++j) sum += static_cast<double>(products[j]);
    // A row that is too short was not divided by its own length.
    const float of_row = length[i], along = of_row > kEpsilon ? static_cast<float>(sum) : 0.0f;
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* g = grad + (panel * kPanel + i) * kPanel;
      const float* u = unit + panel * panel_stride + i * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) g[j] = (g[j] - along * u[j]) / of_row;
    }
  }
}

// Adds a part of a sum to the rest; the first part has no rest, and to the last one it is added.
JEPA_FAST_CLONES void add_part(
    float* __restrict rest, float* __restrict part, int64_t size, bool is_first, bool is_last) {
  for (int64_t i = 0; i < size; ++i) {
    const float sum = is_first ? part[i] : rest[i] + part[i];
    (is_last ? part : rest)[i] = sum;
  }
}

// The cosines of a tile [layers * heads][words, 32], slices `stride` apart.
struct Tile {
  float* cosines;
  int64_t layers, heads, stride, words;
  float inverse_tau;
  float* similar;  // [layers, 32], for one word at a time
};

// Adds each token's deviations up; or, with slopes, cosines become their gradients. `weight` is the
// gradient of each token's deviations, over heads.
template <bool is_softplus, bool with_slopes>
JEPA_FAST_CLONES void compare_layers(const Tile& tile, const float* weight, double* deviation) {
  const int64_t layers = tile.layers, heads = tile.heads;
  const float inverse_heads = 1.0f / static_cast<float>(heads);
  float* const similar = tile.similar;
  for (int64_t w = 0; w < tile.words; ++w) {
    float* const cosines = tile.cosines + w * kPanel;
    float mean[kPanel] = {};
    for (int64_t layer = 0; layer < layers; ++layer) {
      float sum[kPanel] = {};
      for (int64_t h = 0; h < heads; ++h) {
        const float* cosine = cosines + (layer * heads + h) * tile.stride;
        for (int64_t j = 0; j < kPanel; ++j) {
          if constexpr (is_softplus) {
            sum[j] += softplus(cosine[j] * tile.inverse_tau);
          } else {
            sum[j] += cosine[j] < 0 ? 0.0f : cosine[j];
          }
        }
      }
      for (int64_t j = 0; j < kPanel; ++j) {
        const float of_heads = sum[j] * inverse_heads;
        similar[layer * kPanel + j] = of_heads;
        mean[j] += of_heads;
      }
    }
    for (int64_t j = 0; j < kPanel; ++j) mean[j] /= static_cast<float>(layers);

    if constexpr (with_slopes) {
      float signs[kPanel] = {};
      for (int64_t i = 0; i < layers * kPanel; i += kPanel) {
        for (int64_t j = 0; j < kPanel; ++j) {
          const float above = similar[i + j] > mean[j] ? 1.0f : 0.0f;
          const float below = similar[i + j] < mean[j] ? 1.0f : 0.0f;
          similar[i + j] = above - below;
          signs[j] += above - below;
        }
      }
      for (int64_t j = 0; j < kPanel; ++j) signs[j] /= static_cast<float>(layers);
      for (int64_t slice = 0; slice < layers * heads; ++slice) {
        float* cosine = cosines + slice * tile.stride;
        const float* sign = similar + slice / heads * kPanel;
        for (int64_t j = 0; j < kPanel; ++j) {
          const float slope = (sign[j] - signs[j]) * weight[j];
          if constexpr (is_softplus) {
            cosine[j] = slope * sigmoid(cosine[j] * tile.inverse_tau) * tile.inverse_tau;
          } else {
            cosine[j] = cosine[j] > 0 ? slope : 0.0f;
          }
        }
      }
    } else {
      float sum[kPanel] = {};
      for (int64_t i = 0; i < layers * kPanel; i += kPanel) {
        for (int64_t j = 0; j < kPanel; ++j) sum[j] += std::fabs(similar[i + j] - mean[j]);
      }
      for (int64_t j = 0; j < kPanel; ++j) deviation[j] += static_cast<double>(sum[j]);
    }
  }
}

// A call's arguments.
struct Call : Images {
  std::vector<Rows> q, k;  // of each layer
  int64_t layers, slices;
  bool is_softplus;
  float inverse_tau;
  int64_t blocks;  // of an image's words: tiles of one block and one panel of tokens stay in L2
  int64_t chunk;   // panels of tokens whose gradients are kept: 16 MB of them

  Call(
      const std::vector<Tensor>& queries,
      const std::vector<Tensor>& keys,
      Masks masks,
      int64_t heads,
      bool is_softplus,
      double tau)
      : Images(queries.at(0), keys.at(0), masks, heads),
        q(queries.begin(), queries.end()),
        k(keys.begin(), keys.end()),
        layers(static_cast<int64_t>(queries.size())),
        slices(layers * heads),
        is_softplus(is_softplus),
        inverse_tau(static_cast<float>(1 / tau)) {
    constexpr int64_t kTileSize = 32768;
    const int64_t rows = std::clamp<int64_t>(kTileSize / (slices * kPanel), 12, 96);
    blocks = (std::max<int64_t>(1, most_words()) + rows - 1) / rows;
    chunk = panels_within(int64_t{1} << 22, slices);
  }

  int64_t tiles() const { return token_panels() * blocks; }
};

// Where the gradients go, of each layer.
struct Gradients {
  std::vector<Rows> dq, dk;
  float weight;  // of the sum over all layers, pairs and heads
};

// One thread's memory, and which of an image's rows it holds.
struct Scratch {
  float *cosines, *similar, *grad;
  float *transposed, *row;                     // [slices][width][32] of a panel of tokens
  float *queries, *lengths;                    // [panels][tokens of a chunk][32] of a slice
  int64_t panel = -1, slice = -1, token = -1;  // counted over all images
  int64_t taken;

  Scratch(const Call& call, bool with_gradients, Arena memory) {
    const int64_t panels = call.panels();
    const int64_t words_of_tile = call.most_words() / call.blocks + 1;
    const int64_t tokens = call.chunk * kPanel;
    cosines = memory.take(with_gradients ? 0 : call.slices * words_of_tile * kPanel);
    similar = memory.take(call.layers * kPanel);
    transposed = memory.take(call.slices * call.width * kPanel);
    row = memory.take(panels * kPanel * kPanel);
    grad = memory.take(with_gradients ? panels * kPanel * kPanel : 0);
    queries = memory.take(with_gradients ? panels * tokens * kPanel : 0);
    lengths = memory.take(with_gradients ? tokens : 0);
    taken = memory.taken();
  }
};

// One image at work: its keys are read, then compared with its tokens tile by tile, and then the
// backward pass writes gradients, chunk of tokens by chunk. Parts are up to 32 rows of a slice. Threads
// may share the parts and the tiles out; results are the same.
class Image {
 public:
  Image(const Call& call, int64_t b, const Gradients* gradients, Arena memory)
      : call_(&call), gradients_(gradients), image_(b) {
    keys_ = memory.take(call.slices * call.panels() * words() * kPanel);
    key_lengths_ = memory.take(call.slices * words());
    slopes_ = memory.take(gradients == nullptr ? 0 : call.slices * call.chunk * words() * kPanel);
    const bool has_chunks = gradients != nullptr && call.chunk < call.token_panels();
    dk_ = memory.take(has_chunks ? call.slices * call.panels() * words() * kPanel : 0);
    taken_ = memory.taken();
  }

  // The most that an image of the call takes.
  static int64_t size_of(const Call& call, const Gradients* gradients) {
    int64_t size = 0;
    for (int64_t b = 0; b < call.batch; ++b) {
      size = std::max(size, Image(call, b, gradients, Arena()).taken_);
    }
    return size;
  }

  int64_t parts_of_keys() const { return call_->slices * panels_of(words()); }
  int64_t parts(const Chunk& chunk) const {
    return call_->slices * (chunk.panels + panels_of(words()));
  }

  void read_keys(int64_t part) const {
    const Call& call = *call_;
    const int64_t each = panels_of(words()), slice = part / each, first = part % each * kPanel;
    const int64_t count = std::min(kPanel, words() - first);
    float* const rows = keys(slice, 0, first);
    const Rows& from = call.k[slice / call.heads];
    call.read_words(rows, from, image_, slice % call.heads, first, count);
    divide_by_length(rows, words() * kPanel, count, key_lengths(slice, first));
  }

  // Returns the sum of the deviations of the tokens that count, unless there are gradients.
  double compare(const Chunk& chunk, int64_t tile, Scratch& scratch) const {
    const Call& call = *call_;
    const int64_t panel = chunk.first + tile / call.blocks, block = tile % call.blocks;
    const int64_t first = panel * kPanel;
    const int64_t count = std::min(kPanel, call.tokens - first);
    const int64_t begin = words() * block / call.blocks;
    const int64_t size = words() * (block + 1) / call.blocks - begin;
    read_transposed(panel, scratch);
    float* cosines;
    int64_t stride;
    if (gradients_ == nullptr) {
      stride = size * kPanel;
      cosines = scratch.cosines;
    } else {
      stride = chunk.panels * words() * kPanel;
      cosines = slopes(chunk, 0, panel - chunk.first) + begin * kPanel;
    }
    for (int64_t slice = 0; slice < call.slices; ++slice) {
      const Left left{keys(slice, 0, begin), size, call.width, kPanel, words() * kPanel};
      const float* const right = scratch.transposed + slice * call.width * kPanel;
      multiply(left, right, count, cosines + slice * stride);
    }

    const Tile all_layers{
        cosines, call.layers, call.heads, stride, size, call.inverse_tau, scratch.similar};
    float weight[kPanel] = {};
    double deviation[kPanel] = {}, sum = 0;
    if (gradients_ != nullptr) {
      for (int64_t j = 0; j < count; ++j) {
        weight[j] = call.counts(image_, first + j) ? gradients_->weight : 0.0f;
      }
      const auto pass =
          call.is_softplus ? &compare_layers<true, true> : &compare_layers<false, true>;
      pass(all_layers, weight, deviation);
      return 0;
    }
    const auto pass =
        call.is_softplus ? &compare_layers<true, false> : &compare_layers<false, false>;
    pass(all_layers, weight, deviation);
    for (int64_t j = 0; j < count; ++j) {
      if (call.counts(image_, first + j)) sum += deviation[j];
    }
    return sum;
  }

  // Gradients of some tokens or words.
  void write(const Chunk& chunk, int64_t part, Scratch& scratch) const {
    const int64_t each = chunk.panels + panels_of(words()), slice = part / each, panel = part % each;
    read_queries(chunk, slice, scratch);
    if (panel < chunk.panels) {
      write_tokens(chunk, slice, panel, scratch);
    } else {
      write_words(chunk, slice, panel - chunk.panels, scratch);
    }
  }

  // Of the gradients of one layer's keys.
  void clear_absent(int64_t layer) const {
    call_->clear_absent(gradients_->dk[layer], image_, 0, call_->heads * call_->width);
  }

 private:
  void read_tokens(
      float* to, int64_t stride, int64_t slice, int64_t first, int64_t count, float* length) const {
    const Call& call = *call_;
    const Rows& from = call.q[slice / call.heads];
    const int64_t column = slice % call.heads * call.width;
    call.read_tokens(to, stride, from, image_, 0, first, count, column, call.width, 1.0f);
    // Slopes of 0 would not undo what is not finite.
    for (int64_t i = 0; i < count; ++i) {
      if (call.counts(image_, first + i)) continue;
      for (int64_t f = 0; f < call.panels(); ++f) {
        std::fill_n(to + f * stride + i * kPanel, kPanel, 0.0f);
      }
    }
    divide_by_length(to, stride, count, length);
  }

  void read_transposed(int64_t panel, Scratch& scratch) const {
    const Call& call = *call_;
    const int64_t of_all = image_ * call.token_panels() + panel, stride = kPanel * kPanel;
    if (scratch.panel == of_all) return;
    scratch.panel = of_all;
    float* const rows = scratch.row;
    const int64_t first = panel * kPanel, count = std::min(kPanel, call.tokens - first);
    float length[kPanel];
    for (int64_t slice = 0; slice < call.slices; ++slice) {
      read_tokens(rows, stride, slice, first, count, length);
      float* const to = scratch.transposed + slice * call.width * kPanel;
      transpose(to, rows, stride, count, call.width);
    }
  }

  void read_queries(const Chunk& chunk, int64_t slice, Scratch& scratch) const {
    const Call& call = *call_;
    const int64_t of_all = image_ * call.slices + slice, stride = chunk.tokens * kPanel;
    if (scratch.slice == of_all && scratch.token == chunk.token) return;
    scratch.slice = of_all;
    scratch.token = chunk.token;
    for (int64_t first = 0; first < chunk.tokens; first += kPanel) {
      const int64_t count = std::min(kPanel, chunk.tokens - first);
      float* const rows = scratch.queries + first * kPanel;
      read_tokens(rows, stride, slice, chunk.token + first, count, scratch.lengths + first);
    }
  }

  void write_tokens(const Chunk& chunk, int64_t slice, int64_t panel, Scratch& scratch) const {
    const Call& call = *call_;
    const int64_t first = panel * kPanel, count = std::min(kPanel, chunk.tokens - first);
    const Left left{slopes(chunk, slice, panel), count, words(), words(), 0};
    float* const grad = scratch.grad;
    for (int64_t f = 0; f < call.panels(); ++f) {
      multiply_transposed(left, keys(slice, f, 0), columns_of(f), grad + f * kPanel * kPanel);
    }
    const float* const queries = scratch.queries + first * kPanel;
    through_length(
        grad, queries, chunk.tokens * kPanel, count, call.panels(), scratch.lengths + first);
    const Rows& to = gradients_->dq[slice / call.heads];
    write_rows(to, slice, count, grad, [&](int64_t i, int64_t column) {
      const int64_t p = chunk.token + first + i;
      return to.at(call.sequence(image_, p), 0, call.place(p), column);
    });
  }

  void write_words(const Chunk& chunk, int64_t slice, int64_t panel, Scratch& scratch) const {
    const Call& call = *call_;
    const int64_t first = panel * kPanel, count = std::min(kPanel, words() - first);
    const float* const of_words = slopes(chunk, slice, 0) + first * kPanel;
    const Left left{of_words, count, chunk.tokens, kPanel, words() * kPanel};
    float* const grad = scratch.grad;
    for (int64_t f = 0; f < call.panels(); ++f) {
      const float* const right = scratch.queries + f * chunk.tokens * kPanel;
      multiply(left, right, columns_of(f), grad + f * kPanel * kPanel);
      if (chunk.is_first && chunk.is_last) continue;
      float* const sum = dk_ + ((slice * call.panels() + f) * words() + first) * kPanel;
      add_part(sum, grad + f * kPanel * kPanel, count * kPanel, chunk.is_first, chunk.is_last);
    }
    if (!chunk.is_last) return;
    const float* const length = key_lengths(slice, first);
    through_length(
        grad, keys(slice, 0, first), words() * kPanel, count, call.panels(), length);
    const Rows& to = gradients_->dk[slice / call.heads];
    const Words& found = call.words[image_];
    write_rows(to, slice, count, grad, [&](int64_t i, int64_t column) {
      return to.at(image_, found.caption[first + i], found.place[first + i], column);
    });
  }

  template <typename At>
  void write_rows(const Rows& to, int64_t slice, int64_t count, const float* grad, At&& at) const {
    const int64_t column = slice % call_->heads * call_->width;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t f = 0; f < call_->panels(); ++f) {
        const float* const row = grad + (f * kPanel + i) * kPanel;
        to.write(at(i, column + f * kPanel), row, columns_of(f));
      }
    }
  }

  void divide_by_length(float* rows, int64_t stride, int64_t count, float* length) const {
    lengths(length, rows, stride, count, call_->panels());
    to_unit_length(rows, stride, count, call_->panels(), length);
  }

  int64_t words() const { return call_->words[image_].size(); }
  int64_t columns_of(int64_t f) const { return std::min(kPanel, call_->width - f * kPanel); }

  float* keys(int64_t slice, int64_t f, int64_t w) const {
    return keys_ + ((slice * call_->panels() + f) * words() + w) * kPanel;
  }
  float* key_lengths(int64_t slice, int64_t w) const {
    return key_lengths_ + slice * words() + w;
  }
  // `panel` counts from the chunk's first.
  float* slopes(const Chunk& chunk, int64_t slice, int64_t panel) const {
    return slopes_ + (slice * chunk.panels + panel) * words() * kPanel;
  }

  const Call* call_;
  const Gradients* gradients_;
  int64_t image_, taken_;
  float *keys_, *key_lengths_;  // [slices][panels][W][32], [slices][W]
  float* slopes_;               // [slices][panels of a chunk][W][32]
  float* dk_;                   // as the keys, where there are several chunks
};

// How many of `count` items a thread takes at least, if all of them take so many multiplications.
int64_t grain_of(int64_t count, int64_t multiplications) {
  constexpr int64_t kWorthAThread = 2'000'000;
  const int64_t threads = std::max<int64_t>(1, multiplications / kWorthAThread);
  return std::max<int64_t>(1, (count + threads - 1) / threads);
}

// Runs all images, with what the tiles return in `sums`, unless null: an image a thread while that
// keeps all threads at work, the rest one after the other.
void run(const Call& call, const Gradients* gradients, double* sums) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t whole = call.batch / threads * threads;
  const auto product = [&](int64_t b) {
    return call.slices * call.width * call.tokens * call.words[b].size();
  };
  // Without gradients nothing is kept, and all tokens are one chunk.
  const int64_t chunk_panels =
      gradients == nullptr ? std::max<int64_t>(1, call.token_panels()) : call.chunk;
  // `phase(count, multiplications, each)` calls each(i, scratch) for i up to count.
  const auto run_image = [&](const Image& image, int64_t b, auto&& phase) {
    const int64_t reading = product(b) / 64;  // takes about as long
    phase(image.parts_of_keys(), reading, [&](int64_t i, Scratch&) { image.read_keys(i); });
    for_each_chunk(call, chunk_panels, [&](const Chunk& chunk) {
      const int64_t work = product(b) / std::max<int64_t>(1, call.tokens) * chunk.tokens;
      phase(chunk.panels * call.blocks, work, [&](int64_t i, Scratch& scratch) {
        const double sum = image.compare(chunk, i, scratch);
        if (sums != nullptr) sums[b * call.tiles() + i] = sum;
      });
      if (gradients == nullptr) return;
      phase(image.parts(chunk), 2 * work, [&](int64_t i, Scratch& scratch) {
        image.write(chunk, i, scratch);
      });
    });
    if (gradients == nullptr) return;
    for (int64_t layer = 0; layer < call.layers; ++layer) image.clear_absent(layer);
  };
  int64_t of_whole = 0;
  for (int64_t b = 0; b < whole; ++b) of_whole += product(b);
  const int64_t grain = grain_of(whole, of_whole);
  const int64_t of_image = Image::size_of(call, gradients);
  const int64_t of_thread = Scratch(call, gradients != nullptr, Arena()).taken;
  Pieces images(std::max<int64_t>(call.batch > whole, threads_for(whole)), of_image);
  Pieces scratches(threads, of_thread);
  torch::stable::parallel_for(0, whole, grain, [&](int64_t begin, int64_t end) {
    const Arena piece = images.next();
    Scratch scratch(call, gradients != nullptr, scratches.next());
    for (int64_t b = begin; b < end; ++b) {
      run_image(Image(call, b, gradients, piece), b, [&](int64_t count, int64_t, auto&& each) {
        for (int64_t i = 0; i < count; ++i) each(i, scratch);
      });
    }
  });
  for (int64_t b = whole; b < call.batch; ++b) {
    const Image image(call, b, gradients, images.at(0));
    run_image(image, b, [&](int64_t count, int64_t multiplications, auto&& each) {
      scratches.restart();
      const int64_t grain = grain_of(count, multiplications);
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        Scratch scratch(call, gradients != nullptr, scratches.next());
        for (int64_t i = begin; i < end; ++i) each(i, scratch);
      });
    });
  }
}

// Layers of q [R, T, d] and k [B, C, S, d], masks contiguous.
void patch_word_consistency(
    std::vector<Tensor> q,
    std::vector<Tensor> k,
    std::optional<Tensor> word_mask,
    std::optional<Tensor> caption_mask,
    std::optional<Tensor> token_mask,
    int64_t heads,
    bool is_softplus,
    double tau,
    Tensor loss) {
  const Masks masks{Masks::data(word_mask), Masks::data(caption_mask), Masks::data(token_mask)};
  const Call call(q, k, masks, heads, is_softplus, tau);
  std::vector<double> sums(call.batch * call.tiles());
  run(call, nullptr, sums.data());
  // In the tiles' order, whatever the threads' was.
  const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
  *static_cast<float*>(loss.data_ptr()) =
      static_cast<float>(sum / call.pairs / static_cast<double>(call.layers));
}

// As above; dq and dk contiguous.
void patch_word_consistency_backward(
    Tensor grad,
    std::vector<Tensor> q,
    std::vector<Tensor> k,
    std::optional<Tensor> word_mask,
    std::optional<Tensor> caption_mask,
    std::optional<Tensor> token_mask,
    int64_t heads,
    bool is_softplus,
    double tau,
    std::vector<Tensor> dq,
    std::vector<Tensor> dk) {
  const Masks masks{Masks::data(word_mask), Masks::data(caption_mask), Masks::data(token_mask)};
  const Call call(q, k, masks, heads, is_softplus, tau);
  const double weight = read_scalar(grad.scalar_type(), grad.const_data_ptr()) / call.pairs /
                        static_cast<double>(call.slices);
  for (const auto* outputs : {&dq, &dk}) {
    for (const Tensor& out : *outputs) expect_writes(out);
  }
  const Gradients gradients{
      {dq.begin(), dq.end()}, {dk.begin(), dk.end()}, static_cast<float>(weight)};
  run(call, &gradients, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("patch_word_consistency", TORCH_BOX(&patch_word_consistency));
  m.impl("patch_word_consistency_backward", TORCH_BOX(&patch_word_consistency_backward));
}

}  // namespace jepa_fast

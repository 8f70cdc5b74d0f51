// Text cross-attention on the CPU: scores never leave the cache in the forward pass, and the backward
// pass keeps those of some of an image's tokens at a time, of one image a thread.
//
// Masked words are left out when keys and values are copied, so that the W words of an image's
// captions lie side by side and nothing below knows of masks. Matrices are panels of 32 columns:
// keys [e, W] by feature, scores [W, tokens] by token, so that sums over words run along a panel.
// Behind a maximum over captions a feature's gradient concerns the words of one of them: it is added
// up over these alone, in rows of slots, where each caption begins anew at a whole vector.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/exponential.h"
#include "../common/floating.h"
#include "clones.h"
#include "pages.h"
#include "panel_product.h"
#include "tokens_and_words.h"

namespace jepa_fast {
namespace {

enum Pool : int64_t { kMax, kMean, kNone };

// One over the length of each of `rows` rows of panels.
void inverse_lengths(
    float* to, const float* from, int64_t panel_stride, int64_t rows, int64_t panels) {
  lengths(to, from, panel_stride, rows, panels);
  for (int64_t i = 0; i < rows; ++i) to[i] = 1.0f / to[i];
}

// What the passes over a caption's scores [words, 32] need beside them.
struct Lengths {
  const float *inverse_key, *inverse_query;  // [words], [32]
  float inverse_tau;
};

// Scores become attention. Adds each token's similarities up.
template <bool is_softplus>
JEPA_FAST_CLONES void attend(float* scores, int64_t words, Lengths lengths, double* similarity) {
  float highest[kPanel], sum[kPanel] = {}, similar[kPanel] = {};
  for (int64_t j = 0; j < kPanel; ++j) highest[j] = scores[j];
  for (int64_t w = 1; w < words; ++w) {
    const float* score = scores + w * kPanel;
    for (int64_t j = 0; j < kPanel; ++j) highest[j] = score[j] > highest[j] ? score[j] : highest[j];
  }
  for (int64_t w = 0; w < words; ++w) {
    float* score = scores + w * kPanel;
    const float inverse_key = lengths.inverse_key[w];
    for (int64_t j = 0; j < kPanel; ++j) {
      const float cosine = score[j] * lengths.inverse_query[j] * inverse_key;
      if constexpr (is_softplus) {
        similar[j] += softplus(cosine * lengths.inverse_tau);
      } else {
        similar[j] += cosine < 0 ? 0.0f : cosine;
      }
      const float odds = exponential(score[j] - highest[j]);
      sum[j] += odds;
      score[j] = odds;
    }
  }
  for (int64_t j = 0; j < kPanel; ++j) {
    sum[j] = 1.0f / sum[j];
    similarity[j] += static_cast<double>(similar[j]);
  }
  for (int64_t w = 0; w < words; ++w) {
    float* score = scores + w * kPanel;
    for (int64_t j = 0; j < kPanel; ++j) score[j] *= sum[j];
  }
}

// Scores become their gradient through the cosines, and attention is made of them. `weight` is the
// gradient of each token's similarities. Sums of cosine * its gradient go to words and tokens, as the
// gradients of the lengths.
template <bool is_softplus>
JEPA_FAST_CLONES void attend_again(
    float* scores,
    float* attention,
    int64_t words,
    Lengths lengths,
    const float* weight,
    float* of_words,
    float* of_tokens) {
  float highest[kPanel], sum[kPanel] = {};
  for (int64_t j = 0; j < kPanel; ++j) highest[j] = scores[j];
  for (int64_t w = 1; w < words; ++w) {
    const float* score = scores + w * kPanel;
    for (int64_t j = 0; j < kPanel; ++j) highest[j] = score[j] > highest[j] ? score[j] : highest[j];
  }
  for (int64_t w = 0; w < words; ++w) {
    float* score = scores + w * kPanel;
    float* odds = attention + w * kPanel;
    const float inverse_key = lengths.inverse_key[w];
    float shared[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) {
      odds[j] = exponential(score[j] - highest[j]);
      sum[j] += odds[j];
      const float inverse = lengths.inverse_query[j] * inverse_key;
      const float cosine = score[j] * lengths.inverse_query[j] * inverse_key;
      float slope;
      if constexpr (is_softplus) {
        slope = sigmoid(cosine * lengths.inverse_tau) * lengths.inverse_tau * weight[j];
      } else {
        slope = cosine > 0 ? weight[j] : 0.0f;
      }
      shared[j] = slope * cosine;
      score[j] = slope * inverse;
    }
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < kPanel; ++j) total += shared[j];
    of_words[w] = total;
    for (int64_t j = 0; j < kPanel; ++j) of_tokens[j] += shared[j];
  }
  for (int64_t j = 0; j < kPanel; ++j) sum[j] = 1.0f / sum[j];
  for (int64_t w = 0; w < words; ++w) {
    float* share = attention + w * kPanel;
    for (int64_t j = 0; j < kPanel; ++j) share[j] *= sum[j];
  }
}

// Adds the gradient through the softmax to `slope`.
JEPA_FAST_CLONES void add_softmax_slope(
    float* slope, const float* attention, const float* grad, int64_t words) {
  float dot[kPanel] = {};
  for (int64_t i = 0; i < words * kPanel; i += kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) dot[j] += attention[i + j] * grad[i + j];
  }
  for (int64_t i = 0; i < words * kPanel; i += kPanel) {
    for (int64_t j = 0; j < kPanel; ++j) {
      slope[i + j] += attention[i + j] * (grad[i + j] - dot[j]);
    }
  }
}

// The higher of two rows of results, NaN if there is one, and the caption that it is from.
JEPA_FAST_CLONES void take_highest(
    float* highest, float* winner, const float* y, int64_t size, float caption) {
  for (int64_t i = 0; i < size; ++i) {
    const bool wins = (y[i] > highest[i]) | (y[i] != y[i]);
    winner[i] = wins ? caption : winner[i];
    highest[i] = wins ? y[i] : highest[i];
  }
}

// Columns of a panel [words, 32] as rows of slots, and back.
JEPA_FAST_CLONES void to_slots(
    float* __restrict rows,
    int64_t stride,
    const float* __restrict panel,
    int64_t words,
    int64_t columns) {
  const int64_t slots = (words + kSlots - 1) / kSlots * kSlots;
  for (int64_t j = 0; j < columns; ++j, rows += stride) {
    for (int64_t w = 0; w < words; ++w) rows[w] = panel[w * kPanel + j];
    for (int64_t w = words; w < slots; ++w) rows[w] = 0;
  }
}

JEPA_FAST_CLONES void from_slots(
    float* __restrict panel,
    const float* __restrict rows,
    int64_t stride,
    int64_t words,
    int64_t columns) {
  for (int64_t w = 0; w < words; ++w, panel += kPanel) {
    for (int64_t j = 0; j < columns; ++j) panel[j] = rows[j * stride + w];
    for (int64_t j = columns; j < kPanel; ++j) panel[j] = 0;
  }
}

// Adds to `sum` the rows of slots `from`, `grad` times, each only in the slots of its winner. All
// captions have equally many, as branches that depend on the winner would be mispredicted.
JEPA_FAST_CLONES void add_won(
    float* sum,
    int64_t sum_stride,
    const float* from,
    int64_t from_stride,
    const float* grad,
    const uint8_t* winner,
    int64_t count,
    int64_t slots) {
  for (int64_t i = 0; i < count; ++i) {
    float* const to = sum + i * sum_stride + winner[i] * slots;
    const float* const row = from + i * from_stride + winner[i] * slots;
    const float factor = grad[i];
#pragma omp simd  // over whole vectors, which the bound tells the compiler
    for (int64_t j = 0; j < slots / kSlots * kSlots; ++j) to[j] += factor * row[j];
  }
}

// Adds a partial sum to another, and begins it anew.
JEPA_FAST_CLONES void take_partial(float* __restrict sum, float* __restrict partial, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    sum[i] += partial[i];
    partial[i] = 0;
  }
}

JEPA_FAST_CLONES void write_winners(uint8_t* to, const float* winner, int64_t width) {
  for (int64_t j = 0; j < width; ++j) to[j] = static_cast<uint8_t>(static_cast<int32_t>(winner[j]));
}

// to = (x - y * factor) * scale
JEPA_FAST_CLONES void subtract_scaled(
    float* to, const float* x, const float* y, float factor, float scale, int64_t width) {
  for (int64_t j = 0; j < width; ++j) to[j] = (x[j] - y[j] * factor) * scale;
}

JEPA_FAST_CLONES void scale_rows(float* x, int64_t size, float scale) {
  for (int64_t i = 0; i < size; ++i) x[i] *= scale;
}

// A call's arguments.
struct Call : Images {
  Rows q, k, v;
  float scale;
  Pool pool;
  bool is_softplus;
  float inverse_tau;
  int64_t chunk;  // panels of tokens whose scores the backward pass keeps: 1 MB of them

  Call(
      const Tensor& queries,
      const Tensor& keys,
      const Tensor& values,
      Masks masks,
      int64_t heads,
      double scale,
      int64_t pool,
      bool is_softplus,
      double tau)
      : Images(queries, keys, masks, heads),
        q(queries),
        k(keys),
        v(values),
        scale(static_cast<float>(scale)),
        pool(static_cast<Pool>(pool)),
        is_softplus(is_softplus),
        inverse_tau(static_cast<float>(1 / tau)),
        chunk(panels_within(int64_t{1} << 18, 1)) {}
};

// The forward pass of up to some panels of tokens of one head of an image.
class ForwardTile {
 public:
  ForwardTile(
      const Call& call, const Rows& residual, const Rows& features, uint8_t* winner, Arena memory)
      : call_(call), residual_(residual), features_(features), winner_(winner) {
    const int64_t panels = call.panels(), words = call.most_words();
    keys_ = memory.take(panels * words * kPanel);
    values_ = memory.take(panels * words * kPanel);
    inverse_keys_ = memory.take(words);
    queries_ = memory.take(panels * kPanel * kPanel);
    transposed_ = memory.take(call.width * kPanel);
    scores_ = memory.take(panels_each(call) * words * kPanel);
    taken_ = memory.taken();
  }

  int64_t size() const { return taken_; }

  // The panels of tokens that share a walk over keys and values: their scores are to stay in L2.
  static int64_t panels_each(const Call& call) {
    constexpr int64_t kScores = 65536;
    const int64_t fitting = kScores / std::max<int64_t>(1, call.captions * call.words_each * kPanel);
    return std::clamp<int64_t>(fitting, 1, 4);
  }

  // Returns the sum of the similarities of the tokens that count.
  double run(int64_t b, int64_t head, int64_t first_panel, int64_t panels) {
    read(b, head);
    const int64_t words = call_.words[b].size();
    double sum = 0;
    for (int64_t i = 0; i < panels; ++i) {
      sum += attend_panel((first_panel + i) * kPanel, scores_ + i * words * kPanel);
    }
    for (int64_t f = 0; f < call_.panels(); ++f) {
      for (int64_t i = 0; i < panels; ++i) {
        write((first_panel + i) * kPanel, f, scores_ + i * words * kPanel);
      }
    }
    return sum;
  }

 private:
  void read(int64_t b, int64_t head) {
    if (b == image_ && head == head_) return;
    image_ = b;
    head_ = head;
    const int64_t words = call_.words[b].size();
    call_.read_words(keys_, call_.k, b, head);
    call_.read_words(values_, call_.v, b, head);
    inverse_lengths(inverse_keys_, keys_, words * kPanel, words, call_.panels());
  }

  int64_t tokens_from(int64_t first) const { return std::min(kPanel, call_.tokens - first); }

  double attend_panel(int64_t first, float* scores) {
    const Words& words = call_.words[image_];
    const int64_t count = tokens_from(first), stride = kPanel * kPanel;
    call_.read_tokens(
        queries_, stride, call_.q, image_, 0, first, count, head_ * call_.width, call_.width,
        call_.scale);
    float inverse_query[kPanel] = {};
    inverse_lengths(inverse_query, queries_, stride, count, call_.panels());
    transpose(transposed_, queries_, stride, count, call_.width);
    const Left keys{keys_, words.size(), call_.width, kPanel, words.size() * kPanel};
    multiply(keys, transposed_, count, scores);

    double similarity[kPanel] = {};
    for (const int64_t n : words.there) {
      const Lengths lengths{inverse_keys_ + words.first[n], inverse_query, call_.inverse_tau};
      float* const of_caption = scores + words.first[n] * kPanel;
      if (call_.is_softplus) {
        attend<true>(of_caption, words.count(n), lengths, similarity);
      } else {
        attend<false>(of_caption, words.count(n), lengths, similarity);
      }
    }
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (call_.counts(image_, first + j)) sum += similarity[j];
    }
    return sum;
  }

  // Features of a panel of tokens in a panel of columns.
  void write(int64_t first, int64_t f, const float* attention) {
    const Words& words = call_.words[image_];
    const int64_t count = tokens_from(first);
    const int64_t columns = std::min(kPanel, call_.width - f * kPanel);
    const float* values = values_ + f * words.size() * kPanel;
    float y[kPanel * kPanel], pooled[kPanel * kPanel], winner[kPanel * kPanel];
    const auto of_words = [&](int64_t begin, int64_t end, float* out) {
      const Left left{attention + begin * kPanel, count, end - begin, end - begin, 0};
      multiply_transposed(left, values + begin * kPanel, columns, out);
    };
    if (call_.pool == kNone) {
      for (int64_t n = 0; n < call_.captions; ++n) {
        of_words(words.first[n], words.first[n + 1], y);  // 0 if there are none
        write_features(y, first, count, n, f * kPanel, columns);
      }
      return;
    }
    if (call_.pool == kMean || words.there.empty()) {
      of_words(0, words.size(), pooled);
      const float captions = static_cast<float>(std::max<size_t>(1, words.there.size()));
      scale_rows(pooled, count * kPanel, 1.0f / captions);
      std::fill(winner, winner + count * kPanel, 0.0f);
    } else {
      for (const int64_t n : words.there) {
        const bool is_first = n == words.there.front();
        of_words(words.first[n], words.first[n + 1], is_first ? pooled : y);
        if (is_first) {
          std::fill(winner, winner + count * kPanel, static_cast<float>(n));
        } else {
          take_highest(pooled, winner, y, count * kPanel, static_cast<float>(n));
        }
      }
    }
    write_features(pooled, first, count, 0, f * kPanel, columns);
    if (call_.pool != kMax) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = first + i;
      const int64_t row = call_.sequence(image_, p) * call_.length + call_.place(p);
      const int64_t column = head_ * call_.width + f * kPanel;
      write_winners(
          winner_ + row * call_.heads * call_.width + column, winner + i * kPanel, columns);
    }
  }

  void write_features(
      const float* y, int64_t first, int64_t count, int64_t n, int64_t column, int64_t columns) {
    column += head_ * call_.width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = first + i, r = call_.sequence(image_, p), t = call_.place(p);
      features_.add(
          features_.at(r, n, t, column), residual_.at(r, 0, t, column), y + i * kPanel, columns);
    }
  }

  const Call& call_;
  const Rows &residual_, &features_;
  uint8_t* winner_;
  int64_t image_ = -1, head_ = -1;  // whose keys and values are here
  float *keys_, *values_, *inverse_keys_, *queries_, *transposed_, *scores_;
  int64_t taken_;
};

// The upstream gradients, and where they go.
struct Gradients {
  Rows features;
  std::optional<Rows> winner;
  Rows dq, dk, dv;
  float sparsity;  // of the sum over all pairs and heads
};

// The backward pass of one head of an image, by chunks of tokens: first by panels of tokens, which
// gives the gradient of q, then by panels of columns, which gives those of k and v. Either may be
// shared out among threads, and sums over tokens are the same.
class BackwardImage {
 public:
  BackwardImage(
      const Call& call, const Gradients& gradients, int64_t b, int64_t head, Arena memory)
      : call_(&call), gradients_(&gradients), image_(b), head_(head) {
    const int64_t panels = call.panels(), chunk = call.chunk;
    const int64_t of_words = panels * size() * kPanel, of_tokens = panels * chunk * kPanel * kPanel;
    const int64_t scores = chunk * size() * kPanel;
    keys_ = memory.take(of_words);
    values_ = memory.take(of_words);
    inverse_keys_ = memory.take(size());
    queries_ = memory.take(of_tokens);
    grads_ = memory.take(call.pool == kNone ? 0 : of_tokens);
    won_values_ = memory.take(is_won() ? panels * kPanel * slots_a_row() : 0);
    won_attention_ = memory.take(is_won() ? chunk * kPanel * slots_a_row() : 0);
    attention_ = memory.take(scores);
    slopes_ = memory.take(scores);
    of_words_ = memory.take(chunk * size());
    const bool has_chunks = chunk < call.token_panels();
    dk_ = memory.take(has_chunks ? of_words : 0);
    dv_ = memory.take(has_chunks ? of_words : 0);
    taken_ = memory.taken();
  }

  // The most that an image of the call takes.
  static int64_t size_of(const Call& call, const Gradients& gradients) {
    int64_t size = 0;
    for (int64_t b = 0; b < call.batch; ++b) {
      size = std::max(size, BackwardImage(call, gradients, b, 0, Arena()).taken_);
    }
    return size;
  }

  void read() const {
    const Call& call = *call_;
    call.read_words(keys_, call.k, image_, head_);
    call.read_words(values_, call.v, image_, head_);
    inverse_lengths(inverse_keys_, keys_, size() * kPanel, size(), call.panels());
    if (!is_won()) return;
    const int64_t stride = slots_a_row();
    for (int64_t f = 0; f < call.panels(); ++f) {
      words_to_slots(won_values_ + f * kPanel * stride, values_ + f * size() * kPanel, kPanel);
    }
  }

  // Of the tokens of one panel of a chunk.
  void run_tokens(const Chunk& chunk, int64_t panel) const {
    const Call& call = *call_;
    const Words& words = call.words[image_];
    const int64_t first = panel * kPanel, count = std::min(kPanel, call.tokens - first);
    const int64_t stride = chunk.tokens * kPanel;
    float* const queries = queries_ + (first - chunk.token) * kPanel;
    float* const slopes = slopes_ + (panel - chunk.first) * size() * kPanel;
    float* const attention = attention_ + (panel - chunk.first) * size() * kPanel;
    std::vector<float> transposed(call.width * kPanel);
    read_tokens(queries, stride, call.q, first, count, call.scale);
    float inverse_query[kPanel] = {}, weight[kPanel] = {}, of_tokens[kPanel] = {};
    inverse_lengths(inverse_query, queries, stride, count, call.panels());
    for (int64_t j = 0; j < count; ++j) {
      weight[j] = call.counts(image_, first + j) ? gradients_->sparsity : 0.0f;
    }
    transpose(transposed.data(), queries, stride, count, call.width);
    multiply(all_words(keys_), transposed.data(), count, slopes);
    for (const int64_t n : words.there) {
      const int64_t begin = words.first[n];
      const Lengths lengths{inverse_keys_ + begin, inverse_query, call.inverse_tau};
      const auto pass = call.is_softplus ? &attend_again<true> : &attend_again<false>;
      pass(
          slopes + begin * kPanel,
          attention + begin * kPanel,
          words.count(n),
          lengths,
          weight,
          of_words_ + (panel - chunk.first) * size() + begin,
          of_tokens);
    }
    if (is_won()) {
      add_won_slopes(chunk, first, count, slopes, attention);
    } else {
      add_attention_slopes(chunk, first, count, slopes, attention, transposed);
    }
    for (int64_t f = 0; f < call.panels(); ++f) {
      float grad[kPanel * kPanel];
      const int64_t columns = std::min(kPanel, call.width - f * kPanel);
      const Left left{slopes, count, size(), size(), 0};
      multiply_transposed(left, keys_ + f * size() * kPanel, columns, grad);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t p = first + i;
        const float factor = of_tokens[i] * inverse_query[i] * inverse_query[i];
        const float* query = queries + f * stride + i * kPanel;
        float* const row = grad + i * kPanel;
        subtract_scaled(row, row, query, factor, call.scale, columns);
        const Rows& dq = gradients_->dq;
        const int64_t column = head_ * call.width + f * kPanel;
        dq.write(dq.at(call.sequence(image_, p), 0, call.place(p), column), row, columns);
      }
    }
  }

  // Of the columns of one panel, after all tokens of a chunk.
  void run_columns(const Chunk& chunk, int64_t f) const {
    const Call& call = *call_;
    const Words& words = call.words[image_];
    const int64_t columns = std::min(kPanel, call.width - f * kPanel);
    const int64_t tokens = chunk.tokens, column = head_ * call.width + f * kPanel;
    std::vector<float> grad(size() * kPanel), of_caption;
    const auto by_tokens = [&](const float* scores, int64_t begin, int64_t end) {
      return Left{scores + begin * kPanel, end - begin, tokens, kPanel, size() * kPanel};
    };
    const auto write = [&](const Rows& to, const float* from) {
      for (int64_t w = 0; w < size(); ++w) {
        char* const row = to.at(image_, words.caption[w], words.place[w], column);
        to.write(row, from + w * kPanel, columns);
      }
    };
    // The sums of all chunks up to this one.
    const auto total = [&](float* sums) {
      if (chunk.is_first && chunk.is_last) return grad.data();
      float* const sum = sums + f * size() * kPanel;
      if (chunk.is_first) std::fill(sum, sum + size() * kPanel, 0.0f);
      add_to(sum, grad.data(), size() * kPanel);
      return sum;
    };

    multiply(by_tokens(slopes_, 0, size()), queries_ + f * tokens * kPanel, columns, grad.data());
    for (int64_t w = 0; w < size(); ++w) {
      float shared = 0;
      for (int64_t i = 0; i < chunk.panels; ++i) shared += of_words_[i * size() + w];
      const float factor = shared * inverse_keys_[w] * inverse_keys_[w];
      float* const row = grad.data() + w * kPanel;
      subtract_scaled(row, row, keys_ + (f * size() + w) * kPanel, factor, 1.0f, columns);
    }
    const float* const of_keys = total(dk_);
    if (chunk.is_last) write(gradients_->dk, of_keys);

    if (is_won()) {
      sum_won(chunk, f, columns, grad.data());
    } else if (call.pool != kNone) {
      const float* const grads = grads_ + f * tokens * kPanel;
      multiply(by_tokens(attention_, 0, size()), grads, columns, grad.data());
    } else {
      of_caption.resize(tokens * kPanel);
      for (const int64_t n : words.there) {
        call.read_tokens(
            of_caption.data(), 0, gradients_->features, image_, n, chunk.token, tokens, column,
            columns, 1.0f);
        const Left left = by_tokens(attention_, words.first[n], words.first[n + 1]);
        multiply(left, of_caption.data(), columns, grad.data() + words.first[n] * kPanel);
      }
    }
    const float* const of_values = total(dv_);
    if (!chunk.is_last) return;
    write(gradients_->dv, of_values);
    for (const Rows* to : {&gradients_->dk, &gradients_->dv}) {
      call.clear_absent(*to, image_, column, columns);
    }
  }

 private:
  int64_t size() const { return call_->words[image_].size(); }

  // Whether captions compete; a single one is its own mean.
  bool is_won() const { return call_->pool == kMax && call_->words[image_].there.size() > 1; }

  int64_t slots_a_row() const { return call_->captions * call_->words[image_].slots; }

  const uint8_t* winners(int64_t p, int64_t f) const {
    const int64_t column = head_ * call_->width + f * kPanel;
    return reinterpret_cast<const uint8_t*>(
        gradients_->winner->at(call_->sequence(image_, p), 0, call_->place(p), column));
  }

  void words_to_slots(float* rows, const float* panel, int64_t columns) const {
    const Words& words = call_->words[image_];
    for (const int64_t n : words.there) {
      const float* of_caption = panel + words.first[n] * kPanel;
      to_slots(
          rows + n * words.slots, slots_a_row(), of_caption, words.count(n), columns);
    }
  }

  void words_from_slots(float* panel, const float* rows, int64_t columns) const {
    const Words& words = call_->words[image_];
    for (const int64_t n : words.there) {
      float* const of_caption = panel + words.first[n] * kPanel;
      from_slots(
          of_caption, rows + n * words.slots, slots_a_row(), words.count(n), columns);
    }
  }

  Left all_words(const float* panels) const {
    return {panels, size(), call_->width, kPanel, size() * kPanel};
  }

  void read_tokens(
      float* to, int64_t stride, const Rows& from, int64_t first, int64_t count,
      float factor) const {
    const int64_t column = head_ * call_->width;
    call_->read_tokens(to, stride, from, image_, 0, first, count, column, call_->width, factor);
  }

  // The gradient of the attention, by way of the values, and on to the scores.
  void add_attention_slopes(
      const Chunk& chunk,
      int64_t first,
      int64_t count,
      float* slopes,
      const float* attention,
      std::vector<float>& transposed) const {
    const Call& call = *call_;
    const Words& words = call.words[image_];
    const int64_t stride = chunk.tokens * kPanel;
    std::vector<float> grad(size() * kPanel), some;
    if (call.pool == kNone) {
      some.resize(call.panels() * kPanel * kPanel);
    } else {
      const float captions = static_cast<float>(std::max<size_t>(1, words.there.size()));
      float* const grads = grads_ + (first - chunk.token) * kPanel;
      read_tokens(grads, stride, gradients_->features, first, count, 1.0f / captions);
      transpose(transposed.data(), grads, stride, count, call.width);
      multiply(all_words(values_), transposed.data(), count, grad.data());
    }
    for (const int64_t n : words.there) {
      const int64_t begin = words.first[n];
      if (call.pool == kNone) {
        const int64_t column = head_ * call.width;
        call.read_tokens(
            some.data(), kPanel * kPanel, gradients_->features, image_, n, first, count, column,
            call.width, 1.0f);
        transpose(transposed.data(), some.data(), kPanel * kPanel, count, call.width);
        Left left = all_words(values_);
        left.data += begin * kPanel;
        left.rows = words.count(n);
        multiply(left, transposed.data(), count, grad.data() + begin * kPanel);
      }
      add_softmax_slope(
          slopes + begin * kPanel,
          attention + begin * kPanel,
          grad.data() + begin * kPanel,
          words.count(n));
    }
  }

  // The same behind a maximum over captions; leaves the attention where sum_won looks for it.
  void add_won_slopes(
      const Chunk& chunk, int64_t first, int64_t count, float* slopes,
      const float* attention) const {
    const Call& call = *call_;
    const Words& words = call.words[image_];
    const int64_t stride = slots_a_row();
    const Buffer sums(count * stride), partial(stride), grad(size() * kPanel);
    const int64_t in_chunk = first - chunk.token;
    float* const grads = grads_ + in_chunk * kPanel;
    read_tokens(grads, chunk.tokens * kPanel, gradients_->features, first, count, 1.0f);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t f = 0; f < call.panels(); ++f) {
        add_won(
            partial.data(),
            0,
            won_values_ + f * kPanel * stride,
            stride,
            grads + (f * chunk.tokens + i) * kPanel,
            winners(first + i, f),
            std::min(kPanel, call.width - f * kPanel),
            words.slots);
        if ((f + 1) * kPanel % kSummands == 0 || f + 1 == call.panels()) {
          take_partial(sums.data() + i * stride, partial.data(), stride);
        }
      }
    }
    words_from_slots(grad.data(), sums.data(), count);
    for (const int64_t n : words.there) {
      const int64_t begin = words.first[n] * kPanel;
      add_softmax_slope(slopes + begin, attention + begin, grad.data() + begin, words.count(n));
    }
    words_to_slots(won_attention_ + in_chunk * stride, attention, count);
  }

  // The gradient of the values behind a maximum over captions, as a panel of columns.
  void sum_won(const Chunk& chunk, int64_t f, int64_t columns, float* grad) const {
    constexpr int64_t kColumns = 8;  // whose sums stay in L1
    const Words& words = call_->words[image_];
    const int64_t stride = slots_a_row();
    const Buffer sums(columns * stride), partial(kColumns * stride);
    for (int64_t column = 0; column < columns; column += kColumns) {
      const int64_t count = std::min(kColumns, columns - column);
      for (int64_t p = 0; p < chunk.tokens; ++p) {
        add_won(
            partial.data(),
            stride,
            won_attention_ + p * stride,
            0,
            grads_ + (f * chunk.tokens + p) * kPanel + column,
            winners(chunk.token + p, f) + column,
            count,
            words.slots);
        if ((p + 1) % kSummands == 0 || p + 1 == chunk.tokens) {
          take_partial(sums.data() + column * stride, partial.data(), count * stride);
        }
      }
    }
    words_from_slots(grad, sums.data(), columns);
  }

  const Call* call_;
  const Gradients* gradients_;
  int64_t image_, head_, taken_;
  float *keys_, *values_, *inverse_keys_;  // [panels][W][32], [W]
  float *queries_, *grads_;                // [panels][tokens of a chunk][32]
  float *won_values_, *won_attention_;     // [width][slots], [tokens of a chunk][slots]
  float *attention_, *slopes_;             // [panels of a chunk][W][32]
  float* of_words_;                        // [panels of a chunk][W]
  float *dk_, *dv_;                        // [panels][W][32], where there are several chunks
};

// q and residual [R, T, d], k and v [B, C, S, d], masks contiguous; features, winner contiguous.
void text_cross_attention(
    Tensor q,
    Tensor k,
    Tensor v,
    Tensor residual_tensor,
    std::optional<Tensor> word_mask,
    std::optional<Tensor> caption_mask,
    std::optional<Tensor> token_mask,
    int64_t heads,
    double scale,
    int64_t pool,
    bool is_softplus,
    double tau,
    Tensor features_tensor,
    Tensor sparsity,
    Tensor winner) {
  const Masks masks{Masks::data(word_mask), Masks::data(caption_mask), Masks::data(token_mask)};
  const Call call(q, k, v, masks, heads, scale, pool, is_softplus, tau);
  expect_writes(features_tensor);
  const Rows residual(residual_tensor), features(features_tensor);
  auto* const winners = static_cast<uint8_t*>(winner.data_ptr());
  const int64_t each = ForwardTile::panels_each(call);
  const int64_t tiles = (call.token_panels() + each - 1) / each;
  std::vector<double> sums(call.batch * heads * tiles);
  const int64_t size = ForwardTile(call, residual, features, winners, Arena()).size();
  Pieces memory(threads_for(sums.size()), size);
  torch::stable::parallel_for(
      0, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
        ForwardTile tile(call, residual, features, winners, memory.next());
        for (int64_t i = begin; i < end; ++i) {
          const int64_t image = i / tiles, first = i % tiles * each;
          const int64_t panels = std::min(each, call.token_panels() - first);
          sums[i] = tile.run(image / heads, image % heads, first, panels);
        }
      });
  // In the tiles' order, whatever the threads' was.
  const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
  *static_cast<float*>(sparsity.data_ptr()) =
      static_cast<float>(sum / call.pairs / static_cast<double>(heads));
}

// Throws where a winner is no caption.
void check_winners(const Tensor& winner, int64_t captions) {
  const auto* const data = static_cast<const uint8_t*>(winner.const_data_ptr());
  uint8_t highest = 0;
  for (int64_t i = 0; i < winner.numel(); ++i) highest = std::max(highest, data[i]);
  if (winner.numel() > 0 && highest >= captions) {
    throw std::out_of_range(
        "winner: expected captions below " + std::to_string(captions) + ", got " +
        std::to_string(highest));
  }
}

// As above; grad_features [R, T, d] or [R, C, T, d], winner, dq, dk and dv contiguous.
void text_cross_attention_backward(
    Tensor grad_features,
    Tensor grad_sparsity,
    Tensor winner,
    Tensor q,
    Tensor k,
    Tensor v,
    std::optional<Tensor> word_mask,
    std::optional<Tensor> caption_mask,
    std::optional<Tensor> token_mask,
    int64_t heads,
    double scale,
    int64_t pool,
    bool is_softplus,
    double tau,
    Tensor dq,
    Tensor dk,
    Tensor dv) {
  const Masks masks{Masks::data(word_mask), Masks::data(caption_mask), Masks::data(token_mask)};
  const Call call(q, k, v, masks, heads, scale, pool, is_softplus, tau);
  if (call.pool == kMax) check_winners(winner, call.captions);
  for (const Tensor& out : {dq, dk, dv}) expect_writes(out);
  const double weight = read_scalar(grad_sparsity.scalar_type(), grad_sparsity.const_data_ptr()) /
                        call.pairs / static_cast<double>(heads);
  const Gradients gradients{
      Rows(grad_features),
      pool == kMax ? std::optional<Rows>(Rows(winner)) : std::nullopt,
      Rows(dq),
      Rows(dk),
      Rows(dv),
      static_cast<float>(weight)};
  const int64_t images = call.batch * heads, panels = call.panels();
  const int64_t threads = torch::stable::get_num_threads();
  // An image a thread while that keeps all of them at work; the rest one by one.
  const int64_t whole = images / threads * threads, rest = images - whole;
  const int64_t size = BackwardImage::size_of(call, gradients);
  Pieces memory(std::max(std::min(threads, whole), rest), size);
  const auto image = [&](int64_t i, Arena piece) {
    return BackwardImage(call, gradients, i / heads, i % heads, piece);
  };
  torch::stable::parallel_for(0, whole, 1, [&](int64_t begin, int64_t end) {
    const Arena piece = memory.next();
    for (int64_t i = begin; i < end; ++i) {
      const BackwardImage whole_image = image(i, piece);
      whole_image.read();
      for_each_chunk(call, call.chunk, [&](const Chunk& chunk) {
        for (int64_t k = 0; k < chunk.panels; ++k) whole_image.run_tokens(chunk, chunk.first + k);
        for (int64_t f = 0; f < panels; ++f) whole_image.run_columns(chunk, f);
      });
    }
  });
  const auto share_out = [&](int64_t parts, auto&& run) {
    torch::stable::parallel_for(0, rest * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        run(image(whole + i / parts, memory.at(i / parts)), i % parts);
      }
    });
  };
  share_out(1, [](const BackwardImage& some, int64_t) { some.read(); });
  for_each_chunk(call, call.chunk, [&](const Chunk& chunk) {
    share_out(chunk.panels, [&](const BackwardImage& some, int64_t k) {
      some.run_tokens(chunk, chunk.first + k);
    });
    share_out(panels, [&](const BackwardImage& some, int64_t f) { some.run_columns(chunk, f); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("text_cross_attention", TORCH_BOX(&text_cross_attention));
  m.impl("text_cross_attention_backward", TORCH_BOX(&text_cross_attention_backward));
}

}  // namespace jepa_fast

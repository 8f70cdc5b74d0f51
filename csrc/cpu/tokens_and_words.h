// Images' tokens and the words of their captions as rows of panels: what kernels that compare the two
// read and write. Words that a mask leaves out are left out here, so that the W words of an image lie
// side by side and nothing else knows of masks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "../common/floating.h"
#include "clones.h"
#include "panels.h"

namespace jepa_fast {
// Clones are of one file each: those of several files would not link.
namespace {

using torch::stable::Tensor;

constexpr float kEpsilon = 1e-8f;  // vectors shorter than this count as this long in a cosine

template <typename T>
JEPA_FAST_CLONES void add_rows(void* row, const void* base, const float* from, int64_t width) {
  T* to = static_cast<T*>(row);
  const T* residual = static_cast<const T*>(base);
  for (int64_t j = 0; j < width; ++j) {
    to[j] = static_cast<T>(static_cast<Compute<T>>(residual[j]) + static_cast<Compute<T>>(from[j]));
  }
}

// A tensor [A, C, D] or [A, B, C, D] whose last dimension has no gaps.
struct Rows {
  char* data;
  int64_t outer, middle, inner, item;  // bytes from one to the next
  void (*read)(float*, int64_t, const void*, int64_t, float);
  void (*write)(void*, const float*, int64_t);
  void (*add)(void*, const void*, const float*, int64_t);

  explicit Rows(const Tensor& tensor) : data(static_cast<char*>(tensor.data_ptr())) {
    item = static_cast<int64_t>(tensor.element_size());
    outer = tensor.stride(0) * item;
    middle = tensor.dim() == 4 ? tensor.stride(1) * item : 0;
    inner = tensor.stride(tensor.dim() - 2) * item;
    const auto choose = [this](auto type) {
      using T = typename decltype(type)::type;
      read = &read_row<T>;
      write = &write_row<T>;
      add = &add_rows<T>;
    };
    if (tensor.scalar_type() == ScalarType::Byte) {
      choose(Type<uint8_t>{});
    } else {
      visit_floating(tensor.scalar_type(), choose);
    }
  }

  char* at(int64_t a, int64_t b, int64_t c, int64_t column) const {
    return data + a * outer + b * middle + c * inner + column * item;
  }
};

// The length of each of `rows` rows of panels, kEpsilon at least.
JEPA_FAST_CLONES void lengths(
    float* to, const float* from, int64_t panel_stride, int64_t rows, int64_t panels) {
  for (int64_t i = 0; i < rows; ++i) {
    float squares[kPanel] = {};
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* row = from + panel * panel_stride + i * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) squares[j] += row[j] * row[j];
    }
    double sum = 0;
    for (int64_t j = 0; j < kPanel; ++j) sum += static_cast<double>(squares[j]);
    const float length = static_cast<float>(std::sqrt(sum));
    to[i] = length < kEpsilon ? kEpsilon : length;
  }
}

// The words of an image that exist, caption by caption.
struct Words {
  std::vector<int64_t> caption, place;  // of each word
  std::vector<int64_t> first;           // [C + 1]: the words of a caption
  std::vector<int64_t> there;           // captions that have words
  int64_t slots = 0;                    // of every caption, whole vectors of them

  int64_t size() const { return static_cast<int64_t>(place.size()); }
  int64_t count(int64_t n) const { return first[n + 1] - first[n]; }
};

struct Masks {
  const bool *word, *caption, *token;  // null: all; contiguous

  static const bool* data(const std::optional<Tensor>& mask) {
    return mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  }
};

// The sizes of a call, and which tokens and words count. An image's tokens are those of all its
// sequences, one sequence after the other.
struct Images {
  int64_t batch, length, tokens, captions, words_each, heads, width;
  Masks masks;
  std::vector<Words> words;
  double pairs = 0;  // of a caption and a token that counts

  Images(const Tensor& queries, const Tensor& keys, Masks masks, int64_t heads)
      : batch(keys.size(0)),
        length(queries.size(1)),
        tokens(queries.size(0) / std::max<int64_t>(1, batch) * length),
        captions(keys.size(1)),
        words_each(keys.size(2)),
        heads(heads),
        width(keys.size(3) / heads),
        masks(masks),
        words(batch) {
    for (int64_t b = 0; b < batch; ++b) {
      find_words(b);
      int64_t counted = 0;
      for (int64_t p = 0; p < tokens; ++p) counted += counts(b, p);
      pairs += static_cast<double>(counted) * static_cast<double>(words[b].there.size());
    }
    pairs = std::max(1.0, pairs);
  }

  // How many panels of tokens have up to so many scores, of as many products of a token and a word.
  int64_t panels_within(int64_t scores, int64_t products) const {
    const int64_t of_panel = std::max<int64_t>(1, products * captions * words_each * kPanel);
    return std::clamp<int64_t>(scores / of_panel, 1, std::max<int64_t>(1, token_panels()));
  }

  int64_t panels() const { return panels_of(width); }
  int64_t token_panels() const { return panels_of(tokens); }
  int64_t most_words() const {
    int64_t most = 0;
    for (const Words& of_image : words) most = std::max(most, of_image.size());
    return most;
  }
  int64_t sequence(int64_t b, int64_t p) const { return p / length * batch + b; }
  int64_t place(int64_t p) const { return p % length; }

  bool counts(int64_t b, int64_t p) const {
    return masks.token == nullptr || masks.token[sequence(b, p) * length + place(p)];
  }

  // `count` words of keys or values for one head, into rows of panels [panels][W][32].
  void read_words(
      float* to, const Rows& from, int64_t b, int64_t head, int64_t first, int64_t count) const {
    const Words& found = words[b];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t w = first + i;
      const char* row = from.at(b, found.caption[w], found.place[w], head * width);
      from.read(to + i * kPanel, found.size() * kPanel, row, width, 1.0f);
    }
  }
  void read_words(float* to, const Rows& from, int64_t b, int64_t head) const {
    read_words(to, from, b, head, 0, words[b].size());
  }

  // `count` tokens, into rows of panels that are `panel_stride` apart.
  void read_tokens(
      float* to,
      int64_t panel_stride,
      const Rows& from,
      int64_t b,
      int64_t caption,
      int64_t first,
      int64_t count,
      int64_t column,
      int64_t columns,
      float factor) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = first + i;
      const char* row = from.at(sequence(b, p), caption, place(p), column);
      from.read(to + i * kPanel, panel_stride, row, columns, factor);
    }
  }

  // Zeros in the words that are left out.
  void clear_absent(const Rows& to, int64_t b, int64_t column, int64_t columns) const {
    const Words& found = words[b];
    if (found.size() == captions * words_each) return;
    int64_t next = 0;
    for (int64_t n = 0; n < captions; ++n) {
      for (int64_t w = 0; w < words_each; ++w) {
        if (next < found.size() && found.caption[next] == n && found.place[next] == w) {
          ++next;
        } else {
          std::memset(to.at(b, n, w, column), 0, columns * to.item);
        }
      }
    }
  }

 private:
  void find_words(int64_t b) {
    Words& found = words[b];
    found.first.assign(1, 0);
    for (int64_t n = 0; n < captions; ++n) {
      const int64_t caption = b * captions + n;
      if (masks.caption == nullptr || masks.caption[caption]) {
        for (int64_t w = 0; w < words_each; ++w) {
          if (masks.word != nullptr && !masks.word[caption * words_each + w]) continue;
          found.caption.push_back(n);
          found.place.push_back(w);
        }
      }
      found.first.push_back(found.size());
      if (found.count(n) > 0) found.there.push_back(n);
      found.slots = std::max(found.slots, (found.count(n) + kSlots - 1) / kSlots * kSlots);
    }
  }
};

// Some panels of an image's tokens.
struct Chunk {
  int64_t first, panels;  // of all tokens' panels
  int64_t token, tokens;  // the same in tokens
  bool is_first, is_last;

  // Of up to `most` panels.
  Chunk(const Images& images, int64_t first_panel, int64_t most)
      : first(first_panel),
        panels(std::min(most, images.token_panels() - first)),
        token(first * kPanel),
        tokens(std::min(panels * kPanel, images.tokens - token)),
        is_first(first == 0),
        is_last(first + panels == images.token_panels()) {}
};

// Runs all of an image's chunks. Without tokens there still is one, as words have gradients, all 0.
template <typename Run>
void for_each_chunk(const Images& images, int64_t most, Run&& run) {
  for (int64_t first = 0; first == 0 || first < images.token_panels(); first += most) {
    run(Chunk(images, first, most));
  }
}

}  // namespace
}  // namespace jepa_fast

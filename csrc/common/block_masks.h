// The masks of one image, for the CPU and the CUDA driver alike: where its blocks lie, and which
// patches are its context. jepa_fast/ops/draw_block_masks/reference.py is the specification.
//
// A row of the grid is a set of bits, one a patch. Lanes work on an image together, each on every
// `count`-th row: the one lane of a CPU thread, or a warp, whose lanes all get the same results.
#pragma once

#include <cstdint>

#include "random.h"

namespace jepa_fast {

constexpr int kLargestSide = 128;
constexpr int64_t kTries = 20;  // layouts before one more target must share another's place

struct BlockSize {
  int height, width;
};

struct Corner {
  int top, left;
};

// What is the same for all images.
struct MaskSpec {
  uint64_t step_key;
  int height, width;
  int64_t targets;
  BlockSize target, context;
  int64_t min_context;
  int slots;  // patches of the longest context that may come out
  bool allow_overlap;
};

// A row of up to 64 * kWords patches.
template <int kWords>
struct Row {
  uint64_t word[kWords];

  // The patches left of column `end`.
  static JEPA_FAST_HOST_DEVICE Row until(int end) {
    Row row;
    for (int i = 0; i < kWords; ++i) {
      const int bits = end - 64 * i;
      row.word[i] = bits >= 64 ? ~uint64_t{0} : bits <= 0 ? 0 : (uint64_t{1} << bits) - 1;
    }
    return row;
  }

  static JEPA_FAST_HOST_DEVICE Row span(int left, int width) {
    return until(left + width).without(until(left));
  }

  JEPA_FAST_HOST_DEVICE Row without(const Row& other) const {
    Row row;
    for (int i = 0; i < kWords; ++i) row.word[i] = word[i] & ~other.word[i];
    return row;
  }

  JEPA_FAST_HOST_DEVICE Row both(const Row& other) const {
    Row row;
    for (int i = 0; i < kWords; ++i) row.word[i] = word[i] & other.word[i];
    return row;
  }

  JEPA_FAST_HOST_DEVICE int count() const {
    int count = 0;
    for (int i = 0; i < kWords; ++i) {
#if defined(__CUDA_ARCH__)
      count += __popcll(word[i]);
#else
      count += __builtin_popcountll(word[i]);
#endif
    }
    return count;
  }

  JEPA_FAST_HOST_DEVICE bool has(int column) const {
    // Without an index that is computed, for which a GPU would keep the row in memory.
    return (column < 64 ? word[0] : word[kWords - 1]) >> (column % 64) & 1;
  }
};

// Where block `block` of the image with this key lies; block number `targets` is the context.
JEPA_FAST_HOST_DEVICE Corner
place(const MaskSpec& spec, uint64_t key, int64_t attempt, int64_t block) {
  const bool is_context = block == spec.targets;
  const BlockSize size = is_context ? spec.context : spec.target;
  const int last_top = spec.height - size.height, last_left = spec.width - size.width;
  const int64_t distinct = spec.targets - attempt / kTries;
  uint64_t counter = attempt * (spec.targets + 1);
  if (distinct == 0) {  // all targets in one corner of the grid, the context in the opposite one
    const uint64_t bits = draw(key, counter);
    const bool at_bottom = ((bits >> 63) != 0) != is_context;
    const bool at_right = ((bits & 1) != 0) != is_context;
    return {at_bottom ? last_top : 0, at_right ? last_left : 0};
  }
  counter += is_context || block < distinct ? block : block % distinct;
  const uint64_t bits = draw(key, counter);
  return {
      static_cast<int>(below(static_cast<uint32_t>(bits >> 32), last_top + 1)),
      static_cast<int>(below(static_cast<uint32_t>(bits), last_left + 1))};
}

// The context that an image ended with.
struct Drawn {
  int64_t attempt;
  Corner context;
  int length;
};

// Draws layouts until one leaves enough context, whose rows it writes to rows[0 .. grid height),
// from the context's first row to its last.
template <int kWords, typename Lanes>
JEPA_FAST_HOST_DEVICE Drawn
draw_layout(const MaskSpec& spec, uint64_t key, Row<kWords>* rows, const Lanes& lanes) {
  for (int64_t attempt = 0;; ++attempt) {
    const Corner corner = place(spec, key, attempt, spec.targets);
    const int top = corner.top, bottom = top + spec.context.height;
    const Row<kWords> whole = Row<kWords>::span(corner.left, spec.context.width);
    for (int y = top + lanes.first(); y < bottom; y += lanes.count()) rows[y] = whole;
    lanes.sync();
    if (!spec.allow_overlap) {
      const int64_t distinct = spec.targets - attempt / kTries;
      for (int64_t block = 0; block < (distinct > 0 ? distinct : 1); ++block) {
        const Corner hole = place(spec, key, attempt, block);
        const int begin = hole.top > top ? hole.top : top;
        const int hole_bottom = hole.top + spec.target.height;
        const int end = hole_bottom < bottom ? hole_bottom : bottom;
        const Row<kWords> taken = Row<kWords>::span(hole.left, spec.target.width);
        for (int y = begin + lanes.first(); y < end; y += lanes.count()) {
          rows[y] = rows[y].without(taken);
        }
        lanes.sync();
      }
    }
    int length = 0;
    for (int y = top + lanes.first(); y < bottom; y += lanes.count()) length += rows[y].count();
    length = lanes.sum(length);
    if (length >= spec.min_context || attempt == kTries * spec.targets) {
      return {attempt, corner, length};
    }
  }
}

// The largest of 0 .. lines - 1 before which there are `most` patches at the most.
template <typename Before>
JEPA_FAST_HOST_DEVICE int last_line(int lines, int most, const Before& before) {
  int line = 0;
  for (int end = lines; end - line > 1;) {
    const int middle = (line + end) / 2;
    (before(middle) <= most ? line : end) = middle;
  }
  return line;
}

// Cuts a context to the `spec.slots` patches that are nearest to one of the four sides.
template <int kWords, typename Lanes>
JEPA_FAST_HOST_DEVICE void
cut_to_slots(const MaskSpec& spec, uint64_t key, Drawn& drawn, Row<kWords>* rows, const Lanes& lanes) {
  if (drawn.length <= spec.slots) return;
  const int top = drawn.context.top, bottom = top + spec.context.height;
  const auto sum = [&](const auto& of_row) {
    int patches = 0;
    for (int y = top + lanes.first(); y < bottom; y += lanes.count()) patches += of_row(y);
    return lanes.sum(patches);
  };
  // The first `split` patches by row or by column; they stay, or, counted from the other side, all
  // others do.
  const int side = static_cast<int>(draw(fold(key, ~uint64_t{0}), 0) >> 62);
  const bool by_column = side >= 2, from_end = side % 2 == 1;
  const int split = from_end ? drawn.length - spec.slots : spec.slots;
  int row = 0, column = 0;  // where the split runs, and through this row or column
  if (by_column) {
    const auto before = [&](int x) {
      const Row<kWords> left = Row<kWords>::until(x);
      return sum([&](int y) { return rows[y].both(left).count(); });
    };
    column = last_line(spec.width, split, before);
    const int rest = split - before(column);
    row = last_line(spec.height + 1, rest, [&](int end) {
      return sum([&](int y) { return y < end && rows[y].has(column) ? 1 : 0; });
    });
  } else {
    const auto before = [&](int end) {
      return sum([&](int y) { return y < end ? rows[y].count() : 0; });
    };
    row = last_line(spec.height, split, before);
    const int rest = split - before(row);
    column = last_line(spec.width + 1, rest, [&](int x) {
      return rows[row].both(Row<kWords>::until(x)).count();
    });
  }
  lanes.sync();
  for (int y = top + lanes.first(); y < bottom; y += lanes.count()) {
    const int end = by_column ? column + (y < row) : y < row ? spec.width : y == row ? column : 0;
    const Row<kWords> first = Row<kWords>::until(end);
    rows[y] = from_end ? rows[y].without(first) : rows[y].both(first);
  }
  lanes.sync();
  drawn.length = spec.slots;
}

}  // namespace jepa_fast

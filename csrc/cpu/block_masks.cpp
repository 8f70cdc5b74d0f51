// Block masks on the CPU: one parallel region over the images.
#include "../common/block_masks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../common/block_masks_call.h"
#include "clones.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

// Indices a thread is worth, some 60 us. A second one saves time from a quarter of that on, but may
// cost milliseconds where the cores are busy, and beside a training they are.
constexpr int64_t kGrain = 131072;

using Indices = int64_t __attribute__((vector_size(64)));

// For every set of 8 patches, where its members stand.
struct Positions {
  int64_t of[256][8];

  constexpr Positions() : of{} {
    for (int set = 0; set < 256; ++set) {
      int member = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (set >> bit & 1) of[set][member++] = bit;
      }
    }
  }
};
constexpr Positions kPositions;

// The patches of a row in its columns 8 * first .. 8 * last + 7; the row begins with `patch`. Returns
// where the next ones go; writes up to `end`, whatever stands there.
template <int kWords>
inline __attribute__((always_inline)) int64_t* write_row(
    const Row<kWords>& row,
    unsigned first,
    unsigned last,
    int64_t patch,
    int64_t* out,
    const int64_t* end) {
  // The same steps for all rows of an image, so that the processor foresees its branches.
  for (unsigned i = first; i <= last; ++i) {
    const uint64_t set = row.word[kWords == 1 ? 0 : i / 8] >> (i % 8 * 8) & 255;
    const int64_t begin = patch + 8 * i;
    const int64_t members = __builtin_popcountll(set);
    if (end - out >= 8) {
      Indices indices;
      std::memcpy(&indices, kPositions.of[set], sizeof(indices));
      indices += begin;
      std::memcpy(out, &indices, sizeof(indices));
    } else {
      for (int64_t j = 0; j < members; ++j) out[j] = begin + kPositions.of[set][j];
    }
    out += members;
  }
  return out;
}

// The one lane of a thread.
struct OneLane {
  constexpr int first() const { return 0; }
  constexpr int count() const { return 1; }
  constexpr int sum(int value) const { return value; }
  void sync() const {}
};

// `block`: the patches of a target in the first row and column.
template <int kWords>
JEPA_FAST_CLONES void
draw_images(const MaskCall& call, const std::vector<int64_t>& block, int64_t begin, int64_t end) {
  const MaskSpec spec = call.spec;
  const int64_t patches = static_cast<int64_t>(block.size());
  Row<kWords> rows[kLargestSide];
  for (int64_t image = begin; image < end; ++image) {
    const uint64_t key = fold(spec.step_key, call.ids[image * call.id_stride]);
    Drawn drawn = draw_layout(spec, key, rows, OneLane());
    cut_to_slots(spec, key, drawn, rows, OneLane());
    call.lengths[image] = drawn.length;

    int64_t* out = call.context + image * spec.slots;
    int64_t* const out_end = out + spec.slots;
    const int bottom = drawn.context.top + spec.context.height;
    const int left = drawn.context.left, right = left + spec.context.width;
    int64_t patch = static_cast<int64_t>(drawn.context.top) * spec.width;
    for (int y = drawn.context.top; y < bottom; ++y, patch += spec.width) {
      out = write_row(rows[y], left / 8, (right - 1) / 8, patch, out, out_end);
    }
    std::fill(out, out_end, 0);
    bool* const real = call.real + image * spec.slots;
    std::memset(real, 1, drawn.length);
    std::memset(real + drawn.length, 0, spec.slots - drawn.length);

    int64_t* target = call.targets + image * spec.targets * patches;
    for (int64_t m = 0; m < spec.targets; ++m, target += patches) {
      const Corner corner = place(spec, key, drawn.attempt, m);
      const int64_t first = static_cast<int64_t>(corner.top) * spec.width + corner.left;
      for (int64_t i = 0; i < patches; ++i) target[i] = first + block[i];
    }
  }
}

MaskTensors draw_block_masks(
    Tensor sample_ids,
    int64_t seed,
    int64_t step,
    std::vector<int64_t> grid,
    int64_t num_targets,
    std::vector<int64_t> target_size,
    std::vector<int64_t> context_size,
    int64_t min_context,
    bool allow_overlap,
    int64_t slots) {
  MaskCall call(
      sample_ids, seed, step, grid, num_targets, target_size, context_size, min_context,
      allow_overlap, slots);
  const MaskSpec& spec = call.spec;
  std::vector<int64_t> block;
  for (int y = 0; y < spec.target.height; ++y) {
    for (int x = 0; x < spec.target.width; ++x) block.push_back(y * spec.width + x);
  }
  const int64_t indices = slots + num_targets * static_cast<int64_t>(block.size());
  const auto draw_some = spec.width <= 64 ? &draw_images<1> : &draw_images<2>;
  torch::stable::parallel_for(
      0, call.images, std::max<int64_t>(kGrain / indices, 1), [&](int64_t begin, int64_t end) {
        draw_some(call, block, begin, end);
      });
  return call.tensors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("draw_block_masks", TORCH_BOX(&draw_block_masks));
}

}  // namespace jepa_fast

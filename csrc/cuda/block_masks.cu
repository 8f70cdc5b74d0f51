// Block masks on a GPU: one warp an image, from the draws to the indices, in one launch.
#include "../common/block_masks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../common/block_masks_call.h"
#include "launch.h"

namespace jepa_fast {
namespace {

using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kImages = 2;  // of a thread block: few, so that a batch spreads over the whole GPU

struct WarpLanes {
  int lane;

  __device__ int first() const { return lane; }
  __device__ int count() const { return kWarp; }
  __device__ void sync() const { __syncwarp(); }

  __device__ int sum(int value) const {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
  }

  // The sum over the lanes up to this one.
  __device__ int running_sum(int value) const {
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(~0u, value, step);
      if (lane >= step) value += before;
    }
    return value;
  }
};

struct Outputs {
  const int64_t* ids;
  int64_t id_stride;
  int64_t images;
  int64_t* context;
  bool* real;
  int64_t* lengths;
  int64_t* targets;
};

template <int kWords>
__global__ void __launch_bounds__(kImages * kWarp)
    draw_block_masks_kernel(const MaskSpec spec, const Outputs to) {
  __shared__ Row<kWords> rows_of[kImages][kLargestSide];
  __shared__ int before_of[kImages][kLargestSide];  // context patches in the rows before
  const int warp = threadIdx.x / kWarp;
  const WarpLanes lanes{static_cast<int>(threadIdx.x % kWarp)};
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kImages + warp;
  if (image >= to.images) return;

  Row<kWords>* const rows = rows_of[warp];
  int* const before = before_of[warp];
  const uint64_t key = fold(spec.step_key, to.ids[image * to.id_stride]);
  Drawn drawn = draw_layout(spec, key, rows, lanes);
  cut_to_slots(spec, key, drawn, rows, lanes);
  if (lanes.lane == 0) to.lengths[image] = drawn.length;

  const Corner at = drawn.context;
  for (int begin = 0, total = 0; begin < spec.context.height; begin += kWarp) {
    const int y = begin + lanes.lane;
    const int count = y < spec.context.height ? rows[at.top + y].count() : 0;
    const int sum = lanes.running_sum(count);
    if (y < spec.context.height) before[y] = total + sum - count;
    total += __shfl_sync(~0u, sum, kWarp - 1);
  }
  __syncwarp();

  int64_t* const context = to.context + image * spec.slots;
  bool* const real = to.real + image * spec.slots;
  for (int i = lanes.lane; i < spec.context.height * spec.context.width; i += kWarp) {
    const int y = i / spec.context.width, x = at.left + i % spec.context.width;
    const Row<kWords> row = rows[at.top + y];
    if (!row.has(x)) continue;
    const int slot = before[y] + row.both(Row<kWords>::until(x)).count();
    context[slot] = (at.top + y) * spec.width + x;
  }
  for (int i = drawn.length + lanes.lane; i < spec.slots; i += kWarp) context[i] = 0;
  for (int i = lanes.lane; i < spec.slots; i += kWarp) real[i] = i < drawn.length;

  const int patches = spec.target.height * spec.target.width;
  int64_t* target = to.targets + image * spec.targets * patches;
  for (int64_t m = 0; m < spec.targets; ++m, target += patches) {
    const Corner corner = place(spec, key, drawn.attempt, m);
    for (int i = lanes.lane; i < patches; i += kWarp) {
      const int y = corner.top + i / spec.target.width, x = corner.left + i % spec.target.width;
      target[i] = y * spec.width + x;
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
  const MaskCall call(
      sample_ids, seed, step, grid, num_targets, target_size, context_size, min_context,
      allow_overlap, slots);
  if (call.images == 0) return call.tensors;
  const Outputs to{
      call.ids, call.id_stride, call.images, call.context, call.real, call.lengths, call.targets};
  const auto blocks = static_cast<unsigned>((call.images + kImages - 1) / kImages);
  const cudaStream_t stream = current_stream(sample_ids.get_device_index());
  const auto kernel = call.spec.width <= 64 ? &draw_block_masks_kernel<1> : &draw_block_masks_kernel<2>;
  kernel<<<blocks, kImages * kWarp, 0, stream>>>(call.spec, to);
  check_cuda(cudaGetLastError(), "draw_block_masks");
  return call.tensors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CUDA, m) {
  m.impl("draw_block_masks", TORCH_BOX(&draw_block_masks));
}

}  // namespace jepa_fast

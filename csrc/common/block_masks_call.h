// What a call of draw_block_masks brings, and the tensors that it makes: the same on CPU and GPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "block_masks.h"

namespace jepa_fast {

using MaskTensors = std::tuple<
    torch::stable::Tensor,
    torch::stable::Tensor,
    torch::stable::Tensor,
    torch::stable::Tensor>;

// A contiguous tensor on the device of `like`. At the least cost: with four outputs the way over
// torch's dispatcher takes as long as the masks of a small batch.
inline torch::stable::Tensor empty_beside(
    const torch::stable::Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type,
      like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

struct MaskCall {
  MaskSpec spec;
  const int64_t* ids;
  int64_t id_stride;
  int64_t images;
  MaskTensors tensors;
  int64_t* context;  // [images, slots]
  bool* real;        // [images, slots]
  int64_t* lengths;  // [images]
  int64_t* targets;  // [images, targets, patches of a target]

  MaskCall(
      const torch::stable::Tensor& sample_ids,
      int64_t seed,
      int64_t step,
      const std::vector<int64_t>& grid,
      int64_t num_targets,
      const std::vector<int64_t>& target_size,
      const std::vector<int64_t>& context_size,
      int64_t min_context,
      bool allow_overlap,
      int64_t slots)
      : ids(static_cast<const int64_t*>(sample_ids.const_data_ptr())),
        id_stride(sample_ids.stride(0)),
        images(sample_ids.size(0)) {
    const auto side = [&](const std::vector<int64_t>& size, int dim, int64_t most) {
      if (size[dim] < 1 || size[dim] > most) {
        throw std::invalid_argument("draw_block_masks: a block or the grid is too large");
      }
      return static_cast<int>(size[dim]);
    };
    spec.step_key = fold(fold(0, seed), step);
    spec.height = side(grid, 0, kLargestSide);
    spec.width = side(grid, 1, kLargestSide);
    spec.targets = num_targets;
    spec.target = {side(target_size, 0, spec.height), side(target_size, 1, spec.width)};
    spec.context = {side(context_size, 0, spec.height), side(context_size, 1, spec.width)};
    spec.min_context = min_context;
    spec.slots = static_cast<int>(slots);
    spec.allow_overlap = allow_overlap;

    const int64_t patches = spec.target.height * spec.target.width;
    const int32_t index = aoti_torch_dtype_int64(), boolean = aoti_torch_dtype_bool();
    tensors = {
        empty_beside(sample_ids, {images, slots}, index),
        empty_beside(sample_ids, {images, slots}, boolean),
        empty_beside(sample_ids, {images}, index),
        empty_beside(sample_ids, {images, num_targets, patches}, index)};
    context = static_cast<int64_t*>(std::get<0>(tensors).mutable_data_ptr());
    real = static_cast<bool*>(std::get<1>(tensors).mutable_data_ptr());
    lengths = static_cast<int64_t*>(std::get<2>(tensors).mutable_data_ptr());
    targets = static_cast<int64_t*>(std::get<3>(tensors).mutable_data_ptr());
  }
};

}  // namespace jepa_fast

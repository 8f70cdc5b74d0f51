"""That the emulator of CUDA, which other tests run kernels in, finds what a GPU might not show."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from backends import needs_gxx
from cuda_on_cpu import compile_for_the_emulator, plain_cpp
from numpy.typing import NDArray

pytestmark = needs_gxx
THREADS = 64

_SOURCE = """
#include <cuda_runtime.h>

template <bool with_barrier>
__global__ void reverse_kernel(int* values) {
  __shared__ int shared[64];
  shared[threadIdx.x] = values[threadIdx.x];
  if (with_barrier) __syncthreads();
  values[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void warp_kernel(int* values) {
  const int lane = threadIdx.x % 32;
  int value = values[threadIdx.x];
  const int below = __shfl_up_sync(~0u, value, 3);
  const int other = __shfl_xor_sync(~0u, value, 5);
  const int first = __shfl_sync(~0u, value, 0);
  values[threadIdx.x] = 10000 * below + 100 * other + first;
}

__global__ void half_of_a_warp_kernel(int* values) {
  if (threadIdx.x < 16) __syncwarp();
}

__global__ void half_of_a_block_kernel(int* values) {
  if (threadIdx.x < 32) __syncthreads();
}

extern "C" int run(int which, int blocks, int threads, int* values) {
  try {
    const auto kernel = which == 0   ? &reverse_kernel<true>
                        : which == 1 ? &reverse_kernel<false>
                        : which == 2 ? &warp_kernel
                        : which == 3 ? &half_of_a_warp_kernel
                                     : &half_of_a_block_kernel;
    kernel<<<blocks, threads, 0, nullptr>>>(values);
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "kernels.cpp").write_text(plain_cpp(_SOURCE))
    compile_for_the_emulator([folder / "kernels.cpp"], folder / "kernels.so")
    return ctypes.CDLL(str(folder / "kernels.so"))


def _run(kernels: ctypes.CDLL, which: int, threads: int = THREADS) -> NDArray[np.int32]:
    values = np.arange(THREADS, dtype=np.int32)
    failed = kernels.run(which, 1, threads, ctypes.c_void_p(values.ctypes.data))
    if failed:
        raise RuntimeError("the emulator stopped")
    return values


def test_a_barrier_makes_shared_memory_seen(kernels: ctypes.CDLL) -> None:
    for _ in range(10):
        np.testing.assert_array_equal(_run(kernels, 0), np.arange(THREADS)[::-1])


def test_a_missing_barrier_changes_results(kernels: ctypes.CDLL) -> None:
    results = [_run(kernels, 1) for _ in range(10)]
    assert any((result != results[0]).any() for result in results)


def test_lanes_of_a_warp_see_each_other(kernels: ctypes.CDLL) -> None:
    value = np.arange(THREADS)
    lane, first = value % 32, value // 32 * 32
    below = np.where(lane < 3, value, value - 3)
    np.testing.assert_array_equal(
        _run(kernels, 2), 10000 * below + 100 * (first + (lane ^ 5)) + first
    )


@pytest.mark.parametrize("kernel", [3, 4], ids=["warp", "block"])
def test_a_barrier_that_not_all_reach_is_an_error(kernels: ctypes.CDLL, kernel: int) -> None:
    with pytest.raises(RuntimeError, match="the emulator stopped"):
        _run(kernels, kernel)


def test_a_warp_that_is_not_whole_is_an_error(kernels: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="the emulator stopped"):
        _run(kernels, 0, threads=40)

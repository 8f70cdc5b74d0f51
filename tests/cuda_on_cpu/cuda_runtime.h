// Runs the kernels of csrc/cuda on a CPU, a thread block at a time. tests/test_cuda_on_cpu.py compiles
// them with g++, this header in the place of the CUDA runtime's.
//
// Each CUDA thread is a coroutine that runs until it meets a barrier; which one goes on is drawn
// anew every time, so that what lacks a barrier gives other results sooner or later. A barrier that
// not all threads reach is an error.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define CUDART_VERSION 13000
#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Of the one thread block that runs.
#define __shared__ static
// The tensors that the kernels get here, and where torch finds the kernels.
#define is_cuda is_cpu
#define jepa_fast_native jepa_fast_cuda_on_cpu
#define CUDA CPU
#define aoti_torch_get_current_cuda_stream stream_of_the_emulator

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

extern "C" inline AOTITorchError stream_of_the_emulator(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

struct Dim3 {
  unsigned x;
};
inline Dim3 blockIdx, threadIdx;

namespace emulator {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStack = 1 << 17;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  enum { ready, at_warp_barrier, at_block_barrier, ended } state = ready;
};

inline std::vector<Thread> threads;
inline std::vector<uint32_t> exchanged;  // what each thread shows the others of its warp
inline ucontext_t scheduler;
inline std::mt19937 order;
inline const std::function<void()>* body;

inline void wait(decltype(Thread::state) barrier) {
  Thread& self = threads[threadIdx.x];
  self.state = barrier;
  swapcontext(&self.context, &scheduler);
}

inline void run_thread() {
  (*body)();
  threads[threadIdx.x].state = Thread::ended;
}  // and back to the scheduler, uc_link

// Lets the threads from `begin` to `end` go on if all of them wait at `barrier`.
inline bool release(unsigned begin, unsigned end, decltype(Thread::state) barrier) {
  for (unsigned i = begin; i < end; ++i) {
    if (threads[i].state != barrier) return false;
  }
  for (unsigned i = begin; i < end; ++i) threads[i].state = Thread::ready;
  return true;
}

inline void run_block() {
  const auto size = static_cast<unsigned>(threads.size());
  for (unsigned i = 0; i < size; ++i) {
    Thread& thread = threads[i];
    thread.state = Thread::ready;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, run_thread, 0);
  }
  std::vector<unsigned> ready;
  for (;;) {
    ready.clear();
    for (unsigned i = 0; i < size; ++i) {
      if (threads[i].state == Thread::ready) ready.push_back(i);
    }
    std::shuffle(ready.begin(), ready.end(), order);
    for (const unsigned i : ready) {
      threadIdx.x = i;
      swapcontext(&scheduler, &threads[i].context);
    }
    if (release(0, size, Thread::ended)) return;
    bool released = release(0, size, Thread::at_block_barrier);
    for (unsigned i = 0; i < size; i += kWarpSize) {
      released |= release(i, i + kWarpSize, Thread::at_warp_barrier);
    }
    if (!released) throw std::runtime_error("a barrier that not all threads reach");
  }
}

// kernel<<<grid, block, shared, stream>>>(...)
inline void launch(
    unsigned grid, unsigned block, size_t, cudaStream_t, const std::function<void()>& kernel) {
  if (block % kWarpSize != 0) throw std::runtime_error("a warp that is not whole");
  if (threads.size() != block) threads = std::vector<Thread>(block);
  exchanged.assign(block, 0);
  body = &kernel;
  for (unsigned i = 0; i < grid; ++i) {
    blockIdx.x = i;
    run_block();
  }
}

template <typename T>
T from_lane(T value, unsigned lane) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  const unsigned self = threadIdx.x, warp = self / kWarpSize * kWarpSize;
  std::memcpy(&exchanged[self], &value, sizeof(T));
  wait(Thread::at_warp_barrier);
  std::memcpy(&value, &exchanged[warp + lane], sizeof(T));
  wait(Thread::at_warp_barrier);
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::Thread::at_block_barrier); }
inline void __syncwarp() { emulator::wait(emulator::Thread::at_warp_barrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::from_lane(value, lane);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::from_lane(value, (threadIdx.x % emulator::kWarpSize) ^ mask);
}

// A lane that has no such other keeps its own.
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = threadIdx.x % emulator::kWarpSize;
  return emulator::from_lane(value, lane < delta ? lane : lane - delta);
}

inline int __popcll(uint64_t bits) { return __builtin_popcountll(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }

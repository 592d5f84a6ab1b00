// Reductions and scans over a warp or a block, and places that a warp reserves in an array. All lanes of the warp, or
// all threads of the block, must call these functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace odtrt {

__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }
__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }

template <typename T>
__device__ __forceinline__ T warp_sum_by_shuffles(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, value);
#else
  return warp_sum_by_shuffles(value);
#endif
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) { return warp_sum_by_shuffles(value); }

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
#endif
}

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The sum of the values of this lane and all lower ones.
template <typename T>
__device__ __forceinline__ T warp_inclusive_scan(T value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const T other = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane_id() >= offset) value += other;
  }
  return value;
}

// The sum of the values of this lane and all higher ones.
__device__ __forceinline__ uint32_t warp_inclusive_suffix_scan(uint32_t value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint32_t other = __shfl_down_sync(0xffffffffu, value, offset);
    if (lane_id() + offset < 32) value += other;
  }
  return value;
}

// Returns the sum of the values of all threads before this one, and sets *total to the sum over the block, which has
// kThreads threads. warp_totals: 32 numbers of shared memory.
template <int kThreads>
__device__ __forceinline__ uint32_t block_exclusive_scan(uint32_t value, uint32_t *warp_totals,
                                                         uint32_t *total) {
  const uint32_t sum = warp_inclusive_scan(value);
  __syncthreads();
  if (lane_id() == 31) warp_totals[warp_id()] = sum;
  __syncthreads();
  if (warp_id() == 0) {
    const uint32_t all = warp_inclusive_scan(lane_id() < kThreads / 32 ? warp_totals[lane_id()] : 0);
    warp_totals[lane_id()] = all;
  }
  __syncthreads();
  *total = warp_totals[31];
  return sum - value + (warp_id() == 0 ? 0 : warp_totals[warp_id() - 1]);
}

// Adds the number of bits of `vote`, which is not 0, to *size, and returns to each lane whose bit is set the index of
// an element of its own behind the old size. One atomic addition serves the whole warp.
template <typename Count>
__device__ __forceinline__ Count reserve_places(Count *size, unsigned vote) {
  Count at = 0;
  if (lane_id() == 0) at = atomicAdd(size, static_cast<Count>(__popc(vote)));
  return __shfl_sync(0xffffffffu, at, 0) + __popc(vote & ((1u << lane_id()) - 1));
}

}  // namespace odtrt

// A cluster is a group of blocks that run at the same time and can access one another's shared memory (compute
// capability 9.0). Code for older GPUs treats each block as a cluster of one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace odtrt {

#if defined(ODTRT_EMULATED)
using emulator::cluster_arrive;
using emulator::cluster_rank;
using emulator::cluster_size;
using emulator::cluster_wait;
using emulator::in_block;
inline void prefetch(const void *) {}
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
template <typename T>
__device__ __forceinline__ T *in_block(T *own, int rank) {
  return static_cast<T *>(__cluster_map_shared_rank(own, rank));
}
__device__ __forceinline__ void prefetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#else  // one block
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ T *in_block(T *own, int) {
  return own;
}
__device__ __forceinline__ void prefetch(const void *) {}
#endif

__device__ __forceinline__ void sync_cluster() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace odtrt

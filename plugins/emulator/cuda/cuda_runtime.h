// The part of CUDA that kernels/*.cu use, for g++ and the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

// ---- the language --------------------------------------------------------------------------------------------------

#define __CUDACC__ 1
#define CUDART_VERSION 12080
#define __global__
#define __device__
#define __host__
#define __shared__ static  // one for all blocks: they run one after the other, and those of a cluster use none
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::self->block)
static const dim3 &blockDim = emulator::running.block, &gridDim = emulator::running.grid;

using std::isfinite;
using std::isinf;
using std::max;
using std::min;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- barriers and warps --------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::block_barrier(false); }
inline int __syncthreads_or(int value) { return emulator::block_barrier(value != 0) != 0; }
inline int __syncthreads_count(int value) { return emulator::block_barrier(value != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::exchange_in_warp(emulator::Collective::kBarrier, 0, mask);
}

// The lanes whose value fulfils `is_it`, a bit each.
template <typename Predicate>
unsigned emulated_vote(emulator::Collective kind, unsigned mask, uint64_t own, Predicate is_it) {
  const uint64_t *const values = emulator::exchange_in_warp(kind, own, mask);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= static_cast<unsigned>(is_it(values[lane])) << lane;
  return lanes;
}

inline unsigned __ballot_sync(unsigned mask, int value) {
  return emulated_vote(emulator::Collective::kVote, mask, value != 0,
                       [](uint64_t other) { return other != 0; });
}
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, value) == 0xffffffffu; }
inline unsigned __match_any_sync(unsigned mask, uint64_t own) {
  return emulated_vote(emulator::Collective::kMatch, mask, own, [own](uint64_t other) { return other == own; });
}

template <typename T>
T emulated_shuffle(unsigned mask, T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  std::memcpy(&value, &emulator::exchange_in_warp(emulator::Collective::kShuffle, bits, mask)[from],
              sizeof value);
  return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulated_shuffle(mask, value, from & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulated_shuffle(mask, value, emulator::lane() ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int offset) {
  const int from = emulator::lane() - offset;
  return emulated_shuffle(mask, value, from < 0 ? emulator::lane() : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  const int from = emulator::lane() + offset;
  return emulated_shuffle(mask, value, from > 31 ? emulator::lane() : from);
}

// ---- memory --------------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T *at) {
  return *at;
}
template <typename T>
T __ldcg(const T *at) {
  return *at;
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulator::let_others_run(); }

// No other fiber runs in between.
#define ODTRT_ATOMIC(name, changed)                                                                    \
  template <typename T, typename V>                                                                    \
  __attribute__((no_sanitize("thread"), noinline)) T name(T *at, V value) {                            \
    emulator::note_access(at, sizeof(T), emulator::Access::kAtomicWrite, __builtin_return_address(0)); \
    const T old = *at, given = static_cast<T>(value);                                                  \
    *at = changed;                                                                                     \
    return old;                                                                                        \
  }
ODTRT_ATOMIC(atomicAdd, old + given)
ODTRT_ATOMIC(atomicOr, old | given)
ODTRT_ATOMIC(atomicMax, old > given ? old : given)
ODTRT_ATOMIC(atomicMin, old < given ? old : given)
ODTRT_ATOMIC(atomicExch, given)
#undef ODTRT_ATOMIC

// ---- arithmetic ----------------------------------------------------------------------------------------------------

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}
inline float __logf(float value) { return std::log(value); }

// ---- the device, and launches --------------------------------------------------------------------------------------

typedef void *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxAccessPolicyWindowSize
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeAccessPolicyWindow
};
enum cudaAccessProperty { cudaAccessPropertyStreaming };
struct cudaAccessPolicyWindow {
  void *base_ptr;
  size_t num_bytes;
  float hitRatio;
  cudaAccessProperty hitProp, missProp;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    uint3 clusterDim;
    cudaAccessPolicyWindow accessPolicyWindow;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};

inline long long emulated_cluster() { return emulator::setting("CLUSTER", 16); }

// Each size of clusters is a device of its own, because the library asks each device only once.
inline cudaError_t cudaGetDevice(int *device) {
  *device = static_cast<int>(emulated_cluster());
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  *value = static_cast<int>(
      attribute == cudaDevAttrMultiProcessorCount            ? emulator::setting("MULTIPROCESSORS", 3)
      : attribute == cudaDevAttrComputeCapabilityMajor       ? emulator::setting("MAJOR", 9)
      : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulator::setting("SHARED", 232448)
                                                             : 128 << 20);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return emulator::failure(); }

inline cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, const void *,
                                                  const cudaLaunchConfig_t *config) {
  *clusters = config->gridDim.x <= emulated_cluster() ? 1000 : 0;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute &attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
  }
  const bool has_run = emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                        static_cast<int>(cluster), [&] { kernel(arguments...); });
  return has_run ? cudaSuccess : cudaErrorLaunchFailure;
}

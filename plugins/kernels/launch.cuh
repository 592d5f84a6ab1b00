// Launches kernels that follow one another on a stream with as little time as possible between them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

// Declares a struct parameter that threads read from constant memory. Otherwise each thread makes a copy.
#if CUDART_VERSION >= 11070
#define ODTRT_PARAMETER const __grid_constant__
#else
#define ODTRT_PARAMETER const
#endif

namespace odtrt {

// Cuts the next `size` bytes off a workspace, and moves `next` behind them. Both stay aligned for any type.
__host__ __device__ inline char *carve(char *&next, size_t size) {
  char *carved = next;
  next += (size + 255) & ~size_t{255};
  return carved;
}

#if !defined(ODTRT_OVERLAPS_FROM)  // a test makes a newer GPU run the kernels of older ones
#define ODTRT_OVERLAPS_FROM 9
#endif

struct Device {
  int id;
  int multiprocessors;
  int max_shared_bytes;    // that a block may ask for
  int max_streamed_bytes;  // the largest access policy window; 0: there is none
  bool overlaps_launches;  // compute capability 9.0 and newer: programmatic dependent launch
};

inline cudaError_t current_device(Device *device) {
  int &id = device->id, major = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  }
#if CUDART_VERSION >= 11080
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->max_streamed_bytes, cudaDevAttrMaxAccessPolicyWindowSize, id);
  }
#endif
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  device->overlaps_launches = major >= ODTRT_OVERLAPS_FROM;
  return error;
}

#if CUDART_VERSION >= 11080
inline cudaLaunchAttribute cluster_of(int ranks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(ranks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

inline cudaLaunchAttribute early_start() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Marks memory that a kernel reads only once, so that it does not evict other data from the L2 cache. Instructions are
// such data too: without this, suppress_in_cluster fetches its code from DRAM after select_candidates has read more
// than the cache holds.
inline cudaLaunchAttribute streamed(const void *at, size_t size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeAccessPolicyWindow;
  cudaAccessPolicyWindow &window = attribute.val.accessPolicyWindow;
  window.base_ptr = const_cast<void *>(at);
  window.num_bytes = size;
  window.hitRatio = 1.0f;
  window.hitProp = window.missProp = cudaAccessPropertyStreaming;
  return attribute;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_with(const cudaLaunchAttribute *attributes, unsigned count, void (*kernel)(Parameters...),
                        dim3 grid, int threads, int shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = const_cast<cudaLaunchAttribute *>(attributes);
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
#endif

// Lets a kernel use more than 48 KiB of shared memory and more than 8 blocks a cluster. A launch that needs either
// fails otherwise.
inline cudaError_t allow(const void *kernel, int shared_bytes, int ranks) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 40 * 1024) {  // with the arrays that the kernel declares, this may exceed 48 KiB
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
#if CUDART_VERSION >= 11080
  if (error == cudaSuccess && ranks > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
#else
  (void)ranks;
#endif
  return error;
}

#if CUDART_VERSION >= 11080
// How many clusters of `ranks` blocks of this kernel the current device can run at the same time.
template <typename Kernel>
int active_clusters(Kernel kernel, int ranks, int threads, size_t shared_bytes) {
  const void *const function = reinterpret_cast<const void *>(kernel);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ranks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute attribute = cluster_of(ranks);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  cudaError_t error = allow(function, static_cast<int>(shared_bytes), ranks);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
  if (error != cudaSuccess)
    (void)cudaGetLastError();  // clears the error: the caller only learns that no cluster fits
  return error == cudaSuccess ? clusters : 0;
}
#else
template <typename Kernel>
int active_clusters(Kernel, int, int, size_t) {
  return 0;
}
#endif

// Launches `kernel` with `shared_bytes` of dynamic shared memory. If `overlapped`, its blocks may start before the
// previous kernel of the stream has ended; the kernel must then call wait_for_previous_kernel() before it reads or
// writes memory that the previous kernel writes. cluster: the number of neighbouring blocks of the grid's first
// dimension that make a cluster (compute capability 9.0).
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                            cudaStream_t stream, bool overlapped, int cluster, Arguments... arguments) {
  const cudaError_t error = allow(reinterpret_cast<const void *>(kernel), shared_bytes, cluster);
  if (error != cudaSuccess) return error;
#if CUDART_VERSION >= 11080
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (overlapped) attributes[count++] = early_start();
  if (cluster > 1) attributes[count++] = cluster_of(cluster);
  return launch_with(attributes, count, kernel, grid, threads, shared_bytes, stream, arguments...);
#else
  (void)overlapped;
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream> > >(arguments...);
  return cudaGetLastError();
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   bool overlapped, Arguments... arguments) {
  return launch_clusters(kernel, grid, threads, shared_bytes, stream, overlapped, 1, arguments...);
}

// Launches a kernel that reads `size` bytes from `at` on, and reads each of them once.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_streaming(const Device &device, const void *at, size_t size, void (*kernel)(Parameters...),
                             dim3 grid, int threads, cudaStream_t stream, Arguments... arguments) {
#if CUDART_VERSION >= 11080
  const size_t max_size = static_cast<size_t>(device.max_streamed_bytes);
  const cudaLaunchAttribute attribute = streamed(at, size < max_size ? size : max_size);
  return launch_with(&attribute, max_size > 0, kernel, grid, threads, 0, stream, arguments...);
#else
  (void)device, (void)at, (void)size;
  return launch(kernel, grid, threads, 0, stream, false, arguments...);
#endif
}

#if defined(__CUDACC__)
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
#endif

}  // namespace odtrt

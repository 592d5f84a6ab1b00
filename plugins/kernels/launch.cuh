// Launching a chain of small kernels with as little as possible between them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

// A struct parameter that is read in place, not copied by each thread.
#if CUDART_VERSION >= 11070
#define ODTRT_PARAMETER const __grid_constant__
#else
#define ODTRT_PARAMETER const
#endif

namespace odtrt {

// The next `size` bytes of a workspace, aligned for any type.
__host__ __device__ inline char *take(char *&next, size_t size) {
  char *taken = next;
  next += (size + 255) & ~size_t{255};
  return taken;
}

#if !defined(ODTRT_OVERLAPS_FROM)  // a test sends a newer GPU the way of older ones
#define ODTRT_OVERLAPS_FROM 9
#endif

struct Device {
  int id;
  int multiprocessors;
  int most_shared_bytes;    // that a block may ask for
  int most_streamed_bytes;  // that a kernel can be told to stream; 0: none
  bool overlaps_launches;   // compute capability 9.0 and newer: programmatic dependent launch
};

inline cudaError_t current_device(Device *device) {
  int &id = device->id, major = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->most_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  }
#if CUDART_VERSION >= 11080
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->most_streamed_bytes, cudaDevAttrMaxAccessPolicyWindowSize, id);
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

// What a kernel reads once does not drive out of the L2 cache what is needed again. That is code, too: without this,
// `settle` gets its instructions from DRAM once `find` has gone through more than the cache holds.
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

// Allows a kernel much shared memory and large clusters; a launch with them fails otherwise.
inline cudaError_t allow(const void *kernel, int shared_bytes, int ranks) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 40 * 1024) {  // with what the kernel declares, more than 48 KiB perhaps
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
  if (error != cudaSuccess) (void)cudaGetLastError();  // it is not this call's
  return error == cudaSuccess ? clusters : 0;
}
#else
template <typename Kernel>
int active_clusters(Kernel, int, int, size_t) {
  return 0;
}
#endif

// Launches `kernel`, with `shared_bytes` of dynamic shared memory. With `overlapped`, its blocks may start before
// the previous kernel of the stream has ended; it must then call wait_for_previous_kernel() before it touches
// anything that one wrote.
// cluster: how many neighbouring blocks of the grid's first dimension make a cluster (compute capability 9.0).
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

// Launches a kernel that reads `size` bytes from `at` on once.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_streaming(const Device &device, const void *at, size_t size, void (*kernel)(Parameters...),
                             dim3 grid, int threads, cudaStream_t stream, Arguments... arguments) {
#if CUDART_VERSION >= 11080
  const size_t most = static_cast<size_t>(device.most_streamed_bytes);
  const cudaLaunchAttribute attribute = streamed(at, size < most ? size : most);
  return launch_with(&attribute, most > 0, kernel, grid, threads, 0, stream, arguments...);
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

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

struct Device {
  int multiprocessors;
  bool overlaps_launches;  // compute capability 9.0 and newer: programmatic dependent launch
};

inline cudaError_t current_device(Device *device) {
  int id = 0, major = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  device->overlaps_launches = major >= 9;
  return error;
}

// Launches `kernel`, with `shared_bytes` of dynamic shared memory. With `overlapped`, its blocks may start before
// the previous kernel of the stream has ended; it must then call wait_for_previous_kernel() before it touches
// anything that one wrote.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   bool overlapped, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
#if CUDART_VERSION >= 11080
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlapped ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
#else
  (void)overlapped;
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream> > >(arguments...);
  return cudaGetLastError();
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

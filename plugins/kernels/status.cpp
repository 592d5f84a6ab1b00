// Messages of status codes, facts about this library, and replacements for the *_cuda functions if it has no CUDA.
#include "odtrt.h"

#ifdef ODTRT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#ifndef ODTRT_CUDA_ARCHITECTURES
#define ODTRT_CUDA_ARCHITECTURES ""
#endif

const char *odtrt_error_string(odtrt_status status) {
  switch (status) {
    case ODTRT_OK:
      return "no error";
    case ODTRT_INVALID_ARGUMENT:
      return "invalid argument: a null or misaligned pointer, or a size or a setting out of its range (odtrt.h names the "
             "ranges)";
    case ODTRT_WORKSPACE_TOO_SMALL:
      return "the workspace is smaller than the *_workspace function says";
    case ODTRT_NO_CUDA:
      return "this library was built without CUDA: use the *_cpu function, or build where nvcc is installed";
    case ODTRT_OUT_OF_MEMORY:
      return "the machine has no memory left";
    default:
      break;
  }
#ifdef ODTRT_WITH_CUDA
  if (status > 0) return cudaGetErrorString(static_cast<cudaError_t>(status));
#endif
  return "unknown status";
}

int32_t odtrt_abi_version(void) { return ODTRT_ABI_VERSION; }

const char *odtrt_cuda_architectures(void) { return ODTRT_CUDA_ARCHITECTURES; }

#ifndef ODTRT_WITH_CUDA

size_t odtrt_postprocess_workspace(const odtrt_postprocess_params *, int32_t) { return 0; }

odtrt_status odtrt_postprocess_cuda(const odtrt_postprocess_params *, int32_t, const odtrt_heads *,
                                    const odtrt_detections *, void *, size_t, void *) {
  return ODTRT_NO_CUDA;
}

size_t odtrt_nms_workspace(const odtrt_nms_params *) { return 0; }

odtrt_status odtrt_nms_cuda(const odtrt_nms_params *, const float *, const float *, const int32_t *, int32_t *,
                            int32_t *, void *, size_t, void *) {
  return ODTRT_NO_CUDA;
}

odtrt_status odtrt_preprocess_cuda(const odtrt_preprocess_params *, const uint8_t *, void *, void *) {
  return ODTRT_NO_CUDA;
}

#endif

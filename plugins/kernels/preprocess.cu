// odtrt_preprocess_cuda: one kernel, in which each thread computes one output pixel.
#include <cuda_fp16.h>

#include "check.h"
#include "launch.cuh"
#include "odtrt.h"
#include "semantics.h"

namespace odtrt {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ void store(float *at, float value) { *at = value; }
__device__ __forceinline__ void store(__half *at, float value) { *at = __float2half_rn(value); }

template <typename T>
__global__ __launch_bounds__(kThreads) void resize_and_normalise(ODTRT_PARAMETER odtrt_preprocess_params params,
                                                                 float rows_over_out, float columns_over_out,
                                                                 const uint8_t *__restrict__ image,
                                                                 T *__restrict__ output) {
  const int x = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int y = static_cast<int>(blockIdx.y);
  if (x >= params.output_width) return;
  float values[3] = {params.pad_value[0], params.pad_value[1], params.pad_value[2]};
  if (x < params.true_width && y < params.true_height) {
    const Sample row = sample(y, params.image_height, rows_over_out);
    const Sample column = sample(x, params.image_width, columns_over_out);
    const uint8_t *top = image + row.lower * params.image_pitch,
                  *bottom = image + row.upper * params.image_pitch;
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
      const int from = params.bgr ? 2 - channel : channel;
      const int left = column.lower * 3 + from, right = column.upper * 3 + from;
      const float above = between(static_cast<float>(top[left]), static_cast<float>(top[right]), column.weight);
      const float below =
          between(static_cast<float>(bottom[left]), static_cast<float>(bottom[right]), column.weight);
      values[channel] =
          add(mul(between(above, below, row.weight), params.scale[channel]), params.offset[channel]);
    }
  }
  const size_t pixel = static_cast<size_t>(y) * params.output_width + x;
  const size_t pixels = static_cast<size_t>(params.output_height) * params.output_width;
#pragma unroll
  for (int channel = 0; channel < 3; ++channel) {
    store(output + (params.output_nhwc ? pixel * 3 + channel : pixels * channel + pixel), values[channel]);
  }
}

}  // namespace
}  // namespace odtrt

using namespace odtrt;

odtrt_status odtrt_preprocess_cuda(const odtrt_preprocess_params *params, const uint8_t *image, void *output,
                                   void *stream) {
  if (!is_valid(params) || image == nullptr || output == nullptr) return ODTRT_INVALID_ARGUMENT;
  const dim3 grid(static_cast<unsigned>((params->output_width + kThreads - 1) / kThreads),
                  static_cast<unsigned>(params->output_height));
  const auto on = static_cast<cudaStream_t>(stream);
  const float rows = static_cast<float>(params->image_height) / static_cast<float>(params->true_height);
  const float columns = static_cast<float>(params->image_width) / static_cast<float>(params->true_width);
  const cudaError_t error = params->output_dtype == ODTRT_FLOAT32
                                ? launch(resize_and_normalise<float>, grid, kThreads, 0, on, false, *params,
                                         rows, columns, image, static_cast<float *>(output))
                                : launch(resize_and_normalise<__half>, grid, kThreads, 0, on, false, *params,
                                         rows, columns, image, static_cast<__half *>(output));
  return static_cast<odtrt_status>(error);
}

// cuda_runtime_api.h on host memory, and the kernels of plugins/kernels/odtrt.h that work on a stream.
#include "cuda_runtime_api.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "odtrt.h"

using Work = std::vector<std::function<void()>>;

struct CUgraph_st {
  Work work;
};
struct CUgraphExec_st {
  Work work;
};
struct CUstream_st {
  std::deque<std::function<void()>> pending;
  CUgraph_st *capture = nullptr;
};
struct CUevent_st {
  bool is_done = true;
  CUstream_st *stream = nullptr;
};

namespace {

constexpr uintptr_t kShift = uintptr_t{1} << 46;  // from the host's address to the GPU's

struct Block {
  size_t size;
  bool is_pinned;
};

std::recursive_mutex mutex;
std::map<uintptr_t, Block> blocks;
int objects = 0, graph_launches = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t noted(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

const Block *block_with(uintptr_t address, size_t size) {
  auto found = blocks.upper_bound(address);
  if (found == blocks.begin()) return nullptr;
  --found;
  return address + size <= found->first + found->second.size ? &found->second : nullptr;
}

cudaError_t allocate(void **address, size_t size, bool is_pinned, uintptr_t shift) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  void *made = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(made, 0xA5, size);
  blocks[reinterpret_cast<uintptr_t>(made)] = {size, is_pinned};
  *address = reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(made) + shift);
  return cudaSuccess;
}

cudaError_t release(void *address, bool is_pinned, uintptr_t shift) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const uintptr_t own = reinterpret_cast<uintptr_t>(address) - shift;
  const auto found = blocks.find(own);
  if (found == blocks.end() || found->second.is_pinned != is_pinned) std::abort();
  blocks.erase(found);
  std::free(reinterpret_cast<void *>(own));
  return cudaSuccess;
}

void work_all(CUstream_st *stream) {
  while (!stream->pending.empty()) {
    stream->pending.front()();
    stream->pending.pop_front();
  }
}

bool is_set(const char *name) { return stand_in_setting(name)[0] != '\0'; }

}  // namespace

const char *stand_in_setting(const char *name) {
  const char *value = std::getenv(name);
  return value == nullptr ? "" : value;
}

void *stand_in_reach(const void *device, size_t size) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const uintptr_t own = reinterpret_cast<uintptr_t>(device) - kShift;
  if (block_with(own, size) == nullptr) {
    std::fprintf(stderr, "stand-in: %p with %zu bytes is no memory of the GPU\n", device, size);
    std::abort();
  }
  return reinterpret_cast<void *>(own);
}

void stand_in_enqueue(cudaStream_t stream, std::function<void()> work) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (stream->capture != nullptr)
    stream->capture->work.push_back(std::move(work));
  else
    stream->pending.push_back(std::move(work));
}

bool stand_in_is_capturing(cudaStream_t stream) { return stream->capture != nullptr; }

extern "C" {

__attribute__((visibility("default"))) int stand_in_objects() { return objects + static_cast<int>(blocks.size()); }
__attribute__((visibility("default"))) int stand_in_graph_launches() { return graph_launches; }

cudaError_t cudaGetDeviceCount(int *count) {
  *count = is_set("STAND_IN_NO_GPU") ? 0 : 1;
  return *count == 0 ? noted(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  *properties = {"Stand-in", size_t{8} << 30, 8, 7, 16};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
  *value = is_set("STAND_IN_INTEGRATED");
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t found = last_error;
  last_error = cudaSuccess;
  return found;
}
const char *cudaGetErrorString(cudaError_t status) { return status == cudaErrorNoDevice ? "no device" : "an error"; }

cudaError_t cudaMalloc(void **address, size_t size) { return allocate(address, size, false, kShift); }
cudaError_t cudaFree(void *address) { return release(address, false, kShift); }
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned) { return allocate(address, size, true, 0); }
cudaError_t cudaFreeHost(void *address) { return release(address, true, 0); }
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned) {
  *device = reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(host) + kShift);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const bool is_upload = kind == cudaMemcpyHostToDevice;
  const void *host = is_upload ? source : target;
  const void *device = stand_in_reach(is_upload ? target : source, size);
  const Block *block = block_with(reinterpret_cast<uintptr_t>(host), size);
  if (block == nullptr) {  // pageable: CUDA reads it before it returns
    if (stream->capture != nullptr) return noted(cudaErrorStreamCaptureUnsupported);
    work_all(stream);
    std::memcpy(is_upload ? const_cast<void *>(device) : target, is_upload ? source : device, size);
    return cudaSuccess;
  }
  if (!block->is_pinned) std::abort();
  void *const to = is_upload ? const_cast<void *>(device) : target;
  const void *const from = is_upload ? source : device;
  stand_in_enqueue(stream, [=] { std::memcpy(to, from, size); });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *address, int byte, size_t size, cudaStream_t stream) {
  void *own = stand_in_reach(address, size);
  stand_in_enqueue(stream, [=] { std::memset(own, byte, size); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
  ++objects;
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  --objects;
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (stream->capture != nullptr) return noted(cudaErrorStreamCaptureUnsupported);
  work_all(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (mode != cudaStreamCaptureModeThreadLocal || stream->capture != nullptr) std::abort();
  if (is_set("STAND_IN_NO_CAPTURE")) return noted(cudaErrorStreamCaptureUnsupported);
  ++objects;
  stream->capture = new CUgraph_st;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  if (stream->capture == nullptr) std::abort();
  *graph = stream->capture;
  stream->capture = nullptr;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
  ++objects;
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  ++graph_launches;
  for (const auto &work : executable->work) stand_in_enqueue(stream, work);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  --objects;
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  --objects;
  delete executable;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  ++objects;
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  --objects;
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->is_done = false;
  event->stream = stream;
  stand_in_enqueue(stream, [event] { event->is_done = true; });
  return cudaSuccess;
}
// The stream takes one step at each question.
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (is_set("STAND_IN_GPU_FAILS")) return noted(cudaErrorLaunchFailure);
  if (event->is_done) return cudaSuccess;
  if (!is_set("STAND_IN_GPU_HANGS") && !event->stream->pending.empty()) {
    event->stream->pending.front()();
    event->stream->pending.pop_front();
  }
  return noted(cudaErrorNotReady);
}

}  // extern "C"

// ---- the kernels: what their own launches check, and the CPU's results

size_t odtrt_postprocess_workspace(const odtrt_postprocess_params *, int32_t) { return 4096; }

odtrt_status odtrt_postprocess_cuda(const odtrt_postprocess_params *params, int32_t batch, const odtrt_heads *heads,
                                    const odtrt_detections *out, void *workspace, size_t workspace_size,
                                    void *stream) {
  if (last_error != cudaSuccess) return last_error;  // as a launch does that asks cudaGetLastError
  const auto b = static_cast<size_t>(batch), n = static_cast<size_t>(params->num_anchors);
  const auto most = b * static_cast<size_t>(params->max_total_detections);
  stand_in_reach(workspace, workspace_size);
  const auto reach = [](const auto *pointer, size_t count) {
    using Value = std::remove_const_t<std::remove_pointer_t<decltype(pointer)>>;
    return static_cast<Value *>(stand_in_reach(pointer, count * sizeof(Value)));
  };
  odtrt_heads own = *heads;
  own.box_encodings = stand_in_reach(heads->box_encodings, 16 * b * n);
  own.class_logits = stand_in_reach(heads->class_logits, 4 * b * n * static_cast<size_t>(params->num_columns));
  own.anchors = reach(heads->anchors, 4 * n);
  if (heads->clip_windows != nullptr) own.clip_windows = reach(heads->clip_windows, 4 * b);
  const odtrt_detections results = {reach(out->num_detections, b), reach(out->boxes, 4 * most),
                                    reach(out->scores, most), reach(out->classes, most), nullptr};
  const odtrt_postprocess_params settings = *params;
  stand_in_enqueue(static_cast<cudaStream_t>(stream),
                   [=] { odtrt_postprocess_cpu(&settings, batch, &own, &results, 1); });
  return ODTRT_OK;
}

odtrt_status odtrt_preprocess_cuda(const odtrt_preprocess_params *params, const uint8_t *image, void *output,
                                   void *stream) {
  if (last_error != cudaSuccess) return last_error;
  const odtrt_preprocess_params settings = *params;
  const auto *own = static_cast<const uint8_t *>(stand_in_reach(
      image, static_cast<size_t>((settings.image_height - 1) * settings.image_pitch + 3 * settings.image_width)));
  void *input = stand_in_reach(output, size_t{12} * static_cast<size_t>(settings.output_height) *
                                           static_cast<size_t>(settings.output_width));
  stand_in_enqueue(static_cast<cudaStream_t>(stream), [=] { odtrt_preprocess_cpu(&settings, own, input, 1); });
  return ODTRT_OK;
}

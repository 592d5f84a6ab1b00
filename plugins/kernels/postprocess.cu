// odtrt_postprocess_cuda. Two kernels with compute capability 9.0 and newer, which have clusters of blocks: `find`
// (postprocess_find.cuh) and `settle`, by one way (postprocess_by_class.cuh) or the other (postprocess_together.cuh).
// Five on anything older (postprocess_chain.cuh). All give the same bits, and truncate nothing.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "check.h"
#include "postprocess_by_class.cuh"
#include "postprocess_chain.cuh"
#include "postprocess_together.cuh"

namespace odtrt {
namespace {

Call new_call(const odtrt_postprocess_params &params) {
  Call call{};
  call.params = params;
  call.num_groups = params.class_agnostic ? 1 : params.num_columns - params.background_column;
  call.cap = params.class_agnostic ? params.max_total_detections : params.max_detections_per_class;
  const int64_t pairs = static_cast<int64_t>(params.num_anchors) * call.num_groups;
  const int64_t capped =
      static_cast<int64_t>(call.num_groups) * (call.cap < params.num_anchors ? call.cap : params.num_anchors);
  call.max_kept = static_cast<int32_t>((capped < pairs ? capped : pairs) + kMaxCandidates);
  call.counts_pairs = params.class_agnostic || pairs <= kFewPairs;
  Workspace ignored;
  call.image_size = lay_out(call, nullptr, &ignored);
  return call;
}

// Blocks for `work` of which one takes `each` at a time; all images together get at most `at_most`, or one each.
dim3 grid_for(int work, int each, int at_most, int images) {
  const int wanted = (work + each - 1) / each, fair = std::max(1, at_most / images);
  return dim3(static_cast<unsigned>(std::min(wanted, fair)), static_cast<unsigned>(images));
}

template <int kConverter>
int anchors_together(const Call &call) {
  return call.counts_pairs ? kTogether<kConverter, true> : kTogether<kConverter, false>;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Scaled; what is less has no score above the threshold, and without a converter what is not has one.
template <int kConverter>
float least_logit(float threshold) {
  return kConverter == ODTRT_IDENTITY ? std::nextafter(threshold, kInfinity)
                                      : cautious_logit<kConverter>(threshold);
}

// Ordered; a logit below it, times `factor`, is `least` at most.
uint32_t least_best(float least, float factor) {
  const uint32_t lowest = ordered(-kInfinity);
  return std::max(ordered(least / factor), lowest + 2) - 2;  // two steps cover what the division rounds
}

// ---- compute capability 9.0 and newer: two kernels ------------------------------------------------------------------

// From what `find` handed on to detections, in a cluster of blocks for each image.
template <typename T, int kConverter>
__global__ __launch_bounds__(kTailThreads, 1) void settle(ODTRT_PARAMETER Call call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ uint4 memory[];
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const Workspace space = space_of(call, image);
  const Box window = window_of(call, image);
  const float share = share_of_union(params.iou_threshold);
  if (params.max_total_detections <= kMostMerged && call.num_slots <= kMostSlots * cluster_size() &&
      call.num_groups >= kFewGroups) {
    ByClass &by_class = *reinterpret_cast<ByClass *>(memory);
    auto cleared = reinterpret_cast<uint32_t *>(by_class.spans);
    for (int i = thread; cleared + i < &by_class.end_of_cleared; i += kTailThreads) cleared[i] = 0;
    __syncthreads();
    cluster_arrive();  // before anyone writes into a block, it must be there
    wait_for_previous_kernel();
    if (settle_by_class<T, kConverter>(call, space, image, window, share, by_class)) return;
    __syncthreads();
  } else {
    wait_for_previous_kernel();
  }
  Tail &tail = *reinterpret_cast<Tail *>(memory);
  if (thread == 0) {
    tail.call = call;
    tail.space = space;
    tail.window = window;
  }
  __syncthreads();
  settle_together<T, kConverter>(image, share, tail);
#endif
}

constexpr size_t kTailBytes = sizeof(Tail) > sizeof(ByClass) ? sizeof(Tail) : sizeof(ByClass);

// The blocks of a cluster: as many as can be had for all images at the same time.
template <typename T, int kConverter>
int ranks_of_cluster(int images, const Device &device) {
  constexpr int kSizes = 3, kDevices = 64;            // clusters of 16, 8, 4
  static std::atomic<int> at_once[kDevices][kSizes];  // how many can run, and 1; 0: not asked yet
  for (int k = 0; k < kSizes; ++k) {
    const int ranks = kMostRanks >> k;
    std::atomic<int> &known = at_once[device.id % kDevices][k];
    if (known == 0) known = 1 + active_clusters(settle<T, kConverter>, ranks, kTailThreads, kTailBytes);
    if (known > images || (k == kSizes - 1 && known > 1)) return ranks;
  }
  return 1;
}

template <typename T, int kConverter>
cudaError_t enqueue_two(const Call &call, int images, const Device &device, cudaStream_t stream) {
  const int n = call.params.num_anchors, together = anchors_together<kConverter>(call);
  const int most = std::min(device.multiprocessors * kFindBlocks, kMaxSlots);
  const dim3 grid = grid_for(n, kGradeThreads / 32 * together, most, images);
  Call with_slots = call;
  with_slots.num_slots = static_cast<int32_t>(grid.x);
  const int32_t groups = (n + together - 1) / together;
  with_slots.groups_each = groups / with_slots.num_slots;
  with_slots.groups_left = groups % with_slots.num_slots;
  with_slots.least_logit = least_logit<kConverter>(call.params.score_threshold);
  with_slots.least_best = least_best(with_slots.least_logit, call.params.logit_factor);
  const auto kernel = call.counts_pairs ? find<T, kConverter, true> : find<T, kConverter, false>;
  const size_t logits_size = sizeof(T) * static_cast<size_t>(call.params.num_anchors) *
                             static_cast<size_t>(call.params.num_columns) * static_cast<size_t>(images);
  const cudaError_t error = launch_streaming(device, call.heads.class_logits, logits_size, kernel, grid,
                                             kGradeThreads, stream, with_slots);
  if (error != cudaSuccess) return error;
  const int ranks = ranks_of_cluster<T, kConverter>(images, device);
  return launch_clusters(settle<T, kConverter>,
                         dim3(static_cast<unsigned>(ranks), static_cast<unsigned>(images)), kTailThreads,
                         static_cast<int>(kTailBytes), stream, true, ranks, with_slots);
}

// ---- older: five kernels --------------------------------------------------------------------------------------------

template <typename T, int kConverter>
cudaError_t enqueue_five(const Call &call, int images, const Device &device, cudaStream_t stream) {
  const int n = call.params.num_anchors, each = anchors_together<kConverter>(call);
  constexpr int kTiles = kMaxChunks * (kMaxChunks + 1) / 2, kTilesEach = kOrderThreads / kMarkThreads;
  const int multiprocessors = device.multiprocessors;
  const bool overlapped = device.overlaps_launches;
  cudaError_t error = launch(clear, dim3(static_cast<unsigned>(images)), 256, 0, stream, false, call);
  if (error == cudaSuccess) {
    error = launch(grade<T, kConverter>, grid_for(n, kGradeThreads / 32 * each, multiprocessors * 5, images),
                   kGradeThreads, 0, stream, overlapped, call);
  }
  if (error == cudaSuccess) {
    error = launch(gather<T, kConverter>, grid_for(n, 32, multiprocessors * 2, images), kGatherThreads, 0,
                   stream, overlapped, call);
  }
  if (error == cudaSuccess) {
    error = launch(mark<T, kConverter>, grid_for(kTiles, kTilesEach, multiprocessors, images), kOrderThreads, 0,
                   stream, overlapped, call);
  }
  if (error == cudaSuccess) {
    error = launch(keep<T, kConverter>, grid_for(n, kRowsOfTile, multiprocessors, images), kKeepThreads,
                   kRingBytes, stream, overlapped, call);
  }
  return error;
}

template <typename T, int kConverter>
cudaError_t enqueue(const Call &call, int images, const Device &device, cudaStream_t stream) {
  static_assert(kMostColumns <= kGroupBits, "");
  return device.overlaps_launches && call.params.num_columns <= kMostColumns &&
                 call.params.score_threshold < kInfinity  // no score is above that
             ? enqueue_two<T, kConverter>(call, images, device, stream)
             : enqueue_five<T, kConverter>(call, images, device, stream);
}

template <typename T>
cudaError_t enqueue(const Call &call, int batch, const Device &device, cudaStream_t stream) {
  switch (call.params.score_converter) {
    case ODTRT_SIGMOID:
      return enqueue<T, ODTRT_SIGMOID>(call, batch, device, stream);
    case ODTRT_SOFTMAX:
      return enqueue<T, ODTRT_SOFTMAX>(call, batch, device, stream);
    default:
      return enqueue<T, ODTRT_IDENTITY>(call, batch, device, stream);
  }
}

}  // namespace
}  // namespace odtrt

using namespace odtrt;

size_t odtrt_postprocess_workspace(const odtrt_postprocess_params *params, int32_t batch) {
  return is_valid(params, batch) ? new_call(*params).image_size * static_cast<size_t>(batch) : 0;
}

odtrt_status odtrt_postprocess_cuda(const odtrt_postprocess_params *params, int32_t batch,
                                    const odtrt_heads *heads, const odtrt_detections *out, void *workspace,
                                    size_t workspace_size, void *stream) {
  if (!is_valid(params, batch) || !is_valid(heads, out) || workspace == nullptr) return ODTRT_INVALID_ARGUMENT;
  Call call = new_call(*params);
  if (workspace_size < call.image_size * static_cast<size_t>(batch)) return ODTRT_WORKSPACE_TOO_SMALL;
  call.heads = *heads;
  call.out = *out;
  call.workspace = static_cast<char *>(workspace);
  Device device{};
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return static_cast<odtrt_status>(error);
  const auto on = static_cast<cudaStream_t>(stream);
  error = heads->dtype == ODTRT_FLOAT32 ? enqueue<float>(call, batch, device, on)
                                        : enqueue<__half>(call, batch, device, on);
  return static_cast<odtrt_status>(error);
}

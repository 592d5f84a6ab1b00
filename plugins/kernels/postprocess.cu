// odtrt_postprocess_cuda. GPUs of compute capability 9.0 and newer, which have clusters of blocks, run two kernels:
// select_candidates (postprocess_select.cuh), then suppress_in_cluster, which uses postprocess_cluster_per_class.cuh
// if it can and postprocess_cluster_global.cuh otherwise. Older GPUs run five kernels (postprocess_sm75.cuh). All
// give the same bits, and none truncates anything.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "check.h"
#include "postprocess_cluster_per_class.cuh"
#include "postprocess_sm75.cuh"
#include "postprocess_cluster_global.cuh"

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
  call.image_size = carve_workspace(call, nullptr, &ignored);
  return call;
}

// A grid for `work` items, of which a block does `each` at a time. All images together get at most `at_most` blocks,
// but every image gets at least one.
dim3 grid_for(int work, int each, int at_most, int images) {
  const int wanted = (work + each - 1) / each, fair = std::max(1, at_most / images);
  return dim3(static_cast<unsigned>(std::min(wanted, fair)), static_cast<unsigned>(images));
}

template <int kConverter>
int anchors_per_warp(const Call &call) {
  return call.counts_pairs ? kAnchorsPerWarp<kConverter, true> : kAnchorsPerWarp<kConverter, false>;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A scaled logit below this has no score above the threshold. With the identity converter, every other logit has one.
template <int kConverter>
float min_logit_for(float threshold) {
  return kConverter == ODTRT_IDENTITY ? std::nextafter(threshold, kInfinity)
                                      : logit_lower_bound<kConverter>(threshold);
}

// A bound, as `ordered` maps it: a logit below it, times `factor`, is at most `min_score`.
uint32_t min_best_logit_for(float min_score, float factor) {
  const uint32_t lowest = ordered(-kInfinity);
  // Two steps down make up for the rounding of the division.
  return std::max(ordered(min_score / factor), lowest + 2) - 2;
}

// ---- compute capability 9.0 and newer: two kernels ------------------------------------------------------------------

// Suppresses the pairs that select_candidates passed on, and writes the detections. One cluster of blocks for each
// image.
template <typename T, int kConverter>
__global__ __launch_bounds__(kClusterThreads, 1) void suppress_in_cluster(ODTRT_PARAMETER Call call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ uint4 memory[];
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const Workspace space = workspace_of(call, image);
  const Box window = window_of(call, image);
  const float union_fraction = union_fraction_for(params.iou_threshold);
  if (params.max_total_detections <= kMaxMerged && call.num_slots <= kMaxSlotsOfBlock * cluster_size() &&
      call.num_groups >= kMinGroups) {
    PerClassShared &per_class = *reinterpret_cast<PerClassShared *>(memory);
    auto cleared = reinterpret_cast<uint32_t *>(per_class.spans);
    for (int i = thread; cleared + i < &per_class.end_of_cleared; i += kClusterThreads) cleared[i] = 0;
    __syncthreads();
    cluster_arrive();  // a block must run before others write into its memory
    wait_for_previous_kernel();
    if (suppress_per_class<T, kConverter>(call, space, image, window, union_fraction, per_class)) return;
    __syncthreads();
  } else {
    wait_for_previous_kernel();
  }
  GlobalShared &global = *reinterpret_cast<GlobalShared *>(memory);
  if (thread == 0) {
    global.call = call;
    global.space = space;
    global.window = window;
  }
  __syncthreads();
  suppress_global<T, kConverter>(image, union_fraction, global);
#endif
}

constexpr size_t kClusterSharedBytes = sizeof(GlobalShared) > sizeof(PerClassShared) ? sizeof(GlobalShared)
                                                                                     : sizeof(PerClassShared);

// The cluster size: the largest for which the device can run the clusters of all images at the same time.
template <typename T, int kConverter>
int ranks_of_cluster(int images, const Device &device) {
  constexpr int kSizes = 3, kDevices = 64;            // clusters of 16, 8, 4
  static std::atomic<int> at_once[kDevices][kSizes];  // 1 + how many clusters can run; 0: not asked yet
  for (int k = 0; k < kSizes; ++k) {
    const int ranks = kMaxRanks >> k;
    std::atomic<int> &known = at_once[device.id % kDevices][k];
    if (known == 0)
      known =
          1 + active_clusters(suppress_in_cluster<T, kConverter>, ranks, kClusterThreads, kClusterSharedBytes);
    if (known > images || (k == kSizes - 1 && known > 1)) return ranks;
  }
  return 1;
}

template <typename T, int kConverter>
cudaError_t enqueue_clusters(const Call &call, int images, const Device &device, cudaStream_t stream) {
  const int n = call.params.num_anchors, each = anchors_per_warp<kConverter>(call);
  const int max_blocks = std::min(device.multiprocessors * kSelectBlocks, kMaxSlots);
  const dim3 grid = grid_for(n, kScoreThreads / 32 * each, max_blocks, images);
  Call with_slots = call;
  with_slots.num_slots = static_cast<int32_t>(grid.x);
  const int32_t groups = (n + each - 1) / each;
  with_slots.groups_of_each = groups / with_slots.num_slots;
  with_slots.blocks_with_one_more = groups % with_slots.num_slots;
  with_slots.min_logit = min_logit_for<kConverter>(call.params.score_threshold);
  with_slots.min_best_logit = min_best_logit_for(with_slots.min_logit, call.params.logit_factor);
  const auto kernel =
      call.counts_pairs ? select_candidates<T, kConverter, true> : select_candidates<T, kConverter, false>;
  const size_t logits_size = sizeof(T) * static_cast<size_t>(call.params.num_anchors) *
                             static_cast<size_t>(call.params.num_columns) * static_cast<size_t>(images);
  const cudaError_t error = launch_streaming(device, call.heads.class_logits, logits_size, kernel, grid,
                                             kScoreThreads, stream, with_slots);
  if (error != cudaSuccess) return error;
  const int ranks = ranks_of_cluster<T, kConverter>(images, device);
  return launch_clusters(suppress_in_cluster<T, kConverter>,
                         dim3(static_cast<unsigned>(ranks), static_cast<unsigned>(images)), kClusterThreads,
                         static_cast<int>(kClusterSharedBytes), stream, true, ranks, with_slots);
}

// ---- older: five kernels --------------------------------------------------------------------------------------------

template <typename T, int kConverter>
cudaError_t enqueue_sm75(const Call &call, int images, const Device &device, cudaStream_t stream) {
  const int n = call.params.num_anchors, each = anchors_per_warp<kConverter>(call);
  constexpr int kTiles = kMaxChunks * (kMaxChunks + 1) / 2, kTilesEach = kSortThreads / kMaskThreads;
  const int multiprocessors = device.multiprocessors;
  const bool overlapped = device.overlaps_launches;
  cudaError_t error = launch(clear, dim3(static_cast<unsigned>(images)), 256, 0, stream, false, call);
  if (error == cudaSuccess) {
    error = launch(anchor_best_score<T, kConverter>,
                   grid_for(n, kScoreThreads / 32 * each, multiprocessors * 5, images), kScoreThreads, 0,
                   stream, overlapped, call);
  }
  if (error == cudaSuccess) {
    error = launch(compact_above<T, kConverter>, grid_for(n, 32, multiprocessors * 2, images), kCompactThreads,
                   0, stream, overlapped, call);
  }
  if (error == cudaSuccess) {
    error = launch(build_iou_mask<T, kConverter>, grid_for(kTiles, kTilesEach, multiprocessors, images),
                   kSortThreads, 0, stream, overlapped, call);
  }
  if (error == cudaSuccess) {
    error = launch(suppress<T, kConverter>, grid_for(n, kAnchorsPerTile, multiprocessors, images),
                   kSuppressThreads, kRingBytes, stream, overlapped, call);
  }
  return error;
}

template <typename T, int kConverter>
cudaError_t enqueue(const Call &call, int images, const Device &device, cudaStream_t stream) {
  static_assert(kMaxColumns <= kGroupBits, "");
  return device.overlaps_launches && call.params.num_columns <= kMaxColumns &&
                 call.params.score_threshold < kInfinity  // no score is above infinity
             ? enqueue_clusters<T, kConverter>(call, images, device, stream)
             : enqueue_sm75<T, kConverter>(call, images, device, stream);
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

// odtrt_nms_cuda: rank by counting, then suppression in segments of 2560 ranks.
#include "check.h"
#include "odtrt.h"
#include "suppression.cuh"

namespace odtrt {
namespace {

constexpr int kRankThreads = 512;
constexpr int kRanksPerBlock = kRankThreads / 32;  // a warp counts who is better than one box
constexpr int kRankTile = 4096;

struct Counts {
  int32_t valid, kept;
};

struct Workspace {
  Counts *counts;
  uint64_t *mask;       // [kMaxChunks, kMaxChunks, kChunk], see suppression.cuh
  uint64_t *dead;       // [kMaxChunks]
  Box *boxes;           // [n], corners ordered; best first, as the next two
  int32_t *groups;      // [n]
  int32_t *indices;     // [n]
  int32_t *kept_ranks;  // [n]
  size_t size;
};

Workspace divide_workspace(const odtrt_nms_params &params, void *memory) {
  char *next = static_cast<char *>(memory);
  const size_t n = static_cast<size_t>(params.num_boxes);
  Workspace space{};
  space.counts = reinterpret_cast<Counts *>(take(next, sizeof(Counts)));
  space.mask = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxCandidates * kMaxChunks));
  space.dead = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxChunks));
  space.boxes = reinterpret_cast<Box *>(take(next, sizeof(Box) * n));
  space.groups = reinterpret_cast<int32_t *>(take(next, sizeof(int32_t) * n));
  space.indices = reinterpret_cast<int32_t *>(take(next, sizeof(int32_t) * n));
  space.kept_ranks = reinterpret_cast<int32_t *>(take(next, sizeof(int32_t) * n));
  space.size = static_cast<size_t>(next - static_cast<char *>(memory));
  return space;
}

__device__ __forceinline__ int sum_of_warp(int value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ uint32_t strength(float score, float threshold) {
  return score > threshold ? ordered(add(score, 0.0f)) : 0;
}

__global__ __launch_bounds__(kRankThreads) void rank_boxes(odtrt_nms_params params,
                                                           const float *__restrict__ boxes,
                                                           const float *__restrict__ scores,
                                                           const int32_t *__restrict__ classes,
                                                           Workspace space) {
  __shared__ uint4 tile[kRankTile / 4];
  let_next_kernel_start();
  const int lane = lane_id(), n = params.num_boxes, thread = static_cast<int>(threadIdx.x);
  const int i = static_cast<int>(blockIdx.x) * kRanksPerBlock + warp_id();
  const uint32_t own = i < n ? strength(scores[i], params.score_threshold) : 0;
  int rank = 0, valid = 0;
  for (int start = 0; start < n; start += kRankTile) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRankTile / kRankThreads; ++k) {
      const int j = start + k * kRankThreads + thread;
      reinterpret_cast<uint32_t *>(tile)[k * kRankThreads + thread] =
          j < n ? strength(scores[j], params.score_threshold) : 0;
    }
    __syncthreads();
    const int size = min(kRankTile, n - start);
#pragma unroll 4
    for (int j = 4 * lane; j < size; j += 128) {
      const uint4 others = tile[j / 4];
      const uint32_t other[4] = {others.x, others.y, others.z, others.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        rank += other[k] + (start + j + k < i) > own;  // of equal scores the lower index is better
        valid += other[k] != 0;
      }
    }
  }
  rank = sum_of_warp(rank);
  if (i == 0) valid = sum_of_warp(valid);
  if (lane != 0) return;
  if (i == 0) *space.counts = {valid, 0};
  if (own == 0) return;
  const float4 box = reinterpret_cast<const float4 *>(boxes)[i];
  space.boxes[rank] = with_ordered_corners({box.x, box.y, box.z, box.w});
  space.groups[rank] = classes == nullptr ? 0 : classes[i];
  space.indices[rank] = i;
}

__device__ __forceinline__ int size_of_segment(const Counts &counts, int segment, int max_kept) {
  if (counts.kept >= max_kept) return 0;
  const int left = counts.valid - segment * kMaxCandidates;
  return left < 0 ? 0 : left < kMaxCandidates ? left : kMaxCandidates;
}

__global__ __launch_bounds__(kMarkThreads) void mark(odtrt_nms_params params, Workspace space, int segment) {
  __shared__ Tile tile;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int start = segment * kMaxCandidates;
  mark_overlaps(
      size_of_segment(*space.counts, segment, params.max_kept), params.iou_threshold, space.mask, &tile,
      [&](int i) {
        return Candidate{space.boxes[start + i], space.groups[start + i]};
      },
      [](int) {});
}

// Which candidates of a later segment are suppressed by boxes of earlier ones.
__global__ __launch_bounds__(kMarkThreads) void mark_dead(odtrt_nms_params params, Workspace space,
                                                          int segment) {
  __shared__ Candidate kept[kChunk];
  __shared__ unsigned long long dead;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int count = size_of_segment(*space.counts, segment, params.max_kept);
  const int thread = static_cast<int>(threadIdx.x), local = thread >> 2, part = thread & 3;
  const int i = static_cast<int>(blockIdx.x) * kChunk + local;
  const int own = segment * kMaxCandidates + i;
  if (static_cast<int>(blockIdx.x) * kChunk >= count) return;
  if (thread == 0) dead = 0;
  Candidate candidate{};
  if (i < count) candidate = {space.boxes[own], space.groups[own]};
  const float area = signed_area(candidate.box);
  bool is_dead = false;
  for (int first = 0; first < space.counts->kept; first += kChunk) {
    const int size = min(kChunk, space.counts->kept - first);
    __syncthreads();
    if (thread < size) {
      const int rank = space.kept_ranks[first + thread];
      kept[thread] = {space.boxes[rank], space.groups[rank]};
    }
    __syncthreads();
    for (int k = part; k < size && !is_dead; k += 4) {
      is_dead = kept[k].group == candidate.group &&
                suppresses(kept[k].box, signed_area(kept[k].box), candidate.box, area, params.iou_threshold);
    }
  }
  __syncthreads();
  if (is_dead && i < count) atomicOr(&dead, 1ull << local);
  __syncthreads();
  if (thread == 0) space.dead[blockIdx.x] = dead;
}

__global__ __launch_bounds__(kKeepThreads, 1) void keep(odtrt_nms_params params, Workspace space, int segment,
                                                        bool is_last, int32_t *__restrict__ kept,
                                                        int32_t *__restrict__ num_kept) {
  extern __shared__ uint4 ring[];
  __shared__ Survivors survivors;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int before = space.counts->kept, thread = static_cast<int>(threadIdx.x);
  keep_survivors(size_of_segment(*space.counts, segment, params.max_kept), space.mask,
                 segment == 0 ? nullptr : space.dead, params.max_kept - before,
                 reinterpret_cast<uint64_t *>(ring), survivors, [](int, uint64_t bits) { return bits; });
  visit_found(survivors, reinterpret_cast<uint16_t *>(ring), [&](int place, int candidate) {
    const int rank = segment * kMaxCandidates + candidate;
    kept[before + place] = __ldg(space.indices + rank);
    space.kept_ranks[before + place] = rank;
  });
  const int in_all = before + survivors.num_found;
  if (is_last) {
    for (int i = in_all + thread; i < params.max_kept; i += kKeepThreads) kept[i] = -1;
    if (thread == 0) *num_kept = in_all;
  }
  __syncthreads();
  if (thread == 0) space.counts->kept = in_all;
}

}  // namespace
}  // namespace odtrt

using namespace odtrt;

size_t odtrt_nms_workspace(const odtrt_nms_params *params) {
  return is_valid(params) ? divide_workspace(*params, nullptr).size : 0;
}

odtrt_status odtrt_nms_cuda(const odtrt_nms_params *params, const float *boxes, const float *scores,
                            const int32_t *classes, int32_t *kept, int32_t *num_kept, void *workspace,
                            size_t workspace_size, void *stream) {
  if (!is_valid(params) || !is_valid_nms_data(*params, boxes, scores, kept, num_kept) || workspace == nullptr) {
    return ODTRT_INVALID_ARGUMENT;
  }
  const Workspace space = divide_workspace(*params, workspace);
  if (workspace_size < space.size) return ODTRT_WORKSPACE_TOO_SMALL;
  Device device{};
  cudaError_t error = current_device(&device);
  const auto on = static_cast<cudaStream_t>(stream);
  const bool overlapped = device.overlaps_launches;
  const int n = params->num_boxes;
  const int blocks = n == 0 ? 1 : (n + kRanksPerBlock - 1) / kRanksPerBlock;
  if (error == cudaSuccess) {
    error =
        launch(rank_boxes, dim3(blocks), kRankThreads, 0, on, false, *params, boxes, scores, classes, space);
  }
  const int segments = n <= kMaxCandidates ? 1 : (n + kMaxCandidates - 1) / kMaxCandidates;
  for (int segment = 0; segment < segments && error == cudaSuccess; ++segment) {
    if (segment > 0)
      error = launch(mark_dead, dim3(kMaxChunks), kMarkThreads, 0, on, overlapped, *params, space, segment);
    const int in_segment = min(n - segment * kMaxCandidates, kMaxCandidates);
    const int chunks = (in_segment + kChunk - 1) / kChunk;
    const int tiles = max(1, min(chunks * (chunks + 1) / 2, device.multiprocessors * 8));
    if (error == cudaSuccess)
      error = launch(mark, dim3(tiles), kMarkThreads, 0, on, overlapped, *params, space, segment);
    if (error == cudaSuccess) {
      error = launch(keep, dim3(1), kKeepThreads, kRingBytes, on, overlapped, *params, space, segment,
                     segment + 1 == segments, kept, num_kept);
    }
  }
  return static_cast<odtrt_status>(error);
}

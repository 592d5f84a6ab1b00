// odtrt_nms_cuda. Up to 4096 boxes take two kernels. A rival of a box is a better box of its class whose IoU with it is
// above the threshold.
//
// compare   compares each box with all others. It counts the better boxes, which is the box's rank, and lists its
//           rivals. It divides only for the few pairs that a product does not decide.
// choose    decides in one block, in rounds over all boxes: a box without an undecided rival is kept, and a box with
//           a kept rival is dropped. It writes the kept boxes in the order of their ranks.
//
// More boxes take four kernels: rank_boxes sorts them by counting. Then each segment of 2560 ranks is suppressed,
// first by what earlier segments kept (suppress_by_earlier), then in itself (build_segment_mask, suppress_segment).
#include <algorithm>

#include "check.h"
#include "odtrt.h"
#include "suppression.cuh"

namespace odtrt {
namespace {

constexpr int kRankThreads = 512;
constexpr int kRanksPerBlock = kRankThreads / 32;  // a warp counts the boxes that are better than one box
constexpr int kRankTile = 4096;

// A number in the order of the scores; 0 if the score is not above the threshold. -0 counts as 0.
__device__ __forceinline__ uint32_t strength_of(float score, float threshold) {
  return score > threshold ? ordered(add(score, 0.0f)) : 0;
}

// ---- up to kMaxPairwise boxes ---------------------------------------------------------------------------------------

constexpr int kMaxPairwise = 4096;
constexpr int kCompareThreads = 512;
constexpr int kRowsOfWarp = 4;  // rows that a warp compares with each column that it reads
constexpr int kQuarters = 4;    // of the columns; one warp reads each
constexpr int kRowsOfBlock = kCompareThreads / 32 / kQuarters * kRowsOfWarp;
constexpr int kChooseThreads = 1024;
constexpr int kMaxWords = kMaxPairwise / 32;

constexpr int kListed = 8;  // rivals of a box that are listed one by one
// Two unused entries of a list. They name a box that does not exist; its bit, in word kMaxWords of an array, is 0.
constexpr uint32_t kNoBoxPair = kMaxPairwise << 16 | kMaxPairwise;

struct Rivals {
  int32_t rank;    // of the box; -1: its score is not above the threshold
  uint32_t count;  // of its rivals
};

struct PairwiseWorkspace {
  uint4 *lists;    // [n], kListed rivals, 16 bits each
  Rivals *rivals;  // [n]
  // [n, words], bit b of word k: box 32 k + b is a rival. Only the words that `filled` names are written.
  uint32_t *mask;
  // [n], a bit for each word of the mask that is not 0; x, y, z and w have a quarter of the words each.
  uint4 *filled;
  int32_t words, words_of_quarter;
  size_t size;
};

PairwiseWorkspace carve_pairwise(const odtrt_nms_params &params, void *memory) {
  char *next = static_cast<char *>(memory);
  const size_t n = static_cast<size_t>(params.num_boxes);
  PairwiseWorkspace space{};
  space.words_of_quarter = (params.num_boxes + 32 * kQuarters - 1) / (32 * kQuarters);
  space.words = space.words_of_quarter * kQuarters;
  space.mask = reinterpret_cast<uint32_t *>(carve(next, sizeof(uint32_t) * n * space.words));
  space.filled = reinterpret_cast<uint4 *>(carve(next, sizeof(uint4) * n));
  space.lists = reinterpret_cast<uint4 *>(carve(next, sizeof(uint4) * n));
  space.rivals = reinterpret_cast<Rivals *>(carve(next, sizeof(Rivals) * n));
  space.size = static_cast<size_t>(next - static_cast<char *>(memory));
  return space;
}

struct Columns {
  float4 *boxes;  // corners ordered
  float *areas;   // see scaled_area
  uint32_t *strengths;
};

__global__ __launch_bounds__(kCompareThreads) void compare(odtrt_nms_params params,
                                                           const float *__restrict__ boxes,
                                                           const float *__restrict__ scores,
                                                           const int32_t *__restrict__ classes,
                                                           PairwiseWorkspace space) {
  extern __shared__ uint4 memory[];
  __shared__ int32_t ranks[kRowsOfBlock];
  __shared__ uint32_t counts[kRowsOfBlock];
  __shared__ uint4 lists[kRowsOfBlock];
  let_next_kernel_start();
  const int n = params.num_boxes, thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int padded = space.words * 32;
  const Columns columns{reinterpret_cast<float4 *>(memory), reinterpret_cast<float *>(memory + padded),
                        reinterpret_cast<uint32_t *>(memory + padded) + padded};
  const auto given = reinterpret_cast<const float4 *>(boxes);
  const float union_fraction = union_fraction_for(params.iou_threshold);
#pragma unroll 4
  for (int i = thread; i < padded; i += kCompareThreads) {
    const bool is_box = i < n;
    const float4 corners = is_box ? __ldg(given + i) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    const uint32_t strength = is_box ? strength_of(__ldg(scores + i), params.score_threshold) : 0;
    Box box = with_ordered_corners({corners.x, corners.y, corners.z, corners.w});
    float area = signed_area(box);
    if (area <= 0.0f &&
        params.iou_threshold >= 0.0f) {  // neither suppresses nor is suppressed: put where it overlaps nothing
      box = {1e30f, 1e30f, -1e30f, -1e30f};
      area = 1.0f;
    } else {
      area = scaled_area(area, union_fraction);
    }
    columns.boxes[i] = make_float4(box.ymin, box.xmin, box.ymax, box.xmax);
    columns.areas[i] = area;
    columns.strengths[i] = strength;
  }
  if (thread < kRowsOfBlock) {
    ranks[thread] = 0;
    counts[thread] = 0;
    lists[thread] = {kNoBoxPair, kNoBoxPair, kNoBoxPair, kNoBoxPair};
  }
  __syncthreads();

  const int quarter = warp_id() % kQuarters;
  const int first_row = static_cast<int>(blockIdx.x) * kRowsOfBlock + warp_id() / kQuarters * kRowsOfWarp;
  Box own[kRowsOfWarp];
  float own_area[kRowsOfWarp];
  uint32_t own_strength[kRowsOfWarp], filled[kRowsOfWarp];
  int rank[kRowsOfWarp];
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int row = min(first_row + r, padded - 1);
    const float4 corners = columns.boxes[row];
    own[r] = {corners.x, corners.y, corners.z, corners.w};
    own_area[r] = columns.areas[row];
    own_strength[r] = first_row + r < n ? columns.strengths[row] : 0xffffffffu;
    filled[r] = 0;
    rank[r] = 0;
  }
  // Of equal scores the lower index is better.
  const int first_word = quarter * space.words_of_quarter;
  auto exceeds = [&](int r, int column, uint32_t strength) {
    return strength + (column < first_row + r) > own_strength[r];
  };
#pragma unroll 1
  for (int k = 0; k < space.words_of_quarter; ++k) {
    const int column = (first_word + k) * 32 + lane;
    const float4 corners = columns.boxes[column];
    const Box other{corners.x, corners.y, corners.z, corners.w};
    const float area = columns.areas[column];
    const uint32_t strength = columns.strengths[column];
    bool may[kRowsOfWarp], is_any = false;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      rank[r] += exceeds(r, column, strength);
      may[r] = may_suppress(own[r], own_area[r], other, area);
      is_any |= may[r];
    }
    if (!__any_sync(0xffffffffu, is_any)) continue;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      bool is_rival = may[r] && exceeds(r, column, strength);
      if (is_rival && classes != nullptr) is_rival = __ldg(classes + column) == __ldg(classes + first_row + r);
      if (is_rival) {
        const Box kept{corners.x, corners.y, corners.z, corners.w};
        const bool is_nowhere = kept.ymin > kept.ymax || own[r].ymin > own[r].ymax;
        is_rival = !is_nowhere &&
                   suppresses(kept, signed_area(kept), own[r], signed_area(own[r]), params.iou_threshold);
      }
      const uint32_t word = __ballot_sync(0xffffffffu, is_rival);
      if (word != 0) {
        filled[r] |= 1u << k;
        const int row = warp_id() / kQuarters * kRowsOfWarp + r;  // in the block
        uint32_t at = 0;
        if (lane == 0) {
          space.mask[static_cast<size_t>(first_row + r) * space.words + first_word + k] = word;
          at = atomicAdd(&counts[row], static_cast<uint32_t>(__popc(word)));
        }
        at = __shfl_sync(0xffffffffu, at, 0) + __popc(word & ((1u << lane) - 1));
        if (is_rival && at < kListed)
          reinterpret_cast<uint16_t *>(&lists[row])[at] = static_cast<uint16_t>(column);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int sum = warp_sum_by_shuffles(rank[r]);
    if (lane == 0) {
      atomicAdd(&ranks[first_row + r - static_cast<int>(blockIdx.x) * kRowsOfBlock], sum);
      if (first_row + r < n) reinterpret_cast<uint32_t *>(space.filled + first_row + r)[quarter] = filled[r];
    }
  }
  __syncthreads();
  const int row = static_cast<int>(blockIdx.x) * kRowsOfBlock + thread;
  if (thread < kRowsOfBlock && row < n) {
    space.rivals[row] = {columns.strengths[row] == 0 ? -1 : ranks[thread], counts[thread]};
    space.lists[row] = lists[thread];
  }
}

__device__ __forceinline__ bool is_empty(const uint4 &left) { return (left.x | left.y | left.z | left.w) == 0; }

// Clears the first bit of `left`, and returns the index of the word that it names.
__device__ __forceinline__ int pop_word(uint4 &left, int words_of_quarter) {
  const int quarter = left.x != 0 ? 0 : left.y != 0 ? 1 : left.z != 0 ? 2 : 3;
  uint32_t &bits = quarter == 0 ? left.x : quarter == 1 ? left.y : quarter == 2 ? left.z : left.w;
  const int place = quarter * words_of_quarter + __ffs(static_cast<int>(bits)) - 1;
  bits &= bits - 1;
  return place;
}

// Whether a row of the mask and the bits of `among` have a box in common. left: which words of the row are not 0.
__device__ __noinline__ bool is_hit_by_row(const uint32_t *words, uint4 left, int words_of_quarter,
                                           const uint32_t *among) {
  uint32_t hit = 0;
  while (hit == 0 && !is_empty(left)) {
    const int place = pop_word(left, words_of_quarter);
    hit = words[place] & among[place];
  }
  return hit != 0;
}

// kRows: how many rows a thread has. Thread t has rows t, t + kChooseThreads, ...
template <int kRows>
__global__ __launch_bounds__(kChooseThreads, 1) void choose(odtrt_nms_params params, PairwiseWorkspace space,
                                                            int32_t *__restrict__ kept,
                                                            int32_t *__restrict__ num_kept) {
  __shared__ uint32_t undecided[kMaxWords + 1], stays[kMaxWords + 1], by_rank[kMaxWords];
  __shared__ int32_t before[kMaxWords + 1];
  const int n = params.num_boxes, thread = static_cast<int>(threadIdx.x), lane = lane_id();
  wait_for_previous_kernel();
  let_next_kernel_start();
  int rank[kRows];
  uint32_t count[kRows];
  uint4 list[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = thread + r * kChooseThreads;
    const int2 rivals = row < n ? __ldcg(reinterpret_cast<const int2 *>(space.rivals) + row) : int2{-1, 0};
    list[r] = row < n ? __ldcg(space.lists + row) : uint4{kNoBoxPair, kNoBoxPair, kNoBoxPair, kNoBoxPair};
    rank[r] = rivals.x;
    count[r] = static_cast<uint32_t>(rivals.y);
  }
  auto is_hit = [&](int r, const uint32_t *among) {
    if (count[r] > kListed) {
      const size_t row = static_cast<size_t>(thread + r * kChooseThreads);
      return is_hit_by_row(space.mask + row * space.words, __ldcg(space.filled + row), space.words_of_quarter,
                           among);
    }
    const uint4 own = kRows > 2 ? __ldcg(space.lists + min(thread + r * kChooseThreads, n - 1)) : list[r];
    const uint32_t pairs[4] = {own.x, own.y, own.z, own.w};
    uint32_t hit = 0;
#pragma unroll
    for (uint32_t k = 0; k < kListed / 2; ++k) {
      if (count[r] <= 2 * k || (hit & 1) != 0) break;
      hit = among[(pairs[k] & 0xffff) / 32] >> (pairs[k] % 32) | among[pairs[k] >> 21] >> (pairs[k] >> 16 & 31);
    }
    return (hit & 1) != 0;
  };
  bool is_open[kRows], is_kept[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    is_kept[r] = rank[r] >= 0 && count[r] == 0;
    is_open[r] = rank[r] >= 0 && !is_kept[r];
    const uint32_t kept_now = __ballot_sync(0xffffffffu, is_kept[r]);
    if (lane == 0) stays[warp_id() + r * (kChooseThreads / 32)] = kept_now;
  }
  if (thread < kMaxWords) by_rank[thread] = 0;
  if (thread == 0) undecided[kMaxWords] = stays[kMaxWords] = 0;
  if (thread >= kRows * (kChooseThreads / 32) && thread < kMaxWords) undecided[thread] = stays[thread] = 0;
  __syncthreads();
  for (;;) {
    bool is_any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (is_open[r]) is_open[r] = !is_hit(r, stays);
      const uint32_t word = __ballot_sync(0xffffffffu, is_open[r]);
      if (lane == 0) undecided[warp_id() + r * (kChooseThreads / 32)] = word;
      is_any |= is_open[r];
    }
    if (!__syncthreads_or(is_any)) break;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      bool stay = is_open[r];
      if (stay) stay = !is_hit(r, undecided);
      is_kept[r] |= stay;
      is_open[r] &= !stay;
      const uint32_t word = __ballot_sync(0xffffffffu, stay);
      if (lane == 0) stays[warp_id() + r * (kChooseThreads / 32)] = word;
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (is_kept[r]) atomicOr(&by_rank[rank[r] >> 5], 1u << (rank[r] & 31));
  }
  __syncthreads();
  if (warp_id() == 0) {
    constexpr int kEach = kMaxWords / 32;
    int counts[kEach], own = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) own += counts[k] = __popc(by_rank[lane * kEach + k]);
    int sum = warp_inclusive_scan(own);
    if (lane == 31) before[kMaxWords] = sum;
    sum -= own;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      before[lane * kEach + k] = sum;
      sum += counts[k];
    }
  }
  __syncthreads();
  const int total = min(before[kMaxWords], params.max_kept);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!is_kept[r]) continue;
    const int place = before[rank[r] >> 5] + __popc(by_rank[rank[r] >> 5] & ((1u << (rank[r] & 31)) - 1));
    if (place < total) kept[place] = thread + r * kChooseThreads;
  }
  for (int i = total + thread; i < params.max_kept; i += kChooseThreads) kept[i] = -1;
  if (thread == 0) *num_kept = total;
}

// ---- more boxes ----------------------------------------------------------------------------------------------------

struct Counts {
  int32_t valid, kept;
};

struct SegmentWorkspace {
  Counts *counts;
  uint64_t *mask;       // [kMaxChunks, kMaxChunks, kChunk], see suppression.cuh
  uint64_t *dead;       // [kMaxChunks]
  Box *boxes;           // [n], corners ordered; best first, as the next two
  int32_t *groups;      // [n]
  int32_t *indices;     // [n]
  int32_t *kept_ranks;  // [n]
  size_t size;
};

SegmentWorkspace carve_segments(const odtrt_nms_params &params, void *memory) {
  char *next = static_cast<char *>(memory);
  const size_t n = static_cast<size_t>(params.num_boxes);
  SegmentWorkspace space{};
  space.counts = reinterpret_cast<Counts *>(carve(next, sizeof(Counts)));
  space.mask = reinterpret_cast<uint64_t *>(carve(next, sizeof(uint64_t) * kMaxCandidates * kMaxChunks));
  space.dead = reinterpret_cast<uint64_t *>(carve(next, sizeof(uint64_t) * kMaxChunks));
  space.boxes = reinterpret_cast<Box *>(carve(next, sizeof(Box) * n));
  space.groups = reinterpret_cast<int32_t *>(carve(next, sizeof(int32_t) * n));
  space.indices = reinterpret_cast<int32_t *>(carve(next, sizeof(int32_t) * n));
  space.kept_ranks = reinterpret_cast<int32_t *>(carve(next, sizeof(int32_t) * n));
  space.size = static_cast<size_t>(next - static_cast<char *>(memory));
  return space;
}

__global__ __launch_bounds__(kRankThreads) void rank_boxes(odtrt_nms_params params,
                                                           const float *__restrict__ boxes,
                                                           const float *__restrict__ scores,
                                                           const int32_t *__restrict__ classes,
                                                           SegmentWorkspace space) {
  __shared__ uint4 tile[kRankTile / 4];
  let_next_kernel_start();
  const int lane = lane_id(), n = params.num_boxes, thread = static_cast<int>(threadIdx.x);
  const int i = static_cast<int>(blockIdx.x) * kRanksPerBlock + warp_id();
  const uint32_t own = i < n ? strength_of(scores[i], params.score_threshold) : 0;
  int rank = 0, valid = 0;
  for (int start = 0; start < n; start += kRankTile) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRankTile / kRankThreads; ++k) {
      const int j = start + k * kRankThreads + thread;
      reinterpret_cast<uint32_t *>(tile)[k * kRankThreads + thread] =
          j < n ? strength_of(scores[j], params.score_threshold) : 0;
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
  rank = warp_sum_by_shuffles(rank);
  if (i == 0) valid = warp_sum_by_shuffles(valid);
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

__global__ __launch_bounds__(kMaskThreads) void build_segment_mask(odtrt_nms_params params,
                                                                   SegmentWorkspace space, int segment) {
  __shared__ Tile tile;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int start = segment * kMaxCandidates;
  compute_iou_mask(
      size_of_segment(*space.counts, segment, params.max_kept), params.iou_threshold, space.mask, &tile,
      [&](int i) { return Candidate{space.boxes[start + i], space.groups[start + i]}; }, [](int) {});
}

// Sets a bit in space.dead for each candidate of this segment that a kept box of an earlier segment suppresses.
__global__ __launch_bounds__(kMaskThreads) void suppress_by_earlier(odtrt_nms_params params,
                                                                    SegmentWorkspace space, int segment) {
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

__global__ __launch_bounds__(kSuppressThreads,
                             1) void suppress_segment(odtrt_nms_params params, SegmentWorkspace space,
                                                      int segment, bool is_last, int32_t *__restrict__ kept,
                                                      int32_t *__restrict__ num_kept) {
  extern __shared__ uint4 ring[];
  __shared__ Survivors survivors;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int before = space.counts->kept, thread = static_cast<int>(threadIdx.x);
  suppress_chunks(size_of_segment(*space.counts, segment, params.max_kept), space.mask,
                  segment == 0 ? nullptr : space.dead, params.max_kept - before,
                  reinterpret_cast<uint64_t *>(ring), survivors, [](int, uint64_t bits) { return bits; });
  visit_found(survivors, reinterpret_cast<uint16_t *>(ring), [&](int place, int candidate) {
    const int rank = segment * kMaxCandidates + candidate;
    kept[before + place] = __ldg(space.indices + rank);
    space.kept_ranks[before + place] = rank;
  });
  const int in_all = before + survivors.num_found;
  if (is_last) {
    for (int i = in_all + thread; i < params.max_kept; i += kSuppressThreads) kept[i] = -1;
    if (thread == 0) *num_kept = in_all;
  }
  __syncthreads();
  if (thread == 0) space.counts->kept = in_all;
}

}  // namespace
}  // namespace odtrt

using namespace odtrt;

size_t odtrt_nms_workspace(const odtrt_nms_params *params) {
  if (!is_valid(params)) return 0;
  const size_t in_segments = carve_segments(*params, nullptr).size;
  return params->num_boxes > kMaxPairwise ? in_segments
                                          : std::max(in_segments, carve_pairwise(*params, nullptr).size);
}

odtrt_status odtrt_nms_cuda(const odtrt_nms_params *params, const float *boxes, const float *scores,
                            const int32_t *classes, int32_t *kept, int32_t *num_kept, void *workspace,
                            size_t workspace_size, void *stream) {
  if (!is_valid(params) || !is_valid_nms_data(*params, boxes, scores, kept, num_kept) || workspace == nullptr) {
    return ODTRT_INVALID_ARGUMENT;
  }
  const SegmentWorkspace space = carve_segments(*params, workspace);
  if (workspace_size < odtrt_nms_workspace(params)) return ODTRT_WORKSPACE_TOO_SMALL;
  Device device{};
  cudaError_t error = current_device(&device);
  const auto on = static_cast<cudaStream_t>(stream);
  const bool overlapped = device.overlaps_launches;
  const int n = params->num_boxes;
  const PairwiseWorkspace pairwise = carve_pairwise(*params, workspace);
  const int shared_bytes =
      pairwise.words * 32 * static_cast<int>(sizeof(Box) + sizeof(float) + sizeof(uint32_t));
  if (error == cudaSuccess && n <= kMaxPairwise && shared_bytes <= device.max_shared_bytes) {
    error = launch(compare, dim3(max(1, (n + kRowsOfBlock - 1) / kRowsOfBlock)), kCompareThreads, shared_bytes,
                   on, false, *params, boxes, scores, classes, pairwise);
    if (error == cudaSuccess) {
      const auto kernel = n <= kChooseThreads ? choose<1> : n <= 2 * kChooseThreads ? choose<2> : choose<4>;
      error = launch(kernel, dim3(1), kChooseThreads, 0, on, overlapped, *params, pairwise, kept, num_kept);
    }
    return static_cast<odtrt_status>(error);
  }
  const int blocks = n == 0 ? 1 : (n + kRanksPerBlock - 1) / kRanksPerBlock;
  if (error == cudaSuccess) {
    error =
        launch(rank_boxes, dim3(blocks), kRankThreads, 0, on, false, *params, boxes, scores, classes, space);
  }
  const int segments = n <= kMaxCandidates ? 1 : (n + kMaxCandidates - 1) / kMaxCandidates;
  for (int segment = 0; segment < segments && error == cudaSuccess; ++segment) {
    if (segment > 0)
      error = launch(suppress_by_earlier, dim3(kMaxChunks), kMaskThreads, 0, on, overlapped, *params, space,
                     segment);
    const int in_segment = min(n - segment * kMaxCandidates, kMaxCandidates);
    const int chunks = (in_segment + kChunk - 1) / kChunk;
    const int tiles = max(1, min(chunks * (chunks + 1) / 2, device.multiprocessors * 8));
    if (error == cudaSuccess)
      error = launch(build_segment_mask, dim3(tiles), kMaskThreads, 0, on, overlapped, *params, space, segment);
    if (error == cudaSuccess) {
      error = launch(suppress_segment, dim3(1), kSuppressThreads, kRingBytes, on, overlapped, *params, space,
                     segment, segment + 1 == segments, kept, num_kept);
    }
  }
  return static_cast<odtrt_status>(error);
}

// odtrt_postprocess_cuda below compute capability 9.0: five kernels, each as wide as its work allows.
//
// clear     zeroes the histogram (the workspace comes uninitialised).
// grade     streams the logits once; each anchor's best score, and a histogram: of these, or, where there are few
//           pairs of an anchor and a class, of all pairs' scores.
// gather    finds in the histogram a score bound above which at least 2048 of them lie, and collects the pairs above.
// mark      puts the best pairs, at most 2560, in the final order, decodes their boxes only, and marks who overlaps
//           whom (suppression.cuh). Each block does the ordering for itself: that is quicker than to wait for one.
// keep      settles who stays, clips, and writes the detections.
//
// The bound never separates equal scores, so what lies above it is exactly the head of the final order. Where that
// head does not decide all (thousands of pairs suppressed before max_total_detections are found), `keep` goes on
// below the bound, batch by batch: nothing is ever truncated. Its other blocks only help with that. None of them is
// waited for before it has taken work, so the answer does not depend on how many of them run at the same time.
#pragma once

#include "postprocess.cuh"

namespace odtrt {
namespace {

constexpr int kGatherThreads = 512;
constexpr int kOrderThreads = 1024;  // of mark
constexpr int kBatchOfRest = 2048;
constexpr int kRowsOfTile = 64;
constexpr uint32_t kFinished = 0xffffffffu;

// ---- clear, grade -------------------------------------------------------------------------------------------------

__global__ __launch_bounds__(256) void clear(ODTRT_PARAMETER Call call) {
  let_next_kernel_start();
  const Workspace space = space_of(call, static_cast<int>(blockIdx.x));
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += 256) space.histogram[i] = 0;
  if (threadIdx.x < kMaxChunks) space.is_visible[threadIdx.x] = 0;
  if (threadIdx.x == 0) *space.progress = {};
}

// Each lane keeps the best of one anchor until there are 32: a score costs more than a comparison.
template <typename T, int kConverter>
__global__ __launch_bounds__(kGradeThreads, 5) void grade(ODTRT_PARAMETER Call call) {
  __shared__ uint32_t histogram[kBins];
  let_next_kernel_start();
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int n = params.num_anchors, columns = params.num_columns;
  const Workspace space = space_of(call, image);
  const T *__restrict__ logits =
      static_cast<const T *>(call.heads.class_logits) + static_cast<size_t>(image) * n * columns;
  const float none = float_of(0x7fc00000u);
  for (int i = thread; i < kBins / 4; i += kGradeThreads) reinterpret_cast<uint4 *>(histogram)[i] = {};
  __syncthreads();

  const int warps = static_cast<int>(gridDim.x) * (kGradeThreads / 32);
  const int first_warp = static_cast<int>(blockIdx.x) * (kGradeThreads / 32) + warp_id();
  auto put = [&](int anchor, float score) {
    const bool is_candidate = score > params.score_threshold;
    space.grades[anchor] = is_candidate ? ordered(score) : 0;
    if (is_candidate) atomicAdd(&histogram[bin_of(score)], 1u);
  };
  if (call.counts_pairs) {
    for (int anchor = first_warp; anchor < n; anchor += warps) {
      uint32_t best = 0;
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * columns, anchor,
                                 params.score_threshold, [&](bool is_candidate, uint64_t key) {
                                   if (!is_candidate) return;
                                   atomicAdd(&histogram[bin_of(score_of(key))], 1u);
                                   best = max(best, static_cast<uint32_t>(key >> 32));
                                 });
      best = warp_max(best);
      if (lane == 0) space.grades[anchor] = best;
    }
  } else if (kConverter == ODTRT_SOFTMAX) {
    for (int anchor = first_warp; anchor < n; anchor += warps) {
      const float best = best_of_softmax(params, logits + static_cast<size_t>(anchor) * columns);
      if (lane == 0) put(anchor, best);
    }
  } else {
    constexpr int kEach = kColumnsAtOnce / 32;
    const float lowest = float_of(0xff800000u);
    bool is_class[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      is_class[k] = 32 * k + lane >= params.background_column && 32 * k + lane < columns;
    float own = none;  // lane l has the best of the l-th anchor that was not put yet
    int filled = 0, own_anchor = n;
    for (int first = first_warp * kRowsAtOnce; first < n; first += warps * kRowsAtOnce) {
      const T *row = logits + static_cast<size_t>(first) * columns + lane;
      float values[kRowsAtOnce][kEach];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int k = 0; k < kEach; ++k) values[r][k] = is_class[k] ? to_float(row[32 * k]) : lowest;
        if (first + r + 1 < n) row += columns;  // the last anchor again, instead of none
      }
      float best[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        best[r] = lowest;  // fmaxf leaves NaN out
#pragma unroll
        for (int k = 0; k < kEach; ++k) best[r] = fmaxf(best[r], values[r][k]);
      }
      if (columns > kColumnsAtOnce) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const T *rest = logits + static_cast<size_t>(min(first + r, n - 1)) * columns;
          for (int c = kColumnsAtOnce + lane; c < columns; c += 32) best[r] = fmaxf(best[r], to_float(rest[c]));
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const float of_row = unordered(warp_max(ordered(best[r])));
        if (lane == filled + r) own = of_row, own_anchor = first + r;
      }
      filled += kRowsAtOnce;
      if (filled > 32 - kRowsAtOnce ||
          first + warps * kRowsAtOnce >= n) {  // a score costs more than a comparison
        if (lane < filled && own_anchor < n) {
          put(own_anchor, score_of_logit<kConverter>(mul(own, params.logit_factor)));
        }
        filled = 0;
      }
    }
  }
  __syncthreads();
  wait_for_previous_kernel();  // clear
  for (int i = thread; i < kBins; i += kGradeThreads) {
    if (histogram[i] != 0) atomicAdd(&space.histogram[i], histogram[i]);
  }
}

// ---- gather -------------------------------------------------------------------------------------------------------

// The sum of `value` over all threads of a lower number, and over all. Called by all kThreads threads.
template <int kThreads>
__device__ __forceinline__ uint32_t sum_before(uint32_t value, uint32_t *warp_totals, uint32_t *total) {
  const uint32_t sum = sum_to_lane(value);
  __syncthreads();
  if (lane_id() == 31) warp_totals[warp_id()] = sum;
  __syncthreads();
  if (warp_id() == 0) {
    const uint32_t all = sum_to_lane(lane_id() < kThreads / 32 ? warp_totals[lane_id()] : 0);
    warp_totals[lane_id()] = all;
  }
  __syncthreads();
  *total = warp_totals[31];
  return sum - value + (warp_id() == 0 ? 0 : warp_totals[warp_id() - 1]);
}

struct Bound {
  uint32_t warp_totals[32];
  int32_t bin;
  uint32_t with_it;
};

// The highest bin such that it and those above hold at least `enough`, or 0 where all together do not hold more;
// with_it: how many they hold. Called by all threads; count(bin) is asked once for each bin.
template <int kThreads, typename Count>
__device__ __forceinline__ void find_bound(uint32_t enough, Bound &shared, Count count) {
  constexpr int kEach = kBins / kThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint32_t counts[kEach], own = 0, total = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) own += counts[k] = count(top - k);
  uint32_t sum = sum_before<kThreads>(own, shared.warp_totals, &total);
  if (threadIdx.x == 0) {
    shared.bin = 0;
    shared.with_it = total;
  }
  __syncthreads();
  if (total > enough && sum < enough && sum + own >= enough) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (sum < enough && sum + counts[k] >= enough) {
        shared.bin = top - k;
        shared.with_it = sum + counts[k];
      }
      sum += counts[k];
    }
  }
  __syncthreads();
}

constexpr int kMaxStaged = 2048;

struct Gathering {
  uint64_t keys[kMaxStaged];
  int32_t rows[kGatherThreads];
  Bound bound;
  uint32_t base;
  int32_t size, num_rows;
};

template <typename T, int kConverter>
__global__ __launch_bounds__(kGatherThreads, 2) void gather(ODTRT_PARAMETER Call call) {
  __shared__ Gathering shared;
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const Workspace space = space_of(call, image);
  const T *logits = static_cast<const T *>(call.heads.class_logits) +
                    static_cast<size_t>(image) * params.num_anchors * params.num_columns;
  // Neighbouring anchors score alike: groups of 32 go round the blocks, so that no block gets a whole object.
  const int groups = (params.num_anchors + 31) / 32, blocks = static_cast<int>(gridDim.x);
  auto grade_of = [&](int anchor) { return anchor < params.num_anchors ? __ldcg(space.grades + anchor) : 0; };
  int group = static_cast<int>(blockIdx.x) + warp_id() * blocks;
  wait_for_previous_kernel();
  let_next_kernel_start();
  uint32_t grade = grade_of(group * 32 + lane_id());
  find_bound<kGatherThreads>(kEnough, shared.bound, [&](int bin) { return __ldcg(space.histogram + bin); });
  const int bound = shared.bound.bin;
  const float least = bound == 0 ? params.score_threshold : fmaxf(params.score_threshold, lowest_of_bin(bound));
  if (thread == 0) {
    shared.size = 0;
    if (blockIdx.x == 0) space.progress->bound = static_cast<uint32_t>(bound);
  }
  for (int start = static_cast<int>(blockIdx.x); start < groups; start += blocks * (kGatherThreads / 32)) {
    if (thread == 0) shared.num_rows = 0;
    __syncthreads();
    if (grade != 0 && bin_of(unordered(grade)) >= bound) {
      shared.rows[atomicAdd(&shared.num_rows, 1)] = group * 32 + lane_id();
    }
    group += blocks * (kGatherThreads / 32);
    grade = grade_of(group * 32 + lane_id());
    __syncthreads();
    const int rows = shared.num_rows;
    for (int r = warp_id(); r < rows; r += kGatherThreads / 32) {
      const int row = shared.rows[r];
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(row) * params.num_columns, row, least,
                                 [&](bool is_candidate, uint64_t key) {
                                   const bool is_in = is_candidate && bin_of(score_of(key)) >= bound;
                                   const unsigned vote = __ballot_sync(0xffffffffu, is_in);
                                   if (vote == 0) return;
                                   const int at = take_place(&shared.size, vote);
                                   if (!is_in) return;
                                   if (at < kMaxStaged) {
                                     shared.keys[at] = key;
                                   } else {
                                     const uint32_t place = atomicAdd(&space.progress->gathered, 1u);
                                     if (place < kMaxGathered) space.gathered[place] = key;
                                   }
                                 });
    }
    __syncthreads();
  }
  const int staged = min(shared.size, kMaxStaged);
  if (thread == 0 && staged > 0)
    shared.base = atomicAdd(&space.progress->gathered, static_cast<uint32_t>(staged));
  __syncthreads();
  for (int i = thread; i < staged; i += kGatherThreads) {
    if (shared.base + i < kMaxGathered) space.gathered[shared.base + i] = shared.keys[i];
  }
}

// ---- mark ---------------------------------------------------------------------------------------------------------

struct Ordering {
  uint64_t keys[kMaxCandidates];
  uint32_t counts[kBins];
  Bound bound;
  int32_t size;
  bool is_complete;
};

// The best of the gathered pairs in the final order, in shared.keys, and how many there are. Called by all
// kOrderThreads threads. A bucket for each narrow range of scores, then each key counts the greater ones of its
// bucket.
template <int kConverter>
__device__ __forceinline__ int put_in_order(const Workspace &space, Ordering &shared, float score_threshold) {
  constexpr int kEach = (kMaxCandidates + kOrderThreads - 1) / kOrderThreads;
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t gathered = __ldcg(&space.progress->gathered);
  int lowest_bin = static_cast<int>(__ldcg(&space.progress->bound));
  bool is_complete = lowest_bin == 0;
  if (thread == 0) {
    shared.is_complete = gathered == 0 && is_complete;
    shared.size = 0;
  }
  if (gathered == 0 || gathered > kMaxGathered) return 0;
  const auto gathered_keys = reinterpret_cast<const unsigned long long *>(space.gathered);
  uint64_t own[kEach];
  auto fetch = [&](uint32_t start) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const uint32_t i = start + thread + k * kOrderThreads;
      own[k] = i < gathered && start + k * kOrderThreads < gathered ? __ldcg(gathered_keys + i) : 0;
    }
  };
  for (int i = thread; i < kBins; i += kOrderThreads) shared.counts[i] = 0;
  int size = static_cast<int>(gathered);
  if (gathered <= kMaxCandidates) {
    fetch(0);
    __syncthreads();
  } else {
    __syncthreads();
    for (uint32_t start = 0; start < gathered; start += kEach * kOrderThreads) {
      fetch(start);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        if (own[k] != 0) atomicAdd(&shared.counts[bin_of(score_of(own[k]))], 1u);
      }
    }
    __syncthreads();
    find_bound<kOrderThreads>(kEnough, shared.bound, [&](int bin) { return shared.counts[bin]; });
    lowest_bin = shared.bound.bin + (shared.bound.with_it > kMaxCandidates ? 1 : 0);
    is_complete = false;
    for (int i = thread; i < kBins; i += kOrderThreads) shared.counts[i] = 0;
    for (uint32_t start = 0; start < gathered; start += kEach * kOrderThreads) {
      fetch(start);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const bool is_in = own[k] != 0 && bin_of(score_of(own[k])) >= lowest_bin;
        const unsigned vote = __ballot_sync(0xffffffffu, is_in);
        if (vote == 0) continue;
        const int at = take_place(&shared.size, vote);
        if (is_in) shared.keys[at] = own[k];
      }
    }
    __syncthreads();
    size = shared.size;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = thread + k * kOrderThreads;
      own[k] = i < size ? shared.keys[i] : 0;
    }
    __syncthreads();
  }
  // A higher score never has a higher bucket: every step rounds monotonically.
  const uint32_t top = ordered(kConverter == ODTRT_IDENTITY ? float_of(0x7f800000u) : 1.0f);
  const float lowest = lowest_bin > 0 ? fmaxf(lowest_of_bin(lowest_bin), score_threshold) : score_threshold;
  const float buckets_per_unit =
      static_cast<float>(kBins - 1) / static_cast<float>(top - min(top, ordered(lowest)) + 1);
  auto bucket_of = [&](uint64_t key) {
    const uint32_t below_top = top - min(top, static_cast<uint32_t>(key >> 32));
    return min(kBins - 1, static_cast<int>(static_cast<float>(below_top) * buckets_per_unit));
  };
  int buckets[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    buckets[k] = bucket_of(own[k]);
    if (own[k] != 0) atomicAdd(&shared.counts[buckets[k]], 1u);
  }
  __syncthreads();
  constexpr int kBucketsEach = kBins / kOrderThreads;
  uint32_t counts[kBucketsEach], sum = 0, total = 0;
#pragma unroll
  for (int k = 0; k < kBucketsEach; ++k) sum += counts[k] = shared.counts[thread * kBucketsEach + k];
  sum = sum_before<kOrderThreads>(sum, shared.bound.warp_totals, &total);
#pragma unroll
  for (int k = 0; k < kBucketsEach; ++k) {
    shared.counts[thread * kBucketsEach + k] = sum;
    sum += counts[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (own[k] != 0) shared.keys[atomicAdd(&shared.counts[buckets[k]], 1u)] = own[k];
  }
  __syncthreads();  // counts[b] is now where bucket b ends
  int ranks[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (own[k] == 0) continue;
    const int end = static_cast<int>(shared.counts[buckets[k]]);
    const int start = buckets[k] == 0 ? 0 : static_cast<int>(shared.counts[buckets[k] - 1]);
    ranks[k] = start;
    for (int j = start; j < end; ++j) ranks[k] += shared.keys[j] > own[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (own[k] != 0) shared.keys[ranks[k]] = own[k];
  }
  if (thread == 0) shared.is_complete = is_complete;
  __syncthreads();
  return size;
}

template <typename T, int kConverter>
__global__ __launch_bounds__(kOrderThreads, 1) void mark(ODTRT_PARAMETER Call call) {
  __shared__ Ordering shared;
  __shared__ Tile tiles[kOrderThreads / kMarkThreads];
  const int image = static_cast<int>(blockIdx.y);
  const Workspace space = space_of(call, image);
  const Box window = window_of(call, image);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int count = put_in_order<kConverter>(space, shared, call.params.score_threshold);
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kOrderThreads) space.keys[i] = shared.keys[i];
    if (threadIdx.x == 0) {
      space.progress->count = static_cast<uint32_t>(count);
      space.progress->is_complete = shared.is_complete;
    }
  }
  auto load = [&](int i) {
    const Pair pair = pair_of(call.params, shared.keys[i]);
    return Candidate{with_ordered_corners(box_of<T>(call, image, pair.anchor)), group_of(call.params, pair)};
  };
  auto on_row = [&](int i) {
    const uint64_t key = shared.keys[i];
    const Box box = box_of<T>(call, image, pair_of(call.params, key).anchor);
    if (is_visible(box, window, score_of(key))) {
      atomicOr(reinterpret_cast<unsigned long long *>(space.is_visible) + i / kChunk, 1ull << (i % kChunk));
    }
  };
  mark_overlaps(count, call.params.iou_threshold, space.mask, tiles, load, on_row);
}

// ---- keep ---------------------------------------------------------------------------------------------------------

struct Rest {
  Workspace space;
  uint64_t keys[kBatchOfRest];
  float4 boxes[kBatchOfRest];  // corners ordered
  uint32_t counts[kBins];
  uint64_t low, high, cursor;
  uint32_t tile, is_counting, shift, size;
  int32_t first, num_kept, num_found, group_is_full;
  Box box;
  int32_t group;
};

static_assert(sizeof(Rest) <= kRingBytes, "they take turns in the same shared memory");

// Is this pair below the bound still in the running: not suppressed, its group not full? What was kept is read from
// the level 2 cache, since another block writes it.
template <typename T>
__device__ bool is_alive(const Call &call, const Workspace &space, int image, uint64_t key) {
  const Pair pair = pair_of(call.params, key);
  const int group = group_of(call.params, pair);
  if (__ldcg(space.group_size + group) >= static_cast<uint32_t>(call.cap)) return false;
  int at = __ldcg(space.group_first + group);
  if (at < 0) return true;
  const Box box = with_ordered_corners(box_of<T>(call, image, pair.anchor));
  const float area = signed_area(box);
  for (; at >= 0; at = __ldcg(space.kept_next + at)) {
    const float4 corners = __ldcg(reinterpret_cast<const float4 *>(space.kept_boxes) + at);
    const Box kept{corners.x, corners.y, corners.z, corners.w};
    if (suppresses(kept, signed_area(kept), box, area, call.params.iou_threshold)) return false;
  }
  return true;
}

// Takes tiles of anchors while there are any, and counts or collects their pairs as the first block asks. Called by
// all threads of a block of `keep`; rest.space is set, rest.counts is zero before and after.
template <typename T, int kConverter>
__device__ __noinline__ void work_through_tiles(const Call &call, int image, Rest &rest) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = rest.space;
  const T *logits = static_cast<const T *>(call.heads.class_logits) +
                    static_cast<size_t>(image) * params.num_anchors * params.num_columns;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) {
      rest.tile = atomicAdd(&space.progress->next_tile, 1u);
      __threadfence();  // what is asked was written before next_tile was
      rest.low = __ldcg(reinterpret_cast<const unsigned long long *>(&space.progress->low));
      rest.high = __ldcg(reinterpret_cast<const unsigned long long *>(&space.progress->high));
      rest.is_counting = __ldcg(&space.progress->is_counting);
      rest.shift = __ldcg(&space.progress->shift);
    }
    __syncthreads();
    const int64_t start = static_cast<int64_t>(rest.tile) * kRowsOfTile;
    if (start >= params.num_anchors) return;
    const int end = min(params.num_anchors, static_cast<int>(start) + kRowsOfTile);
    for (int anchor = static_cast<int>(start) + warp_id(); anchor < end; anchor += kKeepThreads / 32) {
      if (space.grades[anchor] == 0 || space.grades[anchor] < rest.low >> 32) continue;
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * params.num_columns, anchor,
                                 score_of(rest.low), [&](bool is_candidate, uint64_t key) {
                                   if (!is_candidate || key < rest.low || key > rest.high) return;
                                   if (!is_alive<T>(call, space, image, key)) return;
                                   if (rest.is_counting) {
                                     atomicAdd(&rest.counts[(key - rest.low) >> rest.shift], 1u);
                                   } else {
                                     space.gathered[atomicAdd(&space.progress->gathered, 1u)] = key;
                                   }
                                 });
    }
    __syncthreads();
    if (rest.is_counting) {
      for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kKeepThreads) {
        if (rest.counts[i] != 0) atomicAdd(&space.histogram[i], rest.counts[i]);
        rest.counts[i] = 0;
      }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(&space.progress->tiles_done, 1u);
  }
}

// The other blocks of `keep`: wait until there is work, or none.
template <typename T, int kConverter>
__device__ __noinline__ void help(const Call &call, int image, Rest &rest) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) rest.space = space_of(call, image);
  for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = 0;
  uint32_t known = 0;
  for (;;) {
    __syncthreads();
    if (thread == 0) {
      const volatile uint32_t *round = &rest.space.progress->round;
      while (*round == known) __nanosleep(100);
      rest.first = static_cast<int32_t>(*round);
      __threadfence();
    }
    __syncthreads();
    known = static_cast<uint32_t>(rest.first);
    if (known == kFinished) return;
    work_through_tiles<T, kConverter>(call, image, rest);
  }
}

// The first block: has all blocks count or collect the pairs from `low` to `high`, and waits for the tiles, not for
// the blocks.
template <typename T, int kConverter>
__device__ __noinline__ void ask_all(const Call &call, int image, Rest &rest, bool is_counting, uint64_t low,
                                     uint64_t high, int shift) {
  const int thread = static_cast<int>(threadIdx.x);
  Progress &progress = *rest.space.progress;
  if (is_counting) {
    for (int i = thread; i < kBins; i += kKeepThreads) rest.space.histogram[i] = 0;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    progress.low = low;
    progress.high = high;
    progress.shift = static_cast<uint32_t>(shift);
    progress.is_counting = is_counting;
    progress.gathered = 0;
    progress.tiles_done = 0;
    __threadfence();
    atomicExch(&progress.next_tile, 0u);
    __threadfence();
    atomicAdd(&progress.round, 1u);
  }
  work_through_tiles<T, kConverter>(call, image, rest);
  if (thread == 0) {
    const uint32_t tiles = static_cast<uint32_t>((call.params.num_anchors + kRowsOfTile - 1) / kRowsOfTile);
    const volatile uint32_t *tiles_done = &progress.tiles_done;
    while (*tiles_done < tiles) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// Puts the batch in order, keeps the best that is still in the running, and again, until none is. Called by all
// threads of the first block.
template <typename T>
__device__ __noinline__ void settle_batch(const Call &call, int image, Rest &rest, int size) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = rest.space;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kBatchOfRest; i += kKeepThreads) {
    rest.keys[i] = i < size ? __ldcg(reinterpret_cast<const unsigned long long *>(space.gathered) + i) : 0;
  }
  __syncthreads();
  for (int width = 2; width <= kBatchOfRest; width <<= 1) {  // bitonic, descending
    for (int stride = width >> 1; stride > 0; stride >>= 1) {
      for (int i = thread; i < kBatchOfRest / 2; i += kKeepThreads) {
        const int a = 2 * i - (i & (stride - 1)), b = a + stride;
        const uint64_t first = rest.keys[a], second = rest.keys[b];
        if ((first < second) == ((a & width) == 0)) rest.keys[a] = second, rest.keys[b] = first;
      }
      __syncthreads();
    }
  }
  constexpr int kEach = (kBatchOfRest + kKeepThreads - 1) / kKeepThreads;
  int32_t groups[kEach];
  bool runs[kEach], visible[kEach];
  const Box window = window_of(call, image);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = thread + k * kKeepThreads;
    runs[k] = i < size;
    if (!runs[k]) continue;
    const uint64_t key = rest.keys[i];
    const Pair pair = pair_of(params, key);
    const Box box = box_of<T>(call, image, pair.anchor), ordered_box = with_ordered_corners(box);
    groups[k] = group_of(params, pair);
    visible[k] = is_visible(box, window, score_of(key));
    rest.boxes[i] = make_float4(ordered_box.ymin, ordered_box.xmin, ordered_box.ymax, ordered_box.xmax);
  }
  const int found_before = rest.num_found;
  for (;;) {
    const bool is_enough = rest.num_found >= params.max_total_detections;
    if (thread == 0) rest.first = kBatchOfRest;
    __syncthreads();
    int first = kBatchOfRest;
#pragma unroll
    for (int k = kEach - 1; k >= 0; --k) first = runs[k] ? thread + k * kKeepThreads : first;
    first = static_cast<int>(~warp_max(~static_cast<uint32_t>(first)));
    if (lane_id() == 0 && first < kBatchOfRest) atomicMin(&rest.first, first);
    __syncthreads();
    const int best = rest.first;
    if (best == kBatchOfRest || is_enough) break;
    const float4 corners = rest.boxes[best];
    const Box kept{corners.x, corners.y, corners.z, corners.w};
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (thread + k * kKeepThreads != best) continue;
      runs[k] = false;
      const uint32_t held = space.group_size[groups[k]];
      rest.group = groups[k];
      rest.group_is_full = held >= static_cast<uint32_t>(call.cap);
      if (!rest.group_is_full) {
        space.kept_boxes[rest.num_kept] = kept;
        space.kept_next[rest.num_kept] = space.group_first[groups[k]];
        space.group_first[groups[k]] = rest.num_kept++;
        space.group_size[groups[k]] = held + 1;
        if (visible[k]) rest.counts[rest.num_found++ - found_before] = static_cast<uint32_t>(best);
      }
    }
    __syncthreads();
    const float kept_area = signed_area(kept);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!runs[k] || groups[k] != rest.group) continue;
      const float4 other = rest.boxes[thread + k * kKeepThreads];
      const Box box{other.x, other.y, other.z, other.w};
      runs[k] =
          !rest.group_is_full && !suppresses(kept, kept_area, box, signed_area(box), params.iou_threshold);
    }
  }
  for (int m = found_before + thread; m < rest.num_found; m += kKeepThreads) {
    const uint64_t key = rest.keys[rest.counts[m - found_before]];
    const Pair pair = pair_of(params, key);
    write_detection(call, image, m, box_of<T>(call, image, pair.anchor), window, key, pair);
  }
  __syncthreads();
  for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = 0;
  __syncthreads();
}

// What the head of the order did not decide, in batches of pairs that are still in the running. Called by all
// threads of the first block; returns the number of detections.
template <typename T, int kConverter>
__device__ __noinline__ int keep_among_rest(const Call &call, int image, const Survivors &survivors,
                                            Rest &rest) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = rest.space;
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread == 0) rest.space = space_of(call, image);
  for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = 0;
  __syncthreads();
  for (int i = thread; i < call.num_groups; i += kKeepThreads) {
    space.group_first[i] = -1;
    space.group_size[i] = 0;
  }
  const int count = static_cast<int>(space.progress->count);
  if (thread == 0) {
    rest.num_kept = 0;
    rest.num_found = survivors.num_found;
    const uint64_t above_all = kConverter == ODTRT_IDENTITY ? ~0ull : (ordered(1.0f) + 1ull) << 32;
    rest.cursor = count > 0 ? space.keys[count - 1] : above_all;
  }
  __syncthreads();
  for (int i = thread; i < count; i += kKeepThreads) {
    if (!(survivors.kept[i / kChunk] >> (i % kChunk) & 1)) continue;
    const Pair pair = pair_of(params, space.keys[i]);
    const int at = atomicAdd(&rest.num_kept, 1);
    space.kept_boxes[at] = with_ordered_corners(box_of<T>(call, image, pair.anchor));
    space.kept_next[at] = atomicExch(&space.group_first[group_of(params, pair)], at);
    atomicAdd(&space.group_size[group_of(params, pair)], 1u);
  }
  __syncthreads();

  const uint64_t least = static_cast<uint64_t>(ordered(params.score_threshold)) << 32;
  int octaves = 2;  // how far down to look at once
  for (;;) {
    const uint64_t cursor = rest.cursor;  // what comes before it is decided
    const int found = rest.num_found;
    __syncthreads();
    if (found >= params.max_total_detections || cursor <= least) break;
    const uint64_t reach = static_cast<uint64_t>(octaves) << (23 + 32);
    const uint64_t lowest = cursor - least > reach ? cursor - reach : least;
    uint64_t low = lowest, high = cursor - 1;
    for (;;) {  // narrow low to high down until the pairs from low to the cursor are a batch
      const int shift = shift_for(high - low, 11);
      ask_all<T, kConverter>(call, image, rest, true, low, high, shift);
      for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = __ldcg(space.histogram + i);
      __syncthreads();
      if (thread == 0) {
        uint32_t sum = 0;
        int bin = kBins - 1;
        while (bin >= 0 && sum + rest.counts[bin] <= kBatchOfRest) sum += rest.counts[bin--];
        rest.size = sum;
        rest.first = bin;
      }
      __syncthreads();
      const int bin = rest.first;
      const bool is_narrow = bin < 0 || rest.size > 0;
      __syncthreads();
      for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = 0;
      if (is_narrow) {
        low += bin < 0 ? 0 : static_cast<uint64_t>(bin + 1) << shift;
        break;
      }
      low += static_cast<uint64_t>(bin) << shift;
      high = low + min(high - low, static_cast<uint64_t>((1ull << shift) - 1));
    }
    const int size = static_cast<int>(rest.size);
    if (size > 0) {
      ask_all<T, kConverter>(call, image, rest, false, low, cursor - 1, 0);
      settle_batch<T>(call, image, rest, size);
    } else {
      octaves = min(4 * octaves, 256);  // there are 512
    }
    if (thread == 0) rest.cursor = low;
    __syncthreads();
  }
  return rest.num_found;
}

template <typename T, int kConverter>
__global__ __launch_bounds__(kKeepThreads, 1) void keep(ODTRT_PARAMETER Call call) {
  extern __shared__ uint4 ring_or_rest[];
  __shared__ Survivors survivors;
  __shared__ uint64_t visible[kMaxChunks];
  Rest &rest = *reinterpret_cast<Rest *>(ring_or_rest);
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const Workspace space = space_of(call, image);
  const Box window = window_of(call, image);
  wait_for_previous_kernel();
  if (blockIdx.x > 0) {
    help<T, kConverter>(call, image, rest);
    return;
  }
  const int count = static_cast<int>(space.progress->count);
  if (thread < kMaxChunks) visible[thread] = space.is_visible[thread];
  __syncthreads();
  int num_kept = 0, counted_chunks = 0;
  // A group may hold max_detections_per_class; that cannot matter before so many are kept in all.
  auto within_cap = [&](int chunk, uint64_t bits) -> uint64_t {
    num_kept += __popcll(bits);
    if (num_kept <= call.cap) return bits;
    if (counted_chunks == 0) {
      for (int i = lane; i < call.num_groups; i += 32) space.group_size[i] = 0;
      __syncwarp();
    }
    uint64_t within = 0;
    for (; counted_chunks <= chunk; ++counted_chunks) {
      const uint64_t kept = survivors.kept[counted_chunks];
      within = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int b = lane + 32 * half;
        const bool is_kept = kept >> b & 1;
        const Pair pair = is_kept ? pair_of(params, space.keys[counted_chunks * kChunk + b]) : Pair{0, 0};
        const int group = is_kept ? group_of(params, pair) : -1;
        const unsigned peers = __match_any_sync(0xffffffffu, group);
        const uint32_t before = is_kept ? space.group_size[group] : 0;
        __syncwarp();
        const bool fits =
            is_kept && before + __popc(peers & ((1u << lane) - 1)) < static_cast<uint32_t>(call.cap);
        if (is_kept && (peers & ((1u << lane) - 1)) == 0) space.group_size[group] = before + __popc(peers);
        __syncwarp();
        within |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, fits)) << (32 * half);
      }
    }
    return within;
  };
  keep_survivors(count, space.mask, nullptr, params.max_total_detections,
                 reinterpret_cast<uint64_t *>(ring_or_rest), survivors,
                 [&](int chunk, uint64_t bits) { return within_cap(chunk, bits) & visible[chunk]; });
  int num_found = survivors.num_found;
  const bool is_decided = num_found == params.max_total_detections || space.progress->is_complete;
  if (thread == 0 && is_decided) atomicExch(&space.progress->round, kFinished);
  visit_found(survivors, reinterpret_cast<uint16_t *>(ring_or_rest), [&](int place, int candidate) {
    const uint64_t key = space.keys[candidate];
    const Pair pair = pair_of(params, key);
    write_detection(call, image, place, box_of<T>(call, image, pair.anchor), window, key, pair);
  });
  if (!is_decided) {
    num_found = keep_among_rest<T, kConverter>(call, image, survivors, rest);
    if (thread == 0) atomicExch(&space.progress->round, kFinished);
  }
  for (int m = num_found + thread; m < params.max_total_detections; m += kKeepThreads) {
    const size_t at = static_cast<size_t>(image) * params.max_total_detections + m;
    reinterpret_cast<float4 *>(call.out.boxes)[at] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    call.out.scores[at] = 0.0f;
    call.out.classes[at] = 0;
    if (call.out.anchors != nullptr) call.out.anchors[at] = 0;
  }
  if (thread == 0) call.out.num_detections[image] = num_found;
}

}  // namespace
}  // namespace odtrt

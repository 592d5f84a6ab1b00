// odtrt_postprocess_cuda for GPUs below compute capability 9.0, from sm_75 on, which have no clusters. Five kernels,
// each with as many blocks as its work allows:
//
// clear               zeroes the histogram, because the workspace is not initialised.
// anchor_best_score   reads the logits once. It writes each anchor's best score, and a histogram of these; if there
//                     are few pairs of an anchor and a class, the histogram is of all pairs' scores.
// compact_above       finds in the histogram a bound that at least 2048 scores reach, and collects the pairs that do.
// build_iou_mask      sorts the best pairs, at most 2560, into the final order, decodes their boxes, and computes
//                     which boxes are rivals (suppression.cuh). Each block sorts for itself, which is quicker than to
//                     wait for one block's result.
// suppress            decides which pairs are kept, clips their boxes, and writes the detections.
//
// The bound never separates equal scores, so the pairs above it are exactly the head of the final order. If the head
// is not enough (thousands of pairs are suppressed before max_total_detections are found), `suppress` goes on below
// the bound, batch by batch, so that nothing is truncated. Its other blocks only help with that. The first block
// waits for work that a block has taken, never for a block, so the answer does not depend on how many blocks run at
// the same time.
//
// ptxas gives registers to the functions that are not inlined in the order of their mangled names. A new name can
// change the machine code of `suppress`.
#pragma once

#include "postprocess.cuh"

namespace odtrt {
namespace {

constexpr int kCompactThreads = 512;
constexpr int kSortThreads = 1024;  // of build_iou_mask
constexpr int kBatchBelowBound = 2048;
constexpr int kAnchorsPerTile = 64;
constexpr uint32_t kFinished = 0xffffffffu;

// ---- clear, anchor_best_score -------------------------------------------------------------------------------------

__global__ __launch_bounds__(256) void clear(ODTRT_PARAMETER Call call) {
  let_next_kernel_start();
  const Workspace space = workspace_of(call, static_cast<int>(blockIdx.x));
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += 256) space.histogram[i] = 0;
  if (threadIdx.x < kMaxChunks) space.is_visible[threadIdx.x] = 0;
  if (threadIdx.x == 0) *space.progress = {};
}

// Scores cost more than comparisons. So a warp compares logits until each lane has the best logit of an anchor, and
// then computes 32 scores at a time.
template <typename T, int kConverter>
__global__ __launch_bounds__(kScoreThreads, 5) void anchor_best_score(ODTRT_PARAMETER Call call) {
  __shared__ uint32_t histogram[kBins];
  let_next_kernel_start();
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int n = params.num_anchors, columns = params.num_columns;
  const Workspace space = workspace_of(call, image);
  const T *__restrict__ logits =
      static_cast<const T *>(call.heads.class_logits) + static_cast<size_t>(image) * n * columns;
  const float none = float_of(0x7fc00000u);
  for (int i = thread; i < kBins / 4; i += kScoreThreads) reinterpret_cast<uint4 *>(histogram)[i] = {};
  __syncthreads();

  const int warps = static_cast<int>(gridDim.x) * (kScoreThreads / 32);
  const int first_warp = static_cast<int>(blockIdx.x) * (kScoreThreads / 32) + warp_id();
  auto put = [&](int anchor, float score) {
    const bool is_candidate = score > params.score_threshold;
    space.best_scores[anchor] = is_candidate ? ordered(score) : 0;
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
      if (lane == 0) space.best_scores[anchor] = best;
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
    float own = none;  // lane l has the best logit of the l-th anchor whose score is not stored yet
    int filled = 0, own_anchor = n;
    for (int first = first_warp * kRowsAtOnce; first < n; first += warps * kRowsAtOnce) {
      const T *row = logits + static_cast<size_t>(first) * columns + lane;
      float values[kRowsAtOnce][kEach];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int k = 0; k < kEach; ++k) values[r][k] = is_class[k] ? to_float(row[32 * k]) : lowest;
        if (first + r + 1 < n) row += columns;  // past the last anchor, it is read again
      }
      float best[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        best[r] = lowest;  // fmaxf ignores NaN
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
      if (filled > 32 - kRowsAtOnce || first + warps * kRowsAtOnce >= n) {
        if (lane < filled && own_anchor < n) {
          put(own_anchor, score_of_logit<kConverter>(mul(own, params.logit_factor)));
        }
        filled = 0;
      }
    }
  }
  __syncthreads();
  wait_for_previous_kernel();  // `clear` zeroes space.histogram
  for (int i = thread; i < kBins; i += kScoreThreads) {
    if (histogram[i] != 0) atomicAdd(&space.histogram[i], histogram[i]);
  }
}

// ---- compact_above ------------------------------------------------------------------------------------------------

// What select_bound uses and returns.
struct BoundShared {
  uint32_t warp_totals[32];
  int32_t bin;
  uint32_t with_it;
};

// A histogram select. Sets shared.bin to the highest bin such that it and all above hold at least `enough`, or to 0
// if all bins together do not hold more than that; sets shared.with_it to how many these hold. All threads call this;
// count(bin) is called once for each bin.
template <int kThreads, typename Count>
__device__ __forceinline__ void select_bound(uint32_t enough, BoundShared &shared, Count count) {
  constexpr int kEach = kBins / kThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint32_t counts[kEach], own = 0, total = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) own += counts[k] = count(top - k);
  uint32_t sum = block_exclusive_scan<kThreads>(own, shared.warp_totals, &total);
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

struct CompactShared {
  uint64_t keys[kMaxStaged];
  int32_t rows[kCompactThreads];
  BoundShared bound;
  uint32_t base;
  int32_t size, num_rows;
};

template <typename T, int kConverter>
__global__ __launch_bounds__(kCompactThreads, 2) void compact_above(ODTRT_PARAMETER Call call) {
  __shared__ CompactShared shared;
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const Workspace space = workspace_of(call, image);
  const T *logits = logits_of<T>(call, image);
  // Neighbouring anchors score alike: groups of 32 are dealt out to the blocks, so that no block gets a whole object.
  const int groups = (params.num_anchors + 31) / 32, blocks = static_cast<int>(gridDim.x);
  auto best_score_of = [&](int anchor) {
    return anchor < params.num_anchors ? __ldcg(space.best_scores + anchor) : 0;
  };
  int group = static_cast<int>(blockIdx.x) + warp_id() * blocks;
  wait_for_previous_kernel();
  let_next_kernel_start();
  uint32_t best_score = best_score_of(group * 32 + lane_id());
  select_bound<kCompactThreads>(kTargetPairs, shared.bound,
                                [&](int bin) { return __ldcg(space.histogram + bin); });
  const int bound = shared.bound.bin;
  const float min_score =
      bound == 0 ? params.score_threshold : fmaxf(params.score_threshold, lowest_of_bin(bound));
  if (thread == 0) {
    shared.size = 0;
    if (blockIdx.x == 0) space.progress->bound = static_cast<uint32_t>(bound);
  }
  for (int start = static_cast<int>(blockIdx.x); start < groups; start += blocks * (kCompactThreads / 32)) {
    if (thread == 0) shared.num_rows = 0;
    __syncthreads();
    if (best_score != 0 && bin_of(unordered(best_score)) >= bound) {
      shared.rows[atomicAdd(&shared.num_rows, 1)] = group * 32 + lane_id();
    }
    group += blocks * (kCompactThreads / 32);
    best_score = best_score_of(group * 32 + lane_id());
    __syncthreads();
    const int rows = shared.num_rows;
    for (int r = warp_id(); r < rows; r += kCompactThreads / 32) {
      const int row = shared.rows[r];
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(row) * params.num_columns, row, min_score,
                                 [&](bool is_candidate, uint64_t key) {
                                   const bool is_in = is_candidate && bin_of(score_of(key)) >= bound;
                                   const unsigned vote = __ballot_sync(0xffffffffu, is_in);
                                   if (vote == 0) return;
                                   const int at = reserve_places(&shared.size, vote);
                                   if (!is_in) return;
                                   if (at < kMaxStaged) {
                                     shared.keys[at] = key;
                                   } else {
                                     const uint32_t place = atomicAdd(&space.progress->num_collected, 1u);
                                     if (place < kMaxCollected) space.collected[place] = key;
                                   }
                                 });
    }
    __syncthreads();
  }
  const int staged = min(shared.size, kMaxStaged);
  if (thread == 0 && staged > 0)
    shared.base = atomicAdd(&space.progress->num_collected, static_cast<uint32_t>(staged));
  __syncthreads();
  for (int i = thread; i < staged; i += kCompactThreads) {
    if (shared.base + i < kMaxCollected) space.collected[shared.base + i] = shared.keys[i];
  }
}

// ---- build_iou_mask -----------------------------------------------------------------------------------------------

struct SortShared {
  uint64_t keys[kMaxCandidates];
  uint32_t counts[kBins];
  BoundShared bound;
  int32_t size;
  bool is_complete;
};

// Writes the best of the collected pairs to shared.keys, in the final order, and returns how many there are. A bucket
// sort by score; then each key counts the greater keys of its bucket. All kSortThreads threads call this.
template <int kConverter>
__device__ __forceinline__ int sort_candidates(const Workspace &space, SortShared &shared,
                                               float score_threshold) {
  constexpr int kEach = (kMaxCandidates + kSortThreads - 1) / kSortThreads;
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t num_collected = __ldcg(&space.progress->num_collected);
  int lowest_bin = static_cast<int>(__ldcg(&space.progress->bound));
  bool is_complete = lowest_bin == 0;
  if (thread == 0) {
    shared.is_complete = num_collected == 0 && is_complete;
    shared.size = 0;
  }
  if (num_collected == 0 || num_collected > kMaxCollected) return 0;
  const auto collected_keys = reinterpret_cast<const unsigned long long *>(space.collected);
  uint64_t own[kEach];
  auto fetch = [&](uint32_t start) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const uint32_t i = start + thread + k * kSortThreads;
      own[k] = i < num_collected && start + k * kSortThreads < num_collected ? __ldcg(collected_keys + i) : 0;
    }
  };
  for (int i = thread; i < kBins; i += kSortThreads) shared.counts[i] = 0;
  int size = static_cast<int>(num_collected);
  if (num_collected <= kMaxCandidates) {
    fetch(0);
    __syncthreads();
  } else {
    __syncthreads();
    for (uint32_t start = 0; start < num_collected; start += kEach * kSortThreads) {
      fetch(start);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        if (own[k] != 0) atomicAdd(&shared.counts[bin_of(score_of(own[k]))], 1u);
      }
    }
    __syncthreads();
    select_bound<kSortThreads>(kTargetPairs, shared.bound, [&](int bin) { return shared.counts[bin]; });
    lowest_bin = shared.bound.bin + (shared.bound.with_it > kMaxCandidates ? 1 : 0);
    is_complete = false;
    for (int i = thread; i < kBins; i += kSortThreads) shared.counts[i] = 0;
    for (uint32_t start = 0; start < num_collected; start += kEach * kSortThreads) {
      fetch(start);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const bool is_in = own[k] != 0 && bin_of(score_of(own[k])) >= lowest_bin;
        const unsigned vote = __ballot_sync(0xffffffffu, is_in);
        if (vote == 0) continue;
        const int at = reserve_places(&shared.size, vote);
        if (is_in) shared.keys[at] = own[k];
      }
    }
    __syncthreads();
    size = shared.size;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = thread + k * kSortThreads;
      own[k] = i < size ? shared.keys[i] : 0;
    }
    __syncthreads();
  }
  // A higher score never has a higher bucket, because every step rounds monotonically.
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
  constexpr int kBucketsEach = kBins / kSortThreads;
  uint32_t counts[kBucketsEach], sum = 0, total = 0;
#pragma unroll
  for (int k = 0; k < kBucketsEach; ++k) sum += counts[k] = shared.counts[thread * kBucketsEach + k];
  sum = block_exclusive_scan<kSortThreads>(sum, shared.bound.warp_totals, &total);
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
__global__ __launch_bounds__(kSortThreads, 1) void build_iou_mask(ODTRT_PARAMETER Call call) {
  __shared__ SortShared shared;
  __shared__ Tile tiles[kSortThreads / kMaskThreads];
  const int image = static_cast<int>(blockIdx.y);
  const Workspace space = workspace_of(call, image);
  const Box window = window_of(call, image);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int count = sort_candidates<kConverter>(space, shared, call.params.score_threshold);
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kSortThreads) space.keys[i] = shared.keys[i];
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
  compute_iou_mask(count, call.params.iou_threshold, space.mask, tiles, load, on_row);
}

// ---- suppress -----------------------------------------------------------------------------------------------------

// Shared memory for pairs below the bound.
struct BelowBound {
  Workspace space;
  uint64_t keys[kBatchBelowBound];
  float4 boxes[kBatchBelowBound];  // corners ordered
  uint32_t counts[kBins];      // a histogram of keys; suppress_sorted: indices of the detections in the batch
  uint64_t low, high, cursor;  // the request; all pairs with keys from the cursor up are decided
  uint32_t tile, is_counting, shift, size;
  int32_t first, num_kept, num_found, group_is_full;
  Box box;
  int32_t group;
};

static_assert(sizeof(BelowBound) <= kRingBytes, "both use the same shared memory, one after the other");

// Takes tiles of anchors until none is left, and counts or collects their undecided pairs, as the first block asks. All
// threads of a block of `suppress` call this. below.space is set; below.counts is zero before and after.
template <typename T, int kConverter>
__device__ __noinline__ void count_or_collect_tiles(const Call &call, int image, BelowBound &below) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = below.space;
  const T *logits = static_cast<const T *>(call.heads.class_logits) +
                    static_cast<size_t>(image) * params.num_anchors * params.num_columns;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) {
      below.tile = atomicAdd(&space.progress->next_tile, 1u);
      __threadfence();  // the first block wrote its request before it reset next_tile
      below.low = __ldcg(reinterpret_cast<const unsigned long long *>(&space.progress->low));
      below.high = __ldcg(reinterpret_cast<const unsigned long long *>(&space.progress->high));
      below.is_counting = __ldcg(&space.progress->is_counting);
      below.shift = __ldcg(&space.progress->shift);
    }
    __syncthreads();
    const int64_t start = static_cast<int64_t>(below.tile) * kAnchorsPerTile;
    if (start >= params.num_anchors) return;
    const int end = min(params.num_anchors, static_cast<int>(start) + kAnchorsPerTile);
    for (int anchor = static_cast<int>(start) + warp_id(); anchor < end; anchor += kSuppressThreads / 32) {
      if (space.best_scores[anchor] == 0 || space.best_scores[anchor] < below.low >> 32) continue;
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * params.num_columns, anchor,
                                 score_of(below.low), [&](bool is_candidate, uint64_t key) {
                                   if (!is_candidate || key < below.low || key > below.high) return;
                                   if (!is_pair_undecided<T>(call, space, image, key, true)) return;
                                   if (below.is_counting) {
                                     atomicAdd(&below.counts[(key - below.low) >> below.shift], 1u);
                                   } else {
                                     space.collected[atomicAdd(&space.progress->num_collected, 1u)] = key;
                                   }
                                 });
    }
    __syncthreads();
    if (below.is_counting) {
      for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSuppressThreads) {
        if (below.counts[i] != 0) atomicAdd(&space.histogram[i], below.counts[i]);
        below.counts[i] = 0;
      }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(&space.progress->tiles_done, 1u);
  }
}

// Runs in the other blocks of `suppress`: waits for requests of the first block until it sets kFinished.
template <typename T, int kConverter>
__device__ __noinline__ void serve_requests_of_first_block(const Call &call, int image, BelowBound &below) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) below.space = workspace_of(call, image);
  for (int i = thread; i < kBins; i += kSuppressThreads) below.counts[i] = 0;
  uint32_t known = 0;
  for (;;) {
    __syncthreads();
    if (thread == 0) {
      const volatile uint32_t *round = &below.space.progress->round;
      while (*round == known) __nanosleep(100);
      below.first = static_cast<int32_t>(*round);
      __threadfence();
    }
    __syncthreads();
    known = static_cast<uint32_t>(below.first);
    if (known == kFinished) return;
    count_or_collect_tiles<T, kConverter>(call, image, below);
  }
}

// Runs in the first block: has all blocks count or collect the undecided pairs with keys from `low` to `high`. It
// waits until all tiles are done, not until all blocks are.
template <typename T, int kConverter>
__device__ __noinline__ void scan_all(const Call &call, int image, BelowBound &below, bool is_counting,
                                      uint64_t low, uint64_t high, int shift) {
  const int thread = static_cast<int>(threadIdx.x);
  Progress &progress = *below.space.progress;
  if (is_counting) {
    for (int i = thread; i < kBins; i += kSuppressThreads) below.space.histogram[i] = 0;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    progress.low = low;
    progress.high = high;
    progress.shift = static_cast<uint32_t>(shift);
    progress.is_counting = is_counting;
    progress.num_collected = 0;
    progress.tiles_done = 0;
    __threadfence();
    atomicExch(&progress.next_tile, 0u);
    __threadfence();
    atomicAdd(&progress.round, 1u);
  }
  count_or_collect_tiles<T, kConverter>(call, image, below);
  if (thread == 0) {
    const uint32_t tiles =
        static_cast<uint32_t>((call.params.num_anchors + kAnchorsPerTile - 1) / kAnchorsPerTile);
    const volatile uint32_t *tiles_done = &progress.tiles_done;
    while (*tiles_done < tiles) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// Sorts the batch, then keeps the best undecided candidate and drops those that it suppresses, until none is
// undecided. All threads of the first block call this.
template <typename T>
__device__ __noinline__ void suppress_sorted(const Call &call, int image, BelowBound &below, int size) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = below.space;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kBatchBelowBound; i += kSuppressThreads) {
    below.keys[i] = i < size ? __ldcg(reinterpret_cast<const unsigned long long *>(space.collected) + i) : 0;
  }
  __syncthreads();
  for (int width = 2; width <= kBatchBelowBound; width <<= 1) {  // bitonic sort, descending
    for (int stride = width >> 1; stride > 0; stride >>= 1) {
      for (int i = thread; i < kBatchBelowBound / 2; i += kSuppressThreads) {
        const int a = 2 * i - (i & (stride - 1)), b = a + stride;
        const uint64_t first = below.keys[a], second = below.keys[b];
        if ((first < second) == ((a & width) == 0)) below.keys[a] = second, below.keys[b] = first;
      }
      __syncthreads();
    }
  }
  constexpr int kEach = (kBatchBelowBound + kSuppressThreads - 1) / kSuppressThreads;
  int32_t groups[kEach];
  bool is_undecided[kEach], visible[kEach];
  const Box window = window_of(call, image);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = thread + k * kSuppressThreads;
    is_undecided[k] = i < size;
    if (!is_undecided[k]) continue;
    const uint64_t key = below.keys[i];
    const Pair pair = pair_of(params, key);
    const Box box = box_of<T>(call, image, pair.anchor), ordered_box = with_ordered_corners(box);
    groups[k] = group_of(params, pair);
    visible[k] = is_visible(box, window, score_of(key));
    below.boxes[i] = make_float4(ordered_box.ymin, ordered_box.xmin, ordered_box.ymax, ordered_box.xmax);
  }
  const int found_before = below.num_found;
  for (;;) {
    const bool is_enough = below.num_found >= params.max_total_detections;
    if (thread == 0) below.first = kBatchBelowBound;
    __syncthreads();
    int first = kBatchBelowBound;
#pragma unroll
    for (int k = kEach - 1; k >= 0; --k) first = is_undecided[k] ? thread + k * kSuppressThreads : first;
    first = static_cast<int>(~warp_max(~static_cast<uint32_t>(first)));  // the lowest
    if (lane_id() == 0 && first < kBatchBelowBound) atomicMin(&below.first, first);
    __syncthreads();
    const int best = below.first;
    if (best == kBatchBelowBound || is_enough) break;
    const float4 corners = below.boxes[best];
    const Box kept = box_from(corners);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (thread + k * kSuppressThreads != best) continue;
      is_undecided[k] = false;
      const uint32_t held = space.group_size[groups[k]];
      below.group = groups[k];
      below.group_is_full = held >= static_cast<uint32_t>(call.cap);
      if (!below.group_is_full) {
        space.kept_boxes[below.num_kept] = kept;
        space.kept_next[below.num_kept] = space.group_first[groups[k]];
        space.group_first[groups[k]] = below.num_kept++;
        space.group_size[groups[k]] = held + 1;
        if (visible[k]) below.counts[below.num_found++ - found_before] = static_cast<uint32_t>(best);
      }
    }
    __syncthreads();
    const float kept_area = signed_area(kept);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!is_undecided[k] || groups[k] != below.group) continue;
      const float4 other = below.boxes[thread + k * kSuppressThreads];
      const Box box{other.x, other.y, other.z, other.w};
      is_undecided[k] =
          !below.group_is_full && !suppresses(kept, kept_area, box, signed_area(box), params.iou_threshold);
    }
  }
  for (int m = found_before + thread; m < below.num_found; m += kSuppressThreads) {
    const uint64_t key = below.keys[below.counts[m - found_before]];
    const Pair pair = pair_of(params, key);
    write_detection(call, image, m, box_of<T>(call, image, pair.anchor), window, key, pair);
  }
  __syncthreads();
  for (int i = thread; i < kBins; i += kSuppressThreads) below.counts[i] = 0;
  __syncthreads();
}

// Finds the detections that lie below the head, in batches of undecided pairs, and returns the number of all
// detections. All threads of the first block call this.
template <typename T, int kConverter>
__device__ __noinline__ int suppress_below_bound(const Call &call, int image, const Survivors &survivors,
                                                 BelowBound &below) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = below.space;
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread == 0) below.space = workspace_of(call, image);
  for (int i = thread; i < kBins; i += kSuppressThreads) below.counts[i] = 0;
  __syncthreads();
  for (int i = thread; i < call.num_groups; i += kSuppressThreads) {
    space.group_first[i] = -1;
    space.group_size[i] = 0;
  }
  const int count = static_cast<int>(space.progress->count);
  if (thread == 0) {
    below.num_kept = 0;
    below.num_found = survivors.num_found;
    const uint64_t above_all = kConverter == ODTRT_IDENTITY ? ~0ull : (ordered(1.0f) + 1ull) << 32;
    below.cursor = count > 0 ? space.keys[count - 1] : above_all;
  }
  __syncthreads();
  for (int i = thread; i < count; i += kSuppressThreads) {
    if (!(survivors.kept[i / kChunk] >> (i % kChunk) & 1)) continue;
    const Pair pair = pair_of(params, space.keys[i]);
    const int at = atomicAdd(&below.num_kept, 1);
    space.kept_boxes[at] = with_ordered_corners(box_of<T>(call, image, pair.anchor));
    space.kept_next[at] = atomicExch(&space.group_first[group_of(params, pair)], at);
    atomicAdd(&space.group_size[group_of(params, pair)], 1u);
  }
  __syncthreads();

  const uint64_t min_key = static_cast<uint64_t>(ordered(params.score_threshold)) << 32;
  int octaves = 2;  // how far down the scores one step reaches
  for (;;) {
    const uint64_t cursor = below.cursor;  // pairs with this key or a higher one are decided
    const int found = below.num_found;
    __syncthreads();
    if (found >= params.max_total_detections || cursor <= min_key) break;
    const uint64_t reach = static_cast<uint64_t>(octaves) << (23 + 32);
    const uint64_t lowest = cursor - min_key > reach ? cursor - reach : min_key;
    uint64_t low = lowest, high = cursor - 1;
    for (;;) {  // raise low until the pairs from low to the cursor fit into a batch
      const int shift = shift_for(high - low, 11);
      scan_all<T, kConverter>(call, image, below, true, low, high, shift);
      for (int i = thread; i < kBins; i += kSuppressThreads) below.counts[i] = __ldcg(space.histogram + i);
      __syncthreads();
      if (thread == 0) {
        uint32_t sum = 0;
        int bin = kBins - 1;
        while (bin >= 0 && sum + below.counts[bin] <= kBatchBelowBound) sum += below.counts[bin--];
        below.size = sum;
        below.first = bin;
      }
      __syncthreads();
      const int bin = below.first;
      const bool is_narrow = bin < 0 || below.size > 0;
      __syncthreads();
      for (int i = thread; i < kBins; i += kSuppressThreads) below.counts[i] = 0;
      if (is_narrow) {
        low += bin < 0 ? 0 : static_cast<uint64_t>(bin + 1) << shift;
        break;
      }
      low += static_cast<uint64_t>(bin) << shift;
      high = low + min(high - low, static_cast<uint64_t>((1ull << shift) - 1));
    }
    const int size = static_cast<int>(below.size);
    if (size > 0) {
      scan_all<T, kConverter>(call, image, below, false, low, cursor - 1, 0);
      suppress_sorted<T>(call, image, below, size);
    } else {
      octaves = min(4 * octaves, 256);  // all floats span 512
    }
    if (thread == 0) below.cursor = low;
    __syncthreads();
  }
  return below.num_found;
}

template <typename T, int kConverter>
__global__ __launch_bounds__(kSuppressThreads, 1) void suppress(ODTRT_PARAMETER Call call) {
  extern __shared__ uint4 ring_or_below[];
  __shared__ Survivors survivors;
  __shared__ uint64_t visible[kMaxChunks];
  BelowBound &below = *reinterpret_cast<BelowBound *>(ring_or_below);
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const Workspace space = workspace_of(call, image);
  const Box window = window_of(call, image);
  wait_for_previous_kernel();
  if (blockIdx.x > 0) {
    serve_requests_of_first_block<T, kConverter>(call, image, below);
    return;
  }
  const int count = static_cast<int>(space.progress->count);
  if (thread < kMaxChunks) visible[thread] = space.is_visible[thread];
  __syncthreads();
  int num_kept = 0, counted_chunks = 0;
  // The cap of a group, max_detections_per_class, cannot matter before so many are kept in all groups together.
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
  suppress_chunks(count, space.mask, nullptr, params.max_total_detections,
                  reinterpret_cast<uint64_t *>(ring_or_below), survivors,
                  [&](int chunk, uint64_t bits) { return within_cap(chunk, bits) & visible[chunk]; });
  int num_found = survivors.num_found;
  const bool is_decided = num_found == params.max_total_detections || space.progress->is_complete;
  if (thread == 0 && is_decided) atomicExch(&space.progress->round, kFinished);
  visit_found(survivors, reinterpret_cast<uint16_t *>(ring_or_below), [&](int place, int candidate) {
    const uint64_t key = space.keys[candidate];
    const Pair pair = pair_of(params, key);
    write_detection(call, image, place, box_of<T>(call, image, pair.anchor), window, key, pair);
  });
  if (!is_decided) {
    num_found = suppress_below_bound<T, kConverter>(call, image, survivors, below);
    if (thread == 0) atomicExch(&space.progress->round, kFinished);
  }
  write_padding<kSuppressThreads>(call, image, num_found);
}

}  // namespace
}  // namespace odtrt

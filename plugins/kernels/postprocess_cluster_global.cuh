// The second algorithm of suppress_in_cluster: all blocks of the cluster work on the same batch. It works for every
// call, and truncates nothing.
//
// The candidates are distributed over the blocks, which hold them in shared memory, not sorted. Until
// max_total_detections are found, the blocks take one batch after the other:
//   select     finds the best undecided candidates, kBatch at most, by a histogram select over the keys of all
//              blocks. The bound never separates equal keys. Every block gets a copy of the whole batch.
//   mask       compares some candidates of the batch, in each block, with the whole batch: it counts the better ones,
//              and sets a bit for each rival.
//   suppress   runs in the first block. In rounds, it keeps the candidates without an undecided rival, and drops
//              those that a kept one suppresses. Two or three rounds are usual. Then it writes the detections.
//   filter     drops, in each block, the candidates that the batch suppresses.
// The candidates that the blocks hold are the head of the final order. When the head is used up, the blocks collect
// the next one from the logits. A cluster is scheduled as a whole and has its own barrier, so no block waits for one
// that does not run.
#pragma once

#include "postprocess_cluster.cuh"

namespace odtrt {
namespace {

constexpr int kBatch = 256;
constexpr int kBatchWords = kBatch / 32;
constexpr int kRowWords = kBatchWords + 4;  // of the mask: rivals, then rank
constexpr int kHeld = 1024;                 // candidates that one block holds
constexpr int kAnchorsHeld = 4096;          // anchors that a block chooses before it reads their pairs
// Anchors of the first head that is collected, if not all fit. It has at least two thirds as many.
constexpr uint32_t kMaxRows = 3072;
constexpr int kRowsInFlight = 4;
static_assert(kBatch <= kClusterThreads && kHeld % kClusterThreads == 0 && kBatch % 128 == 0, "");

// ---- shared memory -------------------------------------------------------------------------------------------------

struct Status {       // known to all blocks after a batch
  uint32_t found;     // detections so far
  uint32_t num_kept;  // kept boxes so far, which are in global memory
  uint32_t is_sized;  // 1: group_size is up to date, and the cap is checked with it
};

struct GlobalShared {
  float4 own_boxes[kHeld];
  uint4 own[kHeld];
  float4 batch_boxes[kBatch];
  uint4 batch[kBatch];
  float4 kept_boxes[kBatch];
  uint4 kept[kBatch];
  uint32_t rows[kBatch * kRowWords];   // first block only: for each of the batch, rivals and rank
  uint32_t spans[2][kSpans];           // numbers of keys; other blocks read them
  uint32_t counts[2][kMaxRanks];       // other blocks write them
  uint32_t copies[kMaxRanks][kSpans];  // of all blocks' spans, summed from the last span down
  uint32_t kept_bits[kBatchWords];     // the first block writes this and `status`
  Status status;
  alignas(16) uint32_t undecided[kBatchWords];  // first block only, as the next two
  alignas(16) uint32_t stays[kBatchWords];
  uint32_t by_rank[kBatchWords];
  int32_t anchors[kAnchorsHeld];
  uint16_t list[kHeld];
  uint8_t is_alive[kHeld];
  uint32_t size, num_anchors, num_selected, span, num_alive, bound;
  // Copies: a function that is not inlined reads them faster than the kernel's arguments or the stack.
  Call call;
  Workspace space;
  Box window;
};

// ---- selecting -----------------------------------------------------------------------------------------------------

struct Selection {
  uint64_t low;     // keys from here up are selected
  uint32_t in_all;  // how many there are
  uint32_t before;  // how many of them are in blocks of a lower rank
};

// A histogram select over the keys of all blocks: finds the lowest start of a span in `range` such that all blocks
// together hold at most max_in_all keys from there up, and each block at most max_each. If these are fewer than
// `enough`, it divides the next lower span in the same way. for_each_key(visit) calls visit(key) for each key of this
// block, in any thread. `parity` changes from call to call. All threads of all blocks call this. A max_each below ~0
// is allowed only if all keys differ and enough is 1.
template <typename ForEachKey>
__device__ __forceinline__ Selection select(GlobalShared &shared, Range range, uint32_t enough,
                                            uint32_t max_in_all, uint32_t max_each, int &parity,
                                            ForEachKey for_each_key) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int ranks = cluster_size(), rank = cluster_rank();
  uint32_t above = 0, above_before = 0;  // keys above the range
  for (;;) {
    const int shift = shift_of(range);
    uint32_t *own = shared.spans[parity];
    for (int i = thread; i < kSpans; i += kClusterThreads) own[i] = 0;
    if (thread == 0) shared.span = kSpans;
    __syncthreads();
    for_each_key([&](uint64_t key) {
      if (key >= range.low && key <= range.high) atomicAdd(&own[(key - range.low) >> shift], 1u);
    });
    __syncwarp();
    sync_cluster();
    for (int r = warp_id(); r < ranks; r += kClusterThreads / 32) {
      reinterpret_cast<uint4 *>(shared.copies[r])[lane] = sums_of_spans(in_block(own, r));
    }
    parity ^= 1;
    __syncthreads();
    if (thread < kSpans) {
      uint32_t in_all = above, largest = 0;
#pragma unroll 4
      for (int r = 0; r < ranks; ++r) {
        in_all += shared.copies[r][thread];
        largest = max(largest, shared.copies[r][thread]);
      }
      const unsigned fits = __ballot_sync(0xffffffffu, in_all <= max_in_all && largest <= max_each);
      if (lane == 0 && fits != 0) {
        atomicMin(&shared.span, static_cast<uint32_t>(thread + __ffs(static_cast<int>(fits)) - 1));
      }
    }
    __syncthreads();
    const int span = static_cast<int>(shared.span);
    uint32_t in_all = above, before = above_before;
    if (span < kSpans) {
      for (int r = 0; r < ranks; ++r) {
        const uint32_t count = shared.copies[r][span];
        in_all += count;
        if (r < rank) before += count;
      }
    }
    __syncthreads();  // all threads have read shared.copies and shared.span
    if (span == 0 || in_all >= enough)
      return {range.low + (static_cast<uint64_t>(span) << shift), in_all, before};
    // Equal keys are selected together.
    if (shift == 0) return {range.low + static_cast<uint64_t>(span - 1), max_in_all, 0};
    above = in_all;
    above_before = before;
    range = span_of(range, span - 1, shift);  // `above` has counted all keys above the new range
  }
}

// Gives every block this block's number. Returns the sum over all blocks, and sets *before to the sum over blocks of
// a lower rank. Returns kTooMany if any number is that. `parity` changes from call to call.
__device__ __forceinline__ uint32_t exchange(GlobalShared &shared, uint32_t number, int parity,
                                             uint32_t *before) {
  const int ranks = cluster_size(), rank = cluster_rank();
  if (static_cast<int>(threadIdx.x) < ranks) {
    in_block(&shared.counts[parity][rank], static_cast<int>(threadIdx.x))[0] = number;
  }
  sync_cluster();
  uint32_t sum = 0;
  *before = 0;
  bool is_too_many = false;
  for (int r = 0; r < ranks; ++r) {
    const uint32_t count = shared.counts[parity][r];
    is_too_many |= count == kTooMany;
    if (r < rank) *before += count;
    sum += count;
  }
  return is_too_many ? kTooMany : sum;
}

// Not inlined: its callers run seldom, and the kernel's code is long.
template <typename T>
__device__ __noinline__ bool is_undecided(const Call &call, const Workspace &space, int image, uint64_t key,
                                          bool knows_sizes) {
  return is_pair_undecided<T>(call, space, image, key, knows_sizes);
}

struct Head {
  uint64_t low, high;  // range of its keys
  uint32_t max_rows;   // anchors of the next head
  int32_t num_linked;  // kept boxes that are in the lists of their groups
  bool is_complete;    // no candidates are left below it
  bool is_linked;      // the lists exist
};

// Calls visit(is_in, key), with all lanes, for the undecided pairs of this block's anchors with keys from `low` to
// head.high.
template <typename T, int kConverter, typename Visit>
__device__ __forceinline__ void visit_own_pairs(const Call &call, const Workspace &space, int image,
                                                GlobalShared &shared, const Head &head, uint64_t low,
                                                Visit visit) {
  const odtrt_postprocess_params &params = call.params;
  const T *logits = logits_of<T>(call, image);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int ranks = cluster_size(), columns = params.num_columns;
  const uint32_t min_best_score = max(1u, static_cast<uint32_t>(low >> 32));
  const float min_score = low == 0 ? params.score_threshold : fmaxf(params.score_threshold, score_of(low));
  const bool is_plain = kConverter != ODTRT_SOFTMAX && !params.class_agnostic && columns <= kColumnsAtOnce;
  const bool is_sized = shared.status.is_sized != 0;
  auto check = [&](bool is_candidate, uint64_t key) {
    bool is_in = is_candidate && key >= low && key <= head.high;
    if (is_in && head.is_linked) is_in = is_undecided<T>(call, space, image, key, is_sized);
    visit(is_in, key);
  };
  // Groups of 32 anchors are dealt out to the blocks. A block takes kAnchorsHeld of its own at a time.
  const int groups = (params.num_anchors + 31) / 32, own_groups = (groups - cluster_rank() + ranks - 1) / ranks;
  for (int start = 0; start < own_groups; start += kAnchorsHeld / 32) {
    if (thread == 0) shared.num_anchors = 0;
    __syncthreads();
    constexpr int kEach = kAnchorsHeld / kClusterThreads;
    uint32_t best_scores[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int group = start + warp_id() + k * (kClusterThreads / 32);
      const int anchor = (cluster_rank() + group * ranks) * 32 + lane;
      best_scores[k] =
          group < own_groups && anchor < params.num_anchors ? __ldcg(space.best_scores + anchor) : 0;
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int group = start + warp_id() + k * (kClusterThreads / 32);
      if (best_scores[k] >= min_best_score) {
        shared.anchors[atomicAdd(&shared.num_anchors, 1u)] = (cluster_rank() + group * ranks) * 32 + lane;
      }
    }
    __syncthreads();
    const int count = static_cast<int>(shared.num_anchors);
    if (is_plain) {
      constexpr int kEachRow = kColumnsAtOnce / 32;
      const float min_logit = logit_lower_bound<kConverter>(min_score);
      for (int i = warp_id() * kRowsInFlight; i < count; i += kClusterThreads / 32 * kRowsInFlight) {
        float values[kRowsInFlight][kEachRow];
        int anchors[kRowsInFlight];
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
          anchors[r] = shared.anchors[min(i + r, count - 1)];
          const T *row = logits + static_cast<size_t>(anchors[r]) * columns + lane;
#pragma unroll
          for (int k = 0; k < kEachRow; ++k)
            values[r][k] = 32 * k + lane < columns ? to_float(row[32 * k]) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
          if (i + r >= count) break;
#pragma unroll 1
          for (int k = 0; k < kEachRow; ++k) {
            const int column = 32 * k + lane, label = column - params.background_column;
            const float value = k == 0 ? values[r][0] : k == 1 ? values[r][1] : values[r][2];
            const float scaled = mul(value, params.logit_factor);
            const bool is_class = label >= 0 && column < columns;
            if (!__any_sync(0xffffffffu, is_class && scaled >= min_logit)) continue;
            const float score = score_of_logit<kLogitConverter<kConverter>>(scaled);
            check(is_class && score > params.score_threshold,
                  order_key(score, place_of_pair(params, {anchors[r], label})));
          }
        }
      }
    } else {
      for (int i = warp_id(); i < count; i += kClusterThreads / 32) {
        const int anchor = shared.anchors[i];
        visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * columns, anchor, min_score,
                                   check);
      }
    }
    __syncthreads();
  }
}

// Appends a key of each lane for which is_in holds to this block's candidates. Keys beyond kHeld are counted, not
// stored. A whole warp calls this.
__device__ __forceinline__ void push_candidate(GlobalShared &shared, bool is_in, uint64_t key) {
  const unsigned vote = __ballot_sync(0xffffffffu, is_in);
  if (vote == 0) return;
  const uint32_t at = reserve_places(&shared.size, vote);
  if (is_in && at < kHeld) {
    shared.own[at].x = static_cast<uint32_t>(key);
    shared.own[at].y = static_cast<uint32_t>(key >> 32);
  }
}

// Collects the next head from all pairs below the last one. All threads of all blocks call this.
template <typename T, int kConverter>
__device__ __noinline__ void collect_head(const Call &call, const Workspace &space, int image,
                                          GlobalShared &shared, Head &head, int &parity, int &exchanges) {
  const odtrt_postprocess_params &params = call.params;
  const int thread = static_cast<int>(threadIdx.x), ranks = cluster_size(), rank = cluster_rank();
  const int num_kept = static_cast<int>(shared.status.num_kept);
  if (num_kept > head.num_linked) {
    if (!head.is_linked) {
      for (int i = thread + rank * kClusterThreads; i < call.num_groups; i += kClusterThreads * ranks) {
        space.group_first[i] = -1;
      }
      sync_cluster();
    }
    if (rank == 0) {
      __syncthreads();  // what the last batch kept has been written
      for (int i = head.num_linked + thread; i < num_kept; i += kClusterThreads) {
        space.kept_next[i] = atomicExch(&space.group_first[space.kept_group[i]], i);
      }
    }
    sync_cluster();
    head.is_linked = true;
    head.num_linked = num_kept;
  }
  const uint32_t lowest = ordered(params.score_threshold);
  const uint32_t highest = kConverter == ODTRT_IDENTITY ? 0xffffffffu : ordered(1.0f);
  const Selection rows =
      select(shared, {lowest, max(lowest, highest)}, head.max_rows - head.max_rows / 3, head.max_rows, ~0u,
             parity, [&](auto visit) {
               constexpr int kEach = 8;
               const int groups = (params.num_anchors + 31) / 32, step = ranks * (kClusterThreads / 32);
               for (int first = rank + ranks * warp_id(); first < groups; first += step * kEach) {
                 uint32_t best_scores[kEach];
#pragma unroll
                 for (int k = 0; k < kEach; ++k) {
                   const int anchor = (first + k * step) * 32 + lane_id();
                   best_scores[k] = first + k * step < groups && anchor < params.num_anchors
                                        ? __ldcg(space.best_scores + anchor)
                                        : 0;
                 }
#pragma unroll
                 for (int k = 0; k < kEach; ++k) {
                   if (best_scores[k] != 0) visit(static_cast<uint64_t>(best_scores[k]));
                 }
               }
             });
  head.max_rows = head.max_rows > 0x3fffffffu ? 0xffffffffu : head.max_rows * 4;
  head.is_complete = rows.low <= lowest;
  head.low = head.is_complete ? 0 : rows.low << 32;
  for (;;) {
    if (thread == 0) shared.size = 0;
    __syncthreads();
    if (head.low <= head.high) {
      visit_own_pairs<T, kConverter>(call, space, image, shared, head, head.low,
                                     [&](bool is_in, uint64_t key) { push_candidate(shared, is_in, key); });
    }
    __syncthreads();
    uint32_t before;
    const uint32_t size = shared.size;
    if (exchange(shared, size > kHeld ? kTooMany : size, exchanges++ & 1, &before) != kTooMany) break;
    const Selection pairs = select(shared, {max(head.low, static_cast<uint64_t>(lowest) << 32), head.high}, 1,
                                   ~0u, kHeld, parity, [&](auto visit) {
                                     visit_own_pairs<T, kConverter>(call, space, image, shared, head, head.low,
                                                                    [&](bool is_in, uint64_t key) {
                                                                      if (is_in) visit(key);
                                                                    });
                                   });
    head.low = pairs.low;
    head.is_complete = false;
  }
}

// Runs in the first block: decides about a batch, writes its detections, sends shared.kept_bits and shared.status to
// all blocks, and arrives at the cluster's barrier.
template <typename T>
__device__ __forceinline__ void suppress_batch_in_first_block(const Call &call, const Workspace &space,
                                                              int image, GlobalShared &shared,
                                                              const Box &window, int size) {
  const odtrt_postprocess_params &params = call.params;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  const Status before = shared.status;
  uint32_t rivals[kBatchWords];
  int rank = 0;
  bool is_open = thread < size, is_kept = false;
  if (warp < kBatchWords) {
    const uint32_t open = __ballot_sync(0xffffffffu, is_open);
    if (lane == 0) {
      shared.undecided[warp] = open;
      shared.by_rank[warp] = 0;
    }
#pragma unroll
    for (int k = 0; k < kBatchWords; k += 4) {
      const uint4 four =
          *reinterpret_cast<const uint4 *>(&shared.rows[min(thread, kBatch - 1) * kRowWords + k]);
      rivals[k] = four.x, rivals[k + 1] = four.y, rivals[k + 2] = four.z, rivals[k + 3] = four.w;
    }
    rank = static_cast<int>(shared.rows[min(thread, kBatch - 1) * kRowWords + kBatchWords]);
  }
  __syncthreads();
  auto is_hit = [&](const uint32_t *among) {
    uint32_t hit = 0;
#pragma unroll
    for (int k = 0; k < kBatchWords; k += 4) {
      const uint4 four = *reinterpret_cast<const uint4 *>(among + k);
      hit |=
          (rivals[k] & four.x) | (rivals[k + 1] & four.y) | (rivals[k + 2] & four.z) | (rivals[k + 3] & four.w);
    }
    return hit != 0;
  };
  for (bool goes_on = true; goes_on;) {
    bool stays = false;
    if (warp < kBatchWords) {
      stays = is_open && !is_hit(shared.undecided);
      const uint32_t word = __ballot_sync(0xffffffffu, stays);
      if (lane == 0) shared.stays[warp] = word;
    }
    __syncthreads();
    if (warp < kBatchWords) {
      is_kept |= stays;
      is_open = is_open && !stays && !is_hit(shared.stays);
      const uint32_t word = __ballot_sync(0xffffffffu, is_open);
      if (lane == 0) shared.undecided[warp] = word;
    }
    goes_on = __syncthreads_or(is_open);
  }
  auto count_kept = [&] {
    if (warp < kBatchWords) {
      const uint32_t word = __ballot_sync(0xffffffffu, is_kept);
      if (lane == 0) shared.kept_bits[warp] = word;
    }
    __syncthreads();
    uint32_t count = 0;
#pragma unroll
    for (int k = 0; k < kBatchWords; ++k) count += __popc(shared.kept_bits[k]);
    return count;
  };
  uint32_t num_kept = count_kept();
  uint32_t is_sized = before.is_sized;
  // The cap of a group, max_detections_per_class, cannot matter before so many are kept in all groups together. Nor
  // does it matter if max_total_detections are found by then.
  const uint32_t num_visible =
      static_cast<uint32_t>(__syncthreads_count(is_kept && (shared.batch[thread % kBatch].z & kVisible)));
  const bool is_cap_idle = is_sized == 0 && static_cast<uint32_t>(call.cap) >=
                                                static_cast<uint32_t>(params.max_total_detections) +
                                                    (before.num_kept + num_kept - before.found - num_visible);
  if (before.num_kept + num_kept > static_cast<uint32_t>(call.cap) && !is_cap_idle) {
    if (is_sized == 0) {
      for (int i = thread; i < call.num_groups; i += kClusterThreads) space.group_size[i] = 0;
      __syncthreads();
      for (int i = thread; i < static_cast<int>(before.num_kept); i += kClusterThreads) {
        atomicAdd(&space.group_size[space.kept_group[i]], 1u);
      }
      __syncthreads();
      is_sized = 1;
    }
    int group = 0;
    if (is_kept) {
      const uint4 own = shared.batch[thread];
      group = static_cast<int>(own.z & kGroupBits);
      uint32_t held = __ldcg(space.group_size + group);
      for (int i = 0; i < size; ++i) {
        if (!(shared.kept_bits[i / 32] >> (i % 32) & 1)) continue;
        const uint4 other = shared.batch[i];
        held += is_same_group(own, other) && key_of(other) > key_of(own);
      }
      is_kept = held < static_cast<uint32_t>(call.cap);
    }
    __syncthreads();
    if (is_kept) atomicAdd(&space.group_size[group], 1u);
    num_kept = count_kept();
  }
  uint4 own{};
  if (is_kept) {
    own = shared.batch[thread];
    if (own.z & kVisible) atomicOr(&shared.by_rank[rank >> 5], 1u << (rank & 31));
  }
  __syncthreads();
  uint32_t in_all = 0, place = 0;
#pragma unroll
  for (int k = 0; k < kBatchWords; ++k) {
    const uint32_t word = shared.by_rank[k];
    in_all += __popc(word);
    place += __popc(k < rank >> 5 ? word : k == rank >> 5 ? word & ((1u << (rank & 31)) - 1) : 0u);
  }
  const uint32_t max_detections = static_cast<uint32_t>(params.max_total_detections);
  const Status after{min(max_detections, before.found + in_all), before.num_kept + num_kept, is_sized};
  for (int i = thread; i < cluster_size() * kBatchWords; i += kClusterThreads) {
    if (i >= kBatchWords) {
      *in_block(&shared.kept_bits[i % kBatchWords], i / kBatchWords) = shared.kept_bits[i % kBatchWords];
    }
  }
  if (thread < cluster_size()) *in_block(&shared.status, thread) = after;
  __syncwarp();
  cluster_arrive();
  if (is_kept) {
    place += before.found;
    const float4 corners = shared.batch_boxes[thread];
    if ((own.z & kVisible) && place < max_detections) {
      const uint64_t key = key_of(own);
      const Box box =
          own.z & kIsDecoded ? box_from(corners) : box_of<T>(call, image, pair_of(params, key).anchor);
      write_detection(call, image, static_cast<int>(place), box, window, key, pair_of(params, key));
    }
    if (after.found < max_detections) {
      uint32_t at = before.num_kept + __popc(shared.kept_bits[warp] & ((1u << lane) - 1));
      for (int k = 0; k < warp; ++k) at += __popc(shared.kept_bits[k]);
      reinterpret_cast<float4 *>(space.kept_boxes)[at] = corners;
      space.kept_group[at] = static_cast<int32_t>(own.z & kGroupBits);
    }
  }
}

// Writes all detections of an image. All threads of all blocks call this.
template <typename T, int kConverter>
__device__ __noinline__ void suppress_global(int image, float union_fraction, GlobalShared &shared) {
  const Call &call = shared.call;
  const Workspace &space = shared.space;
  const Box &window = shared.window;
  const odtrt_postprocess_params &params = call.params;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  const int ranks = cluster_size(), rank = cluster_rank();
  constexpr int kWarps = kClusterThreads / 32;
  uint32_t bound = 0;
  if (thread == 0) {
    shared.size = shared.bound = 0;
    shared.status = {0, 0, 0};
  }
  __syncthreads();
  cluster_arrive();
  for (int i = thread; i < call.num_slots; i += kClusterThreads)
    bound = max(bound, __ldcg(space.slot_bounds + i));
  bound = warp_max(bound);
  if (lane == 0) atomicMax(&shared.bound, bound);
  __syncthreads();
  bound = shared.bound;

  bool is_too_many = bound == kTooMany;
  if (!is_too_many) {
    const uint64_t min_key = max(uint64_t{1}, static_cast<uint64_t>(bound) << 32);
    const int own_slots = (call.num_slots - rank + ranks - 1) / ranks;
#pragma unroll 4
    for (int i = thread; i < (own_slots * kSlotSize + 31) / 32 * 32; i += kClusterThreads) {
      const uint64_t key = __ldcg(reinterpret_cast<const unsigned long long *>(space.collected) +
                                  (rank + i / kSlotSize * ranks) * kSlotSize + i % kSlotSize);
      push_candidate(shared, key >= min_key, key);
    }
  }
  __syncthreads();
  is_too_many |= shared.size > kHeld;

  auto decode_own = [&](int size) {
    for (int i = thread; i < size; i += kClusterThreads) {
      const Decoded candidate = decode_candidate<T>(call, image, window, union_fraction, key_of(shared.own[i]));
      shared.own_boxes[i] = candidate.box;
      shared.own[i] = candidate.info;
      shared.is_alive[i] = 1;
    }
  };

  Head head{0, kConverter == ODTRT_IDENTITY ? ~0ull : (ordered(1.0f) + 1ull) << 32, kMaxRows, 0, true, false};
  if (bound != 0 && bound != kTooMany) {
    head.low = static_cast<uint64_t>(bound) << 32;
    head.is_complete = false;
  }
  int parity = 0, exchanges = 0;
  uint32_t before, own_count = is_too_many ? kTooMany : shared.size;
  if (!is_too_many) decode_own(static_cast<int>(own_count));
  __syncthreads();
  cluster_wait();
  uint32_t alive = exchange(shared, own_count, exchanges++ & 1, &before);
  for (;;) {
    if (alive == kTooMany) {
      collect_head<T, kConverter>(call, space, image, shared, head, parity, exchanges);
      own_count = shared.size;
      decode_own(static_cast<int>(own_count));
      __syncthreads();
      alive = exchange(shared, own_count, exchanges++ & 1, &before);
    }
    uint64_t high = head.high;
    while (alive != 0) {
      // select
      uint64_t low = 0;
      uint32_t size = alive;
      if (alive > kBatch) {
        const uint64_t min_key = max(head.low, static_cast<uint64_t>(ordered(params.score_threshold)) << 32);
        const Selection selection =
            select(shared, {min_key, max(min_key, high)}, 1, kBatch, ~0u, parity, [&](auto visit) {
              for (int i = thread; i < static_cast<int>(own_count); i += kClusterThreads) {
                if (shared.is_alive[i]) visit(key_of(shared.own[i]));
              }
            });
        low = selection.low;
        size = selection.in_all;
        before = selection.before;
      }
      if (thread == 0) shared.num_selected = shared.num_alive = 0;
      __syncthreads();
      for (int i = thread; i < static_cast<int>(own_count); i += kClusterThreads) {
        if (shared.is_alive[i] && key_of(shared.own[i]) >= low) {
          shared.is_alive[i] = 0;
          shared.list[atomicAdd(&shared.num_selected, 1u)] = static_cast<uint16_t>(i);
        }
      }
      __syncthreads();
      const int selected = static_cast<int>(shared.num_selected), log = __ffs(ranks) - 1;
      for (int i = thread; i < selected << log; i += kClusterThreads) {
        const int own = shared.list[i >> log], place = static_cast<int>(before) + (i >> log),
                  to = i & (ranks - 1);
        *in_block(&shared.batch_boxes[place], to) = shared.own_boxes[own];
        *in_block(&shared.batch[place], to) = shared.own[own];
      }
      __syncwarp();
      sync_cluster();
      // mask
      for (int row = rank + ranks * warp; row < static_cast<int>(size); row += ranks * kWarps) {
        const float4 own_corners = shared.batch_boxes[row];
        const Box own = box_from(own_corners);
        const uint4 own_info = shared.batch[row];
        const uint64_t own_key = key_of(own_info);
        const float own_area = float_of(own_info.w);
        uint32_t of_lane = 0, own_rank = 0,
                 unclear = 0;  // of_lane: lane k has word k; unclear: bit k for word k
#pragma unroll
        for (int k = 0; k < kBatchWords; ++k) {
          const int column = 32 * k + lane;
          const Box other = box_from(shared.batch_boxes[column]);
          const uint4 info = shared.batch[column];
          const bool is_better = column < static_cast<int>(size) && key_of(info) > own_key;
          const bool is_rival = is_better && is_same_group(info, own_info);
          const OverlapTest test = test_overlap(other, float_of(info.w), own, own_area);
          const uint32_t word = __ballot_sync(0xffffffffu, is_rival && test.certain);
          unclear |= static_cast<uint32_t>(is_rival && test.possible) << k;
          own_rank += __popc(__ballot_sync(0xffffffffu, is_better));
          of_lane = lane == k ? word : of_lane;
        }
        if (__any_sync(0xffffffffu, unclear != 0)) {
#pragma unroll 1
          for (int k = 0; k < kBatchWords; ++k) {
            const bool is_rival = (unclear >> k & 1) && is_suppressed(shared.batch_boxes[32 * k + lane],
                                                                      own_corners, params.iou_threshold);
            const uint32_t word = __ballot_sync(0xffffffffu, is_rival);
            of_lane |= lane == k ? word : 0;
          }
        }
        if (lane == kBatchWords) of_lane = own_rank;
        if (lane <= kBatchWords) *in_block(&shared.rows[row * kRowWords + lane], 0) = of_lane;
      }
      __syncwarp();
      sync_cluster();
      // suppress
      if (rank == 0) {
        suppress_batch_in_first_block<T>(call, space, image, shared, window, static_cast<int>(size));
      } else {
        cluster_arrive();
      }
      __syncwarp();
      cluster_wait();
      const Status status = shared.status;
      if (status.found >= static_cast<uint32_t>(params.max_total_detections)) break;
      // filter
      if (alive == size) {
        alive = 0;
        break;
      }
      uint32_t num_kept = 0;
      {
        uint32_t place = 0;
#pragma unroll
        for (int k = 0; k < kBatchWords; ++k) {
          const uint32_t word = shared.kept_bits[k];
          num_kept += __popc(word);
          place += __popc(k < warp ? word : k == warp ? word & ((1u << lane) - 1) : 0u);
        }
        if (thread < kBatch && (shared.kept_bits[thread / 32] >> lane & 1)) {
          shared.kept_boxes[place] = shared.batch_boxes[thread];
          shared.kept[place] = shared.batch[thread];
        }
      }
      __syncthreads();
      const int part = lane & 3;  // four threads a candidate
      for (int start = 0; start < static_cast<int>(own_count); start += kClusterThreads / 4) {
        const int i = start + thread / 4;
        const bool is_here = i < static_cast<int>(own_count) && shared.is_alive[i];
        bool is_dead = false;
        if (is_here) {
          const float4 own_corners = shared.own_boxes[i];
          const Box own = box_from(own_corners);
          const uint4 own_info = shared.own[i];
          const float own_area = float_of(own_info.w);
          bool is_unclear = false;
#pragma unroll 4
          for (int k = part; k < static_cast<int>(num_kept); k += 4) {
            const uint4 info = shared.kept[k];
            const OverlapTest test =
                test_overlap(box_from(shared.kept_boxes[k]), float_of(info.w), own, own_area);
            is_dead |= is_same_group(info, own_info) && test.certain;
            is_unclear |= is_same_group(info, own_info) && test.possible;
          }
          if (is_unclear && !is_dead) {
#pragma unroll 1
            for (int k = part; k < static_cast<int>(num_kept); k += 4) {
              is_dead |= is_same_group(shared.kept[k], own_info) &&
                         is_suppressed(shared.kept_boxes[k], own_corners, params.iou_threshold);
            }
          }
          if (status.is_sized) {
            is_dead |= __ldcg(space.group_size + (own_info.z & kGroupBits)) >= static_cast<uint32_t>(call.cap);
          }
        }
        const unsigned dead = __ballot_sync(0xffffffffu, is_dead);
        const bool stays = is_here && part == 0 && (dead >> lane & 0xf) == 0;
        __syncwarp();  // all four have read it
        if (is_here && part == 0 && !stays) shared.is_alive[i] = 0;
        const unsigned vote = __ballot_sync(0xffffffffu, stays);
        if (lane == 0 && vote != 0) atomicAdd(&shared.num_alive, static_cast<uint32_t>(__popc(vote)));
      }
      __syncthreads();
      high = low - 1;
      alive = exchange(shared, shared.num_alive, exchanges++ & 1, &before);
    }
    if (shared.status.found >= static_cast<uint32_t>(params.max_total_detections) || head.is_complete) break;
    head.high = min(head.high, head.low - 1);
    alive = kTooMany;
  }
  if (rank == 0) write_padding<kClusterThreads>(call, image, static_cast<int>(shared.status.found));
}

}  // namespace
}  // namespace odtrt

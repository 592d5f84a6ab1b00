// settle, the second way: all blocks of the cluster at one batch. It needs no classes and truncates nothing.
//
// The blocks share the candidates out among themselves and keep them in their own shared memory, in no order. Then,
// until max_total_detections are found, a batch after the other:
//   select   the best kBatch at most that are still in the running: the bound is found in a histogram of the keys
//            (never between equal keys), and every block gets all of the batch.
//   mark     each block compares some of the batch with all of it: who is better, and who of these would suppress it.
//   settle   the first block: who has no undecided rival left stays, and takes those it suppresses along, and again.
//            Two or three rounds do. Then it writes what was found.
//   filter   each block drops of its candidates those that the batch suppresses.
// Candidates below those that the blocks hold ("the head") are collected when the head is used up: nothing is ever
// truncated. A cluster is scheduled as a whole and has a barrier of its own, so no block waits for one that may not
// run.
#pragma once

#include "postprocess_candidates.cuh"

namespace odtrt {
namespace {

constexpr int kBatch = 256;
constexpr int kBatchWords = kBatch / 32;
constexpr int kRowWords = kBatchWords + 4;  // of the mask: rivals, rank
constexpr int kHeld = 1024;                 // candidates that one block holds
constexpr int kAnchorsHeld = 4096;          // that are looked at before their pairs are collected
// Anchors of the first head, where not all pairs fit; at least two thirds of it.
constexpr uint32_t kRowsMost = 3072;
constexpr int kRowsInFlight = 4;
static_assert(kBatch <= kTailThreads && kHeld % kTailThreads == 0 && kBatch % 128 == 0, "");

// ---- shared memory -------------------------------------------------------------------------------------------------

struct Status {       // after a batch
  uint32_t found;     // detections so far
  uint32_t num_kept;  // in global memory
  uint32_t is_sized;  // group_size is up to date, and decides
};

struct Tail {
  float4 own_boxes[kHeld];
  uint4 own[kHeld];
  float4 batch_boxes[kBatch];
  uint4 batch[kBatch];
  float4 kept_boxes[kBatch];
  uint4 kept[kBatch];
  uint32_t rows[kBatch * kRowWords];    // of the first block: of each of the batch, rivals and rank
  uint32_t spans[2][kSpans];            // how many keys lie in each; read by the other blocks
  uint32_t counts[2][kMostRanks];       // written by the other blocks
  uint32_t copies[kMostRanks][kSpans];  // of everyone's spans, summed up from the last span down
  uint32_t kept_bits[kBatchWords];      // written by the first block, as the next
  Status status;
  alignas(16) uint32_t undecided[kBatchWords];  // of the first block, as the next three
  alignas(16) uint32_t stays[kBatchWords];
  uint32_t by_rank[kBatchWords];
  int32_t anchors[kAnchorsHeld];
  uint16_t list[kHeld];
  uint8_t is_alive[kHeld];
  uint32_t size, num_anchors, num_selected, span, num_alive, bound;
  // A function that is called finds them sooner here than among the kernel's arguments or on the stack.
  Call call;
  Workspace space;
  Box window;
};

// ---- selecting -----------------------------------------------------------------------------------------------------

struct Selection {
  uint64_t low;     // keys from here on are selected
  uint32_t in_all;  // how many there are
  uint32_t before;  // of which in blocks of a lower rank
};

// Finds the lowest bound of a span in `range` such that all blocks together hold at most `most` keys from it on and
// none more than `most_each`; goes on into the span below it while there are fewer than `enough`.
// for_each_key(visit) calls visit(key) for each key of this block, in any thread. `parity` alternates. Called by all
// threads of all blocks. most_each is for keys that are all different, and for enough = 1, only.
template <typename ForEachKey>
__device__ __forceinline__ Selection select(Tail &shared, Range range, uint32_t enough, uint32_t most,
                                            uint32_t most_each, int &parity, ForEachKey for_each_key) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int ranks = cluster_size(), rank = cluster_rank();
  uint32_t above = 0, above_before = 0;  // keys above the range
  for (;;) {
    const int shift = shift_of(range);
    uint32_t *own = shared.spans[parity];
    for (int i = thread; i < kSpans; i += kTailThreads) own[i] = 0;
    if (thread == 0) shared.span = kSpans;
    __syncthreads();
    for_each_key([&](uint64_t key) {
      if (key >= range.low && key <= range.high) atomicAdd(&own[(key - range.low) >> shift], 1u);
    });
    __syncwarp();
    sync_cluster();
    for (int r = warp_id(); r < ranks; r += kTailThreads / 32) {
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
      const unsigned fits = __ballot_sync(0xffffffffu, in_all <= most && largest <= most_each);
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
    __syncthreads();  // all has been read before it is written again
    if (span == 0 || in_all >= enough)
      return {range.low + (static_cast<uint64_t>(span) << shift), in_all, before};
    if (shift == 0)
      return {range.low + static_cast<uint64_t>(span - 1), most, 0};  // of equal ones, all or none
    above = in_all;
    above_before = before;
    range = span_of(range, span - 1, shift);  // nothing is above that is not counted
  }
}

// Gives every block this block's number, and returns the sum, and the sum of those of a lower rank. kTooMany
// where any is that. `parity` alternates.
__device__ __forceinline__ uint32_t exchange(Tail &shared, uint32_t number, int parity, uint32_t *before) {
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

// Is this pair still in the running, after what global memory says was kept?
template <typename T>
__device__ __noinline__ bool is_in_running(const Call &call, const Workspace &space, int image, uint64_t key,
                                           bool is_sized) {
  const Pair pair = pair_of(call.params, key);
  const int group = group_of(call.params, pair);
  if (is_sized && __ldcg(space.group_size + group) >= static_cast<uint32_t>(call.cap)) return false;
  int at = __ldcg(space.group_first + group);
  if (at < 0) return true;
  const Box box = with_ordered_corners(box_of<T>(call, image, pair.anchor));
  const float area = signed_area(box);
  for (; at >= 0; at = __ldcg(space.kept_next + at)) {
    const Box kept = box_from(__ldcg(reinterpret_cast<const float4 *>(space.kept_boxes) + at));
    if (suppresses(kept, signed_area(kept), box, area, call.params.iou_threshold)) return false;
  }
  return true;
}

struct Head {
  uint64_t low, high;  // its keys
  uint32_t rows_most;  // of the next one
  int32_t num_linked;  // of what was kept: in the lists
  bool is_complete;    // nothing is left below it
  bool is_linked;      // there are lists
};

// Calls visit(is_in, key) with all lanes, for the pairs of this block's anchors from `low` to `high` that are still
// in the running.
template <typename T, int kConverter, typename Visit>
__device__ __forceinline__ void visit_own_pairs(const Call &call, const Workspace &space, int image,
                                                Tail &shared, const Head &head, uint64_t low, Visit visit) {
  const odtrt_postprocess_params &params = call.params;
  const T *logits = static_cast<const T *>(call.heads.class_logits) +
                    static_cast<size_t>(image) * params.num_anchors * params.num_columns;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int ranks = cluster_size(), columns = params.num_columns;
  const uint32_t least_grade = max(1u, static_cast<uint32_t>(low >> 32));
  const float least = low == 0 ? params.score_threshold : fmaxf(params.score_threshold, score_of(low));
  const bool is_plain = kConverter != ODTRT_SOFTMAX && !params.class_agnostic && columns <= kColumnsAtOnce;
  const bool is_sized = shared.status.is_sized != 0;
  auto check = [&](bool is_candidate, uint64_t key) {
    bool is_in = is_candidate && key >= low && key <= head.high;
    if (is_in && head.is_linked) is_in = is_in_running<T>(call, space, image, key, is_sized);
    visit(is_in, key);
  };
  // Groups of 32 anchors go round the blocks; a block looks at kAnchorsHeld of its own at a time.
  const int groups = (params.num_anchors + 31) / 32, own_groups = (groups - cluster_rank() + ranks - 1) / ranks;
  for (int start = 0; start < own_groups; start += kAnchorsHeld / 32) {
    if (thread == 0) shared.num_anchors = 0;
    __syncthreads();
    constexpr int kEach = kAnchorsHeld / kTailThreads;
    uint32_t grades[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int group = start + warp_id() + k * (kTailThreads / 32);
      const int anchor = (cluster_rank() + group * ranks) * 32 + lane;
      grades[k] = group < own_groups && anchor < params.num_anchors ? __ldcg(space.grades + anchor) : 0;
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int group = start + warp_id() + k * (kTailThreads / 32);
      if (grades[k] >= least_grade) {
        shared.anchors[atomicAdd(&shared.num_anchors, 1u)] = (cluster_rank() + group * ranks) * 32 + lane;
      }
    }
    __syncthreads();
    const int count = static_cast<int>(shared.num_anchors);
    if (is_plain) {
      constexpr int kEachRow = kColumnsAtOnce / 32;
      const float least_logit = cautious_logit<kConverter>(least);
      for (int i = warp_id() * kRowsInFlight; i < count; i += kTailThreads / 32 * kRowsInFlight) {
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
            if (!__any_sync(0xffffffffu, is_class && scaled >= least_logit)) continue;
            const float score = score_of_logit<kOfLogit<kConverter>>(scaled);
            check(is_class && score > params.score_threshold,
                  order_key(score, place_of_pair(params, {anchors[r], label})));
          }
        }
      }
    } else {
      for (int i = warp_id(); i < count; i += kTailThreads / 32) {
        const int anchor = shared.anchors[i];
        visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * columns, anchor, least,
                                   check);
      }
    }
    __syncthreads();
  }
}

// Takes a key into this block's candidates, where there is room. Called by all lanes.
__device__ __forceinline__ void take_candidate(Tail &shared, bool is_in, uint64_t key) {
  const unsigned vote = __ballot_sync(0xffffffffu, is_in);
  if (vote == 0) return;
  const uint32_t at = take_place(&shared.size, vote);
  if (is_in && at < kHeld) {
    shared.own[at].x = static_cast<uint32_t>(key);
    shared.own[at].y = static_cast<uint32_t>(key >> 32);
  }
}

// The next head, from all pairs below the last one. Called by all threads of all blocks.
template <typename T, int kConverter>
__device__ __noinline__ void collect_head(const Call &call, const Workspace &space, int image, Tail &shared,
                                          Head &head, int &parity, int &exchanges) {
  const odtrt_postprocess_params &params = call.params;
  const int thread = static_cast<int>(threadIdx.x), ranks = cluster_size(), rank = cluster_rank();
  const int num_kept = static_cast<int>(shared.status.num_kept);
  if (num_kept > head.num_linked) {
    if (!head.is_linked) {
      for (int i = thread + rank * kTailThreads; i < call.num_groups; i += kTailThreads * ranks) {
        space.group_first[i] = -1;
      }
      sync_cluster();
    }
    if (rank == 0) {
      __syncthreads();  // what the last batch kept has been written
      for (int i = head.num_linked + thread; i < num_kept; i += kTailThreads) {
        space.kept_next[i] = atomicExch(&space.group_first[space.kept_group[i]], i);
      }
    }
    sync_cluster();
    head.is_linked = true;
    head.num_linked = num_kept;
  }
  const uint32_t lowest = ordered(params.score_threshold);
  const uint32_t highest = kConverter == ODTRT_IDENTITY ? 0xffffffffu : ordered(1.0f);
  const Selection rows = select(
      shared, {lowest, max(lowest, highest)}, head.rows_most - head.rows_most / 3, head.rows_most, ~0u, parity,
      [&](auto visit) {
        constexpr int kEach = 8;
        const int groups = (params.num_anchors + 31) / 32, step = ranks * (kTailThreads / 32);
        for (int first = rank + ranks * warp_id(); first < groups; first += step * kEach) {
          uint32_t grades[kEach];
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            const int anchor = (first + k * step) * 32 + lane_id();
            grades[k] =
                first + k * step < groups && anchor < params.num_anchors ? __ldcg(space.grades + anchor) : 0;
          }
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            if (grades[k] != 0) visit(static_cast<uint64_t>(grades[k]));
          }
        }
      });
  head.rows_most = head.rows_most > 0x3fffffffu ? 0xffffffffu : head.rows_most * 4;
  head.is_complete = rows.low <= lowest;
  head.low = head.is_complete ? 0 : rows.low << 32;
  for (;;) {
    if (thread == 0) shared.size = 0;
    __syncthreads();
    if (head.low <= head.high) {
      visit_own_pairs<T, kConverter>(call, space, image, shared, head, head.low,
                                     [&](bool is_in, uint64_t key) { take_candidate(shared, is_in, key); });
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

// The first block: who of the batch stays. Leaves that in shared.kept_bits and shared.by_rank, and gives everyone the
// status; arrives at the cluster's barrier.
template <typename T>
__device__ __forceinline__ void settle_batch_of(const Call &call, const Workspace &space, int image,
                                                Tail &shared, const Box &window, int size) {
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
  // A group may hold max_detections_per_class; that cannot matter before so many are kept in all, nor where by then
  // max_total_detections were found.
  const uint32_t num_visible =
      static_cast<uint32_t>(__syncthreads_count(is_kept && (shared.batch[thread % kBatch].z & kVisible)));
  const bool is_cap_idle = is_sized == 0 && static_cast<uint32_t>(call.cap) >=
                                                static_cast<uint32_t>(params.max_total_detections) +
                                                    (before.num_kept + num_kept - before.found - num_visible);
  if (before.num_kept + num_kept > static_cast<uint32_t>(call.cap) && !is_cap_idle) {
    if (is_sized == 0) {
      for (int i = thread; i < call.num_groups; i += kTailThreads) space.group_size[i] = 0;
      __syncthreads();
      for (int i = thread; i < static_cast<int>(before.num_kept); i += kTailThreads) {
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
  const uint32_t most = static_cast<uint32_t>(params.max_total_detections);
  const Status after{min(most, before.found + in_all), before.num_kept + num_kept, is_sized};
  for (int i = thread; i < cluster_size() * kBatchWords; i += kTailThreads) {
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
    if ((own.z & kVisible) && place < most) {
      const uint64_t key = key_of(own);
      const Box box =
          own.z & kIsDecoded ? box_from(corners) : box_of<T>(call, image, pair_of(params, key).anchor);
      write_detection(call, image, static_cast<int>(place), box, window, key, pair_of(params, key));
    }
    if (after.found < most) {
      uint32_t at = before.num_kept + __popc(shared.kept_bits[warp] & ((1u << lane) - 1));
      for (int k = 0; k < warp; ++k) at += __popc(shared.kept_bits[k]);
      reinterpret_cast<float4 *>(space.kept_boxes)[at] = corners;
      space.kept_group[at] = static_cast<int32_t>(own.z & kGroupBits);
    }
  }
}

// All detections of an image, whatever it takes. Called by all threads of all blocks.
template <typename T, int kConverter>
__device__ __noinline__ void settle_together(int image, float share, Tail &shared) {
  const Call &call = shared.call;
  const Workspace &space = shared.space;
  const Box &window = shared.window;
  const odtrt_postprocess_params &params = call.params;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  const int ranks = cluster_size(), rank = cluster_rank();
  constexpr int kWarps = kTailThreads / 32;
  uint32_t bound = 0;
  if (thread == 0) {
    shared.size = shared.bound = 0;
    shared.status = {0, 0, 0};
  }
  __syncthreads();
  cluster_arrive();
  for (int i = thread; i < call.num_slots; i += kTailThreads) bound = max(bound, __ldcg(space.slot_bounds + i));
  bound = warp_max(bound);
  if (lane == 0) atomicMax(&shared.bound, bound);
  __syncthreads();
  bound = shared.bound;

  bool is_too_many = bound == kTooMany;
  if (!is_too_many) {
    const uint64_t least = max(uint64_t{1}, static_cast<uint64_t>(bound) << 32);
    const int own_slots = (call.num_slots - rank + ranks - 1) / ranks;
#pragma unroll 4
    for (int i = thread; i < (own_slots * kSlot + 31) / 32 * 32; i += kTailThreads) {
      const uint64_t key = __ldcg(reinterpret_cast<const unsigned long long *>(space.gathered) +
                                  (rank + i / kSlot * ranks) * kSlot + i % kSlot);
      take_candidate(shared, key >= least, key);
    }
  }
  __syncthreads();
  is_too_many |= shared.size > kHeld;

  auto decode_own = [&](int size) {
    for (int i = thread; i < size; i += kTailThreads) {
      const Decoded candidate = decode_candidate<T>(call, image, window, share, key_of(shared.own[i]));
      shared.own_boxes[i] = candidate.box;
      shared.own[i] = candidate.info;
      shared.is_alive[i] = 1;
    }
  };

  Head head{0, kConverter == ODTRT_IDENTITY ? ~0ull : (ordered(1.0f) + 1ull) << 32, kRowsMost, 0, true, false};
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
        const uint64_t least = max(head.low, static_cast<uint64_t>(ordered(params.score_threshold)) << 32);
        const Selection selection =
            select(shared, {least, max(least, high)}, 1, kBatch, ~0u, parity, [&](auto visit) {
              for (int i = thread; i < static_cast<int>(own_count); i += kTailThreads) {
                if (shared.is_alive[i]) visit(key_of(shared.own[i]));
              }
            });
        low = selection.low;
        size = selection.in_all;
        before = selection.before;
      }
      if (thread == 0) shared.num_selected = shared.num_alive = 0;
      __syncthreads();
      for (int i = thread; i < static_cast<int>(own_count); i += kTailThreads) {
        if (shared.is_alive[i] && key_of(shared.own[i]) >= low) {
          shared.is_alive[i] = 0;
          shared.list[atomicAdd(&shared.num_selected, 1u)] = static_cast<uint16_t>(i);
        }
      }
      __syncthreads();
      const int selected = static_cast<int>(shared.num_selected), log = __ffs(ranks) - 1;
      for (int i = thread; i < selected << log; i += kTailThreads) {
        const int own = shared.list[i >> log], place = static_cast<int>(before) + (i >> log),
                  to = i & (ranks - 1);
        *in_block(&shared.batch_boxes[place], to) = shared.own_boxes[own];
        *in_block(&shared.batch[place], to) = shared.own[own];
      }
      __syncwarp();
      sync_cluster();
      // mark
      for (int row = rank + ranks * warp; row < static_cast<int>(size); row += ranks * kWarps) {
        const float4 own_corners = shared.batch_boxes[row];
        const Box own = box_from(own_corners);
        const uint4 own_info = shared.batch[row];
        const uint64_t own_key = key_of(own_info);
        const float own_area = float_of(own_info.w);
        uint32_t of_lane = 0, own_rank = 0, unclear = 0;  // a bit for each word of columns
#pragma unroll
        for (int k = 0; k < kBatchWords; ++k) {
          const int column = 32 * k + lane;
          const Box other = box_from(shared.batch_boxes[column]);
          const uint4 info = shared.batch[column];
          const bool is_better = column < static_cast<int>(size) && key_of(info) > own_key;
          const bool is_rival = is_better && is_same_group(info, own_info);
          const Verdict verdict = judge(other, float_of(info.w), own, own_area);
          const uint32_t word = __ballot_sync(0xffffffffu, is_rival && verdict.surely);
          unclear |= static_cast<uint32_t>(is_rival && verdict.perhaps) << k;
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
      // settle
      if (rank == 0) {
        settle_batch_of<T>(call, space, image, shared, window, static_cast<int>(size));
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
      for (int start = 0; start < static_cast<int>(own_count); start += kTailThreads / 4) {
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
            const Verdict verdict = judge(box_from(shared.kept_boxes[k]), float_of(info.w), own, own_area);
            is_dead |= is_same_group(info, own_info) && verdict.surely;
            is_unclear |= is_same_group(info, own_info) && verdict.perhaps;
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
  if (rank == 0) write_padding(call, image, static_cast<int>(shared.status.found));
}

}  // namespace
}  // namespace odtrt

// The first algorithm of suppress_in_cluster: each block of the cluster owns some classes.
//
// Boxes of different classes never suppress one another. So each block suppresses the candidates of its classes
// alone, with no barrier but its own. It does this in batches of the best 64 candidates that are left:
//   select     finds the batch by a histogram select, and moves it to an array of its own;
//   sort       puts it in the final order;
//   mask       computes which candidates of the batch are rivals;
//   suppress   decides which of them are kept;
//   filter     drops the other candidates that these suppress, at the start of the next batch.
// The best 24 suppress nearly as much as the best 64, with a seventh of the comparisons. So a block that has some
// hundred candidates begins with a batch of 24.
//
// After every two batches the blocks exchange what they found and the
// key down to which they have decided everything (the frontier). When max_total_detections of the found boxes are
// better than all undecided candidates of all blocks, each block writes its own detections to their final places. As
// soon as so many are found at all, the blocks skip candidates that are worse than the worst of them.
//
// Data that is read often is a kernel argument or lies in shared memory. A barrier of the cluster empties the L1 cache,
// and a function that is not inlined would read its arguments through that.
//
// If a block's classes have more candidates than it can hold, if a class passes its cap, or if too few detections are
// above the bound, this algorithm returns false, and all blocks start again with postprocess_cluster_global.cuh.
#pragma once

#include <cuda_pipeline.h>

#include "postprocess_cluster.cuh"

namespace odtrt {
namespace {

constexpr int kMaxSlotsOfBlock = 64;  // that one block reads
constexpr int kMaxOwned = 2048;       // candidates of one block's classes
constexpr int kMaxReceived = 4096;    // places for them; each sending block has an equal share
constexpr int kPerClassBatch = 64;    // candidates of a batch
// Candidates of the first batch, if the block has more than kPerClassBatch and at most kMaxForFirstBatch.
constexpr int kFirstPerClassBatch = 24;
constexpr int kMaxForFirstBatch = 512;
constexpr int kMaxMerged = 128;      // detections of an image at most
constexpr int kCountedClasses = 64;  // of a block; those beyond share the last counter
constexpr int kBatchesOfRound = 2;
constexpr int kDecodedAtOnce = 2;  // by a thread
constexpr int kMinGroups = 8;      // with fewer, most blocks would be idle
static_assert(kMaxOwned % kClusterThreads == 0 && kMaxOwned / kClusterThreads <= 32,
              "OwnCandidates::alive has a bit for each candidate of a thread");

// What a block tells the others after each round.
struct Report {
  uint32_t size, is_capped;  // detections so far; whether this algorithm cannot go on
  uint64_t frontier;         // all candidates with keys from here up are decided; 0: all candidates are
};

struct PerClassShared {
  float4 received_boxes[kMaxReceived];  // the other blocks write these two and the next three
  uint4 received_infos[kMaxReceived];
  uint32_t received_counts[kMaxRanks];    // how many candidates each block sent
  uint64_t lists[kMaxRanks][kMaxMerged];  // what each block found, best first
  Report reports[2][kMaxRanks];
  union {
    struct {
      uint64_t slots[kMaxSlotsOfBlock * kSlotSize];
      uint64_t staged[kMaxSlotsOfBlock * kSlotSize];
    };
    struct {  // after the candidates were sent
      float4 boxes[kMaxOwned];
      uint4 infos[kMaxOwned];
    };
  };
  uint4 found[kMaxMerged];
  float4 found_boxes[kMaxMerged];
  float4 batch_boxes[kPerClassBatch];
  uint4 batch[kPerClassBatch];
  uint4 unsorted[kPerClassBatch];  // the batch before it is sorted
  float4 unsorted_boxes[kPerClassBatch];
  uint2 rivals[kPerClassBatch];
  // The kernel clears everything from here to end_of_cleared.
  alignas(16) uint32_t spans[3][kSpans];
  uint32_t cursors[3];
  uint32_t sent_counts[kMaxRanks];  // candidates that this block sends to each block
  uint32_t held[kCountedClasses];   // kept candidates of each class; the last: of all further classes
  uint2 kept_of[kCountedClasses];   // the kept candidates of each class in the batch, a bit each
  uint32_t num_staged, bound;
  int span;  // select_batch: the span that was selected
  bool is_span_empty;
  uint32_t num_found, num_kept;  // of the batch
  // Of what all blocks found, in alternating rounds: how many lie in each span of scores, and how many are above the
  // frontier.
  alignas(16) uint32_t spans_of_found[2][kSpans];
  uint32_t num_above[2];
  uint32_t end_of_cleared;
};

// A block's candidates. Each of its threads has a copy of this, which differs only in `alive`.
struct OwnCandidates {
  int count, log_parts;     // 1 << log_parts threads share a candidate
  uint32_t alive;           // a bit for each candidate of this thread that is not decided
  uint32_t found, kept;     // detections and kept candidates so far
  int turn, batches;        // turn: which of the three `spans`; batches so far
  uint64_t min_key, low;    // no candidate has a key below min_key; all with keys from low up are decided
  bool is_done, is_capped;  // nothing is left to do; a class has reached its cap
};

// Returns the key from which up this block's next batch lies: its best undecided candidates, max_batch at most.
// Before the call, shared.spans[own.turn] has the counts of those with keys from own.min_key to own.low. All threads
// call this.
__device__ __forceinline__ uint64_t select_batch(PerClassShared &shared, OwnCandidates &own,
                                                 uint32_t max_batch) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  Range range{own.min_key, own.low - 1};
#pragma unroll 1
  for (;;) {
    if (warp_id() == 0) {
      // The lowest span such that it and all above have no more than max_batch, and whether that is none at all.
      const uint4 sums = sums_of_spans(shared.spans[own.turn]);
      const int too_many =
          (sums.x > max_batch) + (sums.y > max_batch) + (sums.z > max_batch) + (sums.w > max_batch);
      const int lanes = __popc(__ballot_sync(0xffffffffu, too_many == 4));
      if (lane == lanes) {
        shared.span = 4 * lane + too_many;
        shared.is_span_empty = (too_many == 0   ? sums.x
                                : too_many == 1 ? sums.y
                                : too_many == 2 ? sums.z
                                                : sums.w) == 0;
      } else if (lanes == 32 && lane == 0) {
        shared.span = kSpans;
        shared.is_span_empty = true;
      }
    }
    own.turn = own.turn == 2 ? 0 : own.turn + 1;
    uint32_t *const next = shared.spans[own.turn];
    if (thread / kSpans == 1) shared.spans[own.turn == 2 ? 0 : own.turn + 1][thread % kSpans] = 0;
    __syncthreads();
    const int span = shared.span;
    const int shift = shift_of(range);
    if (span == 0 || !shared.is_span_empty) return range.low + (static_cast<uint64_t>(span) << shift);
    range = span_of(range, span - 1, shift);
    const int narrow_shift = shift_of(range), step = kClusterThreads >> own.log_parts;
    const bool counts = (thread & ((1 << own.log_parts) - 1)) == 0;
#pragma unroll 1
    for (int i = thread >> own.log_parts, c = 0; i < own.count && counts; i += step, ++c) {
      if (!(own.alive >> c & 1)) continue;
      const uint64_t key = key_of(shared.infos[i]);
      if (key >= range.low && key <= range.high) atomicAdd(&next[(key - range.low) >> narrow_shift], 1u);
    }
    __syncthreads();
  }
}

// Decides about the best kPerClassBatch of this block's undecided candidates. All threads call this.
__device__ __forceinline__ void suppress_batch(const Call &call, PerClassShared &shared, OwnCandidates &own) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int first = thread >> own.log_parts, step = kClusterThreads >> own.log_parts;
  const int part = thread & ((1 << own.log_parts) - 1);
  const uint32_t max_detections = static_cast<uint32_t>(call.params.max_total_detections);
  const float iou_threshold = call.params.iou_threshold;
  const int log_ranks = __ffs(cluster_size()) - 1;
  auto class_of = [log_ranks](const uint4 &info) {
    return min(static_cast<int>(info.z & kGroupBits) >> log_ranks, kCountedClasses - 1);
  };
  auto is_suppressed_by = [&](const uint4 &info, const float4 &corners, const uint4 &own_info,
                              const float4 &own_corners) {
    const OverlapTest test =
        test_overlap(box_from(corners), float_of(info.w), box_from(own_corners), float_of(own_info.w));
    return is_same_group(info, own_info) &&
           (test.certain || (test.possible && is_suppressed(corners, own_corners, iou_threshold)));
  };
  if (own.batches > 0) {
    // filter: drop what the last batch suppresses, and count the rest
    const uint32_t own_share = own.log_parts == 0   ? ~0u
                               : own.log_parts == 1 ? 0x55555555u << part
                                                    : 0x11111111u << part;
    const int shift = shift_of({own.min_key, own.low - 1});
#pragma unroll 1
    for (int start = 0, c = 0; start < own.count; start += step, ++c) {
      const bool is_alive = own.alive >> c & 1;
      bool is_dead = false;
      uint64_t key = 0;
      if (is_alive) key = key_of(shared.infos[start + first]);
      if (key < own.min_key) {
        is_dead = true;
      } else {
        const float4 own_corners = shared.boxes[start + first];
        const uint4 own_info = shared.infos[start + first];
        const uint2 kept_of = shared.kept_of[class_of(own_info)];
        uint64_t rest = static_cast<uint64_t>(kept_of.y & own_share) << 32 | (kept_of.x & own_share);
#pragma unroll 1
        while (rest != 0) {  // two at a time; the last one twice if their number is odd
          const int k = __ffsll(static_cast<long long>(rest)) - 1;
          rest &= rest - 1;
          const int next = rest != 0 ? __ffsll(static_cast<long long>(rest)) - 1 : k;
          rest &= rest - 1;
          const uint4 info = shared.batch[k], next_info = shared.batch[next];
          const float4 corners = shared.batch_boxes[k], next_corners = shared.batch_boxes[next];
          is_dead |= is_suppressed_by(info, corners, own_info, own_corners);
          is_dead |= is_suppressed_by(next_info, next_corners, own_info, own_corners);
        }
      }
      unsigned dead = __ballot_sync(0xffffffffu, is_dead);
      if (own.log_parts == 1)
        dead = dead >> (lane & 30) & 3;
      else if (own.log_parts == 2)
        dead = dead >> (lane & 28) & 15;
      else
        dead = is_dead;
      if (dead != 0)
        own.alive &= ~(1u << c);
      else if (part == 0)
        atomicAdd(&shared.spans[own.turn][(key - own.min_key) >> shift], 1u);
    }
    __syncthreads();
  }
  const uint32_t max_batch = own.batches == 0 && own.count > kPerClassBatch && own.count <= kMaxForFirstBatch
                                 ? kFirstPerClassBatch
                                 : kPerClassBatch;
  const bool are_all = own.batches == 0 && own.count <= static_cast<int>(max_batch);
  const uint64_t low = are_all ? own.min_key : select_batch(shared, own, max_batch);
  // move the batch to an array of its own
  const int cursor = own.batches % 3;
#pragma unroll 1
  for (int i = first, c = 0; i < own.count; i += step, ++c) {
    if (!(own.alive >> c & 1)) continue;
    const uint4 info = shared.infos[i];
    if (key_of(info) < low) continue;
    own.alive &= ~(1u << c);
    if (part != 0) continue;
    const uint32_t at = atomicAdd(&shared.cursors[cursor], 1u);
    shared.unsorted[at] = info;
    shared.unsorted_boxes[at] = shared.boxes[i];
  }
  __syncthreads();
  const int size = static_cast<int>(shared.cursors[cursor]);
  ++own.batches;
  if (thread == 0) shared.cursors[own.batches % 3 == 2 ? 0 : own.batches % 3 + 1] = 0;
  own.low = low;
  own.is_done = low == own.min_key;
  if (thread < kCountedClasses) shared.kept_of[thread] = make_uint2(0, 0);
  // sort: eight threads a candidate
  const int row = thread / 8;
  if (row - lane / 8 < size) {  // for any of the warp's rows
    const uint4 own_info = shared.unsorted[row];
    uint32_t place = 0;
#pragma unroll
    for (int k = 0; k < kPerClassBatch / 8; ++k) {
      const int other = 8 * k + thread % 8;
      place += other < size && key_of(shared.unsorted[other]) > key_of(own_info);
    }
#pragma unroll
    for (int offset = 1; offset < 8; offset <<= 1) place += __shfl_xor_sync(0xffffffffu, place, offset);
    if (row < size && thread % 8 == 0) shared.batch[place] = own_info;
    if (row < size && thread % 8 == 1) shared.batch_boxes[place] = shared.unsorted_boxes[row];
  }
  __syncthreads();
  // mask: each half of a warp takes a row from the end and one from the beginning. Together these two have
  // kPerClassBatch - 1 better rows, so that all halves have the same work.
#pragma unroll
  for (int end = 1; end >= 0; --end) {
    const int half = thread / 16, part_of_row = thread % 16, own_row = end ? kPerClassBatch - 1 - half : half;
    const int of_warp = end ? kPerClassBatch - 1 - half / 2 * 2 : half | 1;  // the longer of the warp's two rows
    const bool is_row = own_row < size;
    if (!__any_sync(0xffffffffu, is_row)) continue;
    const uint4 own_info = shared.batch[own_row];
    const float4 own_corners = shared.batch_boxes[own_row];
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < (end ? 4 : 2); ++k) {
      if (16 * k >= of_warp) break;
      const int column = 16 * k + part_of_row;
      const bool is_rival =
          is_row && column < own_row &&
          is_suppressed_by(shared.batch[column], shared.batch_boxes[column], own_info, own_corners);
      const unsigned vote = __ballot_sync(0xffffffffu, is_rival) >> (lane & 16) & 0xffffu;
      words[k / 2] |= vote << 16 * (k % 2);
    }
    if (is_row && part_of_row == 0) shared.rivals[own_row] = make_uint2(words[0], words[1]);
  }
  __syncthreads();
  // suppress: two candidates a lane, `low` and `high`
  if (const int half = warp_id(); half < 2) {  // both warps decide the same, and each writes one half
    struct Two {
      uint32_t low, high;
    };
    const bool is_low = lane < size, is_high = lane + 32 < size;
    const uint2 low_rivals = shared.rivals[lane], high_rivals = shared.rivals[lane + 32];
    bool low_open = is_low, high_open = is_high;
    Two open{__ballot_sync(0xffffffffu, is_low), __ballot_sync(0xffffffffu, is_high)}, kept{0, 0};
    auto is_hit = [](const uint2 &rivals, const Two &among) {
      return ((rivals.x & among.low) | (rivals.y & among.high)) != 0;
    };
#pragma unroll 1
    while ((open.low | open.high) != 0) {
      const bool low_stays = low_open && !is_hit(low_rivals, open),
                 high_stays = high_open && !is_hit(high_rivals, open);
      const Two stays{__ballot_sync(0xffffffffu, low_stays), __ballot_sync(0xffffffffu, high_stays)};
      kept.low |= stays.low;
      kept.high |= stays.high;
      low_open = low_open && !low_stays && !is_hit(low_rivals, stays);
      high_open = high_open && !high_stays && !is_hit(high_rivals, stays);
      open = {__ballot_sync(0xffffffffu, low_open), __ballot_sync(0xffffffffu, high_open)};
    }
    const Two found{
        __ballot_sync(0xffffffffu, (kept.low >> lane & 1) && (shared.batch[lane].z & kVisible)),
        __ballot_sync(0xffffffffu, (kept.high >> lane & 1) && (shared.batch[lane + 32].z & kVisible))};
    const int i = lane + 32 * half;
    const uint4 info = shared.batch[i];
    const uint32_t own_found = half == 0 ? found.low : found.high;
    const uint32_t place = own.found + static_cast<uint32_t>((half == 0 ? 0 : __popc(found.low)) +
                                                             __popc(own_found & ((1u << lane) - 1)));
    if ((own_found >> lane & 1) && place < max_detections) {
      shared.found[place] = info;
      shared.found_boxes[place] = shared.batch_boxes[i];
    }
    if ((half == 0 ? kept.low : kept.high) >> lane & 1) {
      uint2 &kept_of = shared.kept_of[class_of(info)];
      atomicAdd(&shared.held[class_of(info)], 1u);
      atomicOr(half == 0 ? &kept_of.x : &kept_of.y, 1u << lane);
    }
    if (thread == 0) {
      shared.num_found = static_cast<uint32_t>(__popc(found.low) + __popc(found.high));
      shared.num_kept = static_cast<uint32_t>(__popc(kept.low) + __popc(kept.high));
    }
  }
  __syncthreads();
  own.found += shared.num_found;
  own.kept += shared.num_kept;
  // No class can pass its cap before all classes together have kept so many. And the cap does not matter if enough are
  // found by then.
  const uint32_t cap = static_cast<uint32_t>(call.cap);
  if (own.kept > cap && cap < max_detections + (own.kept - own.found)) {
    uint32_t largest = 0;
    for (int i = 0; i < kCountedClasses; ++i) largest = max(largest, shared.held[i]);
    own.is_capped = largest > cap;
  }
  own.is_done |= own.is_capped || own.found >= max_detections;
}

// How many keys of a descending list are better than `key`, by binary search.
__device__ __forceinline__ uint32_t count_better(const uint64_t *list, uint32_t size, uint64_t key) {
  uint32_t place = 0;
#pragma unroll 1
  while (place < size) {
    const uint32_t middle = (place + size) / 2;
    if (list[middle] > key)
      place = middle + 1;
    else
      size = middle;
  }
  return place;
}

// How many keys of all lists are better than `key`. Each half of a warp has a key; each of its lanes searches one
// list, of the given size.
__device__ __forceinline__ uint32_t count_better_of_all(const PerClassShared &shared, uint32_t size,
                                                        uint64_t key) {
  uint32_t count = count_better(shared.lists[lane_id() % kMaxRanks], size, key);
#pragma unroll
  for (int offset = 1; offset < kMaxRanks; offset <<= 1) count += __shfl_xor_sync(0xffffffffu, count, offset);
  return count;
}

// Whether max_detections of the found keys are above the frontier, and thus better than all undecided candidates. If
// not, it raises own.min_key: candidates below the max_detections-th best key that was found cannot become
// detections. It computes that bound roughly, from a histogram between the worst found key and the frontier. The
// lists together have at least max_detections keys. Lane l has the size of list l. All threads of all blocks call
// this and get the same answer.
__device__ __forceinline__ bool is_enough(PerClassShared &shared, uint32_t size_of_list, uint64_t frontier,
                                          uint32_t max_detections, int parity, OwnCandidates &own) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  uint32_t *const spans = shared.spans_of_found[parity];
  if (thread < kSpans) shared.spans_of_found[parity ^ 1][thread] = 0;
  if (thread == 0) shared.num_above[parity ^ 1] = 0;
  const uint32_t worst_of_list =
      size_of_list == 0 ? ~0u : static_cast<uint32_t>(shared.lists[lane][size_of_list - 1] >> 32);
  const uint32_t worst = ~warp_max(~worst_of_list), next = static_cast<uint32_t>(frontier >> 32);
  const int shift = shift_for(next > worst ? next - worst : 0, 7);
  static_assert(kSpans == 1 << 7 && kClusterThreads / 32 == kMaxRanks, "each warp counts one list");
  const uint32_t size = __shfl_sync(0xffffffffu, size_of_list, warp_id());
  uint32_t above = 0;
  for (uint32_t start = 0; start < size; start += 32) {
    const bool is_in = start + lane < size;
    const uint64_t key = is_in ? shared.lists[warp_id()][start + lane] : 0;
    above += static_cast<uint32_t>(__popc(__ballot_sync(0xffffffffu, key >= frontier)));
    if (is_in) {
      atomicAdd(&spans[min((static_cast<uint32_t>(key >> 32) - worst) >> shift, kSpans - 1u)], 1u);
    }
  }
  if (lane == 0 && above != 0) atomicAdd(&shared.num_above[parity], above);
  __syncthreads();
  if (shared.num_above[parity] >= max_detections) return true;
  const uint4 sums = sums_of_spans(spans);
  uint32_t low_enough = 0;  // spans that have max_detections keys in them and above
  for (const uint32_t sum : {sums.x, sums.y, sums.z, sums.w})
    low_enough += static_cast<uint32_t>(__popc(__ballot_sync(0xffffffffu, sum >= max_detections)));
  const uint32_t enough = worst + ((low_enough - 1) << shift);
  own.min_key = max(own.min_key, static_cast<uint64_t>(enough) << 32);
  own.is_done |= own.low <= own.min_key;
  return false;
}

// Writes all detections of an image and returns true, or returns false if it cannot. All threads of all blocks call
// this and get the same answer.
template <typename T, int kConverter>
__device__ __forceinline__ bool suppress_per_class(const Call &call, const Workspace &space, int image,
                                                   const Box &window, float union_fraction,
                                                   PerClassShared &shared) {
  const odtrt_postprocess_params &params = call.params;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int ranks = cluster_size(), rank = cluster_rank();

  // Load the slots that select_candidates wrote, and the highest of their bounds.
  const int own_slots = (call.num_slots - rank + ranks - 1) / ranks;
#pragma unroll 1
  for (int i = 2 * thread; i < own_slots * kSlotSize; i += 2 * kClusterThreads) {
    __pipeline_memcpy_async(&shared.slots[i],
                            &space.collected[(rank + i / kSlotSize * ranks) * kSlotSize + i % kSlotSize], 16);
  }
  __pipeline_commit();
  static_assert(kMaxSlots <= 2 * kClusterThreads, "two each");
  const int last_slot = call.num_slots - 1;
  uint32_t bound = warp_max(max(__ldcg(space.slot_bounds + min(thread, last_slot)),
                                __ldcg(space.slot_bounds + min(thread + kClusterThreads, last_slot))));
  if (lane == 0 && bound != 0) atomicMax(&shared.bound, bound);
  __pipeline_wait_prior(0);
  __syncthreads();
  bound = shared.bound;
  if (bound == kTooMany) {  // all blocks see this
    cluster_wait();
    return false;
  }
  const uint64_t min_key = max(uint64_t{1}, static_cast<uint64_t>(bound) << 32);
  constexpr int kEach = 8;
#pragma unroll 1
  for (int start = thread; start - thread < own_slots * kSlotSize; start += kClusterThreads * kEach) {
    unsigned is_in = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = start + k * kClusterThreads;
      if (i < own_slots * kSlotSize) is_in |= static_cast<unsigned>(shared.slots[i] >= min_key) << k;
    }
    const uint32_t sum = warp_inclusive_scan(static_cast<uint32_t>(__popc(is_in)));
    uint32_t at = 0;
    if (lane == 31 && sum != 0) at = atomicAdd(&shared.num_staged, sum);
    at = __shfl_sync(0xffffffffu, at, 31) + sum - __popc(is_in);
#pragma unroll 1
    for (; is_in != 0; is_in &= is_in - 1) {
      shared.staged[at++] = shared.slots[start + (__ffs(static_cast<int>(is_in)) - 1) * kClusterThreads];
    }
  }
  __syncthreads();
  // Send each candidate to the block that owns its class. That block has `room` places for each sender.
  const int num_staged = static_cast<int>(shared.num_staged), room = kMaxReceived / ranks,
            log = __ffs(ranks) - 1;
  bool has_waited = false;
#pragma unroll 1
  for (int start = thread; start - thread < num_staged; start += kDecodedAtOnce * kClusterThreads) {
    uint64_t keys[kDecodedAtOnce];
    Pair pairs[kDecodedAtOnce];
    EncodedBox boxes[kDecodedAtOnce];  // loads that are in flight
#pragma unroll
    for (int k = 0; k < kDecodedAtOnce; ++k) {
      const int i = start + k * kClusterThreads;
      if (i >= num_staged) continue;
      keys[k] = shared.staged[i];
      pairs[k] = pair_of(params, keys[k]);
      boxes[k] = encoded_box_of<T>(call, image, pairs[k].anchor);
    }
#pragma unroll
    for (int k = 0; k < kDecodedAtOnce; ++k) {
      const int i = start + k * kClusterThreads;
      if (i - lane >= num_staged) break;  // the whole warp is past the end
      Decoded candidate{};
      if (i < num_staged)
        candidate = decode_candidate(call, window, union_fraction, keys[k], pairs[k], boxes[k]);
      if (!has_waited) cluster_wait();  // until all other blocks run
      has_waited = true;
      // One atomic addition reserves places for all lanes of the warp that send to the same block.
      const int owner = i < num_staged ? static_cast<int>(candidate.info.z & kGroupBits) & (ranks - 1) : -1;
      const unsigned peers = __match_any_sync(0xffffffffu, owner);
      const int leader = __ffs(static_cast<int>(peers)) - 1;
      uint32_t base = 0;
      if (lane == leader && owner >= 0)
        base = atomicAdd(&shared.sent_counts[owner], static_cast<uint32_t>(__popc(peers)));
      base = __shfl_sync(0xffffffffu, base, leader);
      const int at = static_cast<int>(base) + __popc(peers & ((1u << lane) - 1));
      if (owner < 0 || at >= room) continue;
      *in_block(&shared.received_boxes[rank * room + at], owner) = candidate.box;
      *in_block(&shared.received_infos[rank * room + at], owner) = candidate.info;
    }
  }
  if (!has_waited) cluster_wait();
  __syncthreads();
  if (thread < ranks) *in_block(&shared.received_counts[rank], thread) = shared.sent_counts[thread];
  __syncwarp();
  sync_cluster();
  // Each warp copies what one block sent into the dense arrays `boxes` and `infos`, and counts it in the spans.
  OwnCandidates own{};
  own.min_key = max(min_key, static_cast<uint64_t>(ordered(params.score_threshold)) << 32);
  own.low = kConverter == ODTRT_IDENTITY ? ~0ull : (ordered(1.0f) + 1ull) << 32;
  const int shift = shift_of({own.min_key, own.low - 1});
  bool is_too_many = false;
  int count;
  {
    const int of_lane = lane < ranks ? static_cast<int>(shared.received_counts[lane]) : 0;
    count = static_cast<int>(warp_sum(static_cast<uint32_t>(of_lane)));
    is_too_many = __any_sync(0xffffffffu, of_lane > room) || count > kMaxOwned;
    for (int r = warp_id(); r < ranks && !is_too_many; r += kClusterThreads / 32) {
      const int base = static_cast<int>(warp_sum(static_cast<uint32_t>(lane < r ? of_lane : 0)));
      const int size = __shfl_sync(0xffffffffu, of_lane, r);
#pragma unroll 1
      for (int i = lane; i < size; i += 32) {
        shared.boxes[base + i] = shared.received_boxes[r * room + i];
        const uint4 info = shared.received_infos[r * room + i];
        shared.infos[base + i] = info;
        atomicAdd(&shared.spans[0][(key_of(info) - own.min_key) >> shift], 1u);
      }
    }
  }
  __syncthreads();
  own.count = is_too_many ? 0 : count;
  own.log_parts = own.count <= kClusterThreads / 4 ? 2 : own.count <= kClusterThreads / 2 ? 1 : 0;
  for (int i = thread >> own.log_parts, c = 0; i < own.count; i += kClusterThreads >> own.log_parts, ++c)
    own.alive |= 1u << c;
  own.is_capped = is_too_many;
  own.is_done = own.is_capped || own.count == 0;
  const uint32_t max_detections = static_cast<uint32_t>(params.max_total_detections);
  uint32_t sent = 0, own_size, total, size_of_list;
  // In each round a block decides about some batches, then tells all blocks what it found and its frontier. The
  // rounds end when no block can find a better detection any more.
#pragma unroll 1
  for (int round = 0;; ++round) {
#pragma unroll 1
    for (int batch = 0; batch < kBatchesOfRound && !own.is_done; ++batch) suppress_batch(call, shared, own);
    own_size = min(own.found, max_detections);
    for (uint32_t i = sent + (thread >> log); i < own_size;
         i += static_cast<uint32_t>(kClusterThreads >> log)) {
      *in_block(&shared.lists[rank][i], thread & (ranks - 1)) = key_of(shared.found[i]);
    }
    sent = own_size;
    if (thread < ranks) {
      Report report{own_size, own.is_capped, own.is_done ? 0 : own.low};
      if (own.found >= max_detections) report.frontier = key_of(shared.found[max_detections - 1]);
      *in_block(&shared.reports[round & 1][rank], thread) = report;
    }
    __syncwarp();
    sync_cluster();
    const Report report = lane < ranks ? shared.reports[round & 1][lane] : Report{0, 0, 0};
    if (__any_sync(0xffffffffu, report.is_capped)) return false;
    size_of_list = report.size;  // of this lane's list
    total = warp_sum(size_of_list);
    if (!__any_sync(0xffffffffu, report.frontier != 0)) break;
    const uint64_t frontier = warp_max(report.frontier);
    if (total >= max_detections && is_enough(shared, size_of_list, frontier, max_detections, round & 1, own))
      break;
  }
  if (bound != 0 && total < max_detections) return false;
  // A detection's place is the number of better ones in all lists.
  const uint32_t list_size = __shfl_sync(0xffffffffu, size_of_list, lane % kMaxRanks);
  for (uint32_t start = 0; start < own_size; start += kClusterThreads / kMaxRanks) {
    const uint32_t item = start + static_cast<uint32_t>(thread / kMaxRanks);
    if (__all_sync(0xffffffffu, item >= own_size)) break;
    const uint4 info = shared.found[min(item, own_size - 1)];
    const uint64_t key = key_of(info);
    const uint32_t place = count_better_of_all(shared, list_size, key);
    if (lane % kMaxRanks == 0 && item < own_size && place < max_detections) {
      const int label = static_cast<int>(info.z & kGroupBits);
      const Pair pair{static_cast<int32_t>(place_of(key)) - label * params.num_anchors, label};
      const Box box =
          info.z & kIsDecoded ? box_from(shared.found_boxes[item]) : box_of<T>(call, image, pair.anchor);
      write_detection(call, image, static_cast<int>(place), box, window, key, pair);
    }
    if (__all_sync(0xffffffffu, place >= max_detections)) break;  // the block's next ones are worse
  }
  if (rank == 0) write_padding<kClusterThreads>(call, image, static_cast<int>(min(total, max_detections)));
  return true;
}

}  // namespace
}  // namespace odtrt

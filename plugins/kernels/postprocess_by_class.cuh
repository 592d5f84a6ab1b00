// settle, the first way: class by class.
//
// Boxes of different classes do not meet. So each block of the cluster takes some classes and settles them alone, with
// no barrier but its own: the best 64 candidates at a time (select), best first (sort), who would suppress whom among
// them (mark), who stays (settle), and, before the next batch, what these suppress of the rest (filter). The best 24
// suppress nearly as much as the best 64, and take a seventh of the comparisons, so a block with some hundred
// candidates begins with so many. After two batches all exchange what they found and how far they have come; once
// max_total_detections are better than anything that is still undecided, each block writes its own detections where
// they belong. Once as many were found at all, who is behind settles no more than what is better than the worst of
// them.
//
// What is read again and again is an argument of the kernel itself, or in shared memory: a barrier of the cluster
// empties the L1 cache, and a called function would read its arguments from there.
//
// It gives up, and all blocks begin anew the second way (postprocess_together.cuh), where a block's classes have more
// candidates than it holds, where a class passes its cap, and where too few detections are above the bound.
#pragma once

#include <cuda_pipeline.h>

#include "postprocess_candidates.cuh"

namespace odtrt {
namespace {

constexpr int kMostSlots = 64;   // that one block reads
constexpr int kShare = 2048;     // candidates of one block's classes
constexpr int kSent = 4096;      // of them with room to spare
constexpr int kFew = 64;         // candidates that are settled together
constexpr int kFewAtFirst = 24;  // the first time, of a block that has more than kFew and no more than kMany
constexpr int kMany = 512;
constexpr int kMostMerged = 128;
constexpr int kCounted = 64;
constexpr int kBatchesOfRound = 2;
constexpr int kDecodedAtOnce = 2;  // by a thread
constexpr int kFewGroups = 8;      // fewer are not worth it
static_assert(kShare % kTailThreads == 0 && kShare / kTailThreads <= 32,
              "a bit for each candidate of a thread");

struct Report {
  uint32_t size, is_capped;  // detections so far; whether it has given up
  uint64_t frontier;         // key from which on these are all; 0: these are all
};

struct ByClass {
  float4 sent_boxes[kSent];  // these two written by the other blocks: of each some
  uint4 sent_infos[kSent];
  uint32_t from[kMostRanks];                // how many it sent; as these
  uint64_t lists[kMostRanks][kMostMerged];  // what each block found, best first; written by the other blocks
  Report reports[2][kMostRanks];            // as this
  union {
    struct {
      uint64_t slots[kMostSlots * kSlot];
      uint64_t staged[kMostSlots * kSlot];
    };
    struct {  // then
      float4 boxes[kShare];
      uint4 infos[kShare];
    };
  };
  uint4 found[kMostMerged];
  float4 found_boxes[kMostMerged];
  float4 batch_boxes[kFew];
  uint4 batch[kFew];
  uint4 taken[kFew];  // before they are in order
  float4 taken_boxes[kFew];
  uint2 rivals[kFew];
  // Cleared before, from here on.
  alignas(16) uint32_t spans[3][kSpans];
  uint32_t cursors[3];
  uint32_t to[kMostRanks];  // candidates of this block for each
  uint32_t held[kCounted];  // kept candidates of each class; the last: of all further ones
  uint2 kept_of[kCounted];  // of the batch, a bit each
  uint32_t num_staged, bound;
  int span;  // that was selected
  bool is_span_empty;
  uint32_t num_found, num_kept;  // of the batch
  // Of what all blocks found, by round: how many in each span of grades, and how many from the frontier on.
  alignas(16) uint32_t spans_of_found[2][kSpans];
  uint32_t num_above[2];
  uint32_t end_of_cleared;
};

// A block's candidates, as each of its threads knows them.
struct Own {
  int count, log_parts;     // 1 << log_parts threads share a candidate
  uint32_t alive;           // a bit for each of this thread's candidates
  uint32_t found, kept;     // so far
  int turn, batches;        // of spans, of cursors
  uint64_t least, low;      // keys: of the lowest candidate there can be; all from low on are settled
  bool is_done, is_capped;  // nothing is left to do; a class has reached its cap
};

// The best candidates of this block that are alive, kFew at most, are all with keys from the returned one on. Those
// from own.least to own.low are counted in shared.spans[own.turn]. Called by all threads.
__device__ __forceinline__ uint64_t select_few(ByClass &shared, Own &own, uint32_t few) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  Range range{own.least, own.low - 1};
#pragma unroll 1
  for (;;) {
    if (warp_id() == 0) {
      // The lowest span from which on no more than `few` lie, and whether any do.
      const uint4 sums = sums_of_spans(shared.spans[own.turn]);
      const int too_many = (sums.x > few) + (sums.y > few) + (sums.z > few) + (sums.w > few);
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
    const int narrow_shift = shift_of(range), step = kTailThreads >> own.log_parts;
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

// Settles the best kFew at most of this block's candidates that are alive. Called by all threads.
__device__ __forceinline__ void settle_few(const Call &call, ByClass &shared, Own &own) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int first = thread >> own.log_parts, step = kTailThreads >> own.log_parts;
  const int part = thread & ((1 << own.log_parts) - 1);
  const uint32_t most = static_cast<uint32_t>(call.params.max_total_detections);
  const float iou_threshold = call.params.iou_threshold;
  const int log_ranks = __ffs(cluster_size()) - 1;
  auto class_of = [log_ranks](const uint4 &info) {
    return min(static_cast<int>(info.z & kGroupBits) >> log_ranks, kCounted - 1);
  };
  auto meets = [&](const uint4 &info, const float4 &corners, const uint4 &own_info, const float4 &own_corners) {
    const Verdict verdict =
        judge(box_from(corners), float_of(info.w), box_from(own_corners), float_of(own_info.w));
    return is_same_group(info, own_info) &&
           (verdict.surely || (verdict.perhaps && is_suppressed(corners, own_corners, iou_threshold)));
  };
  if (own.batches > 0) {
    // filter, and count what is left
    const uint32_t own_share = own.log_parts == 0   ? ~0u
                               : own.log_parts == 1 ? 0x55555555u << part
                                                    : 0x11111111u << part;
    const int shift = shift_of({own.least, own.low - 1});
#pragma unroll 1
    for (int start = 0, c = 0; start < own.count; start += step, ++c) {
      const bool is_alive = own.alive >> c & 1;
      bool is_dead = false;
      uint64_t key = 0;
      if (is_alive) key = key_of(shared.infos[start + first]);
      if (key < own.least) {
        is_dead = true;
      } else {
        const float4 own_corners = shared.boxes[start + first];
        const uint4 own_info = shared.infos[start + first];
        const uint2 kept_of = shared.kept_of[class_of(own_info)];
        uint64_t rest = static_cast<uint64_t>(kept_of.y & own_share) << 32 | (kept_of.x & own_share);
#pragma unroll 1
        while (rest != 0) {  // two at a time, or one twice
          const int k = __ffsll(static_cast<long long>(rest)) - 1;
          rest &= rest - 1;
          const int next = rest != 0 ? __ffsll(static_cast<long long>(rest)) - 1 : k;
          rest &= rest - 1;
          const uint4 info = shared.batch[k], next_info = shared.batch[next];
          const float4 corners = shared.batch_boxes[k], next_corners = shared.batch_boxes[next];
          is_dead |= meets(info, corners, own_info, own_corners);
          is_dead |= meets(next_info, next_corners, own_info, own_corners);
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
        atomicAdd(&shared.spans[own.turn][(key - own.least) >> shift], 1u);
    }
    __syncthreads();
  }
  const uint32_t few = own.batches == 0 && own.count > kFew && own.count <= kMany ? kFewAtFirst : kFew;
  const bool are_all = own.batches == 0 && own.count <= static_cast<int>(few);
  const uint64_t low = are_all ? own.least : select_few(shared, own, few);
  // take
  const int cursor = own.batches % 3;
#pragma unroll 1
  for (int i = first, c = 0; i < own.count; i += step, ++c) {
    if (!(own.alive >> c & 1)) continue;
    const uint4 info = shared.infos[i];
    if (key_of(info) < low) continue;
    own.alive &= ~(1u << c);
    if (part != 0) continue;
    const uint32_t at = atomicAdd(&shared.cursors[cursor], 1u);
    shared.taken[at] = info;
    shared.taken_boxes[at] = shared.boxes[i];
  }
  __syncthreads();
  const int size = static_cast<int>(shared.cursors[cursor]);
  ++own.batches;
  if (thread == 0) shared.cursors[own.batches % 3 == 2 ? 0 : own.batches % 3 + 1] = 0;
  own.low = low;
  own.is_done = low == own.least;
  if (thread < kCounted) shared.kept_of[thread] = make_uint2(0, 0);
  // sort: eight threads a candidate
  const int row = thread / 8;
  if (row - lane / 8 < size) {  // any of the warp
    const uint4 own_info = shared.taken[row];
    uint32_t place = 0;
#pragma unroll
    for (int k = 0; k < kFew / 8; ++k) {
      const int other = 8 * k + thread % 8;
      place += other < size && key_of(shared.taken[other]) > key_of(own_info);
    }
#pragma unroll
    for (int offset = 1; offset < 8; offset <<= 1) place += __shfl_xor_sync(0xffffffffu, place, offset);
    if (row < size && thread % 8 == 0) shared.batch[place] = own_info;
    if (row < size && thread % 8 == 1) shared.batch_boxes[place] = shared.taken_boxes[row];
  }
  __syncthreads();
  // mark: each half of a warp has a row from the end and one from the beginning, which have kFew - 1 better rows in all
#pragma unroll
  for (int end = 1; end >= 0; --end) {
    const int half = thread / 16, part_of_row = thread % 16, own_row = end ? kFew - 1 - half : half;
    const int of_warp = end ? kFew - 1 - half / 2 * 2 : half | 1;  // the longer one of the warp's
    const bool is_row = own_row < size;
    if (!__any_sync(0xffffffffu, is_row)) continue;
    const uint4 own_info = shared.batch[own_row];
    const float4 own_corners = shared.batch_boxes[own_row];
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < (end ? 4 : 2); ++k) {
      if (16 * k >= of_warp) break;
      const int column = 16 * k + part_of_row;
      const bool is_rival = is_row && column < own_row &&
                            meets(shared.batch[column], shared.batch_boxes[column], own_info, own_corners);
      const unsigned vote = __ballot_sync(0xffffffffu, is_rival) >> (lane & 16) & 0xffffu;
      words[k / 2] |= vote << 16 * (k % 2);
    }
    if (is_row && part_of_row == 0) shared.rivals[own_row] = make_uint2(words[0], words[1]);
  }
  __syncthreads();
  // settle: two candidates a lane
  if (const int half = warp_id(); half < 2) {  // to write down half of them
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
    if ((own_found >> lane & 1) && place < most) {
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
  // No class can pass its cap before all have kept as many; and none matters where enough were found by then.
  const uint32_t cap = static_cast<uint32_t>(call.cap);
  if (own.kept > cap && cap < most + (own.kept - own.found)) {
    uint32_t largest = 0;
    for (int i = 0; i < kCounted; ++i) largest = max(largest, shared.held[i]);
    own.is_capped = largest > cap;
  }
  own.is_done |= own.is_capped || own.found >= most;
}

// How many of a list, best first, are better than `key`.
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

// How many are better in all lists. A lane a list, of which it gives the size; each half of a warp has a key.
__device__ __forceinline__ uint32_t count_better_of_all(const ByClass &shared, uint32_t size, uint64_t key) {
  uint32_t count = count_better(shared.lists[lane_id() % kMostRanks], size, key);
#pragma unroll
  for (int offset = 1; offset < kMostRanks; offset <<= 1) count += __shfl_xor_sync(0xffffffffu, count, offset);
  return count;
}

// Whether `most` were found of which nothing undecided is better, if so many were found at all. If not, what is worse
// than the worst of them need not be settled: of the spans from there to the frontier, takes the highest that is low
// enough. Lane l has the size of list l. Called by all threads; all get the same answer, in all blocks.
__device__ __forceinline__ bool is_enough(ByClass &shared, uint32_t size_of_list, uint64_t frontier,
                                          uint32_t most, int parity, Own &own) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  uint32_t *const spans = shared.spans_of_found[parity];
  if (thread < kSpans) shared.spans_of_found[parity ^ 1][thread] = 0;
  if (thread == 0) shared.num_above[parity ^ 1] = 0;
  const uint32_t worst_of_list =
      size_of_list == 0 ? ~0u : static_cast<uint32_t>(shared.lists[lane][size_of_list - 1] >> 32);
  const uint32_t worst = ~warp_max(~worst_of_list), next = static_cast<uint32_t>(frontier >> 32);
  const int shift = shift_for(next > worst ? next - worst : 0, 7);
  static_assert(kSpans == 1 << 7 && kTailThreads / 32 == kMostRanks, "a warp a list");
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
  if (shared.num_above[parity] >= most) return true;
  const uint4 sums = sums_of_spans(spans);
  uint32_t low_enough = 0;  // spans
  for (const uint32_t sum : {sums.x, sums.y, sums.z, sums.w})
    low_enough += static_cast<uint32_t>(__popc(__ballot_sync(0xffffffffu, sum >= most)));
  const uint32_t enough = worst + ((low_enough - 1) << shift);
  own.least = max(own.least, static_cast<uint64_t>(enough) << 32);
  own.is_done |= own.low <= own.least;
  return false;
}

// Whether all detections were found and written. Called by all threads of all blocks; all get the same answer.
template <typename T, int kConverter>
__device__ __forceinline__ bool settle_by_class(const Call &call, const Workspace &space, int image,
                                                const Box &window, float share, ByClass &shared) {
  const odtrt_postprocess_params &params = call.params;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int ranks = cluster_size(), rank = cluster_rank();

  // What `find` handed on, and the bound from which on that is all there is.
  const int own_slots = (call.num_slots - rank + ranks - 1) / ranks;
#pragma unroll 1
  for (int i = 2 * thread; i < own_slots * kSlot; i += 2 * kTailThreads) {
    __pipeline_memcpy_async(&shared.slots[i], &space.gathered[(rank + i / kSlot * ranks) * kSlot + i % kSlot],
                            16);
  }
  __pipeline_commit();
  static_assert(kMaxSlots <= 2 * kTailThreads, "two each");
  const int last_slot = call.num_slots - 1;
  uint32_t bound = warp_max(max(__ldcg(space.slot_bounds + min(thread, last_slot)),
                                __ldcg(space.slot_bounds + min(thread + kTailThreads, last_slot))));
  if (lane == 0 && bound != 0) atomicMax(&shared.bound, bound);
  __pipeline_wait_prior(0);
  __syncthreads();
  bound = shared.bound;
  if (bound == kTooMany) {  // everywhere
    cluster_wait();
    return false;
  }
  const uint64_t least = max(uint64_t{1}, static_cast<uint64_t>(bound) << 32);
  constexpr int kEach = 8;
#pragma unroll 1
  for (int start = thread; start - thread < own_slots * kSlot; start += kTailThreads * kEach) {
    unsigned is_in = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = start + k * kTailThreads;
      if (i < own_slots * kSlot) is_in |= static_cast<unsigned>(shared.slots[i] >= least) << k;
    }
    const uint32_t sum = sum_to_lane(static_cast<uint32_t>(__popc(is_in)));
    uint32_t at = 0;
    if (lane == 31 && sum != 0) at = atomicAdd(&shared.num_staged, sum);
    at = __shfl_sync(0xffffffffu, at, 31) + sum - __popc(is_in);
#pragma unroll 1
    for (; is_in != 0; is_in &= is_in - 1) {
      shared.staged[at++] = shared.slots[start + (__ffs(static_cast<int>(is_in)) - 1) * kTailThreads];
    }
  }
  __syncthreads();
  // Each candidate to the block that has its class, which has room for kSent of them in all from each block.
  const int num_staged = static_cast<int>(shared.num_staged), room = kSent / ranks, log = __ffs(ranks) - 1;
  bool is_waited_for = false;
#pragma unroll 1
  for (int start = thread; start - thread < num_staged; start += kDecodedAtOnce * kTailThreads) {
    uint64_t keys[kDecodedAtOnce];
    Pair pairs[kDecodedAtOnce];
    EncodedBox boxes[kDecodedAtOnce];  // on their way
#pragma unroll
    for (int k = 0; k < kDecodedAtOnce; ++k) {
      const int i = start + k * kTailThreads;
      if (i >= num_staged) continue;
      keys[k] = shared.staged[i];
      pairs[k] = pair_of(params, keys[k]);
      boxes[k] = encoded_box_of<T>(call, image, pairs[k].anchor);
    }
#pragma unroll
    for (int k = 0; k < kDecodedAtOnce; ++k) {
      const int i = start + k * kTailThreads;
      if (i - lane >= num_staged) break;  // the whole warp
      Decoded candidate{};
      if (i < num_staged) candidate = decode_candidate(call, window, share, keys[k], pairs[k], boxes[k]);
      if (!is_waited_for) cluster_wait();  // the others are there
      is_waited_for = true;
      // A place among what goes to the same block: one addition for all lanes of the warp that send there.
      const int owner = i < num_staged ? static_cast<int>(candidate.info.z & kGroupBits) & (ranks - 1) : -1;
      const unsigned peers = __match_any_sync(0xffffffffu, owner);
      const int leader = __ffs(static_cast<int>(peers)) - 1;
      uint32_t base = 0;
      if (lane == leader && owner >= 0)
        base = atomicAdd(&shared.to[owner], static_cast<uint32_t>(__popc(peers)));
      base = __shfl_sync(0xffffffffu, base, leader);
      const int at = static_cast<int>(base) + __popc(peers & ((1u << lane) - 1));
      if (owner < 0 || at >= room) continue;
      *in_block(&shared.sent_boxes[rank * room + at], owner) = candidate.box;
      *in_block(&shared.sent_infos[rank * room + at], owner) = candidate.info;
    }
  }
  if (!is_waited_for) cluster_wait();
  __syncthreads();
  if (thread < ranks) *in_block(&shared.from[rank], thread) = shared.to[thread];
  __syncwarp();
  sync_cluster();
  // What a warp's block sent, to where it belongs among all, and counted.
  Own own{};
  own.least = max(least, static_cast<uint64_t>(ordered(params.score_threshold)) << 32);
  own.low = kConverter == ODTRT_IDENTITY ? ~0ull : (ordered(1.0f) + 1ull) << 32;
  const int shift = shift_of({own.least, own.low - 1});
  bool is_too_many = false;
  int count;
  {
    const int of_lane = lane < ranks ? static_cast<int>(shared.from[lane]) : 0;
    count = static_cast<int>(warp_sum(static_cast<uint32_t>(of_lane)));
    is_too_many = __any_sync(0xffffffffu, of_lane > room) || count > kShare;
    for (int r = warp_id(); r < ranks && !is_too_many; r += kTailThreads / 32) {
      const int base = static_cast<int>(warp_sum(static_cast<uint32_t>(lane < r ? of_lane : 0)));
      const int size = __shfl_sync(0xffffffffu, of_lane, r);
#pragma unroll 1
      for (int i = lane; i < size; i += 32) {
        shared.boxes[base + i] = shared.sent_boxes[r * room + i];
        const uint4 info = shared.sent_infos[r * room + i];
        shared.infos[base + i] = info;
        atomicAdd(&shared.spans[0][(key_of(info) - own.least) >> shift], 1u);
      }
    }
  }
  __syncthreads();
  own.count = is_too_many ? 0 : count;
  own.log_parts = own.count <= kTailThreads / 4 ? 2 : own.count <= kTailThreads / 2 ? 1 : 0;
  for (int i = thread >> own.log_parts, c = 0; i < own.count; i += kTailThreads >> own.log_parts, ++c)
    own.alive |= 1u << c;
  own.is_capped = is_too_many;
  own.is_done = own.is_capped || own.count == 0;
  const uint32_t most = static_cast<uint32_t>(params.max_total_detections);
  uint32_t sent = 0, own_size, total, size_of_list;
  // Each settles some, and tells all what it found and how far it has come, until enough are found that nobody can
  // still find anything better than.
#pragma unroll 1
  for (int round = 0;; ++round) {
#pragma unroll 1
    for (int batch = 0; batch < kBatchesOfRound && !own.is_done; ++batch) settle_few(call, shared, own);
    own_size = min(own.found, most);
    for (uint32_t i = sent + (thread >> log); i < own_size; i += static_cast<uint32_t>(kTailThreads >> log)) {
      *in_block(&shared.lists[rank][i], thread & (ranks - 1)) = key_of(shared.found[i]);
    }
    sent = own_size;
    if (thread < ranks) {
      Report report{own_size, own.is_capped, own.is_done ? 0 : own.low};
      if (own.found >= most) report.frontier = key_of(shared.found[most - 1]);
      *in_block(&shared.reports[round & 1][rank], thread) = report;
    }
    __syncwarp();
    sync_cluster();
    const Report report = lane < ranks ? shared.reports[round & 1][lane] : Report{0, 0, 0};
    if (__any_sync(0xffffffffu, report.is_capped)) return false;
    size_of_list = report.size;  // of this lane's
    total = warp_sum(size_of_list);
    if (!__any_sync(0xffffffffu, report.frontier != 0)) break;
    const uint64_t frontier = warp_max(report.frontier);
    if (total >= most && is_enough(shared, size_of_list, frontier, most, round & 1, own)) break;
  }
  if (bound != 0 && total < most) return false;
  // A detection's place: how many are better in all lists.
  const uint32_t list_size = __shfl_sync(0xffffffffu, size_of_list, lane % kMostRanks);
  for (uint32_t start = 0; start < own_size; start += kTailThreads / kMostRanks) {
    const uint32_t item = start + static_cast<uint32_t>(thread / kMostRanks);
    if (__all_sync(0xffffffffu, item >= own_size)) break;
    const uint4 info = shared.found[min(item, own_size - 1)];
    const uint64_t key = key_of(info);
    const uint32_t place = count_better_of_all(shared, list_size, key);
    if (lane % kMostRanks == 0 && item < own_size && place < most) {
      const int label = static_cast<int>(info.z & kGroupBits);
      const Pair pair{static_cast<int32_t>(place_of(key)) - label * params.num_anchors, label};
      const Box box =
          info.z & kIsDecoded ? box_from(shared.found_boxes[item]) : box_of<T>(call, image, pair.anchor);
      write_detection(call, image, static_cast<int>(place), box, window, key, pair);
    }
    if (__all_sync(0xffffffffu, place >= most)) break;  // what follows is worse
  }
  if (rank == 0) write_padding(call, image, static_cast<int>(min(total, most)));
  return true;
}

}  // namespace
}  // namespace odtrt

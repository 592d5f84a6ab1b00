// select_candidates reads the logits once, and passes the pairs of an anchor and a class whose score is above the
// threshold on to suppress_in_cluster.
//
// Each block writes its pairs to a slot of its own, of kSlotSize keys. So nothing has to be cleared first, and no
// block waits for another. The blocks compare logits, and compute scores at the end, only for the pairs in the slot.
// Neighbouring anchors score alike; they are dealt out to different blocks, so that no slot gets a whole object. A
// block that has more pairs than its slot holds passes on its best ones, and a bound: the slot has all of the block's
// pairs from this score up. The pairs above the highest bound of all slots are then exactly the head of the final
// order. Each anchor's best score is written too; suppress_in_cluster needs it if it must look for pairs below the
// bound.
#pragma once

#include "cluster.cuh"
#include "postprocess.cuh"

namespace odtrt {
namespace {

constexpr uint32_t kTooMany = 0xffffffffu;  // in place of a count or a bound
constexpr int kSelectBlocks = 5;            // on a multiprocessor
constexpr int kRowsHeld = 1024;             // anchors of a block at most, if it has to choose among its pairs
constexpr int kMaxSlotKeys = kScoreThreads;
constexpr int kScoreSpans = kScoreThreads;  // of a range of scores
constexpr int kPerLane = kScoreSpans / 32;
constexpr int kMaxColumns = 1 << 24;
// A block that has to choose passes on the pairs of so many of its best anchors, plus a sixteenth of all its anchors.
// With fewer, the highest bound of all blocks leaves too few pairs in some crowds. With more, suppress_in_cluster has
// more to do.
constexpr uint32_t kBestRows = 14;

// A converter that gives the score of a single logit. Code that never runs for softmax is compiled for it too, and then
// uses sigmoid.
template <int kConverter>
constexpr int kLogitConverter = kConverter == ODTRT_SOFTMAX ? ODTRT_SIGMOID : kConverter;

// Whether a slot holds scaled logits with their places at first, and keys only later.
template <int kConverter, bool kCountsPairs>
constexpr bool kHoldsLogits = !kCountsPairs && kConverter != ODTRT_SOFTMAX;

// Anchors that a warp reads at a time.
template <int kConverter, bool kCountsPairs>
constexpr int kAnchorsPerWarp = kHoldsLogits<kConverter, kCountsPairs> ? kRowsAtOnce : 1;

struct Slot {
  uint64_t keys[kMaxSlotKeys];  // or scaled logits and places; kSlotSize of them are passed on
  alignas(16) uint32_t spans[kScoreSpans];
  uint32_t best_scores[kRowsHeld];
  uint32_t size, num_anchors, bound;
  uint32_t are_keys;                // 1: `keys` has keys; 0: it has scaled logits and places
  uint32_t rough, above, is_found;  // select_score_bound: bound, anchors above its span, whether it is final
  int32_t anchors[kRowsHeld];
  // A copy: a function that is not inlined reads it faster than the kernel's arguments.
  odtrt_postprocess_params params;
};

// The key of a scaled logit with its place; 0 if its score is not above the threshold or is below the bound.
template <int kConverter>
__device__ __forceinline__ uint64_t key_from_logit(uint64_t logit_and_place, float threshold, uint32_t bound) {
  const float score =
      score_of_logit<kLogitConverter<kConverter>>(float_of(static_cast<uint32_t>(logit_and_place >> 32)));
  return score > threshold && ordered(score) >= bound ? order_key(score, static_cast<uint32_t>(logit_and_place))
                                                      : 0;
}

// Appends a key of each lane for which is_in holds to the slot. A whole warp calls this.
__device__ __forceinline__ void push_key(Slot &slot, bool is_in, uint64_t key) {
  const unsigned vote = __ballot_sync(0xffffffffu, is_in);
  if (vote == 0) return;
  const uint32_t at = reserve_places(&slot.size, vote);
  if (is_in && at < kMaxSlotKeys) slot.keys[at] = key;
}

// Appends the pairs of an anchor whose scaled logit is min_logit or more to the slot. If slot.size is then more than
// `room`, it writes none of them and returns true. Lane l has the logits of columns l, l + 32, ... A whole warp calls
// this.
template <int kEach>
__device__ __forceinline__ bool push_row(Slot &slot, const odtrt_postprocess_params &params, int anchor,
                                         const float (&logits)[kEach], const bool (&is_class)[kEach],
                                         float min_logit, uint32_t room) {
  const int lane = lane_id();
  unsigned votes[kEach];
  uint32_t count = 0, at = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    votes[k] = __ballot_sync(0xffffffffu, is_class[k] && mul(logits[k], params.logit_factor) >= min_logit);
    count += static_cast<uint32_t>(__popc(votes[k]));
  }
  if (lane == 0) at = atomicAdd(&slot.size, count);
  at = __shfl_sync(0xffffffffu, at, 0);
  if (at + count > room) return true;
  const uint32_t place = place_of_pair(params, {anchor, lane - params.background_column});
  const uint32_t place_step = place_of_pair(params, {0, 32});
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (votes[k] >> lane & 1) {
      slot.keys[at + static_cast<uint32_t>(__popc(votes[k] & ((1u << lane) - 1)))] =
          static_cast<uint64_t>(bits_of(mul(logits[k], params.logit_factor))) << 32 |
          (place + static_cast<uint32_t>(k) * place_step);
    }
    at += static_cast<uint32_t>(__popc(votes[k]));
  }
  return false;
}

// A histogram select over the block's best scores: returns a score that at least max_rows anchors reach, and not many
// more unless they have equal scores. If fewer anchors have candidates, all of them reach it. All threads call this,
// with a barrier between two calls.
//
// A sigmoid's logits are compared roughly, so perhaps no anchor has a candidate. The result is then the end of the last
// span, which no anchor reaches. It is never 0, the best score of an anchor without candidates, because a sigmoid's
// spans end below 2^32.
template <int kConverter>
__device__ __forceinline__ uint32_t select_score_bound(Slot &slot, float threshold, int own_rows,
                                                       uint32_t max_rows) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  uint32_t low = ordered(threshold), above = 0;
  uint32_t high = max(low, kConverter == ODTRT_IDENTITY ? ~0u : ordered(1.0f));
#pragma unroll 1
  for (;;) {
    slot.spans[thread] = 0;
    __syncthreads();
    static_assert(kScoreSpans == 1 << 8, "");
    const int shift = shift_for(high - low, 8);
#pragma unroll 1
    for (int row = thread; row < own_rows; row += kScoreThreads) {
      const uint32_t best_score = slot.best_scores[row];
      if (best_score >= low && best_score <= high) atomicAdd(&slot.spans[(best_score - low) >> shift], 1u);
    }
    __syncthreads();
    if (warp_id() == 0) {
      uint32_t counts[kPerLane], sum = 0;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) sum += counts[k] = slot.spans[lane * kPerLane + k];
      const uint32_t reach = warp_inclusive_suffix_scan(sum);  // in this lane's spans and all above
      const uint32_t wanted = min(max_rows, above + __shfl_sync(0xffffffffu, reach, 0));
      const unsigned reached = __ballot_sync(0xffffffffu, above + reach >= wanted);
      if (lane == 31 - __clz(static_cast<int>(reached))) {
        uint32_t higher = above + reach - sum, in_span = 0;
        int span = kPerLane;
#pragma unroll
        for (int k = kPerLane - 1; k >= 0; --k) {
          if (higher + in_span >= wanted) continue;
          higher += in_span;
          in_span = counts[k];
          span = k;
        }
        slot.rough = low + (static_cast<uint32_t>(lane * kPerLane + span) << shift);
        slot.above = higher;
        slot.is_found = shift == 0 || higher + in_span <= max_rows + max_rows / 8;
      }
    }
    __syncthreads();
    if (slot.is_found) return slot.rough;
    above = slot.above;
    low = slot.rough;
    high = min(high, low + ((1u << shift) - 1));
  }
}

// Fills the slot with at most kSlotSize of this block's best pairs, and returns the bound: the slot has all pairs
// from this score up, and 0 means that there are no others. The pairs come from the block's best anchors; if those
// have too many pairs, from half as many anchors, and so on. Returns kTooMany if even that fails.
template <typename T, int kConverter, bool kCountsPairs>
__device__ __noinline__ uint32_t fill_slot_with_best(const T *__restrict__ logits, int own_rows, Slot &slot) {
  const odtrt_postprocess_params &params = slot.params;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  constexpr int kGroup = kAnchorsPerWarp<kConverter, kCountsPairs>;
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  if (own_rows > kRowsHeld) return kTooMany;
#pragma unroll 1
  for (uint32_t max_rows = kBestRows + static_cast<uint32_t>(own_rows) / 16; max_rows > 0; max_rows /= 2) {
    __syncthreads();  // all have read slot.size, and slot.params are set
    if (thread == 0) {
      slot.size = slot.num_anchors = 0;
      slot.bound = ~0u;
    }
    const uint32_t rough = select_score_bound<kConverter>(slot, params.score_threshold, own_rows, max_rows);
    for (int start = 0; start < own_rows; start += kScoreThreads) {
      const int row = start + thread;
      const uint32_t best_score = row < own_rows ? slot.best_scores[row] : 0;
      const bool is_in = best_score >= rough;
      const unsigned vote = __ballot_sync(0xffffffffu, is_in);
      if (vote == 0) continue;
      const uint32_t at = reserve_places(&slot.num_anchors, vote), lowest = ~warp_max(is_in ? ~best_score : 0);
      if (is_in) slot.anchors[at] = (block + row / kGroup * blocks) * kGroup + row % kGroup;
      if (lane == 0) atomicMin(&slot.bound, lowest);
    }
    __syncthreads();
    const int count = static_cast<int>(slot.num_anchors);
    if (count == 0) return 0;  // the logits passed the rough comparison, but no score is above the threshold
    const uint32_t bound = slot.bound;
    const float min_score = unordered(bound);
    if (kHoldsLogits<kConverter, kCountsPairs> && params.num_columns <= kColumnsAtOnce) {
      constexpr int kEach = kColumnsAtOnce / 32, kInFlight = 4;
      const float min_logit = logit_lower_bound<kConverter>(min_score);
      bool is_class[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        is_class[k] = (k > 0 || lane >= params.background_column) && lane < params.num_columns - 32 * k;
#pragma unroll 1
      for (int first = warp_id(); first < count; first += kScoreThreads / 32 * kInFlight) {
        float values[kInFlight][kEach];
        int anchors[kInFlight];
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
          anchors[r] = slot.anchors[min(first + r * (kScoreThreads / 32), count - 1)];
          const T *row = logits + anchors[r] * params.num_columns + lane;
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            if (is_class[k]) values[r][k] = to_float(row[32 * k]);
          }
        }
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
          if (first + r * (kScoreThreads / 32) < count)
            push_row(slot, params, anchors[r], values[r], is_class, min_logit, kMaxSlotKeys);
        }
      }
    } else {
      if (thread == 0) slot.are_keys = 1;
      for (int i = warp_id(); i < count; i += kScoreThreads / 32) {
        const int anchor = slot.anchors[i];
        visit_pairs<T, kConverter>(
            params, logits + anchor * params.num_columns, anchor, fmaxf(params.score_threshold, min_score),
            [&](bool is_candidate, uint64_t key) {
              push_key(slot, is_candidate && static_cast<uint32_t>(key >> 32) >= bound, key);
            });
      }
    }
    __syncthreads();
    const int size = static_cast<int>(slot.size);
    if (size <= kSlotSize) return bound;
    if (size > kMaxSlotKeys) continue;
    const bool is_in = thread < size;
    uint64_t key = is_in ? slot.keys[thread] : 0;
    if (slot.are_keys == 0 && is_in) {
      key = key_from_logit<kConverter>(key, params.score_threshold, bound);
      slot.keys[thread] = key;
    }
    __syncthreads();
    int better = 0;
#pragma unroll 4
    for (int i = 0; i < size; ++i) better += slot.keys[i] > key;
    if (thread == 0) {
      slot.are_keys = 1;
      slot.size = kSlotSize;
    }
    __syncthreads();
    if (thread < kSlotSize) slot.keys[thread] = 0;
    __syncthreads();
    if (key != 0 && better == kSlotSize)
      slot.bound = static_cast<uint32_t>(key >> 32) + 1;  // just above the best pair that is left out
    if (key != 0 && better < kSlotSize) slot.keys[better] = key;
    __syncthreads();
    return slot.bound;
  }
  return kTooMany;
}

template <typename T, int kConverter, bool kCountsPairs>
__global__ __launch_bounds__(kScoreThreads, kSelectBlocks) void select_candidates(ODTRT_PARAMETER Call call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ Slot slot;
  let_next_kernel_start();
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int n = params.num_anchors, columns = params.num_columns;
  const Workspace space = workspace_of(call, image);
  const T *__restrict__ logits = logits_of<T>(call, image);
  if (thread == 0) slot.size = slot.are_keys = 0;
  __syncthreads();

  constexpr int kWarps = kScoreThreads / 32;
  const int warps = static_cast<int>(gridDim.x) * kWarps;
  // Neighbouring anchors score alike: they are dealt out to different blocks, so that no slot gets a whole object.
  const int first_warp = static_cast<int>(blockIdx.x) + warp_id() * static_cast<int>(gridDim.x);
  bool is_full = false;  // whether this warp knows that the slot is full
  const float above = params.score_threshold;
  auto push = [&](bool is_candidate, uint64_t key) {
    const unsigned vote = __ballot_sync(0xffffffffu, is_candidate);
    if (vote == 0) return;
    const uint32_t at = reserve_places(&slot.size, vote);
    is_full |= __any_sync(0xffffffffu, is_candidate && at >= kSlotSize);
    if (is_candidate && at < kSlotSize) slot.keys[at] = key;
  };
  auto push_pairs_of_row = [&](int anchor) {
    visit_pairs<T, kConverter>(
        params, logits + anchor * columns, anchor, above,
        [&](bool is_candidate, uint64_t key) { push(is_candidate && score_of(key) > above, key); });
  };
  auto store_best_score = [&](int row, int anchor, uint32_t best_score) {
    space.best_scores[anchor] = best_score;
    if (row < kRowsHeld) slot.best_scores[row] = best_score;
  };
  auto put = [&](int row, int anchor, float score) {
    store_best_score(row, anchor, score > params.score_threshold ? ordered(score) : 0);
  };
  if (kCountsPairs) {
    for (int anchor = first_warp, row = warp_id(); anchor < n; anchor += warps, row += kWarps) {
      uint32_t best = 0;
      visit_pairs<T, kConverter>(params, logits + anchor * columns, anchor, params.score_threshold,
                                 [&](bool is_candidate, uint64_t key) {
                                   if (is_candidate) best = max(best, static_cast<uint32_t>(key >> 32));
                                   push(is_candidate && score_of(key) > above, key);
                                 });
      best = warp_max(best);
      if (lane == 0) store_best_score(row, anchor, best);
    }
  } else if (kConverter == ODTRT_SOFTMAX) {
    for (int anchor = first_warp, row = warp_id(); anchor < n; anchor += warps, row += kWarps) {
      const float best = best_of_softmax(params, logits + anchor * columns);
      if (lane == 0) put(row, anchor, best);
      if (best > above && !is_full) push_pairs_of_row(anchor);
    }
  } else {
    // A warp reads a group of kRowsAtOnce anchors at a time.
    constexpr int kEach = kColumnsAtOnce / 32, kGroups = 32 / kRowsAtOnce;
    static_assert(kRowsAtOnce == 4, "");
    const float lowest = float_of(0xff800000u);
    const uint32_t min_best_logit = call.min_best_logit;
    const int step = warps * kRowsAtOnce;
    uint32_t own = 0;  // lane l: best logit of anchor l % 4 in the (l / 4)-th group that has no score yet
    int num_own = 0;   // groups that have no score yet
    int own_row = warp_id() * kRowsAtOnce;
    const T *row = logits + static_cast<size_t>(first_warp) * kRowsAtOnce * columns + lane;
    const size_t row_step = static_cast<size_t>(step) * columns;
    for (int first = first_warp * kRowsAtOnce; first < n; first += step, row += row_step) {
      bool is_class[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        is_class[k] = (k > 0 || lane >= params.background_column) && lane < columns - 32 * k;
      float values[kRowsAtOnce][kEach];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        // Past the last anchor, the first one of the group is read again. kMaxColumns keeps this below 2^32.
        const uint32_t offset = first + r < n ? static_cast<uint32_t>(r * columns) * sizeof(T) : 0;
        const T *at = reinterpret_cast<const T *>(reinterpret_cast<const char *>(row) + offset);
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          if (is_class[k]) values[r][k] = to_float(at[32 * k]);
        }
      }
      float of_lane[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        of_lane[r] = lowest;  // fmaxf ignores NaN
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          if (is_class[k]) of_lane[r] = fmaxf(of_lane[r], values[r][k]);
        }
      }
      if (columns > kColumnsAtOnce) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const T *rest = logits + min(first + r, n - 1) * columns;
#pragma unroll 4
          for (int c = kColumnsAtOnce + lane; c < columns; c += 32)
            of_lane[r] = fmaxf(of_lane[r], to_float(rest[c]));
        }
      }
      uint32_t best[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) best[r] = warp_max(ordered(of_lane[r]));
      const uint32_t even = lane & 1 ? best[1] : best[0], odd = lane & 1 ? best[3] : best[2];
      if (lane / kRowsAtOnce == num_own) own = lane & 2 ? odd : even;
      if (max(max(best[0], best[1]), max(best[2], best[3])) >= min_best_logit && !is_full) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (best[r] < min_best_logit || first + r >= n || is_full) continue;
          is_full = push_row(slot, params, first + r, values[r], is_class, call.min_logit, kSlotSize);
          if (columns > kColumnsAtOnce) {
            const T *rest = logits + (first + r) * columns;
#pragma unroll 1
            for (int start = kColumnsAtOnce; start < columns; start += 32) {
              const int column = start + lane;
              const float scaled = column < columns ? mul(to_float(rest[column]), params.logit_factor) : 0.0f;
              push(column < columns && scaled >= call.min_logit,
                   static_cast<uint64_t>(bits_of(scaled)) << 32 |
                       place_of_pair(params, {first + r, column - params.background_column}));
            }
          }
        }
      }
      if (++num_own == kGroups ||
          first + step >= n) {  // scores cost more than comparisons, so that a warp computes 32 at a time
        const int group = lane / kRowsAtOnce, r = lane % kRowsAtOnce;
        const int anchor = first + (group + 1 - num_own) * step + r;
        const int held = own_row + group * kWarps * kRowsAtOnce + r;
        if (group < num_own && anchor < n)
          put(held, anchor, score_of_logit<kConverter>(mul(unordered(own), params.logit_factor)));
        else if (group < num_own && held < kRowsHeld)
          slot.best_scores[held] = 0;
        own_row += num_own * kWarps * kRowsAtOnce;
        num_own = 0;
      }
    }
  }
  __syncthreads();
  uint32_t bound = 0;
  if (slot.size > kSlotSize) {
    const bool has_more = static_cast<int>(blockIdx.x) < call.blocks_with_one_more;
    if (thread == 0) slot.params = params;
    const int own_rows = (call.groups_of_each + has_more) * kAnchorsPerWarp<kConverter, kCountsPairs>;
    bound = fill_slot_with_best<T, kConverter, kCountsPairs>(logits, own_rows, slot);
  }
  if (thread < kSlotSize && bound != kTooMany) {
    const bool is_in = thread < static_cast<int>(slot.size);
    uint64_t key = is_in ? slot.keys[thread] : 0;
    if (kHoldsLogits<kConverter, kCountsPairs> && slot.are_keys == 0 && is_in)
      key = key_from_logit<kConverter>(key, above, bound);
    space.collected[static_cast<size_t>(blockIdx.x) * kSlotSize + thread] = key;
    if (key != 0) {
      const size_t anchor = static_cast<size_t>(pair_of(params, key).anchor);
      prefetch(static_cast<const T *>(call.heads.box_encodings) +
               4 * (static_cast<size_t>(image) * n + anchor));
      prefetch(call.heads.anchors + 4 * anchor);
    }
  }
  if (thread == 0) space.slot_bounds[blockIdx.x] = bound;
#endif
}

}  // namespace
}  // namespace odtrt

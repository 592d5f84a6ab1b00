// find: streams the logits once, and hands on to `settle` the pairs of an anchor and a class above the threshold.
//
// Each of its blocks has a slot of kSlot keys of its own, so nothing has to be cleared first and no block waits for
// another. Logits are compared as logits; a score is computed once a block for what was taken. Groups of anchors go
// round the blocks: neighbouring anchors score alike, and no slot gets a whole object.
// A block with more pairs than its slot holds hands on its best, and says from which grade on these are all there are
// (the slot's bound). What is above the highest bound of all is then the head of the final order, exactly. Each
// anchor's best score (its grade) is written too, for what is looked for below.
#pragma once

#include "cluster.cuh"
#include "postprocess.cuh"

namespace odtrt {
namespace {

constexpr uint32_t kTooMany = 0xffffffffu;  // instead of a number
constexpr int kFindBlocks = 5;              // on a multiprocessor
constexpr int kRowsHeld = 1024;             // anchors of a block, where it has to choose among its pairs
constexpr int kMostTaken = kGradeThreads;
constexpr int kGradeSpans = kGradeThreads;  // of a range of grades
constexpr int kPerLane = kGradeSpans / 32;
constexpr int kMostColumns = 1 << 24;
// A block that has to choose hands on the pairs of so many of its best anchors, and of one in 16. Of fewer, the highest
// bound of all blocks leaves too few pairs in some crowds; of more, `settle` has more to go through.
constexpr uint32_t kBestRows = 14;

// Which score a logit has is known from the logit alone. Code that cannot run for softmax is compiled for it too.
template <int kConverter>
constexpr int kOfLogit = kConverter == ODTRT_SOFTMAX ? ODTRT_SIGMOID : kConverter;

// Whether a slot has scaled logits and places at first, not yet keys.
template <int kConverter, bool kCountsPairs>
constexpr bool kIsPlain = !kCountsPairs && kConverter != ODTRT_SOFTMAX;

// Anchors that a warp takes together.
template <int kConverter, bool kCountsPairs>
constexpr int kTogether = kIsPlain<kConverter, kCountsPairs> ? kRowsAtOnce : 1;

struct Slot {
  uint64_t keys[kMostTaken];  // or scaled logits and places; kSlot of them are handed on
  alignas(16) uint32_t spans[kGradeSpans];
  uint32_t grades[kRowsHeld];
  uint32_t size, num_anchors, bound;
  uint32_t are_keys;                // what is in a plain slot
  uint32_t rough, above, is_found;  // a bound for the best rows, how many are above its span
  int32_t anchors[kRowsHeld];
  odtrt_postprocess_params
      params;  // a call of a function finds them sooner here than among the kernel's arguments
};

// The key of what a plain slot has; 0 without the score, or the grade.
template <int kConverter>
__device__ __forceinline__ uint64_t key_of_plain(uint64_t plain, float threshold, uint32_t bound) {
  const float score = score_of_logit<kOfLogit<kConverter>>(float_of(static_cast<uint32_t>(plain >> 32)));
  return score > threshold && ordered(score) >= bound ? order_key(score, static_cast<uint32_t>(plain)) : 0;
}

// Puts one key, or none, of each lane into the slot.
__device__ __forceinline__ void take_key(Slot &slot, bool is_in, uint64_t key) {
  const unsigned vote = __ballot_sync(0xffffffffu, is_in);
  if (vote == 0) return;
  const uint32_t at = take_place(&slot.size, vote);
  if (is_in && at < kMostTaken) slot.keys[at] = key;
}

// Puts the pairs of an anchor that have a scaled logit of `least_logit` or more into the slot; none, and returns true,
// where slot.size is then more than `room`. Lane l has the logits of columns l, l + 32, ...
template <int kEach>
__device__ __forceinline__ bool take_row(Slot &slot, const odtrt_postprocess_params &params, int anchor,
                                         const float (&logits)[kEach], const bool (&is_class)[kEach],
                                         float least_logit, uint32_t room) {
  const int lane = lane_id();
  unsigned votes[kEach];
  uint32_t count = 0, at = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    votes[k] = __ballot_sync(0xffffffffu, is_class[k] && mul(logits[k], params.logit_factor) >= least_logit);
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

// A grade that `most` of the block's anchors reach at least, and not many more unless their grades are the same; where
// there are fewer, all. Called by all threads; a barrier must come before it is called again.
// Where no anchor has a candidate, which a rough comparison of logits lets happen, it is past the last span and never 0,
// the grade of such anchors: a sigmoid's spans do not end at 2^32, and other converters compare exactly.
template <int kConverter>
__device__ __forceinline__ uint32_t rough_bound(Slot &slot, float threshold, int own_rows, uint32_t most) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  uint32_t low = ordered(threshold), above = 0;
  uint32_t high = max(low, kConverter == ODTRT_IDENTITY ? ~0u : ordered(1.0f));
#pragma unroll 1
  for (;;) {
    slot.spans[thread] = 0;
    __syncthreads();
    static_assert(kGradeSpans == 1 << 8, "");
    const int shift = shift_for(high - low, 8);
#pragma unroll 1
    for (int row = thread; row < own_rows; row += kGradeThreads) {
      const uint32_t grade = slot.grades[row];
      if (grade >= low && grade <= high) atomicAdd(&slot.spans[(grade - low) >> shift], 1u);
    }
    __syncthreads();
    if (warp_id() == 0) {
      uint32_t counts[kPerLane], sum = 0;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) sum += counts[k] = slot.spans[lane * kPerLane + k];
      const uint32_t reach = sum_from_lane(sum);  // this lane's spans, or those above
      const uint32_t wanted = min(most, above + __shfl_sync(0xffffffffu, reach, 0));
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
        slot.is_found = shift == 0 || higher + in_span <= most + most / 8;
      }
    }
    __syncthreads();
    if (slot.is_found) return slot.rough;
    above = slot.above;
    low = slot.rough;
    high = min(high, low + ((1u << shift) - 1));
  }
}

// Fills the slot with this block's best pairs: all from the returned grade on; 0: there are no others. These are the pairs of a dozen or two of
// its best anchors, the more the more it has, and kSlot at most. kTooMany: there was no way.
template <typename T, int kConverter, bool kCountsPairs>
__device__ __noinline__ uint32_t hand_on_best(const T *__restrict__ logits, int own_rows, Slot &slot) {
  const odtrt_postprocess_params &params = slot.params;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  constexpr int kGroup = kTogether<kConverter, kCountsPairs>;
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  if (own_rows > kRowsHeld) return kTooMany;
#pragma unroll 1
  for (uint32_t most = kBestRows + static_cast<uint32_t>(own_rows) / 16; most > 0; most /= 2) {
    __syncthreads();  // slot.size has been read, slot.params are there
    if (thread == 0) {
      slot.size = slot.num_anchors = 0;
      slot.bound = ~0u;
    }
    const uint32_t rough = rough_bound<kConverter>(slot, params.score_threshold, own_rows, most);
    for (int start = 0; start < own_rows; start += kGradeThreads) {
      const int row = start + thread;
      const uint32_t grade = row < own_rows ? slot.grades[row] : 0;
      const bool is_in = grade >= rough;
      const unsigned vote = __ballot_sync(0xffffffffu, is_in);
      if (vote == 0) continue;
      const uint32_t at = take_place(&slot.num_anchors, vote), least = ~warp_max(is_in ? ~grade : 0);
      if (is_in) slot.anchors[at] = (block + row / kGroup * blocks) * kGroup + row % kGroup;
      if (lane == 0) atomicMin(&slot.bound, least);
    }
    __syncthreads();
    const int count = static_cast<int>(slot.num_anchors);
    if (count == 0) return 0;  // what looked promising has no score above the threshold
    const uint32_t bound = slot.bound;
    const float least = unordered(bound);
    if (kIsPlain<kConverter, kCountsPairs> && params.num_columns <= kColumnsAtOnce) {
      constexpr int kEach = kColumnsAtOnce / 32, kInFlight = 4;
      const float least_logit = cautious_logit<kConverter>(least);
      bool is_class[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        is_class[k] = (k > 0 || lane >= params.background_column) && lane < params.num_columns - 32 * k;
#pragma unroll 1
      for (int first = warp_id(); first < count; first += kGradeThreads / 32 * kInFlight) {
        float values[kInFlight][kEach];
        int anchors[kInFlight];
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
          anchors[r] = slot.anchors[min(first + r * (kGradeThreads / 32), count - 1)];
          const T *row = logits + anchors[r] * params.num_columns + lane;
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            if (is_class[k]) values[r][k] = to_float(row[32 * k]);
          }
        }
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
          if (first + r * (kGradeThreads / 32) < count)
            take_row(slot, params, anchors[r], values[r], is_class, least_logit, kMostTaken);
        }
      }
    } else {
      if (thread == 0) slot.are_keys = 1;
      for (int i = warp_id(); i < count; i += kGradeThreads / 32) {
        const int anchor = slot.anchors[i];
        visit_pairs<T, kConverter>(params, logits + anchor * params.num_columns, anchor,
                                   fmaxf(params.score_threshold, least), [&](bool is_candidate, uint64_t key) {
                                     take_key(slot, is_candidate && static_cast<uint32_t>(key >> 32) >= bound,
                                              key);
                                   });
      }
    }
    __syncthreads();
    const int size = static_cast<int>(slot.size);
    if (size <= kSlot) return bound;
    if (size > kMostTaken) continue;
    const bool is_in = thread < size;
    uint64_t key = is_in ? slot.keys[thread] : 0;
    if (slot.are_keys == 0 && is_in) {
      key = key_of_plain<kConverter>(key, params.score_threshold, bound);
      slot.keys[thread] = key;
    }
    __syncthreads();
    int better = 0;
#pragma unroll 4
    for (int i = 0; i < size; ++i) better += slot.keys[i] > key;
    if (thread == 0) {
      slot.are_keys = 1;
      slot.size = kSlot;
    }
    __syncthreads();
    if (thread < kSlot) slot.keys[thread] = 0;
    __syncthreads();
    if (key != 0 && better == kSlot)
      slot.bound = static_cast<uint32_t>(key >> 32) + 1;  // the first that is left behind
    if (key != 0 && better < kSlot) slot.keys[better] = key;
    __syncthreads();
    return slot.bound;
  }
  return kTooMany;
}

template <typename T, int kConverter, bool kCountsPairs>
__global__ __launch_bounds__(kGradeThreads, kFindBlocks) void find(ODTRT_PARAMETER Call call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ Slot slot;
  let_next_kernel_start();
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int n = params.num_anchors, columns = params.num_columns;
  const Workspace space = space_of(call, image);
  const T *__restrict__ logits =
      static_cast<const T *>(call.heads.class_logits) + static_cast<size_t>(image) * n * columns;
  if (thread == 0) slot.size = slot.are_keys = 0;
  __syncthreads();

  constexpr int kWarps = kGradeThreads / 32;
  const int warps = static_cast<int>(gridDim.x) * kWarps;
  // Neighbouring anchors score alike: they go round the blocks, so that no slot gets a whole object.
  const int first_warp = static_cast<int>(blockIdx.x) + warp_id() * static_cast<int>(gridDim.x);
  bool is_full = false;  // the slot, as far as this warp knows
  const float above = params.score_threshold;
  auto hand_on = [&](bool is_candidate, uint64_t key) {
    const unsigned vote = __ballot_sync(0xffffffffu, is_candidate);
    if (vote == 0) return;
    const uint32_t at = take_place(&slot.size, vote);
    is_full |= __any_sync(0xffffffffu, is_candidate && at >= kSlot);
    if (is_candidate && at < kSlot) slot.keys[at] = key;
  };
  auto hand_on_row = [&](int anchor) {
    visit_pairs<T, kConverter>(
        params, logits + anchor * columns, anchor, above,
        [&](bool is_candidate, uint64_t key) { hand_on(is_candidate && score_of(key) > above, key); });
  };
  auto put_grade = [&](int row, int anchor, uint32_t grade) {
    space.grades[anchor] = grade;
    if (row < kRowsHeld) slot.grades[row] = grade;
  };
  auto put = [&](int row, int anchor, float score) {
    put_grade(row, anchor, score > params.score_threshold ? ordered(score) : 0);
  };
  if (kCountsPairs) {
    for (int anchor = first_warp, row = warp_id(); anchor < n; anchor += warps, row += kWarps) {
      uint32_t best = 0;
      visit_pairs<T, kConverter>(params, logits + anchor * columns, anchor, params.score_threshold,
                                 [&](bool is_candidate, uint64_t key) {
                                   if (is_candidate) best = max(best, static_cast<uint32_t>(key >> 32));
                                   hand_on(is_candidate && score_of(key) > above, key);
                                 });
      best = warp_max(best);
      if (lane == 0) put_grade(row, anchor, best);
    }
  } else if (kConverter == ODTRT_SOFTMAX) {
    for (int anchor = first_warp, row = warp_id(); anchor < n; anchor += warps, row += kWarps) {
      const float best = best_of_softmax(params, logits + anchor * columns);
      if (lane == 0) put(row, anchor, best);
      if (best > above && !is_full) hand_on_row(anchor);
    }
  } else {
    // A warp takes a group of kRowsAtOnce anchors at a time.
    constexpr int kEach = kColumnsAtOnce / 32, kGroups = 32 / kRowsAtOnce;
    static_assert(kRowsAtOnce == 4, "");
    const float lowest = float_of(0xff800000u);
    const uint32_t least_best = call.least_best;
    const int step = warps * kRowsAtOnce;
    uint32_t own = 0;  // lane l: the best logit of anchor l % 4 of group l / 4 of those without a score
    int num_own = 0;   // such groups
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
        // The first anchor again, instead of none. kMostColumns keeps this below 2^32.
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
        of_lane[r] = lowest;  // fmaxf leaves NaN out
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
      if (max(max(best[0], best[1]), max(best[2], best[3])) >= least_best && !is_full) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (best[r] < least_best || first + r >= n || is_full) continue;
          is_full = take_row(slot, params, first + r, values[r], is_class, call.least_logit, kSlot);
          if (columns > kColumnsAtOnce) {
            const T *rest = logits + (first + r) * columns;
#pragma unroll 1
            for (int start = kColumnsAtOnce; start < columns; start += 32) {
              const int column = start + lane;
              const float scaled = column < columns ? mul(to_float(rest[column]), params.logit_factor) : 0.0f;
              hand_on(column < columns && scaled >= call.least_logit,
                      static_cast<uint64_t>(bits_of(scaled)) << 32 |
                          place_of_pair(params, {first + r, column - params.background_column}));
            }
          }
        }
      }
      if (++num_own == kGroups || first + step >= n) {  // a score costs more than a comparison
        const int group = lane / kRowsAtOnce, r = lane % kRowsAtOnce;
        const int anchor = first + (group + 1 - num_own) * step + r;
        const int held = own_row + group * kWarps * kRowsAtOnce + r;
        if (group < num_own && anchor < n)
          put(held, anchor, score_of_logit<kConverter>(mul(unordered(own), params.logit_factor)));
        else if (group < num_own && held < kRowsHeld)
          slot.grades[held] = 0;
        own_row += num_own * kWarps * kRowsAtOnce;
        num_own = 0;
      }
    }
  }
  __syncthreads();
  uint32_t bound = 0;
  if (slot.size > kSlot) {
    const bool has_more = static_cast<int>(blockIdx.x) < call.groups_left;
    if (thread == 0) slot.params = params;
    const int own_rows = (call.groups_each + has_more) * kTogether<kConverter, kCountsPairs>;
    bound = hand_on_best<T, kConverter, kCountsPairs>(logits, own_rows, slot);
  }
  if (thread < kSlot && bound != kTooMany) {
    const bool is_in = thread < static_cast<int>(slot.size);
    uint64_t key = is_in ? slot.keys[thread] : 0;
    if (kIsPlain<kConverter, kCountsPairs> && slot.are_keys == 0 && is_in)
      key = key_of_plain<kConverter>(key, above, bound);
    space.gathered[static_cast<size_t>(blockIdx.x) * kSlot + thread] = key;
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

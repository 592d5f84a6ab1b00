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
// A block that has to choose hands on the pairs of so many of its best anchors, and of one in 16. Of fewer, the highest
// bound of all blocks leaves too few pairs in some crowds; of more, `settle` has more to go through.
constexpr uint32_t kBestRows = 14;

// Which score a logit has is known from the logit alone. Code that cannot run for softmax is compiled for it too.
template <int kConverter>
constexpr int kOfLogit = kConverter == ODTRT_SOFTMAX ? ODTRT_SIGMOID : kConverter;

// Whether a slot has scaled logits at first, not yet scores.
template <int kConverter, bool kCountsPairs>
constexpr bool kIsPlain = !kCountsPairs && kConverter != ODTRT_SOFTMAX;

struct Slot {
  alignas(16) uint32_t grades[kRowsHeld];
  uint64_t keys[kMostTaken];  // or scaled logits and places; kSlot of them are handed on
  uint32_t size, found, num_rows, bound;
  uint16_t rows[kRowsHeld];
  odtrt_postprocess_params
      params;  // a call of a function finds them sooner here than among the kernel's arguments
};

// Puts one key, or none, of each lane into the slot.
__device__ __forceinline__ void take_key(Slot &slot, bool is_in, uint64_t key) {
  const unsigned vote = __ballot_sync(0xffffffffu, is_in);
  if (vote == 0) return;
  const uint32_t at = take_place(&slot.size, vote);
  if (is_in && at < kMostTaken) slot.keys[at] = key;
}

// Fills the slot with this block's best pairs: all from the returned grade on. These are the pairs of a dozen or two of
// its best anchors, the more the more it has, and kSlot at most. kTooMany: there was no way.
template <typename T, int kConverter, bool kCountsPairs>
__device__ __noinline__ uint32_t hand_on_best(const T *__restrict__ logits, Slot &slot) {
  const odtrt_postprocess_params &params = slot.params;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  __syncthreads();  // slot.size has been read, slot.params are there
  const int n = params.num_anchors, blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  constexpr int kTogether = kIsPlain<kConverter, kCountsPairs> ? kRowsAtOnce : 1;
  const int groups = (n + kTogether - 1) / kTogether;
  const int own_rows = (groups - block + blocks - 1) / blocks * kTogether;
  auto anchor_of = [&](int row) { return (block + row / kTogether * blocks) * kTogether + row % kTogether; };
  if (own_rows > kRowsHeld) return kTooMany;
  for (int row = own_rows - kTogether + thread; row < (own_rows + 3) / 4 * 4; row += kGradeThreads) {
    if (row >= own_rows || anchor_of(row) >= n) slot.grades[row] = 0;
  }
  uint32_t most_rows = kBestRows + static_cast<uint32_t>(own_rows) / 16, bound;
  int size;
#pragma unroll 1
  for (;; most_rows /= 2) {
    if (most_rows == 0) return kTooMany;
    if (thread == 0) {
      slot.size = slot.found = slot.num_rows = 0;
      slot.bound = ~0u;
    }
    __syncthreads();
    for (int row = thread; row < own_rows; row += kGradeThreads) {
      const uint32_t grade = slot.grades[row];
      uint32_t better = 0;
#pragma unroll 4
      for (int k = 0; k < own_rows; k += 4) {
        const uint4 four = *reinterpret_cast<const uint4 *>(&slot.grades[k]);
        better += (four.x > grade) + (four.y > grade) + (four.z > grade) + (four.w > grade);
      }
      if (grade != 0 && better < most_rows) {
        atomicMin(&slot.bound, grade);
        slot.rows[atomicAdd(&slot.num_rows, 1u)] = static_cast<uint16_t>(row);
      }
    }
    __syncthreads();
    const int rows = static_cast<int>(slot.num_rows);
    bound = slot.bound;
    const float least = unordered(bound);
    if (kIsPlain<kConverter, kCountsPairs> && params.num_columns <= kColumnsAtOnce) {
      constexpr int kEach = kColumnsAtOnce / 32, kInFlight = 3;
      const float least_logit = cautious_logit<kConverter>(least);
#pragma unroll 1
      for (int first = warp_id(); first < rows; first += kGradeThreads / 32 * kInFlight) {
        float values[kInFlight][kEach];
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
          const int anchor = anchor_of(slot.rows[min(first + r * (kGradeThreads / 32), rows - 1)]);
          const T *row = logits + static_cast<size_t>(anchor) * params.num_columns + lane;
#pragma unroll
          for (int k = 0; k < kEach; ++k)
            values[r][k] = 32 * k + lane < params.num_columns ? to_float(row[32 * k]) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kInFlight; ++r) {
          const int i = first + r * (kGradeThreads / 32);
          if (i >= rows) break;
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            const int column = 32 * k + lane, label = column - params.background_column;
            const float scaled = mul(values[r][k], params.logit_factor);
            take_key(slot, label >= 0 && column < params.num_columns && scaled >= least_logit,
                     static_cast<uint64_t>(bits_of(scaled)) << 32 |
                         place_of_pair(params, {anchor_of(slot.rows[i]), label}));
          }
        }
      }
      __syncthreads();
      if (thread < min(static_cast<int>(slot.size), kMostTaken)) {
        const uint64_t rough = slot.keys[thread];
        const float score = score_of_logit<kOfLogit<kConverter>>(float_of(static_cast<uint32_t>(rough >> 32)));
        slot.keys[thread] = score > params.score_threshold && ordered(score) >= bound
                                ? order_key(score, static_cast<uint32_t>(rough))
                                : 0;
      }
    } else {
      for (int i = warp_id(); i < rows; i += kGradeThreads / 32) {
        const int anchor = anchor_of(slot.rows[i]);
        visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * params.num_columns, anchor,
                                   fmaxf(params.score_threshold, least), [&](bool is_candidate, uint64_t key) {
                                     take_key(slot, is_candidate && static_cast<uint32_t>(key >> 32) >= bound,
                                              key);
                                   });
      }
    }
    __syncthreads();
    size = static_cast<int>(slot.size);
    __syncthreads();
    if (size <= kMostTaken) break;
  }
  if (size <= kSlot) {
    if (thread == 0) slot.found = static_cast<uint32_t>(size);
    __syncthreads();
    return bound;
  }
  const uint64_t key = thread < size ? slot.keys[thread] : 0;
  int better = 0;
#pragma unroll 4
  for (int i = 0; i < size; ++i) better += slot.keys[i] > key;
  if (thread == 0) slot.bound = bound;
  __syncthreads();
  if (key != 0 && better == kSlot)
    slot.bound = static_cast<uint32_t>(key >> 32) + 1;  // the first that is left behind
  if (key != 0 && better < kSlot) {
    slot.keys[better] = key;
    atomicAdd(&slot.found, 1u);
  }
  __syncthreads();
  return slot.bound;
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
  const float none = float_of(0x7fc00000u);
  if (thread == 0) slot.size = 0;
  __syncthreads();

  const int warps = static_cast<int>(gridDim.x) * (kGradeThreads / 32);
  // Neighbouring anchors score alike: they go round the blocks, so that no slot gets a whole object.
  const int first_warp = static_cast<int>(blockIdx.x) + warp_id() * static_cast<int>(gridDim.x);
  bool is_full = false;  // the slot, as far as this warp knows
  const float above = params.score_threshold;
  auto hand_on = [&](bool is_candidate, uint64_t key) {
    const unsigned vote = __ballot_sync(0xffffffffu, is_candidate);
    if (vote == 0) return;
    uint32_t at = 0;
    if (lane == 0) at = atomicAdd(&slot.size, static_cast<uint32_t>(__popc(vote)));
    at = __shfl_sync(0xffffffffu, at, 0);
    is_full |= at >= kSlot;
    at += __popc(vote & ((1u << lane) - 1));
    if (is_candidate && at < kSlot) slot.keys[at] = key;
  };
  auto hand_on_row = [&](int anchor) {
    visit_pairs<T, kConverter>(
        params, logits + static_cast<size_t>(anchor) * columns, anchor, above,
        [&](bool is_candidate, uint64_t key) { hand_on(is_candidate && score_of(key) > above, key); });
  };
  auto put_grade = [&](int row, int anchor, uint32_t grade) {
    space.grades[anchor] = grade;
    if (row < kRowsHeld) slot.grades[row] = grade;
  };
  auto put = [&](int row, int anchor, float score) {
    put_grade(row, anchor, score > params.score_threshold ? ordered(score) : 0);
  };
  int own_row = warp_id();  // the number of a row in this block
  if (kCountsPairs) {
    for (int anchor = first_warp; anchor < n; anchor += warps, own_row += kGradeThreads / 32) {
      uint32_t best = 0;
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * columns, anchor,
                                 params.score_threshold, [&](bool is_candidate, uint64_t key) {
                                   if (is_candidate) best = max(best, static_cast<uint32_t>(key >> 32));
                                   hand_on(is_candidate && score_of(key) > above, key);
                                 });
      best = warp_max(best);
      if (lane == 0) put_grade(own_row, anchor, best);
    }
  } else if (kConverter == ODTRT_SOFTMAX) {
    for (int anchor = first_warp; anchor < n; anchor += warps, own_row += kGradeThreads / 32) {
      const float best = best_of_softmax(params, logits + static_cast<size_t>(anchor) * columns);
      if (lane == 0) put(own_row, anchor, best);
      if (best > above && !is_full) hand_on_row(anchor);
    }
  } else {
    constexpr int kEach = kColumnsAtOnce / 32;
    const float lowest = float_of(0xff800000u);
    const float least_logit = call.least_logit;
    bool is_class[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      is_class[k] = 32 * k + lane >= params.background_column && 32 * k + lane < columns;
    float own = none;  // lane l has the best of the l-th anchor that was not put yet
    int filled = 0, own_anchor = n;
    own_row *= kRowsAtOnce;
    int held_row = 0;  // of own_anchor
    for (int first = first_warp * kRowsAtOnce; first < n;
         first += warps * kRowsAtOnce, own_row += kGradeThreads / 32 * kRowsAtOnce) {
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
      unsigned promising = 0;  // the same in all lanes
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const float of_row = unordered(warp_max(ordered(best[r])));
        if (lane == filled + r) own = of_row, own_anchor = first + r, held_row = own_row + r;
        promising |= static_cast<unsigned>(first + r < n && mul(of_row, params.logit_factor) >= least_logit)
                     << r;
      }
      if (promising != 0 && !is_full) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (!(promising >> r & 1) || is_full) continue;
          unsigned votes[kEach];
          uint32_t count = 0, at = 0;
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            votes[k] = __ballot_sync(0xffffffffu,
                                     is_class[k] && mul(values[r][k], params.logit_factor) >= least_logit);
            count += static_cast<uint32_t>(__popc(votes[k]));
          }
          if (lane == 0) at = atomicAdd(&slot.size, count);
          at = __shfl_sync(0xffffffffu, at, 0);
          is_full |= at >= kSlot;
          const uint32_t place_of_lane = place_of_pair(params, {first + r, lane - params.background_column});
          const uint32_t place_step = place_of_pair(params, {0, 32});
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            const uint32_t own_at = at + __popc(votes[k] & ((1u << lane) - 1));
            if ((votes[k] >> lane & 1) && own_at < kSlot) {
              slot.keys[own_at] = static_cast<uint64_t>(bits_of(mul(values[r][k], params.logit_factor))) << 32 |
                                  (place_of_lane + k * place_step);
            }
            at += static_cast<uint32_t>(__popc(votes[k]));
          }
          if (columns > kColumnsAtOnce) {
            const T *rest = logits + static_cast<size_t>(first + r) * columns;
#pragma unroll 1
            for (int start = kColumnsAtOnce; start < columns; start += 32) {
              const float scaled =
                  start + lane < columns ? mul(to_float(rest[start + lane]), params.logit_factor) : 0.0f;
              hand_on(start + lane < columns && scaled >= least_logit,
                      static_cast<uint64_t>(bits_of(scaled)) << 32 | (place_of_lane + start / 32 * place_step));
            }
          }
        }
      }
      filled += kRowsAtOnce;
      if (filled == 32 || first + warps * kRowsAtOnce >= n) {  // a score costs more than a comparison
        if (lane < filled && own_anchor < n) {
          put(held_row, own_anchor, score_of_logit<kConverter>(mul(own, params.logit_factor)));
        }
        filled = 0;
      }
    }
  }
  __syncthreads();
  uint32_t bound = 0;
  const bool is_chosen = slot.size >= kSlot;  // just full: a warp may have held back what it found after that
  if (is_chosen) {
    if (thread == 0) slot.params = params;
    bound = hand_on_best<T, kConverter, kCountsPairs>(logits, slot);
  }
  const size_t own_slot = static_cast<size_t>(blockIdx.x) * kSlot;
  if (thread < kSlot && bound != kTooMany) {
    uint64_t key = thread < static_cast<int>(is_chosen ? slot.found : slot.size) ? slot.keys[thread] : 0;
    bool is_candidate = is_chosen ? key != 0 : thread < static_cast<int>(slot.size);
    if (kIsPlain<kConverter, kCountsPairs> && is_candidate && !is_chosen) {
      const float score = score_of_logit<kOfLogit<kConverter>>(float_of(static_cast<uint32_t>(key >> 32)));
      is_candidate = score > above;
      key = is_candidate ? order_key(score, static_cast<uint32_t>(key)) : 0;
    }
    space.gathered[own_slot + thread] = key;
    if (is_candidate) {
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

// What both chains of kernels of odtrt_postprocess_cuda share: the workspace, scores, boxes, detections.
#pragma once

#include <cuda_fp16.h>

#include "odtrt.h"
#include "suppression.cuh"

namespace odtrt {
namespace {

constexpr int kBins = 2048;
constexpr int kEnough = 2048;          // pairs to aim at
constexpr int kMaxGathered = 1 << 16;  // pairs that gather can hold
#if !defined(ODTRT_FEW_PAIRS)          // the tests send small heads through what is meant for large ones
#define ODTRT_FEW_PAIRS (1 << 20)
#endif
constexpr int64_t kFewPairs = ODTRT_FEW_PAIRS;
constexpr int kGradeThreads = 256;
constexpr int kRowsAtOnce = 4;
constexpr int kColumnsAtOnce = 96;
constexpr int kSlot = 64;  // pairs that one block of `find` can hand on
constexpr int kMaxSlots = 1024;
static_assert(kMaxSlots * kSlot <= kMaxGathered, "the slots lie in the same memory");

struct Progress {
  uint32_t gathered;
  uint32_t bound;        // lowest bin that was gathered
  uint32_t count;        // candidates in order
  uint32_t is_complete;  // nothing is left below the bound
  // What the first block of `keep` asks all of its blocks to do: count or collect the pairs that are still in the
  // running, with keys from low to high.
  uint32_t round;  // a new number: there is work; kFinished: there will be none
  uint32_t next_tile, tiles_done;
  uint32_t is_counting, shift;
  uint64_t low, high;
};

// One image's part of the workspace.
struct Workspace {
  Progress *progress;
  uint32_t *histogram;   // [kBins]
  uint64_t *is_visible;  // [kMaxChunks], a bit for each candidate
  uint64_t *gathered;    // [kMaxGathered], order keys in no order
  uint64_t *keys;        // [kMaxCandidates], in the final order
  uint64_t *mask;        // [kMaxChunks, kMaxChunks, kChunk], see suppression.cuh
  uint32_t
      *slot_bounds;      // [kMaxSlots], from which grade on a slot, in `gathered`, has all of its block's pairs
  uint32_t *grades;      // [N], ordered(best score); 0: no candidate
  int32_t *group_first;  // [groups]; these four only serve what is left below the bound
  uint32_t *group_size;  // [groups]
  int32_t *kept_next;    // [max_kept]
  Box *kept_boxes;       // [max_kept]
  int32_t *kept_group;   // [max_kept]; this and slot_bounds only serve `settle`
};

struct Call {
  odtrt_postprocess_params params;
  odtrt_heads heads;
  odtrt_detections out;
  char *workspace;
  size_t image_size;  // of the workspace
  int32_t num_groups, max_kept, cap;
  int32_t num_slots;  // blocks of `find`
  // Groups of anchors that each of them takes, and how many of the first ones take one more.
  int32_t groups_each, groups_left;
  float least_logit;     // scaled; a lower one has no score above the threshold
  uint32_t least_best;   // ordered, not scaled; an anchor whose best logit is less has no candidate
  int32_t counts_pairs;  // the histogram is of all candidates; else of each anchor's best
};

// Returns the bytes that an image takes.
ODTRT_HD size_t lay_out(const Call &call, char *memory, Workspace *space) {
  char *next = memory;
  space->progress = reinterpret_cast<Progress *>(take(next, sizeof(Progress)));
  space->histogram = reinterpret_cast<uint32_t *>(take(next, sizeof(uint32_t) * kBins));
  space->is_visible = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxChunks));
  space->gathered = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxGathered));
  space->keys = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxCandidates));
  space->mask = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxCandidates * kMaxChunks));
  space->slot_bounds = reinterpret_cast<uint32_t *>(take(next, sizeof(uint32_t) * kMaxSlots));
  space->grades = reinterpret_cast<uint32_t *>(take(next, sizeof(uint32_t) * call.params.num_anchors));
  space->group_first = reinterpret_cast<int32_t *>(take(next, sizeof(int32_t) * call.num_groups));
  space->group_size = reinterpret_cast<uint32_t *>(take(next, sizeof(uint32_t) * call.num_groups));
  space->kept_next = reinterpret_cast<int32_t *>(take(next, sizeof(int32_t) * call.max_kept));
  space->kept_boxes = reinterpret_cast<Box *>(take(next, sizeof(Box) * call.max_kept));
  space->kept_group = reinterpret_cast<int32_t *>(take(next, sizeof(int32_t) * call.max_kept));
  return static_cast<size_t>(next - memory);
}

__device__ __forceinline__ Workspace space_of(const Call &call, int image) {
  Workspace space;
  lay_out(call, call.workspace + call.image_size * image, &space);
  return space;
}

// ---- scores and places -------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// 64 bins an octave, up to score 1; a higher score never has a lower bin.
__device__ __forceinline__ int bin_of(float score) {
  if (!(score > 0.0f)) return 0;
  const int bin = static_cast<int>(bits_of(score) >> 17) - (127 - kBins / 64) * 64;
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

// The least score in a bin above 0.
__device__ __forceinline__ float lowest_of_bin(int bin) {
  return float_of(static_cast<uint32_t>(bin + (127 - kBins / 64) * 64) << 17);
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
#endif
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, value);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
#endif
}

__device__ __forceinline__ uint32_t warp_or(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_or_sync(0xffffffffu, value);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value |= __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
#endif
}

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sum of the values of this lane and all higher ones; and of this one and all lower ones.
__device__ __forceinline__ uint32_t sum_from_lane(uint32_t value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint32_t other = __shfl_down_sync(0xffffffffu, value, offset);
    if (lane_id() + offset < 32) value += other;
  }
  return value;
}

__device__ __forceinline__ uint32_t sum_to_lane(uint32_t value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane_id() >= offset) value += other;
  }
  return value;
}

// What a number up to `width` must be shifted by to have `bits` bits at most.
__device__ __forceinline__ int shift_for(uint32_t width, int bits) {
  return max(0, 32 - __clz(static_cast<int>(width)) - bits);
}
__device__ __forceinline__ int shift_for(uint64_t width, int bits) {
  return max(0, 64 - __clzll(static_cast<long long>(width)) - bits);
}

template <int kConverter>
__device__ __forceinline__ float score_of_logit(float scaled) {
  return kConverter == ODTRT_SIGMOID ? sigmoid(scaled) : flushed(scaled);
}

struct Softmax {
  float maximum, sum;  // of a whole row; the maximum is NaN if any score would be
};

// Called by a whole warp.
template <typename T>
__device__ __forceinline__ Softmax softmax_of(const T *row, const odtrt_postprocess_params &params) {
  uint32_t best = 0;
  bool is_number = true;
  for (int c = lane_id(); c < params.num_columns; c += 32) {
    const float x = mul(to_float(row[c]), params.logit_factor);
    is_number &= x == x;
    best = max(best, ordered(x));
  }
  const float maximum = unordered(warp_max(best));
  if (!__all_sync(0xffffffffu, is_number) || isinf(maximum)) return {float_of(0x7fc00000u), 1.0f};
  uint64_t units = 0;
  for (int c = lane_id(); c < params.num_columns; c += 32) {
    units += softmax_units(exponential(sub(mul(to_float(row[c]), params.logit_factor), maximum)));
  }
  return {maximum, softmax_sum(warp_sum(units))};
}

__device__ __forceinline__ float score_of_logit(const Softmax &softmax, float scaled) {
  return normal_or_zero(divide(exponential(sub(scaled, softmax.maximum)), softmax.sum));
}

// Where a pair stands among equal scores. Class by class; class-agnostic: anchor by anchor.
struct Pair {
  int32_t anchor, label;
};

__device__ __forceinline__ uint32_t place_of_pair(const odtrt_postprocess_params &params, Pair pair) {
  const uint32_t classes = static_cast<uint32_t>(params.num_columns - params.background_column);
  return params.class_agnostic
             ? static_cast<uint32_t>(pair.anchor) * classes + static_cast<uint32_t>(pair.label)
             : static_cast<uint32_t>(pair.label) * static_cast<uint32_t>(params.num_anchors) +
                   static_cast<uint32_t>(pair.anchor);
}

__device__ __forceinline__ Pair pair_of(const odtrt_postprocess_params &params, uint64_t key) {
  const uint32_t place = place_of(key);
  const uint32_t classes = static_cast<uint32_t>(params.num_columns - params.background_column);
  const uint32_t anchors = static_cast<uint32_t>(params.num_anchors);
  return params.class_agnostic
             ? Pair{static_cast<int32_t>(place / classes), static_cast<int32_t>(place % classes)}
             : Pair{static_cast<int32_t>(place % anchors), static_cast<int32_t>(place / anchors)};
}

__device__ __forceinline__ int32_t group_of(const odtrt_postprocess_params &params, Pair pair) {
  return params.class_agnostic ? 0 : pair.label;
}

// A scaled logit that is less has a score that is less than `score`: by a margin, so that it may be rough.
template <int kConverter>
ODTRT_HD float cautious_logit(float score) {
  if (kConverter == ODTRT_IDENTITY) return score;
  if (kConverter == ODTRT_SOFTMAX || !(score > 0.0f)) return float_of(0xff800000u);
  const float rest = fmaxf(1.0f - score, 1e-7f);
#if defined(__CUDA_ARCH__)
  const float logit = __logf(__fdividef(score, rest));
#else
  const float logit = logf(score / rest);
#endif
  return fminf(logit, 15.0f) - 0.01f - 0.001f * fabsf(logit);
}

// The pairs of an anchor that may have a score of `least` or more, and others. Called by a whole warp, as
// visit(is_candidate, key) is, for 32 columns at a time. Class-agnostic: one lane has the anchor's best class.
template <typename T, int kConverter, typename Visit>
__device__ __forceinline__ void visit_pairs(const odtrt_postprocess_params &params, const T *__restrict__ row,
                                            int anchor, float least, Visit visit) {
  const float least_logit = cautious_logit<kConverter>(least);
  constexpr int kUnrolled = 4;
  Softmax softmax{};
  if (kConverter == ODTRT_SOFTMAX) softmax = softmax_of(row, params);
  uint64_t best = 0;  // class-agnostic
  bool is_number = true;
  for (int start = 0; start < params.num_columns; start += 32 * kUnrolled) {
    float logits[kUnrolled];
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      const int column = start + 32 * k + lane_id();
      logits[k] = column < params.num_columns ? to_float(row[column]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      if (start + 32 * k >= params.num_columns) break;
      const int column = start + 32 * k + lane_id();
      const int label = column - params.background_column;
      const float scaled = mul(logits[k], params.logit_factor);
      const bool is_class = label >= 0 && column < params.num_columns;
      if (kConverter != ODTRT_SOFTMAX && !params.class_agnostic &&
          !__any_sync(0xffffffffu, is_class && scaled >= least_logit)) {
        continue;
      }
      const float score =
          kConverter == ODTRT_SOFTMAX ? score_of_logit(softmax, scaled) : score_of_logit<kConverter>(scaled);
      const bool passes = is_class && score > params.score_threshold;
      const uint64_t key = order_key(score, place_of_pair(params, {anchor, label}));
      if (params.class_agnostic) {
        is_number &= !is_class || score == score;
        if (passes && key > best) best = key;
      } else {
        visit(passes, key);
      }
    }
  }
  if (params.class_agnostic) {
    best = warp_max(best);
    visit(__all_sync(0xffffffffu, is_number) && best != 0 && lane_id() == 0, best);
  }
}

// The best score of an anchor with a softmax; NaN: no candidate. Called by a whole warp.
template <typename T>
__device__ __forceinline__ float best_of_softmax(const odtrt_postprocess_params &params,
                                                 const T *__restrict__ row) {
  const Softmax softmax = softmax_of(row, params);
  uint32_t best = 0;
  for (int c = lane_id() + params.background_column; c < params.num_columns; c += 32) {
    best = max(best, ordered(to_float(row[c])));
  }
  return score_of_logit(softmax, mul(unordered(warp_max(best)), params.logit_factor));
}

struct EncodedBox {
  float encoding[4], prior[4];
};

template <typename T>
__device__ __forceinline__ EncodedBox encoded_box_of(const Call &call, int image, int anchor) {
  const size_t row = static_cast<size_t>(image) * call.params.num_anchors + anchor;
  EncodedBox box;
  if (sizeof(T) == 4) {
    const float4 values = __ldg(reinterpret_cast<const float4 *>(call.heads.box_encodings) + row);
    box.encoding[0] = values.x, box.encoding[1] = values.y, box.encoding[2] = values.z,
    box.encoding[3] = values.w;
  } else {
    const uint2 values = __ldg(reinterpret_cast<const uint2 *>(call.heads.box_encodings) + row);
    const auto halves = reinterpret_cast<const __half *>(&values);
#pragma unroll
    for (int k = 0; k < 4; ++k) box.encoding[k] = __half2float(halves[k]);
  }
  const float4 values = __ldg(reinterpret_cast<const float4 *>(call.heads.anchors) + anchor);
  box.prior[0] = values.x, box.prior[1] = values.y, box.prior[2] = values.z, box.prior[3] = values.w;
  return box;
}

template <typename T>
__device__ __forceinline__ Box box_of(const Call &call, int image, int anchor) {
  const EncodedBox box = encoded_box_of<T>(call, image, anchor);
  return decode(box.encoding, box.prior, call.params.box_scales);
}

__device__ __forceinline__ Box window_of(const Call &call, int image) {
  if (call.heads.clip_windows == nullptr) return {0.0f, 0.0f, 1.0f, 1.0f};
  const float *window = call.heads.clip_windows + 4 * static_cast<size_t>(image);
  return {window[0], window[1], window[2], window[3]};
}

__device__ __forceinline__ bool is_visible(const Box &box, const Box &window, float score) {
  return signed_area(clip(box, window)) > 0.0f && score >= 0.0f;
}

__device__ void write_detection(const Call &call, int image, int m, const Box &box, const Box &window,
                                uint64_t key, Pair pair) {
  const size_t at = static_cast<size_t>(image) * call.params.max_total_detections + m;
  const Box clipped = clip(box, window);
  const Box found = call.params.change_coordinate_frame ? in_frame_of(window, clipped) : clipped;
  reinterpret_cast<float4 *>(call.out.boxes)[at] = make_float4(found.ymin, found.xmin, found.ymax, found.xmax);
  call.out.scores[at] = score_of(key);
  call.out.classes[at] = pair.label;
  if (call.out.anchors != nullptr) call.out.anchors[at] = pair.anchor;
}

}  // namespace
}  // namespace odtrt

// Code that the kernels for all GPUs use in odtrt_postprocess_cuda: the workspace, scores, boxes, detections.
#pragma once

#include <cuda_fp16.h>

#include "odtrt.h"
#include "suppression.cuh"

namespace odtrt {
namespace {

constexpr int kBins = 2048;             // of the histogram of scores
constexpr int kTargetPairs = 2048;      // pairs that the bound should leave above it
constexpr int kMaxCollected = 1 << 16;  // pairs that compact_above can hold
#if !defined(ODTRT_FEW_PAIRS)           // the tests run the code for large heads on small ones
#define ODTRT_FEW_PAIRS (1 << 20)
#endif
constexpr int64_t kFewPairs = ODTRT_FEW_PAIRS;  // the histogram counts pairs if there are at most so many
constexpr int kScoreThreads = 256;              // of a block that reads the logits
constexpr int kRowsAtOnce = 4;                  // anchors whose logits a warp reads at a time
constexpr int kColumnsAtOnce = 96;
constexpr int kSlotSize = 64;  // pairs that one block of select_candidates can pass on
constexpr int kMaxSlots = 1024;
static_assert(kMaxSlots * kSlotSize <= kMaxCollected, "slots and collected pairs use the same memory");

// What the blocks of one image tell one another.
struct Progress {
  uint32_t num_collected;
  uint32_t bound;        // the lowest bin whose pairs were collected
  uint32_t count;        // of the sorted candidates
  uint32_t is_complete;  // nothing is left below the bound
  // What the first block of `suppress` asks all blocks to do: count or collect the undecided pairs with keys from low
  // to high.
  uint32_t round;  // changes if there is new work; kFinished: there will be no more
  uint32_t next_tile, tiles_done;
  uint32_t is_counting, shift;
  uint64_t low, high;
};

// One image's part of the workspace.
struct Workspace {
  Progress *progress;
  uint32_t *histogram;   // [kBins]
  uint64_t *is_visible;  // [kMaxChunks], a bit for each candidate: part of its box is inside the clip window
  uint64_t *collected;   // [kMaxCollected], order keys, not sorted
  uint64_t *keys;        // [kMaxCandidates], in the final order
  uint64_t *mask;        // [kMaxChunks, kMaxChunks, kChunk], see suppression.cuh
  // [kMaxSlots], a score, ordered: a slot, in `collected`, has all of its block's pairs from this score up.
  uint32_t *slot_bounds;
  uint32_t *best_scores;  // [N], ordered(best score); 0: no candidate
  int32_t *group_first;   // [groups]; only pairs below the bound need this and the next three
  uint32_t *group_size;   // [groups]
  int32_t *kept_next;     // [max_kept]
  Box *kept_boxes;        // [max_kept]
  int32_t *kept_group;    // [max_kept]; only suppress_in_cluster uses this and slot_bounds
};

// What all kernels of one call are given.
struct Call {
  odtrt_postprocess_params params;
  odtrt_heads heads;
  odtrt_detections out;
  char *workspace;
  size_t image_size;  // bytes of the workspace that an image takes
  // A group is the pairs that can suppress one another: those of a class, or all. cap: kept boxes of a group at most.
  int32_t num_groups, max_kept, cap;
  int32_t num_slots;  // blocks of select_candidates
  // Groups of anchors that each of these blocks reads, and how many of the first blocks read one more.
  int32_t groups_of_each, blocks_with_one_more;
  float min_logit;          // scaled; a lower logit has no score above the threshold
  uint32_t min_best_logit;  // ordered, not scaled; an anchor whose best logit is less has no candidate
  int32_t counts_pairs;     // 1: the histogram counts all candidates; 0: each anchor's best score
};

// Divides an image's memory among the arrays of its workspace. Returns the bytes that they take.
ODTRT_HD size_t carve_workspace(const Call &call, char *memory, Workspace *space) {
  char *next = memory;
  space->progress = reinterpret_cast<Progress *>(carve(next, sizeof(Progress)));
  space->histogram = reinterpret_cast<uint32_t *>(carve(next, sizeof(uint32_t) * kBins));
  space->is_visible = reinterpret_cast<uint64_t *>(carve(next, sizeof(uint64_t) * kMaxChunks));
  space->collected = reinterpret_cast<uint64_t *>(carve(next, sizeof(uint64_t) * kMaxCollected));
  space->keys = reinterpret_cast<uint64_t *>(carve(next, sizeof(uint64_t) * kMaxCandidates));
  space->mask = reinterpret_cast<uint64_t *>(carve(next, sizeof(uint64_t) * kMaxCandidates * kMaxChunks));
  space->slot_bounds = reinterpret_cast<uint32_t *>(carve(next, sizeof(uint32_t) * kMaxSlots));
  space->best_scores = reinterpret_cast<uint32_t *>(carve(next, sizeof(uint32_t) * call.params.num_anchors));
  space->group_first = reinterpret_cast<int32_t *>(carve(next, sizeof(int32_t) * call.num_groups));
  space->group_size = reinterpret_cast<uint32_t *>(carve(next, sizeof(uint32_t) * call.num_groups));
  space->kept_next = reinterpret_cast<int32_t *>(carve(next, sizeof(int32_t) * call.max_kept));
  space->kept_boxes = reinterpret_cast<Box *>(carve(next, sizeof(Box) * call.max_kept));
  space->kept_group = reinterpret_cast<int32_t *>(carve(next, sizeof(int32_t) * call.max_kept));
  return static_cast<size_t>(next - memory);
}

__device__ __forceinline__ Workspace workspace_of(const Call &call, int image) {
  Workspace space;
  carve_workspace(call, call.workspace + call.image_size * image, &space);
  return space;
}

template <typename T>
__device__ __forceinline__ const T *logits_of(const Call &call, int image) {
  return static_cast<const T *>(call.heads.class_logits) +
         static_cast<size_t>(image) * call.params.num_anchors * call.params.num_columns;
}

// ---- scores and places -------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// The bin of a score in the histogram: 64 bins an octave, up to score 1. A higher score never has a lower bin.
__device__ __forceinline__ int bin_of(float score) {
  if (!(score > 0.0f)) return 0;
  const int bin = static_cast<int>(bits_of(score) >> 17) - (127 - kBins / 64) * 64;
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

// The lowest score in a bin above bin 0.
__device__ __forceinline__ float lowest_of_bin(int bin) {
  return float_of(static_cast<uint32_t>(bin + (127 - kBins / 64) * 64) << 17);
}

// How far numbers up to `width` must be shifted right so that they have at most `bits` bits.
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
  float maximum, sum;  // over the whole row; the maximum is NaN if any score would be NaN
};

// A whole warp calls this.
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

struct Pair {
  int32_t anchor, label;
};

// The rank of a pair among pairs of equal score: by class, then by anchor; class-agnostic: by anchor, then by class.
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

// A scaled logit below this has a score below `score`. The bound is computed roughly, and a margin makes up for that.
template <int kConverter>
ODTRT_HD float logit_lower_bound(float score) {
  if (kConverter == ODTRT_IDENTITY) return score;
  if (kConverter == ODTRT_SOFTMAX || !(score > 0.0f)) return float_of(0xff800000u);
  const float complement = fmaxf(1.0f - score, 1e-7f);
#if defined(__CUDA_ARCH__)
  const float logit = __logf(__fdividef(score, complement));
#else
  const float logit = logf(score / complement);
#endif
  return fminf(logit, 15.0f) - 0.01f - 0.001f * fabsf(logit);
}

// Calls visit(is_candidate, key) for all pairs of an anchor whose score is min_score or more, and perhaps for others.
// A whole warp calls this, and visit is called by all lanes, for 32 columns at a time. Class-agnostic: one lane has
// the pair of the anchor's best class.
template <typename T, int kConverter, typename Visit>
__device__ __forceinline__ void visit_pairs(const odtrt_postprocess_params &params, const T *__restrict__ row,
                                            int anchor, float min_score, Visit visit) {
  const float min_logit = logit_lower_bound<kConverter>(min_score);
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
          !__any_sync(0xffffffffu, is_class && scaled >= min_logit)) {
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

// The best score of an anchor with a softmax; NaN: it has no candidate. A whole warp calls this.
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

__device__ __forceinline__ Box box_from(const float4 &corners) {
  return {corners.x, corners.y, corners.z, corners.w};
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

// Pads the detections with zeros from `found` on, and writes how many there are. All kThreads threads of one block
// call this.
template <int kThreads>
__device__ __forceinline__ void write_padding(const Call &call, int image, int found) {
  for (int m = found + static_cast<int>(threadIdx.x); m < call.params.max_total_detections; m += kThreads) {
    const size_t at = static_cast<size_t>(image) * call.params.max_total_detections + m;
    reinterpret_cast<float4 *>(call.out.boxes)[at] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    call.out.scores[at] = 0.0f;
    call.out.classes[at] = 0;
    if (call.out.anchors != nullptr) call.out.anchors[at] = 0;
  }
  if (threadIdx.x == 0) call.out.num_detections[image] = found;
}

// Whether a pair is not decided yet: nothing that was kept suppresses it, and its group is not full. knows_sizes:
// whether group_size is up to date. Reads through the L2 cache, because another block writes what was kept.
template <typename T>
__device__ __forceinline__ bool is_pair_undecided(const Call &call, const Workspace &space, int image,
                                                  uint64_t key, bool knows_sizes) {
  const Pair pair = pair_of(call.params, key);
  const int group = group_of(call.params, pair);
  if (knows_sizes && __ldcg(space.group_size + group) >= static_cast<uint32_t>(call.cap)) return false;
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

}  // namespace
}  // namespace odtrt

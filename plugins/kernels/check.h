// Checks of arguments. Every entry point, for CPU and CUDA, calls them before it uses its arguments.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>

#include "odtrt.h"

namespace odtrt {

constexpr int32_t kMaxTotalDetections = 4096;
constexpr int32_t kExactInFloat = 1 << 24;  // every integer below is exact in float32

inline bool is_flag(int32_t value) { return value == 0 || value == 1; }

inline bool is_dtype(int32_t value) { return value == ODTRT_FLOAT32 || value == ODTRT_FLOAT16; }

inline bool is_positive(float value) { return value > 0.0f && std::isfinite(value); }

// NULL counts as aligned.
inline bool is_aligned(const void *pointer, size_t alignment) {
  return reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

template <typename Value>
bool is_aligned(const Value *pointer) {
  return is_aligned(pointer, alignof(Value));
}

inline size_t alignment_of(int32_t dtype) { return dtype == ODTRT_FLOAT16 ? alignof(uint16_t) : alignof(float); }

inline bool is_valid(const odtrt_postprocess_params *params, int32_t batch) {
  if (params == nullptr || !is_aligned(params) || batch < 1) return false;
  const odtrt_postprocess_params &p = *params;
  if (!is_flag(p.background_column) || !is_flag(p.class_agnostic) || !is_flag(p.change_coordinate_frame)) {
    return false;
  }
  for (const float scale : p.box_scales) {
    if (!is_positive(scale)) return false;
  }
  return p.num_anchors >= 1 && p.num_columns >= 1 + p.background_column &&
         static_cast<int64_t>(p.num_anchors) * p.num_columns <= INT32_MAX &&
         p.score_converter >= ODTRT_SIGMOID && p.score_converter <= ODTRT_IDENTITY &&
         is_positive(p.logit_factor) && !std::isnan(p.score_threshold) && !std::isnan(p.iou_threshold) &&
         p.max_detections_per_class >= 1 && p.max_total_detections >= 1 &&
         p.max_total_detections <= kMaxTotalDetections;
}

inline bool is_valid(const odtrt_heads *heads, const odtrt_detections *out) {
  return heads != nullptr && is_aligned(heads) && is_aligned(out) &&
         heads->box_encodings != nullptr && heads->class_logits != nullptr &&
         heads->anchors != nullptr && is_dtype(heads->dtype) && out != nullptr &&
         out->num_detections != nullptr && out->boxes != nullptr && out->scores != nullptr &&
         out->classes != nullptr;
}

// Only for host arrays: device arrays need an alignment of 16 bytes, which the caller sees to.
inline bool are_aligned(const odtrt_heads &heads, const odtrt_detections &out) {
  const size_t alignment = alignment_of(heads.dtype);
  return is_aligned(heads.box_encodings, alignment) && is_aligned(heads.class_logits, alignment) &&
         is_aligned(heads.anchors) && is_aligned(heads.clip_windows) && is_aligned(out.num_detections) &&
         is_aligned(out.boxes) && is_aligned(out.scores) && is_aligned(out.classes) && is_aligned(out.anchors);
}

inline bool is_valid(const odtrt_nms_params *params) {
  return params != nullptr && is_aligned(params) && params->num_boxes >= 0 && params->num_boxes < kExactInFloat &&
         params->max_kept >= 1 && !std::isnan(params->score_threshold) && !std::isnan(params->iou_threshold);
}

inline bool is_valid_nms_data(const odtrt_nms_params &params, const float *boxes, const float *scores,
                              const int32_t *kept, const int32_t *num_kept) {
  return (params.num_boxes == 0 || (boxes != nullptr && scores != nullptr)) && kept != nullptr &&
         num_kept != nullptr;
}

inline bool is_side(int32_t pixels) { return pixels >= 1 && pixels < kExactInFloat; }

inline bool is_valid(const odtrt_preprocess_params *params) {
  if (params == nullptr || !is_aligned(params)) return false;
  const odtrt_preprocess_params &p = *params;
  return is_side(p.image_height) && is_side(p.image_width) && is_side(p.output_height) &&
         is_side(p.output_width) && p.image_pitch >= int64_t{3} * p.image_width && is_flag(p.bgr) &&
         p.true_height >= 1 && p.true_height <= p.output_height && p.true_width >= 1 &&
         p.true_width <= p.output_width && is_dtype(p.output_dtype) && is_flag(p.output_nhwc);
}

// Runs work() and turns an exception into a status, because no exception may cross the C ABI.
template <typename Work>
odtrt_status status_of(const Work &work) noexcept {
  try {
    work();
    return ODTRT_OK;
  } catch (...) {  // only an allocation can throw: for_each_index goes on without threads that cannot start
    return ODTRT_OUT_OF_MEMORY;
  }
}

}  // namespace odtrt

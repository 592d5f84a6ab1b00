// Code that both algorithms of suppress_in_cluster use: candidates in shared memory, and whether one suppresses
// another.
#pragma once

#include "cluster.cuh"
#include "postprocess_select.cuh"

namespace odtrt {
namespace {

constexpr int kClusterThreads = 512;
constexpr int kMaxRanks = 16;  // blocks of a cluster
constexpr int kSpans = 128;    // that a range of keys is divided into

struct Range {
  uint64_t low, high;  // keys, both included
};

// A range of keys is divided into kSpans spans of 1 << shift_of(range) keys. The last spans may be empty.
__device__ __forceinline__ int shift_of(const Range &range) {
  static_assert(kSpans == 1 << 7, "");
  return shift_for(range.high - range.low, 7);
}

__device__ __forceinline__ Range span_of(const Range &range, int span, int shift) {
  const uint64_t low = range.low + (static_cast<uint64_t>(span) << shift);
  return {low, low + min(range.high - low, (uint64_t{1} << shift) - 1)};
}

// For each of this lane's four spans: the number of keys in it and in all spans above. A whole warp calls this.
__device__ __forceinline__ uint4 sums_of_spans(const uint32_t *spans) {
  static_assert(kSpans == 4 * 32, "");
  const uint4 four = reinterpret_cast<const uint4 *>(spans)[lane_id()];
  const uint32_t sum = warp_inclusive_suffix_scan(four.x + four.y + four.z + four.w);
  return make_uint4(sum, sum - four.x, sum - four.x - four.y, sum - four.x - four.y - four.z);
}

// A candidate is a box with ordered corners and an `info`: { key low, key high, group and flags, scaled area }.
constexpr uint32_t kVisible = 1u << 31;    // part of the box is inside the clip window
constexpr uint32_t kIsDecoded = 1u << 30;  // the decoded corners were in order, so the box is as decoded
constexpr uint32_t kGroupBits = kIsDecoded - 1;

__device__ __forceinline__ uint64_t key_of(const uint4 &info) {
  return static_cast<uint64_t>(info.y) << 32 | info.x;
}
__device__ __forceinline__ bool is_same_group(const uint4 &a, const uint4 &b) {
  return ((a.z ^ b.z) & kGroupBits) == 0;
}
// Whether one box certainly suppresses the other, or possibly, so that it takes the exact test: see union_fraction_for.
struct OverlapTest {
  bool certain, possible;
};

__device__ __forceinline__ OverlapTest test_overlap(const Box &a, float scaled_area_of_a, const Box &b,
                                                    float scaled_area_of_b) {
  const float intersection = intersection_of(a, b), min_intersection = add(scaled_area_of_a, scaled_area_of_b);
  const bool certain = intersection > mul(min_intersection, kCertainFactor);
  return {certain, !(intersection < min_intersection) && !certain};
}

__device__ __forceinline__ bool is_suppressed(const float4 &kept, const float4 &other, float iou_threshold) {
  const Box a = box_from(kept), b = box_from(other);
  return suppresses(a, signed_area(a), b, signed_area(b), iou_threshold);
}

// A candidate: see kVisible.
struct Decoded {
  float4 box;
  uint4 info;
};

__device__ __forceinline__ Decoded decode_candidate(const Call &call, const Box &window, float union_fraction,
                                                    uint64_t key, Pair pair, const EncodedBox &encoded) {
  const Box decoded = decode(encoded.encoding, encoded.prior, call.params.box_scales),
            box = with_ordered_corners(decoded);
  const bool is_decoded =
      bits_of(box.ymin) == bits_of(decoded.ymin) && bits_of(box.xmin) == bits_of(decoded.xmin) &&
      bits_of(box.ymax) == bits_of(decoded.ymax) && bits_of(box.xmax) == bits_of(decoded.xmax);
  const uint32_t flags =
      (is_visible(decoded, window, score_of(key)) ? kVisible : 0) | (is_decoded ? kIsDecoded : 0);
  return {make_float4(box.ymin, box.xmin, box.ymax, box.xmax),
          make_uint4(static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32),
                     static_cast<uint32_t>(group_of(call.params, pair)) | flags,
                     bits_of(scaled_area(signed_area(box), union_fraction)))};
}

template <typename T>
__device__ __forceinline__ Decoded decode_candidate(const Call &call, int image, const Box &window,
                                                    float union_fraction, uint64_t key) {
  const Pair pair = pair_of(call.params, key);
  return decode_candidate(call, window, union_fraction, key, pair, encoded_box_of<T>(call, image, pair.anchor));
}

}  // namespace
}  // namespace odtrt

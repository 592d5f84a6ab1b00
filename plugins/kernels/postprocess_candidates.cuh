// What both ways to settle have in common: candidates in shared memory, and whether one suppresses another.
#pragma once

#include "cluster.cuh"
#include "postprocess_find.cuh"

namespace odtrt {
namespace {

constexpr int kTailThreads = 512;
constexpr int kMostRanks = 16;  // blocks of a cluster
constexpr int kSpans = 128;     // of a range of keys

struct Range {
  uint64_t low, high;  // keys, both included
};

// The keys of a range fall into kSpans spans of 1 << shift_of(range), the last ones perhaps empty.
__device__ __forceinline__ int shift_of(const Range &range) {
  static_assert(kSpans == 1 << 7, "");
  return shift_for(range.high - range.low, 7);
}

__device__ __forceinline__ Range span_of(const Range &range, int span, int shift) {
  const uint64_t low = range.low + (static_cast<uint64_t>(span) << shift);
  return {low, low + min(range.high - low, (uint64_t{1} << shift) - 1)};
}

// How many are in each of this lane's four spans and all above it. Called by a whole warp.
__device__ __forceinline__ uint4 sums_of_spans(const uint32_t *spans) {
  static_assert(kSpans == 4 * 32, "");
  const uint4 four = reinterpret_cast<const uint4 *>(spans)[lane_id()];
  const uint32_t sum = sum_from_lane(four.x + four.y + four.z + four.w);
  return make_uint4(sum, sum - four.x, sum - four.x - four.y, sum - four.x - four.y - four.z);
}

// A candidate is a box with ordered corners and { key low, key high, group and flags, cautious area }.
constexpr uint32_t kVisible = 1u << 31;    // something of it is inside the clip window
constexpr uint32_t kIsDecoded = 1u << 30;  // the box is what was decoded: its corners were in order
constexpr uint32_t kGroupBits = kIsDecoded - 1;

__device__ __forceinline__ uint64_t key_of(const uint4 &info) {
  return static_cast<uint64_t>(info.y) << 32 | info.x;
}
__device__ __forceinline__ bool is_same_group(const uint4 &a, const uint4 &b) {
  return ((a.z ^ b.z) & kGroupBits) == 0;
}
__device__ __forceinline__ Box box_from(const float4 &corners) {
  return {corners.x, corners.y, corners.z, corners.w};
}

// Whether one suppresses the other, as far as a product can tell: see share_of_union.
struct Verdict {
  bool surely, perhaps;
};

__device__ __forceinline__ Verdict judge(const Box &a, float cautious_of_a, const Box &b, float cautious_of_b) {
  const float intersection = intersection_of(a, b), least = add(cautious_of_a, cautious_of_b);
  const bool surely = intersection > mul(least, kSurely);
  return {surely, !(intersection < least) && !surely};
}

__device__ __forceinline__ bool is_suppressed(const float4 &kept, const float4 &other, float iou_threshold) {
  const Box a = box_from(kept), b = box_from(other);
  return suppresses(a, signed_area(a), b, signed_area(b), iou_threshold);
}

// The candidate with this key.
struct Decoded {
  float4 box;
  uint4 info;
};

__device__ __forceinline__ Decoded decode_candidate(const Call &call, const Box &window, float share,
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
                     bits_of(cautious_area(signed_area(box), share)))};
}

template <typename T>
__device__ __forceinline__ Decoded decode_candidate(const Call &call, int image, const Box &window, float share,
                                                    uint64_t key) {
  const Pair pair = pair_of(call.params, key);
  return decode_candidate(call, window, share, key, pair, encoded_box_of<T>(call, image, pair.anchor));
}

// No detections from `found` on. Called by all threads of one block.
__device__ __forceinline__ void write_padding(const Call &call, int image, int found) {
  for (int m = found + static_cast<int>(threadIdx.x); m < call.params.max_total_detections; m += kTailThreads) {
    const size_t at = static_cast<size_t>(image) * call.params.max_total_detections + m;
    reinterpret_cast<float4 *>(call.out.boxes)[at] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    call.out.scores[at] = 0.0f;
    call.out.classes[at] = 0;
    if (call.out.anchors != nullptr) call.out.anchors[at] = 0;
  }
  if (threadIdx.x == 0) call.out.num_detections[image] = found;
}

}  // namespace
}  // namespace odtrt

// The OD API's arithmetic, operation by operation, in float32. CPU and GPU code both include this file.
//
// Every function is written in single IEEE operations, rounded to nearest: no fused multiply-add, no fast
// division, no library exp. g++, clang, nvcc and the numpy reference therefore give the same bits
// (odtrt_lib/nms.py). Compile host code with -ffp-contract=off; on the device the intrinsics see to it.
//
// TensorFlow's threads flush subnormal numbers to zero. This library changes no mode of the processor. Instead
// `flushed` and the functions like it replace a subnormal number by 0 wherever it could change a detection.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ODTRT_HD __host__ __device__ __forceinline__
#else
#define ODTRT_HD inline
#endif

namespace odtrt {

ODTRT_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

ODTRT_HD float sub(float a, float b) { return add(a, -b); }

ODTRT_HD float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

ODTRT_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

ODTRT_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

ODTRT_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Maps floats to integers in the same order: a < b <=> ordered(a) < ordered(b), except for NaN. Never returns 0.
ODTRT_HD uint32_t ordered(float value) {
  const uint32_t bits = bits_of(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

ODTRT_HD float unordered(uint32_t number) {
  return float_of(number & 0x80000000u ? number & 0x7fffffffu : ~number);
}

// exp, within 1 ulp where the result is normal. The method and its constants are Cephes' expf (S. Moshier):
// x = n ln 2 + r with ln 2 in two parts, a polynomial of degree 7 in r, times 2^n in two steps.
ODTRT_HD float exponential(float x) {
  if (x != x) return x;
  x = x < -105.0f ? -105.0f : x;
  x = x > 90.0f ? 90.0f : x;
  const float round_to_whole = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
  const float shifted = add(mul(x, 1.44269504f), round_to_whole);
  const float n = sub(shifted, round_to_whole);
  const int32_t whole = static_cast<int32_t>(bits_of(shifted)) - static_cast<int32_t>(bits_of(round_to_whole));
  const float r = sub(sub(x, mul(n, 0.693359375f)), mul(n, -2.12194440e-4f));
  float p = add(mul(1.9875691500e-4f, r), 1.3981999507e-3f);
  p = add(mul(p, r), 8.3334519073e-3f);
  p = add(mul(p, r), 4.1665795894e-2f);
  p = add(mul(p, r), 1.6666665459e-1f);
  p = add(mul(p, r), 5.0000001201e-1f);
  p = add(add(mul(p, mul(r, r)), r), 1.0f);
  const int32_t half = whole >> 1;
  p = mul(p, float_of(static_cast<uint32_t>(half + 127) << 23));
  return mul(p, float_of(static_cast<uint32_t>(whole - half + 127) << 23));
}

constexpr float kSmallestNormal = 1.17549435e-38f;  // 2^-126
constexpr float kGreatestSubnormal = 1.17549421e-38f;

// 0 if the value is subnormal or -0; otherwise the value.
ODTRT_HD float flushed(float value) {
  return value < kSmallestNormal && value > -kSmallestNormal ? 0.0f : value;
}

// 0 if the value is subnormal or negative; otherwise the value. NaN stays NaN, here and in all functions below.
ODTRT_HD float normal_or_zero(float value) { return value < kSmallestNormal ? 0.0f : value; }

// flushed(a - b). The device's flushing instruction gives the same bits, because a subnormal sum is exact before it is
// flushed.
ODTRT_HD float flushed_sub(float a, float b) {
#if defined(__CUDA_ARCH__)
  float difference;
  asm("sub.rn.ftz.f32 %0, %1, %2;" : "=f"(difference) : "f"(a), "f"(b));
  return difference;
#else
  return flushed(sub(a, b));
#endif
}

ODTRT_HD float sigmoid(float x) { return normal_or_zero(divide(1.0f, add(1.0f, exponential(-x)))); }

// softmax is exp(x - max) / sum. The sum counts whole units of 2^-40: integer addition gives the same result in any
// order.
ODTRT_HD uint64_t softmax_units(float exp_of_difference) {
  const float units = mul(exp_of_difference, 1099511627776.0f);  // 2^40; exp_of_difference is 0 to 1
#if defined(__CUDA_ARCH__)
  return __float2ull_rz(units);
#else
  return static_cast<uint64_t>(units);
#endif
}

ODTRT_HD float softmax_sum(uint64_t units) {
#if defined(__CUDA_ARCH__)
  return mul(__ull2float_rn(units), 9.094947017729282e-13f);  // 2^-40
#else
  return static_cast<float>(units) * 9.094947017729282e-13f;
#endif
}

struct Box {
  float ymin, xmin, ymax, xmax;
};

// faster_rcnn_box_coder. Encodings ty, tx, th, tw; anchors ycenter, xcenter, height, width.
ODTRT_HD Box decode(const float encoding[4], const float anchor[4], const float scales[4]) {
  const float ty = divide(encoding[0], scales[0]), tx = divide(encoding[1], scales[1]);
  const float th = divide(encoding[2], scales[2]), tw = divide(encoding[3], scales[3]);
  const float half_height = mul(mul(exponential(th), anchor[2]), 0.5f);
  const float half_width = mul(mul(exponential(tw), anchor[3]), 0.5f);
  const float y = add(mul(ty, anchor[2]), anchor[0]);
  const float x = add(mul(tx, anchor[3]), anchor[1]);
  return {sub(y, half_height), sub(x, half_width), add(y, half_height), add(x, half_width)};
}

// std::min and std::max, which TensorFlow's kernel uses. Both return a if either argument is NaN.
ODTRT_HD float smaller(float a, float b) { return b < a ? b : a; }
ODTRT_HD float larger(float a, float b) { return a < b ? b : a; }

// Height times width. As in the OD API it is also positive if both are negative.
ODTRT_HD float signed_area(const Box &box) {
  return flushed(mul(flushed_sub(box.ymax, box.ymin), flushed_sub(box.xmax, box.xmin)));
}

ODTRT_HD Box flushed(const Box &box) {
  return {flushed(box.ymin), flushed(box.xmin), flushed(box.ymax), flushed(box.xmax)};
}

ODTRT_HD Box with_ordered_corners(const Box &given) {
  const Box box = flushed(given);
  return {smaller(box.ymin, box.ymax), smaller(box.xmin, box.xmax), larger(box.ymin, box.ymax),
          larger(box.xmin, box.xmax)};
}

// Whether `suppresses` can skip its flushing for this box, whatever the other box is, because no subnormal value that
// it computes could change its answer. A difference of two coordinates is subnormal only if both are below 2^-102, or
// if it is the side of a box, whose area is 0 then.
ODTRT_HD bool is_usual(const Box &box, float area, float iou_threshold) {
  const float min_magnitude = 1.9721523e-31f;  // 2^-102
  const auto is_far = [&](float value) {
    return value >= min_magnitude || value <= -min_magnitude || value == 0.0f;
  };
  return is_far(box.ymin) && is_far(box.xmin) && is_far(box.ymax) && is_far(box.xmax) && area >= 1e-30f &&
         iou_threshold >= 1e-6f;
}

// NonMaxSuppressionV5: whether the IoU of `kept` and the weaker `other` is above the threshold. Both have ordered
// corners. kIsUsual: is_usual holds for one of the two boxes, and nothing needs to be flushed.
template <bool kIsUsual = false>
ODTRT_HD bool suppresses(const Box &kept, float kept_area, const Box &other, float other_area,
                         float iou_threshold) {
  float iou = 0.0f;
  if (!(kept_area <= 0.0f || other_area <= 0.0f)) {
    const float top = larger(other.ymin, kept.ymin), left = larger(other.xmin, kept.xmin);
    const float bottom = smaller(other.ymax, kept.ymax), right = smaller(other.xmax, kept.xmax);
    const auto flush = [](float value) { return kIsUsual ? larger(value, 0.0f) : normal_or_zero(value); };
    const float height = flush(sub(bottom, top)), width = flush(sub(right, left));
    const float intersection = kIsUsual ? mul(height, width) : flush(mul(height, width));
    iou = divide(intersection, sub(add(other_area, kept_area), intersection));
  }
  // A subnormal IoU counts as 0, which is not above a threshold of 0.
  if (flushed(iou_threshold) == 0.0f) iou_threshold = kGreatestSubnormal;
  return !(iou <= iou_threshold);
}

// tf.minimum and tf.maximum, which keep NaN as numpy's do.
ODTRT_HD float clamp(float value, float low, float high) {
  if (value != value) return value;
  value = flushed(value);
  value = value > high ? high : value;
  return value < low ? low : value;
}

ODTRT_HD Box clip(const Box &box, const Box &window) {
  return {clamp(box.ymin, window.ymin, window.ymax), clamp(box.xmin, window.xmin, window.xmax),
          clamp(box.ymax, window.ymin, window.ymax), clamp(box.xmax, window.xmin, window.xmax)};
}

ODTRT_HD Box in_frame_of(const Box &window, const Box &box) {
  const float y = divide(1.0f, sub(window.ymax, window.ymin)), x = divide(1.0f, sub(window.xmax, window.xmin));
  return flushed({mul(flushed_sub(box.ymin, window.ymin), y), mul(flushed_sub(box.xmin, window.xmin), x),
                  mul(flushed_sub(box.ymax, window.ymin), y), mul(flushed_sub(box.xmax, window.xmin), x)});
}

// Packs score and place into one integer. The final order is that of descending keys: score down, then `place` up. A
// key is never 0.
ODTRT_HD uint64_t order_key(float score, uint32_t place) {
  return static_cast<uint64_t>(ordered(score)) << 32 | static_cast<uint32_t>(~place);
}

ODTRT_HD uint32_t place_of(uint64_t key) { return ~static_cast<uint32_t>(key); }
ODTRT_HD float score_of(uint64_t key) { return unordered(static_cast<uint32_t>(key >> 32)); }

// Where output pixel i of an axis lies in the source: source[lower] * (1 - weight) + source[upper] * weight. The rule
// is that of ResizeBilinear with half_pixel_centers=False.
struct Sample {
  int32_t lower, upper;
  float weight;
};

ODTRT_HD Sample sample(int32_t i, int32_t in_size, float in_over_out) {
  const float position = mul(static_cast<float>(i), in_over_out);
  int32_t lower = static_cast<int32_t>(position);
  lower = lower < in_size - 1 ? lower : in_size - 1;
  const int32_t upper = lower + 1 < in_size ? lower + 1 : in_size - 1;
  return {lower, upper, upper > lower ? sub(position, static_cast<float>(lower)) : 0.0f};
}

// Interpolates between `low` and `high` with TensorFlow's order of operations.
ODTRT_HD float between(float low, float high, float weight) { return add(low, mul(sub(high, low), weight)); }

}  // namespace odtrt

// IEEE half precision as 16-bit patterns. The conversions are exact, and use integer operations that any compiler can
// vectorise.
#pragma once

#include <cstdint>

#include "semantics.h"

namespace odtrt {

inline float float_of_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, shifted = magnitude << 13;
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t special = shifted | 0x7f800000u;  // infinity and NaN
  const uint32_t tiny = bits_of(sub(float_of(shifted + (113u << 23)), float_of(113u << 23)));
  const uint32_t bits = magnitude < 0x0400u ? tiny : magnitude >= 0x7c00u ? special : normal;
  return float_of(bits | static_cast<uint32_t>(half & 0x8000u) << 16);
}

// Rounds to the nearest half, and to the even one if two are equally near.
inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t tiny = bits_of(add(float_of(magnitude), 0.5f)) - bits_of(0.5f);  // 0.5 has units of 2^-24
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t half = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? tiny : normal;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

// Maps halves to integers in the same order. NaN becomes the lowest.
inline int16_t ordered_half(uint16_t half) {
  const uint16_t magnitude = half & 0x7fffu;
  const int16_t sign = static_cast<int16_t>(static_cast<int16_t>(half) >> 15);
  const int16_t number = static_cast<int16_t>(half ^ (sign & 0x7fff));
  return magnitude > 0x7c00u ? INT16_MIN : number;
}

inline uint16_t unordered_half(int16_t number) {
  return static_cast<uint16_t>(number ^ ((number >> 15) & 0x7fff));
}

}  // namespace odtrt

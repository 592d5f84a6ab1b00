// Half precision, by the conversions of the CPU library.
#pragma once

#include "cuda_runtime.h"
#include "half.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return odtrt::float_of_half(value.bits); }
inline __half __float2half_rn(float value) { return {odtrt::half_of_float(value)}; }

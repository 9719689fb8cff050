// float16 as the host executor has it: a storage type and its conversions, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

#if !defined(__FLT16_MAX__)
#error "the host executor needs a compiler with _Float16: g++ 12 or clang++ 15"
#endif

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half __double2half(double x) { return {static_cast<_Float16>(x)}; }

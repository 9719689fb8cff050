// float16 as the host executor has it: a storage type and its conversions, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31;
  const uint32_t rest = uint32_t{x.bits} & 0x7fff;
  if (rest >= 0x7c00) return simt::bit_cast<float>(sign | 0x7f800000 | rest << 13);
  // The exponent's bias is 112 less; a multiplication has subnormal numbers right too.
  return simt::bit_cast<float>(
      sign | simt::bit_cast<uint32_t>(simt::bit_cast<float>(rest << 13) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = simt::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 31 << 15);
  const uint32_t rest = bits & 0x7fffffff;
  uint32_t result;
  if (rest > 0x7f800000) {
    result = 0x7fff;
  } else if (rest >= 0x477ff000) {  // 65520, half of the way from the largest number to the next
    result = 0x7c00;
  } else if (rest < 0x38800000) {  // 2^-14: multiples of 2^-24, to which the sum is rounded
    result = simt::bit_cast<uint32_t>(simt::bit_cast<float>(rest) + 0.5f) - 0x3f000000;
  } else {
    result = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

inline __half __double2half(double x) { return __float2half_rn(simt::round_to_odd(x)); }

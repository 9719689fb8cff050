// bfloat16 as the host executor has it: a storage type and its conversions, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return simt::bit_cast<float>(uint32_t{x.bits} << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = simt::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline __nv_bfloat16 __double2bfloat16(double x) {
  return __float2bfloat16_rn(simt::round_to_odd(x));
}

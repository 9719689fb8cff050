// bfloat16 as the host executor has it: a storage type and its conversions, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Through float, rounded to odd: the second rounding then is right, as if it were the only one.
inline __nv_bfloat16 __double2bfloat16(double x) {
  float narrow = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &narrow, sizeof(bits));
  if (std::isfinite(narrow) && narrow != x && (bits & 1) == 0) {
    bits += (std::abs(static_cast<double>(narrow)) < std::abs(x)) ? 1u : ~0u;
    memcpy(&narrow, &bits, sizeof(narrow));
  }
  return __float2bfloat16_rn(narrow);
}

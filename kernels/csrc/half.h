// Floats rounded to float16's eleven bits, as llama.cpp rounds activations and their scales.
#pragma once
#include <stdint.h>

namespace {

// Whether float16 has x among its normal numbers; false for NaN.
inline bool InHalfRange(float x) {
  const float magnitude = __builtin_fabsf(x);
  return magnitude >= 6.103515625e-5f && magnitude < 65520.0f;
}

// Half to even, as the hardware does. Out of range x stays as it is: float16 would lose more than
// its last bit, or overflow.
inline float RoundToHalf(float x) {
  if (!InHalfRange(x)) return x;
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

}  // namespace

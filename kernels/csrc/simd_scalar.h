// Sixteen lanes in portable C++ (GCC and Clang vector types): the implementation for any machine.
// Every simd_*.h defines the same `Simd`; formats.h and the kernels are written once against it.
#pragma once
#include <stdint.h>

// Small code matters more than speed here: without this, sixteen lanes of everything are inlined.
#define Q4_INLINE inline
#define Q4_LAMBDA

namespace {

inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // Zero and subnormals: mantissa * 2^-24 is exact in float.
    const float value = (float)mantissa * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t FloatToHalf(float f) {  // Round to nearest even, as the hardware does.
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // Subnormal half: let float addition do the rounding.
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return sign | (uint16_t)(bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | (uint16_t)((bits - 0x38000000) >> 13);
}

struct Simd {
  typedef float F __attribute__((vector_size(64)));
  typedef uint32_t I __attribute__((vector_size(64)));
  typedef int32_t Signed __attribute__((vector_size(64)));
  typedef uint8_t B __attribute__((vector_size(16)));
  // Rows of x at once.
  template <int bits>
  static constexpr int kStrip = 1;
  static constexpr int kFloatStrip = 1;
  // Tiles side by side, and the most rows of x that meet weights as they lie, as in simd_avx2.h.
  static constexpr int kStreams = 4, kDirectRows = 2;

  static F Zero() { return F{}; }
  static F Set(float x) { return x - F{}; }
  static F Load(const float* p) { F r; __builtin_memcpy(&r, p, 64); return r; }
  static void Store(float* p, F a) { __builtin_memcpy(p, &a, 64); }
  static F Add(F a, F b) { return a + b; }
  static F Mul(F a, F b) { return a * b; }
  static F Max(F a, F b) { return a > b ? a : b; }
  static F Fma(F a, F b, F c) { return a * b + c; }
  static __attribute__((noinline)) F LoadHalf(const void* p) {
    uint16_t h[16];
    __builtin_memcpy(h, p, 32);
    F r;
    for (int i = 0; i < 16; i++) r[i] = HalfToFloat(h[i]);
    return r;
  }
  static float HalfOne(uint16_t h) { return HalfToFloat(h); }
  static __attribute__((noinline)) void StoreHalf(uint16_t* p, F a) { for (int i = 0; i < 16; i++) p[i] = FloatToHalf(a[i]); }
  static F LoadBf16(const void* p) { return FromBits(LoadU16(p) << 16); }
  static float Sum(F a) {  // The same tree as the vector versions, so that results agree.
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
  }
  static float Largest(F a) {
    for (int i = 1; i < 16; i++) a[0] = a[i] > a[0] ? a[i] : a[0];
    return a[0];
  }

  static I ISet(int32_t x) { return (uint32_t)x + I{}; }
  static I ILoad(const void* p) { I r; __builtin_memcpy(&r, p, 64); return r; }
  static void IStore(void* p, I a) { __builtin_memcpy(p, &a, 64); }
  // A byte of each row.
  static B BSet(int x) { return (uint8_t)x + B{}; }
  static B BLoad(const uint8_t* p) { B r; __builtin_memcpy(&r, p, 16); return r; }
  static void BStore(void* p, B a) { __builtin_memcpy(p, &a, 16); }
  static B BAnd(B a, B b) { return a & b; }
  static B BOr(B a, B b) { return a | b; }
  static B BAdd(B a, B b) { return a + b; }
  static B BShl(B a, int n) { return a << n; }
  static B BShr(B a, int n) { return a >> n; }
  template <bool is_signed>
  static __attribute__((noinline)) I Widen(B a) {
    I r;
    for (int i = 0; i < 16; i++) r[i] = is_signed ? (uint32_t)(int32_t)(int8_t)a[i] : a[i];
    return r;
  }
  // The low byte of each lane.
  static B Narrow(I a) { B r; for (int i = 0; i < 16; i++) r[i] = (uint8_t)a[i]; return r; }
  static __attribute__((noinline)) I LoadU16(const void* p) {
    uint16_t h[16];
    __builtin_memcpy(h, p, 32);
    I r;
    for (int i = 0; i < 16; i++) r[i] = h[i];
    return r;
  }
  static I And(I a, I b) { return a & b; }
  static I Or(I a, I b) { return a | b; }
  static I Xor(I a, I b) { return a ^ b; }
  static I AddI(I a, I b) { return a + b; }
  static I MulI(I a, I b) { return a * b; }
  static I Shl(I a, int n) { return a << n; }
  static I Shr(I a, int n) { return a >> n; }
  static I SubI(I a, I b) { return a - b; }
  // Bit i: lane i is below zero.
  static uint32_t Negative(I a) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; i++) bits |= a[i] >> 31 << i;
    return bits;
  }
  static F ToFloat(I a) { return __builtin_convertvector((Signed)a, F); }
  static I Bits(F a) { I r; __builtin_memcpy(&r, &a, 64); return r; }
  static F FromBits(I a) { F r; __builtin_memcpy(&r, &a, 64); return r; }
  // To the nearest, ties to even, where |a| < 2^22: 1.5 * 2^23 leaves the integer in the low bits.
  static I Round(F a) { return Bits(a + 12582912.0f) - 0x4B400000u; }
  // Each byte of `codes` (0..15) replaced by table[code].
  static __attribute__((noinline)) I Lookup(I codes, const uint8_t* table) {
    uint8_t b[64];
    __builtin_memcpy(b, &codes, 64);
    for (int i = 0; i < 64; i++) b[i] = table[b[i] & 15];
    return ILoad(b);
  }

  // Products of unsigned codes with signed bytes. See simd_avx2.h.
  template <int bits>
  static constexpr int kPlanes = 1;
  template <int bits>
  static constexpr int kChain = 64;
  template <int bits, int plane>
  static I Plane(I codes) { return codes; }
  static I Begin(I total) { return total; }
  static __attribute__((noinline)) I Dot(I sum, I codes, int32_t x) {
    sum += (codes & 255) * (uint32_t)(int32_t)(int8_t)x;
    sum += (codes >> 8 & 255) * (uint32_t)(int32_t)(int8_t)(x >> 8);
    sum += (codes >> 16 & 255) * (uint32_t)(int32_t)(int8_t)(x >> 16);
    return sum + (codes >> 24) * (uint32_t)(x >> 24);
  }
  template <int plane>
  static I End(I, I sum) { return sum; }
  template <bool is_signed>
  static I Multiplier(B scale) { return Widen<is_signed>(scale); }
  template <int plane>
  static I AddScaled(I total, I sum, I multiplier) { return total + sum * multiplier; }
  template <bool is_signed, int shift>
  static I Pair(B low, B high) {
    return (Widen<is_signed>(low) << shift & 0xffff) | Widen<is_signed>(high) << shift << 16;
  }
  static I AddPairs(I total, I pair, int32_t x) {
    const I low = (I)((Signed)(pair << 16) >> 16), high = (I)((Signed)pair >> 16);
    return total + low * (uint32_t)(int32_t)(int16_t)x + high * (uint32_t)(x >> 16);
  }
};

}  // namespace

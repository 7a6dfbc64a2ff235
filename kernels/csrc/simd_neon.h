// Sixteen lanes as four NEON registers (needs Armv8.2's dot product of bytes).
#pragma once
#include <arm_neon.h>
#include <stdint.h>

#define Q4_INLINE inline __attribute__((always_inline))
#define Q4_LAMBDA __attribute__((always_inline))

namespace {

struct Simd {
  struct F { float32x4_t a, b, c, d; };
  struct I { uint32x4_t a, b, c, d; };
  using B = uint8x16_t;
  // Rows of x at once: 16 sums, 4 codes, 1 of x in 32 registers. With 6, GCC spills, and runs more
  // instructions for a product in the five formats counted.
  template <int bits>
  static constexpr int kStrip = 4;
  static constexpr int kFloatStrip = 2;
  // Tiles side by side, and the most rows of x that meet weights as they lie, as in simd_avx2.h.
  static constexpr int kStreams = 4, kDirectRows = 2;

  static F Zero() { return Set(0.0f); }
  static F Set(float x) {
    const float32x4_t y = vdupq_n_f32(x);
    return {y, y, y, y};
  }
  static F Load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
  static void Store(float* p, F x) {
    vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d);
  }
  static F Add(F x, F y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
  static F Mul(F x, F y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
  static F Max(F x, F y) {  // x > y ? x : y
    return {vbslq_f32(vcgtq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcgtq_f32(x.b, y.b), x.b, y.b),
            vbslq_f32(vcgtq_f32(x.c, y.c), x.c, y.c), vbslq_f32(vcgtq_f32(x.d, y.d), x.d, y.d)};
  }
  static F Fma(F x, F y, F z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
  }
  static F LoadHalf(const void* p) {
    const float16x8_t x = vreinterpretq_f16_u8(vld1q_u8((const uint8_t*)p));
    const float16x8_t y = vreinterpretq_f16_u8(vld1q_u8((const uint8_t*)p + 16));
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x), vcvt_f32_f16(vget_low_f16(y)), vcvt_high_f32_f16(y)};
  }
  static float HalfOne(uint16_t h) {
    __fp16 x;
    __builtin_memcpy(&x, &h, 2);
    return x;
  }
  static void StoreHalf(uint16_t* p, F x) {  // Rounds half to even, as FPCR says where nobody changed it.
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
    vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
  }
  static F LoadBf16(const void* p) { return FromBits(Shl(LoadU16(p), 16)); }
  static float Sum(F x) {
    const float32x4_t s = (x.a + x.c) + (x.b + x.d);
    const float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
  }
  static float Largest(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d))); }

  static I ISet(int32_t x) {
    const uint32x4_t y = vdupq_n_u32((uint32_t)x);
    return {y, y, y, y};
  }
  static I ILoad(const void* p) {
    const uint8_t* q = (const uint8_t*)p;
    return {(uint32x4_t)vld1q_u8(q), (uint32x4_t)vld1q_u8(q + 16), (uint32x4_t)vld1q_u8(q + 32),
            (uint32x4_t)vld1q_u8(q + 48)};
  }
  static void IStore(void* p, I x) {
    uint8_t* q = (uint8_t*)p;
    vst1q_u8(q, (B)x.a), vst1q_u8(q + 16, (B)x.b), vst1q_u8(q + 32, (B)x.c), vst1q_u8(q + 48, (B)x.d);
  }
  // A byte of each row.
  static B BSet(int x) { return vdupq_n_u8((uint8_t)x); }
  static B BLoad(const uint8_t* p) { return vld1q_u8(p); }
  static void BStore(void* p, B x) { vst1q_u8((uint8_t*)p, x); }
  static B BAnd(B x, B y) { return x & y; }
  static B BOr(B x, B y) { return x | y; }
  static B BAdd(B x, B y) { return x + y; }
  static B BShl(B x, int n) { return x << n; }
  static B BShr(B x, int n) { return x >> n; }
  template <bool is_signed>
  static int16x8_t WidenLow(B x) {
    return is_signed ? vmovl_s8(vget_low_s8((int8x16_t)x)) : (int16x8_t)vmovl_u8(vget_low_u8(x));
  }
  template <bool is_signed>
  static int16x8_t WidenHigh(B x) {
    return is_signed ? vmovl_high_s8((int8x16_t)x) : (int16x8_t)vmovl_high_u8(x);
  }
  template <bool is_signed>
  static I Widen(B x) {
    const int16x8_t low = WidenLow<is_signed>(x), high = WidenHigh<is_signed>(x);
    return {(uint32x4_t)vmovl_s16(vget_low_s16(low)), (uint32x4_t)vmovl_high_s16(low),
            (uint32x4_t)vmovl_s16(vget_low_s16(high)), (uint32x4_t)vmovl_high_s16(high)};
  }
  // The low byte of each lane.
  static B Narrow(I x) {
    const uint16x8_t low = vuzp1q_u16((uint16x8_t)x.a, (uint16x8_t)x.b);
    const uint16x8_t high = vuzp1q_u16((uint16x8_t)x.c, (uint16x8_t)x.d);
    return vuzp1q_u8((B)low, (B)high);
  }
  static I LoadU16(const void* p) {
    const uint16x8_t x = (uint16x8_t)vld1q_u8((const uint8_t*)p), y = (uint16x8_t)vld1q_u8((const uint8_t*)p + 16);
    return {vmovl_u16(vget_low_u16(x)), vmovl_high_u16(x), vmovl_u16(vget_low_u16(y)), vmovl_high_u16(y)};
  }
  static I And(I x, I y) { return {x.a & y.a, x.b & y.b, x.c & y.c, x.d & y.d}; }
  static I Or(I x, I y) { return {x.a | y.a, x.b | y.b, x.c | y.c, x.d | y.d}; }
  static I Xor(I x, I y) { return {x.a ^ y.a, x.b ^ y.b, x.c ^ y.c, x.d ^ y.d}; }
  static I AddI(I x, I y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
  static I MulI(I x, I y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
  static I Shl(I x, int n) { return {x.a << n, x.b << n, x.c << n, x.d << n}; }
  static I Shr(I x, int n) { return {x.a >> n, x.b >> n, x.c >> n, x.d >> n}; }
  static I SubI(I x, I y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
  // Bit i: lane i is below zero.
  static uint32_t Negative(I x) {
    const int32x4_t at = {0, 1, 2, 3};
    const auto bits = [&](uint32x4_t lanes) { return vaddvq_u32(vshlq_u32(vshrq_n_u32(lanes, 31), at)); };
    return bits(x.a) | bits(x.b) << 4 | bits(x.c) << 8 | bits(x.d) << 12;
  }
  static F ToFloat(I x) {
    return {vcvtq_f32_s32((int32x4_t)x.a), vcvtq_f32_s32((int32x4_t)x.b), vcvtq_f32_s32((int32x4_t)x.c),
            vcvtq_f32_s32((int32x4_t)x.d)};
  }
  static I Bits(F x) { return {(uint32x4_t)x.a, (uint32x4_t)x.b, (uint32x4_t)x.c, (uint32x4_t)x.d}; }
  static F FromBits(I x) { return {(float32x4_t)x.a, (float32x4_t)x.b, (float32x4_t)x.c, (float32x4_t)x.d}; }
  static I Round(F x) {  // To the nearest, ties to even.
    return {(uint32x4_t)vcvtnq_s32_f32(x.a), (uint32x4_t)vcvtnq_s32_f32(x.b), (uint32x4_t)vcvtnq_s32_f32(x.c),
            (uint32x4_t)vcvtnq_s32_f32(x.d)};
  }
  static I Lookup(I codes, const uint8_t* table) {
    const B t = vld1q_u8(table);
    return {(uint32x4_t)vqtbl1q_u8(t, (B)codes.a), (uint32x4_t)vqtbl1q_u8(t, (B)codes.b),
            (uint32x4_t)vqtbl1q_u8(t, (B)codes.c), (uint32x4_t)vqtbl1q_u8(t, (B)codes.d)};
  }

  // Products of unsigned codes with signed bytes. The instruction takes signed ones and sums in 32
  // bits, so codes of 8 bits go as two planes: code - 128, and 64, whose sum counts twice.
  template <int bits>
  static constexpr int kPlanes = bits > 7 ? 2 : 1;
  template <int bits>
  static constexpr int kChain = 64;
  template <int bits, int plane>
  static I Plane(I codes) {
    if (bits <= 7) return codes;
    return plane ? ISet(0x40404040) : Xor(codes, ISet((int32_t)0x80808080));
  }
  static uint32x4_t DotOne(uint32x4_t sum, uint32x4_t codes, int8x16_t x) {
    return (uint32x4_t)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, x);
  }
  static I Begin(I total) { return total; }
  static I Dot(I sum, I codes, int32_t x) {
    const int8x16_t xs = (int8x16_t)vdupq_n_s32(x);
    return {DotOne(sum.a, codes.a, xs), DotOne(sum.b, codes.b, xs), DotOne(sum.c, codes.c, xs), DotOne(sum.d, codes.d, xs)};
  }
  template <int plane>
  static I End(I total, I sum) { return plane ? AddI(sum, SubI(sum, total)) : sum; }
  template <bool is_signed>
  static I Multiplier(B scale) { return Widen<is_signed>(scale); }
  template <int plane>
  static I AddScaled(I total, I sum, I multiplier) {
    return AddI(total, MulI(sum, plane ? Shl(multiplier, 1) : multiplier));
  }
  // The bytes of `low`, times 2^shift, in a and b, those of `high` in c and d; and total + their
  // products with the halves of x.
  template <bool is_signed, int shift>
  static I Pair(B low, B high) {
    return {(uint32x4_t)(WidenLow<is_signed>(low) << shift), (uint32x4_t)(WidenHigh<is_signed>(low) << shift),
            (uint32x4_t)(WidenLow<is_signed>(high) << shift), (uint32x4_t)(WidenHigh<is_signed>(high) << shift)};
  }
  static I AddPairs(I total, I pair, int32_t x) {
    const int16_t x0 = (int16_t)x, x1 = (int16_t)(x >> 16);
    const auto lower = [&](uint32x4_t sum, uint32x4_t low, uint32x4_t high) Q4_LAMBDA {
      const int32x4_t first = vmlal_n_s16((int32x4_t)sum, vget_low_s16((int16x8_t)low), x0);
      return (uint32x4_t)vmlal_n_s16(first, vget_low_s16((int16x8_t)high), x1);
    };
    const auto upper = [&](uint32x4_t sum, uint32x4_t low, uint32x4_t high) Q4_LAMBDA {
      const int32x4_t first = vmlal_high_n_s16((int32x4_t)sum, (int16x8_t)low, x0);
      return (uint32x4_t)vmlal_high_n_s16(first, (int16x8_t)high, x1);
    };
    return {lower(total.a, pair.a, pair.c), upper(total.b, pair.a, pair.c), lower(total.c, pair.b, pair.d),
            upper(total.d, pair.b, pair.d)};
  }
};

}  // namespace

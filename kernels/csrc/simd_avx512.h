// Sixteen lanes as one AVX-512 register (needs F, BW, VL, DQ and VNNI).
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define Q4_INLINE inline __attribute__((always_inline))
#define Q4_LAMBDA __attribute__((always_inline))

namespace {

struct Simd {
  using F = __m512;
  using I = __m512i;
  using B = __m128i;
  // Rows of x at once.
  template <int bits>
  static constexpr int kStrip = 8;
  static constexpr int kFloatStrip = 4;
  // Tiles side by side, and the most rows of x that meet weights as they lie (docs/adr/0014).
  static constexpr int kStreams = 1, kDirectRows = 4;

  static F Zero() { return _mm512_setzero_ps(); }
  static F Set(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F Add(F x, F y) { return _mm512_add_ps(x, y); }
  static F Mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static F Max(F x, F y) { return _mm512_max_ps(x, y); }  // x > y ? x : y
  static F Fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static F LoadHalf(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static float HalfOne(uint16_t h) { return _cvtsh_ss(h); }
  static void StoreHalf(uint16_t* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static F LoadBf16(const void* p) { return FromBits(Shl(LoadU16(p), 16)); }
  static float Sum(F x) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
  }
  static float Largest(F x) {
    const __m256 s = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
  }

  static I ISet(int32_t x) { return _mm512_set1_epi32(x); }
  static I ILoad(const void* p) { return _mm512_loadu_si512(p); }
  static void IStore(void* p, I x) { _mm512_storeu_si512(p, x); }
  // A byte of each row.
  static B BSet(int x) { return _mm_set1_epi8((char)x); }
  static B BLoad(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
  static void BStore(void* p, B x) { _mm_storeu_si128((__m128i*)p, x); }
  static B BAnd(B x, B y) { return _mm_and_si128(x, y); }
  static B BOr(B x, B y) { return _mm_or_si128(x, y); }
  static B BAdd(B x, B y) { return _mm_add_epi8(x, y); }
  static B BShl(B x, int n) { return _mm_slli_epi16(x, n); }  // Bits that cross into the next byte
  static B BShr(B x, int n) { return _mm_srli_epi16(x, n); }  // are for the caller to mask.
  template <bool is_signed>
  static I Widen(B x) { return is_signed ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x); }
  // The low byte of each lane.
  static B Narrow(I x) { return _mm512_cvtepi32_epi8(x); }
  static I LoadU16(const void* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  }
  static I And(I x, I y) { return _mm512_and_si512(x, y); }
  static I Or(I x, I y) { return _mm512_or_si512(x, y); }
  static I Xor(I x, I y) { return _mm512_xor_si512(x, y); }
  static I AddI(I x, I y) { return _mm512_add_epi32(x, y); }
  static I MulI(I x, I y) { return _mm512_mullo_epi32(x, y); }
  static I Shl(I x, int n) { return _mm512_slli_epi32(x, n); }
  static I Shr(I x, int n) { return _mm512_srli_epi32(x, n); }
  static I SubI(I x, I y) { return _mm512_sub_epi32(x, y); }
  static uint32_t Negative(I x) { return _mm512_movepi32_mask(x); }  // Bit i: lane i is below zero.
  static F ToFloat(I x) { return _mm512_cvtepi32_ps(x); }
  static I Bits(F x) { return _mm512_castps_si512(x); }
  static F FromBits(I x) { return _mm512_castsi512_ps(x); }
  static I Round(F x) { return _mm512_cvtps_epi32(x); }  // To the nearest, ties to even.
  static I Lookup(I codes, const uint8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), codes);
  }

  // Products of unsigned codes with signed bytes: VNNI sums in 32 bits. See simd_avx2.h, which needs
  // more care.
  template <int bits>
  static constexpr int kPlanes = 1;
  template <int bits>
  static constexpr int kChain = 64;
  template <int bits, int plane>
  static I Plane(I codes) { return codes; }
  static I Begin(I total) { return total; }
  static I Dot(I sum, I codes, int32_t x) { return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(x)); }
  template <int plane>
  static I End(I, I sum) { return sum; }
  template <bool is_signed>
  static I Multiplier(B scale) { return Widen<is_signed>(scale); }
  template <int plane>
  static I AddScaled(I total, I sum, I multiplier) { return AddI(total, MulI(sum, multiplier)); }
  template <bool is_signed, int shift>
  static I Pair(B low, B high) {
    const __m256i x = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
    return is_signed ? _mm512_slli_epi16(_mm512_cvtepi8_epi16(x), shift) : _mm512_cvtepu8_epi16(x);
  }
  static I AddPairs(I total, I pair, int32_t x) { return _mm512_dpwssd_epi32(total, pair, _mm512_set1_epi32(x)); }
};

}  // namespace

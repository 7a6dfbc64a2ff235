// Sixteen lanes as two AVX2 registers (needs AVX2, FMA and F16C).
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define Q4_INLINE inline __attribute__((always_inline))
#define Q4_LAMBDA __attribute__((always_inline))

namespace {

struct Simd {
  struct F { __m256 a, b; };
  struct I { __m256i a, b; };
  using B = __m128i;
  // Rows of x at once: 12 sums, 2 codes, 1 of x in 16 registers; what splits 8-bit codes takes more.
  template <int bits>
  static constexpr int kStrip = bits > 6 ? 4 : 6;
  static constexpr int kFloatStrip = 3;
  // Tiles side by side (docs/adr/0009), and the most rows of x that meet weights as they lie.
  static constexpr int kStreams = 4, kDirectRows = 2;

  static F Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void Store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
  static F Add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F Mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F Max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // x > y ? x : y
  static F Fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F LoadHalf(const void* p) {
    const __m128i* q = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static float HalfOne(uint16_t h) { return _cvtsh_ss(h); }
  static void StoreHalf(uint16_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
  }
  static F LoadBf16(const void* p) { return FromBits(Shl(LoadU16(p), 16)); }
  static float Sum(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
  }
  static float Largest(F x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
  }

  static I ISet(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I ILoad(const void* p) {
    const __m256i* q = (const __m256i*)p;
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void IStore(void* p, I x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)p + 1, x.b);
  }
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
  static I Widen(B x) {
    const B y = _mm_srli_si128(x, 8);
    if (is_signed) return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(y)};
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(y)};
  }
  // The low byte of each lane.
  static B Narrow(I x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static I LoadU16(const void* p) {
    const __m128i* q = (const __m128i*)p;
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
  }
  static I And(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static I Or(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static I Xor(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
  static I AddI(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I MulI(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static I Shl(I x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
  static I Shr(I x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
  static I SubI(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  // Bit i: lane i is below zero.
  static uint32_t Negative(I x) {
    return _mm256_movemask_ps(_mm256_castsi256_ps(x.a)) | _mm256_movemask_ps(_mm256_castsi256_ps(x.b)) << 8;
  }
  static F ToFloat(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static I Bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  static F FromBits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  static I Round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }  // to the nearest, ties to even
  static I Lookup(I codes, const uint8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(t, codes.a), _mm256_shuffle_epi8(t, codes.b)};
  }

  // Products of unsigned codes below 2^bits with signed bytes. Sums stay in 16 bits for kChain steps
  // (each adds at most 2 * (2^bits - 1) * 128) and are then widened, times a scale, in one
  // instruction. Codes of 8 bits go as two planes of 4.
  template <int bits>
  static constexpr int kPlanes = bits > 6 ? 2 : 1;
  template <int bits>
  static constexpr int kChain = bits == 5 ? 4 : bits == 6 ? 2 : 8;
  template <int bits, int plane>
  static I Plane(I codes) {
    return bits <= 6 ? codes : And(plane ? Shr(codes, 4) : codes, ISet(0x0f0f0f0f));
  }
  static I Begin(I) { return ISet(0); }
  static I Dot(I sum, I codes, int32_t x) {
    const __m256i xs = _mm256_set1_epi32(x);
    return {Add16(sum.a, _mm256_maddubs_epi16(codes.a, xs)), Add16(sum.b, _mm256_maddubs_epi16(codes.b, xs))};
  }
  // An addition that GCC takes as it comes: of a chain of its own it makes a tree, and spills it.
  static __m256i Add16(__m256i x, __m256i y) {
    asm("vpaddw %2, %1, %0" : "=x"(x) : "x"(x), "x"(y));
    return x;
  }
  template <int plane>
  static I End(I total, I sum) { return AddScaled<0>(total, sum, ISet(plane ? 0x00100010 : 0x00010001)); }
  // What AddScaled takes for scales in bytes: each twice in its lane.
  template <bool is_signed>
  static I Multiplier(B scale) {
    const __m256i twice = _mm256_broadcastsi128_si256(scale);
    const __m256i at = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                        -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
    const __m256i a = _mm256_shuffle_epi8(twice, at);
    const __m256i b = _mm256_shuffle_epi8(twice, _mm256_add_epi8(at, _mm256_set1_epi16(0x0800)));
    if (is_signed) return {_mm256_srai_epi16(a, 8), _mm256_srai_epi16(b, 8)};
    return {_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)};
  }
  template <int plane>
  static I AddScaled(I total, I sum, I multiplier) {
    if (plane) multiplier = {_mm256_slli_epi16(multiplier.a, 4), _mm256_slli_epi16(multiplier.b, 4)};
    return {_mm256_add_epi32(total.a, _mm256_madd_epi16(sum.a, multiplier.a)),
            _mm256_add_epi32(total.b, _mm256_madd_epi16(sum.b, multiplier.b))};
  }
  // The bytes of `low` and `high` times 2^shift in the halves of each lane, and total + their products
  // with the halves of x.
  template <bool is_signed, int shift>
  static I Pair(B low, B high) {
    const B a = _mm_unpacklo_epi8(low, high), b = _mm_unpackhi_epi8(low, high);
    if (!is_signed) return {_mm256_cvtepu8_epi16(a), _mm256_cvtepu8_epi16(b)};
    return {_mm256_slli_epi16(_mm256_cvtepi8_epi16(a), shift), _mm256_slli_epi16(_mm256_cvtepi8_epi16(b), shift)};
  }
  static I AddPairs(I total, I pair, int32_t x) {
    const __m256i xs = _mm256_set1_epi32(x);
    return {_mm256_add_epi32(total.a, _mm256_madd_epi16(pair.a, xs)),
            _mm256_add_epi32(total.b, _mm256_madd_epi16(pair.b, xs))};
  }
};

}  // namespace

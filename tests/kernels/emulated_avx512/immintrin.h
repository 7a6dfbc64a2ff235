// The AVX-512 intrinsics that simd_avx512.h uses, on AVX2: for machines without them, to run the
// very source of the AVX-512 kernels. Written from Intel's intrinsics guide. Compile with
// -I of this folder first, -mavx2 -mfma -mf16c.
#pragma once
#include_next <immintrin.h>

struct Floats512 { __m256 a, b; };
struct Ints512 { __m256i a, b; };
#define __m512 Floats512
#define __m512i Ints512
#define EMULATED static inline __attribute__((always_inline))

#define _mm512_setzero_ps() (Floats512{_mm256_setzero_ps(), _mm256_setzero_ps()})
#define _mm512_set1_ps(x) (Floats512{_mm256_set1_ps(x), _mm256_set1_ps(x)})
#define _mm512_set1_epi32(x) (Ints512{_mm256_set1_epi32(x), _mm256_set1_epi32(x)})

EMULATED Floats512 emulated_loadu_ps(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
EMULATED void emulated_storeu_ps(float* p, Floats512 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
EMULATED Ints512 emulated_loadu_si512(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
EMULATED void emulated_storeu_si512(void* p, Ints512 x) {
  _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_storeu_si512 emulated_storeu_si512

#define FLOATS2(name) \
  EMULATED Floats512 emulated_##name(Floats512 x, Floats512 y) { return {_mm256_##name(x.a, y.a), _mm256_##name(x.b, y.b)}; }
#define INTS2(name, half) \
  EMULATED Ints512 emulated_##name(Ints512 x, Ints512 y) { return {_mm256_##half(x.a, y.a), _mm256_##half(x.b, y.b)}; }
#define SHIFT(name) \
  EMULATED Ints512 emulated_##name(Ints512 x, int n) { return {_mm256_##name(x.a, n), _mm256_##name(x.b, n)}; }
FLOATS2(add_ps)
FLOATS2(mul_ps)
FLOATS2(max_ps)
INTS2(and_si512, and_si256)
INTS2(or_si512, or_si256)
INTS2(xor_si512, xor_si256)
INTS2(add_epi32, add_epi32)
INTS2(sub_epi32, sub_epi32)
INTS2(mullo_epi32, mullo_epi32)
INTS2(shuffle_epi8, shuffle_epi8)
SHIFT(slli_epi16)
SHIFT(slli_epi32)
SHIFT(srli_epi32)
#define _mm512_add_ps emulated_add_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_max_ps emulated_max_ps
#define _mm512_and_si512 emulated_and_si512
#define _mm512_or_si512 emulated_or_si512
#define _mm512_xor_si512 emulated_xor_si512
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_sub_epi32 emulated_sub_epi32
#define _mm512_mullo_epi32 emulated_mullo_epi32
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#define _mm512_slli_epi16 emulated_slli_epi16
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_srli_epi32 emulated_srli_epi32

EMULATED Floats512 emulated_fmadd_ps(Floats512 x, Floats512 y, Floats512 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
#define _mm512_fmadd_ps emulated_fmadd_ps

EMULATED __m128i emulated_upper(__m128i x) { return _mm_srli_si128(x, 8); }
EMULATED __m128i emulated_upper(__m256i x) { return _mm256_extracti128_si256(x, 1); }
#define WIDEN(name, from, lower)                                     \
  EMULATED Ints512 emulated_##name(from x) {                         \
    return {_mm256_##name(lower), _mm256_##name(emulated_upper(x))}; \
  }
WIDEN(cvtepu8_epi32, __m128i, x)
WIDEN(cvtepi8_epi32, __m128i, x)
WIDEN(cvtepu8_epi16, __m256i, _mm256_castsi256_si128(x))
WIDEN(cvtepi8_epi16, __m256i, _mm256_castsi256_si128(x))
WIDEN(cvtepu16_epi32, __m256i, _mm256_castsi256_si128(x))
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16
#define _mm512_cvtepi8_epi16 emulated_cvtepi8_epi16
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32

EMULATED Floats512 emulated_cvtepi32_ps(Ints512 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
EMULATED Floats512 emulated_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(emulated_upper(x))};
}
EMULATED __m256i emulated_cvtps_ph(Floats512 x, int) {
  return _mm256_set_m128i(_mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}
EMULATED Floats512 emulated_castsi512_ps(Ints512 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
EMULATED Ints512 emulated_castps_si512(Floats512 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
EMULATED Ints512 emulated_cvtps_epi32(Floats512 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
EMULATED __m256 emulated_castps512_ps256(Floats512 x) { return x.a; }
EMULATED __m256 emulated_extractf32x8_ps(Floats512 x, int half) { return half ? x.b : x.a; }
EMULATED Ints512 emulated_broadcast_i32x4(__m128i x) {
  return {_mm256_broadcastsi128_si256(x), _mm256_broadcastsi128_si256(x)};
}
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_ph emulated_cvtps_ph
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_castps_si512 emulated_castps_si512
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_castps512_ps256 emulated_castps512_ps256
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_broadcast_i32x4 emulated_broadcast_i32x4

// The low byte of each 32-bit lane.
EMULATED __m128i emulated_cvtepi32_epi8(Ints512 x) {
  alignas(32) int32_t lanes[16];
  emulated_storeu_si512(lanes, x);
  alignas(16) int8_t bytes[16];
  for (int i = 0; i < 16; i++) bytes[i] = (int8_t)lanes[i];
  return _mm_load_si128((const __m128i*)bytes);
}
// sum + the products of four unsigned bytes of x with four signed ones of y, lane by lane.
EMULATED __m256i emulated_dpbusd(__m256i sum, __m256i x, __m256i y) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
EMULATED Ints512 emulated_dpbusd_epi32(Ints512 sum, Ints512 x, Ints512 y) {
  return {emulated_dpbusd(sum.a, x.a, y.a), emulated_dpbusd(sum.b, x.b, y.b)};
}
// sum + the products of two signed 16-bit numbers of x with two of y, lane by lane.
EMULATED Ints512 emulated_dpwssd_epi32(Ints512 sum, Ints512 x, Ints512 y) {
  return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, y.b))};
}
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_dpwssd_epi32 emulated_dpwssd_epi32

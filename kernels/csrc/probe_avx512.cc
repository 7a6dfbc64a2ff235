#include <immintrin.h>

#include "probe.h"

// vpdpbusd: 64 products and their sums in one instruction.
int64_t q4::Int8LoopAvx512(int64_t count) {
  constexpr int kChains = 16;
  __m512i acc[kChains], x = _mm512_set1_epi8(1), w = _mm512_set1_epi8(2);
  for (auto& a : acc) a = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i++) {
    asm volatile("" : "+v"(x), "+v"(w));
    for (auto& a : acc) a = _mm512_dpbusd_epi32(a, w, x);
  }
  for (auto& a : acc) asm volatile("" ::"v"(a));
  return 64 * kChains;
}

#include <immintrin.h>

#include "probe.h"

// vpmaddubsw and vpaddw: 32 products a pair of instructions. Kernels must also widen to 32 bits now
// and then, so this is out of reach, as a limit should be.
int64_t q4::Int8LoopAvx2(int64_t count) {
  constexpr int kChains = 12;
  __m256i acc[kChains], x = _mm256_set1_epi8(1), w = _mm256_set1_epi8(2);
  for (auto& a : acc) a = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i++) {
    asm volatile("" : "+x"(x), "+x"(w));
    for (auto& a : acc) {
      __m256i products = _mm256_maddubs_epi16(w, x);
      asm volatile("" : "+x"(products));  // Each chain's own, not one for all.
      a = _mm256_add_epi16(a, products);
    }
  }
  for (auto& a : acc) asm volatile("" ::"x"(a));
  return 32 * kChains;
}

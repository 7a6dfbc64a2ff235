// Grouped-query attention over a contiguous KV cache, for one instruction set.
//
// Slots are visited in ascending order with the same arithmetic for every query, so a query's
// result does not depend on how many are computed together, nor on the cache's unused slots.
#pragma once
#include "kernels.h"

namespace {

using q4::Attention;

template <bool half>
inline F LoadCache(const void* base, int64_t i) {
  return half ? Simd::LoadHalf((const uint16_t*)base + i) : Simd::Load((const float*)base + i);
}

template <bool half>
inline float LoadCacheOne(const void* base, int64_t i) {
  return half ? Simd::HalfOne(((const uint16_t*)base)[i]) : ((const float*)base)[i];
}

// exp(x) for x <= 0, relative error < 2e-7: 2^n * p(r), Cephes' polynomial for expf.
inline float Exp(float x) {
  if (x < -87.0f) return 0.0f;
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  float r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return p * scale;
}

// logits[r][s] = scale * q[r] . k[s] for R query heads that share a KV head.
template <bool half, int R>
void Logits(const Attention& a, const float* q, const void* k, int64_t slots, float* logits, int64_t stride) {
  const int64_t D = a.D, vectors = D / 16;
  for (int64_t s = 0; s < slots; s++) {
    F acc[R];
    for (int r = 0; r < R; r++) acc[r] = Simd::Zero();
    for (int64_t i = 0; i < vectors; i++) {
      const F key = LoadCache<half>(k, s * D + 16 * i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r] = Simd::Fma(Simd::Load(q + r * D + 16 * i), key, acc[r]);
    }
    for (int r = 0; r < R; r++) {
      float dot = Simd::Sum(acc[r]);
      for (int64_t i = 16 * vectors; i < D; i++) dot += q[r * D + i] * LoadCacheOne<half>(k, s * D + i);
      logits[r * stride + s] = dot * a.scale;
    }
  }
}

// In place: logits -> exp(logit - max); returns 1 / sum.
inline float Softmax(float* logits, int64_t slots) {
  float largest = logits[0];
  for (int64_t s = 1; s < slots; s++) largest = logits[s] > largest ? logits[s] : largest;
  float lanes[16] = {0};
  for (int64_t s = 0; s < slots; s++) {
    logits[s] = Exp(logits[s] - largest);
    lanes[s % 16] += logits[s];
  }
  return 1.0f / Simd::Sum(Simd::Load(lanes));
}

// out[r] = weight[r] * sum_s p[r][s] v[s].
template <bool half, int R>
void Mix(const Attention& a, const float* p, int64_t stride, const float* weight, const void* v, int64_t slots,
         float* out) {
  const int64_t D = a.D, vectors = D / 16;
  for (int64_t i = 0; i < vectors; i++) {
    F acc[R];
    for (int r = 0; r < R; r++) acc[r] = Simd::Zero();
    for (int64_t s = 0; s < slots; s++) {
      const F value = LoadCache<half>(v, s * D + 16 * i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r] = Simd::Fma(value, Simd::Set(p[r * stride + s]), acc[r]);
    }
    for (int r = 0; r < R; r++) Simd::Store(out + r * D + 16 * i, Simd::Mul(acc[r], Simd::Set(weight[r])));
  }
  for (int64_t i = 16 * vectors; i < D; i++) {
    for (int r = 0; r < R; r++) {
      float acc = 0.0f;
      for (int64_t s = 0; s < slots; s++) acc += p[r * stride + s] * LoadCacheOne<half>(v, s * D + i);
      out[r * D + i] = acc * weight[r];
    }
  }
}

template <bool half, int R>
void Heads(const Attention& a, const float* q, const void* k, const void* v, int64_t slots, float* scratch,
           float* out) {
  const int64_t stride = a.S + 16;
  float weight[R];
  Logits<half, R>(a, q, k, slots, scratch, stride);
  for (int r = 0; r < R; r++) weight[r] = Softmax(scratch + r * stride, slots);
  Mix<half, R>(a, scratch, stride, weight, v, slots, out);
}

template <bool half>
void AttendRows(const Attention& a, int64_t b, int64_t h, int64_t t0, int64_t t1, float* scratch) {
  const int64_t repeat = a.Hq / a.Hkv, bytes = half ? 2 : 4;
  const uint8_t* k = (const uint8_t*)a.k + (b * a.Hkv + h) * a.S * a.D * bytes;
  const uint8_t* v = (const uint8_t*)a.v + (b * a.Hkv + h) * a.S * a.D * bytes;
  for (int64_t t = t0; t < t1; t++) {
    const int64_t row = ((b * a.T + t) * a.Hq + h * repeat) * a.D;
    if (t >= a.length[b]) {  // Padding: defined, and never looked at.
      for (int64_t i = 0; i < repeat * a.D; i++) a.out[row + i] = 0.0f;
      continue;
    }
    const int64_t slots = a.start[b] + t + 1;
    int64_t r = 0;
    for (; r + 4 <= repeat; r += 4) Heads<half, 4>(a, a.q + row + r * a.D, k, v, slots, scratch, a.out + row + r * a.D);
    for (; r + 2 <= repeat; r += 2) Heads<half, 2>(a, a.q + row + r * a.D, k, v, slots, scratch, a.out + row + r * a.D);
    for (; r < repeat; r++) Heads<half, 1>(a, a.q + row + r * a.D, k, v, slots, scratch, a.out + row + r * a.D);
  }
}

void Attend(const Attention& a, bool half, int64_t b, int64_t h, int64_t t0, int64_t t1, float* scratch) {
  half ? AttendRows<true>(a, b, h, t0, t1, scratch) : AttendRows<false>(a, b, h, t0, t1, scratch);
}

void StoreCache(const float* x, int64_t n, bool half, void* out) {
  if (!half) {
    __builtin_memcpy(out, x, n * 4);
    return;
  }
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) Simd::StoreHalf((uint16_t*)out + i, Simd::Load(x + i));
  for (; i < n; i++) {
    float lanes[16] = {x[i]};
    uint16_t rounded[16];
    Simd::StoreHalf(rounded, Simd::Load(lanes));
    ((uint16_t*)out)[i] = rounded[0];
  }
}

}  // namespace

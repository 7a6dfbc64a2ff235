// Grouped-query attention over a contiguous KV cache, for one instruction set.
//
// A query's result does not depend on how many are computed together, nor on the cache's unused
// slots: whether by Heads (one token, few heads) or by Tile (sixteen rows), it is the same sums in the
// same order, to the last bit.
#pragma once
#include "attention_tile.h"
#include "kernels.h"

namespace {

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

// In place: logits -> exp(logit - largest); returns 1 / sum. Fills up to sixteen slots with zeros.
inline float Softmax(float* logits, int64_t slots) {
  const int64_t padded = (slots + 15) / 16 * 16;
  for (int64_t s = slots; s < padded; s++) logits[s] = -__builtin_inff();
  F most = Simd::Load(logits), sum = Simd::Zero();
  for (int64_t s = 16; s < padded; s += 16) most = Simd::Max(Simd::Load(logits + s), most);
  float largest[16];
  Simd::Store(largest, most);
  for (int j = 1; j < 16; j++) largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
  for (int64_t s = 0; s < padded; s += 16) {
    Exp(logits + s, Simd::Set(largest[0]));
    sum = Simd::Add(sum, Simd::Load(logits + s));
  }
  return 1.0f / Simd::Sum(sum);
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
           float* out, float* mass, float share) {
  const int64_t stride = a.S + 16;
  float weight[R];
  Logits<half, R>(a, q, k, slots, scratch, stride);
  for (int r = 0; r < R; r++) weight[r] = Softmax(scratch + r * stride, slots);
  Mix<half, R>(a, scratch, stride, weight, v, slots, out);
  if (!mass) return;
  for (int r = 0; r < R; r++)
    for (int64_t s = 0; s < slots; s++) mass[s] += share * weight[r] * scratch[r * stride + s];
}

constexpr int kTileRows = 12;  // Fewer are faster by Heads.

// The rows of a KV head: its query heads, token after token. mass[0 .. S - 1], if not null, is added to:
// the softmax of each slot, summed over tokens, its mean over the query heads.
template <bool half>
void AttendRows(const Attention& a, int64_t b, int64_t h, int64_t t0, int64_t t1, float* scratch, float* mass) {
  const int64_t repeat = a.Hq / a.Hkv, bytes = half ? 2 : 4;
  const float share = 1.0f / (float)repeat;
  const uint8_t* k = (const uint8_t*)a.k + (b * a.Hkv + h) * a.S * a.D * bytes;
  const uint8_t* v = (const uint8_t*)a.v + (b * a.Hkv + h) * a.S * a.D * bytes;
  const auto at = [&](int64_t row) { return ((b * a.T + row / repeat) * a.Hq + h * repeat + row % repeat) * a.D; };
  const auto seen = [&](int64_t row) { return a.start[b] + row / repeat + 1; };
  const int64_t live = a.length[b] < t0 ? t0 : a.length[b] < t1 ? a.length[b] : t1, end = live * repeat;
  for (int64_t row = end; row < t1 * repeat; row++)  // Padding: defined, and never looked at.
    for (int64_t i = 0; i < a.D; i++) a.out[at(row) + i] = 0.0f;
  for (int64_t row = t0 * repeat; row < end;) {
    const int64_t rows = end - row < 16 ? end - row : 16;
    if (rows >= kTileRows) {
      const float* q[16];
      float* out[16];
      int64_t slots[16];
      for (int64_t r = 0; r < rows; r++) q[r] = a.q + at(row + r), out[r] = a.out + at(row + r), slots[r] = seen(row + r);
      Tile<half>(a, rows, q, k, v, slots, out, scratch, mass, share);
      row += rows;
      continue;
    }
    const float* q = a.q + at(row);
    float* out = a.out + at(row);
    const int64_t left = end - row < repeat - row % repeat ? end - row : repeat - row % repeat;
    if (left >= 4) {
      Heads<half, 4>(a, q, k, v, seen(row), scratch, out, mass, share), row += 4;
    } else if (left >= 2) {
      Heads<half, 2>(a, q, k, v, seen(row), scratch, out, mass, share), row += 2;
    } else {
      Heads<half, 1>(a, q, k, v, seen(row), scratch, out, mass, share), row += 1;
    }
  }
}

void Attend(const Attention& a, bool half, int64_t b, int64_t h, int64_t t0, int64_t t1, float* scratch, float* mass) {
  half ? AttendRows<true>(a, b, h, t0, t1, scratch, mass) : AttendRows<false>(a, b, h, t0, t1, scratch, mass);
}

// The rows [row0, row1), sixteen at most, of KV head h: token row / repeat, as in AttendRows.
template <bool half>
void WindowRows(const Attention& a, int64_t b, int64_t h, int64_t row0, int64_t row1, float* scratch) {
  const int64_t repeat = a.Hq / a.Hkv;
  const uint8_t* k = (const uint8_t*)a.k + (b * a.Hkv + h) * a.S * a.D * (half ? 2 : 4);
  const TileFloats at(scratch, a.D);
  const float* q[16];
  float *out[16], inverse[16];
  int64_t seen[16], rows = 0;
  for (int64_t row = row0; row < row1; row++) {
    const int64_t t = row / repeat, head = h * repeat + row % repeat;
    float* to = a.out + ((b * a.Hq + head) * a.T + t) * a.S;
    const int64_t mine = a.length[b * a.T + t];
    for (int64_t s = mine; s < a.S; s++) to[s] = 0.0f;
    if (mine == 0) continue;
    q[rows] = a.q + ((b * a.T + t) * a.Hq + head) * a.D, out[rows] = to, seen[rows++] = mine;
  }
  if (rows == 0) return;
  TileWeights<half>(a, rows, q, k, seen, at, inverse);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t s = 0; s < seen[r]; s++) out[r][s] = at.logits[16 * s + r] * inverse[r];
}

void Window(const Attention& a, bool half, int64_t b, int64_t h, int64_t row0, int64_t row1, float* scratch) {
  half ? WindowRows<true>(a, b, h, row0, row1, scratch) : WindowRows<false>(a, b, h, row0, row1, scratch);
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

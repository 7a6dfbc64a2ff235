// Grouped-query attention over a contiguous KV cache, for one instruction set.
//
// A query's result does not depend on how many are computed together, nor on the cache's unused
// slots: whether by Heads (one token, few heads) or by Tile (sixteen rows), it is the same sums in the
// same order, to the last bit.
#pragma once
#include "kernels.h"
#include "matmul_kernel.h"

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

// x -> exp(x - largest) of sixteen lanes, relative error < 2e-7: Cephes' polynomial for expf,
// p(r) * 2^n. Below e^-87.7 n is -127, which makes a 0. The loop has no condition, not even a maximum,
// so that compilers make vectors of it.
Q4_INLINE void Exp(float* x, F largest) {
  const F below = Simd::Fma(largest, Simd::Set(-1.0f), Simd::Load(x));
  Simd::Store(x, Simd::Max(Simd::Set(-88.0f), below));  // NaN stays.
  for (int j = 0; j < 16; j++) {
    const float y = x[j], shifted = y * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
    float r = y - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    float e = 1.9875691500e-4f;
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4B400000 + 127) << 23;
    float scale;
    __builtin_memcpy(&scale, &bits, 4);
    x[j] = e * scale;
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
           float* out) {
  const int64_t stride = a.S + 16;
  float weight[R];
  Logits<half, R>(a, q, k, slots, scratch, stride);
  for (int r = 0; r < R; r++) weight[r] = Softmax(scratch + r * stride, slots);
  Mix<half, R>(a, scratch, stride, weight, v, slots, out);
}

constexpr int kSlotStrip = Simd::kStrip<4>, kChunk = q4::kTileChunk;
static_assert(kChunk % kSlotStrip == 0, "a chunk is whole strips");
constexpr int kTileRows = 12;  // Fewer are faster by Heads.

template <bool half>
void ToFloats(const void* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) Simd::Store(to + i, LoadCache<half>(from, i));
  for (; i < n; i++) to[i] = LoadCacheOne<half>(from, i);
}

// logits[s][row] = scale * q[row] . k[s] of kSlotStrip slots and sixteen rows; q is [D][16]. The sum
// of Logits: of dims i, i + 16, ... and then Simd::Sum's tree, whose leaves come in such an order
// that a branch is whole when its last leaf is.
inline void TileLogits(const Attention& a, const float* q, const float* k, float* logits) {
  constexpr int R = kSlotStrip, kLeaves[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
  const int64_t D = a.D, whole = D / 16 * 16;
  float branch[4][R][16];
  F sum[R];
  for (int leaf = 0; leaf < 16; leaf++) {
    Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Zero(); });
    for (int64_t i = kLeaves[leaf]; i < whole; i += 16) {
      const F x = Simd::Load(q + 16 * i);
      Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Fma(x, Simd::Set(k[r * D + i]), sum[r]); });
    }
    int level = 0;
    for (; leaf >> level & 1; level++) {
      Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Add(Simd::Load(branch[level][r]), sum[r]); });
    }
    if (level == 4) break;
    Rows<R>([&](int r) Q4_LAMBDA { Simd::Store(branch[level][r], sum[r]); });
  }
  for (int64_t i = whole; i < D; i++) {
    Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Add(sum[r], Simd::Mul(Simd::Load(q + 16 * i), Simd::Set(k[r * D + i]))); });
  }
  Rows<R>([&](int r) Q4_LAMBDA { Simd::Store(logits + 16 * r, Simd::Mul(sum[r], Simd::Set(a.scale))); });
}

// Softmax of each row over the slots that it sees, all the first `common`; the others get 0.
// inverse[row] = 1 / sum.
inline void TileSoftmax(float* logits, const int64_t* seen, int64_t common, int64_t slots, float* inverse) {
  float sums[16][16] = {{0}};
  F largest = Simd::Load(logits);
  for (int64_t s = 0; s < slots; s++) {
    for (int j = 0; s >= common && j < 16; j++) logits[16 * s + j] = s < seen[j] ? logits[16 * s + j] : -__builtin_inff();
    largest = Simd::Max(Simd::Load(logits + 16 * s), largest);
  }
  for (int64_t s = 0; s < slots; s++) {
    float* x = logits + 16 * s;
    Exp(x, largest);
    Simd::Store(sums[s % 16], Simd::Add(Simd::Load(sums[s % 16]), Simd::Load(x)));
  }
  for (int half = 8; half > 0; half /= 2) {  // Simd::Sum
    for (int i = 0; i < half; i++) Simd::Store(sums[i], Simd::Add(Simd::Load(sums[i]), Simd::Load(sums[i + half])));
  }
  for (int j = 0; j < 16; j++) inverse[j] = 1.0f / sums[0][j];
}

// out[r] += sum_s p[s][r] v[s] for R of a tile's sixteen rows.
template <int R>
void TileMix(const Attention& a, const float* p, const float* v, int64_t slots, float* const* out) {
  const int64_t D = a.D, whole = D / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    F acc[R];
    Rows<R>([&](int r) Q4_LAMBDA { acc[r] = Simd::Load(out[r] + i); });
    for (int64_t s = 0; s < slots; s++) {
      const F value = Simd::Load(v + s * D + i);
      Rows<R>([&](int r) Q4_LAMBDA { acc[r] = Simd::Fma(value, Simd::Set(p[16 * s + r]), acc[r]); });
    }
    Rows<R>([&](int r) Q4_LAMBDA { Simd::Store(out[r] + i, acc[r]); });
  }
  for (int64_t i = whole; i < D; i++) {
    for (int r = 0; r < R; r++) {
      for (int64_t s = 0; s < slots; s++) out[r][i] += p[16 * s + r] * v[s * D + i];
    }
  }
}

// Up to sixteen rows at q[row] and out[row], of which each sees the first seen[row] slots, in
// ascending order. Keys and values become floats once for all of them.
template <bool half>
void Tile(const Attention& a, int64_t rows, const float* const* q, const void* k, const void* v, const int64_t* seen,
          float* const* out, float* scratch) {
  constexpr int64_t bytes = half ? 2 : 4;
  const int64_t D = a.D, common = seen[0], slots = seen[rows - 1];
  float *queries = scratch, *chunk = queries + 16 * D, *rest = chunk + kChunk * D, *logits = rest + D, inverse[16];
  float* to[16];
  int64_t limit[16];
  for (int64_t r = 0; r < 16; r++) {
    to[r] = r < rows ? out[r] : rest;  // Lanes that are no row are computed too, as of a zero query.
    limit[r] = r < rows ? seen[r] : slots;
    for (int64_t i = 0; i < D; i++) queries[16 * i + r] = r < rows ? q[r][i] : 0.0f;
    for (int64_t i = 0; i < D; i++) to[r][i] = 0.0f;
  }
  for (int64_t first = 0; first < slots; first += kChunk) {
    const int64_t count = slots - first < kChunk ? slots - first : kChunk;
    ToFloats<half>((const uint8_t*)k + first * D * bytes, count * D, chunk);
    for (int64_t s = 0; s < count; s += kSlotStrip) TileLogits(a, queries, chunk + s * D, logits + 16 * (first + s));
  }
  TileSoftmax(logits, limit, common, slots, inverse);
  for (int64_t first = 0; first < slots; first += kChunk) {
    const int64_t count = slots - first < kChunk ? slots - first : kChunk;
    ToFloats<half>((const uint8_t*)v + first * D * bytes, count * D, chunk);
    // The slots that all rows see, for all; then each row's own: what it does not see may be NaN.
    const int64_t shared = common < first ? 0 : common < first + count ? common - first : count;
    const float* p = logits + 16 * first;
    int r = 0;
    for (; r + kSlotStrip <= 16; r += kSlotStrip) TileMix<kSlotStrip>(a, p + r, chunk, shared, to + r);
    if constexpr (16 % kSlotStrip > 0) TileMix<16 % kSlotStrip>(a, p + r, chunk, shared, to + r);
    for (r = 0; r < rows; r++) {
      const int64_t end = seen[r] - first < count ? seen[r] - first : count;
      if (end > shared) TileMix<1>(a, p + 16 * shared + r, chunk + shared * D, end - shared, to + r);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < D; i++) out[r][i] *= inverse[r];
}

// The rows of a KV head: its query heads, token after token.
template <bool half>
void AttendRows(const Attention& a, int64_t b, int64_t h, int64_t t0, int64_t t1, float* scratch) {
  const int64_t repeat = a.Hq / a.Hkv, bytes = half ? 2 : 4;
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
      Tile<half>(a, rows, q, k, v, slots, out, scratch);
      row += rows;
      continue;
    }
    const float* q = a.q + at(row);
    float* out = a.out + at(row);
    const int64_t left = end - row < repeat - row % repeat ? end - row : repeat - row % repeat;
    if (left >= 4) {
      Heads<half, 4>(a, q, k, v, seen(row), scratch, out), row += 4;
    } else if (left >= 2) {
      Heads<half, 2>(a, q, k, v, seen(row), scratch, out), row += 2;
    } else {
      Heads<half, 1>(a, q, k, v, seen(row), scratch, out), row += 1;
    }
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

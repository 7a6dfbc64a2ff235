// Attention of sixteen query rows (tokens x heads of a group) at once, for one instruction set: rows
// in the lanes, so that no sum crosses them, and keys and values as floats once for all. What else
// attention_kernel.h takes too: loads from the cache, and the exponential.
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

// x -> exp(x - largest) of sixteen lanes, relative error < 2e-7: Cephes' polynomial for expf,
// p(r) * 2^n. Below e^-87.7 n is -127, which makes a 0. NaN stays.
Q4_INLINE void Exp(float* x, F largest) {
  const auto fma = [](F a, F b, float c) Q4_LAMBDA { return Simd::Fma(a, b, Simd::Set(c)); };
  const F below = Simd::Fma(largest, Simd::Set(-1.0f), Simd::Load(x)), y = Simd::Max(Simd::Set(-88.0f), below);
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const F shifted = fma(y, Simd::Set(1.44269504088896341f), 12582912.0f), n = Simd::Add(shifted, Simd::Set(-12582912.0f));
  const F r = Simd::Fma(n, Simd::Set(2.12194440e-4f), Simd::Fma(n, Simd::Set(-0.693359375f), y));
  F e = fma(Simd::Set(1.9875691500e-4f), r, 1.3981999507e-3f);
  e = fma(e, r, 8.3334519073e-3f);
  e = fma(e, r, 4.1665795894e-2f);
  e = fma(e, r, 1.6666665459e-1f);
  e = fma(e, r, 5.0000001201e-1f);
  e = Simd::Add(Simd::Fma(Simd::Mul(e, r), r, r), Simd::Set(1.0f));
  const I exponent = Simd::AddI(Simd::Bits(shifted), Simd::ISet(127 - 0x4B400000));
  Simd::Store(x, Simd::Mul(e, Simd::FromBits(Simd::Shl(exponent, 23))));
}

constexpr int kSlotStrip = Simd::kStrip<4>, kChunk = q4::kTileChunk;
static_assert(kChunk % kSlotStrip == 0, "a chunk is whole strips");

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

// The floats that a tile works in, one part behind the other (Attention::scratch).
struct TileFloats {
  float *queries, *chunk, *rest, *logits;  // [D][16], [kChunk][D], [D] and [S + 16][16]
  TileFloats(float* scratch, int64_t D)
      : queries(scratch), chunk(queries + 16 * D), rest(chunk + kChunk * D), logits(rest + D) {}
};

// Of up to sixteen rows at q[row], which see the first seen[row] slots each, in ascending order:
// logits[s][row], times inverse[row], is the softmax. Lanes that are no row are those of a zero query.
template <bool half>
void TileWeights(const Attention& a, int64_t rows, const float* const* q, const void* k, const int64_t* seen,
                 const TileFloats& at, float* inverse) {
  constexpr int64_t bytes = half ? 2 : 4;
  const int64_t D = a.D, slots = seen[rows - 1];
  int64_t limit[16];
  for (int64_t r = 0; r < 16; r++) {
    limit[r] = r < rows ? seen[r] : slots;
    for (int64_t i = 0; i < D; i++) at.queries[16 * i + r] = r < rows ? q[r][i] : 0.0f;
  }
  for (int64_t first = 0; first < slots; first += kChunk) {
    const int64_t count = slots - first < kChunk ? slots - first : kChunk;
    ToFloats<half>((const uint8_t*)k + first * D * bytes, count * D, at.chunk);
    for (int64_t s = 0; s < count; s += kSlotStrip)
      TileLogits(a, at.queries, at.chunk + s * D, at.logits + 16 * (first + s));
  }
  TileSoftmax(at.logits, limit, seen[0], slots, inverse);
}

// What these rows take from the slots goes to out[row]. Keys and values become floats once for all of
// them. To mass[slot], where it is given, goes `share` of what each row pays to the slot.
template <bool half>
void Tile(const Attention& a, int64_t rows, const float* const* q, const void* k, const void* v, const int64_t* seen,
          float* const* out, float* scratch, float* mass, float share) {
  constexpr int64_t bytes = half ? 2 : 4;
  const int64_t D = a.D, common = seen[0], slots = seen[rows - 1];
  const TileFloats at(scratch, D);
  float inverse[16];
  float* to[16];
  TileWeights<half>(a, rows, q, k, seen, at, inverse);
  for (int64_t r = 0; r < 16; r++) {
    to[r] = r < rows ? out[r] : at.rest;
    for (int64_t i = 0; i < D; i++) to[r][i] = 0.0f;
  }
  for (int64_t first = 0; first < slots; first += kChunk) {
    const int64_t count = slots - first < kChunk ? slots - first : kChunk;
    ToFloats<half>((const uint8_t*)v + first * D * bytes, count * D, at.chunk);
    // The slots that all rows see, for all; then each row's own: what it does not see may be NaN.
    const int64_t shared = common < first ? 0 : common < first + count ? common - first : count;
    const float* p = at.logits + 16 * first;
    int r = 0;
    for (; r + kSlotStrip <= 16; r += kSlotStrip) TileMix<kSlotStrip>(a, p + r, at.chunk, shared, to + r);
    if constexpr (16 % kSlotStrip > 0) TileMix<16 % kSlotStrip>(a, p + r, at.chunk, shared, to + r);
    for (r = 0; r < rows; r++) {
      const int64_t end = seen[r] - first < count ? seen[r] - first : count;
      if (end > shared) TileMix<1>(a, p + 16 * shared + r, at.chunk + shared * D, end - shared, to + r);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < D; i++) out[r][i] *= inverse[r];
  if (!mass) return;
  float weight[16];
  for (int64_t r = 0; r < 16; r++) weight[r] = r < rows ? share * inverse[r] : 0.0f;
  const F weights = Simd::Load(weight);
  for (int64_t s = 0; s < slots; s++) mass[s] += Simd::Sum(Simd::Mul(Simd::Load(at.logits + 16 * s), weights));
}

}  // namespace

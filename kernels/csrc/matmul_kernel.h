// y = x W^T for one instruction set: `Simd` and formats.h are already included.
//
// A tile is 16 outputs (lanes) over all of K. Per 256 or 32 weights: integer dot products within a
// group, one float FMA per group, one per activation block. Every (row of x, output) is summed in
// the same order whatever M is, so results do not depend on batching or chunking.
#pragma once
#include "kernels.h"

namespace {

using q4::kRows;
using q4::Matmul;

// Up to Simd::kDirectRows rows of x use codes straight from memory, more unpack them first and go
// Simd::kMicroRows at a time.
// Rows of x per sweep over K: their partial sums stay in L1.
constexpr int kSweepRows = 128;

inline int32_t Load4(const int8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

template <class Fmt>
constexpr int Groups() { return Fmt::block / Fmt::group; }

template <int i>
struct Int { static constexpr int value = i; };

// body(Int<0>()), ... body(Int<n - 1>()): the index is a constant, so that each group's shifts and
// addresses are immediate operands.
template <int n, int i = 0, class Body>
Q4_INLINE void Unroll(const Body& body) {
  if constexpr (i < n) {
    body(Int<i>());
    Unroll<n, i + 1>(body);
  }
}

// One block of sixteen rows, ready to multiply.
template <class Fmt>
struct Direct {
  const uint8_t* p;
  F s[Groups<Fmt>()], m[Groups<Fmt>()];
  explicit Direct(const uint8_t* block) : p(block) { Fmt::Scales(p, s, m); }
  template <int g>
  Q4_INLINE I Codes(int i) const { return Fmt::template Codes<g>(p, i); }
};

// The same, its codes unpacked once for many rows of x.
template <class Fmt>
struct Unpacked {
  alignas(64) uint8_t codes[Fmt::block * kRows];
  F s[Groups<Fmt>()], m[Groups<Fmt>()];
  explicit Unpacked(const uint8_t* p) {
    Fmt::Scales(p, s, m);
    Unroll<Groups<Fmt>()>([&](auto index) Q4_LAMBDA {
      constexpr int g = decltype(index)::value;
#pragma GCC unroll 8
      for (int i = 0; i < Fmt::group / 4; i++)
        Simd::IStore(codes + kRows * (g * Fmt::group + 4 * i), Fmt::template Codes<g>(p, i));
    });
  }
  template <int g>
  Q4_INLINE I Codes(int i) const { return Simd::ILoad(codes + kRows * (g * Fmt::group + 4 * i)); }
};

// The sums of x over groups of 8, 16 or 32, and their negatives.
template <int group>
Q4_INLINE const int32_t* Sums(const q4::QuantizedX& x) { return group == 8 ? x.sum8 : group == 16 ? x.sum16 : x.sum32; }
template <int group>
Q4_INLINE const float* Negatives(const q4::QuantizedX& x) {
  return group == 8 ? x.neg8f : group == 16 ? x.neg16f : x.neg32f;
}

// total[r] += x[m0 + r] . block `kb`, for R rows of x.
template <class Fmt, int R, class Block>
Q4_INLINE void MicroBlock(const Matmul& a, const Block& w, int64_t m0, int64_t kb, F* total) {
  constexpr int kChunks = Fmt::group / 4;
  const int64_t K = a.K;
  const int8_t* q = a.qx.q + m0 * K + kb * Fmt::block;
  const int32_t* sums = Sums<Fmt::group>(a.qx) + (m0 * K + kb * Fmt::block) / Fmt::group;
  const float* negs = Negatives<Fmt::group>(a.qx) + (m0 * K + kb * Fmt::block) / Fmt::group;
  F part[R];
  for (int r = 0; r < R; r++) part[r] = Simd::Zero();
  Unroll<Groups<Fmt>()>([&](auto index) Q4_LAMBDA {
    constexpr int g = decltype(index)::value;
    I acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      acc[r] = Simd::ISet(Fmt::offset ? -Fmt::offset * sums[r * (K / Fmt::group) + g] : 0);
#pragma GCC unroll 8
    for (int i = 0; i < kChunks; i++) {
      const I codes = w.template Codes<g>(i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        acc[r] = Simd::Dot<Fmt::wide>(acc[r], codes, Load4(q + r * K + g * Fmt::group + 4 * i));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      part[r] = Simd::Fma(Simd::ToFloat(acc[r]), w.s[g], part[r]);
      if (Fmt::has_min)
        part[r] = Simd::Fma(w.m[g], Simd::Set(negs[r * (K / Fmt::group) + g]), part[r]);
    }
  });
  const float* d = a.qx.d + (m0 * K) / Fmt::block + kb;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r] = Simd::Fma(part[r], Simd::Set(d[r * (K / Fmt::block)]), total[r]);
}

inline void StoreOutputs(const Matmul& a, int64_t m, int64_t tile, F value) {
  float* y = a.y + m * a.N + tile * kRows;
  const int64_t left = a.N - tile * kRows;
  if (left >= kRows) return Simd::Store(y, value);
  float lanes[kRows];
  Simd::Store(lanes, value);
  for (int64_t i = 0; i < left; i++) y[i] = lanes[i];
}

// All of K for R rows, codes straight from memory: decode and small batches.
template <class Fmt, int R>
void DirectTile(const Matmul& a, int64_t tile) {
  const int64_t blocks = a.K / Fmt::block;
  const uint8_t* w = a.w + tile * blocks * Fmt::bytes * kRows;
  F total[R];
  for (int r = 0; r < R; r++) total[r] = Simd::Zero();
  for (int64_t kb = 0; kb < blocks; kb++) {
    const uint8_t* p = w + kb * Fmt::bytes * kRows;
    // A tile's block that is whole cache lines is streamed best by the hardware alone; others are
    // read across line ends, in an order that it does not follow.
    if constexpr (Fmt::block == 256 && Fmt::bytes * kRows % 64 != 0) {
      for (int line = 0; line < Fmt::bytes * kRows; line += 64) __builtin_prefetch(p + 4096 + line);
    }
    MicroBlock<Fmt, R>(a, Direct<Fmt>(p), 0, kb, total);
  }
  for (int r = 0; r < R; r++) StoreOutputs(a, r, tile, total[r]);
}

template <class Fmt, int R>
void MicroRows(const Matmul& a, const Unpacked<Fmt>& w, int64_t m, int64_t kb, float* sums) {
  F total[R];
  for (int r = 0; r < R; r++) total[r] = Simd::Load(sums + r * kRows);
  MicroBlock<Fmt, R>(a, w, m, kb, total);
  for (int r = 0; r < R; r++) Simd::Store(sums + r * kRows, total[r]);
}

template <class Fmt>
void UnpackedTile(const Matmul& a, int64_t tile) {
  const int64_t blocks = a.K / Fmt::block;
  const uint8_t* w = a.w + tile * blocks * Fmt::bytes * kRows;
  alignas(64) float sums[kSweepRows * kRows];
  for (int64_t sweep = 0; sweep < a.M; sweep += kSweepRows) {
    const int64_t rows = a.M - sweep < kSweepRows ? a.M - sweep : kSweepRows;
    for (int64_t i = 0; i < rows * kRows; i++) sums[i] = 0.0f;
    for (int64_t kb = 0; kb < blocks; kb++) {
      const Unpacked<Fmt> unpacked(w + kb * Fmt::bytes * kRows);
      int64_t m = 0;
      for (; m + Simd::kMicroRows <= rows; m += Simd::kMicroRows)
        MicroRows<Fmt, Simd::kMicroRows>(a, unpacked, sweep + m, kb, sums + m * kRows);
      for (; m < rows; m++) MicroRows<Fmt, 1>(a, unpacked, sweep + m, kb, sums + m * kRows);
    }
    for (int64_t m = 0; m < rows; m++) StoreOutputs(a, sweep + m, tile, Simd::Load(sums + m * kRows));
  }
}

template <class Fmt>
void QuantizedMatmul(const Matmul& a, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; tile++) {
    if (a.M == 1) {
      DirectTile<Fmt, 1>(a, tile);
    } else if (a.M == 2 && Simd::kDirectRows >= 2) {
      DirectTile<Fmt, 2 <= Simd::kDirectRows ? 2 : 1>(a, tile);
    } else if (a.M == 4 && Simd::kDirectRows >= 4) {
      DirectTile<Fmt, 4 <= Simd::kDirectRows ? 4 : 1>(a, tile);
    } else {
      UnpackedTile<Fmt>(a, tile);
    }
  }
}

// Float weights: R rows of x times W consecutive tiles, k ascending, one FMA chain per output.
template <class Fmt, int R, int W>
void FloatTiles(const Matmul& a, int64_t m, int64_t tile) {
  const int64_t stride = a.K * Fmt::bytes * kRows;
  const uint8_t* w = a.w + tile * stride;
  F acc[R][W];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < W; t++) acc[r][t] = Simd::Zero();
  for (int64_t k = 0; k < a.K; k++) {
    F value[W];
#pragma GCC unroll 8
    for (int t = 0; t < W; t++) value[t] = Fmt::Value(w + t * stride + k * Fmt::bytes * kRows);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const F x = Simd::Set(a.x[(m + r) * a.K + k]);
#pragma GCC unroll 8
      for (int t = 0; t < W; t++) acc[r][t] = Simd::Fma(value[t], x, acc[r][t]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < W; t++) StoreOutputs(a, m + r, tile + t, acc[r][t]);
}

template <class Fmt, int W>
void FloatRows(const Matmul& a, int64_t tile) {
  int64_t m = 0;
  constexpr int kRowsAtOnce = Simd::kMicroRows / 2;
  for (; m + kRowsAtOnce <= a.M; m += kRowsAtOnce) FloatTiles<Fmt, kRowsAtOnce, W>(a, m, tile);
  for (; m < a.M; m++) FloatTiles<Fmt, 1, W>(a, m, tile);
}

template <class Fmt>
void FloatMatmul(const Matmul& a, int64_t begin, int64_t end) {
  int64_t tile = begin;
  for (; tile + 4 <= end; tile += 4) FloatRows<Fmt, 4>(a, tile);
  for (; tile < end; tile++) FloatRows<Fmt, 1>(a, tile);
}

template <class Fmt>
void TakeRow(const uint8_t* w, int64_t K, int64_t row, float* out) {
  const int lane = row % kRows;
  w += (row / kRows) * (K / Fmt::block) * Fmt::bytes * kRows;
  for (int64_t kb = 0; kb < K / Fmt::block; kb++, w += Fmt::bytes * kRows) {
    F s[Groups<Fmt>()], m[Groups<Fmt>()];
    Fmt::Scales(w, s, m);
    Unroll<Groups<Fmt>()>([&](auto index) {
      constexpr int g = decltype(index)::value;
      float scale[kRows], minimum[kRows];
      Simd::Store(scale, s[g]);
      if (Fmt::has_min) Simd::Store(minimum, m[g]);
      for (int i = 0; i < Fmt::group / 4; i++) {
        alignas(64) uint8_t codes[64];
        Simd::IStore(codes, Fmt::template Codes<g>(w, i));
        for (int j = 0; j < 4; j++) {
          const float product = scale[lane] * (float)((int)codes[4 * lane + j] - Fmt::offset);
          *out++ = Fmt::has_min ? product - minimum[lane] : product;
        }
      }
    });
  }
}

template <class Fmt>
void TakeFloatRow(const uint8_t* w, int64_t K, int64_t row, float* out) {
  w += (row / kRows) * K * Fmt::bytes * kRows;
  for (int64_t k = 0; k < K; k++) {
    float lanes[kRows];
    Simd::Store(lanes, Fmt::Value(w + k * Fmt::bytes * kRows));
    out[k] = lanes[row % kRows];
  }
}

void Quantize(const float* x, int64_t K, int block, int8_t* q, float* d, int32_t* sum16, int32_t* sum32,
              float* neg16f, float* neg32f) {
  for (int64_t b = 0; b < K / block; b++) {
    const float* xb = x + b * block;
    float largest = 0.0f;
    bool finite = true;
    for (int i = 0; i < block; i++) {
      const float magnitude = __builtin_fabsf(xb[i]);
      finite &= magnitude <= 3.4028234e38f;  // False for NaN too.
      largest = magnitude > largest ? magnitude : largest;
    }
    // A block with a NaN or infinity makes its outputs NaN: int8 cannot carry either.
    d[b] = finite ? largest / 127.0f : __builtin_nanf("");
    // 1/d overflows where the largest is subnormal; dividing would cost more than it is worth.
    const float inverse = finite && largest > 1e-36f ? 127.0f / largest : 0.0f;
    for (int i = 0; i < block; i += 16) {
      int32_t sum = 0;
      for (int j = 0; j < 16; j++) {
        // Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
        float shifted = xb[i + j] * inverse + 12582912.0f;
        int32_t bits;
        __builtin_memcpy(&bits, &shifted, 4);
        const int8_t v = (int8_t)(bits - 0x4B400000);
        q[b * block + i + j] = finite ? v : 0;
        sum += finite ? v : 0;
      }
      const int64_t g = (b * block + i) / 16;
      sum16[g] = sum;
      neg16f[g] = (float)-sum;
      if (g & 1) {
        sum32[g / 2] = sum16[g - 1] + sum;
        neg32f[g / 2] = (float)-sum32[g / 2];
      }
    }
  }
}

}  // namespace

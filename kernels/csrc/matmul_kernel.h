// y = x W^T for one instruction set: `Simd` and formats.h are already included.
//
// A tile is 16 outputs (lanes) over all of K. A block is summed in integers where its scales are
// integers, else a group is, then added to a float sum with the product of the block's and the
// activations' scales. Every (row of x, output) is summed in the same order whatever M is, so results
// do not depend on batching or chunking.
#pragma once
#include "half.h"
#include "kernels.h"

namespace {

using q4::kRows;
using q4::Matmul;

// Rows of x per sweep over K: their partial sums stay in L1.
constexpr int kSweepRows = 128;
// Tiles that a thread reads side by side for few rows of x (docs/adr/0009, 0014).
constexpr int kStreams = Simd::kStreams;

inline int32_t Load4(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

// What the sums over a block depend on; formats of the same shape share them.
template <class Fmt>
constexpr int kGroups = Fmt::block / Fmt::group;

template <int kBlock, int kGroup, int kBits, int kOffset, bool kMin, bool kInteger>
struct Shape {
  static constexpr int block = kBlock, group = kGroup, bits = kBits, offset = kOffset;
  static constexpr bool has_min = kMin, integer = kInteger;
};
template <class Fmt>
using ShapeOf = Shape<Fmt::block, Fmt::group, Fmt::bits, Fmt::offset, Fmt::has_min, Fmt::integer>;

// An integer known when compiling, as an argument.
template <int i>
struct Int {
  static constexpr int value = i;
  constexpr operator int() const { return i; }
};

// body(Int<0>()), ... body(Int<n - 1>()): the index is a constant, so that each group's shifts and
// addresses are immediate operands.
template <int n, int i = 0, class Body>
Q4_INLINE void Unroll(const Body& body) {
  if constexpr (i < n) {
    body(Int<i>());
    Unroll<n, i + 1>(body);
  }
}

// A block of sixteen rows whose codes and scales are read where they lie, for few rows of x: each
// group's shifts and addresses are constants.
template <class Fmt>
struct Direct {
  using Shape = ShapeOf<Fmt>;
  const uint8_t* p;
  template <class G, int plane>
  Q4_INLINE I Codes(G, Int<plane>, int i) const {
    return Simd::template Plane<Fmt::bits, plane>(Fmt::template Codes<G::value>(p, i));
  }
  // As AddScaled takes it, or in floats.
  template <class G>
  Q4_INLINE auto Scale(G) const {
    if constexpr (Fmt::integer) return Simd::template Multiplier<Fmt::signed_scale>(Fmt::template Scale<G::value>(p));
    else return Fmt::template Scale<G::value>(p);
  }
  template <class G>
  Q4_INLINE F Min(G) const { return Fmt::template Min<G::value>(p); }
  // The minimums, or offset * scale, of groups 2j and 2j + 1.
  template <class J>
  Q4_INLINE I Pair(J) const {
    constexpr int a = 2 * J::value, b = a + 1;
    if constexpr (Fmt::has_min) return Simd::template Pair<false, 0>(Fmt::template Min<a>(p), Fmt::template Min<b>(p));
    else return Simd::template Pair<true, __builtin_ctz(Fmt::offset)>(Fmt::template Scale<a>(p), Fmt::template Scale<b>(p));
  }
  Q4_INLINE F D() const { return Fmt::D(p); }
  Q4_INLINE F DMin() const { return Fmt::DMin(p); }
};

// The scales of one block, ready to multiply.
template <class S, bool integer = S::integer>
struct Scales {
  F scale[kGroups<S>], min[kGroups<S>];
  Q4_INLINE F Scale(int g) const { return scale[g]; }
  Q4_INLINE F Min(int g) const { return min[g]; }
};

template <class S>
struct Scales<S, true> {
  F d, dmin;
  I scale[kGroups<S>], pair[kGroups<S> / 2];
  Q4_INLINE I Scale(int g) const { return scale[g]; }
  Q4_INLINE I Pair(int j) const { return pair[j]; }
  Q4_INLINE F D() const { return d; }
  Q4_INLINE F DMin() const { return dmin; }
};

template <class Fmt>
Q4_INLINE void LoadScales(const Direct<Fmt>& from, Scales<ShapeOf<Fmt>>& out) {
  Unroll<kGroups<Fmt>>([&](auto g) Q4_LAMBDA {
    out.scale[g] = from.Scale(g);
    if constexpr (Fmt::integer) {
      if constexpr (g.value % 2 == 0) out.pair[g / 2] = from.Pair(Int<g.value / 2>());
    } else if constexpr (Fmt::has_min) {
      out.min[g] = from.Min(g);
    }
  });
  if constexpr (Fmt::integer) out.d = from.D();
  if constexpr (Fmt::integer && Fmt::has_min) out.dmin = from.DMin();
}

// A block unpacked once for many rows, in short loops.
template <class S>
struct Unpacked : Scales<S> {
  using Shape = S;
  static constexpr int kPlanes = Simd::kPlanes<S::bits>;
  alignas(64) uint8_t codes[kPlanes][S::block * kRows];
  Q4_INLINE I Codes(int g, int plane, int i) const {
    return Simd::ILoad(codes[plane] + kRows * (g * S::group + 4 * i));
  }
};

template <class Fmt>
void Unpack(const uint8_t* p, Unpacked<ShapeOf<Fmt>>& out) {
  LoadScales(Direct<Fmt>{p}, out);
  Unroll<kGroups<Fmt>>([&](auto g) Q4_LAMBDA {
#pragma GCC unroll 8
    for (int i = 0; i < Fmt::group / 4; i++) {
      const I all = Fmt::template Codes<g.value>(p, i);
      Unroll<out.kPlanes>([&](auto plane) Q4_LAMBDA {
        Simd::IStore(out.codes[plane] + kRows * (g * Fmt::group + 4 * i), Simd::template Plane<Fmt::bits, plane.value>(all));
      });
    }
  });
}

// body(r) for r in 0 .. R - 1, unrolled by the front end so that arrays over r become registers.
template <int R, class Body>
Q4_INLINE void Rows(const Body& body) {
  Unroll<R>([&](auto r) Q4_LAMBDA { body(r.value); });
}

// The sums of one block, for R rows of x: in integers where its scales are, else times the scales.
template <int R, bool integer>
struct Sums {
  F sum[R];
  Q4_INLINE void Clear() { Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Zero(); }); }
};

template <int R>
struct Sums<R, true> {
  I sum[R];
  Q4_INLINE void Clear() { Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::ISet(0); }); }
};

// Where the rows m0 .. m0 + R - 1 of x, quantised, have block `kb`.
struct RowsOfX {
  const int8_t* q;
  const float *d, *dsum;
  const int16_t* sums;  // over each group
};
template <class S>
Q4_INLINE RowsOfX XOfBlock(const Matmul& a, int64_t m0, int64_t kb) {
  const int64_t row = kb * a.qx.rows + m0;
  const int16_t* sums = S::group == 8 ? a.qx.sum8 : S::group == 16 ? a.qx.sum16 : a.qx.sum32;
  return {a.qx.q + row * S::block, a.qx.d + row, a.qx.dsum + row, sums + row * kGroups<S>};
}

// out += x . group g of a block.
template <int R, class Block, class G, class S = typename Block::Shape>
Q4_INLINE void AddGroup(const RowsOfX& x, const Block& w, G g, Sums<R, S::integer>& out) {
  constexpr int groups = kGroups<S>, kSteps = S::group / 4, kPlanes = Simd::kPlanes<S::bits>;
  constexpr int kChain = Simd::kChain<S::bits> < kSteps ? Simd::kChain<S::bits> : kSteps;
  // begin(r) gives a chain its start and end(r, plane, sum) takes its sum, for every chain.
  const auto chains = [&](const auto& begin, const auto& end) Q4_LAMBDA {
    Unroll<kPlanes * (kSteps / kChain)>([&](auto index) Q4_LAMBDA {
      constexpr int plane = index.value * kChain / kSteps, first = index.value * kChain % kSteps;
      I sum[R];
      Rows<R>([&](int r) Q4_LAMBDA { sum[r] = begin(r); });
      Unroll<kChain>([&](auto step) Q4_LAMBDA {
        const I codes = w.Codes(g, Int<plane>(), first + step);
        Rows<R>([&](int r) Q4_LAMBDA {
          sum[r] = Simd::Dot(sum[r], codes, Load4(x.q + r * S::block + g * S::group + 4 * (first + step)));
        });
      });
      Rows<R>([&](int r) Q4_LAMBDA { end(r, Int<plane>(), sum[r]); });
    });
  };
  if constexpr (S::integer) {
    chains([](int) Q4_LAMBDA { return Simd::ISet(0); },
           [&](int r, auto plane, I sum) Q4_LAMBDA {
             out.sum[r] = Simd::template AddScaled<plane.value>(out.sum[r], sum, w.Scale(g));
           });
  } else {
    I dot[R];
    Rows<R>([&](int r) Q4_LAMBDA { dot[r] = Simd::ISet(S::offset ? -S::offset * x.sums[r * groups + g] : 0); });
    chains([&](int r) Q4_LAMBDA { return Simd::Begin(dot[r]); },
           [&](int r, auto plane, I sum) Q4_LAMBDA { dot[r] = Simd::template End<plane.value>(dot[r], sum); });
    Rows<R>([&](int r) Q4_LAMBDA {
      out.sum[r] = Simd::Fma(Simd::ToFloat(dot[r]), w.Scale(g), out.sum[r]);
      if constexpr (S::has_min && S::group < S::block)
        out.sum[r] = Simd::Fma(w.Min(g), Simd::Set((float)-x.sums[r * groups + g]), out.sum[r]);
    });
  }
}

// total[r] += the block whose groups are summed.
template <int R, class Block, class S = typename Block::Shape>
Q4_INLINE void AddBlock(const RowsOfX& x, const Block& w, const Sums<R, S::integer>& block, F* total) {
  Rows<R>([&](int r) Q4_LAMBDA {
    if constexpr (S::integer) {
      I low = Simd::ISet(0);
      Unroll<kGroups<S> / 2>([&](auto j) Q4_LAMBDA {
        low = Simd::AddPairs(low, w.Pair(j), Load4(x.sums + r * kGroups<S> + 2 * j));
      });
      const F scale = Simd::Mul(w.D(), Simd::Set(x.d[r]));
      if constexpr (S::has_min) {
        total[r] = Simd::Fma(Simd::ToFloat(block.sum[r]), scale, total[r]);
        total[r] = Simd::Fma(Simd::ToFloat(low), Simd::Mul(w.DMin(), Simd::Set(-x.d[r])), total[r]);
      } else {
        total[r] = Simd::Fma(Simd::ToFloat(Simd::SubI(block.sum[r], low)), scale, total[r]);
      }
    } else {
      total[r] = Simd::Fma(block.sum[r], Simd::Set(x.d[r]), total[r]);
      if constexpr (S::has_min && S::group == S::block)
        total[r] = Simd::Fma(w.Min(Int<0>()), Simd::Set(-x.dsum[r]), total[r]);
    }
  });
}

inline void StoreOutputs(const Matmul& a, int64_t m, int64_t tile, F value) {
  float* y = a.y + m * a.N + tile * kRows;
  const int64_t left = a.N - tile * kRows;
  if (left >= kRows) return Simd::Store(y, value);
  float lanes[kRows];
  Simd::Store(lanes, value);
  for (int64_t i = 0; i < left; i++) y[i] = lanes[i];
}

// Rows m .. end of x times block `kb`, R at a time, the rest in smaller strips.
template <int R, class S>
void Strips(const Matmul& a, const Unpacked<S>& w, int64_t m, int64_t end, int64_t kb, float* sums) {
  for (; m + R <= end; m += R, sums += R * kRows) {
    const RowsOfX x = XOfBlock<S>(a, m, kb);
    F total[R];
    for (int r = 0; r < R; r++) total[r] = Simd::Load(sums + r * kRows);
    Sums<R, S::integer> block;
    block.Clear();
#pragma GCC unroll 1
    for (int g = 0; g < kGroups<S>; g++) AddGroup<R>(x, w, g, block);
    AddBlock<R>(x, w, block, total);
    for (int r = 0; r < R; r++) Simd::Store(sums + r * kRows, total[r]);
  }
  if constexpr (R > 1) {
    constexpr int kNext = R > 4 ? 4 : R / 2;  // 6 or 8, 4, 2, 1
    if (m < end) Strips<kNext>(a, w, m, end, kb, sums);
  }
}

// body(t) for each stream: short ones with their sums in registers, others as a loop over memory, whose
// code stays that of one.
template <class Fmt, class Body>
Q4_INLINE void Turns(const Body& body) {
  if constexpr (Fmt::block == 32) {
    Rows<kStreams>(body);
  } else {
#pragma GCC unroll 1
    for (int t = 0; t < kStreams; t++) body(t);
  }
}

// R rows of x times `count` <= kStreams tiles, which take turns unit by unit. A stream without a tile of
// its own follows the last one's, for nothing.
template <class Fmt, int R>
void DirectTiles(const Matmul& a, int64_t tile, int64_t count) {
  using S = ShapeOf<Fmt>;
  const int64_t blocks = a.K / Fmt::block, stride = blocks * Fmt::bytes * kRows;
  Direct<Fmt> block[kStreams];
  for (int t = 0; t < kStreams; t++) block[t].p = a.w + (tile + (t < count ? t : count - 1)) * stride;
  F total[kStreams][R];
  for (auto& t : total)
    for (auto& sum : t) sum = Simd::Zero();
  for (int64_t kb = 0; kb < blocks; kb++) {
    const RowsOfX x = XOfBlock<S>(a, 0, kb);
    Sums<R, S::integer> sums[kStreams];
    for (auto& sum : sums) sum.Clear();
    Unroll<kGroups<Fmt> / Fmt::unit>([&](auto u) Q4_LAMBDA {
      Turns<Fmt>([&](int t) Q4_LAMBDA {
        Sums<R, S::integer> sum = sums[t];
        Unroll<Fmt::unit>([&](auto s) Q4_LAMBDA { AddGroup<R>(x, block[t], Int<Fmt::Group(u.value, s.value)>(), sum); });
        sums[t] = sum;
      });
    });
    Turns<Fmt>([&](int t) Q4_LAMBDA {
      AddBlock<R>(x, block[t], sums[t], total[t]);
      block[t].p += Fmt::bytes * kRows;
    });
  }
  for (int64_t t = 0; t < count; t++)
    for (int r = 0; r < R && r < a.M; r++) StoreOutputs(a, r, tile + t, total[t][r]);
}

template <class Fmt>
void UnpackedTile(const Matmul& a, int64_t tile) {
  const int64_t blocks = a.K / Fmt::block;
  const uint8_t* w = a.w + tile * blocks * Fmt::bytes * kRows;
  alignas(64) float sums[kSweepRows * kRows];
  Unpacked<ShapeOf<Fmt>> block;
  for (int64_t sweep = 0; sweep < a.M; sweep += kSweepRows) {
    const int64_t end = a.M - sweep < kSweepRows ? a.M : sweep + kSweepRows;
    for (int64_t i = 0; i < (end - sweep) * kRows; i++) sums[i] = 0.0f;
    for (int64_t kb = 0; kb < blocks; kb++) {
      const uint8_t* p = w + kb * Fmt::bytes * kRows;
      Unpack<Fmt>(p, block);
      // The next block comes in while this one is multiplied.
      for (int line = 0; line < Fmt::bytes * kRows; line += 64) __builtin_prefetch(p + Fmt::bytes * kRows + line);
      Strips<Simd::kStrip<Fmt::bits>>(a, block, sweep, end, kb, sums);
    }
    for (int64_t m = sweep; m < end; m++) StoreOutputs(a, m, tile, Simd::Load(sums + (m - sweep) * kRows));
  }
}

// All rows of x at once; a.qx.rows is a power of two up to R.
template <class Fmt, int R>
void DirectRows(const Matmul& a, int64_t tile, int64_t count) {
  if constexpr (R > 1) {
    if (a.qx.rows < R) return DirectRows<Fmt, R / 2>(a, tile, count);
  }
  DirectTiles<Fmt, R>(a, tile, count);
}

template <class Fmt>
void QuantizedMatmul(const Matmul& a, int64_t begin, int64_t end) {
  if (a.M > Simd::kDirectRows) {
    for (int64_t tile = begin; tile < end; tile++) UnpackedTile<Fmt>(a, tile);
    return;
  }
  for (int64_t tile = begin; tile < end; tile += kStreams)
    DirectRows<Fmt, Simd::kDirectRows>(a, tile, end - tile < kStreams ? end - tile : kStreams);
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
  constexpr int kRowsAtOnce = Simd::kFloatStrip;
  for (; m + kRowsAtOnce <= a.M; m += kRowsAtOnce) FloatTiles<Fmt, kRowsAtOnce, W>(a, m, tile);
  for (; m < a.M; m++) FloatTiles<Fmt, 1, W>(a, m, tile);
}

template <class Fmt>
void FloatMatmul(const Matmul& a, int64_t begin, int64_t end) {
  int64_t tile = begin;
  for (; tile + 4 <= end; tile += 4) FloatRows<Fmt, 4>(a, tile);
  for (; tile < end; tile++) FloatRows<Fmt, 1>(a, tile);
}

// One block of sixteen rows as floats, out[k][row]: the weights that the file defines, to the bit.
template <class Fmt>
void Dequantize(const uint8_t* p, float* out) {
  Unroll<kGroups<Fmt>>([&](auto g) {
    F scale, min = Simd::Zero();
    if constexpr (Fmt::integer) {
      scale = Simd::Mul(Fmt::D(p), Simd::ToFloat(Simd::template Widen<Fmt::signed_scale>(Fmt::template Scale<g.value>(p))));
      if constexpr (Fmt::has_min)
        min = Simd::Mul(Fmt::DMin(p), Simd::ToFloat(Simd::template Widen<false>(Fmt::template Min<g.value>(p))));
    } else {
      scale = Fmt::template Scale<g.value>(p);
      if constexpr (Fmt::has_min) min = Fmt::template Min<g.value>(p);
    }
    for (int i = 0; i < Fmt::group / 4; i++) {
      const I codes = Fmt::template Codes<g.value>(p, i);
      for (int j = 0; j < 4; j++, out += kRows) {
        const I code = Simd::And(Simd::Shr(codes, 8 * j), Simd::ISet(255));
        F w = Simd::Mul(scale, Simd::ToFloat(Simd::SubI(code, Simd::ISet(Fmt::offset))));
        if constexpr (Fmt::has_min) w = Simd::Add(w, Simd::Mul(min, Simd::Set(-1.0f)));
        Simd::Store(out, w);
      }
    }
  });
}

template <class Fmt>
void Widen(const uint8_t* p, float* out) {
  Simd::Store(out, Fmt::Value(p));
}

// sums[r] += x[m + r] . the weights k .. k + count of sixteen rows, R rows of x at a time.
template <int R>
void AddFloats(const Matmul& a, const float* w, int count, int64_t k, int64_t m, int64_t end, float* sums) {
  for (; m + R <= end; m += R, sums += R * kRows) {
    F sum[R];
    Rows<R>([&](int r) { sum[r] = Simd::Load(sums + r * kRows); });
    for (int i = 0; i < count; i++) {
      const F weights = Simd::Load(w + i * kRows);
      Rows<R>([&](int r) { sum[r] = Simd::Fma(weights, Simd::Set(a.x[(m + r) * a.K + k + i]), sum[r]); });
    }
    Rows<R>([&](int r) { Simd::Store(sums + r * kRows, sum[r]); });
  }
  if constexpr (R > 1) AddFloats<1>(a, w, count, k, m, end, sums);
}

// y = x W^T with x as it is, for study: a block becomes floats and meets every row of x.
void ExactMatmul(const Matmul& a, const q4::Blocks& f, int64_t begin, int64_t end) {
  alignas(64) float w[256 * kRows], sums[kSweepRows * kRows];
  for (int64_t tile = begin; tile < end; tile++) {
    for (int64_t sweep = 0; sweep < a.M; sweep += kSweepRows) {
      const int64_t last = a.M - sweep < kSweepRows ? a.M : sweep + kSweepRows;
      for (int64_t i = 0; i < (last - sweep) * kRows; i++) sums[i] = 0.0f;
      for (int64_t k = 0; k < a.K; k += f.weights) {
        f.dequantize(a.w + (tile * a.K + k) / f.weights * f.bytes * kRows, w);
        AddFloats<4>(a, w, f.weights, k, sweep, last, sums);
      }
      for (int64_t m = sweep; m < last; m++) StoreOutputs(a, m, tile, Simd::Load(sums + (m - sweep) * kRows));
    }
  }
}

// Blocks of 32 round their scale, and its product with their sum, to float16, as ggml's block_q8_0
// and block_q8_1 do: in step with llama.cpp, at a cost far below that of 8-bit codes.
void Quantize(const float* x, int64_t K, int block, int64_t m, const q4::QuantizedX& out) {
  for (int64_t b = 0; b < K / block; b++) {
    const float* xb = x + b * block;
    const int64_t row = b * out.rows + m;
    // Magnitudes compare as their bits do, which compilers take for a maximum; NaN is above infinity.
    int32_t most = 0;
    for (int i = 0; i < block; i++) {
      const int32_t magnitude = Load4(xb + i) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    const bool finite = most < 0x7f800000;
    float largest;
    __builtin_memcpy(&largest, &most, 4);
    // A block with a NaN or infinity makes its outputs NaN: int8 cannot carry either.
    const float scale = finite ? largest / 127.0f : __builtin_nanf("");
    out.d[row] = block == 32 ? RoundToHalf(scale) : scale;
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
        out.q[row * block + i + j] = finite ? v : 0;
        sum += finite ? v : 0;
      }
      const int64_t g = (row * block + i) / 16;
      out.sum16[g] = (int16_t)sum;
      if (g & 1) out.sum32[g / 2] = (int16_t)(out.sum16[g - 1] + sum);
    }
    if (block == 32) {
      const float sum = (float)out.sum32[row];
      out.dsum[row] = InHalfRange(scale) ? RoundToHalf(scale * sum) : scale * sum;
    }
  }
}

}  // namespace

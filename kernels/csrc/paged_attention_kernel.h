// Decode attention over a compressed cache, for one instruction set: a dense part in floats and kv
// blocks of packed codes, read as they lie (kv_pages.py, layout x16).
//
// Keys have slots in the lanes, values have dims, so that both products are the matmul's own: codes
// times signed bytes, summed in integers. What meets the keys is q, rounded to int8 by groups of a
// head; what meets the values is p * scale, rounded to int8 in each block and group. Scales and
// minimums are folded into the sums; nothing is dequantised to memory.
#pragma once
#include "kernels.h"

namespace {

using q4::PagedAttention;
using q4::PagedPart;

// v rounded to signed bytes, v ~ scale * byte; returns the scale.
inline float RoundToBytes(const float* v, int64_t n, int8_t* out) {
  float lanes[16] = {0};
  if (n % 16 == 0) {
    F most = Simd::Zero();
    for (int64_t i = 0; i < n; i += 16) {
      const F x = Simd::Load(v + i);
      most = Simd::Max(Simd::Max(x, Simd::Mul(x, Simd::Set(-1.0f))), most);
    }
    Simd::Store(lanes, most);
  } else {
    for (int64_t i = 0; i < n; i++) lanes[i % 16] = __builtin_fmaxf(__builtin_fabsf(v[i]), lanes[i % 16]);
  }
  float largest = lanes[0];
  for (int j = 1; j < 16; j++) largest = lanes[j] > largest ? lanes[j] : largest;
  const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < n; i++) {
    const float shifted = v[i] * inverse + 12582912.0f;  // As in Quantize.
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    out[i] = (int8_t)(bits - 0x4B400000);
  }
  return largest * (1.0f / 127.0f);
}

inline int32_t SumBytes(const int8_t* v, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i++) sum += v[i];
  return sum;
}

// dot[r] += codes of `steps` words times x[r] + 4 * step, for R rows; `high` takes the upper nibbles.
template <int bits, int R, bool high>
Q4_INLINE void DotChain(const uint8_t* words, int first, int end, const int8_t* const* x, I* dot) {
  Unroll<Simd::kPlanes<bits>>([&](auto plane) Q4_LAMBDA {
    I sum[R];
    Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Begin(dot[r]); });
#pragma GCC unroll 8
    for (int s = first; s < end; s++) {
      I codes = Simd::ILoad(words + 64 * s);
      if (bits == 4) codes = Nibble(codes, high);
      codes = Simd::template Plane<bits, plane.value>(codes);
      Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Dot(sum[r], codes, Load4(x[r] + 4 * s)); });
    }
    Rows<R>([&](int r) Q4_LAMBDA { dot[r] = Simd::template End<plane.value>(dot[r], sum[r]); });
  });
}

template <int bits, int R, bool high>
Q4_INLINE void DotWords(const uint8_t* words, int64_t steps, const int8_t* const* x, I* dot) {
  constexpr int kChain = Simd::kChain<bits>;
  // The usual lengths, of groups and blocks of 32, as straight code.
  if (steps == 8 && kChain >= 8) return DotChain<bits, R, high>(words, 0, 8, x, dot);
  if (steps == 4) return DotChain<bits, R, high>(words, 0, 4, x, dot);
  for (int64_t first = 0; first < steps; first += kChain)
    DotChain<bits, R, high>(words, first, first + kChain < steps ? first + kChain : steps, x, dot);
}

// q of one head group, rounded by the groups of the keys.
template <int R>
struct RoundedQ {
  int8_t q[R][q4::kMaxHeadDim];
  float scale[R][q4::kMaxGroups];
  int32_t sum[R][q4::kMaxGroups];
};

template <int R>
void RoundQ(const PagedAttention& a, const float* q, RoundedQ<R>& out) {
  const int64_t group = a.key.group;
  for (int r = 0; r < R; r++) {
    for (int64_t g = 0; g < a.H / group; g++) {
      int8_t* to = out.q[r] + g * group;
      out.scale[r][g] = a.scale * RoundToBytes(q + r * a.H + g * group, group, to);
      out.sum[r][g] = SumBytes(to, group);
    }
  }
}

// logits[r][0 .. 15] of the sixteen slots of tile s of a block.
template <int bits, int R>
Q4_INLINE void KeyTile(const PagedAttention& a, int64_t block, int64_t s, const RoundedQ<R>& q, float* const* logits) {
  const int64_t group = a.key.group, groups = a.H / group, words = a.H / (bits == 4 ? 8 : 4);
  const int64_t tile = block * (a.block_size / 16) + s;
  const uint8_t* codes = a.key.codes + tile * words * 64;
  const int offset = a.key.minimum ? 0 : 1 << (bits - 1);
  F total[R];
  for (int r = 0; r < R; r++) total[r] = Simd::Zero();
  for (int64_t g = 0; g < groups; g++) {
    I dot[R];
    for (int r = 0; r < R; r++) dot[r] = Simd::ISet(-offset * q.sum[r][g]);
    // The group's words; one that spans the halves of the head has low and high nibbles.
    int64_t chunk = g * group / 4;
    for (int64_t left = group / 4; left > 0;) {
      const bool high = bits == 4 && chunk >= words;
      const int64_t word = high ? chunk - words : chunk, steps = left < words - word ? left : words - word;
      const int8_t* x[R];
      for (int r = 0; r < R; r++) x[r] = q.q[r] + 4 * chunk;
      if (high) DotWords<bits, R, true>(codes + 64 * word, steps, x, dot);
      else DotWords<bits, R, false>(codes + 64 * word, steps, x, dot);
      chunk += steps, left -= steps;
    }
    const int64_t at = (tile * groups + g) * 16;
    const F scale = Simd::LoadHalf(a.key.scale + at);
    for (int r = 0; r < R; r++) total[r] = Simd::Fma(Simd::ToFloat(dot[r]), Simd::Mul(scale, Simd::Set(q.scale[r][g])), total[r]);
    if (a.key.minimum) {
      const F minimum = Simd::LoadHalf(a.key.minimum + at);
      for (int r = 0; r < R; r++) total[r] = Simd::Fma(minimum, Simd::Set(-q.scale[r][g] * (float)q.sum[r][g]), total[r]);
    }
  }
  for (int r = 0; r < R; r++) Simd::Store(logits[r], total[r]);
}

// out[r][0 .. H - 1] += sum over the block's slots of p[r][slot] * value.
template <int bits, int R>
Q4_INLINE void ValueBlock(const PagedAttention& a, int64_t block, const float* const* p, float* const* out) {
  const int64_t slots = a.block_size, group = a.value.group, groups = a.H / group;
  const int64_t words = slots / (bits == 4 ? 8 : 4);
  const int offset = a.value.minimum ? 0 : 1 << (bits - 1);
  for (int64_t g = 0; g < groups; g++) {
    int8_t weights[R][q4::kMaxBlockSize];
    float scale[R], low[R];
    I start[R];
    float scales[q4::kMaxBlockSize], minimums[q4::kMaxBlockSize];
    const int64_t at = (block * groups + g) * slots;
    for (int64_t s = 0; s < slots; s += 16) {
      Simd::Store(scales + s, Simd::LoadHalf(a.value.scale + at + s));
      if (a.value.minimum) Simd::Store(minimums + s, Simd::LoadHalf(a.value.minimum + at + s));
    }
    for (int r = 0; r < R; r++) {
      // What a dead slot holds may be NaN, of which Max takes the other side; its weight is 0.
      float scaled[q4::kMaxBlockSize];
      F sum = Simd::Zero();
      for (int64_t s = 0; s < slots; s += 16) {
        const F weight = Simd::Load(p[r] + s);
        Simd::Store(scaled + s, Simd::Max(Simd::Mul(weight, Simd::Load(scales + s)), Simd::Zero()));
        if (a.value.minimum)
          sum = Simd::Fma(weight, Simd::Max(Simd::Load(minimums + s), Simd::Set(-65504.0f)), sum);
      }
      low[r] = -Simd::Sum(sum);
      scale[r] = RoundToBytes(scaled, slots, weights[r]);
      start[r] = Simd::ISet(offset ? -offset * SumBytes(weights[r], slots) : 0);
    }
    for (int64_t d = g * group / 16; 16 * d < (g + 1) * group; d++) {
      const uint8_t* codes = a.value.codes + (block * (a.H / 16) + d) * words * 64;
      I dot[R];
      const int8_t* x[R];
      for (int r = 0; r < R; r++) dot[r] = start[r], x[r] = weights[r];
      DotWords<bits, R, false>(codes, words, x, dot);
      if (bits == 4) {
        for (int r = 0; r < R; r++) x[r] += slots / 2;
        DotWords<bits, R, true>(codes, words, x, dot);
      }
      float sums[16];
      for (int r = 0; r < R; r++) {
        const F result = Simd::Fma(Simd::ToFloat(dot[r]), Simd::Set(scale[r]), Simd::Set(low[r]));
        float* to = out[r] + 16 * d;
        if (group >= 16) {
          Simd::Store(to, Simd::Add(Simd::Load(to), result));
        } else {  // Two groups share the lanes; this one has half of them.
          Simd::Store(sums, result);
          for (int64_t i = g * group - 16 * d; i < (g + 1) * group - 16 * d; i++) to[i] += sums[i];
        }
      }
    }
  }
}

// logits[r * stride + slot] of float keys [slots, H].
template <bool half, int R>
void FloatLogits(const PagedAttention& a, const float* q, const void* keys, int64_t slots, float* logits, int64_t stride) {
  q4::Attention floats{};
  floats.D = a.H, floats.scale = a.scale;
  Logits<half, R>(floats, q, keys, slots, logits, stride);
}

// out[r][0 .. H - 1] += sum over the slots of p[r][slot] * v[slot]; pos, where given, says which live.
template <bool half, int R>
void AddValues(const void* v, int64_t H, int64_t slots, const float* const* p, const int32_t* pos, float* const* out) {
  for (int64_t d = 0; d < H; d += 16) {
    F sum[R];
    Rows<R>([&](int r) { sum[r] = Simd::Load(out[r] + d); });
    for (int64_t s = 0; s < slots; s++) {
      if (pos && pos[s] < 0) continue;
      const F value = LoadCache<half>(v, s * H + d);
      Rows<R>([&](int r) { sum[r] = Simd::Fma(value, Simd::Set(p[r][s]), sum[r]); });
    }
    Rows<R>([&](int r) { Simd::Store(out[r] + d, sum[r]); });
  }
}

// Where the dense tokens lie: runs of slots, the sinks and then the ring from its oldest.
struct DenseRuns {
  int64_t begin[3], count[3];
};

inline DenseRuns RunsOf(const PagedAttention& a, int64_t tokens, int64_t gone) {
  const int64_t sinks = tokens < a.sink ? tokens : a.sink, left = tokens - sinks - gone;
  const int64_t first = a.ring ? gone % a.ring : 0, before_end = left < a.ring - first ? left : a.ring - first;
  return {{0, a.sink + first, a.sink}, {sinks, before_end, left - before_end}};
}

// logits[r][i * block_size + slot] of R query heads and KV head h. Dead slots get -3e38, and sixteen
// dead ones are not read.
template <int bits, int R>
void KeyLogits(const PagedAttention& a, const int32_t* table, int64_t blocks, int64_t h, const float* q, float* logits,
               int64_t stride) {
  const int64_t slots = a.block_size;
  RoundedQ<R> rounded;
  if (bits < 16) RoundQ<R>(a, q, rounded);
  for (int64_t i = 0; i < blocks; i++) {
    const int32_t* pos = a.slot_pos + table[i] * slots;
    const int64_t block = table[i] * a.K + h;
    for (int64_t s = 0; s < slots; s += 16) {
      float* to[R];
      for (int r = 0; r < R; r++) to[r] = logits + r * stride + i * slots + s;
      bool any = false, all = true;
      for (int64_t j = 0; j < 16; j++) any |= pos[s + j] >= 0, all &= pos[s + j] >= 0;
      if (any) {
        if constexpr (bits < 16) {
          KeyTile<bits, R>(a, block, s / 16, rounded, to);
        } else {
          FloatLogits<bits == 16, R>(a, q, a.key.codes + (block * slots + s) * a.H * (bits / 8), 16, to[0], stride);
        }
      }
      if (!all)
        for (int r = 0; r < R; r++)
          for (int64_t j = 0; j < 16; j++) to[r][j] = pos[s + j] >= 0 ? to[r][j] : -3e38f;
    }
  }
}

// out[r] += the blocks' values, weighted by p[r * stride + i * block_size + slot].
template <int bits, int R>
void MixBlocks(const PagedAttention& a, const int32_t* table, int64_t blocks, int64_t h, const float* p, int64_t stride,
               float* const* out) {
  const int64_t slots = a.block_size;
  for (int64_t i = 0; i < blocks; i++) {
    const int32_t* pos = a.slot_pos + table[i] * slots;
    bool any = false;
    for (int64_t j = 0; j < slots; j++) any |= pos[j] >= 0;
    if (!any) continue;
    const int64_t block = table[i] * a.K + h;
    const float* weights[R];
    for (int r = 0; r < R; r++) weights[r] = p + r * stride + i * slots;
    if constexpr (bits < 16) {
      ValueBlock<bits, R>(a, block, weights, out);
    } else {
      AddValues<bits == 16, R>(a.value.codes + block * slots * a.H * (bits / 8), a.H, slots, weights, pos, out);
    }
  }
}

// body(Int<bits>()) for the bits of a format.
template <class Body>
void WithBits(int64_t bits, const Body& body) {
  switch (bits) {
    case 4: return body(Int<4>());
    case 8: return body(Int<8>());
    case 16: return body(Int<16>());
    default: return body(Int<32>());
  }
}

template <int R>
void PagedHeads(const PagedAttention& a, int64_t b, int64_t h, int64_t n0, float* scratch) {
  const int64_t slots = a.block_size, blocks = a.num_blocks[b], stride = a.P * slots + a.D + 16;
  const int64_t dense = (b * a.K + h) * a.D * a.H * (a.half ? 2 : 4), dense_row = a.H * (a.half ? 2 : 4);
  const int32_t* table = a.table + b * a.P;
  const float* q = a.q + (b * a.N + n0) * a.H;
  float* out[R];
  for (int r = 0; r < R; r++) out[r] = a.out + (b * a.N + n0 + r) * a.H;
  // body(Int<half>(), first dense slot, slots, index of the first in the scratch) for each run.
  const DenseRuns runs = RunsOf(a, a.length[b], a.spilled[b]);
  const auto for_runs = [&](const auto& body) {
    int64_t at = blocks * slots;
    for (int i = 0; i < 3; at += runs.count[i++])
      if (runs.count[i] > 0) a.half ? body(Int<1>(), i, at) : body(Int<0>(), i, at);
    return at;
  };

  WithBits(a.key.bits, [&](auto bits) { KeyLogits<bits.value, R>(a, table, blocks, h, q, scratch, stride); });
  const int64_t count = for_runs([&](auto half, int i, int64_t at) {
    const uint8_t* keys = (const uint8_t*)a.k + dense + runs.begin[i] * dense_row;
    FloatLogits<half.value, R>(a, q, keys, runs.count[i], scratch + at, stride);
  });
  float inverse[R];
  for (int r = 0; r < R; r++) {
    inverse[r] = Softmax(scratch + r * stride, count);
    for (int64_t i = 0; i < a.H; i++) out[r][i] = 0.0f;
  }
  WithBits(a.value.bits, [&](auto bits) { MixBlocks<bits.value, R>(a, table, blocks, h, scratch, stride, out); });
  for_runs([&](auto half, int i, int64_t at) {
    const float* p[R];
    for (int r = 0; r < R; r++) p[r] = scratch + r * stride + at;
    const uint8_t* values = (const uint8_t*)a.v + dense + runs.begin[i] * dense_row;
    AddValues<half.value, R>(values, a.H, runs.count[i], p, nullptr, out);
  });
  for (int r = 0; r < R; r++)
    for (int64_t i = 0; i < a.H; i++) out[r][i] *= inverse[r];

  if (!a.mass) return;
  // The share of each slot, summed over the heads of the group so far: blocks, then the dense slots.
  float* mass = a.mass + (b * a.K + h) * a.P * slots;
  float* dense_mass = a.dense_mass + (b * a.K + h) * a.D;
  for (int r = 0; r < R; r++) {
    const float weight = inverse[r] * (float)a.K / a.N, *p = scratch + r * stride;
    for (int64_t i = 0; i < blocks * slots; i++) mass[i] += weight * *p++;
    for (int i = 0; i < 3; i++)
      for (int64_t j = 0; j < runs.count[i]; j++) dense_mass[runs.begin[i] + j] += weight * *p++;
  }
}

void AttendPaged(const PagedAttention& a, int64_t b, int64_t h, float* scratch) {
  const int64_t repeat = a.N / a.K, n = h * repeat;
  int64_t r = 0;
  for (; r + 4 <= repeat; r += 4) PagedHeads<4>(a, b, h, n + r, scratch);
  for (; r + 2 <= repeat; r += 2) PagedHeads<2>(a, b, h, n + r, scratch);
  for (; r < repeat; r++) PagedHeads<1>(a, b, h, n + r, scratch);
}

}  // namespace

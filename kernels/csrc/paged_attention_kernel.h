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

// v rounded to signed bytes, v ~ scale * byte; returns the scale. Blocks of 16.
inline float RoundToBytes(const float* v, int64_t n, int8_t* out) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; i++) largest = __builtin_fabsf(v[i]) > largest ? __builtin_fabsf(v[i]) : largest;
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
template <int bits, int R>
Q4_INLINE void DotWords(const uint8_t* words, int64_t steps, bool high, const int8_t* const* x, I* dot) {
  constexpr int kPlanes = Simd::kPlanes<bits>, kChain = Simd::kChain<bits>;
  for (int64_t first = 0; first < steps; first += kChain) {
    const int64_t end = first + kChain < steps ? first + kChain : steps;
    Unroll<kPlanes>([&](auto plane) Q4_LAMBDA {
      I sum[R];
      Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Begin(dot[r]); });
      for (int64_t s = first; s < end; s++) {
        I codes = Simd::ILoad(words + 64 * s);
        if (bits == 4) codes = Nibble(codes, high);
        codes = Simd::template Plane<bits, plane.value>(codes);
        Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Dot(sum[r], codes, Load4(x[r] + 4 * s)); });
      }
      Rows<R>([&](int r) Q4_LAMBDA { dot[r] = Simd::template End<plane.value>(dot[r], sum[r]); });
    });
  }
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
      DotWords<bits, R>(codes + 64 * word, steps, high, x, dot);
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
      // What a dead slot holds has no weight, be it NaN.
      float scaled[q4::kMaxBlockSize], lanes[16] = {0};
      for (int64_t s = 0; s < slots; s++) scaled[s] = p[r][s] > 0.0f ? p[r][s] * scales[s] : 0.0f;
      if (a.value.minimum)
        for (int64_t s = 0; s < slots; s += 16)
          for (int j = 0; j < 16; j++) lanes[j] += p[r][s + j] > 0.0f ? p[r][s + j] * minimums[s + j] : 0.0f;
      low[r] = -Simd::Sum(Simd::Load(lanes));
      scale[r] = RoundToBytes(scaled, slots, weights[r]);
      start[r] = Simd::ISet(offset ? -offset * SumBytes(weights[r], slots) : 0);
    }
    for (int64_t d = g * group / 16; 16 * d < (g + 1) * group; d++) {
      const uint8_t* codes = a.value.codes + (block * (a.H / 16) + d) * words * 64;
      I dot[R];
      const int8_t* x[R];
      for (int r = 0; r < R; r++) dot[r] = start[r], x[r] = weights[r];
      DotWords<bits, R>(codes, words, false, x, dot);
      if (bits == 4) {
        for (int r = 0; r < R; r++) x[r] += slots / 2;
        DotWords<bits, R>(codes, words, true, x, dot);
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

template <bool half, int bits_k, int bits_v, int R>
void PagedHeads(const PagedAttention& a, int64_t b, int64_t h, int64_t n0, float* scratch) {
  const int64_t bytes = half ? 2 : 4, slots = a.block_size, blocks = a.num_blocks[b];
  const int64_t dense = (b * a.K + h) * a.D * a.H * bytes, stride = a.P * slots + a.D + 16;
  const int32_t* table = a.table + b * a.P;
  const float* q = a.q + (b * a.N + n0) * a.H;
  float *logits[R], *out[R];
  for (int r = 0; r < R; r++) logits[r] = scratch + r * stride, out[r] = a.out + (b * a.N + n0 + r) * a.H;

  // Keys. Dead slots get no weight; sixteen dead ones are not read.
  RoundedQ<R> rounded;
  if (bits_k < 16) RoundQ<R>(a, q, rounded);
  const ::q4::Attention floats{q, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0, 0, 0, 0, a.H, a.scale};
  for (int64_t i = 0; i < blocks; i++) {
    const int32_t* pos = a.slot_pos + table[i] * slots;
    const int64_t block = table[i] * a.K + h;
    for (int64_t s = 0; s < slots; s += 16) {
      float* to[R];
      for (int r = 0; r < R; r++) to[r] = logits[r] + i * slots + s;
      bool any = false, all = true;
      for (int64_t j = 0; j < 16; j++) any |= pos[s + j] >= 0, all &= pos[s + j] >= 0;
      if (any) {
        if constexpr (bits_k < 16) {
          KeyTile<bits_k, R>(a, block, s / 16, rounded, to);
        } else {
          Logits<bits_k == 16, R>(floats, q, a.key.codes + (block * slots + s) * a.H * (bits_k / 8), 16, to[0], stride);
        }
      }
      if (!all)
        for (int r = 0; r < R; r++)
          for (int64_t j = 0; j < 16; j++) to[r][j] = pos[s + j] >= 0 ? to[r][j] : -3e38f;
    }
  }
  const DenseRuns runs = RunsOf(a, a.length[b], a.spilled[b]);
  int64_t count = blocks * slots;
  for (int i = 0; i < 3; i++) {
    if (runs.count[i] > 0)
      Logits<half, R>(floats, q, (const uint8_t*)a.k + dense + runs.begin[i] * a.H * bytes, runs.count[i], logits[0] + count, stride);
    count += runs.count[i];
  }

  // Softmax.
  float inverse[R];
  for (int r = 0; r < R; r++) {
    inverse[r] = Softmax(logits[r], count);
    for (int64_t i = 0; i < a.H; i++) out[r][i] = 0.0f;
  }

  // Values.
  for (int64_t i = 0; i < blocks; i++) {
    const int32_t* pos = a.slot_pos + table[i] * slots;
    bool any = false;
    for (int64_t j = 0; j < slots; j++) any |= pos[j] >= 0;
    if (!any) continue;
    const int64_t block = table[i] * a.K + h;
    const float* p[R];
    for (int r = 0; r < R; r++) p[r] = logits[r] + i * slots;
    if constexpr (bits_v < 16) {
      ValueBlock<bits_v, R>(a, block, p, out);
    } else {
      AddValues<bits_v == 16, R>(a.value.codes + block * slots * a.H * (bits_v / 8), a.H, slots, p, pos, out);
    }
  }
  count = blocks * slots;
  for (int i = 0; i < 3; i++) {
    const float* p[R];
    for (int r = 0; r < R; r++) p[r] = logits[r] + count;
    if (runs.count[i] > 0)
      AddValues<half, R>((const uint8_t*)a.v + dense + runs.begin[i] * a.H * bytes, a.H, runs.count[i], p, nullptr, out);
    count += runs.count[i];
  }
  for (int r = 0; r < R; r++)
    for (int64_t i = 0; i < a.H; i++) out[r][i] *= inverse[r];

  if (!a.mass) return;
  // The share of each slot, summed over the heads of the group so far: blocks, then the dense slots.
  const float share = (float)a.K / a.N;
  float* mass = a.mass + (b * a.K + h) * a.P * slots;
  float* dense_mass = a.dense_mass + (b * a.K + h) * a.D;
  for (int r = 0; r < R; r++) {
    const float weight = inverse[r] * share;
    for (int64_t i = 0; i < blocks * slots; i++) mass[i] += weight * logits[r][i];
    const float* p = logits[r] + blocks * slots;
    for (int i = 0; i < 3; i++)
      for (int64_t j = 0; j < runs.count[i]; j++) dense_mass[runs.begin[i] + j] += weight * *p++;
  }
}

template <bool half, int bits_k, int bits_v>
void PagedHead(const PagedAttention& a, int64_t b, int64_t h, float* scratch) {
  const int64_t repeat = a.N / a.K, n = h * repeat;
  int64_t r = 0;
  for (; r + 4 <= repeat; r += 4) PagedHeads<half, bits_k, bits_v, 4>(a, b, h, n + r, scratch);
  for (; r + 2 <= repeat; r += 2) PagedHeads<half, bits_k, bits_v, 2>(a, b, h, n + r, scratch);
  for (; r < repeat; r++) PagedHeads<half, bits_k, bits_v, 1>(a, b, h, n + r, scratch);
}

template <bool half, int bits_k>
void PagedKeys(const PagedAttention& a, int64_t b, int64_t h, float* scratch) {
  switch (a.value.bits) {
    case 4: return PagedHead<half, bits_k, 4>(a, b, h, scratch);
    case 8: return PagedHead<half, bits_k, 8>(a, b, h, scratch);
    case 16: return PagedHead<half, bits_k, 16>(a, b, h, scratch);
    default: return PagedHead<half, bits_k, 32>(a, b, h, scratch);
  }
}

void AttendPaged(const PagedAttention& a, int64_t b, int64_t h, float* scratch) {
  const auto with = [&](auto half) {
    constexpr bool kHalf = decltype(half)::value;
    switch (a.key.bits) {
      case 4: return PagedKeys<kHalf, 4>(a, b, h, scratch);
      case 8: return PagedKeys<kHalf, 8>(a, b, h, scratch);
      case 16: return PagedKeys<kHalf, 16>(a, b, h, scratch);
      default: return PagedKeys<kHalf, 32>(a, b, h, scratch);
    }
  };
  a.half ? with(Int<1>()) : with(Int<0>());
}

}  // namespace

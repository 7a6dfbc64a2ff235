// Decode attention over a compressed cache, for one instruction set: a dense part in floats, and kv
// blocks of packed codes (packed_blocks.h) or floats that block tables point to.
#pragma once
#include "packed_blocks.h"

namespace {

constexpr int64_t kAhead = 2;  // Blocks from a prefetch to its use.

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

// Brings a block of one KV head in ahead of its use: tables scatter blocks, which no hardware foresees.
struct Prefetch {
  const PagedPart& part;
  int64_t codes, parameters;  // Bytes of one KV head's block.

  Prefetch(const PagedPart& part, int64_t slots, int64_t H)
      : part(part), codes(slots * H * part.bits / 8), parameters(part.scale ? slots * H / part.group * 2 : 0) {}

  // Inlined, since GCC takes a function that only prefetches for one without effect.
  Q4_INLINE void operator()(int64_t block) const {
    Lines(part.codes + block * codes, codes);
    if (part.scale) Lines((const uint8_t*)part.scale + block * parameters, parameters);
    if (part.minimum) Lines((const uint8_t*)part.minimum + block * parameters, parameters);
  }

 private:
  static Q4_INLINE void Lines(const uint8_t* at, int64_t bytes) {
    for (const uint8_t* end = at + bytes; at < end; at += 256)  // What is too much is the next head's.
      for (int i = 0; i < 256; i += 64) __builtin_prefetch(at + i);
  }
};

// tile(slot pool index / 16, to) writes logits[r * stride ..] of sixteen slots. Dead slots get -3e38, and
// sixteen dead ones are not read.
template <int R, class Tile>
Q4_INLINE void KeyTiles(const PagedAttention& a, const int32_t* table, int64_t blocks, int64_t h, float* logits,
                        int64_t stride, const Tile& tile) {
  const int64_t tiles = a.block_size / 16;
  const Prefetch prefetch(a.key, a.block_size, a.H);
  for (int64_t i = 0; i < blocks; i++) {
    if (i + kAhead < blocks) prefetch(table[i + kAhead] * a.K + h);
    for (int64_t s = 0; s < tiles; s++, logits += 16) {
      uint32_t dead = Simd::Negative(Simd::ILoad(a.slot_pos + (table[i] * tiles + s) * 16));
      if (dead != 0xffff) tile((table[i] * a.K + h) * tiles + s, logits);
      for (; dead; dead &= dead - 1)
        for (int r = 0; r < R; r++) logits[r * stride + __builtin_ctz(dead)] = -3e38f;
    }
  }
}

// logits[r * stride + i * block_size + slot] of R query heads and KV head h.
template <int bits, int R>
void KeyLogits(const PagedAttention& a, const int32_t* table, int64_t blocks, int64_t h, const float* q, float* logits,
               int64_t stride) {
  if constexpr (bits < 16) {
    RoundedQ<R> rounded;
    RoundQ<bits, R>(a, q, rounded);
    const auto by_chains = [&](auto kWords, auto kAll, auto kChains) {
      KeyTiles<R>(a, table, blocks, h, logits, stride, [&](int64_t tile, float* to) Q4_LAMBDA {
        KeyTile<bits, kWords.value, kAll.value, kChains.value, R>(a, tile, rounded, to, stride);
      });
    };
    const int64_t words = a.H * bits / 32, group = a.key.group;
    if ((words | group / 4) % 8) return by_chains(Int<2>(), Int<0>(), Int<0>());
    if constexpr (R == 4) {  // Llama 3's heads; at 64 and 64 a fifth fewer instructions.
      if (a.H == 64 && group == 64) return by_chains(Int<8>(), Int<2>(), Int<2>());
      if (a.H == 64 && group == 32) return by_chains(Int<8>(), Int<2>(), Int<1>());
      if (a.H == 128 && group == 64) return by_chains(Int<8>(), Int<4>(), Int<2>());
      if (a.H == 128 && group == 32) return by_chains(Int<8>(), Int<4>(), Int<1>());
    }
    by_chains(Int<8>(), Int<0>(), Int<0>());
  } else {
    KeyTiles<R>(a, table, blocks, h, logits, stride, [&](int64_t tile, float* to) {
      FloatLogits<bits == 16, R>(a, q, a.key.codes + tile * 16 * a.H * (bits / 8), 16, to, stride);
    });
  }
}

// out[r] += the blocks' values, weighted by p[r * stride + i * block_size + slot].
template <int bits, int kSlots, int kGroup, int R>
void MixBlocks(const PagedAttention& a, const int32_t* table, int64_t blocks, int64_t h, const float* p, int64_t stride,
               float* const* out) {
  const int64_t slots = kSlots ? kSlots : a.block_size, groups = bits < 16 ? a.H / a.value.group : 0;
  F low[q4::kMaxGroups][R];
  for (int64_t g = 0; g < groups; g++)
    for (int r = 0; r < R; r++) low[g][r] = Simd::Zero();
  const Prefetch prefetch(a.value, slots, a.H);
  for (int64_t i = 0; i < blocks; i++, p += slots) {
    if (i + kAhead < blocks) prefetch(table[i + kAhead] * a.K + h);
    const int64_t block = table[i] * a.K + h;
    if constexpr (bits < 16) {
      ValueBlock<bits, kSlots, kGroup, R>(a, groups, block, p, stride, out, low);
    } else {
      const int32_t* pos = a.slot_pos + table[i] * slots;
      const float* weights[R];
      for (int r = 0; r < R; r++) weights[r] = p + r * stride;
      AddValues<bits == 16, R>(a.value.codes + block * slots * a.H * (bits / 8), a.H, slots, weights, pos, out);
    }
  }
  for (int64_t g = 0; g < groups; g++)
    for (int r = 0; r < R; r++) {
      const float sum = Simd::Sum(low[g][r]);
      for (int64_t d = g * a.value.group; d < (g + 1) * a.value.group; d++) out[r][d] -= sum;
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
  WithBits(a.value.bits, [&](auto bits) {
    auto mix = a.block_size == 32 ? MixBlocks<bits.value, 32, 0, R> : MixBlocks<bits.value, 0, 0, R>;
    if constexpr (bits.value < 16 && R == 4) {  // As in KeyLogits.
      if (a.block_size == 32 && a.value.group == 64) mix = MixBlocks<bits.value, 32, 64, R>;
      if (a.block_size == 32 && a.value.group == 32) mix = MixBlocks<bits.value, 32, 32, R>;
    }
    mix(a, table, blocks, h, scratch, stride, out);
  });
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

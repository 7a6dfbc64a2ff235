// Blocks of packed codes in decode attention, for one instruction set, read as they lie (kv_pages.py,
// layout x16).
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

// Which codes of a word of bytes meet x: all of a byte, a nibble of each, or the low nibbles, then the
// high ones with the x that lies `apart` from theirs.
enum class Codes { kBytes, kLow, kHigh, kBoth };

// Bytes that meet codes, of each row: a constant stride, so that one register points to all.
constexpr int64_t kRow = 256;
static_assert(kRow >= q4::kMaxHeadDim && kRow >= q4::kMaxBlockSize, "a row holds a head, or a block's slots");

// dot[r] += codes of kWords words times x + kRow * r + 4 * word, for R rows.
template <int bits, Codes codes, int kWords, int R>
Q4_INLINE void DotChain(const uint8_t* words, const int8_t* x, int64_t apart, I* dot) {
  static_assert(kWords * (codes == Codes::kBoth ? 2 : 1) <= Simd::kChain<bits>, "the sum overflows");
  Unroll<Simd::kPlanes<bits>>([&](auto plane) Q4_LAMBDA {
    I sum[R];
    Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Begin(dot[r]); });
    const auto step = [&](I word, const int8_t* at) Q4_LAMBDA {
      Rows<R>([&](int r) Q4_LAMBDA { sum[r] = Simd::Dot(sum[r], word, Load4(at + kRow * r)); });
    };
    Unroll<kWords>([&](auto w) Q4_LAMBDA {
      const I word = Word(words, w);
      if constexpr (codes == Codes::kBytes) step(Simd::template Plane<bits, plane.value>(word), x + 4 * w);
      if constexpr (codes == Codes::kLow || codes == Codes::kBoth) step(Nibble(word, false), x + 4 * w);
      if constexpr (codes == Codes::kHigh) step(Nibble(word, true), x + 4 * w);
      if constexpr (codes == Codes::kBoth) step(Nibble(word, true), x + apart + 4 * w);
    });
    Rows<R>([&](int r) Q4_LAMBDA { dot[r] = Simd::template End<plane.value>(dot[r], sum[r]); });
  });
}

// q of one head group, rounded by the groups of the keys: ~ scale * q. A group's minimums count `low`
// times; the scales do so in their place where codes have an offset instead.
template <int R>
struct RoundedQ {
  int8_t q[R * kRow];
  float scale[R][q4::kMaxGroups], low[R][q4::kMaxGroups];
};

template <int bits, int R>
void RoundQ(const PagedAttention& a, const float* q, RoundedQ<R>& out) {
  const int64_t group = a.key.group, offset = a.key.minimum ? 1 : 1 << (bits - 1);
  for (int r = 0; r < R; r++) {
    for (int64_t g = 0; g < a.H / group; g++) {
      const float* from = q + r * a.H + g * group;
      float largest = 0.0f;
      for (int64_t i = 0; i < group; i++) {
        const float magnitude = __builtin_fabsf(from[i]);
        largest = magnitude > largest ? magnitude : largest;
      }
      const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
      int32_t sum = 0;
      for (int64_t i = 0; i < group; i++) {
        const float shifted = from[i] * inverse + 12582912.0f;  // As in Quantize.
        int32_t word;
        __builtin_memcpy(&word, &shifted, 4);
        sum += out.q[r * kRow + g * group + i] = (int8_t)(word - 0x4B400000);
      }
      out.scale[r][g] = a.scale * largest * (1.0f / 127.0f);
      out.low[r][g] = -out.scale[r][g] * (float)(sum * offset);
    }
  }
}

// logits[r * stride] .. of sixteen slots, `tile` among all blocks'. Groups, and halves of a head in int4,
// are whole chains of kWords words: kChains a group and kAll a head, or, where that is 0, any number.
template <int bits, int kWords, int kAll, int kChains, int R>
Q4_INLINE void KeyTile(const PagedAttention& a, int64_t tile, const RoundedQ<R>& q, float* logits, int64_t stride) {
  const int64_t all = kAll ? kAll : a.H / 4 / kWords, chains = kAll ? kChains : a.key.group / 4 / kWords;
  const int64_t groups = all / chains, low_chains = bits == 4 ? all / 2 : all;
  const uint8_t* codes = a.key.codes + tile * low_chains * kWords * 64;
  const uint16_t *scales = a.key.scale + tile * groups * 16,
                 *minimums = (a.key.minimum ? a.key.minimum : a.key.scale) + tile * groups * 16;
  F total[R];
  Rows<R>([&](int r) Q4_LAMBDA { total[r] = Simd::Zero(); });
  for (int64_t g = 0, chain = 0; g < groups; g++) {
    I dot[R];
    Rows<R>([&](int r) Q4_LAMBDA { dot[r] = Simd::ISet(0); });
    for (const int64_t end = chain + chains; chain < end; chain++) {
      const int8_t* x = q.q + 4 * kWords * chain;
      const uint8_t* words = codes + 64 * kWords * chain;
      if constexpr (bits == 8) DotChain<bits, Codes::kBytes, kWords, R>(words, x, 0, dot);
      else if (chain < low_chains) DotChain<bits, Codes::kLow, kWords, R>(words, x, 0, dot);
      else DotChain<bits, Codes::kHigh, kWords, R>(words - 64 * kWords * low_chains, x, 0, dot);
    }
    const F scale = Simd::LoadHalf(scales + 16 * g), minimum = Simd::LoadHalf(minimums + 16 * g);
    Rows<R>([&](int r) Q4_LAMBDA {
      total[r] = Simd::Fma(minimum, Simd::Set(q.low[r][g]), total[r]);
      total[r] = Simd::Fma(Simd::ToFloat(dot[r]), Simd::Mul(scale, Simd::Set(q.scale[r][g])), total[r]);
    });
  }
  Rows<R>([&](int r) Q4_LAMBDA { Simd::Store(logits + r * stride, total[r]); });
}

// p * scale of a block's slots in one group of dims, rounded to bytes: ~ scale * byte.
template <int R>
struct RoundedWeights {
  int8_t byte[R * kRow];
  float scale[R];
};

// What minimums or the codes' offset take away is added to low[r], lane by lane.
template <int bits, int R>
Q4_INLINE void RoundWeights(const PagedPart& part, int64_t at, int64_t slots, const float* p, int64_t stride,
                            RoundedWeights<R>& out, F* low) {
  // What a dead slot holds may be NaN, of which Max takes the other side; its weight is 0.
  float scales[q4::kMaxBlockSize], minimums[q4::kMaxBlockSize];
  for (int64_t s = 0; s < slots; s += 16) {
    Simd::Store(scales + s, Simd::Max(Simd::LoadHalf(part.scale + at + s), Simd::Zero()));
    if (part.minimum) Simd::Store(minimums + s, Simd::Max(Simd::LoadHalf(part.minimum + at + s), Simd::Set(-65504.0f)));
  }
  // Row after row in each step, since one row's steps wait for each other.
  float largest[R];
  Rows<R>([&](int r) Q4_LAMBDA {
    F most = Simd::Zero();
    for (int64_t s = 0; s < slots; s += 16)
      most = Simd::Max(Simd::Mul(Simd::Load(p + r * stride + s), Simd::Load(scales + s)), most);
    largest[r] = Simd::Largest(most);
  });
  Rows<R>([&](int r) Q4_LAMBDA {
    const F inverse = Simd::Set(largest[r] > 1e-36f ? 127.0f / largest[r] : 0.0f);
    out.scale[r] = largest[r] * (1.0f / 127.0f);
    const F offset = Simd::Set((float)(1 << (bits - 1)) * out.scale[r]);
    F sum = low[r];
    for (int64_t s = 0; s < slots; s += 16) {
      const F weight = Simd::Load(p + r * stride + s);
      const I byte = Simd::Round(Simd::Mul(Simd::Mul(weight, Simd::Load(scales + s)), inverse));
      Simd::BStore(out.byte + r * kRow + s, Simd::Narrow(byte));
      sum = part.minimum ? Simd::Fma(weight, Simd::Load(minimums + s), sum)
                         : Simd::Fma(Simd::ToFloat(byte), offset, sum);
    }
    low[r] = sum;
  });
}

// out[r][0 .. H - 1] += sum over a block's slots of p[r * stride + slot] * value, but for minimums and
// offsets, which are left in low[g][r]. Blocks are of kSlots and groups of kGroup, or, where that is 0,
// of any size.
template <int bits, int kSlots, int kGroup, int R>
Q4_INLINE void ValueBlock(const PagedAttention& a, int64_t groups, int64_t block, const float* p, int64_t stride,
                          float* const* out, F (*low)[R]) {
  constexpr Codes kCodes = bits == 4 ? Codes::kBoth : Codes::kBytes;
  constexpr int kWords = (kSlots ? kSlots : 16) * bits / 32;
  const int64_t slots = kSlots ? kSlots : a.block_size, group = kGroup ? kGroup : a.value.group;
  const int64_t words = slots * bits / 32;
  const uint8_t* codes = a.value.codes + block * (a.H / 16) * words * 64;
  for (int64_t g = 0; g < groups; g++) {
    RoundedWeights<R> weights;
    RoundWeights<bits, R>(a.value, (block * groups + g) * slots, slots, p, stride, weights, low[g]);
    const int8_t* bytes = weights.byte;
    asm("" : "+r"(bytes) : : "memory");  // Else GCC broadcasts all the weights ahead, into memory.
    for (int64_t d = g * group / 16; 16 * d < (g + 1) * group; d++) {
      I dot[R];
      Rows<R>([&](int r) Q4_LAMBDA { dot[r] = Simd::ISet(0); });
      for (int64_t w = 0; w < words; w += kWords)
        DotChain<bits, kCodes, kWords, R>(codes + (d * words + w) * 64, bytes + 4 * w, slots / 2, dot);
      Rows<R>([&](int r) Q4_LAMBDA {
        float* to = out[r] + 16 * d;
        if (group >= 16) {
          Simd::Store(to, Simd::Fma(Simd::ToFloat(dot[r]), Simd::Set(weights.scale[r]), Simd::Load(to)));
        } else {  // Two groups share the lanes; this one has half of them.
          float sums[16];
          Simd::Store(sums, Simd::Mul(Simd::ToFloat(dot[r]), Simd::Set(weights.scale[r])));
          for (int64_t i = g * group - 16 * d; i < (g + 1) * group - 16 * d; i++) to[i] += sums[i];
        }
      });
    }
  }
}

}  // namespace

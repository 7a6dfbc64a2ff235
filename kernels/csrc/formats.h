// How each block format is read in the x16 layout (block_array.py): sixteen rows side by side,
// every field of a block interleaved across the rows, so that lane r of a vector is row r.
//
// A format says: block (weights), group (weights per scale), bytes (of one row's block), bits (codes
// are below 2^bits), offset and has_min; Codes<g>(p, i) gives the unsigned codes of weights
// 4i .. 4i+3 of group g of sixteen rows. Scales come in two kinds:
//   integer:  w = D(p) * Scale<g>(p) * (code - offset) - DMin(p) * Min<g>(p), Scale and Min bytes
//             (Scale signed where signed_scale says so), so that a block is summed in integers;
//   else:     w = Scale<g>(p) * (code - offset) - Min<g>(p), in floats.
// offset and minimum are never both used.
// A unit is the groups whose codes share their bytes: Group(u, s) is the s-th of unit u.
// Source: ggml's quantisation structs (ggml-common.h) as documented in docs/formats/gguf.md.
#pragma once
#include "kernels.h"

namespace {

using F = Simd::F;
using I = Simd::I;
using B = Simd::B;

Q4_INLINE I Mask(uint32_t byte) { return Simd::ISet((int32_t)(byte * 0x01010101u)); }
// Word w (4 bytes of each row) of a field of 4-byte words.
Q4_INLINE I Word(const uint8_t* field, int w) { return Simd::ILoad(field + 64 * w); }
Q4_INLINE I Nibble(I word, bool high) { return Simd::And(high ? Simd::Shr(word, 4) : word, Mask(15)); }

struct Base {
  static constexpr bool integer = false;
  static constexpr bool has_min = false;
  static constexpr int offset = 0;
  static constexpr int unit = 1;
  static constexpr int Group(int u, int s) { return u + s; }
};

struct IntegerBase : Base {
  static constexpr bool integer = true;
  static constexpr bool signed_scale = false;
};

// 2-bit codes, or 4 + 2 bits: groups of 16 that lie 32 weights apart in each half of the block.
struct QuartersBase : IntegerBase {
  static constexpr int unit = 4;
  static constexpr int Group(int u, int s) { return u / 2 * 8 + u % 2 + 2 * s; }
};

// ---- 32 weights a block, one scale: d, (m), (qh), qs[16]; weight l low nibble, l + 16 high.

struct Q4_0 : Base {
  static constexpr int block = 32, group = 32, bytes = 18, bits = 4, offset = 8;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) { return Nibble(Word(p + 32, i & 3), i >= 4); }
  template <int g>
  static Q4_INLINE F Scale(const uint8_t* p) { return Simd::LoadHalf(p); }
};

struct Q4_1 : Base {
  static constexpr int block = 32, group = 32, bytes = 20, bits = 4;
  static constexpr bool has_min = true;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) { return Nibble(Word(p + 64, i & 3), i >= 4); }
  template <int g>
  static Q4_INLINE F Scale(const uint8_t* p) { return Simd::LoadHalf(p); }
  template <int g>  // The file adds its m.
  static Q4_INLINE F Min(const uint8_t* p) { return Simd::Mul(Simd::LoadHalf(p + 32), Simd::Set(-1.0f)); }
};

// Bits 4i .. 4i+3 of a 32-bit mask, one in bit 4 of each byte.
Q4_INLINE I FifthBits(const uint8_t* qh, int i) {
  const I bits = Simd::And(Simd::Shr(Simd::ILoad(qh), 4 * i), Simd::ISet(15));
  return Simd::Shl(Simd::And(Simd::MulI(bits, Simd::ISet(0x00204081)), Mask(1)), 4);
}

struct Q5_0 : Base {
  static constexpr int block = 32, group = 32, bytes = 22, bits = 5, offset = 16;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) {
    return Simd::Or(Nibble(Word(p + 96, i & 3), i >= 4), FifthBits(p + 32, i));
  }
  template <int g>
  static Q4_INLINE F Scale(const uint8_t* p) { return Simd::LoadHalf(p); }
};

struct Q5_1 : Base {
  static constexpr int block = 32, group = 32, bytes = 24, bits = 5;
  static constexpr bool has_min = true;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) {
    return Simd::Or(Nibble(Word(p + 128, i & 3), i >= 4), FifthBits(p + 64, i));
  }
  template <int g>
  static Q4_INLINE F Scale(const uint8_t* p) { return Q4_1::Scale<g>(p); }
  template <int g>
  static Q4_INLINE F Min(const uint8_t* p) { return Q4_1::Min<g>(p); }
};

struct Q8_0 : Base {
  static constexpr int block = 32, group = 32, bytes = 34, bits = 8, offset = 128;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) { return Simd::Xor(Word(p + 32, i), Mask(128)); }
  template <int g>
  static Q4_INLINE F Scale(const uint8_t* p) { return Simd::LoadHalf(p); }
};

// The non-linear 4-bit grid, as unsigned bytes (value + 128).
alignas(16) constexpr uint8_t kIq4Grid[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                              129, 141, 153, 166, 181, 197, 217, 241};

struct IQ4_NL : Base {
  static constexpr int block = 32, group = 32, bytes = 18, bits = 8, offset = 128;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) { return Simd::Lookup(Q4_0::Codes<0>(p, i), kIq4Grid); }
  template <int g>
  static Q4_INLINE F Scale(const uint8_t* p) { return Simd::LoadHalf(p); }
};

// ---- 256 weights a block.

struct IQ4_XS : IntegerBase {  // d, scales_h[2], scales_l[4], qs[128]
  static constexpr bool signed_scale = true;
  static constexpr int block = 256, group = 32, bytes = 136, bits = 8, offset = 128;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) {
    return Simd::Lookup(Nibble(Word(p + 128, g * 4 + (i & 3)), i >= 4), kIq4Grid);
  }
  static Q4_INLINE F D(const uint8_t* p) { return Simd::LoadHalf(p); }
  template <int g>
  static Q4_INLINE B Scale(const uint8_t* p) {
    const B low = Simd::BAnd(Simd::BShr(Simd::BLoad(p + 64 + 16 * (g / 2)), 4 * (g & 1)), Simd::BSet(15));
    const B high = Simd::Narrow(Simd::And(Simd::Shr(Simd::LoadU16(p + 32), 2 * g), Simd::ISet(3)));
    return Simd::BAdd(Simd::BOr(low, Simd::BShl(high, 4)), Simd::BSet(-32));
  }
};

// Scale and minimum of group g out of the 12 packed bytes of Q4_K and Q5_K, p at the first.
template <int g>
Q4_INLINE B SixBitScale(const uint8_t* p) {
  if (g < 4) return Simd::BAnd(Simd::BLoad(p + 16 * g), Simd::BSet(63));
  const B low = Simd::BAnd(Simd::BLoad(p + 16 * (g + 4)), Simd::BSet(15));
  return Simd::BOr(low, Simd::BAnd(Simd::BShr(Simd::BLoad(p + 16 * (g & 3)), 2), Simd::BSet(48)));
}

template <int g>
Q4_INLINE B SixBitMin(const uint8_t* p) {
  if (g < 4) return Simd::BAnd(Simd::BLoad(p + 16 * (g + 4)), Simd::BSet(63));
  const B low = Simd::BAnd(Simd::BShr(Simd::BLoad(p + 16 * (g + 4)), 4), Simd::BSet(15));
  return Simd::BOr(low, Simd::BAnd(Simd::BShr(Simd::BLoad(p + 16 * g), 2), Simd::BSet(48)));
}

struct Q4_K : IntegerBase {  // d, dmin, scales[12], qs[128]
  static constexpr int block = 256, group = 32, bytes = 144, bits = 4;
  static constexpr bool has_min = true;
  static constexpr int unit = 2;
  static constexpr int Group(int u, int s) { return 2 * u + s; }
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) {
    return Nibble(Word(p + 256, (g / 2) * 8 + i), g & 1);
  }
  static Q4_INLINE F D(const uint8_t* p) { return Simd::LoadHalf(p); }
  static Q4_INLINE F DMin(const uint8_t* p) { return Simd::LoadHalf(p + 32); }
  template <int g>
  static Q4_INLINE B Scale(const uint8_t* p) { return SixBitScale<g>(p + 64); }
  template <int g>
  static Q4_INLINE B Min(const uint8_t* p) { return SixBitMin<g>(p + 64); }
};

// Codes of 5 and 6 bits lie in words of their own order (code_words.py): as many as fit, each in the low
// bits of a byte, and what remains of the byte holds a part of another code.

// x shifted right, of which `mask` is kept in each byte.
Q4_INLINE I Part(I x, int right, uint32_t mask) { return Simd::And(Simd::Shr(x, right), Mask(mask)); }

struct Q5_K : Q4_K {  // d, dmin, scales[12], then five words for each group's eight
  static constexpr int bytes = 176, bits = 5;
  static constexpr int unit = 1;
  static constexpr int Group(int u, int s) { return u + s; }
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) {
    const uint8_t* words = p + 256 + 320 * g;
    if (i < 5) return Simd::And(Word(words, i), Mask(31));
    const I low = Part(Word(words, i - 5), 5, 7);
    if (i < 7) return Simd::Or(low, Part(Word(words, i - 2), 2, 24));
    return Simd::Or(low, Simd::Or(Part(Word(words, 3), 4, 8), Part(Word(words, 4), 3, 16)));
  }
};

// d, scales[16], then for each unit and each four of its weights three words, which hold four groups'.
struct Q6_K : QuartersBase {
  static constexpr bool signed_scale = true;
  static constexpr int block = 256, group = 16, bytes = 210, bits = 6, offset = 32;
  // The group that needs every word comes first: the processor then waits for all of them at once.
  static constexpr int Group(int u, int s) { return QuartersBase::Group(u, (s + 3) % 4); }
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) {
    constexpr int half = g / 8, quarter = (g / 2) & 3;
    const uint8_t* words = p + 288 + 768 * (2 * half + (g & 1)) + 192 * i;
    if (quarter < 3) return Simd::And(Word(words, quarter), Mask(63));
    return Simd::Or(Part(Word(words, 0), 2, 48), Simd::Or(Part(Word(words, 1), 4, 12), Part(Word(words, 2), 6, 3)));
  }
  static Q4_INLINE F D(const uint8_t* p) { return Simd::LoadHalf(p); }
  template <int g>
  static Q4_INLINE B Scale(const uint8_t* p) { return Simd::BLoad(p + 32 + 16 * g); }
};

template <int g>  // of 16 weights
Q4_INLINE I TwoBits(const uint8_t* qs, int i) {
  return Simd::And(Simd::Shr(Word(qs, (g / 8) * 8 + (g & 1) * 4 + i), 2 * ((g / 2) & 3)), Mask(3));
}

struct Q2_K : QuartersBase {  // scales[16], qs[64], d, dmin
  static constexpr int block = 256, group = 16, bytes = 84, bits = 2;
  static constexpr bool has_min = true;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) { return TwoBits<g>(p + 256, i); }
  static Q4_INLINE F D(const uint8_t* p) { return Simd::LoadHalf(p + 1280); }
  static Q4_INLINE F DMin(const uint8_t* p) { return Simd::LoadHalf(p + 1312); }
  template <int g>
  static Q4_INLINE B Scale(const uint8_t* p) { return Simd::BAnd(Simd::BLoad(p + 16 * g), Simd::BSet(15)); }
  template <int g>
  static Q4_INLINE B Min(const uint8_t* p) { return Simd::BAnd(Simd::BShr(Simd::BLoad(p + 16 * g), 4), Simd::BSet(15)); }
};

struct Q3_K : QuartersBase {  // hmask[32], qs[64], scales[12], d
  static constexpr bool signed_scale = true;
  static constexpr int block = 256, group = 16, bytes = 110, bits = 3, offset = 4;
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) {
    const I high = Simd::And(Simd::Shr(Word(p, (g & 1) * 4 + i), g / 2), Mask(1));
    return Simd::Or(TwoBits<g>(p + 512, i), Simd::Shl(high, 2));
  }
  static Q4_INLINE F D(const uint8_t* p) { return Simd::LoadHalf(p + 1728); }
  template <int g>
  static Q4_INLINE B Scale(const uint8_t* p) {
    const B low = Simd::BAnd(Simd::BShr(Simd::BLoad(p + 1536 + 16 * (g & 7)), g < 8 ? 0 : 4), Simd::BSet(15));
    const B top = Simd::BAnd(Simd::BShr(Simd::BLoad(p + 1664 + 16 * (g & 3)), 2 * (g / 4)), Simd::BSet(3));
    return Simd::BAdd(Simd::BOr(low, Simd::BShl(top, 4)), Simd::BSet(-32));
  }
};

// ---- Group-wise weights: scales, (minimums), codes. A run of bytes holds its weights in the low
// nibbles and as many more in the high ones. A group of more than 32 is read as several of 32.

template <int kGroup, bool kHasMin, bool kWideScales>
struct Grouped : Base {
  static constexpr q4::GroupwiseFormat format{kGroup, kHasMin, kWideScales};
  static constexpr int block = format.block(), group = kGroup < 32 ? kGroup : 32, bytes = format.bytes();
  static constexpr int bits = 4, offset = kHasMin ? 0 : 8;
  static constexpr bool has_min = kHasMin;
  static constexpr int unit = block == 32 ? 1 : 2;
  static constexpr int Group(int u, int s) { return unit * u + s; }
  template <int g>
  static Q4_INLINE I Codes(const uint8_t* p, int i) {
    constexpr int run = block == 32 ? 16 : 32, first = g * group;
    const uint8_t* codes = p + (bytes - block / 2) * q4::kRows + first / (2 * run) * run * q4::kRows;
    const int l = first % (2 * run) + 4 * i;
    return Nibble(Word(codes, l % run / 4), l >= run);
  }
  template <int g>
  static Q4_INLINE F Scale(const uint8_t* p) {
    constexpr int at = g * group / kGroup;
    return kWideScales ? Simd::Load((const float*)(p + 64 * at)) : Simd::LoadHalf(p + 32 * at);
  }
  template <int g>
  static Q4_INLINE F Min(const uint8_t* p) { return Scale<g>(p + format.scale_bytes() * q4::kRows); }
};

// ---- Floats: no codes; Value gives weight k of sixteen rows.

struct F32 { static constexpr int bytes = 4; static F Value(const uint8_t* p) { return Simd::Load((const float*)p); } };
struct F16 { static constexpr int bytes = 2; static F Value(const uint8_t* p) { return Simd::LoadHalf(p); } };
struct BF16 { static constexpr int bytes = 2; static F Value(const uint8_t* p) { return Simd::LoadBf16(p); } };

}  // namespace

// What one instruction set offers: a table of functions, filled once per kernels_<isa>.cc.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace q4 {

// The order is shared with block_array.py (FORMAT_IDS).
enum Format {
  kF32, kF16, kBF16, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kIQ4_NL, kIQ4_XS,
  kGroupwise,  // The first of 24; see GroupwiseFormat.
  kNumFormats = kGroupwise + 24
};

// Weights of our own quantisers: 4-bit codes, a scale and perhaps a minimum a group (q4_formats.py).
// Four formats a group size, in this order: s_f16, s_f32 (symmetric), a_f16, a_f32 (with minimum).
#define Q4_GROUP_SIZES(X) X(8) X(16) X(32) X(64) X(128) X(256)

struct GroupwiseFormat {
  int group;
  bool has_min, wide_scales;  // Scales are float32, otherwise float16.
  constexpr int block() const { return group <= 32 ? 32 : 256; }
  constexpr int scale_bytes() const { return block() / group * (wide_scales ? 4 : 2); }
  constexpr int bytes() const { return scale_bytes() * (has_min ? 2 : 1) + block() / 2; }
};
constexpr GroupwiseFormat Groupwise(int format) {
  const int i = format - kGroupwise;
  return {8 << i / 4, i % 4 >= 2, i % 2 == 1};
}

constexpr int kRows = 16;  // Rows side by side in the x16 layout.

// Rows of x as signed bytes, x = d * q, in blocks of 32 or 256. Everything of one block position lies
// together, row after row: q[(k / block * rows + m) * block + k % block], d[k / block * rows + m], and
// so on; what a kernel reads for a few rows is contiguous. Up to direct_rows (see Kernels) there is room
// for a power of two of them; what lies in the rows past M is multiplied and dropped. The sums of q over 8, 16 and 32 weights
// fold the weights' offsets and minimums. In blocks of 32, d and dsum = d * sum32 are float16's
// nearest (see Quantize).
struct QuantizedX {
  int64_t rows;
  int8_t* q;
  float *d, *dsum;  // dsum only in blocks of 32
  int16_t *sum8, *sum16, *sum32;  // sum8 only where a weight has groups of 8
};

struct Matmul {
  const uint8_t* w;   // x16 layout
  const float* x;     // float32[M, K], used by float formats
  QuantizedX qx;      // used by quantised formats
  float* y;           // float32[M, N]
  int64_t M, K, N;
};

constexpr int kTileChunk = 48;  // Slots whose keys or values are floats at a time, in L1.

struct Attention {
  const float* q;               // [B, T, Hq, D]
  const void *k, *v;            // [B, Hkv, S, D] of the cache's type
  const int32_t *start, *length;  // [B]
  float* out;                   // [B, T, Hq, D]
  int64_t B, T, Hq, Hkv, S, D;
  float scale;

  // Floats that a kernel works in: logits, and the floats of a tile's queries and of some slots.
  int64_t scratch() const { return (Hq / Hkv > 16 ? Hq / Hkv : 16) * (S + 16) + (16 + kTileChunk + 1) * D; }
};

// Limits of the compressed cache.
constexpr int kMaxHeadDim = 256, kMaxGroups = kMaxHeadDim / 8, kMaxBlockSize = 256;

// Keys or values of a pool of kv blocks (kv_pages.py, layout x16). Floats of 16 or 32 bits have only
// codes; symmetric codes have no minimum.
struct PagedPart {
  int64_t bits, group;
  const uint8_t* codes;
  const uint16_t *scale, *minimum;
};

// One query of each sequence over one layer of a compressed cache (paged.py).
struct PagedAttention {
  const float* q;           // [B, N, H]
  const void *k, *v;        // dense, of this layer: [B, K, D, H]
  bool half;                // of float16, else float32
  PagedPart key, value;
  const int32_t* slot_pos;  // [blocks, block_size], negative where a slot is not seen
  const int32_t *table, *num_blocks;  // of this layer: [B, P] and [B]
  const int32_t *length, *spilled;    // [B], this step's token counted
  float* out;                         // [B, N, H]
  float *mass, *dense_mass;           // [B, K, P * block_size] and [B, K, D], zeroed; or null
  int64_t B, N, K, H, D, P, block_size, sink, ring;
  float scale;
};

// How a format's blocks become floats.
struct Blocks {
  int weights, bytes;  // of one row's block
  void (*dequantize)(const uint8_t* block, float* out);  // of 16 rows, float[weights][16]
};

struct Kernels {
  const char* name;
  int64_t direct_rows;  // Up to as many rows of x are multiplied with weights as they lie.
  // Quantises row m of x, K floats, in blocks of 32 or 256.
  void (*quantize)(const float* x, int64_t K, int block, int64_t m, const QuantizedX& out);
  // Tiles [begin, end) of 16 output rows.
  void (*matmul[kNumFormats])(const Matmul& a, int64_t begin, int64_t end);
  // The same without rounding x.
  void (*exact)(const Matmul& a, const Blocks& format, int64_t begin, int64_t end);
  void (*dequantize[kNumFormats])(const uint8_t* block, float* out);  // see Blocks
  // Attention of queries [t0, t1) of batch row b and the query heads of KV head h; scratch holds
  // a.scratch() floats. half: the cache is float16, else float32. What each slot is given is added to
  // mass[0 .. S - 1], unless that is null.
  void (*attention)(const Attention& a, bool half, int64_t b, int64_t h, int64_t t0, int64_t t1,
                    float* scratch, float* mass);
  // Softmax alone of rows [row0, row1), sixteen at most, of KV head h: row = token * Hq / Hkv + head of
  // the group. Token t sees the first a.length[b * T + t] slots, no fewer than the token before it;
  // a.out is float[B, Hq, T, S], and values and start are not used.
  void (*window)(const Attention& a, bool half, int64_t b, int64_t h, int64_t row0, int64_t row1, float* scratch);
  // The compressed cache's, of sequence b and KV head h; scratch holds 4 * (P * block_size + D + 16).
  void (*paged_attention)(const PagedAttention& a, int64_t b, int64_t h, float* scratch);
  // Rounds n floats into the cache's type.
  void (*store)(const float* x, int64_t n, bool half, void* out);
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

}  // namespace q4

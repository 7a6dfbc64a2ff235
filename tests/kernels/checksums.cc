// Runs every kernel of one instruction set on the same random blocks and prints a line for each
// with a checksum of its output's bits: two instruction sets agree if they print the same, wherever
// they run. Buffers have exactly the sizes that kernels are promised. Compile with
// -DKERNELS=kAvx2, say.
#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels.h"

using namespace q4;

constexpr int kWeights[] = {1, 1, 1, 32, 32, 32, 32, 32, 256, 256, 256, 256, 256, 32, 256};
constexpr int kBytes[] = {4, 2, 2, 18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 18, 136};
// Where a block's floats begin, and their bytes.
constexpr int kFloats[][2] = {{0, 4}, {0, 2}, {0, 2}, {0, 2},  {0, 4}, {0, 2},   {0, 4}, {0, 2},
                              {80, 4}, {108, 2}, {0, 4}, {0, 4}, {0, 2},   {0, 2}, {0, 2}};

// Blocks of 16 rows: any codes, and floats below 2, for which the upper exponent bit is cleared.
std::vector<uint8_t> RandomTiles(std::mt19937& random, int64_t count, int bytes, int first, int floats) {
  std::vector<uint8_t> w(count * 16 * bytes);
  for (size_t i = 0; i < w.size(); i++) {
    const int at = i / 16 % bytes;
    w[i] = random() & (at >= first && at < first + floats ? 0xbf : 0xff);
  }
  return w;
}

std::vector<float> RandomFloats(std::mt19937& random, int64_t count) {  // in -2.2 .. 2.2
  std::vector<float> x(count);
  for (auto& value : x) value = (int32_t)random() * 1e-9f;
  return x;
}

template <class T>
void Print(const char* what, int a, int b, const std::vector<T>& values) {
  const uint8_t* bytes = (const uint8_t*)values.data();
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (size_t i = 0; i < values.size() * sizeof(T); i++) hash = (hash ^ bytes[i]) * 0x100000001b3;
  printf("%s %d %d %016llx\n", what, a, b, (unsigned long long)hash);
}

void PrintMatmuls(std::mt19937& random) {
  for (int format = 0; format < kNumFormats; format++) {
    const bool own = format >= kGroupwise;
    const int weights = own ? Groupwise(format).block() : kWeights[format];
    const int bytes = own ? Groupwise(format).bytes() : kBytes[format];
    const int first = own ? 0 : kFloats[format][0];
    const int floats = own ? Groupwise(format).scale_bytes() * (1 + Groupwise(format).has_min) : kFloats[format][1];
    for (int64_t M : {1, 2, 3, 5, 8, 9, 22}) {
      const int64_t K = 512, N = 40, tiles = 3;
      const auto w = RandomTiles(random, tiles * (K / weights), bytes, first, floats);
      const auto x = RandomFloats(random, M * K);
      std::vector<float> y(M * N), exact(M * N), floats_out(weights * kRows);
      const int block = weights == 256 ? 256 : 32;
      int64_t rows = M;  // Those past M hold what must not be seen.
      if (M <= KERNELS.direct_rows)
        for (rows = 1; rows < M;) rows *= 2;
      std::vector<int8_t> q(rows * K, 77);
      std::vector<float> d(rows * K / block, NAN), dsum(block == 32 ? rows * K / block : 0, NAN);
      std::vector<int16_t> sum8(rows * K / 8), sum16(rows * K / 16, 999), sum32(rows * K / 32, 999);
      const QuantizedX qx{rows, q.data(), d.data(), dsum.data(), sum8.data(), sum16.data(), sum32.data()};
      for (int64_t m = 0; m < M; m++) KERNELS.quantize(&x[m * K], K, block, m, qx);
      for (int64_t g = 0; g < rows * K / 8; g++)
        for (int j = 0; j < 8; j++) sum8[g] += q[8 * g + j];
      KERNELS.matmul[format]({w.data(), x.data(), qx, y.data(), M, K, N}, 0, tiles);
      KERNELS.dequantize[format](w.data(), floats_out.data());
      const Blocks blocks{weights, bytes, KERNELS.dequantize[format]};
      KERNELS.exact({w.data(), x.data(), qx, exact.data(), M, K, N}, blocks, 0, tiles);
      std::vector<int8_t> codes;  // of the M rows alone
      std::vector<float> scales;
      for (int64_t b = 0; b < K / block; b++) {
        codes.insert(codes.end(), &q[b * rows * block], &q[b * rows * block] + M * block);
        scales.insert(scales.end(), &d[b * rows], &d[b * rows] + M);
      }
      Print("quantize", block, M, codes);
      Print("scales", block, M, scales);
      Print("matmul", format, M, y);
      Print("exact", format, M, exact);
      Print("dequantize", format, M, floats_out);
    }
  }
}

void PrintAttention(std::mt19937& random) {
  const int64_t B = 1, T = 7, Hkv = 1, S = 61;
  for (int64_t repeat : {1, 2, 4, 7}) {
    for (int64_t D : {64, 24}) {  // Whole vectors of 16, and not.
      const int64_t Hq = repeat * Hkv;
      const auto q = RandomFloats(random, B * T * Hq * D), k = RandomFloats(random, B * Hkv * S * D);
      const auto v = RandomFloats(random, B * Hkv * S * D);
      const int32_t start = S - T, length = T - 1;  // The last query is padding.
      for (bool half : {false, true}) {
        std::vector<uint8_t> k_cache(k.size() * (half ? 2 : 4)), v_cache(k_cache.size());
        KERNELS.store(k.data(), k.size(), half, k_cache.data());
        KERNELS.store(v.data(), v.size(), half, v_cache.data());
        std::vector<float> out(q.size());
        const Attention a{q.data(), k_cache.data(), v_cache.data(), &start, &length, out.data(), B, T, Hq, Hkv, S, D, 0.3f};
        std::vector<float> scratch(a.scratch());
        std::vector<float> mass(a.S);
        KERNELS.attention(a, half, 0, 0, 0, T, scratch.data(), mass.data());
        Print(half ? "store_f16" : "store_f32", repeat, D, k_cache);
        Print(half ? "attention_f16" : "attention_f32", repeat, D, out);
        Print(half ? "mass_f16" : "mass_f32", repeat, D, mass);
        int32_t seen[T];  // The first query sees nothing, the last one everything.
        for (int64_t t = 0; t < T; t++) seen[t] = t * S / (T - 1);
        std::vector<float> paid(Hq * T * S);
        const Attention window{q.data(), k_cache.data(), nullptr, nullptr, seen, paid.data(), B, T, Hq, Hkv, S, D, 0.3f};
        for (int64_t row = 0; row < T * repeat; row += 16)
          KERNELS.window(window, half, 0, 0, row, std::min(row + 16, T * repeat), scratch.data());
        Print(half ? "window_f16" : "window_f32", repeat, D, paid);
      }
    }
  }
}

int main() {
  std::mt19937 random(1);
  PrintMatmuls(random);
  PrintAttention(random);
}

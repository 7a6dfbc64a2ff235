// Runs the AVX-512 kernels, emulated, and the AVX2 ones on the same random blocks: any bit that
// differs is printed, and the exit status says so.
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "kernels.h"

using namespace q4;

constexpr int kWeights[] = {1, 1, 1, 32, 32, 32, 32, 32, 256, 256, 256, 256, 256, 32, 256};
constexpr int kBytes[] = {4, 2, 2, 18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 18, 136};

int main() {
  std::mt19937 random(1);
  int bad = 0;
  for (int format = 0; format < kNumFormats; format++) {
    const bool own = format >= kGroupwise;
    const int weights = own ? Groupwise(format).block() : kWeights[format];
    const int bytes = own ? Groupwise(format).bytes() : kBytes[format];
    for (int64_t M : {1, 2, 3, 5, 8, 9, 22}) {
      const int64_t K = 512, N = 40, tiles = 3;
      std::vector<uint8_t> w(tiles * 16 * (K / weights) * bytes);
      for (auto& byte : w) byte = random() & 0x3f;  // Factors stay finite and small.
      std::vector<float> x(M * K), y[2];
      for (auto& value : x) value = (int32_t)random() * 1e-9f;
      int at = 0;
      for (const Kernels* kernels : {&kAvx2, &kAvx512}) {
        const int block = weights == 256 ? 256 : 32;
        std::vector<int8_t> q(M * K);
        std::vector<float> d(M * K / 32), dsum(M * K / 32);
        std::vector<int16_t> sum8(M * K / 8), sum16(M * K / 16), sum32(M * K / 32);
        const QuantizedX qx{q.data(), d.data(), dsum.data(), sum8.data(), sum16.data(), sum32.data()};
        for (int64_t m = 0; m < M; m++) kernels->quantize(&x[m * K], K, block, m, M, qx);
        for (int64_t g = 0; g < M * K / 8; g++)
          for (int j = 0; j < 8; j++) sum8[g] += q[8 * g + j];
        y[at].assign(M * N + K * N, 0.5f);
        kernels->matmul[format]({w.data(), x.data(), qx, y[at].data(), M, K, N}, 0, tiles);
        for (int64_t row = 0; row < N; row++) kernels->take_row[format](w.data(), K, row, &y[at][M * N + row * K]);
        at++;
      }
      if (memcmp(y[0].data(), y[1].data(), 4 * y[0].size())) {
        printf("format %d, M %d differs\n", format, (int)M);
        bad++;
      }
    }
  }
  printf("%d differ\n", bad);
  return bad != 0;
}

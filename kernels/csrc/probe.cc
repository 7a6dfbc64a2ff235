// What this machine can do at most, for benchmarks to divide by, and clocks inside a program. No
// part of inference: these start threads of their own.
#include "probe.h"

#include <string.h>

#include <chrono>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Seconds that body(t) took on `threads` threads together.
template <class Body>
double Timed(int64_t threads, const Body& body) {
  const auto begin = Clock::now();
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; t++) others.emplace_back(body, t);
  body(0);
  for (auto& thread : others) thread.join();
  return Seconds(begin);
}

typedef uint64_t Vector __attribute__((vector_size(16)));

void Read(const Vector* data, int64_t count) {
  Vector sum[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int64_t j = 0; j < 8; j++) sum[j] ^= data[i + j];
  }
  for (auto& s : sum) asm volatile("" ::"m"(s));
}

q4::Int8Loop BestLoop() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512f")) return q4::Int8LoopAvx512;
  if (__builtin_cpu_supports("avx2")) return q4::Int8LoopAvx2;
#endif
  return q4::Int8LoopPortable;
}

ffi::Error ClockImpl(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, ffi::ResultBuffer<ffi::U32> now) {
  if (x.size_bytes() != y->size_bytes() || now->element_count() != 2)
    return ffi::Error::InvalidArgument("q4jax: the clock takes x like y, and two words");
  if (x.untyped_data() != y->untyped_data()) memcpy(y->untyped_data(), x.untyped_data(), x.size_bytes());
  const uint64_t ns = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
  now->typed_data()[0] = (uint32_t)ns;
  now->typed_data()[1] = (uint32_t)(ns >> 32);
  return ffi::Error::Success();
}

}  // namespace

int64_t q4::Int8LoopPortable(int64_t count) {
  constexpr int kLanes = 256;
  static thread_local int8_t x[kLanes];
  static thread_local uint8_t w[kLanes];
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i++) {
    asm volatile("" ::: "memory");
    for (int j = 0; j < kLanes; j++) sum += (int32_t)x[j] * w[j];
  }
  asm volatile("" ::"r"(sum));
  return kLanes;
}

// Passes x on, and tells when: nanoseconds of the steady clock (Python's time.monotonic_ns on
// Linux), low word first. What comes before and after it is what depends on x.
XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_clock, ClockImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U32>>());

extern "C" {

// Bytes a second of reading `bytes` bytes once, in order, each thread its own part.
double q4jax_probe_read(const void* data, int64_t bytes, int64_t threads) {
  const int64_t vectors = bytes / sizeof(Vector);
  const double seconds = Timed(threads, [&](int64_t t) {
    const int64_t begin = vectors * t / threads, end = vectors * (t + 1) / threads;
    Read((const Vector*)data + begin, end - begin);
  });
  return vectors * sizeof(Vector) / seconds;
}

// Multiplications and additions of bytes a second, two operations for a product, with the best
// instructions of this processor.
double q4jax_probe_int8(int64_t threads, double seconds) {
  const auto loop = BestLoop();
  loop(1 << 14);
  std::vector<double> rates(threads);
  Timed(threads, [&](int64_t t) {
    const auto begin = Clock::now();
    int64_t operations = 0;
    do operations += 2 * loop(1 << 14) * (1 << 14); while (Seconds(begin) < seconds);
    rates[t] = operations / Seconds(begin);
  });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

// The loop that everyone writes first: y[m][n] = sum_k x[m][k] (scale[n][g] code[n][k] - minimum[n][g]),
// g = k / (K / G), codes packed two a byte, the even k in the low nibble. One thread, no vectors.
__attribute__((optimize("no-tree-vectorize"))) void q4jax_probe_scalar_matmul(
    const float* x, const uint8_t* packed, const float* scale, const float* minimum, float* y, int64_t M, int64_t N,
    int64_t K, int64_t G) {
  for (int64_t m = 0; m < M; m++) {
    for (int64_t n = 0; n < N; n++) {
      float sum = 0;
      for (int64_t k = 0; k < K; k++) {
        const int code = packed[n * (K / 2) + k / 2] >> (k % 2 * 4) & 15;
        const int64_t g = n * G + k / (K / G);
        sum += x[m * K + k] * (scale[g] * code - minimum[g]);
      }
      y[m * N + n] = sum;
    }
  }
}

}  // extern "C"

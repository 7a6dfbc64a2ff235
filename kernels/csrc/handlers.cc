// The XLA FFI handlers of the CPU library, and the plain C functions that Python calls by ctypes.
// Shapes are validated in Python (api.py) and again here: a wrong one is an error, never a crash.
#include <string.h>
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <string>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "pool.h"

namespace ffi = xla::ffi;

namespace q4 {
namespace {

// Weights of a block and bytes of a block, by Format.
struct BlockSizes {
  int weights[kNumFormats] = {1, 1, 1, 32, 32, 32, 32, 32, 256, 256, 256, 256, 256, 32, 256};
  int bytes[kNumFormats] = {4, 2, 2, 18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 18, 136};
  constexpr BlockSizes() {
    for (int f = kGroupwise; f < kNumFormats; f++) weights[f] = Groupwise(f).block(), bytes[f] = Groupwise(f).bytes();
  }
};
constexpr BlockSizes kBlocks;
constexpr const int* kBlockSize = kBlocks.weights;
constexpr const int* kBlockBytes = kBlocks.bytes;

bool HasGroupsOf8(int64_t format) { return format >= kGroupwise && Groupwise(format).group == 8; }

#if defined(__aarch64__)
// Whether this processor multiplies and sums bytes (vdotq_s32).
bool HasDotProduct() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__ARM_FEATURE_DOTPROD)  // Every processor that this file is compiled for does.
  return true;
#else
  return false;
#endif
}
#endif

// 0 = the best this processor has; otherwise what ffi.py's ISA_IDS calls it.
const Kernels* Select(int64_t isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (isa == 0) return avx512 ? &kAvx512 : avx2 ? &kAvx2 : &kScalar;
  if (isa == 3) return avx512 ? &kAvx512 : nullptr;
  if (isa == 2) return avx2 ? &kAvx2 : nullptr;
#elif defined(__aarch64__)
  if (isa == 0 && HasDotProduct()) return &kNeon;
  if (isa == 4) return HasDotProduct() ? &kNeon : nullptr;
#endif
  return isa <= 1 ? &kScalar : nullptr;
}

ffi::Error Invalid(const std::string& what) { return ffi::Error::InvalidArgument("q4jax: " + what); }

int64_t Threads(ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// x rounded to signed bytes in blocks of 32 or 256, in memory that is kept between calls.
struct Activations {
  int64_t rows = 0;
  std::vector<int8_t> q;
  std::vector<float> d, dsum;
  std::vector<int16_t> sum8, sum16, sum32;

  void Resize(int64_t num_rows, int64_t K) {
    rows = num_rows;
    q.resize(rows * K), d.resize(rows * (K / 32)), dsum.resize(rows * (K / 32));
    sum16.resize(rows * (K / 16)), sum32.resize(rows * (K / 32));
  }
  void SumsOf8(int64_t K) {
    sum8.resize(rows * (K / 8));
    for (int64_t g = 0; g < rows * (K / 8); g++) {
      int sum = 0;
      for (int j = 0; j < 8; j++) sum += q[8 * g + j];
      sum8[g] = (int16_t)sum;
    }
  }
  QuantizedX View() { return {rows, q.data(), d.data(), dsum.data(), sum8.data(), sum16.data(), sum32.data()}; }
};

ffi::Error CheckWeight(const ffi::Buffer<ffi::U8>& w, int64_t format, int64_t K, int64_t N) {
  if (format < 0 || format >= kNumFormats) return Invalid("unknown format id " + std::to_string(format));
  if (K % kBlockSize[format]) return Invalid("K is not a multiple of the weight's block");
  const int64_t bytes = (N + kRows - 1) / kRows * kRows * (K / kBlockSize[format]) * kBlockBytes[format];
  if ((int64_t)w.size_bytes() != bytes)
    return Invalid("weight has " + std::to_string(w.size_bytes()) + " bytes, expected " + std::to_string(bytes));
  return ffi::Error::Success();
}

Blocks FloatBlocks(const Kernels& kernels, int64_t format) {
  return {kBlockSize[format], kBlockBytes[format], kernels.dequantize[format]};
}

// y_i = x W_i^T for one or more weights that share x, which `exact` says to take as it is.
ffi::Error MatmulImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs ws, ffi::RemainingRets ys,
                      ffi::Span<const int64_t> formats, bool exact, int64_t isa) {
  const Kernels* kernels = Select(isa);
  if (!kernels) return Invalid("this processor lacks the instruction set that was named");
  if (x.dimensions().size() != 2) return Invalid("x must have two dimensions");
  if (ws.size() != ys.size() || ws.size() != formats.size()) return Invalid("weights, outputs and formats differ in number");
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1];

  std::vector<Matmul> calls(ws.size());
  bool need8 = false, need16 = false, need32 = false, need256 = false;
  for (size_t i = 0; i < ws.size(); i++) {
    auto w = ws.get<ffi::Buffer<ffi::U8>>(i);
    auto y = ys.get<ffi::Buffer<ffi::F32>>(i);
    if (!w.has_value() || !y.has_value()) return Invalid("weights must be uint8, outputs float32");
    const auto dims = (*y)->dimensions();
    if (dims.size() != 2 || dims[0] != M) return Invalid("an output has the wrong shape");
    if (ffi::Error error = CheckWeight(*w, formats[i], K, dims[1]); error.failure()) return error;
    calls[i] = {w->typed_data(), x.typed_data(), {}, (*y)->typed_data(), M, K, dims[1]};
    if (exact) continue;
    need16 |= formats[i] == kF16;
    need32 |= kBlockSize[formats[i]] == 32;
    need256 |= kBlockSize[formats[i]] == 256;
    need8 |= HasGroupsOf8(formats[i]);
  }
  if (M == 0) return ffi::Error::Success();

  const int64_t threads = Threads(pool);
  static thread_local Activations x32, x256;
  Activations &a32 = x32, &a256 = x256;  // This thread's, also inside the lambdas below.
  static thread_local std::vector<float> half;  // x rounded to float16, for weights of float16.
  std::vector<float>& x16 = half;
  if (need16) x16.resize(M * K);
  int64_t rows = M;
  if (M <= kernels->direct_rows)
    for (rows = 1; rows < M;) rows *= 2;
  if (need32) a32.Resize(rows, K);
  if (need256) a256.Resize(rows, K);
  if (need16 || need32 || need256) {
    ParallelFor(pool, M * K >= 65536 ? threads : 1, M, [&](int64_t m) {
      if (need16) std::transform(x.typed_data() + m * K, x.typed_data() + (m + 1) * K, &x16[m * K], RoundToHalf);
      if (need32) kernels->quantize(x.typed_data() + m * K, K, 32, m, a32.View());
      if (need256) kernels->quantize(x.typed_data() + m * K, K, 256, m, a256.View());
    });
  }
  if (need8) a32.SumsOf8(K);  // Their blocks have 32 weights.

  // Cut all outputs into pieces of about equal bytes, several for each thread, so that a thread
  // that is held up leaves its share to the others.
  struct Piece { size_t call; int64_t begin, end; };
  static thread_local std::vector<Piece> cut;
  std::vector<Piece>& pieces = cut;
  pieces.clear();
  int64_t total = 0;
  for (size_t i = 0; i < calls.size(); i++) total += ws.get<ffi::Buffer<ffi::U8>>(i)->size_bytes();
  const int64_t per_piece = std::max<int64_t>(total / (threads * 8), 32 << 10);
  for (size_t i = 0; i < calls.size(); i++) {
    const int64_t format = formats[i], tiles = (calls[i].N + kRows - 1) / kRows;
    const int64_t tile_bytes = K / kBlockSize[format] * kBlockBytes[format] * kRows;
    const int64_t step = std::max<int64_t>(4, per_piece / std::max<int64_t>(tile_bytes, 1) / 4 * 4);
    for (int64_t t = 0; t < tiles; t += step) pieces.push_back({i, t, std::min(t + step, tiles)});
    if (need16 && format == kF16) calls[i].x = x16.data();
    calls[i].qx = kBlockSize[format] == 256 ? a256.View() : a32.View();
  }
  ParallelFor(pool, threads, pieces.size(), [&](int64_t p) {
    const auto [call, begin, end] = pieces[p];
    const int64_t format = formats[call];
    if (exact) return kernels->exact(calls[call], FloatBlocks(*kernels, format), begin, end);
    kernels->matmul[format](calls[call], begin, end);
  });
  return ffi::Error::Success();
}

// out[i] = row ids[i] of the matrix, as floats; an id outside the matrix is an error.
ffi::Error TakeRowsImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::U8> w,
                        ffi::ResultBuffer<ffi::F32> out, int64_t format, int64_t num_rows, int64_t isa) {
  const Kernels* kernels = Select(isa);
  if (!kernels) return Invalid("this processor lacks the instruction set that was named");
  if (out->dimensions().size() != 2) return Invalid("the output must have two dimensions");
  const int64_t K = out->dimensions()[1], count = ids.element_count();
  if (out->dimensions()[0] != count) return Invalid("ids and output differ in rows");
  if (ffi::Error error = CheckWeight(w, format, K, num_rows); error.failure()) return error;
  for (int64_t i = 0; i < count; i++) {
    const int32_t id = ids.typed_data()[i];
    if (id < 0 || id >= num_rows)
      return Invalid("row " + std::to_string(id) + " is outside the matrix of " + std::to_string(num_rows) + " rows");
  }
  const Blocks blocks = FloatBlocks(*kernels, format);
  ParallelFor(pool, count >= 8 ? Threads(pool) : 1, count, [&](int64_t i) {
    const int64_t row = ids.typed_data()[i];
    float tile[256 * kRows], *to = out->typed_data() + i * K;
    for (int64_t k = 0; k < K; k += blocks.weights) {
      blocks.dequantize(w.typed_data() + (row / kRows * K + k) / blocks.weights * blocks.bytes * kRows, tile);
      for (int j = 0; j < blocks.weights; j++) to[k + j] = tile[j * kRows + row % kRows];
    }
  });
  return ffi::Error::Success();
}

// Stores the new keys and values at start[b] .. start[b] + length[b], then attends over all slots
// up to each query's own, in one layer of the caches [L, B, Hkv, S, D], which are donated: results
// alias them.
ffi::Error AttentionImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                         ffi::Buffer<ffi::F32> v, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache,
                         ffi::Buffer<ffi::F32> mass, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> length,
                         ffi::ResultBuffer<ffi::F32> out, ffi::Result<ffi::AnyBuffer> k_out,
                         ffi::Result<ffi::AnyBuffer> v_out, ffi::ResultBuffer<ffi::F32> mass_out, int64_t layer,
                         float scale, int64_t isa) {
  const Kernels* kernels = Select(isa);
  if (!kernels) return Invalid("this processor lacks the instruction set that was named");
  const auto qd = q.dimensions(), kd = k.dimensions(), cd = k_cache.dimensions();
  if (qd.size() != 4 || kd.size() != 4 || cd.size() != 5)
    return Invalid("attention needs four dimensions, its cache five");
  if (layer < 0 || layer >= cd[0])
    return Invalid("layer " + std::to_string(layer) + " is outside the cache of " + std::to_string(cd[0]));
  const bool half = k_cache.element_type() == ffi::F16;
  const int64_t bytes = half ? 2 : 4;
  if (!half && k_cache.element_type() != ffi::F32) return Invalid("the cache must be float16 or float32");
  const int64_t layer_bytes = qd[0] * kd[2] * cd[3] * qd[3] * bytes;
  uint8_t* k_layer = (uint8_t*)k_out->untyped_data() + layer * layer_bytes;
  uint8_t* v_layer = (uint8_t*)v_out->untyped_data() + layer * layer_bytes;
  Attention a{q.typed_data(), k_layer, v_layer, start.typed_data(), length.typed_data(),
              out->typed_data(), qd[0], qd[1], qd[2], kd[2], cd[3], qd[3], scale};
  const auto is_cache = [&](const auto& c) {
    return c.element_type() == k_cache.element_type() && c.element_count() == k_cache.element_count();
  };
  if (!is_cache(v_cache) || !is_cache(*k_out) || !is_cache(*v_out) ||
      (int64_t)k_cache.element_count() != cd[0] * a.B * a.Hkv * a.S * a.D || v.element_count() != k.element_count() ||
      (int64_t)k.element_count() != a.B * a.T * a.Hkv * a.D || out->element_count() != q.element_count() ||
      mass_out->element_count() != mass.element_count() ||
      (mass.element_count() > 0 && (int64_t)mass.element_count() != cd[0] * a.B * a.Hkv * a.S) ||
      a.Hkv == 0 || a.Hq % a.Hkv || (int64_t)start.element_count() != a.B || (int64_t)length.element_count() != a.B)
    return Invalid("attention's arguments do not fit each other");
  for (int64_t b = 0; b < a.B; b++) {
    if (a.start[b] < 0 || a.length[b] < 0 || a.length[b] > a.T || (int64_t)a.start[b] + a.length[b] > a.S)
      return Invalid("the cache of " + std::to_string(a.S) + " slots cannot hold " + std::to_string(a.length[b]) +
                     " tokens from position " + std::to_string(a.start[b]));
  }
  // Where XLA did not alias (no donation), the results start as copies.
  const size_t cache_bytes = k_cache.size_bytes();
  if (k_out->untyped_data() != k_cache.untyped_data()) memcpy(k_out->untyped_data(), k_cache.untyped_data(), cache_bytes);
  if (v_out->untyped_data() != v_cache.untyped_data()) memcpy(v_out->untyped_data(), v_cache.untyped_data(), cache_bytes);
  if (mass_out->untyped_data() != mass.untyped_data()) memcpy(mass_out->untyped_data(), mass.untyped_data(), mass.size_bytes());

  for (int64_t b = 0; b < a.B; b++) {
    for (int64_t t = 0; t < a.length[b]; t++) {
      for (int64_t h = 0; h < a.Hkv; h++) {
        const int64_t from = ((b * a.T + t) * a.Hkv + h) * a.D;
        const int64_t to = (((b * a.Hkv + h) * a.S) + a.start[b] + t) * a.D * bytes;
        kernels->store(k.typed_data() + from, a.D, half, k_layer + to);
        kernels->store(v.typed_data() + from, a.D, half, v_layer + to);
      }
    }
  }

  int64_t most_slots = 0;
  for (int64_t b = 0; b < a.B; b++) most_slots = std::max<int64_t>(most_slots, a.start[b] + a.length[b]);
  const int64_t queries = 16, splits = (a.T + queries - 1) / queries;
  const int64_t work = a.B * a.T * a.Hq * most_slots * a.D;
  // Where the mass is asked for, a head's splits are dealt to a fixed number of sums, so that no two
  // threads add to one, and the result does not depend on how many there are.
  const bool scored = mass.element_count() > 0;
  const int64_t parts = scored ? std::min<int64_t>(splits, 8) : splits;
  std::vector<float> sums(scored ? a.B * a.Hkv * parts * a.S : 0);
  ParallelFor(pool, work >= 32768 ? Threads(pool) : 1, a.B * a.Hkv * parts, [&](int64_t i) {
    static thread_local std::vector<float> scratch;
    scratch.resize(a.scratch());
    const int64_t h = i / parts % a.Hkv, b = i / parts / a.Hkv;
    float* sum = scored ? sums.data() + i * a.S : nullptr;
    for (int64_t split = i % parts; split < splits; split += parts)
      kernels->attention(a, half, b, h, split * queries, std::min(a.T, (split + 1) * queries), scratch.data(), sum);
  });
  float* total = mass_out->typed_data() + layer * a.B * a.Hkv * a.S;
  for (int64_t i = 0; scored && i < a.B * a.Hkv; i++) {
    for (int64_t part = 0; part < parts; part++)
      for (int64_t s = 0; s < a.S; s++) total[i * a.S + s] += sums[(i * parts + part) * a.S + s];
  }
  return ffi::Error::Success();
}

// What the queries q [B, T, Hq, D] pay to each slot of k [B, Hkv, S, D]: out [B, Hq, T, S]. Query t sees
// the first seen[b, t] slots.
ffi::Error WindowImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::Buffer<ffi::S32> seen,
                      ffi::ResultBuffer<ffi::F32> out, float scale, int64_t isa) {
  const Kernels* kernels = Select(isa);
  if (!kernels) return Invalid("this processor lacks the instruction set that was named");
  const auto qd = q.dimensions(), kd = k.dimensions();
  if (qd.size() != 4 || kd.size() != 4) return Invalid("attention of a window needs four dimensions");
  const bool half = k.element_type() == ffi::F16;
  if (!half && k.element_type() != ffi::F32) return Invalid("keys must be float16 or float32");
  const Attention a{q.typed_data(), k.untyped_data(), nullptr, nullptr, seen.typed_data(), out->typed_data(),
                    qd[0], qd[1], qd[2], kd[1], kd[2], qd[3], scale};
  if (kd[0] != a.B || kd[3] != a.D || a.Hkv == 0 || a.Hq % a.Hkv || (int64_t)seen.element_count() != a.B * a.T ||
      (int64_t)out->element_count() != a.B * a.Hq * a.T * a.S)
    return Invalid("the arguments of a window's attention do not fit each other");
  for (int64_t i = 0; i < a.B * a.T; i++) {
    if (a.length[i] < (i % a.T ? a.length[i - 1] : 0) || a.length[i] > a.S)
      return Invalid("query " + std::to_string(i % a.T) + " sees " + std::to_string(a.length[i]) + " of " +
                     std::to_string(a.S) + " slots; expected no fewer than the query before it, and no more than there are");
  }
  const int64_t rows = a.T * (a.Hq / a.Hkv), tiles = (rows + 15) / 16;
  const bool small = a.B * a.Hq * a.T * a.S * a.D < 32768;
  ParallelFor(pool, small ? 1 : Threads(pool), a.B * a.Hkv * tiles, [&](int64_t i) {
    static thread_local std::vector<float> scratch;
    scratch.resize(a.scratch());
    const int64_t tile = i % tiles, h = i / tiles % a.Hkv, b = i / tiles / a.Hkv;
    kernels->window(a, half, b, h, 16 * tile, std::min(rows, 16 * (tile + 1)), scratch.data());
  });
  return ffi::Error::Success();
}

// One side of the pool as the handler gets it: codes, scale, minimum (empty where the format has
// none), and {bits, group, symmetric}.
ffi::Error CheckPart(const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scale, const ffi::AnyBuffer& minimum,
                     ffi::Span<const int64_t> format, int64_t values, int64_t H, PagedPart& out) {
  if (format.size() != 3) return Invalid("a format of the cache is bits, group and symmetric");
  const int64_t bits = format[0], group = format[1];
  const bool coded = bits == 4 || bits == 8;
  if (!coded && bits != 16 && bits != 32) return Invalid("the cache has no numbers of " + std::to_string(bits) + " bits");
  if (coded && (group < 4 || group % 4 || H % group || H / group > kMaxGroups))
    return Invalid("groups of " + std::to_string(group) + " do not divide a head of " + std::to_string(H));
  const int64_t scales = coded ? values / group * 2 : 0;
  if ((int64_t)codes.size_bytes() != values * bits / 8 || (int64_t)scale.size_bytes() != scales ||
      (int64_t)minimum.size_bytes() != (format[2] ? 0 : scales))
    return Invalid("a part of the cache does not have the size that its format needs");
  out = {bits, coded ? group : H, (const uint8_t*)codes.untyped_data(), (const uint16_t*)scale.untyped_data(),
         coded && !format[2] ? (const uint16_t*)minimum.untyped_data() : nullptr};
  return ffi::Error::Success();
}

// Stores each row's new key and value in the ring of one layer (no spill: the caller saw to it), and
// attends to the row's blocks and dense slots.
ffi::Error PagedAttentionImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                              ffi::Buffer<ffi::F32> v, ffi::AnyBuffer dense_k, ffi::AnyBuffer dense_v,
                              ffi::AnyBuffer key_codes, ffi::AnyBuffer key_scale, ffi::AnyBuffer key_minimum,
                              ffi::AnyBuffer value_codes, ffi::AnyBuffer value_scale, ffi::AnyBuffer value_minimum,
                              ffi::Buffer<ffi::S32> slot_pos, ffi::Buffer<ffi::S32> table,
                              ffi::Buffer<ffi::S32> num_blocks, ffi::Buffer<ffi::S32> length,
                              ffi::Buffer<ffi::S32> spilled, ffi::Buffer<ffi::PRED> active,
                              ffi::ResultBuffer<ffi::F32> out, ffi::Result<ffi::AnyBuffer> k_out,
                              ffi::Result<ffi::AnyBuffer> v_out, ffi::ResultBuffer<ffi::F32> mass,
                              ffi::ResultBuffer<ffi::F32> dense_mass, ffi::Span<const int64_t> key_format,
                              ffi::Span<const int64_t> value_format, int64_t layer, int64_t sink, float scale,
                              int64_t isa) {
  const Kernels* kernels = Select(isa);
  if (!kernels) return Invalid("this processor lacks the instruction set that was named");
  const auto qd = q.dimensions(), kd = k.dimensions(), dd = dense_k.dimensions(), sd = slot_pos.dimensions(),
             td = table.dimensions();
  if (qd.size() != 4 || kd.size() != 4 || dd.size() != 5 || sd.size() != 2 || td.size() != 3)
    return Invalid("paged attention's arguments have the wrong number of dimensions");
  PagedAttention a{};
  a.B = qd[0], a.N = qd[2], a.H = qd[3], a.K = kd[2], a.D = dd[3], a.P = td[2], a.block_size = sd[1];
  a.sink = sink, a.ring = a.D - sink, a.scale = scale;
  a.half = dense_k.element_type() == ffi::F16;
  const int64_t L = dd[0], blocks = sd[0], bytes = a.half ? 2 : 4;
  if (!a.half && dense_k.element_type() != ffi::F32) return Invalid("the dense cache must be float16 or float32");
  if (a.H % 16 || a.H > kMaxHeadDim || a.block_size % 16 || a.block_size == 0 || a.block_size > kMaxBlockSize)
    return Invalid("heads and blocks must be multiples of 16 and at most " + std::to_string(kMaxHeadDim));
  if (layer < 0 || layer >= L) return Invalid("layer " + std::to_string(layer) + " is outside the cache");
  const auto counts = [](const auto& buffer, int64_t n) { return (int64_t)buffer.element_count() == n; };
  const int64_t dense_count = L * a.B * a.K * a.D * a.H;
  const bool scored = mass->element_count() > 0;
  if (qd[1] != 1 || a.K == 0 || a.N % a.K || a.ring < a.block_size || sink < 0 || !counts(k, a.B * a.K * a.H) ||
      !counts(v, a.B * a.K * a.H) || !counts(dense_k, dense_count) || !counts(dense_v, dense_count) ||
      dense_v.element_type() != dense_k.element_type() || !counts(*k_out, dense_count) || !counts(*v_out, dense_count) ||
      k_out->element_type() != dense_k.element_type() || v_out->element_type() != dense_k.element_type() ||
      !counts(table, L * a.B * a.P) || !counts(num_blocks, L * a.B) || !counts(length, a.B) || !counts(spilled, a.B) ||
      !counts(active, a.B) || !counts(*out, a.B * a.N * a.H) ||
      (scored && (!counts(*mass, a.B * a.K * a.P * a.block_size) || !counts(*dense_mass, a.B * a.K * a.D))))
    return Invalid("paged attention's arguments do not fit each other");
  const int64_t values = blocks * a.K * a.block_size * a.H;
  if (ffi::Error e = CheckPart(key_codes, key_scale, key_minimum, key_format, values, a.H, a.key); e.failure()) return e;
  if (ffi::Error e = CheckPart(value_codes, value_scale, value_minimum, value_format, values, a.H, a.value); e.failure())
    return e;
  a.q = q.typed_data(), a.slot_pos = slot_pos.typed_data(), a.out = out->typed_data();
  a.table = table.typed_data() + layer * a.B * a.P, a.num_blocks = num_blocks.typed_data() + layer * a.B;
  const bool* is_active = active.typed_data();

  static thread_local std::vector<int32_t> now;  // lengths with this token
  now.assign(length.typed_data(), length.typed_data() + a.B);
  for (int64_t b = 0; b < a.B; b++) now[b] += is_active[b];
  a.length = now.data(), a.spilled = spilled.typed_data();
  for (int64_t b = 0; b < a.B; b++) {
    if (!is_active[b]) continue;
    if (a.num_blocks[b] < 0 || a.num_blocks[b] > a.P) return Invalid("num_blocks is outside the table");
    for (int64_t i = 0; i < a.num_blocks[b]; i++)
      if (a.table[b * a.P + i] < 0 || a.table[b * a.P + i] >= blocks) return Invalid("the table names a block outside the pool");
    const int64_t sinks = std::min<int64_t>(now[b], sink);
    if (length.typed_data()[b] < 0 || a.spilled[b] < 0 || now[b] - sinks - a.spilled[b] < 0 ||
        now[b] - sinks - a.spilled[b] > a.ring)
      return Invalid("the ring of " + std::to_string(a.ring) + " slots cannot hold tokens " + std::to_string(a.spilled[b]) +
                     " to " + std::to_string(now[b] - sinks) + "; spill first");
  }

  const size_t dense_bytes = dense_k.size_bytes();
  if (k_out->untyped_data() != dense_k.untyped_data()) memcpy(k_out->untyped_data(), dense_k.untyped_data(), dense_bytes);
  if (v_out->untyped_data() != dense_v.untyped_data()) memcpy(v_out->untyped_data(), dense_v.untyped_data(), dense_bytes);
  const int64_t layer_bytes = a.B * a.K * a.D * a.H * bytes;
  uint8_t *k_layer = (uint8_t*)k_out->untyped_data() + layer * layer_bytes,
          *v_layer = (uint8_t*)v_out->untyped_data() + layer * layer_bytes;
  a.k = k_layer, a.v = v_layer;
  if (scored) {
    a.mass = mass->typed_data(), a.dense_mass = dense_mass->typed_data();
    memset(a.mass, 0, mass->size_bytes());
    memset(a.dense_mass, 0, dense_mass->size_bytes());
  }
  for (int64_t b = 0; b < a.B; b++) {
    if (!is_active[b]) {
      memset(a.out + b * a.N * a.H, 0, a.N * a.H * sizeof(float));
      continue;
    }
    const int64_t at = now[b] - 1, slot = at < sink ? at : sink + (at - sink) % a.ring;
    for (int64_t h = 0; h < a.K; h++) {
      const int64_t from = (b * a.K + h) * a.H, to = ((b * a.K + h) * a.D + slot) * a.H * bytes;
      kernels->store(k.typed_data() + from, a.H, a.half, k_layer + to);
      kernels->store(v.typed_data() + from, a.H, a.half, v_layer + to);
    }
  }
  int64_t most = 0;
  for (int64_t b = 0; b < a.B; b++) most = std::max<int64_t>(most, a.num_blocks[b] * a.block_size + a.D);
  ParallelFor(pool, a.B * a.N * a.H * most >= 32768 ? Threads(pool) : 1, a.B * a.K, [&](int64_t i) {
    static thread_local std::vector<float> scratch;
    scratch.resize(4 * (a.P * a.block_size + a.D + 16));
    if (is_active[i / a.K]) kernels->paged_attention(a, i / a.K, i % a.K, scratch.data());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace q4

XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_matmul, q4::MatmulImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<bool>("exact")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_take_rows, q4::TakeRowsImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("num_rows")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_attention, q4::AttentionImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_window_attention, q4::WindowImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_paged_attention, q4::PagedAttentionImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("key_format")
                                  .Attr<ffi::Span<const int64_t>>("value_format")
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("sink")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("isa"));

extern "C" {

// The name of the instruction set that `isa` (0 = best) selects, or null.
const char* q4jax_isa_name(int64_t isa) {
  const q4::Kernels* kernels = q4::Select(isa);
  return kernels ? kernels->name : nullptr;
}

}  // extern "C"

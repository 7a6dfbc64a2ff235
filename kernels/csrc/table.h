// Fills the table of one instruction set. Included last by each kernels_<isa>.cc.
#pragma once
#include "formats.h"  // first: it names the lanes F and I that the kernels use

#include "attention_kernel.h"
#include "matmul_kernel.h"
#include "paged_attention_kernel.h"

#define Q4_GROUPED(function, group)                                              \
  function<Grouped<group, false, false>>, function<Grouped<group, false, true>>, \
      function<Grouped<group, true, false>>, function<Grouped<group, true, true>>,
#define Q4_MATMUL(group) Q4_GROUPED(QuantizedMatmul, group)
#define Q4_DEQUANTIZE(group) Q4_GROUPED(Dequantize, group)

#define Q4_KERNELS(variable, label)                                                                   \
  namespace q4 {                                                                                      \
  extern const Kernels variable = {                                                                   \
      label,                                                                                          \
      Simd::kDirectRows,                                                                              \
      Quantize,                                                                                       \
      {FloatMatmul<F32>, FloatMatmul<F16>, FloatMatmul<BF16>, QuantizedMatmul<Q4_0>,                  \
       QuantizedMatmul<Q4_1>, QuantizedMatmul<Q5_0>, QuantizedMatmul<Q5_1>, QuantizedMatmul<Q8_0>,    \
       QuantizedMatmul<Q2_K>, QuantizedMatmul<Q3_K>, QuantizedMatmul<Q4_K>, QuantizedMatmul<Q5_K>,    \
       QuantizedMatmul<Q6_K>, QuantizedMatmul<IQ4_NL>, QuantizedMatmul<IQ4_XS>,                       \
       Q4_GROUP_SIZES(Q4_MATMUL)},                                                                    \
      ExactMatmul,                                                                                    \
      {Widen<F32>, Widen<F16>, Widen<BF16>, Dequantize<Q4_0>, Dequantize<Q4_1>, Dequantize<Q5_0>,     \
       Dequantize<Q5_1>, Dequantize<Q8_0>, Dequantize<Q2_K>, Dequantize<Q3_K>, Dequantize<Q4_K>,      \
       Dequantize<Q5_K>, Dequantize<Q6_K>, Dequantize<IQ4_NL>, Dequantize<IQ4_XS>,                    \
       Q4_GROUP_SIZES(Q4_DEQUANTIZE)},                                                                \
      Attend,                                                                                         \
      Window,                                                                                         \
      AttendPaged,                                                                                    \
      StoreCache,                                                                                     \
  };                                                                                                  \
  }

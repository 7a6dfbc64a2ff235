// Fills the table of one instruction set. Included last by each kernels_<isa>.cc.
#pragma once
#include "formats.h"  // first: it names the lanes F and I that the kernels use

#include "attention_kernel.h"
#include "matmul_kernel.h"

#define Q4_GROUPED(function, group)                                              \
  function<Grouped<group, false, false>>, function<Grouped<group, false, true>>, \
      function<Grouped<group, true, false>>, function<Grouped<group, true, true>>,
#define Q4_MATMUL(group) Q4_GROUPED(QuantizedMatmul, group)
#define Q4_TAKE_ROW(group) Q4_GROUPED(TakeRow, group)

#define Q4_KERNELS(variable, label)                                                                   \
  namespace q4 {                                                                                      \
  extern const Kernels variable = {                                                                   \
      label,                                                                                          \
      Quantize,                                                                                       \
      {FloatMatmul<F32>, FloatMatmul<F16>, FloatMatmul<BF16>, QuantizedMatmul<Q4_0>,                  \
       QuantizedMatmul<Q4_1>, QuantizedMatmul<Q5_0>, QuantizedMatmul<Q5_1>, QuantizedMatmul<Q8_0>,    \
       QuantizedMatmul<Q2_K>, QuantizedMatmul<Q3_K>, QuantizedMatmul<Q4_K>, QuantizedMatmul<Q5_K>,    \
       QuantizedMatmul<Q6_K>, QuantizedMatmul<IQ4_NL>, QuantizedMatmul<IQ4_XS>,                       \
       Q4_GROUP_SIZES(Q4_MATMUL)},                                                                    \
      {TakeFloatRow<F32>, TakeFloatRow<F16>, TakeFloatRow<BF16>, TakeRow<Q4_0>, TakeRow<Q4_1>,        \
       TakeRow<Q5_0>, TakeRow<Q5_1>, TakeRow<Q8_0>, TakeRow<Q2_K>, TakeRow<Q3_K>, TakeRow<Q4_K>,      \
       TakeRow<Q5_K>, TakeRow<Q6_K>, TakeRow<IQ4_NL>, TakeRow<IQ4_XS>, Q4_GROUP_SIZES(Q4_TAKE_ROW)},  \
      Attend,                                                                                         \
      StoreCache,                                                                                     \
  };                                                                                                  \
  }

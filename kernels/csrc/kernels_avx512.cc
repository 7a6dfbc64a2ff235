#include "simd_avx512.h"
#include "table.h"

Q4_KERNELS(kAvx512, "avx512")

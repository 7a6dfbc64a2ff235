#include "simd_avx2.h"
#include "table.h"

Q4_KERNELS(kAvx2, "avx2")

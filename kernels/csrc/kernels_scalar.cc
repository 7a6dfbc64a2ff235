#include "simd_scalar.h"
#include "table.h"

Q4_KERNELS(kScalar, "scalar")

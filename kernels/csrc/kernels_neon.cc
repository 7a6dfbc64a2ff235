#include "simd_neon.h"
#include "table.h"

Q4_KERNELS(kNeon, "neon")

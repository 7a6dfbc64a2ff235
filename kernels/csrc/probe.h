// Loops that do nothing but multiply signed by unsigned bytes and add: the processor's limit.
#pragma once
#include <stdint.h>

namespace q4 {

// Runs `count` rounds and returns the multiplications of a round (an addition goes with each).
using Int8Loop = int64_t (*)(int64_t count);

int64_t Int8LoopPortable(int64_t count);
#if defined(__x86_64__)
int64_t Int8LoopAvx2(int64_t count);
int64_t Int8LoopAvx512(int64_t count);
#endif

}  // namespace q4

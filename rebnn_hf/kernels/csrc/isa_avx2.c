/* AVX2: Haswell to Raptor Lake, Zen to Zen 3. */
#include <immintrin.h>

#include "isa.h"

#include "kernels.h"

static int runs(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }

const rebnn_isa rebnn_avx2 = REBNN_TABLE("avx2", runs);

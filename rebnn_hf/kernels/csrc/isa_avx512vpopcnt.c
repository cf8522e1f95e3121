/* AVX-512 with VPOPCNTDQ, VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later. */
#include <immintrin.h>

#include "cpu_x86.h"
#include "isa.h"

#define POPCOUNT(x) _mm512_popcnt_epi64(x)
#define DOT(sum, codes, signs) _mm512_dpbusd_epi32(sum, codes, signs)
#include "avx512.h"

static int runs(void)
{
    return cpu_has_avx512() && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni");
}

const rebnn_isa rebnn_avx512vpopcnt = REBNN_TABLE("avx512vpopcnt", runs);

/* AVX-512 with VPOPCNTDQ, VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later. */
#include <immintrin.h>

#include "cpu_x86.h"
#include "isa.h"

/* vpdpbusd. With the intrinsic, gcc 12 copies every sum of a tile twice in every step. */
static inline __m512i dot(__m512i sum, __m512i codes, __m512i signs)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "vm"(signs));
    return sum;
}

#define POPCOUNT(x) _mm512_popcnt_epi64(x)
#define DOT(sum, codes, signs) dot(sum, codes, signs)
#define QUAD_ROWS 8
#include "avx512.h"

static int runs(void)
{
    return cpu_has_avx512() && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni");
}

const rebnn_isa rebnn_avx512vpopcnt = REBNN_TABLE("avx512vpopcnt", runs);

/* AVX-512 without VPOPCNTDQ and VNNI: Skylake-X, Cascade Lake. */
#include <immintrin.h>

#include "cpu_x86.h"
#include "isa.h"

/* Set bits of each 64-bit lane: those of 4 bits by a table, then sums of eight bytes. */
static inline __m512i popcount(__m512i x)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(x, nibble));
    __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi64(x, 4), nibble));
    return _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512());
}

/* Codes are at most 255 and signs +-1: sums of two fit into 16 bits. */
static inline __m512i dot(__m512i sum, __m512i codes, __m512i signs)
{
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, signs), _mm512_set1_epi16(1)));
}

#define POPCOUNT(x) popcount(x)
#define DOT(sum, codes, signs) dot(sum, codes, signs)
#include "avx512.h"

static int runs(void) { return cpu_has_avx512(); }

const rebnn_isa rebnn_avx512 = REBNN_TABLE("avx512", runs);

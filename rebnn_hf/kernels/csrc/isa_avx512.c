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

/* Codes are at most 255 and signs +-1: sums of two fit into 16 bits, and 64 such sums. */
static inline __m512i dot(__m512i sum, __m512i codes, __m512i signs)
{
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, signs));
}

#define V __m512i
#define V_LANES 4
#define VECTORS 1
#define ROWS_AT_ONCE 8
#define FEW_ROWS 6
#define V_ZERO _mm512_setzero_si512()
#define V_BYTES(x) _mm512_set1_epi8(x)
#define V_SAME(x) _mm512_broadcast_i32x4(x)
#define V_SHUFFLE(table, index) _mm512_shuffle_epi8(table, index)
#define V_AND(a, b) _mm512_and_si512(a, b)
#define V_RIGHT4(a) _mm512_srli_epi16(a, 4)
#define V_ADD8(a, b) _mm512_add_epi8(a, b)
#define V_ADD16(a, b) _mm512_add_epi16(a, b)
#define V_LOW8(a, b) _mm512_unpacklo_epi8(a, b)
#define V_HIGH8(a, b) _mm512_unpackhi_epi8(a, b)
#define V_LOW16(a, b) _mm512_unpacklo_epi16(a, b)
#define V_HIGH16(a, b) _mm512_unpackhi_epi16(a, b)
#define V_LOW32(a, b) _mm512_unpacklo_epi32(a, b)
#define V_HIGH32(a, b) _mm512_unpackhi_epi32(a, b)
#define V_LOW64(a, b) _mm512_unpacklo_epi64(a, b)
#define V_HIGH64(a, b) _mm512_unpackhi_epi64(a, b)

/* The words at `at` and behind it of four blocks. */
static inline __m512i v_lanes(const uint64_t *const *blocks, int64_t at)
{
    __m512i lanes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(blocks[0] + at)));
    lanes = _mm512_inserti32x4(lanes, _mm_loadu_si128((const __m128i *)(blocks[1] + at)), 1);
    lanes = _mm512_inserti32x4(lanes, _mm_loadu_si128((const __m128i *)(blocks[2] + at)), 2);
    return _mm512_inserti32x4(lanes, _mm_loadu_si128((const __m128i *)(blocks[3] + at)), 3);
}

#include "lookup.h"

#define POPCOUNT(x) popcount(x)
#define DOT(sum, codes, signs) dot(sum, codes, signs)
#define WIDEN(sum) _mm512_madd_epi16(sum, _mm512_set1_epi16(1))
#define PAIR_STEPS 64
#include "avx512.h"

static int runs(void) { return cpu_has_avx512(); }

const rebnn_isa rebnn_avx512 = REBNN_TABLE("avx512", runs);

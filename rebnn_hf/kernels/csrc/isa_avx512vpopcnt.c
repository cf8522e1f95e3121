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
#define WIDEN(sum) sum
#define PAIR_STEPS 128
#define LOOKUP(indices, table) _mm512_permutexvar_epi8(indices, table)
#define HAS_TRIPLES
#include "triples.h"
#include "avx512.h"

/* Four sums of 4 codes fit into the bytes of a register, for each of the 16 signs of 4 weights: one instruction looks up
 * 16 inputs of 16 outputs, where planes take several for each bit. */
static void tables(const uint8_t *codes, int64_t n, int bits, uint8_t *tables)
{
    const __m512i first = _mm512_set_epi32(0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c, 0x08080808, 0x08080808,
                                           0x08080808, 0x08080808, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0, 0,
                                           0, 0);
    const __mmask64 signs[4] = {0xaaaaaaaaaaaaaaaa, 0xcccccccccccccccc, 0xf0f0f0f0f0f0f0f0, 0xff00ff00ff00ff00};
    for (int64_t j = 0; j < round_up(n, 64); j += 16) {
        __m512i sum = _mm512_setzero_si512();
        __m512i sixteen = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(codes + j)));
        for (int i = 0; i < 4; i++) {
            __m512i flip = _mm512_maskz_set1_epi8(signs[i], (char)((1 << bits) - 1));
            __m512i code = _mm512_shuffle_epi8(sixteen, _mm512_add_epi8(first, _mm512_set1_epi8((char)i)));
            sum = _mm512_add_epi8(sum, _mm512_xor_si512(code, flip));
        }
        _mm512_store_si512(tables + 4 * j, sum);
    }
}

static void lookups(const uint8_t *tables, int64_t rows, int64_t words, const uint64_t *layout, const int32_t *ones,
                    int64_t first, int64_t last, int64_t outputs, const epilogue *e)
{
    by_pairs(1, tables, rows, 4 * words, layout, ones, first, last, outputs, e);
}

static int runs(void)
{
    return cpu_has_avx512() && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi");
}

const rebnn_isa rebnn_avx512vpopcnt = REBNN_TABLE("avx512vpopcnt", runs, .tables = tables, .lookups = lookups);

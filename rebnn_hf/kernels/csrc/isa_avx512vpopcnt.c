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

/* Sixteen pixels of up to 64 channels: a comparison of each channel sets its bit in sixteen words, of 32 bits at first. */
static void pack_pixels(const float *x, int64_t channels, int64_t stride, int64_t n, const float *shift,
                        uint64_t *pixels)
{
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t j = 0; j < n; j += 16) {
        __mmask16 some = first_of(n - j);
        __m512i halves[2];
        for (int h = 0; h < 2; h++) {
            __m512i bit = _mm512_set1_epi32(1);
            halves[h] = _mm512_setzero_si512();
            for (int64_t i = 32 * h; i < 32 * h + 32 && i < channels; i++, bit = _mm512_slli_epi32(bit, 1)) {
                __m512 value = _mm512_maskz_loadu_ps(some, x + i * stride + j);
                value = _mm512_add_ps(value, _mm512_set1_ps(shift ? shift[i] : 0));
                __mmask16 set = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GE_OQ);
                halves[h] = _mm512_mask_or_epi32(halves[h], set, halves[h], bit);
            }
        }
        __m512i left = _mm512_permutex2var_epi32(halves[0], first, halves[1]);
        __m512i right = _mm512_permutex2var_epi32(halves[0], second, halves[1]);
        _mm512_mask_storeu_epi64(pixels + j, (__mmask8)some, left);
        _mm512_mask_storeu_epi64(pixels + j + 8, (__mmask8)(some >> 8), right);
    }
}

/* A block of outputs against a block of pixels: the words of 8 outputs are broadcast, the sums are those of 16 pixels,
 * side by side as y wants them. */
static void conv(const uint64_t *outputs, const uint64_t *pixels, int64_t words, const conv_block *b)
{
    uint64_t sums[TRIPLES][BLOCK] __attribute__((aligned(64)));
    int64_t triples = words / 3 < TRIPLES ? words / 3 : TRIPLES; /* the other words follow one by one */
    for (int64_t t = 0; t < triples; t++)
        for (int64_t i = 0; i < BLOCK; i += 8) {
            const uint64_t *w = outputs + 3 * t * BLOCK + i;
            _mm512_store_si512(sums[t] + i, _mm512_ternarylogic_epi64(_mm512_loadu_si512(w), _mm512_loadu_si512(w + BLOCK),
                                                                      _mm512_loadu_si512(w + 2 * BLOCK), 0x96));
        }
    const __mmask16 some = first_of(b->pixels);
    const __m512 inputs = _mm512_set1_ps((float)b->inputs), two = _mm512_set1_ps(2);
    for (int64_t o = 0; o < b->outputs; o += 8) {
        __m512i left[8], right[8];
        __m512 dots[8];
        triple_half(8, BLOCK, 1, outputs + o, 1, words, triples, sums[0] + o, 1, pixels, left);
        if (b->pixels > 8)
            triple_half(8, BLOCK, 1, outputs + o, 1, words, triples, sums[0] + o, 1, pixels + 8, right);
        else
            memset(right, 0, sizeof right);
        for (int r = 0; r < 8; r++) /* whole numbers below 2^24: exact */
            dots[r] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(both_halves(left[r], right[r])), two, inputs);
        int64_t rows = b->outputs - o < 8 ? b->outputs - o : 8;
        for (int64_t k = 0; k < b->positions; k++)
            for (int64_t r = 0; b->outside[k] && r < rows; r++) {
                __m512 share = _mm512_set1_ps(b->shares[k * b->shares_stride + o + r]);
                dots[r] = _mm512_mask_add_ps(dots[r], b->outside[k], dots[r], share);
            }
        for (int64_t r = 0; r < rows; r++) {
            __m512 y = _mm512_mul_ps(dots[r], _mm512_set1_ps(b->scale[o + r]));
            y = _mm512_add_ps(y, _mm512_set1_ps(b->bias[o + r]));
            if (b->shortcut) {
                y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, b->shortcut + (o + r) * b->y_stride));
                y = _mm512_add_ps(y, _mm512_set1_ps(b->shift_in[o + r]));
                __mmask16 rest = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NGT_UQ);
                y = _mm512_mask_mul_ps(y, rest, y, _mm512_set1_ps(b->slope[o + r]));
                y = _mm512_add_ps(y, _mm512_set1_ps(b->shift_out[o + r]));
            }
            _mm512_mask_storeu_ps(b->y + (o + r) * b->y_stride, some, y);
        }
    }
}

static int runs(void)
{
    return cpu_has_avx512() && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi");
}

const rebnn_isa rebnn_avx512vpopcnt = REBNN_TABLE("avx512vpopcnt", runs, .tables = tables, .lookups = lookups,
                                                   .pack_pixels = pack_pixels, .conv = conv);

/* The inner loops of both AVX-512 files, which define POPCOUNT, DOT, WIDEN and PAIR_STEPS. Internal. */
#ifndef REBNN_AVX512_H
#define REBNN_AVX512_H

#include <math.h>
#include <string.h>

/* The words of rows are broadcast against 16 outputs in two registers. ROWS is constant in each copy. */
static inline __attribute__((always_inline)) void tile_of(const int ROWS, const uint64_t *a, int64_t words,
                                                          const uint64_t *block, int32_t (*counts)[BLOCK])
{
    __m512i left[8], right[8];
#pragma GCC unroll 8 /* before the loop becomes a memset that keeps the sums out of registers */
    for (int r = 0; r < ROWS; r++)
        left[r] = right[r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < words; k++) {
        __m512i w0 = _mm512_loadu_si512(block + k * BLOCK), w1 = _mm512_loadu_si512(block + k * BLOCK + 8);
        for (int r = 0; r < ROWS; r++) {
            __m512i x = _mm512_set1_epi64((long long)a[r * words + k]);
            left[r] = _mm512_add_epi64(left[r], POPCOUNT(_mm512_xor_si512(x, w0)));
            right[r] = _mm512_add_epi64(right[r], POPCOUNT(_mm512_xor_si512(x, w1)));
        }
    }
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int r = 0; r < ROWS; r++)
        _mm512_store_si512(counts[r], _mm512_permutex2var_epi32(left[r], evens, right[r]));
}

/* A mask of the first `count` of 16 lanes. */
static inline __mmask16 first_of(int64_t count)
{
    return count >= 16 ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
}

#define HAS_TILE
#define TILE_ROWS 8
static inline void tile(const uint64_t *a, int64_t rows, int64_t words, const uint64_t *block, int32_t (*counts)[BLOCK])
{
    switch (rows) {
    case 8: tile_of(8, a, words, block, counts); return;
    case 7: tile_of(7, a, words, block, counts); return;
    case 6: tile_of(6, a, words, block, counts); return;
    case 5: tile_of(5, a, words, block, counts); return;
    case 4: tile_of(4, a, words, block, counts); return;
    case 3: tile_of(3, a, words, block, counts); return;
    case 2: tile_of(2, a, words, block, counts); return;
    default: tile_of(1, a, words, block, counts); return;
    }
}

#define HAS_PACK
static void pack(const float *x, int64_t n, const float *shift, float threshold, uint64_t *bits)
{
    const __m512 limit = _mm512_set1_ps(threshold);
    for (int64_t start = 0; start < n; start += 64) {
        uint64_t word = 0;
        for (int64_t j = 0; j < 64 && start + j < n; j += 16) {
            int64_t left = n - start - j;
            __mmask16 some = first_of(left);
            __m512 value = _mm512_maskz_loadu_ps(some, x + start + j);
            if (shift)
                value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, shift + start + j));
            word |= (uint64_t)_mm512_mask_cmp_ps_mask(some, value, limit, _CMP_GE_OQ) << j;
        }
        bits[start / 64] = word;
    }
}

#define HAS_LEVELS
static void levels(const float *x, int64_t n, const float *shift, float scale, int32_t low, int32_t high, uint8_t *codes)
{
    const __m512 lowest = _mm512_set1_ps((float)low), highest = _mm512_set1_ps((float)high);
    for (int64_t j = 0; j < n; j += 16) {
        __mmask16 some = first_of(n - j);
        __m512 value = _mm512_maskz_loadu_ps(some, x + j);
        if (shift)
            value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, shift + j));
        value = _mm512_add_ps(_mm512_div_ps(value, _mm512_set1_ps(scale)), _mm512_set1_ps(0.5f));
        value = _mm512_roundscale_ps(value, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        value = _mm512_min_ps(_mm512_max_ps(value, lowest), highest); /* max takes the second of NaN and a number */
        __m512i code = _mm512_sub_epi32(_mm512_cvttps_epi32(value), _mm512_set1_epi32(low));
        _mm512_mask_cvtepi32_storeu_epi8(codes + j, some, code);
    }
}

#define HAS_PLANES
static void planes(const uint8_t *codes, int64_t n, int bits, uint64_t *result)
{
    int64_t words = ceil_div(n, 64);
    for (int64_t k = 0; k < words; k++) {
        __m512i values = _mm512_loadu_si512(codes + 64 * k);
        for (int p = 0; p < bits; p++)
            result[p * words + k] = _mm512_test_epi8_mask(values, _mm512_set1_epi8((char)(1 << p)));
    }
}

#define HAS_TOKEN
static float token(const float *x, int64_t n, uint8_t *codes)
{
    __m512 largest = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += 16) {
        __mmask16 some = first_of(n - j);
        largest = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(some, x + j)), largest);
    }
    float scale = _mm512_reduce_max_ps(largest) / 127;
    scale = scale > 1.17549435e-38f ? scale : 1.17549435e-38f;
    for (int64_t j = 0; j < n; j += 16) {
        __mmask16 some = first_of(n - j);
        __m512 value = _mm512_div_ps(_mm512_maskz_loadu_ps(some, x + j), _mm512_set1_ps(scale));
        value = _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        value = _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(-127)), _mm512_set1_ps(127));
        __m512i code = _mm512_add_epi32(_mm512_cvttps_epi32(value), _mm512_set1_epi32(128));
        _mm512_mask_cvtepi32_storeu_epi8(codes + j, some, code);
    }
    return scale;
}

#define HAS_LAYER_NORM
static inline float sum_of_64(const __m512 *sums)
{
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[2]), _mm512_add_ps(sums[1], sums[3])));
}

static void layer_norm(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *y)
{
    const __m512 zero = _mm512_setzero_ps();
    __m512 sums[4] = {zero, zero, zero, zero}, squares[4] = {zero, zero, zero, zero};
    for (int64_t j = 0; j < n; j += 64)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sums[i] = _mm512_add_ps(sums[i], _mm512_maskz_loadu_ps(first_of(n - j - 16 * i), x + j + 16 * i));
    const __m512 mean = _mm512_set1_ps(sum_of_64(sums) / (float)n);
    for (int64_t j = 0; j < n; j += 64)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __mmask16 some = first_of(n - j - 16 * i);
            __m512 centered = _mm512_maskz_sub_ps(some, _mm512_maskz_loadu_ps(some, x + j + 16 * i), mean);
            squares[i] = _mm512_add_ps(squares[i], _mm512_mul_ps(centered, centered));
        }
    const __m512 inverse = _mm512_set1_ps(1 / sqrtf(sum_of_64(squares) / (float)n + eps));
    for (int64_t j = 0; j < n; j += 16) {
        __mmask16 some = first_of(n - j);
        __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, x + j), mean), inverse);
        value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(some, weight + j));
        _mm512_mask_storeu_ps(y + j, some, _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, bias + j)));
    }
}

#define HAS_MISMATCHES
static void mismatches(const uint64_t *query, const uint64_t *keys, int64_t words, int64_t stride, int64_t count,
                       uint8_t *result)
{
    for (int64_t j = 0; j < count; j += 8) {
        __mmask8 some = count - j >= 8 ? 0xff : (__mmask8)((1u << (count - j)) - 1);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t w = 0; w < words; w++) {
            __m512i key = _mm512_maskz_loadu_epi64(some, keys + w * stride + j);
            sum = _mm512_add_epi64(sum, POPCOUNT(_mm512_xor_si512(_mm512_set1_epi64((long long)query[w]), key)));
        }
        _mm512_mask_cvtepi64_storeu_epi8(result + j, some, sum);
    }
}

#define HAS_TABLE_SUM
/* A table of up to 33 or 65 entries is looked up in registers: heads of 32 and of 64 features. */
static inline __attribute__((always_inline)) float sum_of_lookups(const int PAIRS, const float *table,
                                                                  const uint8_t *index, int64_t count)
{
    __m512 first[2], second[2];
    for (int p = 0; p < PAIRS; p++) {
        first[p] = _mm512_loadu_ps(table + 32 * p);
        second[p] = _mm512_loadu_ps(table + 32 * p + 16);
    }
    const __m512 last = _mm512_set1_ps(table[32 * PAIRS]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16) {
        __mmask16 some = first_of(count - j);
        __m512i i = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, index + j));
        __m512 value = _mm512_permutex2var_ps(first[0], i, second[0]);
        if (PAIRS == 2) {
            __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
            value = _mm512_mask_mov_ps(value, upper, _mm512_permutex2var_ps(first[1], i, second[1]));
        }
        value = _mm512_mask_mov_ps(value, _mm512_cmpeq_epi32_mask(i, _mm512_set1_epi32(32 * PAIRS)), last);
        sum = _mm512_mask_add_ps(sum, some, sum, value);
    }
    return _mm512_reduce_add_ps(sum);
}

static float table_sum(const float *table, int64_t size, const uint8_t *index, int64_t count)
{
    if (size == 33)
        return sum_of_lookups(1, table, index, count);
    if (size == 65)
        return sum_of_lookups(2, table, index, count);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 16) {
        __mmask16 some = first_of(count - j);
        __m512i i = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, index + j));
        sum = _mm512_mask_add_ps(sum, some, sum, _mm512_mask_i32gather_ps(sum, some, i, table, 4));
    }
    return _mm512_reduce_add_ps(sum);
}

#define HAS_AT_MOST
static int64_t at_most(const uint8_t *index, int64_t count, int32_t limit, uint64_t *bits)
{
    int64_t set = 0;
    for (int64_t j = 0; j < count; j += 64) {
        __mmask64 some = count - j >= 64 ? ~0ull : (1ull << (count - j)) - 1;
        __m512i values = _mm512_maskz_loadu_epi8(some, index + j);
        uint64_t word = limit < 0 ? 0 : _mm512_mask_cmple_epu8_mask(some, values, _mm512_set1_epi8((char)(limit < 255 ? limit : 255)));
        bits[j / 64] = word;
        set += __builtin_popcountll(word);
    }
    return set;
}

#define HAS_OVERLAPS
static void overlaps(const uint64_t *a, const uint64_t *b, int64_t words, int64_t n, int32_t *counts)
{
    for (int64_t i = 0; i < n; i += 8) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t w = 0; w < words; w++) {
            __m512i both = _mm512_and_si512(_mm512_set1_epi64((long long)a[w]), _mm512_loadu_si512(b + w * n + i));
            sum = _mm512_add_epi64(sum, POPCOUNT(both));
        }
        _mm256_storeu_si256((__m256i *)(counts + i), _mm512_cvtepi64_epi32(sum));
    }
}

#define HAS_REACHED
static void reached(const int32_t *counts, int64_t n, int32_t total, const int32_t *limits, uint16_t *bits)
{
    for (int64_t i = 0; i < n; i += 16) {
        __m512i twice = _mm512_slli_epi32(_mm512_loadu_si512(counts + i), 1);
        __m512i value = _mm512_sub_epi32(twice, _mm512_set1_epi32(total));
        bits[i / 16] = (uint16_t)_mm512_cmpge_epi32_mask(value, _mm512_loadu_si512(limits + i));
    }
}

#define HAS_FINISH
static inline void finish(const int32_t (*counts)[BLOCK], int64_t m, int64_t rows, int64_t block, const int32_t *ones,
                          int64_t outputs, const epilogue *e)
{
    int64_t n = block * BLOCK;
    if (!e->y) {
        __m512i few = _mm512_loadu_si512(e->few + n), many = _mm512_loadu_si512(e->many + n);
        uint16_t *bits = e->bits + e->block_offset[block] + m * e->bits_stride;
        for (int64_t r = 0; r < rows; r++, bits += e->bits_stride) {
            __m512i count = _mm512_load_si512(counts[r]);
            *bits = (uint16_t)(_mm512_cmple_epi32_mask(count, few) | _mm512_cmpge_epi32_mask(count, many));
        }
        return;
    }
    __m512i set = _mm512_loadu_si512(ones + n);
    __m512i base = _mm512_add_epi32(_mm512_set1_epi32(e->constant), _mm512_mullo_epi32(_mm512_set1_epi32(e->per_one), set));
    /* factor is -2, -1 or 1: a shift, and a subtraction or an addition of what was made negative */
    const __m128i doubled = _mm_cvtsi32_si128(e->factor == -2);
    const __m512i sign = _mm512_set1_epi32(e->factor < 0 ? -1 : 0);
#define DOT_OF(r)                                                                                                     \
    _mm512_add_epi32(base, _mm512_sub_epi32(_mm512_xor_si512(_mm512_sll_epi32(_mm512_load_si512(counts[r]), doubled), sign), sign))
    __mmask16 some = first_of(outputs - n);
    __m512 scale = _mm512_maskz_loadu_ps(some, e->scale + n), factor = _mm512_mul_ps(scale, _mm512_set1_ps(e->input_scale));
    __m512 bias = e->bias ? _mm512_maskz_loadu_ps(some, e->bias + n) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r++) {
        if (e->row_scale)
            factor = _mm512_mul_ps(scale, _mm512_set1_ps(e->row_scale[m + r]));
        __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(DOT_OF(r)), factor), bias);
        int64_t at = (m + r) * e->y_stride + n;
        if (e->residual)
            y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, e->residual + at));
        _mm512_mask_storeu_ps(e->y + at, some, y);
    }
#undef DOT_OF
}

/* Products of two blocks of outputs at a time, for codes of 8 bits and, with LOOKUP (of the bytes of the second vector
 * at the indices in the first), for tables. In each step, a vector of weights per block meets 4 codes or 64 bytes of tables;
 * the bits of the layout become these vectors once for PAIR_ROWS rows and PAIR_STEPS steps, in which the sums cannot
 * overflow; WIDEN makes them 32-bit. */
enum { PAIR_ROWS = 96 };

/* Four inputs of each output: bytes +1 and -1. */
static void signs_of(const uint64_t *quads, int64_t steps, __m512i *weights)
{
    for (int64_t q = 0; q < steps; q++)
        weights[2 * q] = _mm512_mask_blend_epi8(quads[q], _mm512_set1_epi8(-1), _mm512_set1_epi8(1));
}

#ifdef LOOKUP
/* Sixteen inputs of each output: four nibbles, in bytes that say which of four tables they look up. */
static void indices_of(const uint64_t *words, int64_t steps, __m512i *weights)
{
    const __m512i evens = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), odds = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    const __m512i table = _mm512_set1_epi32(0x30201000), low = _mm512_set1_epi8(15);
    for (int64_t k = 0; k < steps; k += 4) {
        __m512i w0 = _mm512_loadu_si512(words + 4 * k), w1 = _mm512_loadu_si512(words + 4 * k + 8);
        __m512i even = _mm512_permutex2var_epi64(w0, evens, w1), odd = _mm512_permutex2var_epi64(w0, odds, w1);
        __m512i place = _mm512_set1_epi32(0x0c080400);
        for (int t = 0; t < 4; t++, place = _mm512_add_epi8(place, _mm512_set1_epi8(16))) {
            __m512i nibbles = _mm512_multishift_epi64_epi8(place, even);
            nibbles = _mm512_mask_multishift_epi64_epi8(nibbles, 0xf0f0f0f0f0f0f0f0, place, odd);
            weights[2 * (k + t)] = _mm512_ternarylogic_epi32(nibbles, low, table, 0xea); /* nibbles & low | table */
        }
    }
}
#else
#define indices_of signs_of /* not called */
#define LOOKUP(indices, table) table
#endif

/* Adds the products of ROWS rows from `row` on to their counts, which they begin or not. ROWS and TABLES are constant in
 * each copy. */
static inline __attribute__((always_inline)) void pair_tile(const int ROWS, const int TABLES, const uint8_t *codes,
                                                            int64_t stride, int64_t steps, const __m512i *weights,
                                                            int64_t row, int begin, int32_t (*counts)[PAIR_ROWS][BLOCK])
{
    const __m512i one = _mm512_set1_epi8(1);
    __m512i left[8], right[8];
    for (int r = 0; r < ROWS; r++)
        left[r] = right[r] = _mm512_setzero_si512();
    for (int64_t q = 0; q < steps; q++)
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *x = codes + (row + r) * stride + (TABLES ? 64 : 4) * q;
            if (TABLES) {
                __m512i table = _mm512_load_si512(x);
                left[r] = DOT(left[r], LOOKUP(weights[2 * q], table), one);
                right[r] = DOT(right[r], LOOKUP(weights[2 * q + 1], table), one);
            } else {
                int32_t four;
                memcpy(&four, x, 4);
                left[r] = DOT(left[r], _mm512_set1_epi32(four), weights[2 * q]);
                right[r] = DOT(right[r], _mm512_set1_epi32(four), weights[2 * q + 1]);
            }
        }
    for (int r = 0; r < ROWS; r++) {
        left[r] = WIDEN(left[r]);
        right[r] = WIDEN(right[r]);
        if (!begin) {
            left[r] = _mm512_add_epi32(left[r], _mm512_load_si512(counts[0][row + r]));
            right[r] = _mm512_add_epi32(right[r], _mm512_load_si512(counts[1][row + r]));
        }
        _mm512_store_si512(counts[0][row + r], left[r]);
        _mm512_store_si512(counts[1][row + r], right[r]);
    }
}

static inline void finish(const int32_t (*counts)[BLOCK], int64_t m, int64_t rows, int64_t block, const int32_t *ones,
                          int64_t outputs, const epilogue *e);

static inline __attribute__((always_inline)) void by_pairs(const int TABLES, const uint8_t *codes, int64_t rows,
                                                           int64_t steps, const uint64_t *layout, const int32_t *ones,
                                                           int64_t first, int64_t last, int64_t outputs,
                                                           const epilogue *e)
{
    __m512i weights[PAIR_STEPS * 2];
    int32_t counts[2][PAIR_ROWS][BLOCK] __attribute__((aligned(64)));
    int64_t stride = (TABLES ? 64 : 4) * steps, words = TABLES ? 4 : 1; /* of a step in the layout */
    for (int64_t block = first; block < last; block += 2) {
        int64_t second = block + 1 < last ? block + 1 : block; /* an odd block is multiplied twice and kept once */
        for (int64_t m = 0; m < rows; m += PAIR_ROWS) {
            int64_t count = rows - m < PAIR_ROWS ? rows - m : PAIR_ROWS;
            for (int64_t q = 0; q < steps || !q; q += PAIR_STEPS) { /* once for no inputs too: zeros */
                int64_t some = steps - q < PAIR_STEPS ? steps - q : PAIR_STEPS, r = 0;
                const uint8_t *part = codes + m * stride + (TABLES ? 64 : 4) * q;
                for (int64_t b = block; b <= block + 1; b++) {
                    const uint64_t *from = layout + ((b < last ? b : block) * steps + q) * words;
                    if (TABLES)
                        indices_of(from, some, weights + b - block);
                    else
                        signs_of(from, some, weights + b - block);
                }
                for (; r + 8 <= count; r += 8)
                    pair_tile(8, TABLES, part, stride, some, weights, r, !q, counts);
                for (; r + 4 <= count; r += 4)
                    pair_tile(4, TABLES, part, stride, some, weights, r, !q, counts);
                for (; r < count; r++)
                    pair_tile(1, TABLES, part, stride, some, weights, r, !q, counts);
            }
            for (int64_t b = block; b <= second; b++)
                finish((const int32_t(*)[BLOCK])counts[b - block], m, count, b, ones, outputs, e);
        }
    }
}

#define HAS_QUAD_TILE
#define HAS_QUADS
static void quads(const uint8_t *codes, int64_t rows, int64_t quads, const uint64_t *layout, const int32_t *ones,
                  int64_t first, int64_t last, int64_t outputs, const epilogue *e)
{
    by_pairs(0, codes, rows, quads, layout, ones, first, last, outputs, e);
}

#include "kernels.h"

#endif

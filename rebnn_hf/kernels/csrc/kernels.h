/* The inner loops in C, for every instruction set: each isa_*.c defines what it does better (and the macro that says so)
 * and includes this file, which completes the table. Internal. */
#ifndef REBNN_KERNELS_H
#define REBNN_KERNELS_H

#include <math.h>
#include <string.h>

#include "isa.h"

#ifndef HAS_PACK
static void pack(const float *x, int64_t n, const float *shift, float threshold, uint64_t *bits)
{
    for (int64_t start = 0; start < n; start += 64) {
        int64_t count = n - start < 64 ? n - start : 64;
        uint64_t word = 0;
        for (int64_t j = 0; j < count; j++) {
            float value = shift ? x[start + j] + shift[start + j] : x[start + j];
            word |= (uint64_t)(value >= threshold) << j;
        }
        bits[start / 64] = word;
    }
}
#endif

#ifndef HAS_LEVELS
static void levels(const float *x, int64_t n, const float *shift, float scale, int32_t low, int32_t high, uint8_t *codes)
{
    float lowest = (float)low, highest = (float)high;
    for (int64_t j = 0; j < n; j++) {
        float value = floorf((shift ? x[j] + shift[j] : x[j]) / scale + 0.5f);
        value = value > lowest ? value : lowest; /* NaN too */
        value = value < highest ? value : highest;
        codes[j] = (uint8_t)((int32_t)value - low);
    }
}
#endif

#ifndef HAS_PLANES
static void planes(const uint8_t *codes, int64_t n, int bits, uint64_t *result)
{
    int64_t words = ceil_div(n, 64);
    memset(result, 0, (size_t)(words * bits) * 8);
    for (int64_t j = 0; j < n; j++)
        for (int p = 0; p < bits; p++)
            result[p * words + j / 64] |= (uint64_t)(codes[j] >> p & 1) << (j % 64);
}
#endif

#ifndef HAS_TOKEN
static float token(const float *x, int64_t n, uint8_t *codes)
{
    float largest = 0;
    for (int64_t j = 0; j < n; j++) {
        float magnitude = fabsf(x[j]);
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = largest / 127;
    scale = scale > 1.17549435e-38f ? scale : 1.17549435e-38f;
    for (int64_t j = 0; j < n; j++) {
        float value = rintf(x[j] / scale);
        value = value > -127 ? value : -127; /* NaN too */
        value = value < 127 ? value : 127;
        codes[j] = (uint8_t)((int32_t)value + 128);
    }
    return scale;
}
#endif

#ifndef HAS_LAYER_NORM
/* 64 sums, added by halves: every instruction set adds in this order. */
static inline float sum_of_64(float *sums)
{
    for (int64_t half = 32; half; half /= 2)
        for (int64_t i = 0; i < half; i++)
            sums[i] += sums[i + half];
    return sums[0];
}

static void layer_norm(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *y)
{
    float sums[64] = {0}, squares[64] = {0};
    for (int64_t j = 0; j < n; j++)
        sums[j % 64] += x[j];
    float mean = sum_of_64(sums) / (float)n;
    for (int64_t j = 0; j < n; j++)
        squares[j % 64] += (x[j] - mean) * (x[j] - mean);
    float inverse = 1 / sqrtf(sum_of_64(squares) / (float)n + eps);
    for (int64_t j = 0; j < n; j++)
        y[j] = (x[j] - mean) * inverse * weight[j] + bias[j];
}
#endif

#ifndef HAS_FINISH
/* The epilogue of a tile: counts [rows][BLOCK] of rows m..m+rows-1 with the block of outputs. */
static inline void finish(const int32_t (*counts)[BLOCK], int64_t m, int64_t rows, int64_t block, const int32_t *ones,
                          int64_t outputs, const epilogue *e)
{
    int64_t n = block * BLOCK;
    if (!e->y) {
        const int32_t *few = e->few + n, *many = e->many + n;
        uint16_t *bits = e->bits + e->block_offset[block];
        for (int64_t r = 0; r < rows; r++) {
            uint32_t mask = 0;
            for (int64_t i = 0; i < BLOCK; i++)
                mask |= (uint32_t)((counts[r][i] <= few[i]) | (counts[r][i] >= many[i])) << i;
            bits[(m + r) * e->bits_stride] = (uint16_t)mask;
        }
        return;
    }
    int32_t base[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++)
        base[i] = e->constant + e->per_one * ones[n + i];
    int64_t width = outputs - n < BLOCK ? outputs - n : BLOCK;
    float scale[BLOCK] = {0}, bias[BLOCK] = {0};
    memcpy(scale, e->scale + n, (size_t)width * sizeof(float));
    if (e->bias)
        memcpy(bias, e->bias + n, (size_t)width * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        float row_scale = e->row_scale ? e->row_scale[m + r] : e->input_scale;
        float y[BLOCK];
        for (int64_t i = 0; i < BLOCK; i++) {
            float dot = (float)(base[i] + e->factor * counts[r][i]);
            y[i] = dot * (scale[i] * row_scale) + bias[i];
        }
        if (e->residual)
            for (int64_t i = 0; i < width; i++)
                y[i] += e->residual[(m + r) * e->y_stride + n + i];
        float *row = e->y + (m + r) * e->y_stride + n;
        if (width == BLOCK)
            memcpy(row, y, sizeof y);
        else
            memcpy(row, y, (size_t)width * sizeof(float));
    }
}

#endif

/* Planes of a row: count = sum of 2^plane mismatches. `counts` holds rows * planes rows and keeps the first `rows`. */
static inline void combine_planes(int32_t (*counts)[BLOCK], int64_t rows, int planes)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < BLOCK; i++) {
            int32_t sum = 0;
            for (int p = planes - 1; p >= 0; p--)
                sum = 2 * sum + counts[r * planes + p][i];
            counts[r][i] = sum;
        }
}

#ifndef HAS_TILE
#define TILE_ROWS 4
static inline void tile(const uint64_t *a, int64_t rows, int64_t words, const uint64_t *block, int32_t (*counts)[BLOCK])
{
    memset(counts, 0, (size_t)rows * sizeof *counts);
    for (int64_t k = 0; k < words; k++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < BLOCK; i++)
                counts[r][i] += (int32_t)__builtin_popcountll(a[r * words + k] ^ block[k * BLOCK + i]);
}
#endif

static void words(const uint64_t *a, int64_t rows, int planes, int64_t words, const uint64_t *layout,
                  const int32_t *ones, int64_t first, int64_t last, int64_t outputs, const epilogue *e)
{
#ifdef HAS_LOOKUP
    if (rows * planes >= FEW_ROWS) {
        words_by_lookup(a, rows, planes, words, layout, ones, first, last, outputs, e);
        return;
    }
#endif
#ifdef HAS_TRIPLES
    if (planes == 1 && rows >= 4 && words >= 3 && words / 3 <= TRIPLES) {
        words_by_triples(a, rows, words, layout, ones, first, last, outputs, e);
        return;
    }
#endif
    int32_t counts[TILE_ROWS][BLOCK] __attribute__((aligned(64)));
    int64_t step = TILE_ROWS / planes;
    for (int64_t block = first; block < last; block++) {
        const uint64_t *weights = layout + block * words * BLOCK;
        for (int64_t m = 0; m < rows; m += step) {
            int64_t count = rows - m < step ? rows - m : step;
            tile(a + m * planes * words, count * planes, words, weights, counts);
            if (planes > 1)
                combine_planes(counts, count, planes);
            finish((const int32_t(*)[BLOCK])counts, m, count, block, ones, outputs, e);
        }
    }
}

#ifndef HAS_QUAD_TILE
#define QUAD_ROWS 4
static inline void quad_tile(const uint8_t *codes, int64_t rows, int64_t quads, const uint64_t *block,
                             int32_t (*counts)[BLOCK])
{
    memset(counts, 0, (size_t)rows * sizeof *counts);
    for (int64_t q = 0; q < quads; q++)
        for (int64_t i = 0; i < BLOCK; i++) {
            uint32_t nibble = (uint32_t)(block[q] >> (4 * i)) & 15;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < 4; j++) {
                    int32_t code = codes[(r * quads + q) * 4 + j];
                    counts[r][i] += nibble >> j & 1 ? code : -code;
                }
        }
}
#endif

#ifndef HAS_QUADS
static void quads(const uint8_t *codes, int64_t rows, int64_t quads, const uint64_t *layout, const int32_t *ones,
                  int64_t first, int64_t last, int64_t outputs, const epilogue *e)
{
    int32_t counts[QUAD_ROWS][BLOCK] __attribute__((aligned(64)));
    for (int64_t block = first; block < last; block++)
        for (int64_t m = 0; m < rows; m += QUAD_ROWS) {
            int64_t count = rows - m < QUAD_ROWS ? rows - m : QUAD_ROWS;
            quad_tile(codes + m * quads * 4, count, quads, layout + block * quads, counts);
            finish((const int32_t(*)[BLOCK])counts, m, count, block, ones, outputs, e);
        }
}
#endif

#ifndef HAS_MISMATCHES
static void mismatches(const uint64_t *query, const uint64_t *keys, int64_t words, int64_t stride, int64_t count,
                       uint8_t *result)
{
    for (int64_t j = 0; j < count; j++) {
        int differ = 0;
        for (int64_t w = 0; w < words; w++)
            differ += __builtin_popcountll(query[w] ^ keys[w * stride + j]);
        result[j] = (uint8_t)differ;
    }
}
#endif

#ifndef HAS_TABLE_SUM
static float table_sum(const float *table, int64_t size, const uint8_t *index, int64_t count)
{
    float sums[16] = {0};
    (void)size;
    for (int64_t j = 0; j < count; j++)
        sums[j % 16] += table[index[j]];
    for (int64_t half = 8; half; half /= 2)
        for (int64_t i = 0; i < half; i++)
            sums[i] += sums[i + half];
    return sums[0];
}
#endif

#ifndef HAS_AT_MOST
static int64_t at_most(const uint8_t *index, int64_t count, int32_t limit, uint64_t *bits)
{
    int64_t set = 0;
    for (int64_t start = 0; start < count; start += 64) {
        int64_t width = count - start < 64 ? count - start : 64;
        uint64_t word = 0;
        for (int64_t j = 0; j < width; j++)
            word |= (uint64_t)((int32_t)index[start + j] <= limit) << j;
        bits[start / 64] = word;
        set += __builtin_popcountll(word);
    }
    return set;
}
#endif

#ifndef HAS_OVERLAPS
static void overlaps(const uint64_t *a, const uint64_t *b, int64_t words, int64_t n, int32_t *counts)
{
    for (int64_t i = 0; i < n; i++) {
        int set = 0;
        for (int64_t w = 0; w < words; w++)
            set += __builtin_popcountll(a[w] & b[w * n + i]);
        counts[i] = set;
    }
}
#endif

#ifndef HAS_REACHED
static void reached(const int32_t *counts, int64_t n, int32_t total, const int32_t *limits, uint16_t *bits)
{
    for (int64_t start = 0; start < n; start += 16) {
        uint32_t word = 0;
        for (int64_t i = 0; i < 16; i++)
            word |= (uint32_t)(2 * counts[start + i] - total >= limits[start + i]) << i;
        bits[start / 16] = (uint16_t)word;
    }
}
#endif

/* title, runs, and what there is besides. */
#define REBNN_TABLE(title, ...)                                                                                       \
    {                                                                                                                 \
        .name = title, .pack = pack, .levels = levels, .planes = planes, .token = token, .layer_norm = layer_norm,    \
        .words = words, .quads = quads, .mismatches = mismatches, .table_sum = table_sum, .at_most = at_most,         \
        .overlaps = overlaps, .reached = reached, .runs = __VA_ARGS__,                                                \
    }

#endif

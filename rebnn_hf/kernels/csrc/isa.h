/* What an instruction set provides: the inner loops. Internal; one constant table per isa_*.c file. */
#ifndef REBNN_ISA_H
#define REBNN_ISA_H

#include "rebnn.h"

#define BLOCK 16 /* outputs that are interleaved in a layout */

/* What becomes of the products of a row with one block of outputs. `count` is the mismatches of bits (WORDS, summed
 * with weights 2^plane) or the product of unsigned codes with signs (QUADS); ones[n] the set bits of weight row n.
 *   dot = constant + per_one * ones[n] + factor * count
 * Floats: y = dot * (scale[n] * input_scale) + bias[n], or with the scale of the row in place of input_scale; then
 *         plus residual.
 * Bits:   1 where count <= few[n] or count >= many[n] (WORDS with one plane), 16 outputs at a time into
 *         bits + m * bits_stride + block_offset[n / 16] (both in units of 16 bits).
 */
typedef struct {
    int32_t constant, per_one, factor;
    const float *scale, *bias;
    float input_scale;
    const float *row_scale; /* per row, or NULL */
    float *y;               /* NULL: bits */
    const float *residual; /* of the shape of y, or NULL */
    int64_t y_stride;
    const int32_t *few, *many; /* padded to 16 outputs */
    uint16_t *bits;
    int64_t bits_stride;
    const int64_t *block_offset;
} epilogue;

/* A block of outputs and a block of pixels in a convolution of signs:
 *   y[o * y_stride + p] = (inputs - 2 mismatches + share) * scale[o] + bias[o], for o < outputs and p < pixels,
 * where share is the sum of shares[k * shares_stride + o] over the kernel's positions k that have bit p of outside[k].
 * With a shortcut, which lies as y does, shortcut and RPReLU follow as in rebnn_residual. */
typedef struct {
    int64_t outputs, pixels, inputs; /* the first two at most BLOCK */
    const float *scale, *bias;
    int64_t positions, shares_stride;
    const uint16_t *outside;
    const float *shares;
    const float *shortcut, *shift_in, *slope, *shift_out; /* all NULL: nothing follows */
    float *y;
    int64_t y_stride;
} conv_block;

struct rebnn_isa {
    const char *name;
    int (*runs)(void);

    /* bit j of `bits` = x[j] + shift[j] >= threshold, for j < n; spare bits of the last word are clear. */
    void (*pack)(const float *x, int64_t n, const float *shift, float threshold, uint64_t *bits);
    /* codes[j] = clip(floor((x[j] + shift[j]) / scale + 1/2), low, high) - low. */
    void (*levels)(const float *x, int64_t n, const float *shift, float scale, int32_t low, int32_t high,
                   uint8_t *codes);
    /* bit j of planes[p * ceil(n / 64)...] = bit p of codes[j], for p < bits. The codes stand in a multiple of 64 bytes,
     * those behind n are 0. */
    void (*planes)(const uint8_t *codes, int64_t n, int bits, uint64_t *planes);
    /* codes[j] = round(x[j] / s) + 128; returns s = max|x| / 127. */
    float (*token)(const float *x, int64_t n, uint8_t *codes);
    /* y = (x - mean) / sqrt(variance + eps) * weight + bias; y may be x. */
    void (*layer_norm)(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *y);

    /* a [rows][planes][words] against blocks first..last-1 of a WORDS layout. `outputs` is their total number. */
    void (*words)(const uint64_t *a, int64_t rows, int planes, int64_t words, const uint64_t *layout,
                  const int32_t *ones, int64_t first, int64_t last, int64_t outputs, const epilogue *e);
    /* NULL, or what takes the place of planes and words for codes of 2 and 4 bits: tables of 16 bytes per 4 codes,
     *   tables[16 * j + i] = sum over the 4 codes of (bit set in i ? 2^bits - 1 - code : code), j < 16 * ceil(n / 64),
     * the mismatches of these codes with signs i. The codes stand as for `planes`, the tables at a multiple of 64. */
    void (*tables)(const uint8_t *codes, int64_t n, int bits, uint8_t *tables);
    void (*lookups)(const uint8_t *tables, int64_t rows, int64_t words, const uint64_t *layout, const int32_t *ones,
                    int64_t first, int64_t last, int64_t outputs, const epilogue *e);
    /* codes [rows][4 * quads] against blocks of a QUADS layout. */
    void (*quads)(const uint8_t *codes, int64_t rows, int64_t quads, const uint64_t *layout, const int32_t *ones,
                  int64_t first, int64_t last, int64_t outputs, const epilogue *e);

    /* NULL both, or convolutions of signs by blocks, in place of `words` and a transposition. Bit i of pixels[j] =
     * x[i * stride + j] + shift[i] >= 0, for i < channels, at most 64, and j < n; other bits are clear. */
    void (*pack_pixels)(const float *x, int64_t channels, int64_t stride, int64_t n, const float *shift,
                        uint64_t *pixels);
    /* A block of outputs and one of pixels, both [words][BLOCK]. */
    void (*conv)(const uint64_t *outputs, const uint64_t *pixels, int64_t words, const conv_block *b);

    /* mismatches[j] = bits that differ between query [words] and key j, keys [words][stride]; at most 255. */
    void (*mismatches)(const uint64_t *query, const uint64_t *keys, int64_t words, int64_t stride, int64_t count,
                       uint8_t *mismatches);
    /* sum over j of table[index[j]], in 16 partial sums, so that every instruction set adds in the same order.
     * `size` entries, readable up to a multiple of 16. */
    float (*table_sum)(const float *table, int64_t size, const uint8_t *index, int64_t count);
    /* bit j = index[j] <= limit; spare bits clear; returns how many are set. */
    int64_t (*at_most)(const uint8_t *index, int64_t count, int32_t limit, uint64_t *bits);
    /* counts[i] = set bits of a [words] & b[:, i], b [words][n], n a multiple of 16. */
    void (*overlaps)(const uint64_t *a, const uint64_t *b, int64_t words, int64_t n, int32_t *counts);
    /* bit i = 2 * counts[i] - total >= limits[i], n a multiple of 16, 16 bits at a time. */
    void (*reached)(const int32_t *counts, int64_t n, int32_t total, const int32_t *limits, uint16_t *bits);
};

extern const rebnn_isa rebnn_portable;
extern const rebnn_isa rebnn_avx2;
extern const rebnn_isa rebnn_avx512;
extern const rebnn_isa rebnn_avx512vpopcnt;
extern const rebnn_isa rebnn_neon;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

#endif

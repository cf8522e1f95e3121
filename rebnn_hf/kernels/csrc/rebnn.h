/* rebnn: inference with 1-bit weights on CPUs, and the balance rule of their training. A C library without dependencies;
 * see docs/engine.md.
 *
 * Conventions
 *   - Weights are signs b in {-1, +1}, one bit each (set: +1), in the bit format of docs/format.md: row-major, one row
 *     per output, element j in bit j % 8 of byte j / 8, spare bits clear.
 *   - Activations become codes c (integers); a product sum_j c_j b_j is an exact 32-bit integer, of magnitude at most
 *     255 * inputs; REBNN_MAX_INPUTS keeps it below 2^31. All instruction sets give the same integers.
 *   - Floats are IEEE binary32. A NaN is below every threshold: its bit is 0, its code the lowest one. Infinities
 *     are ordinary. Denormals are not flushed.
 *   - Sizes are int64_t and may be 0. Pointers need the alignment of their type; layouts want 64 bytes for speed.
 *   - Every function that takes `threads` splits its work over that many threads, of which it starts threads - 1 and
 *     joins them before it returns. Nothing is kept between calls: there is no pool and no mutable global, and
 *     functions can be called from any number of threads at once.
 *   - Functions return REBNN_OK or say what is wrong; they check sizes and NULL, never the contents of buffers.
 */
#ifndef REBNN_H
#define REBNN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define REBNN_API __attribute__((visibility("default")))
#else
#define REBNN_API
#endif

#define REBNN_ABI_VERSION 3
#define REBNN_MAX_INPUTS 4194304 /* 2^22: products of 8-bit codes stay below 2^31 */
#define REBNN_MAX_THREADS 1024

typedef enum {
    REBNN_OK = 0,
    REBNN_BAD_ARGUMENT = 1, /* a size out of range, a NULL pointer, an unknown kind */
    REBNN_NO_MEMORY = 2,    /* scratch memory could not be had; outputs are undefined */
} rebnn_status;

/* ---- Instruction sets ---------------------------------------------------------------------------------------- */

/* The kernels of one instruction set; constant. */
typedef struct rebnn_isa rebnn_isa;

REBNN_API int rebnn_abi_version(void);

/* Instruction sets compiled in, best first: avx512vpopcnt, avx512, avx2, neon, portable. NULL behind the last. */
REBNN_API const char *rebnn_isa_name(int index);

/* Whether this CPU (and its operating system) runs it. */
REBNN_API int rebnn_isa_runs(const char *name);

/* The kernels of that name, or with NULL the best that run here. NULL if there are none of that name here. */
REBNN_API const rebnn_isa *rebnn_isa_find(const char *name);

/* ---- Weights ------------------------------------------------------------------------------------------------- */

/* Kernel layouts: the bits in another order, built once from the bit format, never saved.
 *   WORDS for 1-, 2- and 4-bit codes: per 16 outputs, per 64 inputs, the 64-bit words of the 16 rows.
 *   QUADS for 8-bit codes: per 16 outputs, per 4 inputs, one word with bit 4 * output + input.
 * Outputs are padded to 16 with -1; behind the words stand int32 counts of set bits, one per (padded) output. */
typedef enum { REBNN_WORDS = 0, REBNN_QUADS = 1 } rebnn_layout;

/* Bytes of a layout; -1 for bad arguments. */
REBNN_API int64_t rebnn_layout_size(rebnn_layout kind, int64_t outputs, int64_t inputs);

/* bits: [outputs][ceil(inputs / 8)] -> layout of rebnn_layout_size() bytes. */
REBNN_API rebnn_status rebnn_layout_fill(rebnn_layout kind, int64_t outputs, int64_t inputs, const uint8_t *bits,
                                         void *layout);

/* ---- Activations --------------------------------------------------------------------------------------------- */

typedef enum {
    REBNN_SIGN = 0,   /* c = +1 if x + shift >= 0, else -1; times scale */
    REBNN_LEVELS = 1, /* c = clip(floor((x + shift) / scale + 1/2), low, low + 2^bits - 1); times scale */
    REBNN_TOKEN = 2,  /* s = max|x| / 127 of the row, c = round-half-even(x / s) in -127..127; times s. bits = 8 */
} rebnn_codes;

typedef struct {
    int32_t codes;      /* a rebnn_codes */
    int32_t bits;       /* SIGN: 1; LEVELS: 1, 2, 4 (layout WORDS) or 8 (QUADS); TOKEN: 8 (QUADS) */
    int32_t low;        /* lowest code of LEVELS, from -2^(bits-1) to 0; else 0 */
    float scale;        /* a > 0; of SIGN it only multiplies the result; ignored by TOKEN */
    const float *shift; /* [inputs], or NULL; ignored by TOKEN */
} rebnn_input;

/* Codes of `rows` rows of `inputs` floats, minus `low` (TOKEN: plus 128; SIGN: 0 for -1): [rows][inputs] bytes, and
 * for TOKEN the scales [rows], else NULL. What rebnn_linear computes first, to look at and to test. */
REBNN_API rebnn_status rebnn_encode(const rebnn_isa *isa, int64_t rows, int64_t inputs, const float *x,
                                    const rebnn_input *input, uint8_t *codes, float *token_scale);

/* ---- Products ------------------------------------------------------------------------------------------------ */

/* y = (c b^T) * (weight_scale * input scale) + bias.
 *   x [rows][inputs] floats, contiguous; layout of the kind that input->bits calls for; weight_scale [outputs];
 *   bias [outputs] or NULL; y [rows][outputs], written entirely. The product is an exact integer, converted to float
 *   (exact up to 2^24), multiplied, then added: two roundings. */
REBNN_API rebnn_status rebnn_linear(const rebnn_isa *isa, int threads, int64_t rows, int64_t inputs, int64_t outputs,
                                    const float *x, const rebnn_input *input, const void *layout,
                                    const float *weight_scale, const float *bias, float *y);

/* Rows of a 1-bit table: y[i] = scale[index[i]] * b[index[i]], y [count][width].
 *   bits in the bit format [entries][ceil(width / 8)], scale [entries]. An index outside 0..entries-1 is a
 *   REBNN_BAD_ARGUMENT, and y is undefined. */
REBNN_API rebnn_status rebnn_embedding(int threads, int64_t count, int64_t entries, int64_t width,
                                       const int64_t *index, const uint8_t *bits, const float *scale, float *y);

/* What makes a unit of a residual network of a convolution, in the same pass over its outputs: shortcut and RPReLU,
 *   z = y + shortcut + shift_in,  y = (z > 0 ? z : slope * z) + shift_out. */
typedef struct {
    const float *shortcut;                     /* of the shape of y; may not overlap it */
    const float *shift_in, *slope, *shift_out; /* [outputs] */
} rebnn_residual;

/* 2-D convolution (cross-correlation), y = (products of the windows) * (weight_scale * input scale) + bias.
 *   x [batch][channels][height][width]; y [batch][outputs][out_h][out_w], where out_h is
 *   floor((height + 2 pad_h - kernel_h) / stride_h) + 1, at least 1, and out_w alike.
 *   input: SIGN or LEVELS, shift [channels]. Codes, rounding and the other arguments are those of rebnn_linear. A
 *   padded position adds 0 to the product: it is neither +1 nor -1, and no shift is added to it.
 *   layout: of rebnn_conv_layout_fill, of the kind that input->bits calls for.
 *   residual: what follows; NULL: nothing. Every operation of it rounds. */
REBNN_API rebnn_status rebnn_conv2d(const rebnn_isa *isa, int threads, int64_t batch, int64_t channels, int64_t height,
                                    int64_t width, int64_t outputs, int64_t kernel_h, int64_t kernel_w,
                                    int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, const float *x,
                                    const rebnn_input *input, const void *layout, const float *weight_scale,
                                    const float *bias, const rebnn_residual *residual, float *y);

/* The layout of a convolution is that of a linear layer whose inputs are the kernel's positions, row by row, each with
 * its channels, padded with -1 to whole words (WORDS: 64, QUADS: 4). At most REBNN_MAX_INPUTS with the padding.
 * Bytes; -1 for bad arguments. */
REBNN_API int64_t rebnn_conv_layout_size(rebnn_layout kind, int64_t outputs, int64_t channels, int64_t kernel_h,
                                         int64_t kernel_w);

/* bits: [outputs][ceil(channels * kernel_h * kernel_w / 8)], the elements of a row [channels][kernel_h][kernel_w]. */
REBNN_API rebnn_status rebnn_conv_layout_fill(rebnn_layout kind, int64_t outputs, int64_t channels, int64_t kernel_h,
                                              int64_t kernel_w, const uint8_t *bits, void *layout);

/* ---- Attention ----------------------------------------------------------------------------------------------- */

/* Attention over signs of queries, keys and values, with few-bit probabilities {0, 1}; sign(x) = +1 where x >= 0.
 *   query, key, value [batch][heads][length][head], head a multiple of 16 from 16 to 240;
 *   mask [batch][length] bytes: 0 for keys that do not count; NULL: all count.
 *   Key j counts for query i where table[m] >= threshold * sum over all keys of theirs, m the number of features in
 *   which their signs differ; table [head + 1] is exp(score) for m = 0..head, not rising (so probabilities are softmax).
 *   Without table: where m <= head / 2, that is where the product of signs is not negative.
 *   context [batch][length][heads][head] = scale * (sum of the signs of the values that count). */
REBNN_API rebnn_status rebnn_attention(const rebnn_isa *isa, int threads, int64_t batch, int64_t heads, int64_t length,
                                       int64_t head, const float *query, const float *key, const float *value,
                                       const uint8_t *mask, const float *table, float threshold, float scale,
                                       float *context);

/* ---- Encoders ------------------------------------------------------------------------------------------------ */

/* A stack of BERT layers (post-LayerNorm) with 1-bit weights, activations and attention, as one call.
 *
 * image: one buffer, see encoder.h for its fields; made by rebnn_hf/kernels/image.py.
 * hidden [sequences][length][width]: in and out. mask [sequences][length] bytes: 0 for padding; NULL: no padding.
 * Padded positions cost nothing and come out as zeros. */
REBNN_API rebnn_status rebnn_encoder(const rebnn_isa *isa, int threads, int64_t sequences, int64_t length,
                                     const uint8_t *mask, const void *image, int64_t image_size, float *hidden);

/* ---- Training ------------------------------------------------------------------------------------------------- */

/* Passes over latent weights [rows][width], in the order of a step. mean [rows] is what centering subtracts; NULL: 0.
 * The bytes of `signs` are 0 or 1; the sign of a NaN is 0.
 *
 * Before the step: signs = (weight - mean >= 0), [rows][width]; largest [rows] = max |gradient| of the row, NaN if it
 * holds one. */
REBNN_API rebnn_status rebnn_balance_measure(int threads, int64_t rows, int64_t width, const float *weight,
                                             const float *mean, const float *gradient, uint8_t *signs, float *largest);

/* gradient += gamma * (weight - scale * b), b in {-1, +1} the sign of the weight, each operation rounded; and
 * norm [rows] = sum |weight|. Rows whose gamma is 0 are not read, and their norm is 0. */
REBNN_API rebnn_status rebnn_balance_pull(int threads, int64_t rows, int64_t width, const float *weight,
                                          const float *scale, const float *gamma, float *gradient, float *norm);

/* After the step: signs ^= (weight - mean >= 0), that is, which have changed; flips [rows], how many; flips_back
 * [rows], how many of those that `earlier` [rows][width] has changed before (NULL: 0). width is below 2^31. */
REBNN_API rebnn_status rebnn_balance_count(int threads, int64_t rows, int64_t width, const float *weight,
                                           const float *mean, uint8_t *signs, const uint8_t *earlier, int32_t *flips,
                                           int32_t *flips_back);

/* ---- Measuring ----------------------------------------------------------------------------------------------- */

/* Multiplies and accumulates 1-bit codes and weights that stay in the first-level cache, at least `products` times on
 * one thread, without encoding, memory or results in floats: timed, the most that this CPU can reach with these kernels.
 * Returns how many there were (0 without isa). */
REBNN_API int64_t rebnn_ceiling(const rebnn_isa *isa, int64_t products);

#ifdef __cplusplus
}
#endif
#endif

/* The image of an encoder: what rebnn_encoder reads. Internal; written by rebnn_hf/kernels/image.py.
 *
 *   int64 header[HEADER]; int64 offset[layers][FIELDS]; then the fields, each from a multiple of 64 bytes on, at
 *   `offset` bytes from the start of the image.
 *
 * Bits of queries, keys, values and of the inner feed-forward activations are a function of the number of inputs whose
 * bit differs from that of the weight: 1 for at most `few` or at least `many` of them. (By monotonicity, or for a GELU
 * with its one minimum.) So everything between two LayerNorms is integers. */
#ifndef REBNN_ENCODER_H
#define REBNN_ENCODER_H

enum { IMAGE_MAGIC = 0x4e4e4252 /* "RBNN" */, IMAGE_VERSION = 1 };

enum { MAGIC, VERSION, LAYERS, WIDTH, HEADS, HEAD, INNER, LAYER_FIELDS, HEADER = 16 };

enum {
    /* Three projections: bit j of the input is x[j] + shift[j] >= 0; WORDS layout; int32 limits padded to 16. */
    QUERY_SHIFT, QUERY_LAYOUT, QUERY_FEW, QUERY_MANY,
    KEY_SHIFT, KEY_LAYOUT, KEY_FEW, KEY_MANY,
    VALUE_SHIFT, VALUE_LAYOUT, VALUE_FEW, VALUE_MANY,
    /* Attention: key j counts where exp(score) >= threshold * sum of them; table [head + 1] of exp(score) by the number
     * of bits in which query and key differ. Without table (offset 0): where at most half of the bits differ. */
    TABLE, THRESHOLD,
    /* Its output: bit j of the input is context[j] >= CONTEXT[j] (int32). */
    CONTEXT, OUTPUT_LAYOUT, OUTPUT_SCALE, OUTPUT_BIAS, OUTPUT_NORM_WEIGHT, OUTPUT_NORM_BIAS, OUTPUT_EPS,
    /* Feed-forward block. The codes of its second half are 0 and 1 if *INNER_UNSIGNED (int32), else -1 and 1. */
    INNER_SHIFT, INNER_LAYOUT, INNER_FEW, INNER_MANY,
    INNER_UNSIGNED, OUTER_LAYOUT, OUTER_SCALE, OUTER_BIAS, OUTER_NORM_WEIGHT, OUTER_NORM_BIAS, OUTER_EPS,
    FIELDS
};

#endif

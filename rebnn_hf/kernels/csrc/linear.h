/* The two halves of a linear layer, for the calls that join several. Internal. */
#ifndef REBNN_LINEAR_H
#define REBNN_LINEAR_H

#include "isa.h"

int valid_input(const rebnn_input *input);

/* How counts become products of codes with signs; the caller fills in where they go. */
epilogue products(const rebnn_input *input, int64_t inputs);

/* Arrays that hold the codes of a row: one per bit for planes, else one. */
int code_arrays(const rebnn_isa *isa, const rebnn_input *input);

/* Bytes of the codes of a row, as the kernels read them: planes of 64-bit words, tables, or a byte per code. */
int64_t code_bytes(const rebnn_isa *isa, const rebnn_input *input, int64_t inputs);

/* Codes of a row from bytes, which stand in a multiple of 64 with zeros behind the last one. */
void arrange(const rebnn_isa *isa, int64_t inputs, int bits, const uint8_t *bytes, uint8_t *codes);

/* Codes of rows of x [rows][inputs]; `bytes` is scratch for one row, a multiple of 64 bytes,
 * token_scale [rows] is for TOKEN. */
void encode(const rebnn_isa *isa, int64_t rows, int64_t inputs, const float *x, const rebnn_input *input,
            uint8_t *bytes, void *codes, float *token_scale);

/* Products with blocks [first, last) of outputs. */
void multiply(const rebnn_isa *isa, int64_t rows, int64_t inputs, int64_t outputs, int bits, const void *codes,
              const void *layout, int64_t first, int64_t last, const epilogue *e);

#endif

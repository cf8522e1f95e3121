/* Kernel layouts from the bit format; see rebnn.h for what they are. */
#include <string.h>

#include "isa.h"

static int valid(rebnn_layout kind, int64_t outputs, int64_t inputs)
{
    return (kind == REBNN_WORDS || kind == REBNN_QUADS) && outputs >= 0 && outputs <= INT32_MAX - BLOCK && inputs >= 0 &&
           inputs <= REBNN_MAX_INPUTS;
}

/* 64-bit words of a block of outputs. */
static int64_t block_words(rebnn_layout kind, int64_t inputs)
{
    return kind == REBNN_WORDS ? ceil_div(inputs, 64) * BLOCK : ceil_div(inputs, 4);
}

int64_t rebnn_layout_size(rebnn_layout kind, int64_t outputs, int64_t inputs)
{
    if (!valid(kind, outputs, inputs))
        return -1;
    int64_t blocks = ceil_div(outputs, BLOCK);
    return blocks * (block_words(kind, inputs) * 8 + BLOCK * 4);
}

static uint64_t word_of(const uint8_t *row, int64_t bytes, int64_t k)
{
    uint64_t word = 0;
    for (int64_t j = 0; j < 8 && 8 * k + j < bytes; j++)
        word |= (uint64_t)row[8 * k + j] << (8 * j);
    return word;
}

rebnn_status rebnn_layout_fill(rebnn_layout kind, int64_t outputs, int64_t inputs, const uint8_t *bits, void *layout)
{
    if (!valid(kind, outputs, inputs) || (outputs && (!layout || (!bits && inputs))))
        return REBNN_BAD_ARGUMENT;
    int64_t size = rebnn_layout_size(kind, outputs, inputs);
    if (size)
        memset(layout, 0, (size_t)size);
    int64_t bytes = ceil_div(inputs, 8), blocks = ceil_div(outputs, BLOCK), width = block_words(kind, inputs);
    uint64_t *words = layout;
    int32_t *ones = (int32_t *)(words + blocks * width);
    for (int64_t o = 0; o < outputs; o++) {
        const uint8_t *row = bits + o * bytes;
        uint64_t *block = words + o / BLOCK * width;
        for (int64_t k = 0; k < ceil_div(inputs, 64); k++) {
            uint64_t word = word_of(row, bytes, k);
            ones[o] += __builtin_popcountll(word);
            if (kind == REBNN_WORDS) {
                block[k * BLOCK + o % BLOCK] = word;
                continue;
            }
            for (int64_t q = 0; q < 16 && 16 * k + q < width; q++)
                block[16 * k + q] |= (word >> (4 * q) & 15) << (4 * (o % BLOCK));
        }
    }
    return REBNN_OK;
}

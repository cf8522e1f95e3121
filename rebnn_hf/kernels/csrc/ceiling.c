/* How fast 1-bit products are where nothing but the inner loop takes time. */
#include <string.h>

#include "isa.h"

/* Codes of 24 KiB and weights of 6: both stay in the first-level cache. */
enum { CEILING_ROWS = 64, CEILING_WORDS = 48 };

int64_t rebnn_ceiling(const rebnn_isa *isa, int64_t products)
{
    const int64_t once = CEILING_ROWS * CEILING_WORDS * 64 * BLOCK, offset = 0;
    static const uint64_t codes[CEILING_ROWS * CEILING_WORDS] __attribute__((aligned(64)));
    static const uint64_t weights[CEILING_WORDS * BLOCK] __attribute__((aligned(64)));
    static const int32_t limits[BLOCK];
    uint16_t bits[CEILING_ROWS];
    epilogue e = {.few = limits, .many = limits, .bits = bits, .bits_stride = 1, .block_offset = &offset};
    int64_t done = 0;
    if (isa)
        for (; done < products; done += once)
            isa->words(codes, CEILING_ROWS, 1, CEILING_WORDS, weights, limits, 0, 1, BLOCK, &e);
    return done;
}

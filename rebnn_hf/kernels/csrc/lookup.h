/* Products of bits for CPUs without a vector population count: 4 weights of many outputs look up a table of 16 bytes,
 * which 4 bits of the row choose. The file that includes this defines a vector V of V_LANES 128-bit lanes, each of them
 * with the 16 outputs of a block, and its operations; ROWS_AT_ONCE and VECTORS shape the tile; for fewer rows than
 * FEW_ROWS, the nibbles of the weights are not worth making. Internal. */
#ifndef REBNN_LOOKUP_H
#define REBNN_LOOKUP_H

#include <string.h>

enum {
    TILE_BLOCKS = V_LANES * VECTORS,
    CHUNK_WORDS = 12, /* the nibbles of that many words of the blocks stay in the first-level cache */
    CHUNK_ROWS = 64,  /* rows for which nibbles are made once */
    SUM_WORDS = 3,    /* 48 lookups of at most 4 fit into a byte */
};

/* mismatches[i][j]: bits in which i and j differ. */
#define ROW(i) \
    {B(i ^ 0), B(i ^ 1), B(i ^ 2), B(i ^ 3), B(i ^ 4), B(i ^ 5), B(i ^ 6), B(i ^ 7), B(i ^ 8), B(i ^ 9), B(i ^ 10), \
     B(i ^ 11), B(i ^ 12), B(i ^ 13), B(i ^ 14), B(i ^ 15)}
#define B(x) (((x) & 1) + ((x) >> 1 & 1) + ((x) >> 2 & 1) + ((x) >> 3 & 1))
static const uint8_t bit_mismatches[16][16] __attribute__((aligned(64))) = {
    ROW(0), ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6), ROW(7),
    ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13), ROW(14), ROW(15),
};
#undef ROW
#undef B

/* nibbles[VECTORS * i]: inputs 4 * i to 4 * i + 3 of the outputs of V_LANES blocks, a byte per output. */
static void nibbles_of(const uint64_t *const *blocks, int64_t words, V *nibbles)
{
    const V pairs = V_SAME(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)), low = V_BYTES(15);
    for (int64_t k = 0; k < words; k++) { /* in each lane, the 16 x 8 bytes of 16 words are transposed */
        V two[8], four[8], eight[8];
        for (int i = 0; i < 8; i++)
            two[i] = V_SHUFFLE(v_lanes(blocks, k * BLOCK + 2 * i), pairs);
        for (int i = 0; i < 4; i++) {
            four[i] = V_LOW16(two[2 * i], two[2 * i + 1]);
            four[4 + i] = V_HIGH16(two[2 * i], two[2 * i + 1]);
        }
        for (int i = 0; i < 4; i++) {
            eight[2 * i] = V_LOW32(four[2 * i], four[2 * i + 1]);
            eight[2 * i + 1] = V_HIGH32(four[2 * i], four[2 * i + 1]);
        }
        for (int i = 0; i < 8; i++) {
            V left = eight[i / 4 * 4 + i / 2 % 2], right = eight[i / 4 * 4 + i / 2 % 2 + 2];
            V bytes = i % 2 ? V_HIGH64(left, right) : V_LOW64(left, right);
            nibbles[(16 * k + 2 * i) * VECTORS] = V_AND(bytes, low);
            nibbles[(16 * k + 2 * i + 1) * VECTORS] = V_AND(V_RIGHT4(bytes), low);
        }
    }
}

/* Where the table of every 4 bits of a row stands in bit_mismatches: here for all outputs, not in the loop over them. */
static void tables_of(const uint64_t *a, int64_t words, uint8_t *tables)
{
    const uint8_t *bytes = (const uint8_t *)a;
    for (int64_t i = 0; i < 8 * words; i++) {
        tables[2 * i] = (uint8_t)(bytes[i] << 4);
        tables[2 * i + 1] = bytes[i] & 0xf0;
    }
}

/* Adds the mismatches of ROWS rows from `row` on to counts[block][row]. ROWS is constant in each copy. */
static inline __attribute__((always_inline)) void lookup_tile(const int ROWS, const uint8_t (*tables)[CHUNK_WORDS * 16],
                                                              int64_t row, int64_t words, const V *nibbles,
                                                              int32_t (*counts)[CHUNK_ROWS][BLOCK])
{
    /* 16-bit sums: outputs 0 to 7 of every lane, then outputs 8 to 15. */
    V sums[ROWS_AT_ONCE][VECTORS][2];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            sums[r][v][0] = sums[r][v][1] = V_ZERO;
    for (int64_t start = 0; start < words; start += SUM_WORDS) {
        int64_t stop = start + SUM_WORDS < words ? start + SUM_WORDS : words;
        V bytes[ROWS_AT_ONCE][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                bytes[r][v] = V_ZERO;
        for (int64_t i = 16 * start; i < 16 * stop; i += 2)
            for (int64_t j = i; j < i + 2; j++)
                for (int r = 0; r < ROWS; r++) {
                    const uint8_t *entries = &bit_mismatches[0][0] + tables[row + r][j];
                    V table = V_SAME(_mm_load_si128((const __m128i *)entries));
                    for (int v = 0; v < VECTORS; v++)
                        bytes[r][v] = V_ADD8(bytes[r][v], V_SHUFFLE(table, nibbles[VECTORS * j + v]));
                }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) {
                sums[r][v][0] = V_ADD16(sums[r][v][0], V_LOW8(bytes[r][v], V_ZERO));
                sums[r][v][1] = V_ADD16(sums[r][v][1], V_HIGH8(bytes[r][v], V_ZERO));
            }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
            uint16_t eights[2][V_LANES][8];
            memcpy(eights, sums[r][v], sizeof eights);
            for (int lane = 0; lane < V_LANES; lane++)
                for (int i = 0; i < BLOCK; i++)
                    counts[v * V_LANES + lane][row + r][i] += eights[i / 8][lane][i % 8];
        }
}

static inline void combine_planes(int32_t (*counts)[BLOCK], int64_t rows, int planes);
static inline void finish(const int32_t (*counts)[BLOCK], int64_t m, int64_t rows, int64_t block, const int32_t *ones,
                          int64_t outputs, const epilogue *e);

#define HAS_LOOKUP
static void words_by_lookup(const uint64_t *a, int64_t rows, int planes, int64_t words, const uint64_t *layout,
                            const int32_t *ones, int64_t first, int64_t last, int64_t outputs, const epilogue *e)
{
    int32_t counts[TILE_BLOCKS][CHUNK_ROWS][BLOCK] __attribute__((aligned(64)));
    V nibbles[CHUNK_WORDS * 16 * VECTORS];
    uint8_t tables[CHUNK_ROWS][CHUNK_WORDS * 16];
    int64_t step = CHUNK_ROWS / planes;
    for (int64_t block = first; block < last; block += TILE_BLOCKS) {
        int64_t blocks = last - block < TILE_BLOCKS ? last - block : TILE_BLOCKS;
        for (int64_t m = 0; m < rows; m += step) {
            int64_t count = rows - m < step ? rows - m : step, n = count * planes;
            memset(counts, 0, sizeof counts);
            for (int64_t k = 0; k < words; k += CHUNK_WORDS) {
                int64_t some = words - k < CHUNK_WORDS ? words - k : CHUNK_WORDS, r = 0;
                const uint64_t *weights[TILE_BLOCKS];
                for (int64_t i = 0; i < n; i++)
                    tables_of(a + (m * planes + i) * words + k, some, tables[i]);
                for (int64_t b = 0; b < TILE_BLOCKS; b++) /* blocks that are not there: another one for nothing */
                    weights[b] = layout + ((block + (b < blocks ? b : 0)) * words + k) * BLOCK;
                for (int v = 0; v < VECTORS; v++)
                    nibbles_of(weights + v * V_LANES, some, nibbles + v);
                for (; r + ROWS_AT_ONCE <= n; r += ROWS_AT_ONCE)
                    lookup_tile(ROWS_AT_ONCE, (const uint8_t(*)[CHUNK_WORDS * 16])tables, r, some, nibbles, counts);
                for (; r < n; r++)
                    lookup_tile(1, (const uint8_t(*)[CHUNK_WORDS * 16])tables, r, some, nibbles, counts);
            }
            for (int64_t b = 0; b < blocks; b++) {
                if (planes > 1)
                    combine_planes(counts[b], count, planes);
                finish((const int32_t(*)[BLOCK])counts[b], m, count, block + b, ones, outputs, e);
            }
        }
    }
}

#endif

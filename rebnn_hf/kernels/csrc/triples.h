/* Products of bits, three words at a time, for AVX-512 with VPOPCNTDQ. Internal.
 *
 * With d_i = a_i ^ w_i the mismatches of three words are popcount(s) + 2 popcount(c), where s = d_1 ^ d_2 ^ d_3 is the
 * sum of their bits and c = majority(d_1, d_2, d_3) the carry. s is also (a_1 ^ a_2 ^ a_3) ^ (w_1 ^ w_2 ^ w_3), both of
 * which are known before, and c = majority(d_1, d_2, s ^ d_1 ^ d_2) is one instruction: 8 where a word after the other
 * takes 9 (3 XOR, 3 popcounts, 3 additions).
 */
#ifndef REBNN_TRIPLES_H
#define REBNN_TRIPLES_H

/* Rows and triples whose XORs are kept at a time; longer rows are multiplied word by word. */
enum { TRIPLE_ROWS = 32, TRIPLES = 48, CARRY = 0xd4 /* of d_1, d_2, s: their majority with s ^ d_1 ^ d_2 */ };

/* XOR of each three words of rows [rows][words]. */
static void xor_triples(const uint64_t *a, int64_t rows, int64_t words, uint64_t (*sums)[TRIPLES])
{
    for (int64_t r = 0; r < rows; r++, a += words)
        for (int64_t t = 0; t < words / 3; t++)
            sums[r][t] = a[3 * t] ^ a[3 * t + 1] ^ a[3 * t + 2];
}

static inline __m512i of_all(uint64_t word) { return _mm512_set1_epi64((long long)word); }

/* Adds the mismatches of triple t of rows and half a block to their sums, or with BEGIN puts them there. Word k of row r
 * is a[r * row + k * STEP], the XOR of its triple t sums[r * sums_row + t * STEP]. */
static inline __attribute__((always_inline)) void triple_step(const int ROWS, const int STEP, const int BEGIN, int64_t t,
                                                              const uint64_t *a, int64_t row, const uint64_t *sums,
                                                              int64_t sums_row, const uint64_t *block, __m512i *ones,
                                                              __m512i *twos)
{
    int64_t k = 3 * t;
    __m512i w0 = _mm512_loadu_si512(block + k * BLOCK), w1 = _mm512_loadu_si512(block + (k + 1) * BLOCK);
    __m512i w2 = _mm512_loadu_si512(block + (k + 2) * BLOCK);
    __m512i w = _mm512_ternarylogic_epi64(w0, w1, w2, 0x96);
    for (int r = 0; r < ROWS; r++) {
        __m512i d0 = _mm512_xor_si512(of_all(a[r * row + k * STEP]), w0);
        __m512i d1 = _mm512_xor_si512(of_all(a[r * row + (k + 1) * STEP]), w1);
        __m512i s = _mm512_xor_si512(of_all(sums[r * sums_row + t * STEP]), w);
        __m512i one = _mm512_popcnt_epi64(s);
        ones[r] = BEGIN ? one : _mm512_add_epi64(ones[r], one);
        __m512i two = _mm512_popcnt_epi64(_mm512_ternarylogic_epi64(d0, d1, s, CARRY));
        twos[r] = BEGIN ? two : _mm512_add_epi64(twos[r], two);
    }
}

/* Mismatches of rows with half a block, 8 outputs; words and XORs as in triple_step. With BEGIN the first triple begins
 * the sums in place of zeros, which pays where rows are short. ROWS, STEP and BEGIN are constant in each copy. */
static inline __attribute__((always_inline)) void triple_half(const int ROWS, const int STEP, const int BEGIN,
                                                              const uint64_t *a, int64_t row, int64_t words,
                                                              int64_t triples, const uint64_t *sums, int64_t sums_row,
                                                              const uint64_t *block, __m512i *counts)
{
    __m512i ones[8], twos[8];
    int64_t begun = BEGIN && triples;
    if (begun)
        triple_step(ROWS, STEP, 1, 0, a, row, sums, sums_row, block, ones, twos);
    else
#pragma GCC unroll 8 /* else gcc keeps the sums in memory */
        for (int r = 0; r < ROWS; r++)
            ones[r] = twos[r] = _mm512_setzero_si512();
    /* The words left over come first: behind the loop, gcc copies every sum in every step. */
    for (int64_t k = 3 * triples; k < words; k++) {
        __m512i w = _mm512_loadu_si512(block + k * BLOCK);
        for (int r = 0; r < ROWS; r++)
            ones[r] = _mm512_add_epi64(ones[r], _mm512_popcnt_epi64(_mm512_xor_si512(of_all(a[r * row + k * STEP]), w)));
    }
    for (int64_t t = begun; t < triples; t++)
        triple_step(ROWS, STEP, 0, t, a, row, sums, sums_row, block, ones, twos);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        counts[r] = _mm512_dpwssd_epi32(ones[r], twos[r], _mm512_set1_epi32(2)); /* counts are below 2^15 */
}

/* Sixteen counts of two times eight. */
static inline __m512i both_halves(__m512i left, __m512i right)
{
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(left, evens, right);
}

static inline __attribute__((always_inline)) void triple_tile(const int ROWS, const uint64_t *a, int64_t words,
                                                              const uint64_t (*sums)[TRIPLES], const uint64_t *block,
                                                              int32_t (*counts)[BLOCK])
{
    __m512i left[8], right[8];
    triple_half(ROWS, 1, 0, a, words, words, words / 3, sums[0], TRIPLES, block, left);
    triple_half(ROWS, 1, 0, a, words, words, words / 3, sums[0], TRIPLES, block + 8, right);
    for (int r = 0; r < ROWS; r++)
        _mm512_store_si512(counts[r], both_halves(left[r], right[r]));
}

static inline void finish(const int32_t (*counts)[BLOCK], int64_t m, int64_t rows, int64_t block, const int32_t *ones,
                          int64_t outputs, const epilogue *e);

/* `words` with one plane, for rows of 3 to 3 * TRIPLES + 2 words. */
static void words_by_triples(const uint64_t *a, int64_t rows, int64_t words, const uint64_t *layout,
                             const int32_t *ones, int64_t first, int64_t last, int64_t outputs, const epilogue *e)
{
    uint64_t sums[TRIPLE_ROWS][TRIPLES];
    int32_t counts[8][BLOCK] __attribute__((aligned(64)));
    const uint64_t (*xors)[TRIPLES] = (const uint64_t (*)[TRIPLES])sums;
    for (int64_t from = 0; from < rows; from += TRIPLE_ROWS) {
        int64_t end = from + TRIPLE_ROWS < rows ? from + TRIPLE_ROWS : rows;
        xor_triples(a + from * words, end - from, words, sums);
        for (int64_t block = first; block < last; block++) {
            const uint64_t *weights = layout + block * words * BLOCK;
            for (int64_t m = from, count; m < end; m += count) {
                const uint64_t *row = a + m * words;
                count = end - m >= 8 ? 8 : end - m >= 4 ? 4 : 1;
                if (count == 8)
                    triple_tile(8, row, words, xors + m - from, weights, counts);
                else if (count == 4)
                    triple_tile(4, row, words, xors + m - from, weights, counts);
                else
                    triple_tile(1, row, words, xors + m - from, weights, counts);
                finish((const int32_t(*)[BLOCK])counts, m, count, block, ones, outputs, e);
            }
        }
    }
}

#endif

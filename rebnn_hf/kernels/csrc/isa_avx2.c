/* AVX2: Haswell to Raptor Lake, Zen to Zen 3. */
#include <immintrin.h>
#include <string.h>

#include "isa.h"

#define V __m256i
#define V_LANES 2
#define VECTORS 2
#define ROWS_AT_ONCE 3
#define FEW_ROWS 2
#define V_ZERO _mm256_setzero_si256()
#define V_BYTES(x) _mm256_set1_epi8(x)
#define V_SAME(x) _mm256_broadcastsi128_si256(x)
#define V_SHUFFLE(table, index) _mm256_shuffle_epi8(table, index)
#define V_AND(a, b) _mm256_and_si256(a, b)
#define V_RIGHT4(a) _mm256_srli_epi16(a, 4)
#define V_ADD8(a, b) _mm256_add_epi8(a, b)
#define V_ADD16(a, b) _mm256_add_epi16(a, b)
#define V_LOW8(a, b) _mm256_unpacklo_epi8(a, b)
#define V_HIGH8(a, b) _mm256_unpackhi_epi8(a, b)
#define V_LOW16(a, b) _mm256_unpacklo_epi16(a, b)
#define V_HIGH16(a, b) _mm256_unpackhi_epi16(a, b)
#define V_LOW32(a, b) _mm256_unpacklo_epi32(a, b)
#define V_HIGH32(a, b) _mm256_unpackhi_epi32(a, b)
#define V_LOW64(a, b) _mm256_unpacklo_epi64(a, b)
#define V_HIGH64(a, b) _mm256_unpackhi_epi64(a, b)

/* The words at `at` and behind it of two blocks. */
static inline __m256i v_lanes(const uint64_t *const *blocks, int64_t at)
{
    __m128i first = _mm_loadu_si128((const __m128i *)(blocks[0] + at));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm_loadu_si128((const __m128i *)(blocks[1] + at)), 1);
}

#include "lookup.h"

/* Eight floats, or those that are left and zeros. */
static inline __m256 eight_of(const float *x, int64_t left)
{
    if (left >= 8)
        return _mm256_loadu_ps(x);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)left), lane));
}

#define HAS_PACK
static void pack(const float *x, int64_t n, const float *shift, float threshold, uint64_t *bits)
{
    const __m256 limit = _mm256_set1_ps(threshold);
    for (int64_t start = 0; start < n; start += 64) {
        uint64_t word = 0;
        for (int64_t j = 0; j < 64 && start + j < n; j += 8) {
            __m256 value = eight_of(x + start + j, n - start - j);
            if (shift)
                value = _mm256_add_ps(value, eight_of(shift + start + j, n - start - j));
            word |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(value, limit, _CMP_GE_OQ)) << j;
        }
        if (n - start < 64) /* zeros reach a threshold below them */
            word &= (1ull << (n - start)) - 1;
        bits[start / 64] = word;
    }
}

/* Eight codes to bytes; the last ones through a buffer. */
static inline void store_codes(uint8_t *codes, int64_t left, __m256i values)
{
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    uint64_t bytes = (uint64_t)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    memcpy(codes, &bytes, left < 8 ? (size_t)left : 8);
}

#define HAS_LEVELS
static void levels(const float *x, int64_t n, const float *shift, float scale, int32_t low, int32_t high, uint8_t *codes)
{
    const __m256 lowest = _mm256_set1_ps((float)low), highest = _mm256_set1_ps((float)high);
    for (int64_t j = 0; j < n; j += 8) {
        __m256 value = eight_of(x + j, n - j);
        if (shift)
            value = _mm256_add_ps(value, eight_of(shift + j, n - j));
        value = _mm256_floor_ps(_mm256_add_ps(_mm256_div_ps(value, _mm256_set1_ps(scale)), _mm256_set1_ps(0.5f)));
        value = _mm256_min_ps(_mm256_max_ps(value, lowest), highest); /* max takes the second of NaN and a number */
        store_codes(codes + j, n - j, _mm256_sub_epi32(_mm256_cvttps_epi32(value), _mm256_set1_epi32(low)));
    }
}

#define HAS_TOKEN
static float token(const float *x, int64_t n, uint8_t *codes)
{
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 largest = _mm256_setzero_ps();
    for (int64_t j = 0; j < n; j += 8)
        largest = _mm256_max_ps(_mm256_and_ps(eight_of(x + j, n - j), magnitude), largest);
    float eight[8], scale = 0;
    _mm256_storeu_ps(eight, largest);
    for (int i = 0; i < 8; i++)
        scale = eight[i] > scale ? eight[i] : scale;
    scale /= 127;
    scale = scale > 1.17549435e-38f ? scale : 1.17549435e-38f;
    for (int64_t j = 0; j < n; j += 8) {
        __m256 value = _mm256_div_ps(eight_of(x + j, n - j), _mm256_set1_ps(scale));
        value = _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        value = _mm256_min_ps(_mm256_max_ps(value, _mm256_set1_ps(-127)), _mm256_set1_ps(127));
        store_codes(codes + j, n - j, _mm256_add_epi32(_mm256_cvttps_epi32(value), _mm256_set1_epi32(128)));
    }
    return scale;
}

#define HAS_PLANES
static void planes(const uint8_t *codes, int64_t n, int bits, uint64_t *result)
{
    int64_t words = ceil_div(n, 64);
    for (int64_t k = 0; k < words; k++) {
        __m256i low = _mm256_loadu_si256((const __m256i *)(codes + 64 * k));
        __m256i high = _mm256_loadu_si256((const __m256i *)(codes + 64 * k + 32));
        for (int p = 0; p < bits; p++) { /* the mask takes the top bit of each byte */
            __m128i left = _mm_cvtsi32_si128(7 - p);
            uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_sll_epi16(low, left));
            uint32_t second = (uint32_t)_mm256_movemask_epi8(_mm256_sll_epi16(high, left));
            result[p * words + k] = (uint64_t)second << 32 | first;
        }
    }
}

/* Bits of 4 inputs of 16 outputs become bytes +1 and -1, for all rows of a chunk; 64 sums of two products with codes of at
 * most 255 fit into 16 bits. */
enum { SIGN_STEPS = 64, SIGN_ROWS = 96 };

static void signs_of(const uint64_t *quads, int64_t steps, __m256i *signs)
{
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201), one = _mm256_set1_epi8(1);
    for (int64_t i = 0; i < 2 * steps; i++) {
        int32_t eight;
        memcpy(&eight, (const char *)quads + 4 * i, 4);
        __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(eight), byte), bit);
        signs[i] = _mm256_or_si256(_mm256_cmpeq_epi8(bits, _mm256_setzero_si256()), one);
    }
}

/* Adds the products of ROWS rows from `row` on to their counts, which they begin or not. ROWS is constant in each copy. */
static inline __attribute__((always_inline)) void sign_tile(const int ROWS, const uint8_t *codes, int64_t stride,
                                                            int64_t steps, const __m256i *signs, int64_t row, int begin,
                                                            int32_t (*counts)[BLOCK])
{
    __m256i left[4], right[4];
    for (int r = 0; r < ROWS; r++)
        left[r] = right[r] = _mm256_setzero_si256();
    for (int64_t q = 0; q < steps; q++)
        for (int r = 0; r < ROWS; r++) {
            int32_t four;
            memcpy(&four, codes + (row + r) * stride + 4 * q, 4);
            left[r] = _mm256_add_epi16(left[r], _mm256_maddubs_epi16(_mm256_set1_epi32(four), signs[2 * q]));
            right[r] = _mm256_add_epi16(right[r], _mm256_maddubs_epi16(_mm256_set1_epi32(four), signs[2 * q + 1]));
        }
    for (int r = 0; r < ROWS; r++) {
        __m256i *at = (__m256i *)counts[row + r], one = _mm256_set1_epi16(1);
        left[r] = _mm256_madd_epi16(left[r], one);
        right[r] = _mm256_madd_epi16(right[r], one);
        _mm256_store_si256(at, begin ? left[r] : _mm256_add_epi32(_mm256_load_si256(at), left[r]));
        _mm256_store_si256(at + 1, begin ? right[r] : _mm256_add_epi32(_mm256_load_si256(at + 1), right[r]));
    }
}

#define HAS_QUAD_TILE
#define HAS_QUADS
static void quads(const uint8_t *codes, int64_t rows, int64_t quads, const uint64_t *layout, const int32_t *ones,
                  int64_t first, int64_t last, int64_t outputs, const epilogue *e)
{
    __m256i signs[2 * SIGN_STEPS];
    int32_t counts[SIGN_ROWS][BLOCK] __attribute__((aligned(64)));
    int64_t stride = 4 * quads;
    for (int64_t block = first; block < last; block++)
        for (int64_t m = 0; m < rows; m += SIGN_ROWS) {
            int64_t count = rows - m < SIGN_ROWS ? rows - m : SIGN_ROWS;
            for (int64_t q = 0; q < quads || !q; q += SIGN_STEPS) { /* once for no inputs too: zeros */
                int64_t some = quads - q < SIGN_STEPS ? quads - q : SIGN_STEPS, r = 0;
                signs_of(layout + block * quads + q, some, signs);
                for (; r + 4 <= count; r += 4)
                    sign_tile(4, codes + m * stride + 4 * q, stride, some, signs, r, !q, counts);
                for (; r < count; r++)
                    sign_tile(1, codes + m * stride + 4 * q, stride, some, signs, r, !q, counts);
            }
            finish((const int32_t(*)[BLOCK])counts, m, count, block, ones, outputs, e);
        }
}

/* Set bits of each 64-bit lane. */
static inline __m256i popcount(__m256i x)
{
    const __m256i table = V_SAME(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4)), low = _mm256_set1_epi8(15);
    __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
    __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi64(x, 4), low));
    return _mm256_sad_epu8(_mm256_add_epi8(first, second), _mm256_setzero_si256());
}

#define HAS_MISMATCHES
static void mismatches(const uint64_t *query, const uint64_t *keys, int64_t words, int64_t stride, int64_t count,
                       uint8_t *result)
{
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t w = 0; w < words; w++) {
            __m256i key = _mm256_loadu_si256((const __m256i *)(keys + w * stride + j));
            sum = _mm256_add_epi64(sum, popcount(_mm256_xor_si256(_mm256_set1_epi64x((long long)query[w]), key)));
        }
        uint64_t four[4];
        _mm256_storeu_si256((__m256i *)four, sum);
        for (int i = 0; i < 4; i++)
            result[j + i] = (uint8_t)four[i];
    }
    for (; j < count; j++) {
        int differ = 0;
        for (int64_t w = 0; w < words; w++)
            differ += __builtin_popcountll(query[w] ^ keys[w * stride + j]);
        result[j] = (uint8_t)differ;
    }
}

#define HAS_OVERLAPS
static void overlaps(const uint64_t *a, const uint64_t *b, int64_t words, int64_t n, int32_t *counts)
{
    for (int64_t i = 0; i < n; i += 4) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t w = 0; w < words; w++) {
            __m256i value = _mm256_loadu_si256((const __m256i *)(b + w * n + i));
            sum = _mm256_add_epi64(sum, popcount(_mm256_and_si256(_mm256_set1_epi64x((long long)a[w]), value)));
        }
        const __m256i evens = _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0);
        _mm_storeu_si128((__m128i *)(counts + i), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(sum, evens)));
    }
}

#include "kernels.h"

static int runs(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }

const rebnn_isa rebnn_avx2 = REBNN_TABLE("avx2", runs);

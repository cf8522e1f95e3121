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

#include "kernels.h"

static int runs(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }

const rebnn_isa rebnn_avx2 = REBNN_TABLE("avx2", runs);

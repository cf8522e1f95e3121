/* AVX2: Haswell to Raptor Lake, Zen to Zen 3. */
#include <immintrin.h>

#include "isa.h"

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

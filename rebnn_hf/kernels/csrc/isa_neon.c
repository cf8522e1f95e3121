/* NEON, which every 64-bit ARM has. Products of 8-bit codes use the DotProd instructions where the CPU has them. */
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "isa.h"

/* DOTPROD marks a function that may use these instructions, where the compiler and the system let us ask for them. */
#if defined(__ARM_FEATURE_DOTPROD)
#define DOTPROD
static inline int has_dotprod(void) { return 1; }
#elif defined(__linux__) && (!defined(__clang__) || __clang_major__ >= 16)
#include <sys/auxv.h>
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
static inline int has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

/* Adds to counts [ROWS][BLOCK] the set bits of a ^ b (BOTH: a & b): rows of a [ROWS][words] against 8 columns of
 * b [words][stride]. cnt counts the bits of bytes: a byte holds the sum of 31 words, then its 8 neighbours are added.
 * ROWS and BOTH are constant in each copy. */
static inline __attribute__((always_inline)) void count_bits(const int ROWS, const int BOTH, const uint64_t *a,
                                                             int64_t words, const uint64_t *b, int64_t stride,
                                                             int32_t *counts)
{
    for (int64_t k = 0; k < words;) {
        int64_t end = words - k < 31 ? words : k + 31;
        uint8x16_t sums[4][4];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++)
                sums[r][c] = vdupq_n_u8(0);
        for (; k < end; k++)
            for (int c = 0; c < 4; c++) {
                uint64x2_t two = vld1q_u64(b + k * stride + 2 * c);
                for (int r = 0; r < ROWS; r++) {
                    uint64x2_t x = vdupq_n_u64(a[r * words + k]);
                    uint64x2_t bits = BOTH ? vandq_u64(x, two) : veorq_u64(x, two);
                    sums[r][c] = vaddq_u8(sums[r][c], vcntq_u8(vreinterpretq_u8_u64(bits)));
                }
            }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c += 2) {
                uint32x4_t left = vpaddlq_u16(vpaddlq_u8(sums[r][c])), right = vpaddlq_u16(vpaddlq_u8(sums[r][c + 1]));
                int32_t *four = counts + r * BLOCK + 2 * c;
                vst1q_s32(four, vaddq_s32(vld1q_s32(four), vreinterpretq_s32_u32(vpaddq_u32(left, right))));
            }
    }
}

static inline __attribute__((always_inline)) void tile_of(const int ROWS, const uint64_t *a, int64_t words,
                                                          const uint64_t *block, int32_t (*counts)[BLOCK])
{
    memset(counts, 0, (size_t)ROWS * sizeof *counts);
    count_bits(ROWS, 0, a, words, block, BLOCK, counts[0]);
    count_bits(ROWS, 0, a, words, block + 8, BLOCK, counts[0] + 8);
}

#define HAS_TILE
#define TILE_ROWS 4
static inline void tile(const uint64_t *a, int64_t rows, int64_t words, const uint64_t *block, int32_t (*counts)[BLOCK])
{
    switch (rows) {
    case 4: tile_of(4, a, words, block, counts); return;
    case 3: tile_of(3, a, words, block, counts); return;
    case 2: tile_of(2, a, words, block, counts); return;
    default: tile_of(1, a, words, block, counts); return;
    }
}

#define HAS_OVERLAPS
static void overlaps(const uint64_t *a, const uint64_t *b, int64_t words, int64_t n, int32_t *counts)
{
    memset(counts, 0, (size_t)n * sizeof *counts);
    for (int64_t i = 0; i < n; i += 8)
        count_bits(1, 1, a, words, b + i, n, counts + i);
}

static const uint8_t bit_of_lane[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};

/* 64 bytes that are all ones or zero -> bits. */
static inline uint64_t bits_of(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d)
{
    const uint8x16_t bit = vld1q_u8(bit_of_lane);
    uint8x16_t ab = vpaddq_u8(vandq_u8(a, bit), vandq_u8(b, bit)), cd = vpaddq_u8(vandq_u8(c, bit), vandq_u8(d, bit));
    uint8x16_t abcd = vpaddq_u8(ab, cd);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(abcd, abcd)), 0);
}

/* The low bytes of 16 words. */
static inline uint8x16_t narrow(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d)
{
    uint16x8_t ab = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    uint16x8_t cd = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
    return vuzp1q_u8(vreinterpretq_u8_u16(ab), vreinterpretq_u8_u16(cd));
}

#define HAS_PACK
static void pack(const float *x, int64_t n, const float *shift, float threshold, uint64_t *bits)
{
    const float32x4_t limit = vdupq_n_f32(threshold);
    float tail[64], tail_shift[64];
    for (int64_t start = 0; start < n; start += 64) {
        const float *from = x + start, *plus = shift ? shift + start : NULL;
        if (n - start < 64) {
            size_t bytes = (size_t)(n - start) * sizeof *x;
            for (int j = 0; j < 64; j++)
                tail[j] = tail_shift[j] = NAN; /* is not above any threshold */
            from = memcpy(tail, from, bytes);
            if (shift)
                plus = memcpy(tail_shift, plus, bytes);
        }
        uint8x16_t mask[4];
        for (int i = 0; i < 4; i++) {
            uint32x4_t above[4];
            for (int j = 0; j < 4; j++) {
                float32x4_t value = vld1q_f32(from + 16 * i + 4 * j);
                if (shift)
                    value = vaddq_f32(value, vld1q_f32(plus + 16 * i + 4 * j));
                above[j] = vcgeq_f32(value, limit);
            }
            mask[i] = narrow(above[0], above[1], above[2], above[3]);
        }
        bits[start / 64] = bits_of(mask[0], mask[1], mask[2], mask[3]);
    }
}

/* floor or round(value), clipped to low..high, minus `zero`. A NaN that comes out of arithmetic is quiet, and of a
 * quiet NaN and a number maxnm takes the number. */
static inline uint32x4_t code_of(float32x4_t rounded, float low, float high, int32_t zero)
{
    float32x4_t value = vminnmq_f32(vmaxnmq_f32(rounded, vdupq_n_f32(low)), vdupq_n_f32(high));
    return vreinterpretq_u32_s32(vsubq_s32(vcvtq_s32_f32(value), vdupq_n_s32(zero)));
}

#define HAS_LEVELS
static void levels(const float *x, int64_t n, const float *shift, float scale, int32_t low, int32_t high,
                   uint8_t *codes)
{
    float tail[16] = {0}, tail_shift[16] = {0};
    for (int64_t j = 0; j < n; j += 16) {
        const float *from = x + j, *plus = shift ? shift + j : NULL;
        size_t count = n - j < 16 ? (size_t)(n - j) : 16;
        if (count < 16) {
            from = memcpy(tail, from, count * sizeof *x);
            if (shift)
                plus = memcpy(tail_shift, plus, count * sizeof *x);
        }
        uint32x4_t code[4];
        for (int i = 0; i < 4; i++) {
            float32x4_t value = vld1q_f32(from + 4 * i);
            if (shift)
                value = vaddq_f32(value, vld1q_f32(plus + 4 * i));
            value = vaddq_f32(vdivq_f32(value, vdupq_n_f32(scale)), vdupq_n_f32(0.5f));
            code[i] = code_of(vrndmq_f32(value), (float)low, (float)high, low);
        }
        uint8_t bytes[16];
        vst1q_u8(bytes, narrow(code[0], code[1], code[2], code[3]));
        memcpy(codes + j, bytes, count);
    }
}

#define HAS_TOKEN
static float token(const float *x, int64_t n, uint8_t *codes)
{
    float32x4_t largest = vdupq_n_f32(0);
    float tail[16] = {0};
    int64_t whole = n / 16 * 16;
    if (n > whole)
        memcpy(tail, x + whole, (size_t)(n - whole) * sizeof *x);
    for (int64_t j = 0; j < n; j += 16)
        for (int i = 0; i < 16; i += 4) {
            float32x4_t magnitude = vabsq_f32(vld1q_f32((j < whole ? x + j : tail) + i));
            largest = vbslq_f32(vcgtq_f32(magnitude, largest), magnitude, largest); /* skips NaN, the signalling too */
        }
    float scale = vmaxvq_f32(largest) / 127;
    scale = scale > 1.17549435e-38f ? scale : 1.17549435e-38f;
    for (int64_t j = 0; j < n; j += 16) {
        uint32x4_t code[4];
        for (int i = 0; i < 4; i++) {
            float32x4_t value = vdivq_f32(vld1q_f32((j < whole ? x + j : tail) + 4 * i), vdupq_n_f32(scale));
            code[i] = code_of(vrndnq_f32(value), -127, 127, -128);
        }
        uint8_t bytes[16];
        vst1q_u8(bytes, narrow(code[0], code[1], code[2], code[3]));
        memcpy(codes + j, bytes, j < whole ? 16 : (size_t)(n - whole));
    }
    return scale;
}

#define HAS_MISMATCHES
static void mismatches(const uint64_t *query, const uint64_t *keys, int64_t words, int64_t stride, int64_t count,
                       uint8_t *result)
{
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) {
        uint8x16_t sums[8]; /* of bytes of two keys each: no byte overflows, as the sum of eight does not */
        for (int i = 0; i < 8; i++)
            sums[i] = vdupq_n_u8(0);
        for (int64_t w = 0; w < words; w++) {
            uint64x2_t x = vdupq_n_u64(query[w]);
            for (int i = 0; i < 8; i++) {
                uint64x2_t differ = veorq_u64(x, vld1q_u64(keys + w * stride + j + 2 * i));
                sums[i] = vaddq_u8(sums[i], vcntq_u8(vreinterpretq_u8_u64(differ)));
            }
        }
        for (int left = 4; left; left /= 2)
            for (int i = 0; i < left; i++)
                sums[i] = vpaddq_u8(sums[2 * i], sums[2 * i + 1]);
        vst1q_u8(result + j, sums[0]);
    }
    for (; j < count; j++) {
        int differ = 0;
        for (int64_t w = 0; w < words; w++)
            differ += __builtin_popcountll(query[w] ^ keys[w * stride + j]);
        result[j] = (uint8_t)differ;
    }
}

#define HAS_AT_MOST
static int64_t at_most(const uint8_t *index, int64_t count, int32_t limit, uint64_t *bits)
{
    const uint8x16_t largest = vdupq_n_u8((uint8_t)(limit < 255 ? limit : 255));
    int64_t set = 0;
    uint8_t tail[64] = {0};
    for (int64_t j = 0; j < count; j += 64) {
        const uint8_t *from = index + j;
        uint64_t some = limit < 0 ? 0 : ~0ull;
        if (count - j < 64) {
            from = memcpy(tail, from, (size_t)(count - j));
            some &= (1ull << (count - j)) - 1;
        }
        uint64_t word = some & bits_of(vcleq_u8(vld1q_u8(from), largest), vcleq_u8(vld1q_u8(from + 16), largest),
                                       vcleq_u8(vld1q_u8(from + 32), largest), vcleq_u8(vld1q_u8(from + 48), largest));
        bits[j / 64] = word;
        set += __builtin_popcountll(word);
    }
    return set;
}

#define HAS_REACHED
static void reached(const int32_t *counts, int64_t n, int32_t total, const int32_t *limits, uint16_t *bits)
{
    const uint8x16_t none = vdupq_n_u8(0);
    for (int64_t i = 0; i < n; i += 16) {
        uint32x4_t above[4];
        for (int j = 0; j < 4; j++) {
            int32x4_t value = vsubq_s32(vshlq_n_s32(vld1q_s32(counts + i + 4 * j), 1), vdupq_n_s32(total));
            above[j] = vcgeq_s32(value, vld1q_s32(limits + i + 4 * j));
        }
        bits[i / 16] = (uint16_t)bits_of(narrow(above[0], above[1], above[2], above[3]), none, none, none);
    }
}

/* 16 bits of a quad, those of outputs 4 * i..4 * i + 3, as bytes of ones or zeros. */
static inline __attribute__((always_inline)) uint8x16_t set_codes(uint64_t quad, int i)
{
    static const uint8_t byte_of_lane[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    uint8x16_t lanes = vaddq_u8(vld1q_u8(byte_of_lane), vdupq_n_u8((uint8_t)(2 * i)));
    return vtstq_u8(vqtbl1q_u8(vreinterpretq_u8_u64(vdupq_n_u64(quad)), lanes), vld1q_u8(bit_of_lane));
}

static inline uint32_t four_codes(const uint8_t *codes)
{
    uint32_t four;
    memcpy(&four, codes, sizeof four);
    return four;
}

/* counts = the sums of the codes whose bit is set, ROWS x 16 outputs; 16 bits hold 128 sums of two codes. */
static inline __attribute__((always_inline)) void add_set_of(const int ROWS, const uint8_t *codes, int64_t quads,
                                                             const uint64_t *block, int32_t (*counts)[BLOCK])
{
    memset(counts, 0, (size_t)ROWS * sizeof *counts);
    for (int64_t q = 0; q < quads;) {
        int64_t end = quads - q < 128 ? quads : q + 128;
        uint16x8_t sums[4][4];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 4; i++)
                sums[r][i] = vdupq_n_u16(0);
        for (; q < end; q++)
            for (int i = 0; i < 4; i++) {
                uint8x16_t mask = set_codes(block[q], i);
                for (int r = 0; r < ROWS; r++) {
                    uint8x16_t four = vreinterpretq_u8_u32(vdupq_n_u32(four_codes(codes + (r * quads + q) * 4)));
                    sums[r][i] = vpadalq_u8(sums[r][i], vandq_u8(four, mask));
                }
            }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 4; i++) {
                int32x4_t sum = vreinterpretq_s32_u32(vpaddlq_u16(sums[r][i]));
                vst1q_s32(counts[r] + 4 * i, vaddq_s32(vld1q_s32(counts[r] + 4 * i), sum));
            }
    }
}

#ifdef DOTPROD
/* The same with instructions that add four products of bytes to 32 bits. */
DOTPROD static void add_set_dotprod(int64_t rows, const uint8_t *codes, int64_t quads, const uint64_t *block,
                                    int32_t (*counts)[BLOCK])
{
    const uint8_t *row[4]; /* rows that are not there repeat the last one: their sums are dropped */
    uint32x4_t sums[4][4];
    for (int r = 0; r < 4; r++) {
        row[r] = codes + (r < rows ? r : rows - 1) * quads * 4;
        for (int i = 0; i < 4; i++)
            sums[r][i] = vdupq_n_u32(0);
    }
    for (int64_t q = 0; q < quads; q++)
        for (int i = 0; i < 4; i++) {
            uint8x16_t one = vshrq_n_u8(set_codes(block[q], i), 7);
            for (int r = 0; r < 4; r++) {
                uint8x16_t four = vreinterpretq_u8_u32(vdupq_n_u32(four_codes(row[r] + 4 * q)));
                sums[r][i] = vdotq_u32(sums[r][i], four, one);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++)
            vst1q_s32(counts[r] + 4 * i, vreinterpretq_s32_u32(sums[r][i]));
}
#endif

static inline void add_set(int64_t rows, const uint8_t *codes, int64_t quads, const uint64_t *block,
                           int32_t (*counts)[BLOCK])
{
#ifdef DOTPROD
    if (has_dotprod()) {
        add_set_dotprod(rows, codes, quads, block, counts);
        return;
    }
#endif
    switch (rows) {
    case 4: add_set_of(4, codes, quads, block, counts); return;
    case 3: add_set_of(3, codes, quads, block, counts); return;
    case 2: add_set_of(2, codes, quads, block, counts); return;
    default: add_set_of(1, codes, quads, block, counts); return;
    }
}

#define HAS_QUAD_TILE
#define QUAD_ROWS 4
static inline void quad_tile(const uint8_t *codes, int64_t rows, int64_t quads, const uint64_t *block,
                             int32_t (*counts)[BLOCK])
{
    add_set(rows, codes, quads, block, counts);
    for (int64_t r = 0; r < rows; r++) { /* codes with signs: those set minus those not set */
        int32_t all = 0;
        for (int64_t j = 0; j < 4 * quads; j++)
            all += codes[r * quads * 4 + j];
        for (int i = 0; i < BLOCK; i++)
            counts[r][i] = 2 * counts[r][i] - all;
    }
}

#include "kernels.h"

static int runs(void) { return 1; }

const rebnn_isa rebnn_neon = REBNN_TABLE("neon", runs);

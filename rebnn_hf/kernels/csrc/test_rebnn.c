/* Every operation of every instruction set that this CPU runs, against plain loops: the same integers, the same floats.
 * Prints what it checked, stops with 1 at the first difference. Every buffer ends where a page without access begins:
 * reading or writing past its end is a fault, with and without sanitizers. */
#define _DEFAULT_SOURCE
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "isa.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))
#define CHECK(condition, ...)                                                                                         \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                                    \
            printf(__VA_ARGS__);                                                                                      \
            printf("\n");                                                                                             \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

#define BAD(call) CHECK((call) == REBNN_BAD_ARGUMENT, "accepted")
#define GOOD(call) CHECK((call) == REBNN_OK, "refused")

static const int64_t sizes[] = {0, 1, 3, 7, 31, 33, 63, 64, 65, 127, 128, 129, 767, 768};
static const int64_t row_counts[] = {1, 2, 7, 8, 9, 33};

/* Sets that run here; each case is made once, with its reference, then goes through all of them. */
static const rebnn_isa *isas[8];
static int isa_count;

/* ---- Buffers and contents ------------------------------------------------------------------------------------- */

/* Buffers live until the end of their case. */
static struct { void *start; size_t bytes; } buffers[256];
static int buffer_count;

static void *take(int64_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = ((size_t)bytes + page - 1) / page * page;
    char *start = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(start != MAP_FAILED && !mprotect(start + room, page, PROT_NONE), "no memory");
    CHECK(buffer_count < COUNT(buffers), "too many buffers");
    buffers[buffer_count].start = start;
    buffers[buffer_count++].bytes = room + page;
    memset(start, 0xa5, room);
    return start + room - bytes;
}

static void release(void)
{
    while (buffer_count) {
        buffer_count--;
        munmap(buffers[buffer_count].start, buffers[buffer_count].bytes);
    }
}

static uint64_t random_state = 1;

static uint64_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1d;
}

static int64_t below(int64_t n) { return (int64_t)(random_bits() >> 33) % n; }

enum { RANDOM, PLUS, MINUS, SPECIAL, KINDS };

/* Half of the random floats are multiples of 1/4: on thresholds and between two codes. */
static float random_float(int kind)
{
    static const uint32_t special[] = {
        0x7fc00000, 0xffc00001, 0x7f800001, 0x7f800000, 0xff800000, 0x00000000, 0x80000000, 0x00000001,
        0x80000001, 0x007fffff, 0x00800000, 0x7f7fffff, 0xff7fffff, 0x3f000000, 0xbf000000, 0x3effffff,
    }; /* NaN (the third signalling), infinities, zeros, denormals, largest, 1/2 */
    float value = (float)(random_bits() >> 40) / 2097152 - 4;
    if (kind == PLUS || kind == MINUS)
        return kind == PLUS ? 1 : -1;
    if (kind == SPECIAL && below(2)) {
        memcpy(&value, &special[below(COUNT(special))], sizeof value);
        return value;
    }
    return below(2) ? value : roundf(4 * value) / 4;
}

static float *floats(int64_t n, int kind)
{
    float *x = take(n * 4);
    for (int64_t j = 0; j < n; j++)
        x[j] = random_float(kind);
    return x;
}

static uint64_t random_word(int kind) { return kind == PLUS ? ~0ull : kind == MINUS ? 0 : random_bits(); }

static uint64_t *random_words(int64_t n, int kind)
{
    uint64_t *words = take(n * 8);
    for (int64_t j = 0; j < n; j++)
        words[j] = random_word(kind);
    return words;
}

static uint8_t *random_bytes(int64_t n, int kind)
{
    uint8_t *bytes = take(n);
    for (int64_t j = 0; j < n; j++)
        bytes[j] = (uint8_t)random_word(kind);
    return bytes;
}

/* Rows of bits with clear spare bits. */
static uint8_t *random_rows(int64_t rows, int64_t n, int kind)
{
    int64_t bytes = ceil_div(n, 8);
    uint8_t *bits = random_bytes(rows * bytes, kind);
    for (int64_t r = 0; r < rows && n % 8; r++)
        bits[r * bytes + bytes - 1] &= (uint8_t)((1 << n % 8) - 1);
    return bits;
}

static int bit(const void *bits, int64_t j) { return ((const uint8_t *)bits)[j / 8] >> (j % 8) & 1; }

static int set_bits(uint64_t word)
{
    int set = 0;
    for (; word; word &= word - 1)
        set++;
    return set;
}

static int same(float a, float b) { return !memcmp(&a, &b, sizeof a) || (isnan(a) && isnan(b)); }

static void check_floats(const char *isa, const char *what, const float *y, const float *expected, int64_t n)
{
    for (int64_t j = 0; j < n; j++)
        CHECK(same(y[j], expected[j]), "%s %s: [%lld] of %lld: %.9g, expected %.9g", isa, what, (long long)j,
              (long long)n, (double)y[j], (double)expected[j]);
}

static void check_bytes(const char *isa, const char *what, const void *y, const void *expected, int64_t bytes)
{
    const uint8_t *a = y, *b = expected;
    for (int64_t j = 0; j < bytes; j++)
        CHECK(a[j] == b[j], "%s %s: byte %lld of %lld: %d, expected %d", isa, what, (long long)j, (long long)bytes,
              a[j], b[j]);
}

/* ---- Operations of the tables --------------------------------------------------------------------------------- */

static void test_pack(int64_t n, int kind, int shifted, float threshold)
{
    float *x = floats(n, kind), *shift = shifted ? floats(n, RANDOM) : NULL;
    int64_t words = ceil_div(n, 64);
    uint64_t *expected = take(words * 8), *bits = take(words * 8);
    memset(expected, 0, (size_t)words * 8);
    for (int64_t j = 0; j < n; j++)
        expected[j / 64] |= (uint64_t)((shift ? x[j] + shift[j] : x[j]) >= threshold) << (j % 64);
    for (int i = 0; i < isa_count; i++) {
        memset(bits, 0xa5, (size_t)words * 8);
        isas[i]->pack(x, n, shift, threshold, bits);
        check_bytes(isas[i]->name, "pack", bits, expected, words * 8);
    }
    release();
}

static void test_pack_pixels(int64_t channels, int64_t n, int kind, int shifted)
{
    int64_t stride = n + below(3);
    float *x = floats(channels ? (channels - 1) * stride + n : 0, kind), *shift = shifted ? floats(channels, RANDOM) : NULL;
    uint64_t *expected = take(n * 8), *pixels = take(n * 8);
    memset(expected, 0, (size_t)n * 8);
    for (int64_t i = 0; i < channels; i++)
        for (int64_t j = 0; j < n; j++)
            expected[j] |= (uint64_t)((shift ? x[i * stride + j] + shift[i] : x[i * stride + j]) >= 0) << i;
    for (int i = 0; i < isa_count; i++) {
        if (!isas[i]->pack_pixels)
            continue;
        memset(pixels, 0xa5, (size_t)n * 8);
        isas[i]->pack_pixels(x, channels, stride, n, shift, pixels);
        check_bytes(isas[i]->name, "pack_pixels", pixels, expected, n * 8);
    }
    release();
}

static int level_of(float value, float scale, int low, int high)
{
    float level = floorf(value / scale + 0.5f);
    if (!((double)level > low))
        return low; /* NaN too */
    return (double)level < high ? (int)level : high;
}

static void test_levels(int64_t n, int kind, int shifted, float scale, int low, int high)
{
    float *x = floats(n, kind), *shift = shifted ? floats(n, RANDOM) : NULL;
    uint8_t *expected = take(n), *codes = take(n);
    for (int64_t j = 0; j < n; j++)
        expected[j] = (uint8_t)(level_of(shift ? x[j] + shift[j] : x[j], scale, low, high) - low);
    for (int i = 0; i < isa_count; i++) {
        memset(codes, 0xa5, (size_t)n);
        isas[i]->levels(x, n, shift, scale, low, high, codes);
        check_bytes(isas[i]->name, "levels", codes, expected, n);
    }
    release();
}

/* Codes of a row without the 128; returns its scale. */
static float token_codes(const float *x, int64_t n, int *codes)
{
    float largest = 0;
    for (int64_t j = 0; j < n; j++)
        if (fabsf(x[j]) > largest)
            largest = fabsf(x[j]);
    float scale = largest / 127 > FLT_MIN ? largest / 127 : FLT_MIN;
    for (int64_t j = 0; j < n; j++) {
        float code = rintf(x[j] / scale);
        codes[j] = !(code > -127) ? -127 : code < 127 ? (int)code : 127;
    }
    return scale;
}

static void test_token(int64_t n, int kind, float times)
{
    float *x = floats(n, kind);
    int *codes = take(n * 4);
    uint8_t *expected = take(n), *result = take(n);
    for (int64_t j = 0; j < n; j++)
        x[j] *= times;
    if (n && kind == RANDOM && times == 1)
        x[below(n)] = 127; /* the scale is 1, and halves lie between two codes */
    float scale = token_codes(x, n, codes);
    for (int64_t j = 0; j < n; j++)
        expected[j] = (uint8_t)(codes[j] + 128);
    for (int i = 0; i < isa_count; i++) {
        memset(result, 0xa5, (size_t)n);
        float s = isas[i]->token(x, n, result);
        check_floats(isas[i]->name, "token scale", &s, &scale, 1);
        check_bytes(isas[i]->name, "token", result, expected, n);
    }
    release();
}

static void test_layer_norm(int64_t n, int kind)
{
    float *x = floats(n, kind), *weight = floats(n, RANDOM), *bias = floats(n, RANDOM), *y = take(n * 4);
    float *first = take(n * 4);
    double mean = 0, square = 0;
    for (int64_t j = 0; j < n; j++)
        mean += x[j] / (double)n;
    for (int64_t j = 0; j < n; j++)
        square += (x[j] - mean) * (x[j] - mean) / (double)n;
    for (int i = 0; i < isa_count; i++) {
        isas[i]->layer_norm(x, n, weight, bias, 1e-3f, y);
        for (int64_t j = 0; j < n; j++) {
            double expected = (x[j] - mean) / sqrt(square + (double)1e-3f) * weight[j] + bias[j];
            CHECK(fabs(y[j] - expected) < 1e-4, "%s layer_norm: %g, not %g", isas[i]->name, (double)y[j], expected);
        }
        if (!i)
            memcpy(first, y, (size_t)n * 4);
        check_floats(isas[i]->name, "layer_norm of all sets", y, first, n);
        memcpy(y, x, (size_t)n * 4);
        isas[i]->layer_norm(y, n, weight, bias, 1e-3f, y);
        check_floats(isas[i]->name, "layer_norm in place", y, first, n);
    }
    release();
}

/* Floats and bits from counts [rows][16 * blocks], through words (planes > 0) or quads (planes 0). */
static void check_epilogues(const void *a, int64_t rows, int planes, int64_t words, const uint64_t *layout,
                            const int32_t *ones, int64_t outputs, const int32_t *counts)
{
    int64_t blocks = ceil_div(outputs, BLOCK), padded = blocks * BLOCK, first = blocks > 2 ? 1 : 0, stride = blocks + 2;
    int64_t last = blocks > 3 ? blocks - 1 : blocks, y_stride = outputs + 3;
    epilogue e = {.constant = (int32_t)below(1000) - 500, .per_one = (int32_t)below(9) - 4, .input_scale = 0.75f};
    static const int32_t factors[] = {-2, -1, 1};
    e.factor = factors[below(3)];
    int32_t *dots = take(rows * padded * 4), *few = take(padded * 4), *many = take(padded * 4);
    for (int64_t i = 0; i < rows * padded; i++)
        dots[i] = e.constant + e.per_one * ones[i % padded] + e.factor * counts[i];
    for (int64_t n = 0; n < padded; n++) { /* thresholds that are met exactly, never, always */
        few[n] = n % 5 == 4 ? INT32_MIN : counts[below(rows) * padded + n];
        many[n] = n % 3 == 2 ? INT32_MAX : counts[below(rows) * padded + n] + (int32_t)below(2);
    }
    float *scale = floats(outputs, RANDOM), *bias = below(2) ? floats(outputs, RANDOM) : NULL;
    float *row_scale = below(2) ? floats(rows, RANDOM) : NULL, *y = take(rows * y_stride * 4);
    float *expected = take(rows * y_stride * 4);
    uint16_t *bits = take(rows * stride * 2), *expected_bits = take(rows * stride * 2);
    int64_t *offset = take(blocks * 8);
    for (int64_t block = 0; block < blocks; block++)
        offset[block] = blocks - block; /* not the place one would guess */
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = first * BLOCK; n < last * BLOCK; n++) {
            int32_t dot = dots[m * padded + n], count = counts[m * padded + n];
            uint16_t *word = expected_bits + m * stride + offset[n / BLOCK];
            *word = (uint16_t)((n % BLOCK ? *word : 0) | (count <= few[n] || count >= many[n]) << n % BLOCK);
            if (n < outputs)
                expected[m * y_stride + n] = (float)dot * (scale[n] * (row_scale ? row_scale[m] : e.input_scale)) +
                                             (bias ? bias[n] : 0);
        }
    e.scale = scale, e.bias = bias, e.row_scale = row_scale, e.y_stride = y_stride;
    e.few = few, e.many = many, e.bits_stride = stride, e.block_offset = offset;
    for (int i = 0; i < isa_count; i++)
        for (int as_bits = 0; as_bits < (planes == 1 ? 2 : 1); as_bits++) { /* bits: of one plane only */
            memset(y, 0xa5, (size_t)(rows * y_stride) * 4);
            memset(bits, 0xa5, (size_t)(rows * stride) * 2);
            e.y = as_bits ? NULL : y;
            e.bits = as_bits ? bits : NULL;
            if (planes)
                isas[i]->words(a, rows, planes, words, layout, ones, first, last, outputs, &e);
            else
                isas[i]->quads(a, rows, words, layout, ones, first, last, outputs, &e);
            if (as_bits)
                check_bytes(isas[i]->name, "words, bits", bits, expected_bits, rows * stride * 2);
            else
                check_floats(isas[i]->name, planes ? "words" : "quads", y, expected, rows * y_stride);
        }
}

static void test_words(int64_t rows, int planes, int64_t words, int64_t outputs, int kind, int weight_kind)
{
    int64_t blocks = ceil_div(outputs, BLOCK), padded = blocks * BLOCK;
    uint64_t *a = random_words(rows * planes * words, kind);
    uint64_t *layout = random_words(blocks * words * BLOCK, weight_kind);
    int32_t *ones = take(padded * 4), *counts = take(rows * padded * 4);
    for (int64_t n = 0; n < padded; n++) {
        ones[n] = (int32_t)below(1000);
        for (int64_t m = 0; m < rows; m++) {
            counts[m * padded + n] = 0;
            for (int64_t p = 0; p < planes; p++)
                for (int64_t k = 0; k < words; k++)
                    counts[m * padded + n] += set_bits(a[(m * planes + p) * words + k] ^
                                                       layout[(n / BLOCK * words + k) * BLOCK + n % BLOCK]) << p;
        }
    }
    check_epilogues(a, rows, planes, words, layout, ones, outputs, counts);
    release();
}

static void test_quads(int64_t rows, int64_t quads, int64_t outputs, int kind, int weight_kind)
{
    int64_t blocks = ceil_div(outputs, BLOCK), padded = blocks * BLOCK;
    uint8_t *codes = random_bytes(rows * quads * 4, kind);
    uint64_t *layout = random_words(blocks * quads, weight_kind);
    int32_t *ones = take(padded * 4), *counts = take(rows * padded * 4);
    for (int64_t n = 0; n < padded; n++) {
        ones[n] = (int32_t)below(1000);
        for (int64_t m = 0; m < rows; m++) {
            int32_t sum = 0;
            for (int64_t j = 0; j < 4 * quads; j++) {
                int code = codes[m * quads * 4 + j];
                sum += layout[n / BLOCK * quads + j / 4] >> (4 * (n % BLOCK) + j % 4) & 1 ? code : -code;
            }
            counts[m * padded + n] = sum;
        }
    }
    check_epilogues(codes, rows, 0, quads, layout, ones, outputs, counts);
    release();
}

static void test_mismatches(int64_t words, int64_t count, int kind)
{
    int64_t stride = count + 5;
    uint64_t *query = random_words(words, kind), *keys = random_words(words * stride, RANDOM);
    uint8_t *expected = take(count), *result = take(count);
    for (int64_t j = 0; j < count; j++) {
        int differ = 0;
        for (int64_t w = 0; w < words; w++) {
            if (words > 3) /* long keys: no more than 255 may differ, these all in one byte */
                keys[w * stride + j] = query[w] ^ (w < 31 ? 0xff00ull << 8 * (j % 7) : 0);
            differ += set_bits(query[w] ^ keys[w * stride + j]);
        }
        expected[j] = (uint8_t)differ;
    }
    /* the last plane of keys ends with the last key */
    uint64_t *tight = take(words ? ((words - 1) * stride + count) * 8 : 0);
    if (words)
        memcpy(tight, keys, (size_t)((words - 1) * stride + count) * 8);
    for (int i = 0; i < isa_count; i++) {
        memset(result, 0xa5, (size_t)count);
        isas[i]->mismatches(query, tight, words, stride, count, result);
        check_bytes(isas[i]->name, "mismatches", result, expected, count);
    }
    release();
}

static void test_lookups(int64_t size, int64_t count, int kind)
{
    uint8_t *index = random_bytes(count, kind);
    float *table = floats(round_up(size, 16), RANDOM), sums[16] = {0};
    for (int64_t j = 0; j < count; j++) {
        index[j] = (uint8_t)(index[j] % size);
        sums[j % 16] += table[index[j]];
    }
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            sums[i] += sums[i + half];
    for (int i = 0; i < isa_count; i++) {
        float sum = isas[i]->table_sum(table, size, index, count);
        check_floats(isas[i]->name, "table_sum", &sum, sums, 1);
    }
    static const int32_t limits[] = {INT32_MIN, -1, 0, 1, 100, 127, 128, 254, 255, 256, INT32_MAX};
    int64_t words = ceil_div(count, 64);
    uint64_t *expected = take(words * 8), *bits = take(words * 8);
    for (int l = 0; l < COUNT(limits); l++) {
        int64_t set = 0;
        memset(expected, 0, (size_t)words * 8);
        for (int64_t j = 0; j < count; j++)
            if (index[j] <= limits[l]) {
                expected[j / 64] |= 1ull << (j % 64);
                set++;
            }
        for (int i = 0; i < isa_count; i++) {
            memset(bits, 0xa5, (size_t)words * 8);
            int64_t result = isas[i]->at_most(index, count, limits[l], bits);
            CHECK(result == set, "%s at_most: %lld, expected %lld", isas[i]->name, (long long)result, (long long)set);
            check_bytes(isas[i]->name, "at_most", bits, expected, words * 8);
        }
    }
    release();
}

static void test_overlaps(int64_t words, int64_t n, int kind)
{
    uint64_t *a = random_words(words, kind), *b = random_words(words * n, kind);
    int32_t *expected = take(n * 4), *counts = take(n * 4);
    for (int64_t i = 0; i < n; i++) {
        expected[i] = 0;
        for (int64_t w = 0; w < words; w++)
            expected[i] += set_bits(a[w] & b[w * n + i]);
    }
    for (int i = 0; i < isa_count; i++) {
        memset(counts, 0xa5, (size_t)n * 4);
        isas[i]->overlaps(a, b, words, n, counts);
        check_bytes(isas[i]->name, "overlaps", counts, expected, n * 4);
    }
    release();
}

static void test_reached(int64_t n, int32_t total)
{
    int32_t *counts = take(n * 4), *limits = take(n * 4);
    uint16_t *expected = take(n / 8), *bits = take(n / 8);
    memset(expected, 0, (size_t)n / 8);
    for (int64_t i = 0; i < n; i++) {
        counts[i] = (int32_t)below(total + 1);
        limits[i] = i % 7 == 6 ? INT32_MAX : i % 5 == 4 ? INT32_MIN : 2 * counts[i] - total + (int32_t)below(3) - 1;
        expected[i / 16] |= (uint16_t)((2 * counts[i] - total >= limits[i]) << i % 16);
    }
    for (int i = 0; i < isa_count; i++) {
        memset(bits, 0xa5, (size_t)n / 8);
        isas[i]->reached(counts, n, total, limits, bits);
        check_bytes(isas[i]->name, "reached", bits, expected, n / 8);
    }
    release();
}

/* Shortcut and RPReLU of `outputs` channels and `size` values. */
static rebnn_residual random_residual(int64_t outputs, int64_t size)
{
    return (rebnn_residual){floats(size, RANDOM), floats(outputs, RANDOM), floats(outputs, RANDOM),
                            floats(outputs, RANDOM)};
}

/* What follows value y of channel o, the i-th of all. */
static float with_residual(float y, const rebnn_residual *r, int64_t o, int64_t i)
{
    if (!r->shortcut)
        return y;
    float z = y + r->shortcut[i] + r->shift_in[o];
    return (z > 0 ? z : r->slope[o] * z) + r->shift_out[o];
}

/* A block of outputs against one of pixels, with kinds of both, and positions that some pixels lack. */
static void test_conv_block(int64_t words, int64_t outputs, int64_t pixels, int kind, int other)
{
    int64_t positions = below(4), shares_stride = outputs + below(3), y_stride = pixels + below(3);
    int64_t size = (outputs - 1) * y_stride + pixels;
    uint64_t *a = random_words(words * BLOCK, kind), *b = random_words(words * BLOCK, other);
    float *scale = floats(outputs, RANDOM), *bias = floats(outputs, RANDOM), *y = take(size * 4);
    float *shares = take(((positions - 1) * shares_stride + outputs) * (positions > 0) * 4);
    uint16_t *outside = take(positions * 2);
    rebnn_residual r = below(2) ? random_residual(outputs, size) : (rebnn_residual){0};
    for (int64_t i = 0; i < (positions - 1) * shares_stride + outputs && positions; i++)
        shares[i] = (float)(below(200) - 100);
    for (int64_t k = 0; k < positions; k++)
        outside[k] = k % 2 ? 0 : (uint16_t)below(65536);
    float *expected = take(size * 4);
    memset(expected, 0xa5, (size_t)size * 4);
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t p = 0; p < pixels; p++) {
            int dot = (int)(64 * words);
            for (int64_t k = 0; k < words; k++)
                dot -= 2 * set_bits(a[k * BLOCK + o] ^ b[k * BLOCK + p]);
            for (int64_t k = 0; k < positions; k++)
                dot += outside[k] >> p & 1 ? (int)shares[k * shares_stride + o] : 0;
            expected[o * y_stride + p] = with_residual((float)dot * scale[o] + bias[o], &r, o, o * y_stride + p);
        }
    conv_block block = {outputs, pixels, 64 * words, scale, bias, positions, shares_stride, outside, shares,
                        r.shortcut, r.shift_in, r.slope, r.shift_out, y, y_stride};
    for (int i = 0; i < isa_count; i++) {
        if (!isas[i]->conv)
            continue;
        memset(y, 0xa5, (size_t)size * 4);
        isas[i]->conv(a, b, words, &block);
        check_bytes(isas[i]->name, "conv", y, expected, size * 4);
    }
    release();
}

static void test_tables(void)
{
    static const float thresholds[] = {0, 0.25f, NAN, INFINITY, -INFINITY};
    static const struct { float scale; int low, high; } steps[] = {
        {0.5f, 0, 1}, {1, -1, 0}, {0.75f, -2, 1}, {0.3f, 0, 3}, {0.5f, -8, 7}, {0.125f, 0, 15}, {0.03f, -128, 127},
        {0.01f, 0, 255}, {1e-40f, -3, 252}, {INFINITY, -1, 2},
    };
    static const int64_t tables[] = {17, 33, 65, 129, 256};
    static const int64_t long_words[] = {0, 1, 2, 3, 12, 13, 30, 31, 32, 62, 63, 70, 146, 147}; /* limits: 31, 146 */
    static const int64_t long_quads[] = {0, 1, 2, 8, 17, 127, 128, 129, 192, 257}; /* 16 bits hold 128 quads */
    for (int s = 0; s < COUNT(sizes); s++)
        for (int kind = 0; kind < KINDS; kind++) {
            int64_t n = sizes[s];
            for (int shifted = 0; shifted < 2; shifted++) {
                for (int i = 0; i < COUNT(thresholds); i++)
                    test_pack(n, kind, shifted, thresholds[i]);
                for (int i = 0; i < COUNT(steps); i++)
                    test_levels(n, kind, shifted, steps[i].scale, steps[i].low, steps[i].high);
            }
            for (int64_t channels = 0; channels <= 64; channels += channels == 31 ? 1 : channels == 32 ? 32 : 31)
                test_pack_pixels(channels, n, kind, s % 2);
            test_token(n, kind, 1);
            test_token(n, kind, kind == RANDOM ? 1e-40f : 0);
            if (n && kind != SPECIAL)
                test_layer_norm(n, kind);
            for (int64_t words = 0; words < 4; words++)
                test_mismatches(words, n, kind);
            test_mismatches(40, n, kind);
            for (int i = 0; i < COUNT(tables); i++)
                test_lookups(tables[i], n, kind);
        }
    for (int k = 0; k < COUNT(long_words); k++)
        for (int m = 0; m < COUNT(row_counts); m++) {
            int64_t outputs = sizes[1 + (3 * k + 5 * m) % 11];
            int planes = 1 << (k + m) % 3;
            test_words(row_counts[m], planes, long_words[k], outputs, RANDOM, RANDOM);
            test_words(row_counts[m] % 10, planes, long_words[k], 16, PLUS, m % 2 ? MINUS : PLUS);
        }
    for (int k = 0; k < COUNT(long_words); k++)
        for (int64_t outputs = 1; outputs <= BLOCK; outputs += 5)
            for (int64_t pixels = 1; pixels <= BLOCK; pixels++) {
                test_conv_block(long_words[k], outputs, pixels, RANDOM, RANDOM);
                test_conv_block(long_words[k], outputs, pixels, PLUS, MINUS);
            }
    for (int k = 0; k < COUNT(long_quads); k++)
        for (int m = 0; m < COUNT(row_counts); m++) {
            test_quads(row_counts[m], long_quads[k], sizes[1 + (3 * k + 5 * m) % 11], RANDOM, RANDOM);
            test_quads(row_counts[m] % 10, long_quads[k], 16, PLUS, m % 2 ? MINUS : PLUS);
        }
    for (int k = 0; k < COUNT(long_words); k++)
        for (int64_t n = 16; n <= 128; n += 48) {
            test_overlaps(long_words[k], n, RANDOM);
            test_overlaps(long_words[k], n, PLUS);
        }
    for (int64_t n = 0; n <= 80; n += 16)
        test_reached(n, 1 + (int32_t)n);
    printf("tables: pack pack_pixels levels token layer_norm words conv quads mismatches table_sum at_most overlaps reached\n");
}

/* ---- Layouts, codes, products --------------------------------------------------------------------------------- */

static void *layout_of(rebnn_layout kind, int64_t outputs, int64_t inputs, const uint8_t *bits)
{
    void *layout = take(rebnn_layout_size(kind, outputs, inputs) + 8 * below(2)); /* 64 bytes are not a must */
    rebnn_status status = rebnn_layout_fill(kind, outputs, inputs, bits, layout);
    CHECK(status == REBNN_OK, "layout_fill %d", status);
    return layout;
}

static void test_layout(rebnn_layout kind, int64_t outputs, int64_t inputs)
{
    int64_t blocks = ceil_div(outputs, BLOCK), step = kind == REBNN_WORDS ? 64 : 4, steps = ceil_div(inputs, step);
    int64_t width = kind == REBNN_WORDS ? steps * BLOCK : steps, bytes = ceil_div(inputs, 8);
    uint8_t *bits = random_rows(outputs, inputs, RANDOM);
    CHECK(rebnn_layout_size(kind, outputs, inputs) == blocks * (width * 8 + BLOCK * 4), "layout_size");
    uint64_t *words = layout_of(kind, outputs, inputs, bits);
    const int32_t *ones = (const int32_t *)(words + blocks * width);
    for (int64_t o = 0; o < blocks * BLOCK; o++) {
        int32_t set = 0;
        for (int64_t j = 0; j < steps * step; j++) {
            int expected = o < outputs && j < inputs ? bit(bits + o * bytes, j) : 0;
            uint64_t word = kind == REBNN_WORDS ? words[o / BLOCK * width + j / 64 * BLOCK + o % BLOCK] >> (j % 64)
                                                : words[o / BLOCK * width + j / 4] >> (4 * (o % BLOCK) + j % 4);
            CHECK((int)(word & 1) == expected, "layout %d: output %lld, input %lld", kind, (long long)o, (long long)j);
            set += expected;
        }
        CHECK(ones[o] == set, "layout %d: set bits of output %lld", kind, (long long)o);
    }
    release();
}

/* Every way to code inputs; `shift` is filled in by the case. */
static const rebnn_input inputs_of[] = {
    {REBNN_SIGN, 1, 0, 0.5f, NULL},     {REBNN_LEVELS, 1, 0, 0.5f, NULL},     {REBNN_LEVELS, 1, -1, 0.7f, NULL},
    {REBNN_LEVELS, 2, 0, 0.6f, NULL},   {REBNN_LEVELS, 2, -2, 0.9f, NULL},    {REBNN_LEVELS, 4, 0, 0.25f, NULL},
    {REBNN_LEVELS, 4, -8, 0.3f, NULL},  {REBNN_LEVELS, 4, -3, 0.3f, NULL},    {REBNN_LEVELS, 8, 0, 0.02f, NULL},
    {REBNN_LEVELS, 8, -128, 0.03f, NULL}, {REBNN_LEVELS, 8, -1, 0.01f, NULL}, {REBNN_TOKEN, 8, 0, 0, NULL},
};

static rebnn_layout kind_of(const rebnn_input *input) { return input->bits == 8 ? REBNN_QUADS : REBNN_WORDS; }

/* Signed codes of a row; returns what to multiply them with. */
static float codes_of(const rebnn_input *input, const float *x, int64_t n, int *codes)
{
    if (input->codes == REBNN_TOKEN)
        return token_codes(x, n, codes);
    int high = input->low + (1 << input->bits) - 1;
    for (int64_t j = 0; j < n; j++) {
        float value = input->shift ? x[j] + input->shift[j] : x[j];
        codes[j] = input->codes == REBNN_SIGN ? (value >= 0 ? 1 : -1) : level_of(value, input->scale, input->low, high);
    }
    return input->scale;
}

typedef struct {
    rebnn_input input;
    int64_t rows, inputs, outputs;
    const float *x, *scale, *bias;
    const void *layout;
    const float *expected;
} product;

static product make_product(const rebnn_input *input, int64_t rows, int64_t inputs, int64_t outputs, int kind)
{
    product p = {.input = *input, .rows = rows, .inputs = inputs, .outputs = outputs};
    int weight_kind = kind == PLUS || kind == MINUS ? PLUS + (int)below(2) : RANDOM;
    uint8_t *bits = random_rows(outputs, inputs, weight_kind);
    p.x = floats(rows * inputs, kind);
    p.scale = floats(outputs, RANDOM);
    p.bias = below(3) ? floats(outputs, RANDOM) : NULL;
    p.input.shift = below(2) ? floats(inputs, RANDOM) : NULL;
    p.layout = layout_of(kind_of(input), outputs, inputs, bits);
    float *expected = take(rows * outputs * 4);
    int8_t *signs = take(outputs * inputs);
    int *codes = take(inputs * 4);
    for (int64_t n = 0; n < outputs; n++)
        for (int64_t j = 0; j < inputs; j++)
            signs[n * inputs + j] = bit(bits + n * ceil_div(inputs, 8), j) ? 1 : -1;
    for (int64_t m = 0; m < rows; m++) {
        float row_scale = codes_of(&p.input, p.x + m * inputs, inputs, codes);
        for (int64_t n = 0; n < outputs; n++) {
            int dot = 0;
            for (int64_t j = 0; j < inputs; j++)
                dot += codes[j] * signs[n * inputs + j];
            expected[m * outputs + n] = (float)dot * (p.scale[n] * row_scale) + (p.bias ? p.bias[n] : 0);
        }
    }
    p.expected = expected;
    return p;
}

static void check_product(const rebnn_isa *isa, const product *p, int threads, float *y)
{
    memset(y, 0xa5, (size_t)(p->rows * p->outputs) * 4);
    rebnn_status status = rebnn_linear(isa, threads, p->rows, p->inputs, p->outputs, p->x, &p->input, p->layout,
                                       p->scale, p->bias, y);
    CHECK(status == REBNN_OK, "%s linear: %d", isa->name, status);
    check_floats(isa->name, "linear", y, p->expected, p->rows * p->outputs);
}

static void test_encode(const rebnn_input *input, int64_t rows, int64_t n, int kind)
{
    rebnn_input with_shift = *input;
    float *x = floats(rows * n, kind), *scale = take(rows * 4), *expected_scale = take(rows * 4);
    int *codes = take(n * 4), token = input->codes == REBNN_TOKEN;
    uint8_t *expected = take(rows * n), *result = take(rows * n);
    with_shift.shift = token ? NULL : floats(n, RANDOM);
    for (int64_t m = 0; m < rows; m++) {
        expected_scale[m] = codes_of(&with_shift, x + m * n, n, codes);
        for (int64_t j = 0; j < n; j++)
            expected[m * n + j] = (uint8_t)(token                         ? codes[j] + 128
                                            : input->codes == REBNN_SIGN ? codes[j] > 0
                                                                         : codes[j] - input->low);
    }
    for (int i = 0; i < isa_count; i++) {
        rebnn_status status = rebnn_encode(isas[i], rows, n, x, &with_shift, result, token ? scale : NULL);
        CHECK(status == REBNN_OK, "%s encode: %d", isas[i]->name, status);
        check_bytes(isas[i]->name, "encode", result, expected, rows * n);
        if (token)
            check_floats(isas[i]->name, "encode: scale", scale, expected_scale, rows);
    }
    release();
}

typedef struct {
    const rebnn_isa *isa;
    const product *product;
    float *y;
} caller;

static void *call(void *pointer)
{
    const caller *c = pointer;
    for (int i = 0; i < 2; i++)
        check_product(c->isa, c->product, 1 + i, c->y);
    return NULL;
}

static void test_linear(void)
{
    for (int kind = 0; kind < 2; kind++)
        for (int s = 0; s < COUNT(sizes); s++)
            for (int t = 0; t < COUNT(sizes); t += 3)
                test_layout(kind ? REBNN_QUADS : REBNN_WORDS, sizes[(s + t) % 12], sizes[s]);
    for (int c = 0; c < COUNT(inputs_of); c++)
        for (int s = 0; s < COUNT(sizes); s++) {
            test_encode(&inputs_of[c], row_counts[s % 5], sizes[s], s % 2 ? RANDOM : SPECIAL);
            for (int t = 0; t < 3; t++) {
                int64_t outputs = sizes[(5 * s + 3 * c + t) % (t ? 12 : 14)];
                int64_t rows = outputs > 500 ? 2 : row_counts[(s + c + t) % COUNT(row_counts)];
                product p = make_product(&inputs_of[c], rows, sizes[s], outputs, (s + c + t) % KINDS);
                float *y = take(rows * outputs * 4);
                for (int i = 0; i < isa_count; i++)
                    check_product(isas[i], &p, 1 + t, y);
                release();
            }
        }
    printf("layouts, encode, linear: %d kinds of inputs\n", COUNT(inputs_of));
}

/* Enough work for threads: many rows are split by rows, few by outputs. */
static void test_threads(void)
{
    static const struct { int input; int64_t rows, inputs, outputs; } large[] = {
        {0, 33, 768, 767}, {0, 9, 769, 2431}, {6, 9, 767, 769}, {9, 33, 300, 257}, {11, 7, 767, 513},
    };
    for (int l = 0; l < COUNT(large); l++) {
        product p = make_product(&inputs_of[large[l].input], large[l].rows, large[l].inputs, large[l].outputs, RANDOM);
        CHECK((double)p.rows * (double)p.inputs * (double)p.outputs * p.input.bits > 1 << 24, "not enough work");
        float *y[3];
        for (int t = 0; t < 3; t++)
            y[t] = take(p.rows * p.outputs * 4);
        for (int i = 0; i < isa_count; i++) {
            for (int threads = 1; threads <= 3; threads++)
                check_product(isas[i], &p, threads, y[0]);
            if (l % 2)
                continue;
            pthread_t ids[3];
            caller callers[3];
            for (int t = 0; t < 3; t++) {
                callers[t] = (caller){isas[i], &p, y[t]};
                CHECK(!pthread_create(&ids[t], NULL, call, &callers[t]), "no threads");
            }
            for (int t = 0; t < 3; t++)
                pthread_join(ids[t], NULL);
        }
        release();
    }
    printf("threads: 1, 2, 3; three callers at once\n");
}

static void test_embedding(int threads, int64_t count, int64_t entries, int64_t width)
{
    uint8_t *bits = random_rows(entries, width, RANDOM);
    float *scale = floats(entries, RANDOM), *y = take(count * width * 4), *expected = take(count * width * 4);
    int64_t *index = take(count * 8);
    for (int64_t i = 0; i < count; i++) {
        index[i] = below(entries);
        for (int64_t j = 0; j < width; j++)
            expected[i * width + j] = bit(bits + index[i] * ceil_div(width, 8), j) ? scale[index[i]] : -scale[index[i]];
    }
    rebnn_status status = rebnn_embedding(threads, count, entries, width, index, bits, scale, y);
    CHECK(status == REBNN_OK, "embedding: %d", status);
    check_floats("all", "embedding", y, expected, count * width);
    if (count) {
        index[count - 1] = count % 2 ? -1 : entries;
        status = rebnn_embedding(threads, count, entries, width, index, bits, scale, y);
        CHECK(status == REBNN_BAD_ARGUMENT, "embedding takes index %lld of %lld", (long long)index[count - 1],
              (long long)entries);
    }
    release();
}

/* ---- Training -------------------------------------------------------------------------------------------------- */

static void test_balance(int threads, int64_t rows, int64_t width, int kind, int centered)
{
    int64_t count = rows * width;
    float *weight = floats(count, kind), *gradient = floats(count, kind), *scale = floats(rows, RANDOM);
    float *mean = centered ? floats(rows, RANDOM) : NULL, *gamma = floats(rows, RANDOM), *largest = take(rows * 4);
    float *most = take(rows * 4), *pulled = take(count * 4), *norm = take(rows * 4);
    uint8_t *signs = take(count), *before = take(count), *earlier = take(count);
    int32_t *flips = take(rows * 4), *flips_back = take(rows * 4);
    for (int64_t i = 0; i < rows; i++) {
        most[i] = 0;
        if (i % 3 == 2)
            gamma[i] = 0;
        for (int64_t j = i * width; j < (i + 1) * width; j++) {
            float term = (weight[j] - (weight[j] >= 0 ? scale[i] : -scale[i])) * gamma[i], magnitude = fabsf(gradient[j]);
            before[j] = weight[j] - (mean ? mean[i] : 0) >= 0;
            if (most[i] == most[i] && !(magnitude <= most[i])) /* a NaN stays */
                most[i] = magnitude;
            pulled[j] = gamma[i] != 0 ? gradient[j] + term : gradient[j];
        }
    }
    GOOD(rebnn_balance_measure(threads, rows, width, weight, mean, gradient, signs, largest));
    CHECK(!memcmp(signs, before, (size_t)count), "signs");
    check_floats("all", "largest gradient", largest, most, rows);
    GOOD(rebnn_balance_pull(threads, rows, width, weight, scale, gamma, gradient, norm));
    check_floats("all", "pull", gradient, pulled, count);
    for (int64_t i = 0; i < rows; i++) {
        double sum = 0;
        for (int64_t j = 0; j < width && gamma[i] != 0; j++)
            sum += fabsf(weight[i * width + j]);
        CHECK(same(norm[i], (float)sum) || fabs(norm[i] - sum) <= 1e-5 * sum, "norm %g, expected %g", norm[i], sum);
    }
    for (int64_t j = 0; j < count; j++) {
        earlier[j] = (uint8_t)below(2);
        if (below(3) == 0)
            weight[j] = -weight[j];
    }
    for (int passes = 0; passes < 2; passes++) {
        const uint8_t *known = passes ? earlier : NULL;
        memcpy(signs, before, (size_t)count);
        GOOD(rebnn_balance_count(threads, rows, width, weight, mean, signs, known, flips, flips_back));
        for (int64_t i = 0; i < rows; i++) {
            int32_t changed = 0, back = 0;
            for (int64_t j = i * width; j < (i + 1) * width; j++) {
                int flipped = before[j] != (weight[j] - (mean ? mean[i] : 0) >= 0);
                CHECK(signs[j] == flipped, "which have flipped");
                changed += flipped;
                back += flipped && known && known[j];
            }
            CHECK(flips[i] == changed && flips_back[i] == back, "%d flips, %d back", flips[i], flips_back[i]);
        }
    }
    release();
}

static void test_balances(void)
{
    for (int kind = RANDOM; kind <= SPECIAL; kind += SPECIAL - RANDOM)
        for (int s = 0; s < COUNT(sizes); s++)
            test_balance(1, 1 + s % 5, sizes[s], kind, s % 2);
    for (int threads = 1; threads <= 3; threads++)
        test_balance(threads, 385, 769, RANDOM, threads == 2);
    printf("balance: measured, pulled, counted\n");
}

/* ---- Convolutions ---------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t batch, channels, height, width, outputs, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
} conv_shape;

static void test_conv(const rebnn_input *kind_of_input, conv_shape s, int kind, int threads)
{
    rebnn_input input = *kind_of_input;
    int64_t positions = s.kernel_h * s.kernel_w, elements = s.channels * positions, area = s.height * s.width;
    int64_t out_h = (s.height + 2 * s.pad_h - s.kernel_h) / s.stride_h + 1;
    int64_t out_w = (s.width + 2 * s.pad_w - s.kernel_w) / s.stride_w + 1, count = s.batch * s.outputs * out_h * out_w;
    float *x = floats(s.batch * s.channels * area, kind), *scale = floats(s.outputs, RANDOM);
    float *bias = below(3) ? floats(s.outputs, RANDOM) : NULL, *y = take(count * 4), *expected = take(count * 4);
    uint8_t *bits = random_rows(s.outputs, elements, kind == PLUS ? PLUS : RANDOM);
    int *codes = take(s.batch * s.channels * area * 4);
    int8_t *signs = take(s.outputs * elements);
    void *layout = take(rebnn_conv_layout_size(kind_of(&input), s.outputs, s.channels, s.kernel_h, s.kernel_w));
    GOOD(rebnn_conv_layout_fill(kind_of(&input), s.outputs, s.channels, s.kernel_h, s.kernel_w, bits, layout));
    float *shift = below(2) ? floats(s.channels, RANDOM) : NULL;
    rebnn_residual r = below(2) ? random_residual(s.outputs, count) : (rebnn_residual){0};
    for (int64_t i = 0; i < s.outputs * elements; i++)
        signs[i] = bit(bits + i / elements * ceil_div(elements, 8), i % elements) ? 1 : -1;
    for (int64_t i = 0; i < s.batch * s.channels * area; i++) {
        input.shift = shift ? shift + i / area % s.channels : NULL;
        codes_of(&input, x + i, 1, codes + i);
    }
    input.shift = shift;
    float *next = expected;
    for (int64_t image = 0; image < s.batch; image++)
        for (int64_t o = 0; o < s.outputs; o++)
            for (int64_t i = 0; i < out_h; i++)
                for (int64_t j = 0; j < out_w; j++) {
                    int dot = 0;
                    for (int64_t c = 0; c < s.channels; c++)
                        for (int64_t k = 0; k < positions; k++) {
                            int64_t row = i * s.stride_h - s.pad_h + k / s.kernel_w;
                            int64_t column = j * s.stride_w - s.pad_w + k % s.kernel_w;
                            if (row >= 0 && row < s.height && column >= 0 && column < s.width)
                                dot += codes[(image * s.channels + c) * area + row * s.width + column] *
                                       signs[o * elements + c * positions + k];
                        }
                    float value = (float)dot * (scale[o] * input.scale) + (bias ? bias[o] : 0);
                    *next = with_residual(value, &r, o, next - expected);
                    next++;
                }
    for (int i = 0; i < isa_count; i++) {
        memset(y, 0xa5, (size_t)count * 4);
        GOOD(rebnn_conv2d(isas[i], threads, s.batch, s.channels, s.height, s.width, s.outputs, s.kernel_h, s.kernel_w,
                          s.stride_h, s.stride_w, s.pad_h, s.pad_w, x, &input, layout, scale, bias,
                          r.shortcut ? &r : NULL, y));
        check_floats(isas[i]->name, "conv2d", y, expected, count);
    }
    release();
}

static void test_convolutions(void)
{
    static const int64_t channels[] = {0, 1, 3, 63, 64, 65, 128};
    static const int64_t outputs[] = {1, 3, 16, 17, 33};
    for (int c = 0; c < COUNT(channels); c++)
        for (int kernel = 1; kernel <= 3; kernel += 2)
            for (int stride = 1; stride <= 2; stride++)
                for (int pad = 0; pad <= 1; pad++)
                    for (int i = 0; i < 2; i++) { /* SIGN, and the others in turn */
                        int turn = c + kernel + stride + 2 * pad, input = i ? 1 + (3 * turn + c) % 10 : 0;
                        conv_shape s = {1 + turn % 2, channels[c], 7 - turn % 3, 5 + turn % 5, outputs[turn % 5],
                                        kernel, kernel, stride, stride, pad, pad};
                        test_conv(&inputs_of[input], s, turn % KINDS, 1);
                    }
    static const conv_shape odd[] = {
        {2, 5, 4, 9, 18, 2, 3, 1, 3, 0, 2},  {1, 70, 1, 40, 7, 1, 5, 1, 1, 0, 2}, {1, 9, 3, 3, 5, 3, 3, 1, 1, 4, 3},
        {1, 64, 2, 2, 16, 5, 4, 2, 1, 2, 1}, {1, 3, 0, 2, 4, 2, 2, 1, 1, 1, 1},   {1, 1, 23, 31, 1, 3, 3, 5, 4, 1, 1},
        {0, 3, 5, 5, 4, 3, 3, 1, 1, 1, 1},   {2, 3, 5, 5, 0, 3, 3, 1, 1, 1, 1},   {1, 380, 4, 5, 9, 5, 5, 1, 1, 2, 2},
        {2, 70, 4, 70, 9, 2, 3, 1, 2, 0, 1},
    }; /* kernels that are not square, no row at all, padding beyond the kernel, strides beyond it, long windows and rows */
    for (int i = 0; i < COUNT(odd); i++)
        for (int input = 0; input < 11; input += i % 2 ? 1 : 3)
            test_conv(&inputs_of[input], odd[i], input % KINDS, 1 + i % 3);
    for (int threads = 1; threads <= 3; threads++) { /* enough work, images and rows that are split */
        test_conv(&inputs_of[0], (conv_shape){3, 64, 15, 17, 49, 3, 3, 1, 1, 1, 1}, RANDOM, threads);
        test_conv(&inputs_of[8], (conv_shape){1, 65, 13, 17, 33, 3, 3, 1, 1, 1, 1}, SPECIAL, threads);
    }
    test_conv(&inputs_of[8], (conv_shape){1, 64, 3, 40, 33, 3, 3, 1, 1, 1, 1}, RANDOM, 5); /* less than a row each */
    printf("conv2d\n");
}

/* Elements of conv weights in the order of rebnn.h. */
static void test_conv_layout(rebnn_layout kind, int64_t outputs, int64_t channels, int64_t kernel_h, int64_t kernel_w)
{
    int64_t positions = kernel_h * kernel_w, padded = round_up(channels, kind == REBNN_WORDS ? 64 : 4);
    int64_t inputs = positions * padded, bytes = ceil_div(inputs, 8), from = ceil_div(channels * positions, 8);
    int64_t size = rebnn_layout_size(kind, outputs, inputs);
    uint8_t *bits = random_rows(outputs, channels * positions, RANDOM), *rows = take(outputs * bytes);
    memset(rows, 0, (size_t)(outputs * bytes));
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t j = 0; j < inputs; j++)
            if (j % padded < channels && bit(bits + o * from, j % padded * positions + j / padded))
                rows[o * bytes + j / 8] |= (uint8_t)(1 << j % 8);
    CHECK(rebnn_conv_layout_size(kind, outputs, channels, kernel_h, kernel_w) == size, "conv_layout_size");
    void *layout = take(size);
    GOOD(rebnn_conv_layout_fill(kind, outputs, channels, kernel_h, kernel_w, bits, layout));
    check_bytes("all", "conv_layout_fill", layout, layout_of(kind, outputs, inputs, rows), size);
    release();
}

/* ---- Arguments ------------------------------------------------------------------------------------------------ */

static void test_arguments(void)
{
    const rebnn_isa *isa = rebnn_isa_find(NULL);
    const rebnn_input sign = inputs_of[0], token = inputs_of[11];
    float x[64] = {0}, y[64], scale[64] = {0}, token_scale[2];
    uint8_t bits[64] = {0}, codes[64];
    int64_t index[2] = {0};
    int32_t flips[2];
    uint64_t layout[128] = {0};
    static const rebnn_input bad_inputs[] = {
        {3, 1, 0, 1, NULL},           {-1, 1, 0, 1, NULL},            {REBNN_SIGN, 2, 0, 1, NULL},
        {REBNN_SIGN, 1, -1, 1, NULL}, {REBNN_LEVELS, 3, 0, 1, NULL},  {REBNN_LEVELS, 0, 0, 1, NULL},
        {REBNN_LEVELS, 2, 1, 1, NULL}, {REBNN_LEVELS, 2, -3, 1, NULL}, {REBNN_LEVELS, 2, 0, 0, NULL},
        {REBNN_LEVELS, 2, 0, -1, NULL}, {REBNN_LEVELS, 2, 0, NAN, NULL}, {REBNN_LEVELS, 16, 0, 1, NULL},
        {REBNN_TOKEN, 4, 0, 1, NULL}, {REBNN_TOKEN, 8, -128, 1, NULL},
    };
    CHECK(rebnn_abi_version() == REBNN_ABI_VERSION, "abi");
    CHECK(!rebnn_isa_name(-1) && !rebnn_isa_name(100) && !rebnn_isa_find("nothing") && !rebnn_isa_runs("nothing") &&
              !rebnn_isa_runs(NULL) && rebnn_isa_runs("portable"), "names");
    CHECK(rebnn_layout_size(2, 1, 1) == -1 && rebnn_layout_size(REBNN_WORDS, -1, 1) == -1 &&
              rebnn_layout_size(REBNN_WORDS, 1, -1) == -1 && rebnn_layout_size(REBNN_QUADS, INT32_MAX, 1) == -1 &&
              rebnn_layout_size(REBNN_WORDS, 1, REBNN_MAX_INPUTS + 1) == -1, "layout_size");
    CHECK(rebnn_layout_size(REBNN_WORDS, 0, 5) == 0 && rebnn_layout_size(REBNN_QUADS, 1, 0) == 64, "layout_size");
    BAD(rebnn_layout_fill(2, 1, 1, bits, layout));
    BAD(rebnn_layout_fill(REBNN_WORDS, 1, 1, NULL, layout));
    BAD(rebnn_layout_fill(REBNN_WORDS, 1, 1, bits, NULL));
    BAD(rebnn_layout_fill(REBNN_WORDS, 1, 0, bits, NULL)); /* the counts of set bits are there without inputs, too */
    BAD(rebnn_layout_fill(REBNN_QUADS, -1, 1, bits, layout));
    GOOD(rebnn_layout_fill(REBNN_QUADS, 0, 9, NULL, NULL));
    GOOD(rebnn_layout_fill(REBNN_QUADS, 1, 0, NULL, layout));
    for (int i = 0; i < COUNT(bad_inputs); i++) {
        BAD(rebnn_linear(isa, 1, 1, 1, 1, x, &bad_inputs[i], layout, scale, NULL, y));
        BAD(rebnn_encode(isa, 1, 1, x, &bad_inputs[i], codes, token_scale));
    }
    BAD(rebnn_encode(NULL, 1, 1, x, &sign, codes, NULL));
    BAD(rebnn_encode(isa, -1, 1, x, &sign, codes, NULL));
    BAD(rebnn_encode(isa, 1, -1, x, &sign, codes, NULL));
    BAD(rebnn_encode(isa, 1, REBNN_MAX_INPUTS + 1, x, &sign, codes, NULL));
    BAD(rebnn_encode(isa, 1, 1, NULL, &sign, codes, NULL));
    BAD(rebnn_encode(isa, 1, 1, x, NULL, codes, NULL));
    BAD(rebnn_encode(isa, 1, 1, x, &sign, NULL, NULL));
    BAD(rebnn_encode(isa, 1, 1, x, &token, codes, NULL));
    GOOD(rebnn_encode(isa, 0, 1, NULL, &token, NULL, NULL));
    GOOD(rebnn_encode(isa, 1, 0, NULL, &sign, NULL, NULL));
    BAD(rebnn_linear(NULL, 1, 1, 1, 1, x, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 0, 1, 1, 1, x, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, REBNN_MAX_THREADS + 1, 1, 1, 1, x, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, -1, 1, 1, x, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, -1, 1, x, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, 1, -1, x, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, REBNN_MAX_INPUTS + 1, 1, x, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, 1, INT32_MAX, x, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, 1, 1, NULL, &sign, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, 1, 1, x, NULL, layout, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, 1, 1, x, &sign, NULL, scale, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, 1, 1, x, &sign, layout, NULL, NULL, y));
    BAD(rebnn_linear(isa, 1, 1, 1, 1, x, &sign, layout, scale, NULL, NULL));
    GOOD(rebnn_linear(isa, 1, 0, 1, 1, NULL, &sign, NULL, NULL, NULL, NULL));
    GOOD(rebnn_linear(isa, 1, 1, 1, 0, NULL, &sign, NULL, NULL, NULL, NULL));
    BAD(rebnn_embedding(0, 1, 1, 1, index, bits, scale, y));
    BAD(rebnn_embedding(1, -1, 1, 1, index, bits, scale, y));
    BAD(rebnn_embedding(1, 1, -1, 1, index, bits, scale, y));
    BAD(rebnn_embedding(1, 1, 1, -1, index, bits, scale, y));
    BAD(rebnn_embedding(1, 1, 0, 1, index, bits, scale, y));
    BAD(rebnn_embedding(1, 1, 1, 1, NULL, bits, scale, y));
    BAD(rebnn_embedding(1, 1, 1, 1, index, NULL, scale, y));
    BAD(rebnn_embedding(1, 1, 1, 1, index, bits, NULL, y));
    BAD(rebnn_embedding(1, 1, 1, 1, index, bits, scale, NULL));
    GOOD(rebnn_embedding(1, 0, 1, 1, NULL, bits, scale, NULL));
    BAD(rebnn_balance_measure(0, 1, 1, x, NULL, y, bits, scale));
    BAD(rebnn_balance_measure(1, -1, 1, x, NULL, y, bits, scale));
    BAD(rebnn_balance_measure(1, 1, -1, x, NULL, y, bits, scale));
    BAD(rebnn_balance_measure(1, 0, (int64_t)INT32_MAX + 1, x, NULL, y, bits, scale));
    BAD(rebnn_balance_measure(1, 1, 1, NULL, NULL, y, bits, scale));
    BAD(rebnn_balance_measure(1, 1, 1, x, NULL, NULL, bits, scale));
    BAD(rebnn_balance_measure(1, 1, 1, x, NULL, y, NULL, scale));
    BAD(rebnn_balance_measure(1, 1, 1, x, NULL, y, bits, NULL));
    GOOD(rebnn_balance_measure(1, 0, 1, NULL, NULL, NULL, NULL, NULL));
    BAD(rebnn_balance_pull(0, 1, 1, x, scale, scale, y, y));
    BAD(rebnn_balance_pull(1, 1, 1, NULL, scale, scale, y, y));
    BAD(rebnn_balance_pull(1, 1, 1, x, NULL, scale, y, y));
    BAD(rebnn_balance_pull(1, 1, 1, x, scale, NULL, y, y));
    BAD(rebnn_balance_pull(1, 1, 1, x, scale, scale, NULL, y));
    BAD(rebnn_balance_pull(1, 1, 1, x, scale, scale, y, NULL));
    GOOD(rebnn_balance_pull(1, 0, 1, NULL, NULL, NULL, NULL, NULL));
    BAD(rebnn_balance_count(0, 1, 1, x, NULL, bits, NULL, flips, flips));
    BAD(rebnn_balance_count(1, 1, 1, NULL, NULL, bits, NULL, flips, flips));
    BAD(rebnn_balance_count(1, 1, 1, x, NULL, NULL, NULL, flips, flips));
    BAD(rebnn_balance_count(1, 1, 1, x, NULL, bits, NULL, NULL, flips));
    BAD(rebnn_balance_count(1, 1, 1, x, NULL, bits, NULL, flips, NULL));
    GOOD(rebnn_balance_count(1, 0, 1, NULL, NULL, NULL, NULL, NULL, NULL));
#define CONV(channels, height, outputs, kernel, stride, pad, x, input, layout, scale, y)                              \
    rebnn_conv2d(isa, 1, 1, channels, height, 4, outputs, kernel, 2, stride, 1, pad, 0, x, input, layout, scale,      \
                 NULL, NULL, y)
    GOOD(CONV(1, 4, 1, 2, 1, 0, x, &sign, layout, scale, y));
    BAD(CONV(-1, 4, 1, 2, 1, 0, x, &sign, layout, scale, y));
    BAD(CONV(1, -1, 1, 2, 1, 2, x, &sign, layout, scale, y));
    BAD(CONV(1, 4, -1, 2, 1, 0, x, &sign, layout, scale, y));
    BAD(CONV(1, 4, 1, 0, 1, 0, x, &sign, layout, scale, y));
    BAD(CONV(1, 4, 1, 5, 1, 0, x, &sign, layout, scale, y)); /* the window is larger than the image */
    BAD(CONV(1, 4, 1, 2, 0, 0, x, &sign, layout, scale, y));
    BAD(CONV(1, 4, 1, 2, 1, -1, x, &sign, layout, scale, y));
    BAD(CONV(1, 4, INT32_MAX, 2, 1, 0, x, &sign, layout, scale, y));
    BAD(CONV(REBNN_MAX_INPUTS, 4, 1, 2, 1, 0, x, &sign, layout, scale, y));
    BAD(CONV(1, INT32_MAX - 16, INT32_MAX - 16, 2, 1, 9, x, &sign, layout, scale, y)); /* too much */
    BAD(CONV(1, 4, 1, 2, 1, 0, NULL, &sign, layout, scale, y));
    BAD(CONV(1, 4, 1, 2, 1, 0, x, NULL, layout, scale, y));
    BAD(CONV(1, 4, 1, 2, 1, 0, x, &token, layout, scale, y));
    BAD(CONV(1, 4, 1, 2, 1, 0, x, &bad_inputs[0], layout, scale, y));
    BAD(CONV(1, 4, 1, 2, 1, 0, x, &sign, NULL, scale, y));
    BAD(CONV(1, 4, 1, 2, 1, 0, x, &sign, layout, NULL, y));
    BAD(CONV(1, 4, 1, 2, 1, 0, x, &sign, layout, scale, NULL));
    BAD(rebnn_conv2d(NULL, 1, 1, 1, 4, 4, 1, 2, 2, 1, 1, 0, 0, x, &sign, layout, scale, NULL, NULL, y));
    BAD(rebnn_conv2d(isa, 0, 1, 1, 4, 4, 1, 2, 2, 1, 1, 0, 0, x, &sign, layout, scale, NULL, NULL, y));
    for (int missing = 0; missing < 4; missing++) {
        rebnn_residual r = {missing ? x : NULL, missing - 1 ? scale : NULL, missing - 2 ? scale : NULL,
                            missing - 3 ? scale : NULL};
        BAD(rebnn_conv2d(isa, 1, 1, 1, 4, 4, 1, 2, 2, 1, 1, 0, 0, x, &sign, layout, scale, NULL, &r, y));
    }
    CHECK(rebnn_conv_layout_size(2, 1, 1, 1, 1) == -1 && rebnn_conv_layout_size(REBNN_WORDS, -1, 1, 1, 1) == -1 &&
              rebnn_conv_layout_size(REBNN_WORDS, 1, -1, 1, 1) == -1 &&
              rebnn_conv_layout_size(REBNN_WORDS, 1, 1, 0, 1) == -1 &&
              rebnn_conv_layout_size(REBNN_WORDS, 1, 65, REBNN_MAX_INPUTS / 128 + 1, 1) == -1 &&
              rebnn_conv_layout_size(REBNN_WORDS, 1, 1, INT64_MAX / 2, INT64_MAX / 2) == -1,
          "conv_layout_size");
    BAD(rebnn_conv_layout_fill(REBNN_WORDS, 1, 1, 1, 1, NULL, layout));
    BAD(rebnn_conv_layout_fill(REBNN_WORDS, 1, 1, 1, 1, bits, NULL));
    BAD(rebnn_conv_layout_fill(REBNN_WORDS, 1, 1, 0, 1, bits, layout));
    printf("arguments: what cannot be is refused\n");
}

int main(void)
{
    printf("instruction sets:");
    for (int i = 0; rebnn_isa_name(i); i++) {
        const char *name = rebnn_isa_name(i);
        const rebnn_isa *isa = rebnn_isa_find(name);
        CHECK(!isa == !rebnn_isa_runs(name), "%s", name);
        printf(isa ? " %s" : " (%s does not run here)", name);
        if (isa)
            isas[isa_count++] = isa;
    }
    printf("\n");
    CHECK(rebnn_isa_find(NULL) == isas[0], "the best first");
    test_arguments();
    test_tables();
    test_linear();
    test_threads();
    for (int kind = 0; kind < 2; kind++)
        for (int c = 1; c < COUNT(sizes); c += 2)
            test_conv_layout(kind ? REBNN_QUADS : REBNN_WORDS, 1 + c, sizes[c] % 130, 1 + c % 3, 1 + c % 4);
    test_convolutions();
    for (int s = 0; s < COUNT(sizes); s++)
        test_embedding(1, sizes[s], 19, sizes[(5 * s + 3) % COUNT(sizes)]);
    for (int threads = 1; threads <= 3; threads++)
        test_embedding(threads, 401, 33, 769);
    printf("embedding\n");
    test_balances();
    return 0;
}

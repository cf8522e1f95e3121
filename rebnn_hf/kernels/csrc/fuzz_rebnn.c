/* The functions of rebnn.h with random arguments, for sanitizers to watch: `fuzz_rebnn [rounds] [seed]`.
 *
 * One half of the calls is within the documented limits, with floats of every kind; all instruction sets must give the
 * same numbers. In the other half one argument is beyond its limit, and the call must refuse it without a look
 * at its buffers. Buffers are exactly as large as they must be. */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encoder.h"
#include "isa.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static uint64_t state;
static long round_number;
static const char *function;

static const rebnn_isa *isas[8];
static int isa_count;

static uint64_t random_bits(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1d;
}

static int64_t below(int64_t n) { return (int64_t)((random_bits() >> 33) % (uint64_t)n); }

static void fail(const char *what)
{
    printf("round %ld, %s: %s\n", round_number, function, what);
    exit(1);
}

/* ---- Buffers ---- */

static void *buffers[512];
static int buffer_count;

static void *take(int64_t bytes)
{
    void *buffer = malloc(bytes ? (size_t)bytes : 1);
    if (!buffer || buffer_count == COUNT(buffers))
        fail("no memory");
    return buffers[buffer_count++] = buffer;
}

/* Frees what was taken since there were so many. */
static void release(int kept)
{
    while (buffer_count > kept)
        free(buffers[--buffer_count]);
}

static void *random_bytes(int64_t bytes)
{
    uint8_t *buffer = take(bytes);
    for (int64_t i = 0; i < bytes; i++)
        buffer[i] = (uint8_t)random_bits();
    return buffer;
}

/* Ordinary numbers, thresholds, and whatever 32 bits can mean. */
static float *floats(int64_t count)
{
    float *x = take(count * 4);
    int kind = (int)below(4);
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)random_bits();
        x[i] = (float)((int64_t)(bits % 257) - 128) / 32;
        if (kind == 0 && bits >> 30 == 0) {
            bits = bits >> 20 & 1 ? bits : (bits & 0x80000000u) | (bits >> 21 & 1 ? 0x7f800000u : 0x7fc00000u);
            memcpy(x + i, &bits, 4);
        }
    }
    return x;
}

static float *maybe_floats(int64_t count) { return below(2) ? floats(count) : NULL; }

static uint8_t *random_mask(int64_t count)
{
    uint8_t *mask = random_bytes(count);
    int kind = (int)below(3);
    for (int64_t i = 0; i < count; i++)
        mask[i] = (uint8_t)(kind == 0 ? mask[i] & 1 : kind - 1);
    return mask;
}

/* ---- Arguments ---- */

/* Small, and near the widths at which kernels change their step. */
static int64_t size(int64_t most)
{
    static const int64_t edges[] = {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257};
    int64_t drawn = below(2) ? edges[below(COUNT(edges))] : below(most + 1);
    return drawn < most ? drawn : most;
}

/* Beyond the limits of every size there is. */
static int64_t beyond(void)
{
    static const int64_t sizes[] = {-1, -64, INT32_MIN, INT64_MIN, INT64_MIN + 1, INT32_MAX, (int64_t)1 << 40,
                                    INT64_MAX - 62, INT64_MAX};
    return sizes[below(COUNT(sizes))];
}

static int64_t negative(void) { return below(2) ? -1 - below(1 << 20) : INT64_MIN + below(9); }

static rebnn_input random_input(int convolution)
{
    static const int widths[] = {1, 2, 4, 8};
    rebnn_input input = {.codes = (int32_t)below(convolution ? 2 : 3), .bits = 1};
    input.scale = 0.01f + (float)below(100) / 50;
    if (input.codes == REBNN_LEVELS) {
        input.bits = widths[below(4)];
        input.low = -(int32_t)below((1 << (input.bits - 1)) + 1);
    }
    if (input.codes == REBNN_TOKEN)
        input.bits = 8;
    return input;
}

static rebnn_layout kind_of(const rebnn_input *input) { return input->bits == 8 ? REBNN_QUADS : REBNN_WORDS; }

static int threads(void) { return 1 + (int)below(3); }

static void must_refuse(rebnn_status status)
{
    if (status != REBNN_BAD_ARGUMENT)
        fail("took an argument beyond its limit");
}

/* The same bytes from all instruction sets; the first one's are kept. NaN are all one: which one is not defined. */
static void must_agree(rebnn_status status, int isa, float *y, float **first, int64_t count)
{
    if (status != REBNN_OK)
        fail("refused good arguments");
    if (isa == 0) {
        *first = take(count * 4);
        memcpy(*first, y, (size_t)count * 4);
    }
    for (int64_t i = 0; i < count; i++)
        if (memcmp(y + i, *first + i, 4) && !(y[i] != y[i] && (*first)[i] != (*first)[i]))
            fail("two instruction sets give different numbers");
}

static void *layout_of(rebnn_layout kind, int64_t outputs, int64_t inputs)
{
    void *layout = take(rebnn_layout_size(kind, outputs, inputs));
    if (rebnn_layout_fill(kind, outputs, inputs, random_bytes(outputs * ceil_div(inputs, 8)), layout) != REBNN_OK)
        fail("refused a layout");
    return layout;
}

/* ---- Calls ---- */

static void fuzz_layout(void)
{
    rebnn_layout kind = (rebnn_layout)below(2);
    int64_t outputs = size(70), inputs = size(300);
    layout_of(kind, outputs, inputs);
    *(below(2) ? &outputs : &inputs) = beyond();
    if (rebnn_layout_size(kind, outputs, inputs) != -1)
        fail("has a size beyond the limits");
    must_refuse(rebnn_layout_fill(kind, outputs, inputs, take(0), take(0)));
}

static void fuzz_conv_layout(void)
{
    rebnn_layout kind = (rebnn_layout)below(2);
    int64_t v[] = {size(40), size(130), 1 + below(4), 1 + below(4)};
    int64_t bits = v[0] * ceil_div(v[1] * v[2] * v[3], 8), bytes = rebnn_conv_layout_size(kind, v[0], v[1], v[2], v[3]);
    if (rebnn_conv_layout_fill(kind, v[0], v[1], v[2], v[3], random_bytes(bits), take(bytes)) != REBNN_OK)
        fail("refused a layout");
    v[below(4)] = beyond();
    if (rebnn_conv_layout_size(kind, v[0], v[1], v[2], v[3]) != -1)
        fail("has a size beyond the limits");
    must_refuse(rebnn_conv_layout_fill(kind, v[0], v[1], v[2], v[3], take(0), take(0)));
}

static void fuzz_encode(void)
{
    rebnn_input input = random_input(0);
    int64_t rows = size(20), inputs = size(300);
    float *x = floats(rows * inputs), *scale = take(rows * 4), *first_scale = NULL;
    uint8_t *codes = take(rows * inputs), *first = take(rows * inputs);
    input.shift = input.codes == REBNN_TOKEN ? NULL : maybe_floats(inputs);
    for (int i = 0; i < isa_count; i++) {
        rebnn_status status = rebnn_encode(isas[i], rows, inputs, x, &input, codes, scale);
        must_agree(status, i, scale, &first_scale, input.codes == REBNN_TOKEN ? rows : 0);
        if (i == 0)
            memcpy(first, codes, (size_t)(rows * inputs));
        if (memcmp(first, codes, (size_t)(rows * inputs)))
            fail("two instruction sets give different codes");
    }
    must_refuse(rebnn_encode(isas[0], rows, beyond(), x, &input, codes, scale));
    must_refuse(rebnn_encode(isas[0], negative(), inputs, x, &input, codes, scale));
    if (input.codes != REBNN_TOKEN && rebnn_encode(isas[0], INT64_MAX, 0, NULL, &input, NULL, NULL) != REBNN_OK)
        fail("refused rows of nothing");
}

static void fuzz_linear(void)
{
    rebnn_input input = random_input(0);
    int64_t rows = size(40), inputs = size(300), outputs = size(70);
    float *x = floats(rows * inputs), *scale = floats(outputs), *bias = maybe_floats(outputs);
    float *y = take(rows * outputs * 4), *first = NULL;
    void *layout = layout_of(kind_of(&input), outputs, inputs);
    input.shift = maybe_floats(inputs);
    for (int i = 0; i < isa_count; i++)
        must_agree(rebnn_linear(isas[i], threads(), rows, inputs, outputs, x, &input, layout, scale, bias, y), i, y,
                   &first, rows * outputs);
    must_refuse(rebnn_linear(isas[0], 1, rows, beyond(), outputs, x, &input, layout, scale, bias, y));
    must_refuse(rebnn_linear(isas[0], 1, rows, inputs, beyond(), x, &input, layout, scale, bias, y));
    must_refuse(rebnn_linear(isas[0], 1, negative(), inputs, outputs, x, &input, layout, scale, bias, y));
    int bad_threads = below(2) ? -(int)below(1 << 30) : REBNN_MAX_THREADS + 1 + (int)below(1 << 30);
    must_refuse(rebnn_linear(isas[0], bad_threads, rows, inputs, outputs, x, &input, layout, scale, bias, y));
    if (rebnn_linear(isas[0], 3, INT64_MAX, inputs, 0, NULL, &input, NULL, NULL, NULL, NULL) != REBNN_OK)
        fail("refused rows of nothing");
}

static void fuzz_embedding(void)
{
    int64_t count = size(40), entries = 1 + size(40), width = size(300);
    uint8_t *bits = random_bytes(entries * ceil_div(width, 8));
    float *scale = floats(entries), *y = take(count * width * 4);
    int64_t *index = take(count * 8);
    for (int64_t i = 0; i < count; i++)
        index[i] = below(entries);
    if (rebnn_embedding(threads(), count, entries, width, index, bits, scale, y) != REBNN_OK)
        fail("refused good arguments");
    must_refuse(rebnn_embedding(1, count, entries, negative(), index, bits, scale, y));
    must_refuse(rebnn_embedding(1, negative(), entries, width, index, bits, scale, y));
    if (rebnn_embedding(3, 0, INT64_MAX, INT64_MAX - below(9), NULL, bits, scale, y) != REBNN_OK)
        fail("refused no rows");
    if (count) {
        index[below(count)] = below(2) ? entries + below(1 << 20) : beyond();
        must_refuse(rebnn_embedding(threads(), count, entries, width, index, bits, scale, y));
    }
}

static void fuzz_conv(void)
{
    rebnn_input input = random_input(1);
    enum { BATCH, CHANNELS, HEIGHT, WIDTH, OUTPUTS, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, ARGUMENTS };
    int64_t v[ARGUMENTS] = {below(3),     size(130),    size(9),      size(20), size(40), 1 + below(4),
                            1 + below(4), 1 + below(3), 1 + below(3), below(4), below(4)};
    int64_t out_h = (v[HEIGHT] + 2 * v[PAD_H] - v[KERNEL_H]) / v[STRIDE_H] + 1;
    int64_t out_w = (v[WIDTH] + 2 * v[PAD_W] - v[KERNEL_W]) / v[STRIDE_W] + 1;
    int fits = v[HEIGHT] + 2 * v[PAD_H] >= v[KERNEL_H] && v[WIDTH] + 2 * v[PAD_W] >= v[KERNEL_W];
    int64_t count = fits ? v[BATCH] * v[OUTPUTS] * out_h * out_w : 0;
    float *x = floats(v[BATCH] * v[CHANNELS] * v[HEIGHT] * v[WIDTH]), *scale = floats(v[OUTPUTS]);
    float *bias = maybe_floats(v[OUTPUTS]), *y = take(count * 4), *first = NULL;
    input.shift = maybe_floats(v[CHANNELS]);
    rebnn_residual follows = {floats(count), floats(v[OUTPUTS]), floats(v[OUTPUTS]), floats(v[OUTPUTS])};
    const rebnn_residual *residual = below(2) ? &follows : NULL;
    rebnn_layout kind = kind_of(&input);
    void *layout = take(rebnn_conv_layout_size(kind, v[OUTPUTS], v[CHANNELS], v[KERNEL_H], v[KERNEL_W]));
    uint8_t *bits = random_bytes(v[OUTPUTS] * ceil_div(v[CHANNELS] * v[KERNEL_H] * v[KERNEL_W], 8));
    if (rebnn_conv_layout_fill(kind, v[OUTPUTS], v[CHANNELS], v[KERNEL_H], v[KERNEL_W], bits, layout) != REBNN_OK)
        fail("refused a layout");
#define CONV(isa, threads)                                                                                            \
    rebnn_conv2d(isa, threads, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], x, &input, layout,  \
                 scale, bias, residual, y)
    if (!fits)
        must_refuse(CONV(isas[0], 1));
    for (int i = 0; i < isa_count && fits; i++)
        must_agree(CONV(isas[i], threads()), i, y, &first, count);
    int chosen = (int)below(ARGUMENTS);
    v[chosen] = beyond();
    if (v[chosen] == INT32_MAX && chosen >= KERNEL_H && chosen <= STRIDE_W)
        v[chosen]++; /* a stride may be INT32_MAX */
    must_refuse(CONV(isas[0], 1));
#undef CONV
}

static void fuzz_attention(void)
{
    int64_t batch = below(3), heads = below(4), length = size(140), head = 16 * (1 + below(15));
    int64_t count = batch * heads * length * head;
    float *query = floats(count), *key = floats(count), *value = floats(count), *y = take(count * 4), *first = NULL;
    float *table = maybe_floats(head + 1), threshold = (float)below(100) / 100, scale = (float)below(100) / 25;
    uint8_t *mask = below(2) ? random_mask(batch * length) : NULL;
    for (int i = 0; i < isa_count; i++)
        must_agree(rebnn_attention(isas[i], threads(), batch, heads, length, head, query, key, value, mask, table,
                                   threshold, scale, y),
                   i, y, &first, count);
    static const int64_t impossible[] = {0, 8, 15, 17, 241, 256, -16, INT64_MIN, INT64_MAX};
#define ATTENTION(batch, heads, length, head)                                                                         \
    rebnn_attention(isas[0], 1, batch, heads, length, head, query, key, value, mask, table, threshold, scale, y)
    must_refuse(ATTENTION(batch, heads, length, impossible[below(COUNT(impossible))]));
    must_refuse(ATTENTION(batch, heads, below(2) ? negative() : (int64_t)INT32_MAX + 1 + below(9), head));
    must_refuse(ATTENTION(below(2) ? negative() : INT64_MAX, 2, length, head));
    must_refuse(ATTENTION(batch, negative(), length, head));
#undef ATTENTION
}

/* ---- Encoders ---- */

static int64_t field_bytes(int name, int64_t width, int64_t head, int64_t inner)
{
    switch (name) {
    case QUERY_LAYOUT: case KEY_LAYOUT: case VALUE_LAYOUT: case OUTPUT_LAYOUT:
        return rebnn_layout_size(REBNN_WORDS, width, width);
    case INNER_LAYOUT:
        return rebnn_layout_size(REBNN_WORDS, inner, width);
    case OUTER_LAYOUT:
        return rebnn_layout_size(REBNN_WORDS, width, inner);
    case QUERY_FEW: case QUERY_MANY: case KEY_FEW: case KEY_MANY: case VALUE_FEW: case VALUE_MANY:
        return round_up(width, BLOCK) * 4;
    case INNER_FEW: case INNER_MANY:
        return round_up(inner, BLOCK) * 4;
    case TABLE:
        return round_up(head + 1, BLOCK) * 4;
    case THRESHOLD: case OUTPUT_EPS: case OUTER_EPS: case INNER_UNSIGNED:
        return 4;
    default:
        return width * 4;
    }
}

static int may_be_absent(int name)
{
    return name == TABLE || name == QUERY_SHIFT || name == KEY_SHIFT || name == VALUE_SHIFT || name == INNER_SHIFT;
}

static int is_layout(int name)
{
    return name == QUERY_LAYOUT || name == KEY_LAYOUT || name == VALUE_LAYOUT || name == OUTPUT_LAYOUT ||
           name == INNER_LAYOUT || name == OUTER_LAYOUT;
}

static int is_integer(int name)
{
    return name == QUERY_FEW || name == QUERY_MANY || name == KEY_FEW || name == KEY_MANY || name == VALUE_FEW ||
           name == VALUE_MANY || name == CONTEXT || name == INNER_FEW || name == INNER_MANY || name == INNER_UNSIGNED;
}

static void fill_field(void *field, int name, int64_t width, int64_t head, int64_t inner)
{
    int64_t bytes = field_bytes(name, width, head, inner);
    int kept = buffer_count;
    if (is_layout(name)) {
        int64_t outputs = name == INNER_LAYOUT ? inner : width, inputs = name == OUTER_LAYOUT ? inner : width;
        memcpy(field, layout_of(REBNN_WORDS, outputs, inputs), (size_t)bytes);
    } else if (is_integer(name)) {
        for (int64_t j = 0; j < bytes / 4; j++)
            ((int32_t *)field)[j] = (int32_t)below(2 * width) - (int32_t)width / 2;
    } else {
        memcpy(field, floats(bytes / 4), (size_t)bytes);
    }
    release(kept);
}

/* An image with random contents; its last field ends where the buffer ends. */
static int64_t *random_image(int64_t layers, int64_t heads, int64_t head, int64_t inner, int64_t *bytes)
{
    int64_t width = heads * head, offsets[2 * FIELDS], end = round_up((HEADER + layers * FIELDS) * 8, 64);
    *bytes = (HEADER + layers * FIELDS) * 8;
    for (int64_t i = 0; i < layers * FIELDS; i++) {
        int name = (int)(i % FIELDS);
        offsets[i] = may_be_absent(name) && below(2) ? 0 : end;
        if (offsets[i]) {
            *bytes = end + field_bytes(name, width, head, inner);
            end = round_up(*bytes, 64);
        }
    }
    void *memory;
    if (posix_memalign(&memory, 64, (size_t)*bytes)) /* aligned_alloc would round the size up */
        fail("no memory");
    int64_t *image = buffers[buffer_count++] = memory;
    const int64_t header[HEADER] = {IMAGE_MAGIC, IMAGE_VERSION, layers, width, heads, head, inner, FIELDS};
    memcpy(image, header, sizeof header);
    memcpy(image + HEADER, offsets, (size_t)(layers * FIELDS) * 8);
    for (int64_t i = 0; i < layers * FIELDS; i++)
        if (offsets[i])
            fill_field((char *)image + offsets[i], (int)(i % FIELDS), width, head, inner);
    return image;
}

/* A number in the header, an offset, or the size, which may lead out of the image or into the middle of it. */
static void break_image(int64_t *image, int64_t layers, int64_t *bytes)
{
    int64_t kind = below(3);
    if (kind == 2) {
        *bytes = below(2) ? below(*bytes) : -below(1 << 20);
        return;
    }
    int64_t *number = kind || !layers ? image + below(LAYER_FIELDS + 1) : image + HEADER + below(layers * FIELDS);
    int64_t near = *number + below(129) - 64;
    *number = below(2) ? beyond() : near;
}

static void fuzz_encoder(void)
{
    int64_t layers = below(3), heads = 1 + below(3), head = 16 * (1 + below(5)), inner = 1 + below(150), bytes;
    int64_t sequences = below(4), length = size(40), count = sequences * length * heads * head;
    int64_t *image = random_image(layers, heads, head, inner, &bytes);
    uint8_t *mask = below(2) ? random_mask(sequences * length) : NULL;
    float *hidden = floats(count), *y = take(count * 4), *first = NULL;
    for (int i = 0; i < isa_count; i++) {
        memcpy(y, hidden, (size_t)count * 4);
        must_agree(rebnn_encoder(isas[i], threads(), sequences, length, mask, image, bytes, y), i, y, &first, count);
    }
    must_refuse(rebnn_encoder(isas[0], 1, sequences, negative(), mask, image, bytes, y));
    must_refuse(rebnn_encoder(isas[0], 1, 2, INT32_MAX, mask, image, bytes, y));
    must_refuse(rebnn_encoder(isas[0], 1, negative(), length, mask, image, bytes, y));
    break_image(image, layers, &bytes);
    rebnn_encoder(isas[0], threads(), 0, length, mask, image, bytes, y); /* reads the image, whatever it says */
    if (image[WIDTH] == heads * head)
        rebnn_encoder(isas[0], threads(), sequences, length, mask, image, bytes, y);
}

static void fuzz_balance(void)
{
    int64_t rows = size(40), width = size(300), count = rows * width;
    float *weight = floats(count), *gradient = floats(count), *row = floats(rows), *out = take(rows * 4);
    float *mean = below(2) ? row : NULL;
    uint8_t *signs = take(count), *earlier = below(2) ? random_bytes(count) : NULL;
    int32_t *flips = take(rows * 4), *flips_back = take(rows * 4);
    if (rebnn_balance_measure(threads(), rows, width, weight, mean, gradient, signs, out) != REBNN_OK ||
        rebnn_balance_pull(threads(), rows, width, weight, row, row, gradient, out) != REBNN_OK ||
        rebnn_balance_count(threads(), rows, width, weight, mean, signs, earlier, flips, flips_back) != REBNN_OK)
        fail("refused good arguments");
    for (int64_t i = 0; i < rows; i++)
        if (flips[i]) /* nothing has changed */
            fail("counted flips");
    must_refuse(rebnn_balance_measure(1, negative(), width, weight, mean, gradient, signs, out));
    must_refuse(rebnn_balance_pull(1, rows, negative(), weight, row, row, gradient, out));
    must_refuse(rebnn_balance_count(-(int)below(9), rows, width, weight, mean, signs, earlier, flips, flips_back));
}

static void (*const functions[])(void) = {fuzz_layout, fuzz_conv_layout, fuzz_encode, fuzz_linear,
                                          fuzz_embedding, fuzz_conv, fuzz_attention, fuzz_encoder,
                                          fuzz_balance};
static const char *const names[] = {"layout", "conv layout", "encode", "linear",
                                    "embedding", "conv2d", "attention", "encoder", "balance"};

int main(int count, char **arguments)
{
    long rounds = count > 1 ? atol(arguments[1]) : 10000;
    uint64_t seed = count > 2 ? strtoull(arguments[2], NULL, 10) : 0;
    for (int i = 0; rebnn_isa_name(i); i++)
        if (rebnn_isa_find(rebnn_isa_name(i)))
            isas[isa_count++] = rebnn_isa_find(rebnn_isa_name(i));
    for (round_number = 0; round_number < rounds; round_number++) {
        state = (seed << 32 ^ (uint64_t)round_number) * 0x9e3779b97f4a7c15 + 1; /* of a round by itself */
        int64_t which = below(COUNT(functions));
        function = names[which];
        functions[which]();
        release(0);
    }
    printf("%ld rounds on %d instruction sets, seed %llu\n", rounds, isa_count, (unsigned long long)seed);
    return 0;
}

/* A stack of BERT layers as one call: integers between the LayerNorms, padding left out, one barrier per layer. */
#include "encoder.h"

#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "linear.h"
#include "parallel.h"

enum {
    ROWS = 32,  /* tokens whose activations go through a block of layers while they are in the cache */
    SPAN = 128, /* tokens that share the values of a head once these are arranged; a multiple of ROWS */
};

typedef struct {
    int64_t layers, width, heads, head, inner;
    const char *image;
    const int64_t *offsets;
} encoder;

/* A projection whose results become bits. */
typedef struct {
    const float *shift;
    const void *layout;
    const int32_t *few, *many;
} bit_projection;

typedef struct {
    const rebnn_isa *isa;
    encoder model;
    int threads;
    int64_t tokens, sequences;
    int64_t *first;            /* [sequences + 1]: where a sequence begins among the tokens that are not padding */
    float *x;                  /* [tokens][width] */
    uint64_t *queries;         /* [heads][tokens][head words] */
    uint64_t *keys[2];         /* [heads][head words][tokens]; two, so that one barrier per layer is enough */
    uint64_t *values[2];       /* [heads][tokens][head words] */
    int64_t *row_offsets, *key_offsets; /* of blocks of outputs in queries and values, and in keys */
    int64_t *flat_offsets;
    barrier layer_done;
    atomic_int out_of_memory;
    int64_t longest;
} encoder_call;

/* Scratch of a thread. */
typedef struct {
    uint64_t *bits;    /* [ROWS][input words of the widest layer] */
    uint64_t *context; /* [SPAN][words of width] */
    float *y;          /* [ROWS][width] */
    attention_scratch attention;
} scratch;

static const void *field(const encoder *m, int64_t layer, int name)
{
    int64_t offset = m->offsets[layer * FIELDS + name];
    return offset ? m->image + offset : NULL;
}

static bit_projection projection(const encoder *m, int64_t layer, int shift)
{
    return (bit_projection){field(m, layer, shift), field(m, layer, shift + 1), field(m, layer, shift + 2),
                            field(m, layer, shift + 3)};
}

/* ---- The image ---- */

static int64_t field_size(const encoder *m, int name)
{
    int64_t wide = round_up(m->width, BLOCK) * 4, inner = round_up(m->inner, BLOCK) * 4;
    switch (name) {
    case QUERY_LAYOUT: case KEY_LAYOUT: case VALUE_LAYOUT: case OUTPUT_LAYOUT:
        return rebnn_layout_size(REBNN_WORDS, m->width, m->width);
    case INNER_LAYOUT:
        return rebnn_layout_size(REBNN_WORDS, m->inner, m->width);
    case OUTER_LAYOUT:
        return rebnn_layout_size(REBNN_WORDS, m->width, m->inner);
    case QUERY_FEW: case QUERY_MANY: case KEY_FEW: case KEY_MANY: case VALUE_FEW: case VALUE_MANY:
        return wide;
    case INNER_FEW: case INNER_MANY:
        return inner;
    case TABLE:
        return round_up(m->head + 1, 16) * 4; /* read in whole vectors */
    case THRESHOLD: case OUTPUT_EPS: case OUTER_EPS: case INNER_UNSIGNED:
        return 4;
    default:
        return m->width * 4;
    }
}

static int may_be_absent(int name)
{
    return name == TABLE || name == QUERY_SHIFT || name == KEY_SHIFT || name == VALUE_SHIFT || name == INNER_SHIFT;
}

/* Reads the header and checks that every field lies in the image. */
static int read_image(const void *image, int64_t size, encoder *m)
{
    const int64_t *header = image;
    if (!image || size < HEADER * 8 || header[MAGIC] != IMAGE_MAGIC || header[VERSION] != IMAGE_VERSION ||
        header[LAYER_FIELDS] != FIELDS)
        return 0;
    *m = (encoder){header[LAYERS], header[WIDTH], header[HEADS], header[HEAD], header[INNER], image, header + HEADER};
    if (m->layers < 0 || m->layers > 4096 || m->width < 1 || m->width > 65536 || !valid_head(m->head) ||
        m->heads < 1 || m->heads > m->width || m->heads * m->head != m->width || m->inner < 1 ||
        m->inner > REBNN_MAX_INPUTS ||
        size < (HEADER + m->layers * FIELDS) * 8)
        return 0;
    for (int64_t layer = 0; layer < m->layers; layer++)
        for (int name = 0; name < FIELDS; name++) {
            int64_t offset = m->offsets[layer * FIELDS + name];
            if (!offset && may_be_absent(name))
                continue;
            if (offset < HEADER * 8 || offset % 64 || offset > size || field_size(m, name) > size - offset)
                return 0;
        }
    return 1;
}

/* ---- Layers ---- */

/* Bits of the context of tokens from..to-1, at most SPAN of one sequence, in all heads. */
static void attend_rows(encoder_call *c, scratch *s, int64_t layer, int64_t sequence, int64_t from, int64_t to)
{
    const encoder *m = &c->model;
    int64_t begin = c->first[sequence], length = c->first[sequence + 1] - begin;
    int64_t words = ceil_div(m->head, 64), row = ceil_div(m->width, 64);
    attention_rule rule = {m->head, field(m, layer, TABLE), *(const float *)field(m, layer, THRESHOLD)};
    const int32_t *limits = field(m, layer, CONTEXT);
    memset(s->context, 0, (size_t)((to - from) * row) * 8);
    for (int64_t h = 0; h < m->heads; h++) {
        const uint64_t *keys = c->keys[layer % 2] + h * words * c->tokens + begin;
        take_values(&s->attention, c->values[layer % 2] + (h * c->tokens + begin) * words, length, m->head);
        for (int64_t t = from; t < to; t++) {
            const uint64_t *query = c->queries + (h * c->tokens + t) * words;
            int32_t attended = attend(c->isa, &rule, &s->attention, query, keys, c->tokens, length);
            uint16_t *bits = (uint16_t *)(s->context + (t - from) * row) + h * m->head / 16;
            c->isa->reached(s->attention.counts, m->head, attended, limits + h * m->head, bits);
        }
    }
}

static void pack_rows(encoder_call *c, const float *x, int64_t rows, const float *shift, uint64_t *bits)
{
    int64_t width = c->model.width, words = ceil_div(width, 64);
    for (int64_t r = 0; r < rows; r++)
        c->isa->pack(x + r * width, width, shift, 0, bits + r * words);
}

static void project(encoder_call *c, const bit_projection *p, const uint64_t *x, int64_t rows, int64_t outputs,
                    void *bits, int64_t stride, const int64_t *offsets)
{
    rebnn_input signs = {.codes = REBNN_SIGN, .bits = 1};
    epilogue e = products(&signs, c->model.width);
    e.few = p->few;
    e.many = p->many;
    e.bits = bits;
    e.bits_stride = stride;
    e.block_offset = offsets;
    multiply(c->isa, rows, c->model.width, outputs, 1, x, p->layout, 0, ceil_div(outputs, BLOCK), &e);
}

/* Queries, keys and values of tokens from..to-1. */
static void project_attention(encoder_call *c, scratch *s, int64_t layer, int64_t from, int64_t to)
{
    const encoder *m = &c->model;
    int64_t words = ceil_div(m->head, 64), rows = to - from;
    const float *x = c->x + from * m->width;
    static const int first_field[3] = {QUERY_SHIFT, KEY_SHIFT, VALUE_SHIFT};
    uint64_t *targets[3] = {c->queries + from * words, c->keys[layer % 2] + from, c->values[layer % 2] + from * words};
    for (int i = 0; i < 3; i++) {
        bit_projection p = projection(m, layer, first_field[i]);
        pack_rows(c, x, rows, p.shift, s->bits);
        int is_key = i == 1;
        project(c, &p, s->bits, rows, m->width, targets[i], is_key ? 4 : 4 * words,
                is_key ? c->key_offsets : c->row_offsets);
    }
}

/* x = LayerNorm(x + bits b^T * scale + bias), where `name` is the layout and scale, bias, norm and eps follow. */
static void add_and_norm(encoder_call *c, scratch *s, int64_t layer, int name, const rebnn_input *codes,
                         const uint64_t *bits, int64_t inputs, float *x, int64_t rows)
{
    const encoder *m = &c->model;
    epilogue e = products(codes, inputs);
    e.scale = field(m, layer, name + 1);
    e.bias = field(m, layer, name + 2);
    e.y = s->y;
    e.residual = x;
    e.y_stride = m->width;
    multiply(c->isa, rows, inputs, m->width, 1, bits, field(m, layer, name), 0, ceil_div(m->width, BLOCK), &e);
    const float *weight = field(m, layer, name + 3), *bias = field(m, layer, name + 4);
    float eps = *(const float *)field(m, layer, name + 5);
    for (int64_t r = 0; r < rows; r++)
        c->isa->layer_norm(s->y + r * m->width, m->width, weight, bias, eps, x + r * m->width);
}

/* What a layer does with tokens from..to-1 once their context is there. */
static void finish_layer(encoder_call *c, scratch *s, int64_t layer, const uint64_t *context, int64_t from, int64_t to)
{
    const encoder *m = &c->model;
    const rebnn_input signs = {.codes = REBNN_SIGN, .bits = 1, .scale = 1};
    const rebnn_input bools = {.codes = REBNN_LEVELS, .bits = 1, .scale = 1};
    int64_t rows = to - from, inner_words = ceil_div(m->inner, 64);
    float *x = c->x + from * m->width;
    add_and_norm(c, s, layer, OUTPUT_LAYOUT, &signs, context, m->width, x, rows);

    bit_projection inner = projection(m, layer, INNER_SHIFT);
    uint64_t *inner_bits = s->bits + ROWS * ceil_div(m->width, 64);
    pack_rows(c, x, rows, inner.shift, s->bits);
    memset(inner_bits, 0, (size_t)(rows * inner_words) * 8);
    project(c, &inner, s->bits, rows, m->inner, inner_bits, 4 * inner_words, c->flat_offsets);
    int is_unsigned = *(const int32_t *)field(m, layer, INNER_UNSIGNED);
    add_and_norm(c, s, layer, OUTER_LAYOUT, is_unsigned ? &bools : &signs, inner_bits, m->inner, x, rows);
}

/* ---- Threads ---- */

static void *allocate(int64_t size) { return aligned_alloc(64, (size_t)round_up(size ? size : 1, 64)); }

static int make_scratch(const encoder_call *c, scratch *s)
{
    const encoder *m = &c->model;
    int64_t words = ceil_div(m->width, 64);
    s->bits = allocate(ROWS * (words + ceil_div(m->inner, 64)) * 8);
    s->context = allocate(SPAN * words * 8);
    s->y = allocate(ROWS * m->width * 4);
    return make_attention_scratch(&s->attention, c->longest, m->head) && s->bits && s->context && s->y;
}

static void free_scratch(scratch *s)
{
    free(s->bits);
    free(s->context);
    free(s->y);
    free_attention_scratch(&s->attention);
}

static void encoder_task(void *argument, int thread)
{
    encoder_call *c = argument;
    /* Whole tiles of rows for every thread. */
    int64_t tiles = ceil_div(c->tokens, 8);
    int64_t begin = tiles * thread / c->threads * 8, end = tiles * (thread + 1) / c->threads * 8;
    end = end < c->tokens ? end : c->tokens;
    int64_t words = ceil_div(c->model.width, 64);
    scratch s = {0};
    if (!make_scratch(c, &s))
        atomic_store(&c->out_of_memory, 1);
    barrier_wait(&c->layer_done);
    int give_up = atomic_load(&c->out_of_memory);
    for (int64_t layer = 0; layer < c->model.layers && !give_up; layer++) {
        for (int64_t from = begin; from < end; from += ROWS)
            project_attention(c, &s, layer, from, from + ROWS < end ? from + ROWS : end);
        barrier_wait(&c->layer_done);
        int64_t sequence = 0;
        for (int64_t from = begin, to; from < end; from = to) {
            while (c->first[sequence + 1] <= from)
                sequence++;
            to = from + SPAN < end ? from + SPAN : end;
            to = to < c->first[sequence + 1] ? to : c->first[sequence + 1];
            attend_rows(c, &s, layer, sequence, from, to);
            for (int64_t row = from; row < to; row += ROWS)
                finish_layer(c, &s, layer, s.context + (row - from) * words, row, row + ROWS < to ? row + ROWS : to);
        }
    }
    free_scratch(&s);
}

/* ---- The call ---- */

static void make_offsets(encoder_call *c)
{
    const encoder *m = &c->model;
    int64_t words = ceil_div(m->head, 64);
    for (int64_t block = 0; block < m->width / BLOCK; block++) {
        int64_t head = block * BLOCK / m->head, within = block * BLOCK % m->head;
        c->row_offsets[block] = head * c->tokens * words * 4 + within / BLOCK;
        c->key_offsets[block] = (head * words + within / 64) * c->tokens * 4 + within % 64 / BLOCK;
    }
    for (int64_t block = 0; block < ceil_div(m->inner, BLOCK); block++)
        c->flat_offsets[block] = block;
}

/* Rows of `hidden` that are not padding, one after the other; lengths into c->first. */
static void gather(encoder_call *c, int64_t length, const uint8_t *mask, const float *hidden)
{
    size_t row = (size_t)c->model.width * 4;
    int64_t count = 0;
    for (int64_t b = 0; b < c->sequences; b++) {
        c->first[b] = count;
        for (int64_t i = b * length; i < (b + 1) * length; i++)
            if (!mask || mask[i])
                memcpy(c->x + count++ * c->model.width, hidden + i * c->model.width, row);
    }
    c->first[c->sequences] = count;
}

static void scatter(const encoder_call *c, int64_t length, const uint8_t *mask, float *hidden)
{
    size_t row = (size_t)c->model.width * 4;
    for (int64_t i = 0, count = 0; i < c->sequences * length; i++)
        if (!mask || mask[i])
            memcpy(hidden + i * c->model.width, c->x + count++ * c->model.width, row);
        else
            memset(hidden + i * c->model.width, 0, row);
}

static int allocate_call(encoder_call *c)
{
    const encoder *m = &c->model;
    int64_t bits = m->heads * ceil_div(m->head, 64) * c->tokens * 8, offsets = (m->width / BLOCK + 1) * 8;
    c->first = allocate((c->sequences + 1) * 8);
    c->x = allocate(c->tokens * m->width * 4);
    uint64_t **buffers[5] = {&c->queries, &c->keys[0], &c->keys[1], &c->values[0], &c->values[1]};
    int complete = c->first && c->x;
    for (int i = 0; i < 5; i++) {
        *buffers[i] = allocate(bits);
        complete = complete && *buffers[i];
        if (*buffers[i])
            memset(*buffers[i], 0, (size_t)bits); /* spare bits of a head stay clear */
    }
    c->row_offsets = allocate(offsets);
    c->key_offsets = allocate(offsets);
    c->flat_offsets = allocate(ceil_div(m->inner, BLOCK) * 8);
    return complete && c->row_offsets && c->key_offsets && c->flat_offsets;
}

static void free_call(encoder_call *c)
{
    free(c->first);
    free(c->x);
    free(c->queries);
    for (int i = 0; i < 2; i++) {
        free(c->keys[i]);
        free(c->values[i]);
    }
    free(c->row_offsets);
    free(c->key_offsets);
    free(c->flat_offsets);
}

rebnn_status rebnn_encoder(const rebnn_isa *isa, int threads, int64_t sequences, int64_t length, const uint8_t *mask,
                           const void *image, int64_t image_size, float *hidden)
{
    encoder_call c = {.isa = isa, .threads = threads, .sequences = sequences};
    if (!isa || threads < 1 || threads > REBNN_MAX_THREADS || sequences < 0 || length < 0 ||
        !read_image(image, image_size, &c.model) || (sequences && length > INT32_MAX / sequences) ||
        (sequences && length && !hidden))
        return REBNN_BAD_ARGUMENT;
    for (int64_t b = 0; b < sequences; b++) {
        int64_t count = length;
        if (mask)
            for (int64_t i = count = 0; i < length; i++)
                count += mask[b * length + i] != 0;
        c.tokens += count;
        c.longest = count > c.longest ? count : c.longest;
    }
    if (!sequences || !length)
        return REBNN_OK;
    int64_t useful = ceil_div(c.tokens, 8);
    c.threads = threads < useful ? threads : (int)(useful ? useful : 1);
    c.layer_done.threads = c.threads;
    rebnn_status status = REBNN_NO_MEMORY;
    if (allocate_call(&c)) {
        make_offsets(&c);
        gather(&c, length, mask, hidden);
        if (!run_threads(c.threads, 0, encoder_task, &c)) {
            c.threads = c.layer_done.threads = 1;
            run_threads(1, 0, encoder_task, &c);
        }
        if (!atomic_load(&c.out_of_memory)) {
            scatter(&c, length, mask, hidden);
            status = REBNN_OK;
        }
    }
    free_call(&c);
    return status;
}

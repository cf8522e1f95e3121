/* Linear layers: codes of the inputs, then products, chunk by chunk so that the codes stay in the cache. */
#include "linear.h"

#include <stdlib.h>
#include <string.h>

#include "parallel.h"

/* Codes per chunk, products below which threads do not pay. A chunk is a multiple of 8 rows, as the tiles are. */
enum { CHUNK_BYTES = 1 << 19, SERIAL_WORK = 1 << 24 };

int valid_input(const rebnn_input *input)
{
    if (!input)
        return 0;
    switch (input->codes) {
    case REBNN_SIGN:
        return input->bits == 1 && input->low == 0;
    case REBNN_LEVELS:
        return (input->bits == 1 || input->bits == 2 || input->bits == 4 || input->bits == 8) && input->low <= 0 &&
               input->low >= -(1 << (input->bits - 1)) && input->scale > 0;
    case REBNN_TOKEN:
        return input->bits == 8 && input->low == 0;
    default:
        return 0;
    }
}

epilogue products(const rebnn_input *input, int64_t inputs)
{
    epilogue e = {0};
    e.input_scale = input->scale;
    if (input->codes == REBNN_SIGN) { /* sum of signs = inputs - 2 mismatches */
        e.constant = (int32_t)inputs;
        e.factor = -2;
        return e;
    }
    /* Codes u = c - low >= 0, and sum_j b_j = 2 ones - inputs. */
    int32_t low = input->codes == REBNN_TOKEN ? -128 : input->low;
    e.constant = -low * (int32_t)inputs;
    e.per_one = 2 * low;
    e.factor = 1;
    if (input->bits < 8) { /* a plane's bits against signs: ones - mismatches */
        e.per_one += (1 << input->bits) - 1;
        e.factor = -1;
    }
    return e;
}

static int by_tables(const rebnn_isa *isa, int bits) { return isa->tables && (bits == 2 || bits == 4); }

int code_arrays(const rebnn_isa *isa, const rebnn_input *input)
{
    return input->bits == 8 || by_tables(isa, input->bits) ? 1 : input->bits;
}

int64_t code_bytes(const rebnn_isa *isa, const rebnn_input *input, int64_t inputs)
{
    if (by_tables(isa, input->bits))
        return ceil_div(inputs, 64) * 256;
    return input->bits == 8 ? round_up(inputs, 4) : ceil_div(inputs, 64) * 8 * input->bits;
}

/* Codes of one row as bytes. */
static void encode_row(const rebnn_isa *isa, int64_t inputs, const float *x, const rebnn_input *input, uint8_t *codes,
                       float *token_scale)
{
    if (input->codes == REBNN_TOKEN)
        *token_scale = isa->token(x, inputs, codes);
    else
        isa->levels(x, inputs, input->shift, input->scale, input->low, input->low + (1 << input->bits) - 1, codes);
}

void arrange(const rebnn_isa *isa, int64_t inputs, int bits, const uint8_t *bytes, uint8_t *codes)
{
    if (bits == 8)
        memcpy(codes, bytes, (size_t)round_up(inputs, 4));
    else if (by_tables(isa, bits))
        isa->tables(bytes, inputs, bits, codes);
    else
        isa->planes(bytes, inputs, bits, (uint64_t *)codes);
}

void encode(const rebnn_isa *isa, int64_t rows, int64_t inputs, const float *x, const rebnn_input *input,
            uint8_t *bytes, void *codes, float *token_scale)
{
    int64_t size = code_bytes(isa, input, inputs);
    memset(bytes + inputs, 0, (size_t)(round_up(inputs, 64) - inputs));
    for (int64_t m = 0; m < rows; m++, x += inputs) {
        uint8_t *row = (uint8_t *)codes + m * size;
        if (input->codes == REBNN_SIGN) {
            isa->pack(x, inputs, input->shift, 0, (uint64_t *)row);
        } else if (input->bits == 8) {
            memset(row + inputs, 0, (size_t)(size - inputs));
            encode_row(isa, inputs, x, input, row, token_scale + m);
        } else {
            encode_row(isa, inputs, x, input, bytes, NULL);
            arrange(isa, inputs, input->bits, bytes, row);
        }
    }
}

void multiply(const rebnn_isa *isa, int64_t rows, int64_t inputs, int64_t outputs, int bits, const void *codes,
              const void *layout, int64_t first, int64_t last, const epilogue *e)
{
    int64_t blocks = ceil_div(outputs, BLOCK);
    const uint64_t *weights = layout;
    if (bits == 8) {
        int64_t quads = ceil_div(inputs, 4);
        isa->quads(codes, rows, quads, weights, (const int32_t *)(weights + blocks * quads), first, last, outputs, e);
    } else {
        int64_t words = ceil_div(inputs, 64);
        const int32_t *ones = (const int32_t *)(weights + blocks * words * BLOCK);
        if (by_tables(isa, bits))
            isa->lookups(codes, rows, words, weights, ones, first, last, outputs, e);
        else
            isa->words(codes, rows, bits, words, weights, ones, first, last, outputs, e);
    }
}

rebnn_status rebnn_encode(const rebnn_isa *isa, int64_t rows, int64_t inputs, const float *x, const rebnn_input *input,
                          uint8_t *codes, float *token_scale)
{
    if (!isa || !valid_input(input) || rows < 0 || inputs < 0 || inputs > REBNN_MAX_INPUTS ||
        ((!x || !codes) && rows && inputs) || (input->codes == REBNN_TOKEN && rows && !token_scale))
        return REBNN_BAD_ARGUMENT;
    if (!inputs && input->codes != REBNN_TOKEN) /* however many rows of nothing */
        return REBNN_OK;
    uint64_t *bits = malloc((size_t)ceil_div(inputs, 64) * 8 + 8);
    if (!bits)
        return REBNN_NO_MEMORY;
    for (int64_t m = 0; m < rows; m++) {
        uint8_t *row = codes + m * inputs;
        if (input->codes != REBNN_SIGN) {
            encode_row(isa, inputs, x + m * inputs, input, row, token_scale ? token_scale + m : NULL);
            continue;
        }
        isa->pack(x + m * inputs, inputs, input->shift, 0, bits);
        for (int64_t j = 0; j < inputs; j++)
            row[j] = bits[j / 64] >> (j % 64) & 1;
    }
    free(bits);
    return REBNN_OK;
}

/* One call of rebnn_linear, shared by its threads. */
typedef struct {
    const rebnn_isa *isa;
    int threads;
    int64_t rows, inputs, outputs;
    const float *x;
    const rebnn_input *input;
    const void *layout;
    const float *weight_scale, *bias;
    float *y;
    atomic_int out_of_memory;
} linear_call;

/* Rows [from, to) with blocks [first, last) of outputs. */
static void run_part(linear_call *c, int64_t from, int64_t to, int64_t first, int64_t last)
{
    int64_t size = code_bytes(c->isa, c->input, c->inputs);
    int64_t chunk = 8 * size < CHUNK_BYTES ? CHUNK_BYTES / (8 * (size ? size : 1)) * 8 : 8;
    chunk = chunk < to - from ? chunk : to - from;
    size_t codes = (size_t)round_up(chunk * size, 64), bytes = (size_t)round_up(c->inputs, 64);
    char *scratch = aligned_alloc(64, codes + bytes + (size_t)round_up(chunk * 4, 64) + 64);
    if (!scratch) {
        atomic_store(&c->out_of_memory, 1);
        return;
    }
    float *token_scale = (float *)(scratch + codes + bytes);
    epilogue e = products(c->input, c->inputs);
    e.scale = c->weight_scale;
    e.bias = c->bias;
    e.row_scale = c->input->codes == REBNN_TOKEN ? token_scale : NULL;
    e.y_stride = c->outputs;
    for (int64_t m = from; m < to; m += chunk) {
        int64_t rows = to - m < chunk ? to - m : chunk;
        encode(c->isa, rows, c->inputs, c->x + m * c->inputs, c->input, (uint8_t *)scratch + codes, scratch,
               token_scale);
        e.y = c->y + m * c->outputs;
        multiply(c->isa, rows, c->inputs, c->outputs, c->input->bits, scratch, c->layout, first, last, &e);
    }
    free(scratch);
}

static void linear_task(void *argument, int thread)
{
    linear_call *c = argument;
    int64_t blocks = ceil_div(c->outputs, BLOCK), t = thread, n = c->threads;
    if (c->rows >= 8 * n)
        run_part(c, c->rows * t / n, c->rows * (t + 1) / n, 0, blocks);
    else /* few rows: each thread computes all their codes, and its share of the outputs */
        run_part(c, 0, c->rows, blocks * t / n, blocks * (t + 1) / n);
}

rebnn_status rebnn_linear(const rebnn_isa *isa, int threads, int64_t rows, int64_t inputs, int64_t outputs,
                          const float *x, const rebnn_input *input, const void *layout, const float *weight_scale,
                          const float *bias, float *y)
{
    if (!isa || threads < 1 || threads > REBNN_MAX_THREADS || rows < 0 || inputs < 0 || inputs > REBNN_MAX_INPUTS ||
        outputs < 0 || outputs > INT32_MAX - BLOCK || !valid_input(input))
        return REBNN_BAD_ARGUMENT;
    if (!rows || !outputs)
        return REBNN_OK;
    if ((!x && inputs) || !layout || !weight_scale || !y)
        return REBNN_BAD_ARGUMENT;
    if ((double)rows * (double)inputs * (double)outputs * input->bits < SERIAL_WORK)
        threads = 1;
    linear_call call = {isa, threads, rows, inputs, outputs, x, input, layout, weight_scale, bias, y, 0};
    run_threads(threads, 1, linear_task, &call);
    return call.out_of_memory ? REBNN_NO_MEMORY : REBNN_OK;
}

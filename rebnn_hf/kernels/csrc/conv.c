/* 2-D convolutions, in one of two ways. By rows: the codes of a pixel's channels side by side, windows of pixels as rows,
 * products as of a linear layer, and a transposition. By blocks, of signs where the instruction set can: windows of 16
 * pixels in the order of a layout, so that products of an output with them come out side by side. */
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "parallel.h"

/* Bytes of windows and products at a time, by rows and by blocks; products below which threads do not pay; pixels that are
 * coded together. */
enum { CHUNK_BYTES = 1 << 17, BLOCKS_BYTES = 1 << 15, SERIAL_WORK = 1 << 24, GROUP = 16 };

/* ---- Layouts ---- */

static int64_t padded_channels(rebnn_layout kind, int64_t channels)
{
    return round_up(channels, kind == REBNN_WORDS ? 64 : 4);
}

/* Inputs of the linear layer that has this layout, or -1. */
static int64_t layout_inputs(rebnn_layout kind, int64_t channels, int64_t kernel_h, int64_t kernel_w)
{
    if ((kind != REBNN_WORDS && kind != REBNN_QUADS) || channels < 0 || channels > REBNN_MAX_INPUTS || kernel_h < 1 ||
        kernel_w < 1 || kernel_h > REBNN_MAX_INPUTS || kernel_w > REBNN_MAX_INPUTS / kernel_h)
        return -1;
    int64_t inputs = kernel_h * kernel_w * padded_channels(kind, channels);
    return inputs <= REBNN_MAX_INPUTS ? inputs : -1;
}

int64_t rebnn_conv_layout_size(rebnn_layout kind, int64_t outputs, int64_t channels, int64_t kernel_h, int64_t kernel_w)
{
    return rebnn_layout_size(kind, outputs, layout_inputs(kind, channels, kernel_h, kernel_w));
}

rebnn_status rebnn_conv_layout_fill(rebnn_layout kind, int64_t outputs, int64_t channels, int64_t kernel_h,
                                    int64_t kernel_w, const uint8_t *bits, void *layout)
{
    int64_t inputs = layout_inputs(kind, channels, kernel_h, kernel_w);
    if (rebnn_layout_size(kind, outputs, inputs) < 0 || (outputs && (!layout || (!bits && channels))))
        return REBNN_BAD_ARGUMENT;
    int64_t positions = kernel_h * kernel_w, padded = padded_channels(kind, channels);
    int64_t from = ceil_div(channels * positions, 8), to = ceil_div(inputs, 8);
    uint8_t *rows = calloc((size_t)(outputs * to) + 1, 1);
    if (!rows)
        return REBNN_NO_MEMORY;
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t p = 0; p < positions; p++) {
                int64_t source = c * positions + p, target = p * padded + c;
                int bit = bits[o * from + source / 8] >> (source % 8) & 1;
                rows[o * to + target / 8] |= (uint8_t)(bit << (target % 8));
            }
    rebnn_status status = rebnn_layout_fill(kind, outputs, inputs, rows, layout);
    free(rows);
    return status;
}

/* ---- Calls ---- */

/* One call of rebnn_conv2d, shared by its threads. */
typedef struct {
    const rebnn_isa *isa;
    int threads;
    int64_t batch, channels, height, width, outputs, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    const float *x;
    const rebnn_input *input;
    const void *layout;
    float *y;
    int64_t out_h, out_w;
    int64_t planes, pixel; /* codes of a pixel: so many planes (or 1 of tables or bytes) of so many bytes */
    int64_t inputs;        /* of the layout */
    const float *scale;    /* [outputs] of weights and inputs together */
    const float *bias;     /* [outputs], of zeros if there is none */
    const float *unit;     /* [outputs] ones: the kernels return products, scales follow with the padding's share */
    const float *padding;  /* [positions][outputs]: what to add where a position is padded; NULL: nothing */
    const rebnn_residual *residual; /* what follows; NULL: nothing */
    atomic_int out_of_memory;
} conv_call;

/* Whether the window with this corner has no padded position. */
static int is_inside(const conv_call *c, int64_t top, int64_t left)
{
    return top >= 0 && left >= 0 && top + c->kernel_h <= c->height && left + c->kernel_w <= c->width;
}

/* Padded rows that one image's share of output pixels [from, to) needs at most. */
static int64_t rows_of(const conv_call *c, int64_t from, int64_t to)
{
    int64_t rows = (to - from) / c->out_w + 2;
    return ((rows < c->out_h ? rows : c->out_h) - 1) * c->stride_h + c->kernel_h;
}

/* Memory for arrays of so many bytes, each on a cache line of its own; NULL, and the call knows, if there is none. */
static void *allocate(conv_call *c, const int64_t *sizes, void **parts, int count)
{
    int64_t size = 64;
    for (int i = 0; i < count; i++)
        size += round_up(sizes[i], 64);
    uint8_t *memory = aligned_alloc(64, (size_t)size), *next = memory;
    if (!memory) {
        atomic_store(&c->out_of_memory, 1);
        return NULL;
    }
    for (int i = 0; i < count; next += round_up(sizes[i], 64), i++)
        parts[i] = next;
    return memory;
}

/* ---- By rows ---- */

/* Thread's scratch memory. */
typedef struct {
    uint8_t *image;   /* codes of padded rows [rows][planes][width + 2 pad_w][pixel] */
    uint8_t *zero;    /* [planes][pixel]: a padded pixel */
    float *floats;    /* [GROUP][channels] */
    uint8_t *bytes;   /* [channels], a multiple of 64 */
    uint8_t *codes;   /* [GROUP][planes][pixel] */
    uint8_t *windows; /* [chunk][planes][positions][pixel] */
    float *products;  /* [chunk][stride] */
    int64_t chunk, stride;
} scratch;

/* Code 0 of every channel where codes have a 0; of SIGN that is all -1, which `padding` puts right. */
static void make_zero(const conv_call *c, uint8_t *bytes, uint8_t *zero)
{
    memset(bytes, 0, (size_t)round_up(c->channels, 64));
    memset(bytes, -c->input->low, (size_t)c->channels);
    arrange(c->isa, c->channels, c->input->bits, bytes, zero);
}

static void put_pixel(const conv_call *c, uint8_t *row, int64_t column, const uint8_t *codes)
{
    for (int64_t p = 0; p < c->planes; p++)
        memcpy(row + (p * (c->width + 2 * c->pad_w) + column) * c->pixel, codes + p * c->pixel, (size_t)c->pixel);
}

/* Codes of padded rows [top, top + rows) of an image. */
static void encode_rows(const conv_call *c, const scratch *s, int64_t image, int64_t top, int64_t rows)
{
    int64_t padded = c->width + 2 * c->pad_w, plane = c->height * c->width;
    float no_token_scale[GROUP];
    for (int64_t r = 0; r < rows; r++) {
        uint8_t *row = s->image + r * c->planes * padded * c->pixel;
        int64_t i = top + r - c->pad_h, inside = i >= 0 && i < c->height;
        for (int64_t j = 0; j < padded; j++)
            if (!inside || j < c->pad_w || j >= c->pad_w + c->width)
                put_pixel(c, row, j, s->zero);
        for (int64_t j = 0; inside && j < c->width; j += GROUP) {
            int64_t count = c->width - j < GROUP ? c->width - j : GROUP;
            const float *x = c->x + image * c->channels * plane + i * c->width + j;
            for (int64_t channel = 0; channel < c->channels; channel++)
                for (int64_t k = 0; k < count; k++)
                    s->floats[k * c->channels + channel] = x[channel * plane + k];
            encode(c->isa, count, c->channels, s->floats, c->input, s->bytes, s->codes, no_token_scale);
            for (int64_t k = 0; k < count; k++)
                put_pixel(c, row, c->pad_w + j + k, s->codes + k * c->planes * c->pixel);
        }
    }
}

/* Adds to the products of output pixel (i, j) what its padded positions lack. */
static void add_padding(const conv_call *c, int64_t i, int64_t j, float *products)
{
    int64_t top = i * c->stride_h - c->pad_h, left = j * c->stride_w - c->pad_w;
    if (is_inside(c, top, left))
        return;
    const float *padding = c->padding;
    for (int64_t a = top; a < top + c->kernel_h; a++)
        for (int64_t b = left; b < left + c->kernel_w; b++, padding += c->outputs)
            if (a < 0 || a >= c->height || b < 0 || b >= c->width)
                for (int64_t n = 0; n < c->outputs; n++)
                    products[n] += padding[n];
}

/* Shortcut and RPReLU of `count` outputs of channel n, from y[start] on. */
static void add_residual(const conv_call *c, int64_t n, int64_t start, int64_t count)
{
    const rebnn_residual *r = c->residual;
    for (int64_t i = start; i < start + count; i++) {
        float z = c->y[i] + r->shortcut[i] + r->shift_in[n];
        c->y[i] = (z > 0 ? z : r->slope[n] * z) + r->shift_out[n];
    }
}

/* Output pixels [first, last) of an image, counted row by row; the codes of the image begin with row `top`. */
static void run_pixels(const conv_call *c, const scratch *s, int64_t image, int64_t top, int64_t first, int64_t last)
{
    int64_t padded = c->width + 2 * c->pad_w, area = c->out_h * c->out_w;
    size_t piece = (size_t)(c->kernel_w * c->pixel); /* a window's pixels of one row */
    uint8_t *to = s->windows;
    for (int64_t q = first; q < last; q++)
        for (int64_t p = 0; p < c->planes; p++)
            for (int64_t k = 0; k < c->kernel_h; k++, to += piece) {
                int64_t row = q / c->out_w * c->stride_h - top + k, column = q % c->out_w * c->stride_w;
                memcpy(to, s->image + ((row * c->planes + p) * padded + column) * c->pixel, piece);
            }
    epilogue e = products(c->input, c->channels * c->kernel_h * c->kernel_w);
    e.scale = c->unit;
    e.input_scale = 1;
    e.y = s->products;
    e.y_stride = s->stride;
    multiply(c->isa, last - first, c->inputs, c->outputs, c->input->bits, s->windows, c->layout, 0,
             ceil_div(c->outputs, BLOCK), &e);
    if (c->padding)
        for (int64_t q = first; q < last; q++)
            add_padding(c, q / c->out_w, q % c->out_w, s->products + (q - first) * s->stride);
    for (int64_t n = 0; n < c->outputs; n++) {
        int64_t start = (image * c->outputs + n) * area + first;
        for (int64_t q = 0; q < last - first; q++)
            c->y[start + q] = s->products[q * s->stride + n] * c->scale[n] + c->bias[n];
        if (c->residual)
            add_residual(c, n, start, last - first);
    }
}

/* Output pixels [from, to) of all images. */
static void run_by_rows(conv_call *c, int64_t from, int64_t to)
{
    int64_t area = c->out_h * c->out_w, row = (c->width + 2 * c->pad_w) * c->planes * c->pixel;
    int64_t window = c->kernel_h * c->kernel_w * c->planes * c->pixel;
    scratch s = {.stride = round_up(c->outputs, 16) + 16}; /* not a power of two: columns of it are read */
    s.chunk = CHUNK_BYTES / (window + s.stride * 4);
    s.chunk = s.chunk < 16 ? 16 : s.chunk < 256 ? s.chunk / 16 * 16 : 256;
    int64_t sizes[] = {rows_of(c, from, to) * row, c->planes * c->pixel, GROUP * c->channels * 4,
                       round_up(c->channels, 64), GROUP * c->planes * c->pixel, s.chunk * window,
                       s.chunk * s.stride * 4};
    void *parts[7];
    void *memory = allocate(c, sizes, parts, 7);
    if (!memory)
        return;
    s.image = parts[0], s.zero = parts[1], s.floats = parts[2], s.bytes = parts[3], s.codes = parts[4];
    s.windows = parts[5], s.products = parts[6];
    make_zero(c, s.bytes, s.zero);
    for (int64_t end; from < to; from = end) {
        int64_t image = from / area, start = image * area;
        end = to < start + area ? to : start + area;
        int64_t first = (from - start) / c->out_w, last = (end - start - 1) / c->out_w, top = first * c->stride_h;
        encode_rows(c, &s, image, top, (last - first) * c->stride_h + c->kernel_h);
        for (int64_t q = from - start; q < end - start; q += s.chunk)
            run_pixels(c, &s, image, top, q, q + s.chunk < end - start ? q + s.chunk : end - start);
    }
    free(memory);
}

/* ---- By blocks ---- */

/* Thread's scratch memory. */
typedef struct {
    uint64_t *image;   /* signs of padded rows [rows][pixel / 8][width + 2 pad_w] */
    uint64_t *windows; /* [blocks][inputs / 64][BLOCK] */
    uint16_t *outside; /* [blocks][positions]: pixels for which the position is padded */
    uint8_t *edges;    /* [blocks]: whether there are any */
    int64_t blocks;
} block_scratch;

/* Signs of padded rows [top, top + rows) of an image; padded positions get what -1 has. */
static void pack_rows(const conv_call *c, uint64_t *to, int64_t image, int64_t top, int64_t rows)
{
    int64_t padded = c->width + 2 * c->pad_w, plane = c->height * c->width;
    for (int64_t i = top - c->pad_h; i < top - c->pad_h + rows; i++)
        for (int64_t channel = 0; channel < 8 * c->pixel; channel += 64, to += padded) {
            memset(to, 0, (size_t)padded * 8);
            if (i < 0 || i >= c->height)
                continue;
            int64_t channels = c->channels - channel < 64 ? c->channels - channel : 64;
            const float *shift = c->input->shift ? c->input->shift + channel : NULL;
            c->isa->pack_pixels(c->x + (image * c->channels + channel) * plane + i * c->width, channels, plane,
                                c->width, shift, to + c->pad_w);
        }
}

/* Notes which of `run` output pixels of row i, from column j and lane `lane` of a block on, lack which positions. */
static void find_edges(const conv_call *c, int64_t i, int64_t j, int64_t run, int64_t lane, uint8_t *edge,
                       uint16_t *outside)
{
    int64_t top = i * c->stride_h - c->pad_h, left = j * c->stride_w - c->pad_w;
    if (is_inside(c, top, left) && is_inside(c, top, left + (run - 1) * c->stride_w))
        return;
    for (int64_t last = lane + run; lane < last; lane++, left += c->stride_w) {
        if (is_inside(c, top, left))
            continue;
        uint16_t *position = outside;
        for (int64_t a = top; a < top + c->kernel_h; a++)
            for (int64_t b = left; b < left + c->kernel_w; b++, position++)
                if (a < 0 || a >= c->height || b < 0 || b >= c->width)
                    *position |= (uint16_t)(1 << lane);
        *edge = 1;
    }
}

/* Windows of output pixels [first, last); the image begins with row `top`. */
static void fill_windows(const conv_call *c, const block_scratch *s, int64_t top, int64_t first, int64_t last)
{
    int64_t padded = c->width + 2 * c->pad_w, each = c->pixel / 8, positions = c->kernel_h * c->kernel_w;
    memset(s->outside, 0, (size_t)(s->blocks * positions) * 2);
    memset(s->edges, 0, (size_t)s->blocks);
    for (int64_t q = first, run; q < last; q += run) { /* pixels of a block and of a row */
        int64_t block = (q - first) / BLOCK, lane = (q - first) % BLOCK, i = q / c->out_w, j = q % c->out_w;
        run = c->out_w - j < BLOCK - lane ? c->out_w - j : BLOCK - lane;
        run = run < last - q ? run : last - q;
        uint64_t *to = s->windows + block * positions * each * BLOCK + lane;
        for (int64_t a = 0; a < c->kernel_h; a++)
            for (int64_t b = 0; b < c->kernel_w; b++) {
                const uint64_t *from = s->image + (i * c->stride_h - top + a) * each * padded + j * c->stride_w + b;
                for (int64_t e = 0; e < each; e++, to += BLOCK, from += padded)
                    if (run == BLOCK && c->stride_w == 1)
                        memcpy(to, from, BLOCK * 8);
                    else
                        for (int64_t t = 0; t < run; t++)
                            to[t] = from[t * c->stride_w];
            }
        if (c->padding)
            find_edges(c, i, j, run, lane, s->edges + block, s->outside + block * positions);
    }
}

/* Products of output pixels [first, last) of an image, of which the windows are there. */
static void multiply_blocks(const conv_call *c, const block_scratch *s, int64_t image, int64_t first, int64_t last)
{
    int64_t area = c->out_h * c->out_w, words = c->inputs / 64, positions = c->kernel_h * c->kernel_w;
    const rebnn_residual *r = c->residual;
    for (int64_t n = 0; n < c->outputs; n += BLOCK)
        for (int64_t q = first, block = 0; q < last; q += BLOCK, block++) {
            int64_t start = (image * c->outputs + n) * area + q;
            conv_block b = {.outputs = c->outputs - n < BLOCK ? c->outputs - n : BLOCK,
                            .pixels = last - q < BLOCK ? last - q : BLOCK, .inputs = c->channels * positions,
                            .scale = c->scale + n, .bias = c->bias + n, .positions = s->edges[block] ? positions : 0,
                            .shares_stride = c->outputs, .outside = s->outside + block * positions,
                            .shares = c->padding ? c->padding + n : NULL, .y = c->y + start, .y_stride = area};
            if (r)
                b.shortcut = r->shortcut + start, b.shift_in = r->shift_in + n, b.slope = r->slope + n,
                b.shift_out = r->shift_out + n;
            c->isa->conv((const uint64_t *)c->layout + n * words, s->windows + block * words * BLOCK, words, &b);
        }
}

/* Output pixels [from, to) of all images. */
static void run_by_blocks(conv_call *c, int64_t from, int64_t to)
{
    int64_t area = c->out_h * c->out_w, row = (c->width + 2 * c->pad_w) * c->pixel, words = c->inputs / 64;
    int64_t blocks = BLOCKS_BYTES / (words * BLOCK * 8 + 1) + 1, most = ceil_div(to - from, BLOCK);
    block_scratch s = {.blocks = blocks < most ? blocks : most};
    int64_t rows = rows_of(c, from, to), positions = c->kernel_h * c->kernel_w;
    int64_t sizes[] = {rows * row, s.blocks * words * BLOCK * 8, s.blocks * positions * 2, s.blocks};
    void *parts[4];
    void *memory = allocate(c, sizes, parts, 4);
    if (!memory)
        return;
    s.image = parts[0], s.windows = parts[1], s.outside = parts[2], s.edges = parts[3];
    memset(s.windows, 0, (size_t)sizes[1]); /* the last block has fewer pixels */
    for (int64_t end; from < to; from = end) {
        int64_t image = from / area, start = image * area;
        end = to < start + area ? to : start + area;
        int64_t first = (from - start) / c->out_w, last = (end - start - 1) / c->out_w, top = first * c->stride_h;
        pack_rows(c, s.image, image, top, (last - first) * c->stride_h + c->kernel_h);
        for (int64_t q = from - start, next; q < end - start; q = next) {
            next = q + s.blocks * BLOCK < end - start ? q + s.blocks * BLOCK : end - start;
            fill_windows(c, &s, top, q, next);
            multiply_blocks(c, &s, image, q, next);
        }
    }
    free(memory);
}

/* ---- Both ---- */

static void conv_task(void *argument, int thread)
{
    conv_call *c = argument;
    int64_t pixels = c->batch * c->out_h * c->out_w, n = c->threads;
    int64_t from = pixels * thread / n, to = pixels * (thread + 1) / n;
    if (from == to)
        return;
    if (c->isa->conv && c->input->codes == REBNN_SIGN)
        run_by_blocks(c, from, to);
    else
        run_by_rows(c, from, to);
}

/* Padded positions of SIGN have been counted as -1 in every channel: what their weights added is taken back. */
static void fill_padding(const conv_call *c, float *padding)
{
    enum { SOME = 16 };
    uint64_t all[SOME];
    memset(all, 0xff, sizeof all);
    const uint64_t *block = c->layout;
    int64_t each = c->pixel / 8, positions = c->kernel_h * c->kernel_w;
    for (int64_t n = 0; n < c->outputs; n += BLOCK)
        for (int64_t p = 0; p < positions; p++, block += each * BLOCK) {
            int32_t set[BLOCK], sum[BLOCK] = {0};
            for (int64_t k = 0; k < each; k += SOME) {
                c->isa->overlaps(all, block + k * BLOCK, each - k < SOME ? each - k : SOME, BLOCK, set);
                for (int i = 0; i < BLOCK; i++)
                    sum[i] += set[i];
            }
            for (int i = 0; i < BLOCK && n + i < c->outputs; i++)
                padding[p * c->outputs + n + i] = (float)(2 * sum[i] - (int32_t)c->channels);
        }
}

static int sizes_are_good(const conv_call *c)
{
    const int64_t from_0[] = {c->batch, c->channels, c->height, c->width, c->outputs, c->pad_h, c->pad_w};
    const int64_t from_1[] = {c->kernel_h, c->kernel_w, c->stride_h, c->stride_w};
    for (size_t i = 0; i < sizeof from_0 / sizeof *from_0; i++)
        if (from_0[i] < 0 || from_0[i] > INT32_MAX - BLOCK)
            return 0;
    for (size_t i = 0; i < sizeof from_1 / sizeof *from_1; i++)
        if (from_1[i] < 1 || from_1[i] > INT32_MAX)
            return 0;
    int64_t rows = c->height + 2 * c->pad_h, columns = c->width + 2 * c->pad_w;
    const double most = 1e15; /* elements; bytes and shares of threads do not overflow */
    return rows >= c->kernel_h && columns >= c->kernel_w &&
           (double)c->batch * (double)c->outputs * (double)rows * (double)columns < most &&
           (double)c->batch * (double)c->channels * (double)rows * (double)columns < most &&
           (double)round_up(c->channels, 64) * (double)rows * (double)columns < most;
}

rebnn_status rebnn_conv2d(const rebnn_isa *isa, int threads, int64_t batch, int64_t channels, int64_t height,
                          int64_t width, int64_t outputs, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                          int64_t stride_w, int64_t pad_h, int64_t pad_w, const float *x, const rebnn_input *input,
                          const void *layout, const float *weight_scale, const float *bias,
                          const rebnn_residual *residual, float *y)
{
    conv_call c = {.isa = isa, .threads = threads, .batch = batch, .channels = channels, .height = height,
                   .width = width, .outputs = outputs, .kernel_h = kernel_h, .kernel_w = kernel_w,
                   .stride_h = stride_h, .stride_w = stride_w, .pad_h = pad_h, .pad_w = pad_w, .x = x, .input = input,
                   .layout = layout, .residual = residual, .y = y};
    if (!isa || threads < 1 || threads > REBNN_MAX_THREADS || !valid_input(input) || input->codes == REBNN_TOKEN ||
        !sizes_are_good(&c))
        return REBNN_BAD_ARGUMENT;
    c.inputs = layout_inputs(input->bits == 8 ? REBNN_QUADS : REBNN_WORDS, channels, kernel_h, kernel_w);
    if (c.inputs < 0)
        return REBNN_BAD_ARGUMENT;
    if (!batch || !outputs)
        return REBNN_OK;
    if ((!x && channels && height && width) || !layout || !weight_scale || !y ||
        (residual && (!residual->shortcut || !residual->shift_in || !residual->slope || !residual->shift_out)))
        return REBNN_BAD_ARGUMENT;
    c.out_h = (height + 2 * pad_h - kernel_h) / stride_h + 1;
    c.out_w = (width + 2 * pad_w - kernel_w) / stride_w + 1;
    c.planes = code_arrays(isa, input);
    c.pixel = code_bytes(isa, input, channels) / c.planes;
    int64_t positions = input->codes == REBNN_SIGN && (pad_h || pad_w) ? kernel_h * kernel_w : 0;
    float *floats = malloc((size_t)(outputs * (3 + positions)) * sizeof *floats);
    if (!floats)
        return REBNN_NO_MEMORY;
    float *scale = floats, *biases = floats + outputs, *unit = floats + 2 * outputs, *padding = floats + 3 * outputs;
    for (int64_t n = 0; n < outputs; n++) {
        scale[n] = weight_scale[n] * input->scale;
        biases[n] = bias ? bias[n] : 0;
        unit[n] = 1;
    }
    c.scale = scale, c.bias = biases, c.unit = unit;
    if (positions) {
        fill_padding(&c, padding);
        c.padding = padding;
    }
    if ((double)(batch * c.out_h * c.out_w) * (double)outputs * (double)c.inputs * input->bits < SERIAL_WORK)
        c.threads = 1;
    run_threads(c.threads, 1, conv_task, &c);
    free(floats);
    return c.out_of_memory ? REBNN_NO_MEMORY : REBNN_OK;
}

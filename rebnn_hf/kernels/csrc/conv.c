/* 2-D convolutions: the codes of a pixel's channels side by side, windows of pixels as rows, and then products. */
#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "parallel.h"

/* Bytes of windows and products at a time; products below which threads do not pay; pixels that are coded together. */
enum { CHUNK_BYTES = 1 << 17, SERIAL_WORK = 1 << 24, GROUP = 16 };

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

/* ---- Convolutions ---- */

/* One call of rebnn_conv2d, shared by its threads. */
typedef struct {
    const rebnn_isa *isa;
    int threads;
    int64_t batch, channels, height, width, outputs, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    const float *x;
    const rebnn_input *input;
    const void *layout;
    const float *weight_scale, *bias;
    float *y;
    int64_t out_h, out_w;
    int64_t planes, pixel; /* codes of a pixel: so many planes (or 1 of tables or bytes) of so many bytes */
    int64_t inputs;        /* of the layout */
    const float *unit;     /* [outputs] ones: the kernels return products, scales follow with the padding's share */
    const float *padding;  /* [positions][outputs]: what to add where a position is padded; NULL: nothing */
    atomic_int out_of_memory;
} conv_call;

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
    if (top >= 0 && left >= 0 && top + c->kernel_h <= c->height && left + c->kernel_w <= c->width)
        return;
    const float *padding = c->padding;
    for (int64_t a = top; a < top + c->kernel_h; a++)
        for (int64_t b = left; b < left + c->kernel_w; b++, padding += c->outputs)
            if (a < 0 || a >= c->height || b < 0 || b >= c->width)
                for (int64_t n = 0; n < c->outputs; n++)
                    products[n] += padding[n];
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
        float scale = c->weight_scale[n] * c->input->scale, bias = c->bias ? c->bias[n] : 0;
        float *y = c->y + (image * c->outputs + n) * area + first;
        for (int64_t q = 0; q < last - first; q++)
            y[q] = s->products[q * s->stride + n] * scale + bias;
    }
}

/* Output pixels [from, to) of all images. */
static void run_part(conv_call *c, int64_t from, int64_t to)
{
    if (from == to)
        return;
    int64_t area = c->out_h * c->out_w, row = (c->width + 2 * c->pad_w) * c->planes * c->pixel;
    int64_t window = c->kernel_h * c->kernel_w * c->planes * c->pixel, rows = (to - from) / c->out_w + 2;
    scratch s = {.stride = round_up(c->outputs, 16) + 16}; /* not a power of two: columns of it are read */
    rows = ((rows < c->out_h ? rows : c->out_h) - 1) * c->stride_h + c->kernel_h;
    s.chunk = CHUNK_BYTES / (window + s.stride * 4);
    s.chunk = s.chunk < 16 ? 16 : s.chunk < 256 ? s.chunk / 16 * 16 : 256;
    int64_t sizes[] = {rows * row, c->planes * c->pixel, GROUP * c->channels * 4, round_up(c->channels, 64),
                       GROUP * c->planes * c->pixel, s.chunk * window, s.chunk * s.stride * 4};
    uint8_t *parts[7];
    int64_t size = 64;
    for (int i = 0; i < 7; i++)
        size += round_up(sizes[i], 64);
    uint8_t *memory = aligned_alloc(64, (size_t)size);
    if (!memory) {
        atomic_store(&c->out_of_memory, 1);
        return;
    }
    parts[0] = memory;
    for (int i = 1; i < 7; i++)
        parts[i] = parts[i - 1] + round_up(sizes[i - 1], 64);
    s.image = parts[0], s.zero = parts[1], s.floats = (float *)parts[2], s.bytes = parts[3], s.codes = parts[4];
    s.windows = parts[5], s.products = (float *)parts[6];
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

static void conv_task(void *argument, int thread)
{
    conv_call *c = argument;
    int64_t pixels = c->batch * c->out_h * c->out_w, n = c->threads;
    run_part(c, pixels * thread / n, pixels * (thread + 1) / n);
}

/* Padded positions of SIGN have been counted as -1 in every channel: what their weights added is taken back. */
static void fill_padding(const conv_call *c, float *padding)
{
    const uint64_t all = ~0ull, *block = c->layout;
    int64_t each = c->pixel / 8, positions = c->kernel_h * c->kernel_w;
    for (int64_t n = 0; n < c->outputs; n += BLOCK, block += positions * each * BLOCK)
        for (int64_t p = 0; p < positions; p++) {
            int32_t set[BLOCK], sum[BLOCK] = {0};
            for (int64_t k = 0; k < each; k++) {
                c->isa->overlaps(&all, block + (p * each + k) * BLOCK, 1, BLOCK, set);
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
                          const void *layout, const float *weight_scale, const float *bias, float *y)
{
    conv_call c = {.isa = isa, .threads = threads, .batch = batch, .channels = channels, .height = height,
                   .width = width, .outputs = outputs, .kernel_h = kernel_h, .kernel_w = kernel_w,
                   .stride_h = stride_h, .stride_w = stride_w, .pad_h = pad_h, .pad_w = pad_w, .x = x, .input = input,
                   .layout = layout, .weight_scale = weight_scale, .bias = bias, .y = y};
    if (!isa || threads < 1 || threads > REBNN_MAX_THREADS || !valid_input(input) || input->codes == REBNN_TOKEN ||
        !sizes_are_good(&c))
        return REBNN_BAD_ARGUMENT;
    c.inputs = layout_inputs(input->bits == 8 ? REBNN_QUADS : REBNN_WORDS, channels, kernel_h, kernel_w);
    if (c.inputs < 0)
        return REBNN_BAD_ARGUMENT;
    if (!batch || !outputs)
        return REBNN_OK;
    if ((!x && channels && height && width) || !layout || !weight_scale || !y)
        return REBNN_BAD_ARGUMENT;
    c.out_h = (height + 2 * pad_h - kernel_h) / stride_h + 1;
    c.out_w = (width + 2 * pad_w - kernel_w) / stride_w + 1;
    c.planes = code_arrays(isa, input);
    c.pixel = code_bytes(isa, input, channels) / c.planes;
    int64_t positions = input->codes == REBNN_SIGN && (pad_h || pad_w) ? kernel_h * kernel_w : 0;
    float *unit = malloc((size_t)(outputs * (1 + positions)) * sizeof *unit);
    if (!unit)
        return REBNN_NO_MEMORY;
    for (int64_t n = 0; n < outputs; n++)
        unit[n] = 1;
    c.unit = unit;
    if (positions) {
        fill_padding(&c, unit + outputs);
        c.padding = unit + outputs;
    }
    if ((double)(batch * c.out_h * c.out_w) * (double)outputs * (double)c.inputs * input->bits < SERIAL_WORK)
        c.threads = 1;
    run_threads(c.threads, 1, conv_task, &c);
    free(unit);
    return c.out_of_memory ? REBNN_NO_MEMORY : REBNN_OK;
}

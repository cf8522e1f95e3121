/* The passes over all latent weights that the balance rule makes in a training step. */
#include <math.h>
#include <string.h>

#include "isa.h"
#include "parallel.h"

enum { SERIAL_WORK = 1 << 18, LANES = 16 };

/* A pass, and the arguments of all of them: each uses its own. */
typedef struct pass pass;
struct pass {
    void (*row)(const pass *p, int64_t row);
    int64_t rows, width;
    int threads;
    const float *weight, *mean, *scale, *gamma, *task;
    float *gradient, *largest, *norm;
    uint8_t *signs;
    const uint8_t *earlier;
    int32_t *flips, *flips_back;
};

static void pass_task(void *argument, int thread)
{
    const pass *p = argument;
    for (int64_t row = p->rows * thread / p->threads; row < p->rows * (thread + 1) / p->threads; row++)
        p->row(p, row);
}

static rebnn_status run_pass(int threads, pass p)
{
    if (threads < 1 || threads > REBNN_MAX_THREADS || p.rows < 0 || p.width < 0 || p.width > INT32_MAX)
        return REBNN_BAD_ARGUMENT;
    p.threads = (double)p.rows * (double)p.width < SERIAL_WORK ? 1 : threads;
    run_threads(p.threads, 1, pass_task, &p);
    return REBNN_OK;
}

/* Magnitudes are compared as integers, which are in the order of the numbers: infinity above all, NaN above that. */
static float largest_magnitude(const float *x, int64_t count)
{
    int32_t largest = 0;
    for (int64_t j = 0; j < count; j++) {
        int32_t bits;
        memcpy(&bits, x + j, 4);
        bits &= INT32_MAX;
        largest = bits > largest ? bits : largest;
    }
    float value;
    memcpy(&value, &largest, 4);
    return value;
}

static void measure_row(const pass *p, int64_t row)
{
    const int64_t width = p->width; /* bytes may alias everything: what is behind p would be read again each time */
    const float *weight = p->weight + row * width;
    uint8_t *signs = p->signs + row * width;
    float mean = p->mean ? p->mean[row] : 0;
    for (int64_t j = 0; j < width; j++)
        signs[j] = weight[j] - mean >= 0;
    p->largest[row] = largest_magnitude(p->task + row * width, width);
}

rebnn_status rebnn_balance_measure(int threads, int64_t rows, int64_t width, const float *weight, const float *mean,
                                   const float *gradient, uint8_t *signs, float *largest)
{
    if (rows && (!largest || (width && (!weight || !gradient || !signs))))
        return REBNN_BAD_ARGUMENT;
    return run_pass(threads, (pass){.row = measure_row, .rows = rows, .width = width, .weight = weight, .mean = mean,
                                    .task = gradient, .signs = signs, .largest = largest});
}

static void pull_row(const pass *p, int64_t row)
{
    const int64_t width = p->width;
    const float *weight = p->weight + row * width;
    float *gradient = p->gradient + row * width, scale = p->scale[row], gamma = p->gamma[row];
    float sums[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES)
        for (int k = 0; k < LANES; k++) {
            float w = weight[j + k];
            gradient[j + k] += (w - (w >= 0 ? scale : -scale)) * gamma;
            sums[k] += fabsf(w);
        }
    double norm = 0;
    for (; j < width; j++) {
        gradient[j] += (weight[j] - (weight[j] >= 0 ? scale : -scale)) * gamma;
        norm += fabsf(weight[j]);
    }
    for (int k = 0; k < LANES; k++)
        norm += sums[k];
    p->norm[row] = (float)norm;
}

static void pull_held_row(const pass *p, int64_t row)
{
    p->norm[row] = 0;
    if (p->gamma[row] != 0)
        pull_row(p, row);
}

rebnn_status rebnn_balance_pull(int threads, int64_t rows, int64_t width, const float *weight, const float *scale,
                                const float *gamma, float *gradient, float *norm)
{
    if (rows && (!scale || !gamma || !norm || (width && (!weight || !gradient))))
        return REBNN_BAD_ARGUMENT;
    return run_pass(threads, (pass){.row = pull_held_row, .rows = rows, .width = width, .weight = weight,
                                    .scale = scale, .gamma = gamma, .gradient = gradient, .norm = norm});
}

static void count_row(const pass *p, int64_t row)
{
    const int64_t width = p->width;
    const float *weight = p->weight + row * width;
    const uint8_t *earlier = p->earlier ? p->earlier + row * width : NULL;
    uint8_t *signs = p->signs + row * width;
    float mean = p->mean ? p->mean[row] : 0;
    int32_t flips = 0, flips_back = 0;
    for (int64_t j = 0; j < width; j++)
        signs[j] ^= weight[j] - mean >= 0;
    for (int64_t j = 0; j < width; j++)
        flips += signs[j];
    if (earlier)
        for (int64_t j = 0; j < width; j++)
            flips_back += signs[j] & earlier[j];
    p->flips[row] = flips;
    p->flips_back[row] = flips_back;
}

rebnn_status rebnn_balance_count(int threads, int64_t rows, int64_t width, const float *weight, const float *mean,
                                 uint8_t *signs, const uint8_t *earlier, int32_t *flips, int32_t *flips_back)
{
    if (rows && (!flips || !flips_back || (width && (!weight || !signs))))
        return REBNN_BAD_ARGUMENT;
    return run_pass(threads, (pass){.row = count_row, .rows = rows, .width = width, .weight = weight, .mean = mean,
                                    .signs = signs, .earlier = earlier, .flips = flips, .flips_back = flips_back});
}

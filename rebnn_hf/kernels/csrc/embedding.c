/* Rows of a table of signs. */
#include <string.h>

#include "isa.h"
#include "parallel.h"

enum { SERIAL_WORK = 1 << 18 };

typedef struct {
    int threads;
    int64_t count, width;
    const int64_t *index;
    const uint8_t *bits;
    const float *scale;
    float *y;
} embedding_call;

static void embedding_task(void *argument, int thread)
{
    const embedding_call *c = argument;
    int64_t bytes = ceil_div(c->width, 8);
    for (int64_t i = c->count * thread / c->threads; i < c->count * (thread + 1) / c->threads; i++) {
        const uint8_t *row = c->bits + c->index[i] * bytes;
        float scale = c->scale[c->index[i]], *y = c->y + i * c->width;
        uint32_t number, minus = 0x80000000u;
        memcpy(&number, &scale, 4);
        int64_t j = 0;
        for (; j + 8 <= c->width; j += 8) {
            uint32_t byte = row[j / 8], values[8];
            for (int k = 0; k < 8; k++)
                values[k] = number ^ (~byte << (31 - k) & minus);
            memcpy(y + j, values, sizeof values);
        }
        for (; j < c->width; j++)
            y[j] = row[j / 8] >> (j % 8) & 1 ? scale : -scale;
    }
}

rebnn_status rebnn_embedding(int threads, int64_t count, int64_t entries, int64_t width, const int64_t *index,
                             const uint8_t *bits, const float *scale, float *y)
{
    if (threads < 1 || threads > REBNN_MAX_THREADS || count < 0 || entries < 0 || width < 0 ||
        (count && (!index || (width && (!bits || !scale || !y)))))
        return REBNN_BAD_ARGUMENT;
    for (int64_t i = 0; i < count; i++)
        if (index[i] < 0 || index[i] >= entries)
            return REBNN_BAD_ARGUMENT;
    if (!count || !width)
        return REBNN_OK;
    if ((double)count * (double)width < SERIAL_WORK)
        threads = 1;
    embedding_call call = {threads, count, width, index, bits, scale, y};
    run_threads(threads, 1, embedding_task, &call);
    return REBNN_OK;
}

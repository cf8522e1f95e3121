/* 1-bit attention: scores by counting bits, softmax as a table, context by counting bits again. */
#include "attention.h"

#include <stdlib.h>
#include <string.h>

#include "parallel.h"

/* 64 x 64 bits, in place: bit j of word i becomes bit i of word j. */
static void transpose64(uint64_t *x)
{
    uint64_t mask = 0x00000000ffffffffull;
    for (int step = 32; step; step >>= 1, mask ^= mask << step)
        for (int i = 0; i < 64; i = (i + step + 1) & ~step) {
            uint64_t swap = (x[i] >> step ^ x[i + step]) & mask;
            x[i] ^= swap << step;
            x[i + step] ^= swap;
        }
}

void take_values(attention_scratch *s, const uint64_t *values, int64_t length, int64_t head)
{
    int64_t words = ceil_div(head, 64);
    for (int64_t block = 0; block * 64 < length; block++)
        for (int64_t w = 0; w < words; w++) {
            uint64_t square[64] = {0};
            for (int64_t i = 0; i < 64 && block * 64 + i < length; i++)
                square[i] = values[(block * 64 + i) * words + w];
            transpose64(square);
            int64_t count = head - w * 64 < 64 ? head - w * 64 : 64;
            memcpy(s->values + block * head + w * 64, square, (size_t)count * 8);
        }
}

/* The largest index whose entry of the falling table is at least `least`; -1 for none. */
static int32_t last_at_least(const float *table, int64_t size, float least)
{
    int32_t low = -1, high = (int32_t)size - 1;
    while (low < high) {
        int32_t middle = low + (high - low + 1) / 2;
        if (table[middle] >= least)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

int32_t attend(const rebnn_isa *isa, const attention_rule *rule, attention_scratch *s, const uint64_t *query,
               const uint64_t *keys, int64_t stride, int64_t length)
{
    int64_t head = rule->head;
    isa->mismatches(query, keys, ceil_div(head, 64), stride, length, s->mismatches);
    int32_t limit = (int32_t)(head / 2);
    if (rule->table) {
        float sum = isa->table_sum(rule->table, head + 1, s->mismatches, length);
        limit = last_at_least(rule->table, head + 1, rule->threshold * sum);
    }
    int64_t attended = isa->at_most(s->mismatches, length, limit, s->attended);
    isa->overlaps(s->attended, s->values, ceil_div(length, 64), head, s->counts);
    return (int32_t)attended;
}

static void *allocate(int64_t size) { return aligned_alloc(64, (size_t)round_up(size ? size : 1, 64)); }

int make_attention_scratch(attention_scratch *s, int64_t longest, int64_t head)
{
    s->values = allocate(ceil_div(longest, 64) * head * 8);
    s->mismatches = allocate(longest);
    s->attended = allocate(ceil_div(longest, 64) * 8);
    s->counts = allocate(head * 4);
    return s->values && s->mismatches && s->attended && s->counts;
}

void free_attention_scratch(attention_scratch *s)
{
    free(s->values);
    free(s->mismatches);
    free(s->attended);
    free(s->counts);
}

/* ---- The call ---- */

typedef struct {
    const rebnn_isa *isa;
    int threads;
    int64_t batch, heads, length;
    const float *query, *key, *value;
    const uint8_t *mask;
    attention_rule rule;
    float table[256];
    float scale;
    float *context;
    atomic_int out_of_memory;
} attention_call;

/* Bits of the rows that are not padding: rows [count][words], and their number. */
static int64_t pack_head(const attention_call *c, const float *x, const uint8_t *mask, uint64_t *rows)
{
    int64_t words = ceil_div(c->rule.head, 64), count = 0;
    for (int64_t i = 0; i < c->length; i++)
        if (!mask || mask[i])
            c->isa->pack(x + i * c->rule.head, c->rule.head, NULL, 0, rows + count++ * words);
    return count;
}

static void run_head(const attention_call *c, attention_scratch *s, uint64_t *rows, uint64_t *keys, int64_t index)
{
    int64_t head = c->rule.head, words = ceil_div(head, 64), length = c->length;
    int64_t b = index / c->heads, h = index % c->heads, at = index * length * head;
    const uint8_t *mask = c->mask ? c->mask + b * length : NULL;
    take_values(s, rows, pack_head(c, c->value + at, mask, rows), head);
    int64_t count = pack_head(c, c->key + at, mask, rows);
    for (int64_t i = 0; i < count; i++)
        for (int64_t w = 0; w < words; w++)
            keys[w * length + i] = rows[i * words + w];
    for (int64_t i = 0; i < length; i++) {
        float *context = c->context + ((b * length + i) * c->heads + h) * head;
        c->isa->pack(c->query + at + i * head, head, NULL, 0, rows);
        int32_t attended = attend(c->isa, &c->rule, s, rows, keys, length, count);
        for (int64_t j = 0; j < head; j++)
            context[j] = (float)(2 * s->counts[j] - attended) * c->scale;
    }
}

static void attention_task(void *argument, int thread)
{
    attention_call *c = argument;
    int64_t all = c->batch * c->heads, bits = ceil_div(c->rule.head, 64) * c->length * 8;
    attention_scratch s = {0};
    uint64_t *rows = allocate(bits), *keys = allocate(bits);
    if (make_attention_scratch(&s, c->length, c->rule.head) && rows && keys)
        for (int64_t i = all * thread / c->threads; i < all * (thread + 1) / c->threads; i++)
            run_head(c, &s, rows, keys, i);
    else
        atomic_store(&c->out_of_memory, 1);
    free(rows);
    free(keys);
    free_attention_scratch(&s);
}

rebnn_status rebnn_attention(const rebnn_isa *isa, int threads, int64_t batch, int64_t heads, int64_t length,
                             int64_t head, const float *query, const float *key, const float *value,
                             const uint8_t *mask, const float *table, float threshold, float scale, float *context)
{
    if (!isa || threads < 1 || threads > REBNN_MAX_THREADS || batch < 0 || heads < 0 || length < 0 ||
        !valid_head(head) || (heads && batch > INT32_MAX / heads) || length > INT32_MAX)
        return REBNN_BAD_ARGUMENT;
    if (!batch || !heads || !length)
        return REBNN_OK;
    if (!query || !key || !value || !context)
        return REBNN_BAD_ARGUMENT;
    attention_call call = {isa, threads, batch, heads, length, query, key, value, mask, {head, NULL, threshold}, {0},
                           scale, context, 0};
    if (table) { /* a copy that may be read up to the next multiple of 16 */
        memcpy(call.table, table, (size_t)(head + 1) * 4);
        call.rule.table = call.table;
    }
    run_threads(threads, 1, attention_task, &call);
    return atomic_load(&call.out_of_memory) ? REBNN_NO_MEMORY : REBNN_OK;
}

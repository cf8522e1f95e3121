/* 1-bit attention of one head, for rebnn_attention and rebnn_encoder. Internal. */
#ifndef REBNN_ATTENTION_H
#define REBNN_ATTENTION_H

#include "isa.h"

/* Which keys a query attends to; `table` and `threshold` as in rebnn.h. */
typedef struct {
    int64_t head; /* features of a head */
    const float *table;
    float threshold;
} attention_rule;

/* Scratch for sequences of up to `longest` keys: values [ceil(longest / 64)][head], and a row's worth of the others. */
typedef struct {
    uint64_t *values;
    uint8_t *mismatches;
    uint64_t *attended;
    int32_t *counts; /* [head] */
} attention_scratch;

static inline int valid_head(int64_t head) { return head >= 16 && head <= 240 && head % 16 == 0; }

/* 0 if there is not enough memory; to be freed in any case. */
int make_attention_scratch(attention_scratch *s, int64_t longest, int64_t head);
void free_attention_scratch(attention_scratch *s);

/* values [length][words of a head] -> s->values. */
void take_values(attention_scratch *s, const uint64_t *values, int64_t length, int64_t head);

/* One query against `length` keys [words][stride]: how many are attended to, and in s->counts how many of these have a
 * value of +1, for each feature. The context is 2 * counts - attended. */
int32_t attend(const rebnn_isa *isa, const attention_rule *rule, attention_scratch *s, const uint64_t *query,
               const uint64_t *keys, int64_t stride, int64_t length);

#endif

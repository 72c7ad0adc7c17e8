/* Attention over paged KV. A query's result is bit-identical in any batch. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>

#include "elements.h"
#include "team.h"

#define SHARED_ROWS 16 /* query rows (queries x heads of a group) that share a pass over K and V */
#define MAX_ROWS 64    /* of one query, if its group has more heads than that */

/* The sums of 16 vectors as one: lane i holds the sum of the lanes of v[i]. */
INLINE vf sums16(vf *v) {
    for (int i = 0; i < 8; i++)
        v[i] = PICK(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               PICK(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        v[i] = PICK(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               PICK(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        v[i] = PICK(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               PICK(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return PICK(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           PICK(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* Scratch of one thread; D is head_dim rounded up to LANES, the padding is zero. */
typedef struct {
    float *q, *acc; /* [rows, D] */
    float *block;   /* [LANES, D]: K or V of 16 tokens */
    float *scores;  /* [rows, ld] */
    int64_t D, ld;
} attention_scratch;

/* Read K (half 0) or V (half 1) of the tokens [t0, t0 + LANES) that exist; the rest is zero. */
INLINE void read_block(const attention_args *a, const attention_scratch *w, int64_t s, int64_t head,
                       int64_t t0, int half, int is_bf16) {
    const int32_t *pages = a->block_tables + s * a->block_table_width;
    int64_t token = a->num_kv_heads * a->head_dim, halves = a->page_tokens * token;
    for (int64_t i = 0; i < LANES; i++) {
        float *to = w->block + i * w->D;
        int64_t t = t0 + i, d = 0;
        if (t < a->context_lens[s]) {
            int64_t row = (pages[t / a->page_tokens] * 2 + half) * halves +
                          (t % a->page_tokens) * token + head * a->head_dim;
            for (; d + LANES <= a->head_dim; d += LANES) {
                vf v = load16(a->kv, row + d, is_bf16);
                memcpy(to + d, &v, sizeof v);
            }
            for (; d < a->head_dim; d++) to[d] = load1(a->kv, row + d, is_bf16);
        }
        for (; d < w->D; d++) to[d] = 0.0f;
    }
}

INLINE vf scores16(const attention_scratch *w, const float *q) {
    vf sums[LANES];
    memset(sums, 0, sizeof sums);
    for (int64_t d = 0; d < w->D; d += LANES) {
        vf qd = load16(q, d, 0);
        for (int i = 0; i < LANES; i++) sums[i] += qd * load16(w->block, i * w->D + d, 0);
    }
    return sums16(sums);
}

/* Softmax of row[0 : n) in place, n a multiple of LANES; returns the sum before division. */
INLINE float softmax(float *row, int64_t n) {
    float most = -INFINITY;
    for (int64_t t = 0; t < n; t++) most = row[t] > most || row[t] != row[t] ? row[t] : most;
    vf sum = {0};
    for (int64_t t = 0; t < n; t += LANES) {
        vf e = exp16(load16(row, t, 0) - most);
        memcpy(row + t, &e, sizeof e);
        sum += e;
    }
    return sum16(sum);
}

/* The queries [first, first + n) of sequence s for one KV head. What a query gets depends on its
 * own position alone: blocks start at multiples of LANES, and tokens it may not see weigh 0. */
INLINE void attend(const attention_args *a, const attention_scratch *w, int64_t s, int64_t head,
                   int64_t first, int64_t n, int is_bf16) {
    int64_t groups = a->num_heads / a->num_kv_heads, rows = n * groups, D = w->D;
    int64_t num_queries = a->query_indptr[s + 1] - a->query_indptr[s];
    int64_t position = a->context_lens[s] - num_queries + first; /* of the first query */
    int64_t stop = position + n;
    int64_t start = a->window && position >= a->window ? position + 1 - a->window : 0;
    start -= start % LANES;
    int64_t width = (stop - start + LANES - 1) / LANES * LANES;
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = a->query_indptr[s] + first + r / groups;
        int64_t from = token * a->query_stride + (head * groups + r % groups) * a->head_dim;
        for (int64_t d = 0; d < D; d++)
            w->q[r * D + d] = d < a->head_dim ? a->query[from + d] * a->scale : 0.0f;
    }
    for (int64_t t = 0; t < width; t += LANES) {
        read_block(a, w, s, head, start + t, 0, is_bf16);
        for (int64_t r = 0; r < rows; r++) {
            vf v = scores16(w, w->q + r * D);
            memcpy(w->scores + r * w->ld + t, &v, sizeof v);
        }
    }
    float total[MAX_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        int64_t seen_until = position + r / groups + 1 - start;
        int64_t seen_from = a->window ? seen_until - a->window : 0;
        float *row = w->scores + r * w->ld;
        for (int64_t t = 0; t < seen_from; t++) row[t] = -INFINITY;
        for (int64_t t = seen_until; t < width; t++) row[t] = -INFINITY;
        total[r] = softmax(row, width);
    }
    memset(w->acc, 0, sizeof(float) * rows * D);
    for (int64_t t = 0; t < width; t += LANES) {
        read_block(a, w, s, head, start + t, 1, is_bf16);
        for (int64_t r = 0; r < rows; r++) {
            const float *p = w->scores + r * w->ld + t;
            for (int64_t d = 0; d < D; d += LANES) {
                vf v = load16(w->acc, r * D + d, 0);
                for (int i = 0; i < LANES; i++) v += p[i] * load16(w->block, i * D + d, 0);
                memcpy(w->acc + r * D + d, &v, sizeof v);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = a->query_indptr[s] + first + r / groups;
        int64_t to = (token * a->num_heads + head * groups + r % groups) * a->head_dim;
        for (int64_t d = 0; d < a->head_dim; d++)
            store1(a->out, to + d, w->acc[r * D + d] / total[r], is_bf16);
    }
}

static int64_t blocks_of(const attention_args *a, int64_t s, int64_t per_block) {
    return (a->query_indptr[s + 1] - a->query_indptr[s] + per_block - 1) / per_block;
}

static int64_t queries_per_block(const attention_args *a) {
    int64_t groups = a->num_heads / a->num_kv_heads;
    return groups > SHARED_ROWS ? 1 : SHARED_ROWS / groups;
}

int64_t attention_items(const attention_args *a) {
    int64_t num_blocks = 0, per_block = queries_per_block(a);
    for (int64_t s = 0; s < a->S; s++) num_blocks += blocks_of(a, s, per_block);
    return num_blocks * a->num_kv_heads;
}

static int64_t padded_head(const attention_args *a) {
    return (a->head_dim + LANES - 1) / LANES * LANES;
}

static int64_t score_stride(const attention_args *a) {
    return (a->max_context + 2 * LANES) / LANES * LANES;
}

int64_t attention_scratch_bytes(const attention_args *a) {
    int64_t rows = queries_per_block(a) * (a->num_heads / a->num_kv_heads), D = padded_head(a);
    return (int64_t)sizeof(float) * (rows * (2 * D + score_stride(a)) + LANES * D);
}

void attention_item(const void *args, int64_t item, void *scratch) {
    const attention_args *a = args;
    int64_t per_block = queries_per_block(a), D = padded_head(a);
    int64_t rows = per_block * (a->num_heads / a->num_kv_heads);
    float *memory = scratch;
    attention_scratch w = {memory, memory + rows * D, memory + 2 * rows * D,
                           memory + 2 * rows * D + LANES * D, D, score_stride(a)};
    int64_t s = 0, block = item / a->num_kv_heads, head = item % a->num_kv_heads;
    for (; block >= blocks_of(a, s, per_block); s++) block -= blocks_of(a, s, per_block);
    int64_t first = block * per_block;
    int64_t n = a->query_indptr[s + 1] - a->query_indptr[s] - first;
    if (n > per_block) n = per_block;
    if (a->is_bf16) attend(a, &w, s, head, first, n, 1);
    else attend(a, &w, s, head, first, n, 0);
}

int loraplex_attention(const attention_args *a) {
    return run_alone(attention_item, a, attention_items(a), attention_scratch_bytes(a));
}

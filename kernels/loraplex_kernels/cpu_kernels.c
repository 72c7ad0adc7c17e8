/* CPU kernels: LoRA over paged weights, and attention over paged KV.
 *
 * Compiled once per machine by native.py and called through ctypes. Weights, KV and activations have
 * one dtype, float32 or bfloat16 (as uint16 bits); all arithmetic is float32. Threads come from the
 * OpenMP runtime that torch has loaded, so both share one pool.
 *
 * Every sum runs in an order fixed by the shape alone: explicit vectors, no fast-math, no atomics.
 * The result of a row is therefore bit-identical in any batch.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define ROWS 4  /* token rows that share one pass over the weights */
#define RANKS 4 /* rank rows that share one pass over the activations */

/* ---- elements: float32 or bfloat16 --------------------------------------------------------- */

INLINE float load1(const void *p, int64_t i, int is_bf16) {
    if (!is_bf16) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE vf load16(const void *p, int64_t i, int is_bf16) {
    vf v;
    if (!is_bf16) {
        memcpy(&v, (const float *)p + i, sizeof v);
        return v;
    }
    vh h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    vu bits = __builtin_convertvector(h, vu) << 16;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Rounds to nearest even, as torch does; NaN stays NaN. */
INLINE void store1(void *p, int64_t i, float f, int is_bf16) {
    if (!is_bf16) {
        ((float *)p)[i] = f;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f)
        bits = 0x7fc00000u;
    else
        bits += 0x7fffu + ((bits >> 16) & 1u);
    ((uint16_t *)p)[i] = (uint16_t)(bits >> 16);
}

/* Lanes added in a fixed tree. */
INLINE float sum16(vf v) {
    float s[LANES];
    memcpy(s, &v, sizeof v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

INLINE const void *at(const void *base, int64_t elems, int is_bf16) {
    return (const char *)base + elems * (is_bf16 ? 2 : 4);
}

/* ---- LoRA ---------------------------------------------------------------------------------- */

typedef struct {
    const void *pool;     /* [P, page_elems], one layer */
    const int32_t *pages; /* this adapter's pages */
    int64_t page_elems;
    int32_t chunk, chunks_per_page;
} paged;

INLINE const void *chunk_at(const paged *m, int64_t chunk, int is_bf16) {
    int64_t page = m->pages[chunk / m->chunks_per_page];
    return at(m->pool, page * m->page_elems + (chunk % m->chunks_per_page) * m->chunk, is_bf16);
}

/* h[j][r] = sum_k x[r][k] * A[j][k] for J rank rows of A, which begin `stride` chunks apart, and n
 * token rows of x (float32, length K). */
INLINE void shrink_rows(const paged *m, int64_t chunk, int64_t stride, int J, const float *x,
                        int64_t K, int n, float h[][ROWS], int is_bf16) {
    vf acc[RANKS][ROWS][2];
    float tail[RANKS][ROWS];
    memset(acc, 0, sizeof acc);
    memset(tail, 0, sizeof tail);
    for (int64_t k0 = 0; k0 < K; k0 += m->chunk, chunk++) {
        const void *w[RANKS];
        for (int j = 0; j < J; j++) w[j] = chunk_at(m, chunk + j * stride, is_bf16);
        int k = 0;
        for (; k + 2 * LANES <= m->chunk; k += 2 * LANES)
            for (int j = 0; j < J; j++) {
                vf w0 = load16(w[j], k, is_bf16), w1 = load16(w[j], k + LANES, is_bf16);
                for (int r = 0; r < n; r++) {
                    acc[j][r][0] += load16(x, r * K + k0 + k, 0) * w0;
                    acc[j][r][1] += load16(x, r * K + k0 + k + LANES, 0) * w1;
                }
            }
        for (; k + LANES <= m->chunk; k += LANES)
            for (int j = 0; j < J; j++) {
                vf w0 = load16(w[j], k, is_bf16);
                for (int r = 0; r < n; r++) acc[j][r][0] += load16(x, r * K + k0 + k, 0) * w0;
            }
        for (; k < m->chunk; k++)
            for (int j = 0; j < J; j++)
                for (int r = 0; r < n; r++)
                    tail[j][r] += x[r * K + k0 + k] * load1(w[j], k, is_bf16);
    }
    for (int j = 0; j < J; j++)
        for (int r = 0; r < n; r++) h[j][r] = sum16(acc[j][r][0] + acc[j][r][1]) + tail[j][r];
}

/* d[r][i] += sum_j h[j][r] * B[j][i], j in order, for J rank rows of B (length N) and n token rows;
 * d has row stride ld. */
INLINE void expand_rows(const paged *m, int64_t chunk, int64_t stride, int J, float h[][ROWS],
                        int64_t N, int n, float *d, int64_t ld, int is_bf16) {
    for (int64_t i0 = 0; i0 < N; i0 += m->chunk, chunk++) {
        const void *w[RANKS];
        for (int j = 0; j < J; j++) w[j] = chunk_at(m, chunk + j * stride, is_bf16);
        int i = 0;
        for (; i + LANES <= m->chunk; i += LANES) {
            vf wv[RANKS];
            for (int j = 0; j < J; j++) wv[j] = load16(w[j], i, is_bf16);
            for (int r = 0; r < n; r++) {
                float *to = d + r * ld + i0 + i;
                vf v = load16(to, 0, 0);
                for (int j = 0; j < J; j++) v += h[j][r] * wv[j];
                memcpy(to, &v, sizeof v);
            }
        }
        for (; i < m->chunk; i++)
            for (int r = 0; r < n; r++)
                for (int j = 0; j < J; j++)
                    d[r * ld + i0 + i] += h[j][r] * load1(w[j], i, is_bf16);
    }
}

typedef struct {
    void *y;             /* [T, N], changed in place */
    const void *x;       /* [T, K] */
    const void *pool;    /* [P, page_elems] */
    const int32_t *row_ids, *seg_indptr, *page_table; /* see LoRABatch */
    const int32_t *ranks, *a_chunks, *b_chunks;       /* [G, 7], this layer */
    const int32_t *scale_chunks, *bias_chunks;        /* likewise, -1 for none; or both NULL */
    const float *weights;                             /* [G], or NULL */
    const int32_t *projections, *out_features;        /* [num_projections] */
    int64_t T, K, N, G, page_table_width, page_elems;
    int32_t num_projections, chunk, chunks_per_page, is_bf16;
} lora_args;

INLINE int64_t chunk_or_none(const int32_t *chunks, int64_t index) {
    return chunks ? chunks[index] : -1;
}

/* y = scale * (y + d) + bias over one module's columns of one row; a chunk of -1 is a vector of 1,
 * or of 0. */
INLINE void finish_row(const paged *m, int64_t scale_at, int64_t bias_at, int64_t width, void *y,
                       int64_t to, const float *d, int is_bf16) {
    for (int64_t i0 = 0; i0 < width; i0 += m->chunk) {
        const void *scale = scale_at < 0 ? NULL : chunk_at(m, scale_at++, is_bf16);
        const void *bias = bias_at < 0 ? NULL : chunk_at(m, bias_at++, is_bf16);
        for (int i = 0; i < m->chunk; i++) {
            float v = load1(y, to + i0 + i, is_bf16) + d[i0 + i];
            if (scale) v *= load1(scale, i, is_bf16);
            if (bias) v += load1(bias, i, is_bf16);
            store1(y, to + i0 + i, v, is_bf16);
        }
    }
}

/* Not inlined: one code for a row, whoever it is computed with. */
static __attribute__((noinline)) void finish_row_f32(const paged *m, int64_t scale_at,
                                                     int64_t bias_at, int64_t width, void *y,
                                                     int64_t to, const float *d) {
    finish_row(m, scale_at, bias_at, width, y, to, d, 0);
}

static __attribute__((noinline)) void finish_row_bf16(const paged *m, int64_t scale_at,
                                                      int64_t bias_at, int64_t width, void *y,
                                                      int64_t to, const float *d) {
    finish_row(m, scale_at, bias_at, width, y, to, d, 1);
}

/* d *= weight; each element is multiplied alone, so their number does not matter. */
static __attribute__((noinline)) void scale_delta(float *d, int64_t n, float weight) {
    for (int64_t i = 0; i < n; i++) d[i] *= weight;
}

/* Whether segment g scales or shifts the output of any of the site's modules. */
INLINE int has_epilogue(const lora_args *a, int64_t g) {
    for (int p = 0; p < a->num_projections; p++) {
        int64_t index = g * 7 + a->projections[p];
        if (chunk_or_none(a->scale_chunks, index) >= 0) return 1;
        if (chunk_or_none(a->bias_chunks, index) >= 0) return 1;
    }
    return 0;
}

/* Add the deltas d of n rows to y, module by module, each with its scale and bias. */
INLINE void finish_modules(const lora_args *a, int64_t g, const paged *m, const int32_t *rows, int n,
                           const float *d, int is_bf16) {
    int64_t column = 0;
    for (int p = 0; p < a->num_projections; p++) {
        int64_t index = g * 7 + a->projections[p], width = a->out_features[p];
        int64_t scale_at = chunk_or_none(a->scale_chunks, index);
        int64_t bias_at = chunk_or_none(a->bias_chunks, index);
        for (int r = 0; r < n; r++) {
            int64_t to = rows[r] * a->N + column;
            const float *delta = d + r * a->N + column;
            if (is_bf16) finish_row_bf16(m, scale_at, bias_at, width, a->y, to, delta);
            else finish_row_f32(m, scale_at, bias_at, width, a->y, to, delta);
        }
        column += width;
    }
}

/* x A^T then B for n rows of one segment; scratch: x rows, then delta rows, as float32. */
INLINE void lora_rows(const lora_args *a, int64_t g, const int32_t *rows, int n, float *scratch,
                      int is_bf16) {
    float *x = scratch, *d = scratch + ROWS * a->K, h[RANKS][ROWS];
    paged m = {a->pool, a->page_table + g * a->page_table_width, a->page_elems, a->chunk,
               a->chunks_per_page};
    for (int r = 0; r < n; r++)
        for (int64_t k = 0; k < a->K; k++) x[r * a->K + k] = load1(a->x, rows[r] * a->K + k, is_bf16);
    memset(d, 0, sizeof(float) * n * a->N);
    int64_t column = 0, in = a->K / a->chunk;
    for (int p = 0; p < a->num_projections; p++) {
        int64_t index = g * 7 + a->projections[p], width = a->out_features[p];
        int64_t a_at = a->a_chunks[index], b_at = a->b_chunks[index], out = width / a->chunk;
        int rank = a->ranks[index], j = 0;
        for (; j + RANKS <= rank; j += RANKS) {
            shrink_rows(&m, a_at + j * in, in, RANKS, x, a->K, n, h, is_bf16);
            expand_rows(&m, b_at + j * out, out, RANKS, h, width, n, d + column, a->N, is_bf16);
        }
        for (; j < rank; j++) {
            shrink_rows(&m, a_at + j * in, in, 1, x, a->K, n, h, is_bf16);
            expand_rows(&m, b_at + j * out, out, 1, h, width, n, d + column, a->N, is_bf16);
        }
        column += width;
    }
    if (a->weights) scale_delta(d, n * a->N, a->weights[g]);
    if (has_epilogue(a, g)) {
        finish_modules(a, g, &m, rows, n, d, is_bf16);
        return;
    }
    for (int r = 0; r < n; r++)
        for (int64_t i = 0; i < a->N; i++) {
            int64_t to = rows[r] * a->N + i;
            store1(a->y, to, load1(a->y, to, is_bf16) + d[r * a->N + i], is_bf16);
        }
}

/* Constant n and dtype let the compiler unroll; the order of every sum stays the same. */
static void lora_item(const lora_args *a, int64_t g, const int32_t *rows, int n, float *scratch) {
    if (a->is_bf16) {
        if (n == 1) lora_rows(a, g, rows, 1, scratch, 1);
        else if (n == ROWS) lora_rows(a, g, rows, ROWS, scratch, 1);
        else lora_rows(a, g, rows, n, scratch, 1);
    } else {
        if (n == 1) lora_rows(a, g, rows, 1, scratch, 0);
        else if (n == ROWS) lora_rows(a, g, rows, ROWS, scratch, 0);
        else lora_rows(a, g, rows, n, scratch, 0);
    }
}

/* Whether segment g has none of the site's modules: its rows then cost nothing. */
static int is_absent(const lora_args *a, int64_t g) {
    for (int p = 0; p < a->num_projections; p++)
        if (a->ranks[g * 7 + a->projections[p]]) return 0;
    return !has_epilogue(a, g);
}

static int64_t items_of(const lora_args *a, int64_t g) {
    return is_absent(a, g) ? 0 : (a->seg_indptr[g + 1] - a->seg_indptr[g] + ROWS - 1) / ROWS;
}

/* Returns 0, or 1 when scratch memory could not be had (y is then unchanged or partly changed). */
int loraplex_add_lora(const lora_args *a) {
    int failed = 0;
    int64_t num_items = 0;
    for (int64_t g = 0; g < a->G; g++) num_items += items_of(a, g);
    if (num_items == 0) return 0;
    /* One item is one thread's work: waking the others would cost more than it. */
    #pragma omp parallel reduction(| : failed) if (num_items > 1)
    {
        float *scratch = malloc(sizeof(float) * ROWS * (a->K + a->N));
        failed |= scratch == NULL;
        #pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < num_items; item++) {
            int64_t g = 0, block = item;
            for (; block >= items_of(a, g); g++) block -= items_of(a, g);
            int64_t first = a->seg_indptr[g] + block * ROWS;
            int n = (int)(a->seg_indptr[g + 1] - first);
            if (scratch) lora_item(a, g, a->row_ids + first, n < ROWS ? n : ROWS, scratch);
        }
        free(scratch);
    }
    return failed;
}

/* ---- attention ----------------------------------------------------------------------------- */

#define SHARED_ROWS 16 /* query rows (queries x heads of a group) that share a pass over K and V */
#define MAX_ROWS 64    /* of one query, if its group has more heads than that */

/* e^x for x <= 0: 2^n * p(r) with the Cephes expf polynomial; 0 below -87, NaN for NaN. */
INLINE vf exp16(vf x) {
    vf t = x * 1.44269504088896341f - 0.5f;
    vi n = __builtin_convertvector(t, vi); /* truncation of t - 0.5: to nearest for t <= 0 */
    vf fn = __builtin_convertvector(n, vf);
    vf r = x - fn * 0.693359375f + fn * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi scale = (n + 127) << 23, bits;
    vf s;
    memcpy(&s, &scale, sizeof s);
    vf y = p * s;
    memcpy(&bits, &y, sizeof bits);
    bits &= ~(vi)(x <= -87.0f);
    memcpy(&y, &bits, sizeof y);
    return y;
}

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

typedef struct {
    void *out;         /* [T, num_heads, head_dim] */
    const void *query; /* [T, num_heads, head_dim], rotated */
    const void *kv;    /* [P, 2, page_tokens, num_kv_heads, head_dim], one layer */
    const int32_t *query_indptr, *context_lens, *block_tables; /* see AttentionBatch */
    int64_t S, block_table_width, num_heads, num_kv_heads, head_dim, page_tokens, max_context;
    int64_t window; /* tokens a query sees, itself included; 0 for all */
    float scale;
    int32_t is_bf16;
} attention_args;

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
        int64_t from = (token * a->num_heads + head * groups + r % groups) * a->head_dim;
        for (int64_t d = 0; d < D; d++)
            w->q[r * D + d] = d < a->head_dim ? load1(a->query, from + d, is_bf16) * a->scale : 0.0f;
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

/* Returns 0, or 1 when scratch memory could not be had. */
int loraplex_attention(const attention_args *a) {
    int failed = 0;
    int64_t groups = a->num_heads / a->num_kv_heads, rows = groups > SHARED_ROWS ? groups : SHARED_ROWS;
    int64_t per_block = rows / groups;
    int64_t D = (a->head_dim + LANES - 1) / LANES * LANES;
    int64_t ld = (a->max_context + 2 * LANES) / LANES * LANES;
    int64_t num_blocks = 0;
    for (int64_t s = 0; s < a->S; s++) num_blocks += blocks_of(a, s, per_block);
    /* A lone short sequence is read faster than a second thread wakes up. */
    #pragma omp parallel reduction(| : failed) if (num_blocks > 1 || a->max_context > 1024)
    {
        float *memory = malloc(sizeof(float) * (rows * (2 * D + ld) + LANES * D));
        attention_scratch w = {memory, memory + rows * D, memory + 2 * rows * D,
                               memory + 2 * rows * D + LANES * D, D, ld};
        failed |= memory == NULL;
        #pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < num_blocks * a->num_kv_heads; item++) {
            int64_t s = 0, block = item / a->num_kv_heads, head = item % a->num_kv_heads;
            for (; block >= blocks_of(a, s, per_block); s++) block -= blocks_of(a, s, per_block);
            int64_t first = block * per_block;
            int64_t n = a->query_indptr[s + 1] - a->query_indptr[s] - first;
            if (n > per_block) n = per_block;
            if (memory && a->is_bf16) attend(a, &w, s, head, first, n, 1);
            else if (memory) attend(a, &w, s, head, first, n, 0);
        }
        free(memory);
    }
    return failed;
}

/* CPU kernels: LoRA over paged weights, and decode attention over paged KV.
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

#define LANES 16
#define ROWS 4 /* token rows that share one pass over the weights */

typedef float vf __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t vi __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint32_t vu __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t vh __attribute__((vector_size(LANES * sizeof(uint16_t))));

#define INLINE static inline __attribute__((always_inline))

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

/* h[r] = sum_k x[r][k] * A[k] for one rank row of A and n token rows of x (float32, length K). */
INLINE void shrink_row(const paged *m, int64_t chunk, const float *x, int64_t K, int n, float *h,
                       int is_bf16) {
    vf acc[ROWS][2];
    float tail[ROWS];
    memset(acc, 0, sizeof acc);
    memset(tail, 0, sizeof tail);
    for (int64_t k0 = 0; k0 < K; k0 += m->chunk, chunk++) {
        const void *w = chunk_at(m, chunk, is_bf16);
        int k = 0;
        for (; k + 2 * LANES <= m->chunk; k += 2 * LANES) {
            vf w0 = load16(w, k, is_bf16), w1 = load16(w, k + LANES, is_bf16);
            for (int r = 0; r < n; r++) {
                acc[r][0] += load16(x, r * K + k0 + k, 0) * w0;
                acc[r][1] += load16(x, r * K + k0 + k + LANES, 0) * w1;
            }
        }
        for (; k + LANES <= m->chunk; k += LANES) {
            vf w0 = load16(w, k, is_bf16);
            for (int r = 0; r < n; r++) acc[r][0] += load16(x, r * K + k0 + k, 0) * w0;
        }
        for (; k < m->chunk; k++)
            for (int r = 0; r < n; r++) tail[r] += x[r * K + k0 + k] * load1(w, k, is_bf16);
    }
    for (int r = 0; r < n; r++) h[r] = sum16(acc[r][0] + acc[r][1]) + tail[r];
}

/* d[r][i] += h[r] * B[i] for one rank row of B (length N) and n token rows; d has row stride ld. */
INLINE void expand_row(const paged *m, int64_t chunk, const float *h, int64_t N, int n, float *d,
                       int64_t ld, int is_bf16) {
    for (int64_t i0 = 0; i0 < N; i0 += m->chunk, chunk++) {
        const void *w = chunk_at(m, chunk, is_bf16);
        int i = 0;
        for (; i + LANES <= m->chunk; i += LANES) {
            vf wv = load16(w, i, is_bf16);
            for (int r = 0; r < n; r++) {
                float *to = d + r * ld + i0 + i;
                vf v = load16(to, 0, 0) + h[r] * wv;
                memcpy(to, &v, sizeof v);
            }
        }
        for (; i < m->chunk; i++)
            for (int r = 0; r < n; r++) d[r * ld + i0 + i] += h[r] * load1(w, i, is_bf16);
    }
}

typedef struct {
    void *y;             /* [T, N], changed in place */
    const void *x;       /* [T, K] */
    const void *pool;    /* [P, page_elems] */
    const int32_t *row_ids, *seg_indptr, *page_table; /* see LoRABatch */
    const int32_t *ranks, *a_chunks, *b_chunks;       /* [G, 7], this layer */
    const int32_t *projections, *out_features;        /* [num_projections] */
    int64_t T, K, N, G, page_table_width, page_elems;
    int32_t num_projections, chunk, chunks_per_page, is_bf16;
} lora_args;

/* x A^T then B for n rows of one segment; scratch: x rows, then delta rows, as float32. */
INLINE void lora_rows(const lora_args *a, int64_t g, const int32_t *rows, int n, float *scratch,
                      int is_bf16) {
    float *x = scratch, *d = scratch + ROWS * a->K, h[ROWS];
    paged m = {a->pool, a->page_table + g * a->page_table_width, a->page_elems, a->chunk,
               a->chunks_per_page};
    for (int r = 0; r < n; r++)
        for (int64_t k = 0; k < a->K; k++) x[r * a->K + k] = load1(a->x, rows[r] * a->K + k, is_bf16);
    memset(d, 0, sizeof(float) * n * a->N);
    int64_t column = 0;
    for (int p = 0; p < a->num_projections; p++) {
        int64_t index = g * 7 + a->projections[p], width = a->out_features[p];
        int64_t a_at = a->a_chunks[index], b_at = a->b_chunks[index];
        for (int j = 0; j < a->ranks[index]; j++) {
            shrink_row(&m, a_at + j * (a->K / a->chunk), x, a->K, n, h, is_bf16);
            expand_row(&m, b_at + j * (width / a->chunk), h, width, n, d + column, a->N, is_bf16);
        }
        column += width;
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

/* Returns 0, or 1 when scratch memory could not be had (y is then unchanged or partly changed). */
int loraplex_add_lora(const lora_args *a) {
    int failed = 0;
    int64_t num_items = 0;
    for (int64_t g = 0; g < a->G; g++)
        num_items += (a->seg_indptr[g + 1] - a->seg_indptr[g] + ROWS - 1) / ROWS;
    /* One item is one thread's work: waking the others would cost more than it. */
    #pragma omp parallel reduction(| : failed) if (num_items > 1)
    {
        float *scratch = malloc(sizeof(float) * ROWS * (a->K + a->N));
        failed |= scratch == NULL;
        #pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < num_items; item++) {
            int64_t g = 0, block = item;
            for (;; g++) {
                int64_t blocks = (a->seg_indptr[g + 1] - a->seg_indptr[g] + ROWS - 1) / ROWS;
                if (block < blocks) break;
                block -= blocks;
            }
            int64_t first = a->seg_indptr[g] + block * ROWS;
            int n = (int)(a->seg_indptr[g + 1] - first);
            if (scratch) lora_item(a, g, a->row_ids + first, n < ROWS ? n : ROWS, scratch);
        }
        free(scratch);
    }
    return failed;
}

/* ---- decode attention ---------------------------------------------------------------------- */

/* e^x for x <= 0: 2^n * p(f) with the Cephes expf polynomial; underflows to 0 below -87. */
INLINE vf exp16(vf x) {
    vf t = x * 1.44269504088896341f;
    vf rounded = t - 0.5f;
    vi n = __builtin_convertvector(rounded, vi); /* truncation of t - 0.5: nearest for t <= 0 */
    vf fn = __builtin_convertvector(n, vf);
    vf r = x - fn * 0.693359375f + fn * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi scale = (n + 127) << 23;
    vf s;
    memcpy(&s, &scale, sizeof s);
    vi keep = x > -87.0f;
    vf y = p * s;
    vi bits;
    memcpy(&bits, &y, sizeof bits);
    bits &= keep;
    memcpy(&y, &bits, sizeof y);
    return y;
}

INLINE float dot(const float *x, const void *w, int64_t K, int is_bf16) {
    vf acc = {0};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) acc += load16(x, k, 0) * load16(w, k, is_bf16);
    float s = sum16(acc);
    for (; k < K; k++) s += x[k] * load1(w, k, is_bf16);
    return s;
}

typedef struct {
    void *out;           /* [S, num_heads, head_dim] */
    const void *query;   /* [S, num_heads, head_dim], rotated */
    const void *kv;      /* [P, 2, page_tokens, num_kv_heads, head_dim], one layer */
    const int32_t *context_lens, *block_tables;
    int64_t S, block_table_width, num_heads, num_kv_heads, head_dim, page_tokens, max_context;
    int64_t window; /* tokens a query sees, itself included; 0 for all */
    float scale;
    int32_t is_bf16;
} attention_args;

/* One KV head of one sequence, all query heads that share it; scores: [groups, max_context + 16]. */
INLINE void attend(const attention_args *a, int64_t s, int64_t head, float *scratch, int is_bf16) {
    int64_t groups = a->num_heads / a->num_kv_heads, D = a->head_dim;
    int64_t context = a->context_lens[s], ld = a->max_context + LANES;
    int64_t first = a->window && context > a->window ? context - a->window : 0;
    const int32_t *pages = a->block_tables + s * a->block_table_width;
    int64_t token_stride = a->num_kv_heads * D, half = a->page_tokens * token_stride;
    float *q = scratch, *acc = q + groups * D, *scores = acc + groups * D;
    int64_t q_at = (s * a->num_heads + head * groups) * D;
    for (int64_t i = 0; i < groups * D; i++) q[i] = load1(a->query, q_at + i, is_bf16) * a->scale;
    memset(acc, 0, sizeof(float) * groups * D);
    for (int64_t t = first; t < context; t++) {
        int64_t row = pages[t / a->page_tokens] * 2 * half + (t % a->page_tokens) * token_stride;
        const void *key = at(a->kv, row + head * D, is_bf16);
        for (int64_t g = 0; g < groups; g++)
            scores[g * ld + t - first] = dot(q + g * D, key, D, is_bf16);
    }
    int64_t n = context - first;
    float total[64];
    for (int64_t g = 0; g < groups; g++) {
        float *row = scores + g * ld, most = row[0];
        for (int64_t t = 1; t < n; t++) most = row[t] > most ? row[t] : most;
        for (int64_t t = n; t % LANES; t++) row[t] = -INFINITY;
        vf sum = {0};
        for (int64_t t = 0; t < n; t += LANES) {
            vf e = exp16(load16(row, t, 0) - most);
            memcpy(row + t, &e, sizeof e);
            sum += e;
        }
        total[g] = sum16(sum);
    }
    for (int64_t t = first; t < context; t++) {
        int64_t row = pages[t / a->page_tokens] * 2 * half + (t % a->page_tokens) * token_stride;
        const void *value = at(a->kv, row + half + head * D, is_bf16);
        for (int64_t g = 0; g < groups; g++) {
            float p = scores[g * ld + t - first];
            int64_t i = 0;
            for (; i + LANES <= D; i += LANES) {
                vf v = load16(acc, g * D + i, 0) + p * load16(value, i, is_bf16);
                memcpy(acc + g * D + i, &v, sizeof v);
            }
            for (; i < D; i++) acc[g * D + i] += p * load1(value, i, is_bf16);
        }
    }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < D; i++)
            store1(a->out, q_at + g * D + i, acc[g * D + i] / total[g], is_bf16);
}

/* One query per sequence. Returns 0, or 1 when scratch memory could not be had. */
int loraplex_decode_attention(const attention_args *a) {
    int failed = 0;
    int64_t groups = a->num_heads / a->num_kv_heads;
    size_t scratch_bytes =
        sizeof(float) * groups * (2 * a->head_dim + a->max_context + LANES) + 64;
    /* A lone short sequence is read faster than a second thread wakes up. */
    #pragma omp parallel reduction(| : failed) if (a->S > 1 || a->max_context > 1024)
    {
        float *scratch = malloc(scratch_bytes);
        failed |= scratch == NULL;
        #pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < a->S * a->num_kv_heads; item++) {
            if (!scratch) continue;
            int64_t s = item / a->num_kv_heads, head = item % a->num_kv_heads;
            if (a->is_bf16) attend(a, s, head, scratch, 1);
            else attend(a, s, head, scratch, 0);
        }
        free(scratch);
    }
    return failed;
}

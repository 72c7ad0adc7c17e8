/* LoRA over paged weights, at true ranks. All arithmetic is float32, and every sum runs in an order
 * fixed by the shape alone: explicit vectors, no fast-math, no atomics. The result of a row is
 * therefore bit-identical in any batch. */
#include "lora.h"

#include <stdlib.h>

#include "elements.h"
#include "team.h"

#define ROWS 4  /* token rows that share one pass over the weights */
#define RANKS 4 /* rank rows that share one pass over the activations */

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

INLINE int64_t chunk_or_none(const int32_t *chunks, int64_t index) {
    return chunks ? chunks[index] : -1;
}

/* y = scale * (y + d) + bias over one module's columns of one row; a chunk of -1 is a vector of 1,
 * or of 0. Not inlined: one code for a row, whoever it is computed with. */
static __attribute__((noinline)) void finish_row(const paged *m, int64_t scale_at, int64_t bias_at,
                                                 int64_t width, float *y, const float *d,
                                                 int is_bf16) {
    for (int64_t i0 = 0; i0 < width; i0 += m->chunk) {
        const void *scale = scale_at < 0 ? NULL : chunk_at(m, scale_at++, is_bf16);
        const void *bias = bias_at < 0 ? NULL : chunk_at(m, bias_at++, is_bf16);
        for (int i = 0; i < m->chunk; i++) {
            float v = y[i0 + i] + d[i0 + i];
            if (scale) v *= load1(scale, i, is_bf16);
            if (bias) v += load1(bias, i, is_bf16);
            y[i0 + i] = v;
        }
    }
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
            finish_row(m, scale_at, bias_at, width, a->y + to, delta, is_bf16);
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
        for (int64_t i = 0; i < a->N; i++) a->y[rows[r] * a->N + i] += d[r * a->N + i];
}

/* Constant n and dtype let the compiler unroll; the order of every sum stays the same. */
static void rows_of_item(const lora_args *a, int64_t g, const int32_t *rows, int n, float *scratch) {
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

int64_t lora_items(const lora_args *a) {
    int64_t count = 0;
    for (int64_t g = 0; g < a->G; g++) count += items_of(a, g);
    return count;
}

int64_t lora_scratch_bytes(const lora_args *a) {
    return (int64_t)sizeof(float) * ROWS * (a->K + a->N);
}

void lora_item(const void *args, int64_t item, void *scratch) {
    const lora_args *a = args;
    int64_t g = 0, block = item;
    for (; block >= items_of(a, g); g++) block -= items_of(a, g);
    int64_t first = a->seg_indptr[g] + block * ROWS;
    int n = (int)(a->seg_indptr[g + 1] - first);
    rows_of_item(a, g, a->row_ids + first, n < ROWS ? n : ROWS, scratch);
}

int loraplex_add_lora(const lora_args *a) {
    return run_alone(lora_item, a, lora_items(a), lora_scratch_bytes(a));
}

/* LoRA over paged weights, at true ranks. All arithmetic is float32, and every sum runs in an order
 * fixed by the shape alone: explicit vectors, no fast-math, no atomics. The result of a row is
 * therefore bit-identical in any batch.
 *
 * An item is one module of one adapter for up to ROWS token rows. Deltas are computed apart from the
 * base's outputs, and added once both are there: in a decode step an adapter has a
 * row or two, and all time goes into reading weights from memory: A and then B are read once, as
 * they lie, while what comes next is prefetched (pages are scattered, and hardware prefetchers stop
 * where one ends). With many rows the weights stay in the caches while rows pass over them,
 * TILE_ROWS at a time with their sums in registers. */
#include "lora.h"

#include <stdlib.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "elements.h"
#include "team.h"

#define ROWS 16       /* token rows of an item */
#if defined(__AVX512F__)
#define TILE_ROWS 4  /* token rows whose sums are in registers together */
#define TILE_RANKS 4 /* rank rows of A that share one pass over the activations; times
                      * TILE_ROWS they are LANES or less */
#elif defined(__AVX__)
#define TILE_ROWS 2
#define TILE_RANKS 4
#else
#define TILE_ROWS 2
#define TILE_RANKS 2
#endif
#define SWEEP 8       /* rank rows of B read together while a few token rows use them */
#define RANK_BLOCK 64 /* rank rows that are shrunk and then expanded */
#define STEP (2 * LANES) /* elements taken at once: a vector of pairs of bfloat16 */
#define WIDE 4        /* most steps of columns whose sums are in registers together */
#define AHEAD 6144    /* bytes of weights between a prefetch and its use */
#define CACHE_LINE 64

/* Unrolls a loop of constant count, so that an array can live in registers. */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* STEP elements as they lie; of bfloat16 they fill the first vector. */
typedef struct {
    vu first, second;
} step;

/* STEP elements as float32. Bfloat16 ones are split into those at even and those at odd places, for
 * which a shift and a mask do; `in_order` undoes it. */
typedef struct {
    vf low, high;
} pair;

INLINE vu load_words(const void *p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE step load_step(const void *p, int64_t i, int is_bf16) {
    const char *from = at(p, i, is_bf16);
    return (step){load_words(from), is_bf16 ? (vu){0} : load_words(from + sizeof(vu))};
}

INLINE pair split(step v, int is_bf16) {
    if (is_bf16) return (pair){(vf)(v.first << 16), (vf)(v.first & 0xffff0000u)};
    return (pair){(vf)v.first, (vf)v.second};
}

INLINE pair load_pair(const float *p) { return (pair){loadv(p, 0, 0), loadv(p, LANES, 0)}; }

INLINE void store_pair(float *p, pair v) {
    storev(p, 0, v.low, 0);
    storev(p, LANES, v.high, 0);
}

INLINE pair in_order(pair v, int is_bf16) {
    if (!is_bf16) return v;
    return (pair){ZIP_LOW(v.low, v.high), ZIP_HIGH(v.low, v.high)};
}

/* acc + x * w, two products in each lane; those of bfloat16 are exact in float32. */
INLINE vf dot_step(vf acc, step x, step w, int is_bf16) {
#ifdef __AVX512BF16__
    if (is_bf16)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x.first, (__m512bh)w.first);
#endif
    pair xs = split(x, is_bf16), ws = split(w, is_bf16);
    acc += xs.low * ws.low;
    acc += xs.high * ws.high;
    return acc;
}

/* Sums of the lanes of up to LANES vectors, a power of two of them, each by the tree of sumv: lane i
 * of the result is that of v[i]. */
INLINE vf sumsv(vf *v, int count) {
#define FOLD(...) \
    UNROLL for (int i = 0; i < (count + 1) / 2; i++) { \
        vf a = v[2 * i], b = v[count == 1 ? 0 : 2 * i + 1]; \
        v[i] = __VA_ARGS__; \
    } \
    count = (count + 1) / 2;
#if LANES == 16
    FOLD(PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    FOLD(PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
    FOLD(PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
    FOLD(PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#elif LANES == 8
    FOLD(PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
    FOLD(PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15))
    FOLD(PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15))
#else
    FOLD(PICK(a, b, 0, 1, 4, 5) + PICK(a, b, 2, 3, 6, 7))
    FOLD(PICK(a, b, 0, 2, 4, 6) + PICK(a, b, 1, 3, 5, 7))
#endif
#undef FOLD
    return v[0];
}

/* One module of one adapter and the token rows that it is for. A chunk is whole steps here: where the
 * pool's are not, copies padded with 0 stand in for them. */
typedef struct {
    const int32_t *pages; /* of the adapter */
    const void *x[ROWS];
    float *y[ROWS];      /* columns of the module */
    const void **a, **b; /* chunks of the rank rows at hand, then `ahead` more */
    float *h;            /* [RANK_BLOCK, ROWS]: weight * A x */
    float *delta;        /* [ROWS, out * chunk], each step as `split` leaves it */
    float *planes;       /* [ROWS, plane_pitch], of the module; or NULL */
    char *copies;        /* of x, and of what is listed; or NULL */
    int64_t in, out;     /* chunks of a row of A, and of one of B */
    int64_t chunk, ahead, plane_pitch;
    float weight;
    int n; /* token rows */
} work;

INLINE void prefetch(const void *p, int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += CACHE_LINE) __builtin_prefetch((const char *)p + i);
}

/* h[j][r] = weight * sum_k x[r][k] * A[j][k] for J rank rows and n token rows. */
INLINE void shrink_tile(const work *m, int64_t j0, int J, int r0, int n, int is_bf16) {
    vf acc[TILE_RANKS * TILE_ROWS];
    UNROLL for (int i = 0; i < J * n; i++) acc[i] = (vf){0};
    for (int64_t c = 0; c < m->in; c++) {
        const void *w[TILE_RANKS], *next[TILE_RANKS], *x[TILE_ROWS];
        UNROLL for (int j = 0; j < J; j++) {
            const void **from = m->a + (j0 + j) * m->in + c;
            w[j] = from[0];
            next[j] = from[m->ahead];
        }
        UNROLL for (int r = 0; r < n; r++) x[r] = at(m->x[r0 + r], c * m->chunk, is_bf16);
        for (int64_t k = 0; k < m->chunk; k += STEP) {
            step xs[TILE_ROWS];
            UNROLL for (int r = 0; r < n; r++) xs[r] = load_step(x[r], k, is_bf16);
            UNROLL for (int j = 0; j < J; j++) {
                step ws = load_step(w[j], k, is_bf16);
                prefetch(at(next[j], k, is_bf16), STEP * (is_bf16 ? 2 : 4));
                UNROLL for (int r = 0; r < n; r++)
                    acc[j * n + r] = dot_step(acc[j * n + r], xs[r], ws, is_bf16);
            }
        }
    }
    vf sums = m->weight * sumsv(acc, J * n);
    float h[LANES];
    memcpy(h, &sums, sizeof h);
    UNROLL for (int j = 0; j < J; j++)
        memcpy(m->h + (j0 + j) * ROWS + r0, h + j * n, (size_t)n * sizeof *h);
}

/* Constant numbers of rows let the compiler unroll; the order of every sum stays the same. */
INLINE void shrink_rows(const work *m, int64_t j, int J, int is_bf16) {
    int r = 0;
    for (; r + TILE_ROWS <= m->n; r += TILE_ROWS) shrink_tile(m, j, J, r, TILE_ROWS, is_bf16);
    for (; r + 2 <= m->n; r += 2) shrink_tile(m, j, J, r, 2, is_bf16);
    if (r < m->n) shrink_tile(m, j, J, r, 1, is_bf16);
}

INLINE void shrink_all(const work *m, int64_t rank, int is_bf16) {
    int64_t j = 0;
    for (; j + TILE_RANKS <= rank; j += TILE_RANKS) shrink_rows(m, j, TILE_RANKS, is_bf16);
    for (; j < rank; j++) shrink_rows(m, j, 1, is_bf16);
}

/* Not inlined: one code, whether the other half follows or not. */
static __attribute__((noinline)) void shrink(const work *m, int64_t rank, int is_bf16) {
    if (is_bf16) shrink_all(m, rank, 1);
    else shrink_all(m, rank, 0);
}

/* delta[r] += sum_j h[j][r] * B[j], j in order, over U steps of columns from element k of chunk c
 * on, for rank rows [j0, j1) and n token rows. */
INLINE void expand_tile(const work *m, int64_t c, int64_t k, int U, int64_t j0, int64_t j1, int r0,
                        int n, int is_bf16) {
    const int64_t width = m->out * m->chunk;
    float *delta = m->delta + r0 * width + c * m->chunk + k;
    pair acc[TILE_ROWS][WIDE];
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int u = 0; u < U; u++)
            acc[r][u] = load_pair(delta + r * width + u * STEP);
    for (int64_t j = j0; j < j1; j++) {
        const void **from = m->b + j * m->out + c;
        const float *h = m->h + j * ROWS + r0;
        prefetch(at(from[m->ahead], k, is_bf16), U * STEP * (is_bf16 ? 2 : 4));
        UNROLL for (int u = 0; u < U; u++) {
            pair b = split(load_step(from[0], k + u * STEP, is_bf16), is_bf16);
            UNROLL for (int r = 0; r < n; r++) {
                acc[r][u].low += h[r] * b.low;
                acc[r][u].high += h[r] * b.high;
            }
        }
    }
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int u = 0; u < U; u++)
            store_pair(delta + r * width + u * STEP, acc[r][u]);
}

INLINE void expand_chunk(const work *m, int64_t c, int64_t j0, int64_t j1, int r, int n,
                         int is_bf16) {
    int64_t k = 0;
    if (n < TILE_ROWS) /* else registers would not do */
        for (; k + WIDE * STEP <= m->chunk; k += WIDE * STEP)
            expand_tile(m, c, k, WIDE, j0, j1, r, n, is_bf16);
    for (; k + 2 * STEP <= m->chunk; k += 2 * STEP)
        expand_tile(m, c, k, 2, j0, j1, r, n, is_bf16);
    for (; k < m->chunk; k += STEP) expand_tile(m, c, k, 1, j0, j1, r, n, is_bf16);
}

INLINE void expand_rows(const work *m, int64_t c, int64_t j0, int64_t j1, int is_bf16) {
    int r = 0;
    for (; r + TILE_ROWS <= m->n; r += TILE_ROWS)
        expand_chunk(m, c, j0, j1, r, TILE_ROWS, is_bf16);
    for (; r + 2 <= m->n; r += 2) expand_chunk(m, c, j0, j1, r, 2, is_bf16);
    if (r < m->n) expand_chunk(m, c, j0, j1, r, 1, is_bf16);
}

/* Few token rows wait for memory, so B is read as it lies. Many compute, so their sums stay in
 * registers over all ranks. */
INLINE void expand_all(const work *m, int64_t rank, int is_bf16) {
    const int64_t sweep = m->n <= TILE_ROWS ? SWEEP : rank;
    for (int64_t j = 0; j < rank; j += sweep) {
        int64_t end = j + sweep < rank ? j + sweep : rank;
        for (int64_t c = 0; c < m->out; c++) expand_rows(m, c, j, end, is_bf16);
    }
}

static __attribute__((noinline)) void expand(const work *m, int64_t rank, int is_bf16) {
    if (is_bf16) expand_all(m, rank, 1);
    else expand_all(m, rank, 0);
}

/* List where chunks of the adapter lie, `count` from `first` on; returns the end of the list. */
INLINE const void **list_chunks(const lora_args *a, const work *m, int64_t first, int64_t count,
                                const void **to, int is_bf16) {
    int64_t page = first / a->chunks_per_page, c = first % a->chunks_per_page;
    for (; count > 0; page++, c = 0) {
        const void *from = at(a->pool, m->pages[page] * a->page_elems, is_bf16);
        for (; c < a->chunks_per_page && count > 0; c++, count--)
            *to++ = at(from, c * a->chunk, is_bf16);
    }
    return to;
}

/* Replace listed chunks by copies that whole steps can be read of; returns the end of the copies. */
static char *pad_chunks(const lora_args *a, const work *m, const void **from, const void **end,
                        char *to) {
    const int64_t elem_bytes = a->is_bf16 ? 2 : 4;
    for (; from < end; from++, to += m->chunk * elem_bytes) {
        memset(to, 0, (size_t)(m->chunk * elem_bytes));
        memcpy(to, *from, (size_t)(a->chunk * elem_bytes));
        *from = to;
    }
    return to;
}

/* Between the halves, planes are A x alone: the weight is the expand's affair. */
INLINE void put_planes(const work *m, int64_t j0, int64_t rank) {
    for (int r = 0; r < m->n; r++)
        for (int64_t j = 0; j < rank; j++)
            m->planes[r * m->plane_pitch + j0 + j] = m->h[j * ROWS + r];
}

INLINE void take_planes(const work *m, int64_t j0, int64_t rank) {
    for (int r = 0; r < m->n; r++)
        for (int64_t j = 0; j < rank; j++)
            m->h[j * ROWS + r] = m->weight * m->planes[r * m->plane_pitch + j0 + j];
}

/* What is done: whoever does one half has no chunks of the other's matrix. */
enum { SHRINK = 1, EXPAND = 2 };

/* delta += weight * B A x, or the half of it that is asked for. */
INLINE void add_delta(const lora_args *a, work *m, int64_t a_at, int64_t b_at, int64_t rank,
                      int halves, int is_bf16) {
    for (int64_t j = 0; j < rank; j += RANK_BLOCK) {
        int64_t ranks = rank - j < RANK_BLOCK ? rank - j : RANK_BLOCK;
        m->b = list_chunks(a, m, a_at + j * m->in, ranks * m->in, m->a, is_bf16);
        /* The first rows are on their way before anything else is looked up. */
        for (const void **w = m->a; w < m->a + m->ahead && w < m->b; w++)
            prefetch(*w, a->chunk * (is_bf16 ? 2 : 4));
        const void **end = list_chunks(a, m, b_at + j * m->out, ranks * m->out, m->b, is_bf16);
        if (m->copies) pad_chunks(a, m, m->a, end, m->copies);
        for (int64_t i = 0; i < m->ahead; i++) end[i] = end[-1];
        if (halves & SHRINK) shrink(m, ranks, is_bf16);
        else take_planes(m, j, ranks);
        if (halves & EXPAND) expand(m, ranks, is_bf16);
        else put_planes(m, j, ranks);
    }
}

INLINE pair load_in_order(const void *p, int64_t i, int is_bf16) {
    return in_order(split(load_step(p, i, is_bf16), is_bf16), is_bf16);
}

/* y = scale * (y + delta) + bias over `count` columns, a step or less. The scale is the sum of two
 * vectors; it and the bias may be NULL. */
INLINE void finish_step(float *y, const float *delta, const void *scale, const void *scale_rest,
                        const void *bias, int64_t i, int64_t count, int is_bf16) {
    pair v = {{0}, {0}}, d;
    memcpy(&v, y + i, (size_t)count * sizeof *y);
    memcpy(&d, delta + i, sizeof d);
    d = in_order(d, is_bf16);
    v.low += d.low, v.high += d.high;
    if (scale) {
        pair s = load_in_order(scale, i, is_bf16), rest = load_in_order(scale_rest, i, is_bf16);
        v.low *= s.low + rest.low, v.high *= s.high + rest.high;
    }
    if (bias) {
        pair b = load_in_order(bias, i, is_bf16);
        v.low += b.low, v.high += b.high;
    }
    memcpy(y + i, &v, (size_t)count * sizeof *y);
}

/* Not inlined: one code for a row, whoever it is computed with. */
static __attribute__((noinline)) void finish_row(const work *m, int64_t chunk, float *y,
                                                 const float *delta, const void **scale,
                                                 const void **bias, int is_bf16) {
    for (int64_t c = 0; c < m->out; c++, y += chunk, delta += m->chunk) {
        const void *s = scale ? scale[c] : NULL, *rest = scale ? scale[m->out + c] : NULL;
        const void *b = bias ? bias[c] : NULL;
        int64_t i = 0;
        for (; i + STEP <= chunk; i += STEP) finish_step(y, delta, s, rest, b, i, STEP, is_bf16);
        if (i < chunk) finish_step(y, delta, s, rest, b, i, chunk - i, is_bf16);
    }
}

/* y = scale * (y + delta) + bias, of which -1 is none. */
INLINE void finish(const lora_args *a, const work *m, int64_t scale_at, int64_t bias_at,
                   int is_bf16) {
    const void **scale = NULL, **bias = NULL, **end = m->a;
    if (scale_at >= 0) end = list_chunks(a, m, scale_at, 2 * m->out, scale = end, is_bf16);
    if (bias_at >= 0) end = list_chunks(a, m, bias_at, m->out, bias = end, is_bf16);
    if (m->copies) pad_chunks(a, m, m->a, end, m->copies);
    for (int r = 0; r < m->n; r++)
        finish_row(m, a->chunk, m->y[r], m->delta + r * m->out * m->chunk, scale, bias, is_bf16);
}

INLINE int64_t chunk_or_none(const int32_t *chunks, int64_t index) {
    return chunks ? chunks[index] : -1;
}

INLINE int64_t padded_chunk(const lora_args *a) { return (a->chunk + STEP - 1) / STEP * STEP; }

INLINE int64_t chunks_ahead(const lora_args *a) {
    return 1 + AHEAD / (a->chunk * (a->is_bf16 ? 2 : 4));
}

INLINE int64_t whole_lines(int64_t bytes) {
    return (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

/* Where the parts of a thread's scratch begin, and its bytes. */
typedef struct {
    int64_t h, copies, end;
} parts;

static parts scratch_parts(const lora_args *a) {
    int64_t widest = 0;
    for (int p = 0; p < a->num_projections; p++)
        if (a->out_features[p] > widest) widest = a->out_features[p];
    int64_t chunk = padded_chunk(a), in = a->K / a->chunk, out = widest / a->chunk;
    int64_t listed = RANK_BLOCK * (in + out), copied = chunk == a->chunk ? 0 : listed + ROWS * in;
    parts s;
    s.h = whole_lines((listed + chunks_ahead(a)) * (int64_t)sizeof(void *));
    s.copies = s.h + RANK_BLOCK * ROWS * (int64_t)sizeof(float);
    s.end = s.copies + copied * chunk * (a->is_bf16 ? 2 : 4);
    return s;
}

INLINE int64_t delta_width(const lora_args *a, int p) {
    return a->out_features[p] / a->chunk * padded_chunk(a);
}

int64_t lora_delta_elems(const lora_args *a) {
    int64_t width = 0;
    for (int p = 0; p < a->num_projections; p++) width += delta_width(a, p);
    return a->seg_indptr[a->G] * width;
}

/* Replace the rows of x by copies that consist of whole steps. */
static void pad_activations(const lora_args *a, work *m) {
    for (int r = 0; r < m->n; r++) {
        for (int64_t c = 0; c < m->in; c++) m->a[c] = at(m->x[r], c * a->chunk, a->is_bf16);
        m->x[r] = m->copies;
        m->copies = pad_chunks(a, m, m->a, m->a + m->in, m->copies);
    }
}

/* One module of one segment, for some of its rows. */
typedef struct {
    int64_t g, row, n; /* `row` counts in row_ids */
    int p;
} block;

/* Whether the adapter leaves the module alone. */
INLINE int is_absent(const lora_args *a, const block *b) {
    int64_t index = b->g * 7 + a->projections[b->p];
    return a->ranks[index] == 0 && chunk_or_none(a->scale_chunks, index) < 0 &&
           chunk_or_none(a->bias_chunks, index) < 0;
}

/* A row of planes has the ranks of all modules side by side. */
INLINE void place_planes(const lora_args *a, const block *b, work *m) {
    int64_t column = 0;
    for (int i = 0; i < a->num_projections; i++) {
        if (i == b->p) column = m->plane_pitch;
        m->plane_pitch += a->ranks[b->g * 7 + a->projections[i]];
    }
    int64_t row = b->row - a->seg_indptr[b->g];
    m->planes = a->planes + a->plane_starts[b->g] + row * m->plane_pitch + column;
}

INLINE work work_of(const lora_args *a, const block *b, char *scratch) {
    parts s = scratch_parts(a);
    const int32_t *rows = a->row_ids + b->row;
    int64_t column = 0;
    float *delta = a->deltas;
    for (int i = 0; i < b->p; i++) {
        column += a->out_features[i];
        delta += a->seg_indptr[a->G] * delta_width(a, i);
    }
    work m = {
        .pages = a->page_table + b->g * a->page_table_width,
        .a = (const void **)scratch,
        .h = (float *)(scratch + s.h),
        .delta = delta + b->row * delta_width(a, b->p),
        .copies = s.copies == s.end ? NULL : scratch + s.copies,
        .in = a->K / a->chunk,
        .out = a->out_features[b->p] / a->chunk,
        .chunk = padded_chunk(a),
        .ahead = chunks_ahead(a),
        .weight = a->weights ? a->weights[b->g] : 1.0f,
        .n = (int)b->n,
    };
    for (int r = 0; r < m.n; r++) {
        if (a->x) m.x[r] = at(a->x, rows[r] * a->K, a->is_bf16);
        if (a->y) m.y[r] = a->y + rows[r] * a->N + column;
    }
    if (a->planes) place_planes(a, b, &m);
    return m;
}

INLINE void compute_delta(const lora_args *a, const block *b, char *scratch, int halves,
                          int is_bf16) {
    int64_t index = b->g * 7 + a->projections[b->p];
    work m = work_of(a, b, scratch);
    if (halves & EXPAND) memset(m.delta, 0, (size_t)(m.n * m.out * m.chunk) * sizeof *m.delta);
    if (m.copies) pad_activations(a, &m);
    add_delta(a, &m, a->a_chunks[index], a->b_chunks[index], a->ranks[index], halves, is_bf16);
}

INLINE void finish_block(const lora_args *a, const block *b, char *scratch, int is_bf16) {
    int64_t index = b->g * 7 + a->projections[b->p];
    work m = work_of(a, b, scratch);
    finish(a, &m, chunk_or_none(a->scale_chunks, index), chunk_or_none(a->bias_chunks, index),
           is_bf16);
}

/* Blocks of up to ROWS rows are numbered so that the segment of one is found by halving: those of
 * segment g begin at first_row / ROWS + g. Some numbers are nobody's. */
INLINE int64_t first_block(const lora_args *a, int64_t g) { return a->seg_indptr[g] / ROWS + g; }

int64_t lora_items(const lora_args *a) { return first_block(a, a->G) * a->num_projections; }

int64_t lora_scratch_bytes(const lora_args *a) { return scratch_parts(a).end; }

/* Module by module: the widest ones come first, and short items end the phase evenly. */
static block block_of(const lora_args *a, int64_t item) {
    int64_t num_blocks = first_block(a, a->G), at = item % num_blocks, g = 0;
    for (int64_t end = a->G; end - g > 1;) {
        int64_t middle = (g + end) / 2;
        if (first_block(a, middle) <= at) g = middle;
        else end = middle;
    }
    block b = {.g = g, .p = (int)(item / num_blocks)};
    b.row = a->seg_indptr[g] + (at - first_block(a, g)) * ROWS;
    b.n = a->seg_indptr[g + 1] - b.row;
    if (b.n > ROWS) b.n = ROWS;
    return b;
}

INLINE void run_delta(const lora_args *a, int64_t item, char *scratch, int halves) {
    block b = block_of(a, item);
    if (b.n <= 0 || is_absent(a, &b)) return;
    if (a->is_bf16) compute_delta(a, &b, scratch, halves, 1);
    else compute_delta(a, &b, scratch, halves, 0);
}

void lora_delta_item(const void *args, int64_t item, void *scratch) {
    run_delta(args, item, scratch, SHRINK | EXPAND);
}

static void shrink_item(const void *args, int64_t item, void *scratch) {
    run_delta(args, item, scratch, SHRINK);
}

static void expand_item(const void *args, int64_t item, void *scratch) {
    run_delta(args, item, scratch, EXPAND);
    lora_add_item(args, item, scratch);
}

void lora_add_item(const void *args, int64_t item, void *scratch) {
    const lora_args *a = args;
    block b = block_of(a, item);
    if (b.n <= 0 || is_absent(a, &b)) return;
    if (a->is_bf16) finish_block(a, &b, scratch, 1);
    else finish_block(a, &b, scratch, 0);
}

static void run_both(worker *w, const void *args) {
    const lora_args *a = args;
    run_phase(w, lora_delta_item, a, lora_items(a));
    run_phase(w, lora_add_item, a, lora_items(a));
}

static void run_expand(worker *w, const void *args) {
    run_phase(w, expand_item, args, lora_items(args));
}

static int run_with_deltas(void (*body)(worker *, const void *), const lora_args *given) {
    lora_args a = *given;
    if (lora_items(&a) == 0) return 0;
    a.deltas = allocate(lora_delta_elems(&a) * (int64_t)sizeof *a.deltas);
    if (a.deltas == NULL) return 1;
    int failed = run_team(body, &a, lora_scratch_bytes(&a));
    free(a.deltas);
    return failed;
}

int loraplex_add_lora(const lora_args *a) { return run_with_deltas(run_both, a); }

int loraplex_lora_expand(const lora_args *a) { return run_with_deltas(run_expand, a); }

int loraplex_lora_shrink(const lora_args *a) {
    return run_alone(shrink_item, a, lora_items(a), lora_scratch_bytes(a));
}

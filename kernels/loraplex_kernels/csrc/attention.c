/* Attention over paged KV, as a softmax that goes on from block to block of the keys.
 *
 * A query's result is bit-identical in any batch: its blocks begin at multiples of BLOCK, keys that
 * it may not see are not added at all, and every sum runs in the order of the keys or of the head's
 * elements, whatever rows share the pass.
 *
 * K of a block is transposed once, so that the lanes are keys and no sum runs across them; V is
 * used where it lies. Both stay in their own dtype until they meet a query: two bfloat16 make one
 * 32-bit word, and a shift and a mask make two vectors of float32 of it. So the elements of `acc`
 * lie as the even ones of 32, then the odd ones.
 */
#include "attention.h"

#include <math.h>
#include <omp.h>

#include "elements.h"
#include "team.h"

#define BLOCK 128      /* keys whose scores are held at once */
#define SHARED_ROWS 48 /* query rows (queries x heads of a group) that share a pass over K and V */
#define MAX_ROWS 64    /* of one query, if its group has more heads than that */
#define CACHE_LINE 64
#define VECTOR_BYTES (LANES * (int64_t)sizeof(float))

/* A decoding query's keys are fetched so many ahead of their use, further ones while
 * others are worked on, so many in each part of a block: memory is busy all the time. */
#define FETCHED_FIRST 128
#define FETCHED_BY_TRANSPOSE (LANES / 4) /* while LANES keys are transposed, and so on */
#define FETCHED_BY_SCORES (TILE_KEYS * FETCHED_BY_VALUES)
#define FETCHED_BY_VALUES (LANES * 3 / 8)
#define MANY_SEQUENCES 16 /* from here on an item is all KV heads of a pass, which lie together */

/* What a kernel keeps in registers: rows x vectors of keys x 2 sums, or rows x vectors of V. */
#if defined(__AVX512F__)
#define TILE_ROWS 6
#define TILE_KEYS 2
#define TILE_VALUES 4
#else
#define TILE_ROWS 2
#define TILE_KEYS 2
#define TILE_VALUES 4
#endif

/* Called from a kernel of every shape of tile: a copy in each would take the compiler seconds. */
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

/* What an item is: the queries [first, first + n) of sequence s, for some KV heads. */
typedef struct {
    int64_t s, first, n, head, last_head;
} attention_place;

/* The keys that will be read next, and have not been fetched yet. The processor does not foresee
 * where the next page, head or sequence lies. */
typedef struct {
    int64_t item;
    attention_place place;
    int64_t t, stop, in_page; /* tokens: from t on, to the page's end */
    const char *key;
} fetch_stream;

/* One pass of some queries of a sequence over its keys, and its scratch. D is head_dim rounded up
 * to whole vectors of the dtype; what is behind head_dim is zero. */
typedef struct {
    const attention_args *a;
    int64_t s, head, rows, groups;
    int64_t position; /* of the first query */
    int64_t D;
    int64_t values;   /* bytes from a key to its value */
    float *q;         /* [rows, D] */
    float *acc;       /* [rows, D] */
    uint32_t *words;  /* [BLOCK / LANES, D or D / 2, LANES]: K transposed */
    float *scores;    /* [TILE_ROWS, BLOCK] */
    char *padded;     /* [2, BLOCK, D]: K and V, if head_dim is no whole number of vectors */
    const char *key[BLOCK]; /* where the keys of the block lie */
    float most[MAX_ROWS];
    vf sum[MAX_ROWS];
    fetch_stream *ahead; /* NULL: nothing is fetched */
} attention_pass;

INLINE int64_t elem_bytes(int is_bf16) { return is_bf16 ? 2 : 4; }

INLINE int64_t padded_head(int64_t head_dim, int is_bf16) {
    int64_t whole = VECTOR_BYTES / elem_bytes(is_bf16);
    return (head_dim + whole - 1) / whole * whole;
}

/* Keys of the block that a row may see: [from, to), empty if from >= to. */
INLINE void seen(const attention_pass *p, int64_t block, int64_t row, int64_t *from, int64_t *to) {
    int64_t end = p->position + row / p->groups + 1 - block;
    *from = p->a->window && end > p->a->window ? end - p->a->window : 0;
    *to = end < BLOCK ? end : BLOCK;
}

/* Find the keys [from, to) of the block, and stand in the last one for those up to `fill`. */
INLINE void find_keys(attention_pass *p, int64_t block, int64_t from, int64_t to, int64_t fill,
                      int is_bf16) {
    const attention_args *a = p->a;
    const int32_t *pages = a->block_tables + p->s * a->block_table_width;
    int64_t token = a->num_kv_heads * a->head_dim * elem_bytes(is_bf16);
    int64_t half = a->page_tokens * token;
    int64_t page = (block + from) / a->page_tokens, i = (block + from) % a->page_tokens;
    const char *kv = (const char *)a->kv + p->head * a->head_dim * elem_bytes(is_bf16);
    p->values = half;
    for (int64_t t = from; t < to; page++, i = 0) {
        const char *key = kv + pages[page] * 2 * half;
        for (; i < a->page_tokens && t < to; i++, t++) p->key[t] = key + i * token;
    }
    if (p->D != a->head_dim) {
        int64_t bytes = a->head_dim * elem_bytes(is_bf16), row = p->D * elem_bytes(is_bf16);
        for (int64_t t = from; t < to; t++) {
            char *to_key = p->padded + t * row, *to_value = to_key + BLOCK * row;
            memcpy(to_key, p->key[t], bytes);
            memcpy(to_value, p->key[t] + half, bytes);
            memset(to_key + bytes, 0, row - bytes);
            memset(to_value + bytes, 0, row - bytes);
            p->key[t] = to_key;
        }
        p->values = BLOCK * row;
    }
    for (int64_t t = to; t < fill; t++) p->key[t] = p->key[to - 1];
}

static int64_t queries_per_pass(const attention_args *a) {
    int64_t groups = a->num_heads / a->num_kv_heads;
    return groups > SHARED_ROWS ? 1 : SHARED_ROWS / groups;
}

/* The number of a sequence's first pass, so that every sequence has as many numbers as passes or
 * one more: which sequence a number belongs to is found by bisection, without a table. */
INLINE int64_t first_pass(const attention_args *a, int64_t s, int64_t per_pass) {
    return a->query_indptr[s] / per_pass + s;
}

static int64_t heads_per_item(const attention_args *a) {
    return a->S >= MANY_SEQUENCES ? a->num_kv_heads : 1;
}

/* Returns 0 for a number that no pass has, or that is none of an item. */
static int find_place(const attention_args *a, int64_t item, attention_place *p) {
    int64_t heads = heads_per_item(a), items_per_pass = a->num_kv_heads / heads;
    int64_t per_pass = queries_per_pass(a), pass = item / items_per_pass, behind = a->S;
    p->s = 0;
    while (behind - p->s > 1) {
        int64_t middle = (p->s + behind) / 2;
        if (first_pass(a, middle, per_pass) <= pass) p->s = middle;
        else behind = middle;
    }
    int64_t num_queries = a->query_indptr[p->s + 1] - a->query_indptr[p->s];
    p->first = (pass - first_pass(a, p->s, per_pass)) * per_pass;
    p->n = num_queries - p->first < per_pass ? num_queries - p->first : per_pass;
    p->head = item % items_per_pass * heads;
    p->last_head = p->head + heads - 1;
    return p->n > 0;
}

INLINE vu wordv(const void *p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* LANES words of LANES rows, transposed: out[i * LANES + r] is word i of row r. */
#if LANES == 16
INLINE void transpose(const char *const *rows, int64_t offset, uint32_t *out) {
    vu v[LANES], u[LANES];
    UNROLL for (int i = 0; i < LANES; i++) v[i] = wordv(rows[i] + offset);
    UNROLL for (int i = 0; i < LANES; i += 2) {
        u[i] = PICK(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        u[i + 1] = PICK(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    /* v[4 * r + i]: word i (and 4 + i, 8 + i, 12 + i) of rows 4 r to 4 r + 3 */
    UNROLL for (int i = 0; i < LANES; i += 4) {
        UNROLL for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = PICK(u[i + j], u[i + 2 + j],
                                0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            v[i + 2 * j + 1] = PICK(u[i + j], u[i + 2 + j],
                                    2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    }
    UNROLL for (int i = 0; i < 4; i++) {
        vu a = PICK(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        vu b = PICK(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        vu c = PICK(v[i + 8], v[i + 12], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        vu d = PICK(v[i + 8], v[i + 12],
                    4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        u[i] = PICK(a, c, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        u[8 + i] = PICK(a, c, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        u[4 + i] = PICK(b, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        u[12 + i] = PICK(b, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    memcpy(out, u, sizeof u);
}
#else
INLINE void transpose(const char *const *rows, int64_t offset, uint32_t *out) {
    vu v[LANES], u[LANES];
    UNROLL for (int i = 0; i < LANES; i++) v[i] = wordv(rows[i] + offset);
    /* Each round moves one bit of the row's number into the column's. */
    UNROLL for (int bit = 1; bit < LANES; bit *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            u[2 * i] = ZIP_LOW(v[i], v[i + LANES / 2]);
            u[2 * i + 1] = ZIP_HIGH(v[i], v[i + LANES / 2]);
        }
        UNROLL for (int i = 0; i < LANES; i++) v[i] = u[i];
    }
    memcpy(out, v, sizeof v);
}
#endif

INLINE void fetch(const char *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch(p + i);
}

static void begin_head(const attention_args *a, fetch_stream *f) {
    f->stop = a->context_lens[f->place.s];
    f->t = a->window && f->stop > a->window ? f->stop - a->window : 0;
    f->in_page = 0;
}

/* Have the keys of the next head begin, of this item or of the one this thread is likely to get
 * next. Returns 0 if there is none, or it is a prompt's, which is not bound by memory. */
static int next_head(const attention_args *a, fetch_stream *f) {
    if (f->place.head == f->place.last_head) {
        f->item += omp_get_num_threads();
        if (f->item >= attention_items(a) || !find_place(a, f->item, &f->place)) return 0;
        if (f->place.n != 1) return 0;
    } else {
        f->place.head++;
    }
    begin_head(a, f);
    return 1;
}

/* Fetch so many keys, and their values. */
NOINLINE void fetch_keys(const attention_args *a, fetch_stream *f, int64_t count) {
    int64_t bytes = a->head_dim * elem_bytes(a->is_bf16), token = a->num_kv_heads * bytes;
    int64_t half = a->page_tokens * token;
    while (count > 0) {
        if (f->t == f->stop && !next_head(a, f)) return;
        if (f->in_page == 0) {
            int64_t page = f->t / a->page_tokens, i = f->t % a->page_tokens;
            page = a->block_tables[f->place.s * a->block_table_width + page];
            f->key = (const char *)a->kv + page * 2 * half + i * token + f->place.head * bytes;
            f->in_page = a->page_tokens - i;
        }
        int64_t n = f->stop - f->t;
        if (n > f->in_page) n = f->in_page;
        if (n > count) n = count;
        for (int64_t i = 0; i < n; i++, f->key += token) {
            fetch(f->key, bytes);
            fetch(f->key + half, bytes);
        }
        f->t += n;
        f->in_page -= n;
        count -= n;
    }
}

INLINE void fetch_ahead(const attention_pass *p, int64_t count) {
    if (p->ahead != NULL) fetch_keys(p->a, p->ahead, count);
}

/* Transpose the keys [from, to), both multiples of LANES. */
INLINE void transpose_keys(attention_pass *p, int64_t from, int64_t to, int is_bf16) {
    int64_t bytes = p->D * elem_bytes(is_bf16);
    for (int64_t t = from; t < to; t += LANES) {
        uint32_t *out = p->words + t * (bytes / 4);
        fetch_ahead(p, FETCHED_BY_TRANSPOSE);
        for (int64_t at = 0; at < bytes; at += VECTOR_BYTES)
            transpose(p->key + t, at, out + at / 4 * LANES);
    }
}

INLINE vf as_float(vu words) {
    vf v;
    memcpy(&v, &words, sizeof v);
    return v;
}

INLINE vf even(vu words) { return as_float(words << 16); }
INLINE vf odd(vu words) { return as_float(words & 0xffff0000u); }

/* scores[r, t] = q[r] . k[t] for n rows and `vectors` x LANES keys: even elements and odd ones
 * summed apart, each in their order. */
INLINE void score_tile(const float *q, int64_t D, const uint32_t *words, float *scores, const int n,
                       const int vectors, const int is_bf16) {
    vf sums[TILE_ROWS][TILE_KEYS][2];
    const int64_t ld = is_bf16 ? D / 2 * LANES : D * LANES;
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int v = 0; v < vectors; v++) sums[r][v][0] = sums[r][v][1] = (vf){0};
    for (int64_t d = 0; d < D; d += 2) {
        vf k[TILE_KEYS][2];
        UNROLL for (int v = 0; v < vectors; v++) {
            if (is_bf16) {
                vu both = wordv(words + v * ld + d / 2 * LANES);
                k[v][0] = even(both);
                k[v][1] = odd(both);
            } else {
                k[v][0] = as_float(wordv(words + v * ld + d * LANES));
                k[v][1] = as_float(wordv(words + v * ld + (d + 1) * LANES));
            }
        }
        UNROLL for (int r = 0; r < n; r++)
            UNROLL for (int v = 0; v < vectors; v++) {
                sums[r][v][0] += q[r * D + d] * k[v][0];
                sums[r][v][1] += q[r * D + d + 1] * k[v][1];
            }
    }
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vf sum = sums[r][v][0] + sums[r][v][1];
            memcpy(scores + r * BLOCK + v * LANES, &sum, sizeof sum);
        }
}

INLINE vf larger(vf a, vf b) { /* b where a is NaN */
#if defined(__AVX512F__) && !defined(__clang__)
    return (vf)__builtin_ia32_maxps512_mask((vf)a, (vf)b, (vf){0}, -1, 4);
#else
    vi is = a > b;
    vi bits = (is & (vi)a) | (~is & (vi)b);
    return (vf)bits;
#endif
}

INLINE float largest(vf v) {
    float s[LANES];
    memcpy(s, &v, sizeof v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) s[i] = s[i] > s[i + width] ? s[i] : s[i + width];
    return s[0];
}

INLINE vf only(vf v, int64_t from, int64_t to) { /* -inf in other lanes */
    vi lane = {0};
    UNROLL for (int i = 0; i < LANES; i++) lane[i] = i;
    vi inside = (lane >= (int32_t)from) & (lane < (int32_t)to);
    vi bits = (inside & (vi)v) | (~inside & (vi)((vf){0} - INFINITY));
    return (vf)bits;
}

/* Turn the scores [from, to) of a row into weights, relative to the largest score so far. */
NOINLINE void weigh(attention_pass *p, int64_t row, float *scores, int64_t from, int64_t to) {
    int64_t first = from / LANES * LANES;
    vf most = (vf){0} - INFINITY;
    for (int64_t t = first; t < to; t += LANES) {
        vf v = loadv(scores, t, 0);
        if (t < from || t + LANES > to) {
            v = only(v, from - t, to - t);
            memcpy(scores + t, &v, sizeof v);
        }
        most = larger(v, most);
    }
    float block_most = largest(most);
    /* A NaN is in no maximum; its own weight is one. */
    float now = block_most > p->most[row] ? block_most : p->most[row];
    float *acc = p->acc + row * p->D;
    vf sum = {0};
    if (p->most[row] != -INFINITY) {
        vf faded = expv((vf){0} + (p->most[row] - now));
        sum = p->sum[row] * faded;
        for (int64_t d = 0; d < p->D; d += LANES) {
            vf v = loadv(acc, d, 0) * faded;
            memcpy(acc + d, &v, sizeof v);
        }
    }
    for (int64_t t = first; t < to; t += LANES) {
        vf e = expv(loadv(scores, t, 0) - now);
        memcpy(scores + t, &e, sizeof e);
        sum += e;
    }
    p->sum[row] = sum;
    p->most[row] = now;
}

/* acc[r, d] += sum over t of weights[r, t] * v[t, d], of n rows and `vectors` x LANES elements. */
INLINE void add_tile(const attention_pass *p, const float *weights, float *acc, int64_t at,
                     int64_t from, int64_t to, const int n, const int vectors, const int is_bf16) {
    vf sums[TILE_ROWS][TILE_VALUES];
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[r][v] = loadv(acc, r * p->D + at + v * LANES, 0);
    for (int64_t t = from; t < to; t++) {
        const char *value = p->key[t] + p->values + at * elem_bytes(is_bf16);
        vf x[TILE_VALUES];
        if (is_bf16) {
            UNROLL for (int v = 0; v < vectors; v += 2) {
                vu both = wordv(value + v * LANES * 2);
                x[v] = even(both);
                x[v + 1] = odd(both);
            }
        } else {
            UNROLL for (int v = 0; v < vectors; v++) x[v] = loadv(value, v * LANES, 0);
        }
        UNROLL for (int r = 0; r < n; r++)
            UNROLL for (int v = 0; v < vectors; v++) sums[r][v] += weights[r * BLOCK + t] * x[v];
    }
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            memcpy(acc + r * p->D + at + v * LANES, &sums[r][v], sizeof sums[r][v]);
}

INLINE void add_values(const attention_pass *p, const float *weights, float *acc, int64_t from,
                       int64_t to, const int n, const int is_bf16) {
    int64_t at = 0;
    if (from >= to) return;
    for (; at + TILE_VALUES * LANES <= p->D; at += TILE_VALUES * LANES)
        add_tile(p, weights, acc, at, from, to, n, TILE_VALUES, is_bf16);
    if (is_bf16) {
        for (; at < p->D; at += 2 * LANES) add_tile(p, weights, acc, at, from, to, n, 2, 1);
    } else {
        for (; at < p->D; at += LANES) add_tile(p, weights, acc, at, from, to, n, 1, 0);
    }
}

/* One row's keys [from, to). */
NOINLINE void add_row_values(const attention_pass *p, const float *weights, float *acc,
                             int64_t from, int64_t to) {
    if (p->a->is_bf16) add_values(p, weights, acc, from, to, 1, 1);
    else add_values(p, weights, acc, from, to, 1, 0);
}

/* The rows [row, row + n) over one block. */
INLINE void attend_tile(attention_pass *p, int64_t block, int64_t row, const int n,
                        const int is_bf16) {
    int64_t from[TILE_ROWS], to[TILE_ROWS];
    UNROLL for (int r = 0; r < n; r++) seen(p, block, row + r, &from[r], &to[r]);
    int64_t words = p->D * elem_bytes(is_bf16) / 4, t = from[0] / LANES * LANES;
    const float *q = p->q + row * p->D;
    for (; t + (TILE_KEYS - 1) * LANES < to[n - 1]; t += TILE_KEYS * LANES) {
        fetch_ahead(p, FETCHED_BY_SCORES);
        score_tile(q, p->D, p->words + t * words, p->scores + t, n, TILE_KEYS, is_bf16);
    }
    if (t < to[n - 1]) score_tile(q, p->D, p->words + t * words, p->scores + t, n, 1, is_bf16);
    for (int r = 0; r < n; r++)
        if (from[r] < to[r]) weigh(p, row + r, p->scores + r * BLOCK, from[r], to[r]);
    /* Keys that some rows see and others do not are added row by row: they may hold NaN. */
    float *acc = p->acc + row * p->D;
    int64_t shared_from = from[n - 1], shared_to = to[0] > shared_from ? to[0] : shared_from;
    for (int r = 0; r < n; r++) {
        int64_t end = to[r] < shared_from ? to[r] : shared_from;
        if (from[r] < end) add_row_values(p, p->scores + r * BLOCK, acc + r * p->D, from[r], end);
    }
    int64_t step = p->ahead != NULL ? LANES : BLOCK;
    for (int64_t begin = shared_from; begin < to[0]; begin += step) {
        int64_t end = begin + step < to[0] ? begin + step : to[0];
        fetch_ahead(p, FETCHED_BY_VALUES);
        add_values(p, p->scores, acc, begin, end, n, is_bf16);
    }
    for (int r = 0; r < n; r++) {
        int64_t begin = from[r] > shared_to ? from[r] : shared_to;
        if (begin < to[r]) add_row_values(p, p->scores + r * BLOCK, acc + r * p->D, begin, to[r]);
    }
}

INLINE void attend_block(attention_pass *p, int64_t block, const int is_bf16) {
    int64_t tiles = (p->rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t even_share = (p->rows + tiles - 1) / tiles;
    for (int64_t row = 0; row < p->rows; row += even_share) {
        int64_t left = p->rows - row;
        switch (left < even_share ? left : even_share) {
        case 1: attend_tile(p, block, row, 1, is_bf16); break;
        case 2: attend_tile(p, block, row, 2, is_bf16); break;
#if TILE_ROWS > 2
        case 3: attend_tile(p, block, row, 3, is_bf16); break;
        case 4: attend_tile(p, block, row, 4, is_bf16); break;
        case 5: attend_tile(p, block, row, 5, is_bf16); break;
        case 6: attend_tile(p, block, row, 6, is_bf16); break;
#endif
        }
    }
}

INLINE void read_queries(attention_pass *p, int64_t token) {
    const attention_args *a = p->a;
    for (int64_t r = 0; r < p->rows; r++) {
        const float *from = a->query + (token + r / p->groups) * a->query_stride +
                            (p->head * p->groups + r % p->groups) * a->head_dim;
        float *to = p->q + r * p->D;
        for (int64_t d = 0; d < a->head_dim; d++) to[d] = from[d] * a->scale;
        for (int64_t d = a->head_dim; d < p->D; d++) to[d] = 0.0f;
    }
}

/* Rounded to nearest even, as storev does, as the upper halves of words. */
INLINE vu rounded(vf v) {
    vu bits, is_nan = (vu)(v != v);
    memcpy(&bits, &v, sizeof bits);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return (bits & ~is_nan) | (0x7fc00000u & is_nan);
}

INLINE void write_row(attention_pass *p, int64_t row, int64_t token, int is_bf16) {
    const attention_args *a = p->a;
    int64_t bytes = a->head_dim * elem_bytes(is_bf16), step = is_bf16 ? 2 * LANES : LANES;
    int64_t head = p->head * p->groups + row % p->groups;
    char *to = (char *)a->out + ((token + row / p->groups) * a->num_heads + head) * bytes;
    const float *acc = p->acc + row * p->D;
    float total = sumv(p->sum[row]);
    for (int64_t d = 0; d < p->D; d += step, to += VECTOR_BYTES, bytes -= VECTOR_BYTES) {
        vf v = loadv(acc, d, 0) / total;
        vu bits;
        if (is_bf16)
            bits = rounded(v) >> 16 | (rounded(loadv(acc, d + LANES, 0) / total) & 0xffff0000u);
        else
            memcpy(&bits, &v, sizeof bits);
        memcpy(to, &bits, bytes < VECTOR_BYTES ? bytes : VECTOR_BYTES);
    }
}

/* The queries [first, first + n) of a sequence for one KV head. */
INLINE void attend(attention_pass *p, int64_t first, int64_t n, const int is_bf16) {
    const attention_args *a = p->a;
    int64_t token = a->query_indptr[p->s] + first;
    int64_t num_queries = a->query_indptr[p->s + 1] - a->query_indptr[p->s];
    p->rows = n * p->groups;
    p->position = a->context_lens[p->s] - num_queries + first;
    int64_t stop = p->position + n;
    int64_t start = a->window && p->position >= a->window ? p->position + 1 - a->window : 0;
    read_queries(p, token);
    memset(p->acc, 0, sizeof(float) * p->rows * p->D);
    for (int64_t r = 0; r < p->rows; r++) p->most[r] = -INFINITY;
    for (int64_t block = start / BLOCK * BLOCK; block < stop; block += BLOCK) {
        int64_t from = start > block ? (start - block) / LANES * LANES : 0;
        int64_t to = stop - block < BLOCK ? stop - block : BLOCK;
        int64_t fill = (to + LANES - 1) / LANES * LANES;
        find_keys(p, block, from, to, fill, is_bf16);
        transpose_keys(p, from, fill, is_bf16);
        attend_block(p, block, is_bf16);
    }
    for (int64_t r = 0; r < p->rows; r++) write_row(p, r, token, is_bf16);
}

int64_t attention_items(const attention_args *a) {
    return first_pass(a, a->S, queries_per_pass(a)) * (a->num_kv_heads / heads_per_item(a));
}

static int64_t pass_rows(const attention_args *a) {
    return queries_per_pass(a) * (a->num_heads / a->num_kv_heads);
}

int64_t attention_scratch_bytes(const attention_args *a) {
    int64_t D = padded_head(a->head_dim, a->is_bf16), row = D * elem_bytes(a->is_bf16);
    int64_t floats = 2 * pass_rows(a) * D + TILE_ROWS * BLOCK;
    return floats * (int64_t)sizeof(float) + BLOCK * row * (D == a->head_dim ? 1 : 3);
}

void attention_item(const void *args, int64_t item, void *scratch) {
    const attention_args *a = args;
    fetch_stream ahead = {.item = item};
    if (!find_place(a, item, &ahead.place)) return;
    const attention_place place = ahead.place;
    int64_t rows = pass_rows(a);
    attention_pass p;
    p.a = a;
    p.s = place.s;
    p.groups = a->num_heads / a->num_kv_heads;
    p.D = padded_head(a->head_dim, a->is_bf16);
    p.q = scratch;
    p.acc = p.q + rows * p.D;
    p.scores = p.acc + rows * p.D;
    p.words = (uint32_t *)(p.scores + TILE_ROWS * BLOCK);
    p.padded = (char *)(p.words + BLOCK * p.D * elem_bytes(a->is_bf16) / 4);
    p.ahead = NULL;
    if (place.n == 1) {
        p.ahead = &ahead;
        begin_head(a, &ahead);
        fetch_ahead(&p, FETCHED_FIRST);
    }
    for (p.head = place.head; p.head <= place.last_head; p.head++) {
        if (a->is_bf16) attend(&p, place.first, place.n, 1);
        else attend(&p, place.first, place.n, 0);
    }
}

int loraplex_attention(const attention_args *a) {
    return run_alone(attention_item, a, attention_items(a), attention_scratch_bytes(a));
}

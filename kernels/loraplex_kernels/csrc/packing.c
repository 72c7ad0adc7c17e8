/* An adapter's matrices, laid out as pages in host memory: what `loraplex_memory.packing` does with
 * torch, in one call that needs no interpreter, and with the same bits.
 *
 * One thread: it runs beside the steps, which want all cores.
 */
#include <stdint.h>
#include <string.h>

#include "vectors.h"

#define TILE 256 /* columns of B^T that are made at a time: LANES rows of them stay in the cache */

enum { FLOAT32, BFLOAT16, FLOAT16 };

INLINE int64_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

/* A copy of constant size is one instruction, any other a call. */
INLINE void copy(void *to, const void *from, int64_t n, int64_t size) {
    if (n == LANES) memcpy(to, from, LANES * size);
    else memcpy(to, from, n * size);
}

/* n <= LANES elements as float32, the rest 0. */
INLINE vf load(const void *p, int64_t i, int64_t n, int type) {
    if (type == FLOAT32) {
        vf v = {0};
        copy(&v, (const float *)p + i, n, sizeof(float));
        return v;
    }
    vh h = {0};
    copy(&h, (const uint16_t *)p + i, n, sizeof(uint16_t));
    vu wide = __builtin_convertvector(h, vu), bits;
    vf v;
    if (type == BFLOAT16) {
        bits = wide << 16;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
    bits = (wide & 0x7fff) << 13;
    memcpy(&v, &bits, sizeof v);
    v *= 0x1p112f; /* the exponents' biases differ by 112; exact, and right for subnormals */
    memcpy(&bits, &v, sizeof v);
    bits |= (vu)((wide & 0x7c00) == 0x7c00) & 0x7f800000; /* infinities and NaN */
    bits |= (wide & 0x8000) << 16;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Rounds to nearest even, as torch does; NaN stays NaN. */
INLINE void store(void *p, int64_t i, int64_t n, vf v, int is_bf16) {
    if (!is_bf16) {
        copy((float *)p + i, &v, n, sizeof(float));
        return;
    }
    vu bits, is_nan = (vu)(v != v);
    memcpy(&bits, &v, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = (bits & ~is_nan) | (is_nan & 0x7fc0);
    vh h = __builtin_convertvector(bits, vh);
    copy((uint16_t *)p + i, &h, n, sizeof(uint16_t));
}

/* LANES x LANES: each round moves one bit of the row's number into the column's. */
INLINE void transpose(vf *v) {
    for (int bit = 1; bit < LANES; bit *= 2) {
        vf w[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            w[2 * i] = ZIP_LOW(v[i], v[i + LANES / 2]);
            w[2 * i + 1] = ZIP_HIGH(v[i], v[i + LANES / 2]);
        }
        memcpy(v, w, sizeof w);
    }
}

/* Of each matrix, the part that one device has: where it begins in `data`, and where in the layer's
 * row; what is behind its rows and columns there is 0. */
typedef struct {
    int64_t layer, rank;
    int64_t a_type, a_byte, a_start;
    int64_t in;                  /* columns of A as it lies in `data` */
    int64_t a_rows, a_columns;   /* of the part */
    int64_t a_height, a_width;   /* of the room for it */
    int64_t b_type, b_byte, b_start;
    int64_t b_rows, b_width;     /* B [b_rows, rank], becomes [rank, b_width] */
} module;

typedef struct {
    const char *data;
    const module *modules;
    const float *scales;  /* of B, by module */
    const int64_t *ends;  /* by layer: elements that the modules cover, from the row's start */
    char *slab;           /* [N, num_layers, page_elems] */
    const int64_t *pages; /* the row of a layer is cut into these pages of the slab */
    int64_t num_modules, num_layers, num_pages, page_elems;
    int32_t is_bf16;
} pack_args;

/* Where element `at` of a layer's row lies; `room` becomes the elements from there to its page's end. */
INLINE char *place(const pack_args *p, int64_t layer, int64_t at, int64_t *room) {
    int64_t page = at / p->page_elems, within = at % p->page_elems;
    *room = p->page_elems - within;
    int64_t row = p->pages[page] * p->num_layers + layer;
    return p->slab + (row * p->page_elems + within) * (p->is_bf16 ? 2 : 4);
}

INLINE void put_row(const pack_args *p, int64_t layer, int64_t at, const char *from, int64_t n,
                    int type, int is_bf16) {
    while (n > 0) {
        int64_t room;
        char *to = place(p, layer, at, &room);
        if (room > n) room = n;
        if (type == (is_bf16 ? BFLOAT16 : FLOAT32)) {
            memcpy(to, from, room * size_of(type));
        } else {
            int64_t i = 0;
            for (; i + LANES <= room; i += LANES) store(to, i, LANES, load(from, i, LANES, type), is_bf16);
            if (i < room) store(to, i, room - i, load(from, i, room - i, type), is_bf16);
        }
        at += room;
        from += room * size_of(type);
        n -= room;
    }
}

INLINE void put_zeros(const pack_args *p, int64_t layer, int64_t at, int64_t n) {
    while (n > 0) {
        int64_t room;
        char *to = place(p, layer, at, &room);
        if (room > n) room = n;
        memset(to, 0, room * (p->is_bf16 ? 2 : 4));
        at += room;
        n -= room;
    }
}

INLINE void put_part(const pack_args *p, const module *m, int type, int is_bf16) {
    const char *a = p->data + m->a_byte;
    int64_t at = m->a_start, end = at + m->a_height * m->a_width, padding = m->a_width - m->a_columns;
    if (m->a_columns == m->in && !padding) { /* rows follow one another, here and there */
        put_row(p, m->layer, at, a, m->a_rows * m->in, type, is_bf16);
        at += m->a_rows * m->in;
    } else {
        for (int64_t r = 0; r < m->a_rows; r++, at += m->a_width) {
            put_row(p, m->layer, at, a + r * m->in * size_of(type), m->a_columns, type, is_bf16);
            put_zeros(p, m->layer, at + m->a_columns, padding);
        }
    }
    put_zeros(p, m->layer, at, end - at);
}

INLINE void put_transposed(const pack_args *p, const module *m, float scale, int type, int is_bf16) {
    const char *b = p->data + m->b_byte;
    char tile[LANES][TILE * sizeof(float)];
    for (int64_t r0 = 0; r0 < m->rank; r0 += LANES) {
        int64_t num_rows = m->rank - r0 < LANES ? m->rank - r0 : LANES;
        for (int64_t c0 = 0; c0 < m->b_width; c0 += TILE) {
            int64_t width = m->b_width - c0 < TILE ? m->b_width - c0 : TILE;
            for (int64_t c = 0; c < width; c += LANES) {
                vf v[LANES];
                for (int64_t i = 0; i < LANES; i++) {
                    int64_t row = c0 + c + i, at = row * m->rank + r0;
                    /* Lanes of the next row are not written; only the last rows have none. */
                    int64_t n = at + LANES <= m->rank * m->b_rows ? LANES : num_rows;
                    /* Padding is scaled as torch does it: 0 may become -0. */
                    v[i] = (row < m->b_rows ? load(b, at, n, type) : (vf){0}) * scale;
                }
                transpose(v);
                for (int64_t r = 0; r < LANES; r++) store(tile[r], c, LANES, v[r], is_bf16);
            }
            for (int64_t r = 0; r < num_rows; r++)
                put_row(p, m->layer, m->b_start + (r0 + r) * m->b_width + c0, tile[r], width,
                        is_bf16 ? BFLOAT16 : FLOAT32, is_bf16);
        }
    }
}

INLINE void put_module(const pack_args *p, const module *m, float scale, int is_bf16) {
    if (m->a_type == FLOAT32) put_part(p, m, FLOAT32, is_bf16);
    else if (m->a_type == BFLOAT16) put_part(p, m, BFLOAT16, is_bf16);
    else put_part(p, m, FLOAT16, is_bf16);
    if (m->b_type == FLOAT32) put_transposed(p, m, scale, FLOAT32, is_bf16);
    else if (m->b_type == BFLOAT16) put_transposed(p, m, scale, BFLOAT16, is_bf16);
    else put_transposed(p, m, scale, FLOAT16, is_bf16);
}

void loraplex_pack(const pack_args *p) {
    for (int64_t i = 0; i < p->num_modules; i++) {
        if (p->is_bf16) put_module(p, &p->modules[i], p->scales[i], 1);
        else put_module(p, &p->modules[i], p->scales[i], 0);
    }
    /* Whatever was there before may not reach the pool. */
    for (int64_t layer = 0; layer < p->num_layers; layer++)
        put_zeros(p, layer, p->ends[layer], p->num_pages * p->page_elems - p->ends[layer]);
}

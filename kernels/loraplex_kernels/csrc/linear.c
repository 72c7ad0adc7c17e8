/* Linear layers over packed weights. An output is one sum over the inputs in their order, whatever
 * the number of rows: a row's result is bit-identical in any batch. */
#include "linear.h"

#include <float.h>
#include <math.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "elements.h"
#include "team.h"

#define VECTORS (PANEL / LANES)
#define BLOCK_ROWS 256 /* rows whose inputs stay in the second-level cache beside a panel */
#define GROUPS 16      /* about as many items as a product of few rows is cut into */

#if defined(__AVX512F__)
#define TILE 8 /* rows whose sums fit into the registers: TILE x VECTORS vectors */
#else
#define TILE 2
#endif

/* What a panel's elements are. */
typedef enum {
    PLAIN,   /* of the type of x */
    NARROW,  /* int8, as it is kept */
    WIDENING, /* the same, and its values are to be left in `wide`, of the type of x */
    WIDENED, /* those values: what comes of them is the same to the last bit */
} panel_kind;

#define IS_INT8(kind) ((kind) == NARROW || (kind) == WIDENING)

/* Sixteen weights as float32; of int8 exact. */
INLINE vf weights16(const void *w, int64_t i, int is_int8) {
    if (!is_int8) return load16(w, i, 0);
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128((const __m128i *)((const int8_t *)w + i));
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
    vb bytes;
    memcpy(&bytes, (const int8_t *)w + i, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
}

/* Sums of n rows over the inputs [k, stop) of a panel. */
INLINE void panel_f32(const void *w, float *wide, const float *x, int64_t K, int64_t k,
                      int64_t stop, int n, panel_kind kind, vf acc[TILE][VECTORS]) {
    for (; k < stop; k++) {
        vf wv[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            int64_t i = k * PANEL + v * LANES;
            wv[v] = weights16(w, i, IS_INT8(kind));
            if (kind == WIDENING) memcpy(wide + i, &wv[v], sizeof wv[v]);
        }
        for (int r = 0; r < n; r++)
            for (int v = 0; v < VECTORS; v++) acc[r][v] += x[r * K + k] * wv[v];
    }
}

#if defined(__AVX512BF16__)
/* Sixteen pairs of weights; of int8 exact, as bfloat16 has eight significant bits. */
INLINE __m512bh pairs16(const void *w, int64_t i, int is_int8) {
    if (!is_int8) return (__m512bh)_mm512_loadu_si512((const uint16_t *)w + i);
    return _mm512_cvtne2ps_pbh((__m512)weights16(w, i + LANES, 1), (__m512)weights16(w, i, 1));
}

/* Two inputs per instruction; their products are added one after the other. */
INLINE void panel_bf16(const void *w, uint16_t *wide, const uint16_t *x, int64_t K, int64_t k,
                       int64_t stop, int n, panel_kind kind, vf acc[TILE][VECTORS]) {
    for (; k < stop; k += 2) {
        __m512bh wv[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            int64_t i = k * PANEL + v * 2 * LANES;
            wv[v] = pairs16(w, i, IS_INT8(kind));
            if (kind == WIDENING) _mm512_storeu_si512(wide + i, (__m512i)wv[v]);
        }
        for (int r = 0; r < n; r++) {
            int32_t pair;
            memcpy(&pair, x + r * K + k, sizeof pair);
            __m512bh xv = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < VECTORS; v++)
                acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], wv[v], xv);
        }
    }
}
#else
INLINE void panel_bf16(const void *w, uint16_t *wide, const uint16_t *x, int64_t K, int64_t k,
                       int64_t stop, int n, panel_kind kind, vf acc[TILE][VECTORS]) {
    for (; k < stop; k += 2) {
        vf even[VECTORS], odd[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            int64_t i = k * PANEL + v * 2 * LANES;
            vu pairs, low, high;
            if (IS_INT8(kind)) {
                vf parts[2] = {weights16(w, i, 1), weights16(w, i + LANES, 1)};
                uint16_t bits[2 * LANES];
                for (int j = 0; j < 2; j++) store16(bits, j * LANES, parts[j], 1);
                memcpy(&pairs, bits, sizeof pairs);
                if (kind == WIDENING) memcpy(wide + i, bits, sizeof bits);
            } else {
                memcpy(&pairs, (const uint16_t *)w + i, sizeof pairs);
            }
            low = pairs << 16, high = pairs & 0xffff0000u;
            memcpy(&even[v], &low, sizeof low);
            memcpy(&odd[v], &high, sizeof high);
        }
        for (int r = 0; r < n; r++)
            for (int v = 0; v < VECTORS; v++) {
                acc[r][v] += load1(x, r * K + k, 1) * even[v];
                acc[r][v] += load1(x, r * K + k + 1, 1) * odd[v];
            }
    }
}
#endif

INLINE void panel_sums(const linear *l, const void *w, void *wide, const void *x, int64_t k,
                       int64_t stop, int n, int is_bf16, panel_kind kind, vf acc[TILE][VECTORS]) {
    for (int r = 0; r < n; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = (vf){0};
    if (is_bf16) panel_bf16(w, wide, x, l->K, k, stop, n, kind, acc);
    else panel_f32(w, wide, x, l->K, k, stop, n, kind, acc);
}

static int64_t num_groups(int64_t K) { return (K + GROUP - 1) / GROUP; }

/* Where the work on a panel takes place. */
typedef struct {
    const linear *layer;
    const void *elements;
    void *wide;
    int64_t index, T; /* which panel; rows */
    const char *x;
    float *y;
} panel_work;

/* The first n rows. */
INLINE void tile(const panel_work *p, int n, int is_bf16, panel_kind kind) {
    const linear *l = p->layer;
    vf acc[TILE][VECTORS], sums[TILE][VECTORS];
    if (kind == PLAIN) {
        panel_sums(l, p->elements, NULL, p->x, 0, l->K, n, is_bf16, kind, sums);
    } else {
        const float *scale = l->scale + p->index * num_groups(l->K) * PANEL;
        for (int r = 0; r < n; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] = (vf){0};
        for (int64_t k = 0; k < l->K; k += GROUP, scale += PANEL) {
            int64_t stop = k + GROUP < l->K ? k + GROUP : l->K;
            panel_sums(l, p->elements, p->wide, p->x, k, stop, n, is_bf16, kind, acc);
            for (int v = 0; v < VECTORS; v++) {
                vf s = load16(scale, v * LANES, 0);
                for (int r = 0; r < n; r++) sums[r][v] += acc[r][v] * s;
            }
        }
    }
    int64_t column = p->index * PANEL, width = l->N - column;
    for (int r = 0; r < n; r++) {
        if (l->bias)
            for (int v = 0; v < VECTORS; v++) sums[r][v] += load16(l->bias, column + v * LANES, 0);
        float *to = p->y + r * l->N + column;
        if (width >= PANEL) memcpy(to, sums[r], sizeof sums[r]);
        else memcpy(to, sums[r], (size_t)width * sizeof *to);
    }
}

INLINE void tile_done(panel_work *p, int n, int is_bf16) {
    p->T -= n;
    p->x += n * p->layer->K * (is_bf16 ? 2 : 4);
    p->y += n * p->layer->N;
}

/* Constant n lets the compiler keep all sums in registers. */
INLINE void all_tiles(panel_work *p, int is_bf16, panel_kind kind) {
    for (; p->T >= TILE; tile_done(p, TILE, is_bf16)) tile(p, TILE, is_bf16, kind);
    switch (p->T) {
#if TILE == 8
    case 7: tile(p, 7, is_bf16, kind); break;
    case 6: tile(p, 6, is_bf16, kind); break;
    case 5: tile(p, 5, is_bf16, kind); break;
    case 4: tile(p, 4, is_bf16, kind); break;
    case 3: tile(p, 3, is_bf16, kind); break;
    case 2: tile(p, 2, is_bf16, kind); break;
#endif
    case 1: tile(p, 1, is_bf16, kind); break;
    }
}

/* All rows. Of an int8 panel, the first of several tiles leaves its values behind for the others:
 * to convert them for each would take longer than to read them from the cache. */
INLINE void multiply_panel(panel_work *p, int is_bf16) {
    if (!p->layer->scale) {
        all_tiles(p, is_bf16, PLAIN);
    } else if (p->T <= TILE) {
        all_tiles(p, is_bf16, NARROW);
    } else {
        tile(p, TILE, is_bf16, WIDENING);
        tile_done(p, TILE, is_bf16);
        p->elements = p->wide;
        all_tiles(p, is_bf16, WIDENED);
    }
}

static int64_t num_panels(int64_t N) { return (N + PANEL - 1) / PANEL; }

/* Few rows take little time per panel, and neighbouring panels are read as one stream. */
static int64_t panels_per_item(const linear_args *a) {
    int64_t most = num_panels(a->layer->N) / GROUPS, fit = 64 / (a->T + 1);
    int64_t n = most < fit ? most : fit;
    return n > 1 ? n : 1;
}

static int64_t items_per_block(const linear_args *a) {
    int64_t each = panels_per_item(a);
    return (num_panels(a->layer->N) + each - 1) / each;
}

int64_t linear_items(const linear_args *a) {
    return items_per_block(a) * ((a->T + BLOCK_ROWS - 1) / BLOCK_ROWS);
}

int64_t linear_scratch_bytes(const linear_args *a) {
    const linear *l = a->layer;
    return l->scale && a->T > TILE ? l->K * PANEL * (l->is_bf16 ? 2 : 4) : 0;
}

void linear_item(const void *args, int64_t item, void *scratch) {
    const linear_args *a = args;
    const linear *l = a->layer;
    int64_t x_size = l->is_bf16 ? 2 : 4, size = l->scale ? 1 : x_size;
    int64_t each = panels_per_item(a), per_block = items_per_block(a);
    int64_t first_row = item / per_block * BLOCK_ROWS, rows = a->T - first_row;
    if (rows > BLOCK_ROWS) rows = BLOCK_ROWS;
    int64_t p = item % per_block * each, stop = p + each, all = num_panels(l->N);
    if (stop > all) stop = all;
    for (; p < stop; p++) {
        panel_work work = {
            .layer = l,
            .elements = (const char *)l->weight + p * l->K * PANEL * size,
            .wide = scratch,
            .index = p,
            .T = rows,
            .x = (const char *)a->x + first_row * l->K * x_size,
            .y = a->y + first_row * l->N,
        };
        if (l->is_bf16) multiply_panel(&work, 1);
        else multiply_panel(&work, 0);
    }
}

int loraplex_linear(const linear_args *a) {
    return run_alone(linear_item, a, linear_items(a), linear_scratch_bytes(a));
}

/* ---- packing ------------------------------------------------------------------------------- */

/* Where input k of a panel's output i lies. */
static int64_t place_in_panel(int64_t k, int64_t i, int is_bf16) {
    return is_bf16 ? (k & ~(int64_t)1) * PANEL + 2 * i + (k & 1) : k * PANEL + i;
}

/* Symmetric: the largest weight of a group becomes 127. Where one is not finite the scale is not
 * either, and so is whatever comes of it. */
static void quantize_group(const pack_linear_args *a, int64_t output, int64_t k, float *scale,
                           int8_t *panel) {
    int64_t stop = k + GROUP < a->K ? k + GROUP : a->K;
    const void *row = at(a->dense, output * a->K, a->is_bf16);
    float largest = 0.0f;
    for (int64_t j = k; j < stop; j++) {
        float size = fabsf(load1(row, j, a->is_bf16));
        if (size > largest || size != size) largest = size;
    }
    int has_steps = largest > 0.0f && largest <= FLT_MAX;
    *scale = largest / 127.0f;
    for (; k < stop; k++) {
        float steps = has_steps ? load1(row, k, a->is_bf16) / largest * 127.0f : 0.0f;
        panel[place_in_panel(k, output % PANEL, a->is_bf16)] = (int8_t)rintf(steps);
    }
}

static void quantize_panel(const pack_linear_args *a, int64_t p, int64_t width) {
    int8_t *panel = (int8_t *)a->packed + p * a->K * PANEL;
    float *scale = a->scale + p * num_groups(a->K) * PANEL;
    memset(panel, 0, (size_t)(a->K * PANEL));
    memset(scale, 0, (size_t)(num_groups(a->K) * PANEL) * sizeof *scale);
    for (int64_t i = 0; i < width; i++)
        for (int64_t g = 0; g < num_groups(a->K); g++)
            quantize_group(a, p * PANEL + i, g * GROUP, &scale[g * PANEL + i], panel);
}

static void pack_panel(const void *args, int64_t p, void *scratch) {
    const pack_linear_args *a = args;
    (void)scratch;
    int64_t first = p * PANEL, width = a->N - first < PANEL ? a->N - first : PANEL;
    if (a->scale) {
        quantize_panel(a, p, width);
    } else if (a->is_bf16) {
        const uint16_t *from = (const uint16_t *)a->dense + first * a->K;
        uint16_t *to = (uint16_t *)a->packed + first * a->K;
        for (int64_t k = 0; k < a->K; k++)
            for (int64_t i = 0; i < PANEL; i++)
                to[place_in_panel(k, i, 1)] = i < width ? from[i * a->K + k] : 0;
    } else {
        const float *from = (const float *)a->dense + first * a->K;
        float *to = (float *)a->packed + first * a->K;
        for (int64_t k = 0; k < a->K; k++)
            for (int64_t i = 0; i < PANEL; i++)
                to[place_in_panel(k, i, 0)] = i < width ? from[i * a->K + k] : 0.0f;
    }
}

int loraplex_pack_linear(const pack_linear_args *a) {
    return run_alone(pack_panel, a, num_panels(a->N), 0);
}

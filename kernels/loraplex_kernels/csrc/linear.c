/* Linear layers over packed weights. An output is one sum over the inputs in their order, whatever
 * the number of rows: a row's result is bit-identical in any batch. */
#include "linear.h"

#include <string.h>

#if defined(__AVX512BF16__)
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

/* Sums of n rows over a whole panel. */
INLINE void panel_f32(const float *w, const float *x, int64_t K, int n, vf acc[TILE][VECTORS]) {
    for (int64_t k = 0; k < K; k++) {
        vf wv[VECTORS];
        for (int v = 0; v < VECTORS; v++) wv[v] = load16(w, k * PANEL + v * LANES, 0);
        for (int r = 0; r < n; r++)
            for (int v = 0; v < VECTORS; v++) acc[r][v] += x[r * K + k] * wv[v];
    }
}

#if defined(__AVX512BF16__)
/* Two inputs per instruction; their products are added one after the other. */
INLINE void panel_bf16(const uint16_t *w, const uint16_t *x, int64_t K, int n,
                       vf acc[TILE][VECTORS]) {
    for (int64_t k = 0; k < K; k += 2) {
        __m512bh wv[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            wv[v] = (__m512bh)_mm512_loadu_si512(w + k * PANEL + v * 2 * LANES);
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
INLINE void panel_bf16(const uint16_t *w, const uint16_t *x, int64_t K, int n,
                       vf acc[TILE][VECTORS]) {
    for (int64_t k = 0; k < K; k += 2) {
        vf even[VECTORS], odd[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            vu pairs, low, high;
            memcpy(&pairs, w + k * PANEL + v * 2 * LANES, sizeof pairs);
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

/* Outputs [column, column + width) of n rows. */
INLINE void tile(const linear *l, const void *panel, const void *x, float *y, int64_t column,
                 int64_t width, int n, int is_bf16) {
    vf acc[TILE][VECTORS];
    for (int r = 0; r < n; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = (vf){0};
    if (is_bf16) panel_bf16(panel, x, l->K, n, acc);
    else panel_f32(panel, x, l->K, n, acc);
    const float *bias = l->bias ? l->bias + column : NULL;
    for (int r = 0; r < n; r++) {
        float *to = y + r * l->N + column;
        if (width == PANEL) {
            for (int v = 0; v < VECTORS; v++) {
                vf sum = acc[r][v];
                if (bias) sum += load16(bias, v * LANES, 0);
                memcpy(to + v * LANES, &sum, sizeof sum);
            }
        } else {
            float sums[PANEL];
            memcpy(sums, acc[r], sizeof sums);
            for (int64_t i = 0; i < width; i++) to[i] = sums[i] + (bias ? bias[i] : 0.0f);
        }
    }
}

/* Constant n lets the compiler keep all sums in registers. */
INLINE void rows_of_panel(const linear *l, const void *panel, const char *x, float *y, int64_t T,
                          int64_t column, int64_t width, int is_bf16) {
    int64_t row_bytes = l->K * (is_bf16 ? 2 : 4);
    for (; T >= TILE; T -= TILE, x += TILE * row_bytes, y += TILE * l->N)
        tile(l, panel, x, y, column, width, TILE, is_bf16);
    switch (T) {
#if TILE == 8
    case 7: tile(l, panel, x, y, column, width, 7, is_bf16); break;
    case 6: tile(l, panel, x, y, column, width, 6, is_bf16); break;
    case 5: tile(l, panel, x, y, column, width, 5, is_bf16); break;
    case 4: tile(l, panel, x, y, column, width, 4, is_bf16); break;
    case 3: tile(l, panel, x, y, column, width, 3, is_bf16); break;
    case 2: tile(l, panel, x, y, column, width, 2, is_bf16); break;
#endif
    case 1: tile(l, panel, x, y, column, width, 1, is_bf16); break;
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

void linear_item(const void *args, int64_t item, void *scratch) {
    const linear_args *a = args;
    const linear *l = a->layer;
    (void)scratch;
    int64_t size = l->is_bf16 ? 2 : 4, each = panels_per_item(a), per_block = items_per_block(a);
    int64_t first_row = item / per_block * BLOCK_ROWS, rows = a->T - first_row;
    if (rows > BLOCK_ROWS) rows = BLOCK_ROWS;
    int64_t p = item % per_block * each, stop = p + each, all = num_panels(l->N);
    if (stop > all) stop = all;
    const char *x = (const char *)a->x + first_row * l->K * size;
    float *y = a->y + first_row * l->N;
    for (; p < stop; p++) {
        const char *panel = (const char *)l->weight + p * l->K * PANEL * size;
        int64_t column = p * PANEL, width = l->N - column < PANEL ? l->N - column : PANEL;
        if (l->is_bf16) rows_of_panel(l, panel, x, y, rows, column, width, 1);
        else rows_of_panel(l, panel, x, y, rows, column, width, 0);
    }
}

int loraplex_linear(const linear_args *a) { return run_alone(linear_item, a, linear_items(a), 0); }

/* ---- packing ------------------------------------------------------------------------------- */

static void pack_panel(const void *args, int64_t p, void *scratch) {
    const pack_linear_args *a = args;
    (void)scratch;
    int64_t first = p * PANEL, width = a->N - first < PANEL ? a->N - first : PANEL;
    if (a->is_bf16) {
        const uint16_t *from = (const uint16_t *)a->dense + first * a->K;
        uint16_t *to = (uint16_t *)a->packed + first * a->K;
        for (int64_t k = 0; k < a->K; k += 2)
            for (int64_t i = 0; i < PANEL; i++)
                for (int64_t j = 0; j < 2; j++)
                    to[(k * PANEL) + 2 * i + j] = i < width ? from[i * a->K + k + j] : 0;
    } else {
        const float *from = (const float *)a->dense + first * a->K;
        float *to = (float *)a->packed + first * a->K;
        for (int64_t k = 0; k < a->K; k++)
            for (int64_t i = 0; i < PANEL; i++)
                to[k * PANEL + i] = i < width ? from[i * a->K + k] : 0.0f;
    }
}

int loraplex_pack_linear(const pack_linear_args *a) {
    return run_alone(pack_panel, a, num_panels(a->N), 0);
}

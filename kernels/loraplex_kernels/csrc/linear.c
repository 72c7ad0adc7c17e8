/* Linear layers over packed weights. An output is one sum over the inputs in their order, whatever
 * the number of rows: a row's result is bit-identical in any batch. */
#include "linear.h"

#include <float.h>
#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "elements.h"
#include "team.h"

/* Rows whose sums fit into the registers: TILE x VECTORS vectors. */
#if defined(__AVX512F__)
#define TILE 8
#elif defined(__AVX__) || defined(__aarch64__)
#define TILE 2
#else
#define TILE 1
#endif
#define VECTORS (PANEL / LANES)
#define BLOCK_ROWS 256 /* rows whose inputs stay in the second-level cache beside a panel */
#define GROUPS 16      /* about as many items as a product of few rows is cut into */

/* A vector of weights as float32; of int8 exact. */
INLINE vf weights(const void *w, int64_t i, int is_int8) {
    if (!is_int8) return loadv(w, i, 0);
    const int8_t *from = (const int8_t *)w + i;
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    vb bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
}

/* Inputs k and k + 1, of bfloat16 pairs that lie together, as float32. */
INLINE vf even(vu pairs) { return (vf)(pairs << 16); }
INLINE vf odd(vu pairs) { return (vf)(pairs & 0xffff0000u); }

INLINE vu pairs_of(const void *w, int64_t k, int v) {
    vu pairs;
    memcpy(&pairs, (const uint16_t *)w + k * PANEL + v * 2 * LANES, sizeof pairs);
    return pairs;
}

/* panel_f32 and panel_bf16 add up n rows over the inputs [k, stop) of a panel. */
#if defined(__AVX512F__)
INLINE void panel_f32(const void *w, const float *x, int64_t K, int64_t k, int64_t stop, int n,
                      int is_int8, vf acc[TILE][VECTORS]) {
    for (; k < stop; k++) {
        vf wv[VECTORS];
        for (int v = 0; v < VECTORS; v++) wv[v] = weights(w, k * PANEL + v * LANES, is_int8);
        for (int r = 0; r < n; r++)
            for (int v = 0; v < VECTORS; v++) acc[r][v] += x[r * K + k] * wv[v];
    }
}
#else
/* Few registers: weights are loaded right before they are needed. */
INLINE void panel_f32(const void *w, const float *x, int64_t K, int64_t k, int64_t stop, int n,
                      int is_int8, vf acc[TILE][VECTORS]) {
    for (; k < stop; k++)
        for (int v = 0; v < VECTORS; v++) {
            vf wv = weights(w, k * PANEL + v * LANES, is_int8);
            for (int r = 0; r < n; r++) acc[r][v] += x[r * K + k] * wv;
        }
}
#endif

#if defined(__AVX512BF16__)
/* Inputs k and k + 1 of sixteen outputs, as pairs. Of int8 exact, as bfloat16 has eight significant
 * bits: the upper halves of float32, put together (the instruction that rounds takes longer). */
INLINE __m512bh pairs16(const void *w, int64_t k, int v, int is_int8) {
    if (!is_int8) return (__m512bh)pairs_of(w, k, v);
    __m512i first = (__m512i)weights(w, k * PANEL + v * LANES, 1);
    __m512i second = (__m512i)weights(w, (k + 1) * PANEL + v * LANES, 1);
    return (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second);
}

/* Two inputs per instruction; their products are added one after the other. */
INLINE void panel_bf16(const void *w, const uint16_t *x, int64_t K, int64_t k, int64_t stop, int n,
                       int is_int8, vf acc[TILE][VECTORS]) {
    for (; k < stop; k += 2) {
        __m512bh wv[VECTORS];
        for (int v = 0; v < VECTORS; v++) wv[v] = pairs16(w, k, v, is_int8);
        for (int r = 0; r < n; r++) {
            int32_t pair;
            memcpy(&pair, x + r * K + k, sizeof pair);
            __m512bh xv = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < VECTORS; v++)
                acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], wv[v], xv);
        }
    }
}
#elif defined(__AVX512F__)
INLINE void panel_bf16(const void *w, const uint16_t *x, int64_t K, int64_t k, int64_t stop, int n,
                       int is_int8, vf acc[TILE][VECTORS]) {
    for (; k < stop; k += 2) {
        vf first[VECTORS], second[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            first[v] = is_int8 ? weights(w, k * PANEL + v * LANES, 1) : even(pairs_of(w, k, v));
            second[v] =
                is_int8 ? weights(w, (k + 1) * PANEL + v * LANES, 1) : odd(pairs_of(w, k, v));
        }
        for (int r = 0; r < n; r++)
            for (int v = 0; v < VECTORS; v++) {
                acc[r][v] += load1(x, r * K + k, 1) * first[v];
                acc[r][v] += load1(x, r * K + k + 1, 1) * second[v];
            }
    }
}
#else
INLINE void panel_bf16(const void *w, const uint16_t *x, int64_t K, int64_t k, int64_t stop, int n,
                       int is_int8, vf acc[TILE][VECTORS]) {
    for (; k < stop; k += 2)
        for (int half = 0; half < 2; half++)
            for (int v = 0; v < VECTORS; v++) {
                vf wv = is_int8 ? weights(w, (k + half) * PANEL + v * LANES, 1)
                        : half  ? odd(pairs_of(w, k, v))
                                : even(pairs_of(w, k, v));
                for (int r = 0; r < n; r++) acc[r][v] += load1(x, r * K + k + half, 1) * wv;
            }
}
#endif

INLINE void panel_sums(const void *w, const void *x, int64_t K, int64_t k, int64_t stop, int n,
                       int is_bf16, int is_int8, vf acc[TILE][VECTORS]) {
    for (int r = 0; r < n; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = (vf){0};
    if (is_bf16) panel_bf16(w, x, K, k, stop, n, is_int8, acc);
    else panel_f32(w, x, K, k, stop, n, is_int8, acc);
}

static int64_t num_groups(int64_t K) { return (K + GROUP - 1) / GROUP; }

/* The same of an int8 panel over all inputs, each group's sums scaled. */
INLINE void scaled_sums(const void *w, const float *scale, const void *x, int64_t K, int n,
                        int is_bf16, vf sums[TILE][VECTORS]) {
    vf acc[TILE][VECTORS];
    for (int r = 0; r < n; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = (vf){0};
    for (int64_t k = 0; k < K; k += GROUP, scale += PANEL) {
        panel_sums(w, x, K, k, k + GROUP < K ? k + GROUP : K, n, is_bf16, 1, acc);
        for (int v = 0; v < VECTORS; v++)
            for (int r = 0; r < n; r++) sums[r][v] += acc[r][v] * loadv(scale, v * LANES, 0);
    }
}

/* Outputs of panel p of n rows. An int8 panel is converted anew for each tile of rows: kept
 * converted for the next tiles it would be written and read back, which takes longer. */
INLINE void tile(const linear *l, int64_t p, const void *x, float *y, int n, int is_bf16,
                 int is_int8) {
    int64_t size = is_int8 ? 1 : is_bf16 ? 2 : 4, column = p * PANEL, width = l->N - column;
    const char *panel = (const char *)l->weight + column * l->K * size;
    vf sums[TILE][VECTORS];
    if (is_int8) scaled_sums(panel, l->scale + column * num_groups(l->K), x, l->K, n, is_bf16, sums);
    else panel_sums(panel, x, l->K, 0, l->K, n, is_bf16, 0, sums);
    for (int r = 0; r < n; r++) {
        if (l->bias)
            for (int v = 0; v < VECTORS; v++) sums[r][v] += loadv(l->bias, column + v * LANES, 0);
        float *to = y + r * l->N + column;
        if (width >= PANEL) memcpy(to, sums[r], sizeof sums[r]);
        else memcpy(to, sums[r], (size_t)width * sizeof *to);
    }
}

/* Constant n lets the compiler keep all sums in registers. */
INLINE void rows_of_panel(const linear *l, int64_t p, const char *x, float *y, int64_t T,
                          int is_bf16, int is_int8) {
    int64_t row_bytes = l->K * (is_bf16 ? 2 : 4);
    for (; T >= TILE; T -= TILE, x += TILE * row_bytes, y += TILE * l->N)
        tile(l, p, x, y, TILE, is_bf16, is_int8);
    switch (T) {
#if TILE == 8
    case 7: tile(l, p, x, y, 7, is_bf16, is_int8); break;
    case 6: tile(l, p, x, y, 6, is_bf16, is_int8); break;
    case 5: tile(l, p, x, y, 5, is_bf16, is_int8); break;
    case 4: tile(l, p, x, y, 4, is_bf16, is_int8); break;
    case 3: tile(l, p, x, y, 3, is_bf16, is_int8); break;
    case 2: tile(l, p, x, y, 2, is_bf16, is_int8); break;
#endif
    case 1: tile(l, p, x, y, 1, is_bf16, is_int8); break;
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
    int64_t each = panels_per_item(a), per_block = items_per_block(a);
    int64_t first_row = item / per_block * BLOCK_ROWS, rows = a->T - first_row;
    if (rows > BLOCK_ROWS) rows = BLOCK_ROWS;
    int64_t p = item % per_block * each, stop = p + each, all = num_panels(l->N);
    if (stop > all) stop = all;
    const char *x = (const char *)a->x + first_row * l->K * (l->is_bf16 ? 2 : 4);
    float *y = a->y + first_row * l->N;
    for (; p < stop; p++) {
        if (l->is_bf16 && l->scale) rows_of_panel(l, p, x, y, rows, 1, 1);
        else if (l->is_bf16) rows_of_panel(l, p, x, y, rows, 1, 0);
        else if (l->scale) rows_of_panel(l, p, x, y, rows, 0, 1);
        else rows_of_panel(l, p, x, y, rows, 0, 0);
    }
}

int loraplex_linear(const linear_args *a) {
    return run_alone(linear_item, a, linear_items(a), 0);
}

/* ---- packing ------------------------------------------------------------------------------- */

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
        panel[k * PANEL + output % PANEL] = (int8_t)rintf(steps);
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

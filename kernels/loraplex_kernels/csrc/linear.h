/* Linear layers over packed weights: items of one phase. */
#pragma once
#include <stdint.h>

#define PANEL 48 /* outputs whose weights lie together: three vectors */

/* `y = x W^T + bias`. The weight is cut into panels of PANEL outputs, the last one filled up with
 * zeros, and a panel lies input by input: float32 as [K][PANEL], bfloat16 as [K / 2][PANEL][2]. */
typedef struct {
    const void *weight;
    const float *bias; /* [N], or NULL */
    int64_t K, N;      /* inputs (even for bfloat16), outputs */
    int32_t is_bf16;
} linear;

/* One product. */
typedef struct {
    const linear *layer;
    const void *x; /* [T, K], of the dtype of the weight */
    float *y;      /* [T, N] */
    int64_t T;
} linear_args;

/* How many items there are, and one of them (an item_fn that needs no scratch). */
int64_t linear_items(const linear_args *a);
void linear_item(const void *args, int64_t item, void *scratch);

typedef struct {
    const void *dense; /* [N, K] */
    void *packed;      /* ceil(N / PANEL) panels */
    int64_t K, N;
    int32_t is_bf16;
} pack_linear_args;

/* All of it on a team of its own. Returns 0, or 1 when memory could not be had. */
int loraplex_linear(const linear_args *a);
int loraplex_pack_linear(const pack_linear_args *a);

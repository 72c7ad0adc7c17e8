/* Linear layers over packed weights: items of one phase. */
#pragma once
#include <stdint.h>

#define PANEL 48  /* outputs whose weights lie together: three vectors */
#define GROUP 128 /* inputs of an int8 weight that share a scale; the last ones may be fewer */

/* `y = x W^T + bias`. The weight is cut into panels of PANEL outputs, the last one filled up with
 * zeros, and a panel lies input by input: float32 as [K][PANEL], bfloat16 as [K / 2][PANEL][2], int8
 * as [K][PANEL]. It is of the type of x, or int8: then the sum over each group of inputs is
 * multiplied by the group's scale of that output. */
typedef struct {
    const void *weight;
    const float *scale; /* [panels][groups][PANEL], of an int8 weight; else NULL */
    const float *bias;  /* [panels][PANEL], or NULL */
    int64_t K, N;       /* inputs (even for bfloat16), outputs */
    int32_t is_bf16;    /* x */
} linear;

/* One product. */
typedef struct {
    const linear *layer;
    const void *x; /* [T, K] */
    float *y;      /* [T, N] */
    int64_t T;
} linear_args;

/* How many items there are, and one of them (an item_fn that needs no scratch). */
int64_t linear_items(const linear_args *a);
void linear_item(const void *args, int64_t item, void *scratch);

typedef struct {
    const void *dense; /* [N, K], of the type of x */
    void *packed;      /* ceil(N / PANEL) panels */
    float *scale;      /* [panels][groups][PANEL], written, to make it int8; or NULL */
    int64_t K, N;
    int32_t is_bf16;
} pack_linear_args;

/* All of it on a team of its own. Returns 0, or 1 when memory could not be had. */
int loraplex_linear(const linear_args *a);
int loraplex_pack_linear(const pack_linear_args *a);

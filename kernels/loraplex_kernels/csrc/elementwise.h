/* What lies between the products of a layer: norms, rotation, the gated product. Each works on one
 * row, so a row's result is bit-identical in any batch. Activations are float32; what a linear reads
 * is rounded to the dtype of its weight. */
#pragma once
#include <stdint.h>

/* out = x / rms(x) * weight, over n elements; `out` is of the dtype that linears read. */
void rms_norm_row(const float *x, const float *weight, float eps, int64_t n, void *out,
                  int is_bf16);

/* The same of one head, in place. */
void rms_norm_head(float *x, const float *weight, float eps, int64_t n);

/* Rotate the first rot_dim elements of a head in place: element i pairs with i + rot_dim / 2. The
 * first half of `sin` is negated, as in RopeTable. */
void rotate_head(float *x, const float *cos, const float *sin, int64_t rot_dim);

/* out = silu(gate) * up, over n elements. */
void silu_mul_row(const float *gate, const float *up, int64_t n, void *out, int is_bf16);

/* Copy n elements, rounded. */
void round_row(const float *x, int64_t n, void *out, int is_bf16);

#include "elementwise.h"

#include <math.h>

#include "elements.h"

/* n <= LANES elements, the others 0. */
INLINE vf load_part(const float *p, int64_t n) {
    vf v = {0};
    memcpy(&v, p, n * sizeof *p);
    return v;
}

INLINE void store_part(void *p, int64_t i, vf v, int64_t n, int is_bf16) {
    float f[LANES];
    memcpy(f, &v, sizeof f);
    for (int64_t j = 0; j < n; j++) store1(p, i + j, f[j], is_bf16);
}

INLINE float inverse_rms(const float *x, float eps, int64_t n) {
    vf sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = loadv(x, i, 0);
        sum += v * v;
    }
    if (i < n) {
        vf v = load_part(x + i, n - i);
        sum += v * v;
    }
    return 1.0f / sqrtf(sumv(sum) / (float)n + eps);
}

INLINE void normed(const float *x, const float *weight, float eps, int64_t n, void *out,
                   int is_bf16) {
    float factor = inverse_rms(x, eps, n);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        storev(out, i, loadv(x, i, 0) * factor * loadv(weight, i, 0), is_bf16);
    if (i < n) {
        vf v = load_part(x + i, n - i) * factor * load_part(weight + i, n - i);
        store_part(out, i, v, n - i, is_bf16);
    }
}

void rms_norm_row(const float *x, const float *weight, float eps, int64_t n, void *out,
                  int is_bf16) {
    if (is_bf16) normed(x, weight, eps, n, out, 1);
    else normed(x, weight, eps, n, out, 0);
}

void rms_norm_head(float *x, const float *weight, float eps, int64_t n) {
    normed(x, weight, eps, n, x, 0);
}

void rotate_head(float *x, const float *cos, const float *sin, int64_t rot_dim) {
    int64_t half = rot_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* silu(gate) * up with e^-|gate|, which cannot overflow. */
INLINE vf silu_mul(vf gate, vf up) {
    vi bits, is_positive = gate >= 0.0f, weight_bits, one_bits;
    vf one = (vf){0} + 1.0f, negative, weight;
    memcpy(&bits, &gate, sizeof bits);
    bits |= INT32_MIN;
    memcpy(&negative, &bits, sizeof negative);
    vf e = expv(negative);
    memcpy(&weight_bits, &e, sizeof e);
    memcpy(&one_bits, &one, sizeof one);
    weight_bits = (weight_bits & ~is_positive) | (one_bits & is_positive);
    memcpy(&weight, &weight_bits, sizeof weight);
    return gate * (weight / (one + e)) * up;
}

INLINE void gated(const float *gate, const float *up, int64_t n, void *out, int is_bf16) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        storev(out, i, silu_mul(loadv(gate, i, 0), loadv(up, i, 0)), is_bf16);
    if (i < n) {
        vf v = silu_mul(load_part(gate + i, n - i), load_part(up + i, n - i));
        store_part(out, i, v, n - i, is_bf16);
    }
}

void silu_mul_row(const float *gate, const float *up, int64_t n, void *out, int is_bf16) {
    if (is_bf16) gated(gate, up, n, out, 1);
    else gated(gate, up, n, out, 0);
}

void round_row(const float *x, int64_t n, void *out, int is_bf16) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) storev(out, i, loadv(x, i, 0), is_bf16);
    for (; i < n; i++) store1(out, i, x[i], is_bf16);
}

/* Elements as kernels read and write them: float32 or bfloat16 (as uint16 bits), computed on as
 * float32. */
#pragma once
#include <stdint.h>
#include <string.h>

#include "vectors.h"

INLINE float load1(const void *p, int64_t i, int is_bf16) {
    if (!is_bf16) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE vf loadv(const void *p, int64_t i, int is_bf16) {
    vf v;
    if (!is_bf16) {
        memcpy(&v, (const float *)p + i, sizeof v);
        return v;
    }
    vh h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    vu bits = __builtin_convertvector(h, vu) << 16;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Rounds to nearest even, as torch does; NaN stays NaN. */
INLINE void store1(void *p, int64_t i, float f, int is_bf16) {
    if (!is_bf16) {
        ((float *)p)[i] = f;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f)
        bits = 0x7fc00000u;
    else
        bits += 0x7fffu + ((bits >> 16) & 1u);
    ((uint16_t *)p)[i] = (uint16_t)(bits >> 16);
}

/* LANES elements, each rounded as by store1. */
INLINE void storev(void *p, int64_t i, vf v, int is_bf16) {
    if (!is_bf16) {
        memcpy((float *)p + i, &v, sizeof v);
        return;
    }
    vu bits;
    memcpy(&bits, &v, sizeof bits);
    vu is_nan = (vu)(v != v);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    bits = (bits & ~is_nan) | (0x7fc00000u & is_nan);
    vh h = __builtin_convertvector(bits >> 16, vh);
    memcpy((uint16_t *)p + i, &h, sizeof h);
}

/* Lanes added in a fixed tree. */
INLINE float sumv(vf v) {
    float s[LANES];
    memcpy(s, &v, sizeof v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

INLINE const void *at(const void *base, int64_t elems, int is_bf16) {
    return (const char *)base + elems * (is_bf16 ? 2 : 4);
}

/* e^x for x <= 0: 2^n * p(r) with the Cephes expf polynomial; 0 below -87, NaN for NaN. */
INLINE vf expv(vf x) {
    vf t = x * 1.44269504088896341f - 0.5f;
    vi n = __builtin_convertvector(t, vi); /* truncation of t - 0.5: to nearest for t <= 0 */
    vf fn = __builtin_convertvector(n, vf);
    vf r = x - fn * 0.693359375f + fn * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi scale = (n + 127) << 23, bits;
    vf s;
    memcpy(&s, &scale, sizeof s);
    vf y = p * s;
    memcpy(&bits, &y, sizeof bits);
    bits &= ~(vi)(x <= -87.0f);
    memcpy(&y, &bits, sizeof y);
    return y;
}

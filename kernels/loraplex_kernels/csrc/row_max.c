#include "row_max.h"

#include <math.h>

#include "elements.h"
#include "team.h"

#define BLOCK 512 /* columns whose maximum is taken before the place in them is looked for */

/* The largest of a block, NaN if one is there. */
INLINE float block_max(const float *p, int64_t n) {
    vf most = (vf){0} - INFINITY;
    vi is_nan = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = loadv(p, i, 0);
        vi is_more = v > most, v_bits, most_bits;
        is_nan |= v != v;
        memcpy(&v_bits, &v, sizeof v);
        memcpy(&most_bits, &most, sizeof most);
        most_bits = (most_bits & ~is_more) | (v_bits & is_more);
        memcpy(&most, &most_bits, sizeof most);
    }
    float result = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) {
        if (is_nan[lane]) return NAN;
        if (most[lane] > result) result = most[lane];
    }
    for (; i < n; i++) {
        if (p[i] != p[i]) return NAN;
        if (p[i] > result) result = p[i];
    }
    return result;
}

static void row_item(const void *args, int64_t row, void *scratch) {
    const row_max_args *a = args;
    const float *p = a->rows + row * a->V;
    float most = -INFINITY;
    int64_t block = 0, id = 0;
    (void)scratch;
    for (int64_t i = 0; i < a->V; i += BLOCK) {
        float found = block_max(p + i, a->V - i < BLOCK ? a->V - i : BLOCK);
        if (found != found) most = found;
        else if (found > most) most = found, block = i;
        if (most != most) break;
    }
    for (id = block; id < a->V - 1 && p[id] < most; id++) continue;
    a->values[row] = most;
    a->ids[row] = id;
}

int loraplex_row_max(const row_max_args *a) { return run_alone(row_item, a, a->N, 0); }

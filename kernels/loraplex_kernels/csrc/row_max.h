/* The largest value of each row, and where it is first: greedy sampling. */
#pragma once
#include <stdint.h>

typedef struct {
    const float *rows; /* [N, V] */
    float *values;     /* [N]; NaN if the row has one */
    int64_t *ids;      /* [N]; of no meaning if the row has a NaN */
    int64_t N, V;
} row_max_args;

/* Returns 0, or 1 when memory could not be had. */
int loraplex_row_max(const row_max_args *a);

/* LoRA of one site over paged weights. */
#pragma once
#include <stdint.h>

typedef struct {
    float *y;         /* [T, sum of out_features], rows N elements apart; changed in place */
    float *deltas;    /* lora_delta_elems: room for what is to be added to y */
    float *planes;    /* between the halves, see lora_planes.py: A x of each row */
    const int64_t *plane_starts; /* [G], first element of each segment's planes */
    const void *x;    /* [T, K], of the dtype of the pool */
    const void *pool; /* [P, page_elems] */
    const int32_t *row_ids, *seg_indptr, *page_table; /* see LoRABatch */
    const int32_t *ranks, *a_chunks, *b_chunks;       /* [G, 7], this layer */
    /* Likewise, -1 for none; or both NULL. A scale is two rows, to be added. */
    const int32_t *scale_chunks, *bias_chunks;
    const float *weights;                             /* [G], or NULL */
    const int32_t *projections, *out_features;        /* [num_projections] */
    int64_t T, K, N, G, page_table_width, page_elems;
    int32_t num_projections, chunk, chunks_per_page, is_bf16;
} lora_args;

/* LoRA takes two phases of so many items each: the deltas, which need no y and may be computed
 * while it is, and adding them. Each item writes what no other item of its phase writes. */
int64_t lora_items(const lora_args *a);
int64_t lora_scratch_bytes(const lora_args *a);
int64_t lora_delta_elems(const lora_args *a);
void lora_delta_item(const void *args, int64_t item, void *scratch);
void lora_add_item(const void *args, int64_t item, void *scratch);

/* Both on a team of its own; `deltas` is not used. Returns 0, or 1 when memory could not be had. */
int loraplex_add_lora(const lora_args *a);

/* The halves of loraplex_add_lora, for those who have to come between; composed, they give its bits.
 * The first writes the planes and has no y: out_features are 0, and `ranks` are the rows of A that
 * are here. The second reads them and has no x: K is 0, and `ranks` are the rows of B. */
int loraplex_lora_shrink(const lora_args *a);
int loraplex_lora_expand(const lora_args *a);

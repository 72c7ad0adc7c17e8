/* LoRA of one site over paged weights: items of one phase. */
#pragma once
#include <stdint.h>

typedef struct {
    float *y;         /* [T, N], changed in place */
    const void *x;    /* [T, K], of the dtype of the pool */
    const void *pool; /* [P, page_elems] */
    const int32_t *row_ids, *seg_indptr, *page_table; /* see LoRABatch */
    const int32_t *ranks, *a_chunks, *b_chunks;       /* [G, 7], this layer */
    const int32_t *scale_chunks, *bias_chunks;        /* likewise, -1 for none; or both NULL */
    const float *weights;                             /* [G], or NULL */
    const int32_t *projections, *out_features;        /* [num_projections] */
    int64_t T, K, N, G, page_table_width, page_elems;
    int32_t num_projections, chunk, chunks_per_page, is_bf16;
} lora_args;

/* How many items there are, what scratch one needs, and one of them (an item_fn). Items change rows
 * of `y` that no other item changes. */
int64_t lora_items(const lora_args *a);
int64_t lora_scratch_bytes(const lora_args *a);
void lora_item(const void *args, int64_t item, void *scratch);

/* All of it on a team of its own. Returns 0, or 1 when memory could not be had. */
int loraplex_add_lora(const lora_args *a);

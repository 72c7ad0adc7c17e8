/* Attention over paged KV: items of one phase. */
#pragma once
#include <stdint.h>

typedef struct {
    void *out;          /* [T, num_heads, head_dim], of the dtype of kv */
    const float *query; /* [T, num_heads, head_dim], rotated; rows lie query_stride apart */
    const void *kv;     /* [P, 2, page_tokens, num_kv_heads, head_dim], one layer */
    const int32_t *query_indptr, *context_lens, *block_tables; /* see AttentionBatch */
    int64_t S, block_table_width, num_heads, num_kv_heads, head_dim, page_tokens, max_context;
    int64_t query_stride;
    int64_t window; /* tokens a query sees, itself included; 0 for all */
    float scale;
    int32_t is_bf16;
} attention_args;

/* How many items there are, what scratch one needs, and one of them (an item_fn). Items write rows
 * of `out` that no other item writes. */
int64_t attention_items(const attention_args *a);
int64_t attention_scratch_bytes(const attention_args *a);
void attention_item(const void *args, int64_t item, void *scratch);

/* All of it on a team of its own. Returns 0, or 1 when memory could not be had. */
int loraplex_attention(const attention_args *a);

/* A decoder's forward pass over the tokens of a step, as one program of operations.
 *
 * The program has NUM_OPS operations per layer and two more behind the last: the norm and the head
 * of the rows whose logits are wanted. A stretch of it runs as one parallel region, so the whole of
 * it costs one. Python runs it piece by piece where adapters change something between operations;
 * the bits are the same, as it is the same code. */
#pragma once
#include <stdint.h>

#include "linear.h"

enum {
    INPUT_NORM, /* residual += delta of the layer before; x = norm(residual) */
    QKV,        /* wide = x W^T + LoRA */
    ROTATE,     /* norm and rotate the heads in wide; write K and V into their pages */
    ATTEND,     /* mixed = attention */
    O,          /* delta = mixed W^T + LoRA */
    POST_NORM,  /* residual += delta; x = norm(residual) */
    GATE_UP,    /* wide = x W^T + LoRA */
    SILU_MUL,   /* product = silu(gate) * up */
    DOWN,       /* delta = product W^T + LoRA */
    NUM_OPS
};
/* Behind the last layer, in the places of INPUT_NORM and QKV: x[i] = norm(residual + delta of
 * logit_rows[i]), and logits = x W^T. */

typedef struct {
    linear qkv, o, gate_up, down;
    const float *input_norm, *post_norm; /* [H] */
    const float *q_norm, *k_norm;        /* [head_dim], or NULL */
    int64_t window;                      /* tokens a query sees; 0 for all */
} decoder_layer;

typedef struct {
    const decoder_layer *layers;
    linear head;
    const float *final_norm; /* [H] */
    const float *cos, *sin;  /* [positions, rot_dim], see RopeTable */
    int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, rot_dim;
    int64_t page_tokens, page_elems, chunk_elems;
    float eps, scale; /* of norms; on attention scores */
    int32_t is_bf16;  /* pool, and what linears read; all else is float32 */
} decoder;

/* One LoRABatch. */
typedef struct {
    const int32_t *row_ids, *seg_indptr, *page_table;
    const int32_t *ranks, *a_chunks, *b_chunks, *scale_chunks, *bias_chunks; /* [L, G, 7] */
    const float *weights;
    int64_t G, page_table_width;
} decoder_lora;

typedef struct {
    char *pool; /* [L, P, page_elems] */
    /* See AttentionBatch. */
    const int32_t *query_indptr, *context_lens, *block_tables;
    const int64_t *positions, *slot_pages, *slot_offsets;
    const decoder_lora *loras;
    const int64_t *logit_rows; /* [N] */
    float *residual;           /* [T, H]; holds the embeddings at first */
    float *delta;              /* [T, H] */
    float *wide;               /* [T, the wider of qkv and gate_up] */
    void *x;                   /* [max(T, N), H] */
    void *mixed;               /* [T, num_heads head_dim] */
    void *product;             /* [T, intermediate] */
    float *logits;             /* [N, V] */
    /* Instead of the model's own, in this stretch; or NULL. Rows lie `stride` apart, 0 for one that
     * all rows share. */
    const float *norm, *q_norm, *k_norm;
    int64_t *op_ns; /* [NUM_OPS + 2], the nanoseconds of each operation are added; or NULL */
    int64_t norm_stride, head_norm_stride;
    int64_t num_pages, T, S, N, num_loras, block_table_width, max_context;
} decoder_step;

/* Run the operations [first, stop), counted from the first of the first layer. Returns 0, or 1 when
 * memory could not be had and nothing was done. */
int loraplex_decode(const decoder *d, const decoder_step *s, int64_t first, int64_t stop);

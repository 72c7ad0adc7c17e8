#include "decoder.h"

#include <stddef.h>
#include <stdlib.h>
#include <time.h>

#include "attention.h"
#include "elements.h"
#include "elementwise.h"
#include "lora.h"
#include "team.h"

#define NUM_PROJECTIONS 7

/* One operation of the program. */
typedef struct {
    const decoder *d;
    const decoder_step *s;
    float *deltas; /* see lora_args */
    int64_t layer;
    int op;
} place;

/* The projections of a site, by their places in the tables of ranks and chunks. */
typedef struct {
    int32_t count, projections[3], out_features[3];
} site;

static int64_t elem_size(const decoder *d) { return d->is_bf16 ? 2 : 4; }

static int64_t qkv_width(const decoder *d) {
    return (d->num_heads + 2 * d->num_kv_heads) * d->head_dim;
}

static site site_of(const decoder *d, int op) {
    int32_t q = (int32_t)(d->num_heads * d->head_dim), kv = (int32_t)(d->num_kv_heads * d->head_dim);
    int32_t hidden = (int32_t)d->hidden, inner = (int32_t)d->intermediate;
    if (op == QKV) return (site){3, {0, 1, 2}, {q, kv, kv}};
    if (op == O) return (site){1, {3}, {hidden}};
    if (op == GATE_UP) return (site){2, {4, 5}, {inner, inner}};
    return (site){1, {6}, {hidden}};
}

/* ---- phases over rows ---------------------------------------------------------------------- */

#define ITEM_ROWS 4 /* rows of one item: a row alone takes less time than claiming it */

static int64_t row_items(int64_t rows) { return (rows + ITEM_ROWS - 1) / ITEM_ROWS; }

#define FOR_ROWS(row, item, rows)                                                        \
    for (int64_t row = (item) * ITEM_ROWS; row < ((item) + 1) * ITEM_ROWS && row < (rows); row++)

static void add_row(float *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

static void norm_item(const void *args, int64_t item, void *scratch) {
    const place *here = args;
    const decoder *d = here->d;
    const decoder_step *s = here->s;
    (void)scratch;
    const decoder_layer *layer = &d->layers[here->layer];
    int is_input = here->op == INPUT_NORM;
    const float *weight = s->norm ? s->norm : is_input ? layer->input_norm : layer->post_norm;
    FOR_ROWS(row, item, s->T) {
        float *residual = s->residual + row * d->hidden;
        if (!is_input || here->layer > 0) add_row(residual, s->delta + row * d->hidden, d->hidden);
        char *x = (char *)s->x + row * d->hidden * elem_size(d);
        rms_norm_row(residual, weight + row * s->norm_stride, d->eps, d->hidden, x, d->is_bf16);
    }
}

static void final_norm_item(const void *args, int64_t item, void *scratch) {
    const place *here = args;
    const decoder *d = here->d;
    const decoder_step *s = here->s;
    (void)scratch;
    const float *weight = s->norm ? s->norm : d->final_norm;
    FOR_ROWS(i, item, s->N) {
        int64_t row = s->logit_rows[i];
        float *residual = s->residual + row * d->hidden;
        add_row(residual, s->delta + row * d->hidden, d->hidden);
        char *x = (char *)s->x + i * d->hidden * elem_size(d);
        rms_norm_row(residual, weight + i * s->norm_stride, d->eps, d->hidden, x, d->is_bf16);
    }
}

static void rotate_item(const void *args, int64_t item, void *scratch) {
    const place *here = args;
    const decoder *d = here->d;
    const decoder_step *s = here->s;
    (void)scratch;
    const decoder_layer *layer = &d->layers[here->layer];
    const float *q_norm = s->q_norm ? s->q_norm : layer->q_norm;
    const float *k_norm = s->k_norm ? s->k_norm : layer->k_norm;
    int64_t kv_width = d->num_kv_heads * d->head_dim, size = elem_size(d);
    FOR_ROWS(row, item, s->T) {
        float *heads = s->wide + row * qkv_width(d);
        const float *cos = d->cos + s->positions[row] * d->rot_dim;
        const float *sin = d->sin + s->positions[row] * d->rot_dim;
        for (int64_t h = 0; h < d->num_heads + d->num_kv_heads; h++) {
            float *head = heads + h * d->head_dim;
            const float *norm = h < d->num_heads ? q_norm : k_norm;
            if (norm) rms_norm_head(head, norm + row * s->head_norm_stride, d->eps, d->head_dim);
            rotate_head(head, cos, sin, d->rot_dim);
        }
        const float *k = heads + d->num_heads * d->head_dim;
        int64_t page = here->layer * s->num_pages + s->slot_pages[row];
        char *slot = s->pool + (page * d->page_elems + s->slot_offsets[row] * kv_width) * size;
        round_row(k, kv_width, slot, d->is_bf16);
        round_row(k + kv_width, kv_width, slot + d->page_tokens * kv_width * size, d->is_bf16);
    }
}

static void silu_mul_item(const void *args, int64_t item, void *scratch) {
    const place *here = args;
    const decoder *d = here->d;
    const decoder_step *s = here->s;
    (void)scratch;
    FOR_ROWS(row, item, s->T) {
        const float *gate = s->wide + row * 2 * d->intermediate;
        char *out = (char *)s->product + row * d->intermediate * elem_size(d);
        silu_mul_row(gate, gate + d->intermediate, d->intermediate, out, d->is_bf16);
    }
}

/* ---- products and attention ---------------------------------------------------------------- */

static lora_args lora_of(const place *here, const decoder_lora *l, const site *at,
                         const linear *layer, const void *x, float *y) {
    const decoder *d = here->d;
    int64_t table = here->layer * l->G * NUM_PROJECTIONS;
    return (lora_args){
        .y = y,
        .deltas = here->deltas,
        .x = x,
        .pool = here->s->pool + here->layer * here->s->num_pages * d->page_elems * elem_size(d),
        .row_ids = l->row_ids,
        .seg_indptr = l->seg_indptr,
        .page_table = l->page_table,
        .ranks = l->ranks + table,
        .a_chunks = l->a_chunks + table,
        .b_chunks = l->b_chunks + table,
        .scale_chunks = l->scale_chunks ? l->scale_chunks + table : NULL,
        .bias_chunks = l->bias_chunks ? l->bias_chunks + table : NULL,
        .weights = l->weights,
        .projections = at->projections,
        .out_features = at->out_features,
        .T = here->s->T,
        .K = layer->K,
        .N = layer->N,
        .G = l->G,
        .page_table_width = l->page_table_width,
        .page_elems = d->page_elems,
        .num_projections = at->count,
        .chunk = (int32_t)d->chunk_elems,
        .chunks_per_page = (int32_t)(d->page_elems / d->chunk_elems),
        .is_bf16 = d->is_bf16,
    };
}

static attention_args attention_of(const place *here) {
    const decoder *d = here->d;
    const decoder_step *s = here->s;
    return (attention_args){
        .out = s->mixed,
        .query = s->wide,
        .kv = s->pool + here->layer * s->num_pages * d->page_elems * elem_size(d),
        .query_indptr = s->query_indptr,
        .context_lens = s->context_lens,
        .block_tables = s->block_tables,
        .S = s->S,
        .block_table_width = s->block_table_width,
        .num_heads = d->num_heads,
        .num_kv_heads = d->num_kv_heads,
        .head_dim = d->head_dim,
        .page_tokens = d->page_tokens,
        .max_context = s->max_context,
        .query_stride = qkv_width(d),
        .window = d->layers[here->layer].window,
        .scale = d->scale,
        .is_bf16 = d->is_bf16,
    };
}

typedef struct {
    const linear *layer;
    const void *x;
    float *y;
} product;

static product product_of(const place *here) {
    const decoder_step *s = here->s;
    const decoder_layer *layer = &here->d->layers[here->layer];
    if (here->op == QKV) return (product){&layer->qkv, s->x, s->wide};
    if (here->op == O) return (product){&layer->o, s->mixed, s->delta};
    if (here->op == GATE_UP) return (product){&layer->gate_up, s->x, s->wide};
    return (product){&layer->down, s->product, s->delta};
}

/* The first adapter of each row is computed beside the base: it waits for memory, the base for
 * arithmetic, unless there are few rows. */
static void multiply(worker *w, const place *here) {
    product p = product_of(here);
    linear_args base = {p.layer, p.x, p.y, here->s->T};
    phase outputs = {linear_item, &base, linear_items(&base)};
    site at = site_of(here->d, here->op);
    for (int64_t i = 0; i < here->s->num_loras; i++) {
        lora_args lora = lora_of(here, &here->s->loras[i], &at, p.layer, p.x, p.y);
        int64_t count = lora_items(&lora);
        phase deltas = {lora_delta_item, &lora, count};
        run_phases(w, &outputs, &deltas);
        run_phase(w, lora_add_item, &lora, count);
        outputs.count = 0;
    }
    if (outputs.count) run_phase(w, outputs.run, outputs.args, outputs.count);
}

/* ---- the program --------------------------------------------------------------------------- */

static void run_op(worker *w, const place *here) {
    const decoder_step *s = here->s;
    if (here->layer == here->d->num_layers) {
        if (here->op == INPUT_NORM) {
            run_phase(w, final_norm_item, here, row_items(s->N));
        } else {
            linear_args head = {&here->d->head, s->x, s->logits, s->N};
            run_phase(w, linear_item, &head, linear_items(&head));
        }
        return;
    }
    switch (here->op) {
    case INPUT_NORM:
    case POST_NORM: run_phase(w, norm_item, here, row_items(s->T)); break;
    case ROTATE: run_phase(w, rotate_item, here, row_items(s->T)); break;
    case SILU_MUL: run_phase(w, silu_mul_item, here, row_items(s->T)); break;
    case ATTEND: {
        attention_args attention = attention_of(here);
        run_phase(w, attention_item, &attention, attention_items(&attention));
        break;
    }
    default: multiply(w, here);
    }
}

typedef struct {
    const decoder *d;
    const decoder_step *s;
    float *deltas;
    int64_t first, stop;
} stretch;

static place place_of(const stretch *all, int64_t index) {
    return (place){all->d, all->s, all->deltas, index / NUM_OPS, (int)(index % NUM_OPS)};
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

static void run_stretch(worker *w, const void *args) {
    const stretch *all = args;
    int64_t *op_ns = w->index == 0 ? all->s->op_ns : NULL;
    for (int64_t i = all->first; i < all->stop; i++) {
        place here = place_of(all, i);
        int64_t started = op_ns ? now_ns() : 0;
        run_op(w, &here);
        int is_last = here.layer == all->d->num_layers;
        if (op_ns) op_ns[here.op + (is_last ? NUM_OPS : 0)] += now_ns() - started;
    }
}

static void raise_to(int64_t *most, int64_t value) {
    if (value > *most) *most = value;
}

/* Memory that an operation needs. */
static void measure(const place *here, int64_t *scratch_bytes, int64_t *delta_elems) {
    if (here->layer == here->d->num_layers) return;
    if (here->op == ATTEND) {
        attention_args attention = attention_of(here);
        raise_to(scratch_bytes, attention_scratch_bytes(&attention));
        return;
    }
    if (here->op != QKV && here->op != O && here->op != GATE_UP && here->op != DOWN) return;
    product p = product_of(here);
    site at = site_of(here->d, here->op);
    for (int64_t i = 0; i < here->s->num_loras; i++) {
        lora_args lora = lora_of(here, &here->s->loras[i], &at, p.layer, p.x, p.y);
        raise_to(scratch_bytes, lora_scratch_bytes(&lora));
        raise_to(delta_elems, lora_delta_elems(&lora));
    }
}

int loraplex_decode(const decoder *d, const decoder_step *s, int64_t first, int64_t stop) {
    stretch all = {d, s, NULL, first, stop};
    int64_t scratch_bytes = 0, delta_elems = 0;
    for (int64_t i = first; i < stop; i++) {
        place here = place_of(&all, i);
        measure(&here, &scratch_bytes, &delta_elems);
    }
    all.deltas = allocate(delta_elems * (int64_t)sizeof *all.deltas);
    if (all.deltas == NULL) return 1;
    int failed = run_team(run_stretch, &all, scratch_bytes);
    free(all.deltas);
    return failed;
}

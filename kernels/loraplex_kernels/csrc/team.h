/* The threads of one step, working through phases together.
 *
 * A phase is a number of items, claimed one by one by whoever is free, and it is over when all are
 * done, whether or not every thread had a part in it. So a thread that lost its core to another
 * process holds up the one item it has, and no phase that it never began: when it is back, it skips
 * what is over. Whoever waits for others' last items spins for some microseconds, as most items end
 * within them, and then sleeps, so that the core is free. */
#pragma once
#include <stdint.h>

/* Memory at the border of a cache line, to be freed; NULL when there is none. */
void *allocate(int64_t num_bytes);

/* One item of a phase; `scratch` is the thread's own, and holds nothing when an item begins. */
typedef void (*item_fn)(const void *args, int64_t item, void *scratch);

typedef struct team team;

/* One thread's view of its team. */
typedef struct {
    team *team;
    void *scratch;
    int index;      /* of the thread */
    uint32_t phase; /* the number of the thread's next phase */
} worker;

/* Do one phase. Every thread of the team calls it for the same phases in the same order. */
void run_phase(worker *w, item_fn run, const void *args, int64_t count);

typedef struct {
    item_fn run;
    const void *args;
    int64_t count;
} phase;

/* Do two phases as one: half of the threads begin with the first, half with the second, and who
 * finds nothing left of one helps with the other. One thread alone can read nearly as fast as the
 * memory is, so a phase that waits for memory costs least beside one that computes. */
void run_phases(worker *w, const phase *first, const phase *second);

/* Run `body` on every thread of OpenMP's pool, each with so many bytes of scratch.
 *
 * Returns 0, or 1 when the scratch could not be had and nothing was run. */
int run_team(void (*body)(worker *, const void *), const void *args, int64_t scratch_bytes);

/* Run one phase on a team of its own. Returns as run_team does. */
int run_alone(item_fn run, const void *args, int64_t count, int64_t scratch_bytes);

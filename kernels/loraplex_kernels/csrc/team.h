/* The threads of one step, working through phases together.
 *
 * A phase is a number of items that any thread may take; it ends when all are done. Items are
 * claimed one by one: a thread that lost its core to another process holds up one item, not its
 * share of all. A thread that finds nothing left to claim spins for some microseconds, as most
 * phases end within them, and then sleeps, so that the core is free for whoever holds the others up.
 */
#pragma once
#include <stdint.h>

/* One item of a phase; `scratch` is the thread's own, and holds nothing when an item begins. */
typedef void (*item_fn)(const void *args, int64_t item, void *scratch);

typedef struct team team;

/* One thread's view of its team. */
typedef struct {
    team *team;
    void *scratch;
} worker;

/* Do one phase. Every thread of the team must call it with the same arguments. */
void run_phase(worker *w, item_fn run, const void *args, int64_t count);

/* Run `body` on every thread of OpenMP's pool, each with so many bytes of scratch.
 *
 * Returns 0, or 1 when the scratch could not be had and nothing was run. */
int run_team(void (*body)(worker *, const void *), const void *args, int64_t scratch_bytes);

/* Run one phase on a team of its own. Returns as run_team does. */
int run_alone(item_fn run, const void *args, int64_t count, int64_t scratch_bytes);

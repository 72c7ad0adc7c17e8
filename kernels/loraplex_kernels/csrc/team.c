#define _GNU_SOURCE
#include "team.h"

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define CACHE_LINE 64
#define SPINS 4000 /* of some 10 ns: longer than a phase's last item takes */

struct team {
    /* Which phase it is (upper half) and its first item that nobody has claimed, for each of two
     * sorts of items. */
    struct {
        _Alignas(CACHE_LINE) _Atomic uint64_t claim;
    } next[2];
    _Alignas(CACHE_LINE) _Atomic int64_t done; /* items of the phase */
    _Alignas(CACHE_LINE) _Atomic uint32_t phase; /* phases that are over */
    _Atomic int sleepers;
};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void sleep_during(team *t, uint32_t phase) {
    atomic_fetch_add(&t->sleepers, 1);
    while (atomic_load(&t->phase) == phase) {
#ifdef __linux__
        syscall(SYS_futex, &t->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&t->sleepers, 1);
}

static void wait_for_end(team *t, uint32_t phase) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&t->phase, memory_order_acquire) != phase) return;
        pause_briefly();
    }
    sleep_during(t, phase);
}

static void end_phase(team *t, uint32_t phase) {
    atomic_store(&t->done, 0);
    for (int i = 1; i >= 0; i--) atomic_store(&t->next[i].claim, (uint64_t)(phase + 1) << 32);
    atomic_store(&t->phase, phase + 1);
#ifdef __linux__
    if (atomic_load(&t->sleepers))
        syscall(SYS_futex, &t->phase, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
}

void *allocate(int64_t num_bytes) {
    return aligned_alloc(CACHE_LINE, (size_t)((num_bytes + CACHE_LINE) / CACHE_LINE * CACHE_LINE));
}

/* Do items as long as there are any; returns how many it did. */
static int64_t do_items(worker *w, const phase *p, int sort) {
    _Atomic uint64_t *next = &w->team->next[sort].claim;
    uint64_t seen = atomic_load_explicit(next, memory_order_acquire);
    int64_t num_done = 0;
    while (seen >> 32 == w->phase && (int64_t)(uint32_t)seen < p->count) {
        if (!atomic_compare_exchange_weak(next, &seen, seen + 1)) continue;
        p->run(p->args, (uint32_t)seen, w->scratch);
        num_done++;
        seen = atomic_load_explicit(next, memory_order_acquire);
    }
    return num_done;
}

void run_phases(worker *w, const phase *first, const phase *second) {
    const phase *phases[2] = {first, second};
    team *t = w->team;
    int64_t count = first->count + second->count, num_done = 0;
    if (count == 0) return;
    for (int i = 0; i < 2; i++) {
        int sort = (w->index + i) % 2;
        num_done += do_items(w, phases[sort], sort);
    }
    if (num_done && atomic_fetch_add(&t->done, num_done) + num_done == count)
        end_phase(t, w->phase);
    else wait_for_end(t, w->phase);
    w->phase++;
}

void run_phase(worker *w, item_fn run, const void *args, int64_t count) {
    phase only = {run, args, count}, none = {0};
    run_phases(w, &only, &none);
}

int run_team(void (*body)(worker *, const void *), const void *args, int64_t scratch_bytes) {
    int num_threads = omp_get_max_threads();
    int64_t stride = (scratch_bytes + CACHE_LINE) / CACHE_LINE * CACHE_LINE;
    char *memory = allocate(stride * num_threads);
    if (memory == NULL) return 1;
    team t = {0};
    #pragma omp parallel num_threads(num_threads)
    {
        int index = omp_get_thread_num();
        worker w = {&t, memory + stride * index, index, 0};
        body(&w, args);
    }
    free(memory);
    return 0;
}

static void run_lone_phase(worker *w, const void *args) {
    const phase *p = args;
    run_phase(w, p->run, p->args, p->count);
}

int run_alone(item_fn run, const void *args, int64_t count, int64_t scratch_bytes) {
    if (count <= 1) { /* waking the others would cost more than it */
        void *scratch = allocate(scratch_bytes);
        if (scratch == NULL) return 1;
        if (count == 1) run(args, 0, scratch);
        free(scratch);
        return 0;
    }
    phase p = {run, args, count};
    return run_team(run_lone_phase, &p, scratch_bytes);
}

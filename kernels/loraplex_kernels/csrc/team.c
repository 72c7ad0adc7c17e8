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
    _Alignas(CACHE_LINE) _Atomic int64_t next; /* the first item nobody has claimed */
    _Alignas(CACHE_LINE) _Atomic int arrived;
    _Alignas(CACHE_LINE) _Atomic int phase; /* phases that have ended */
    _Atomic int sleepers;
    int num_threads;
};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void sleep_while(team *t, int phase) {
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

static void wait_for_all(team *t) {
    int phase = atomic_load(&t->phase);
    if (atomic_fetch_add(&t->arrived, 1) + 1 == t->num_threads) {
        atomic_store(&t->arrived, 0);
        atomic_store(&t->next, 0);
        atomic_store(&t->phase, phase + 1);
#ifdef __linux__
        if (atomic_load(&t->sleepers))
            syscall(SYS_futex, &t->phase, FUTEX_WAKE_PRIVATE, t->num_threads, NULL, NULL, 0);
#endif
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&t->phase, memory_order_acquire) != phase) return;
        pause_briefly();
    }
    sleep_while(t, phase);
}

void run_phase(worker *w, item_fn run, const void *args, int64_t count) {
    team *t = w->team;
    if (t->num_threads == 1) {
        for (int64_t item = 0; item < count; item++) run(args, item, w->scratch);
        return;
    }
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (item >= count) break;
        run(args, item, w->scratch);
    }
    wait_for_all(t);
}

int run_team(void (*body)(worker *, const void *), const void *args, int64_t scratch_bytes) {
    int num_threads = omp_get_max_threads();
    int64_t stride = (scratch_bytes + CACHE_LINE) / CACHE_LINE * CACHE_LINE;
    char *memory = aligned_alloc(CACHE_LINE, (size_t)(stride * num_threads));
    if (memory == NULL) return 1;
    team t = {0};
    #pragma omp parallel num_threads(num_threads)
    {
        /* OpenMP may give fewer than asked for. */
        #pragma omp single
        t.num_threads = omp_get_num_threads();
        worker w = {&t, memory + stride * omp_get_thread_num()};
        body(&w, args);
    }
    free(memory);
    return 0;
}

typedef struct {
    item_fn run;
    const void *args;
    int64_t count;
} lone_phase;

static void run_lone_phase(worker *w, const void *args) {
    const lone_phase *p = args;
    run_phase(w, p->run, p->args, p->count);
}

int run_alone(item_fn run, const void *args, int64_t count, int64_t scratch_bytes) {
    if (count <= 1) { /* waking the others would cost more than it */
        void *scratch = malloc((size_t)scratch_bytes + 1);
        if (scratch == NULL) return 1;
        if (count == 1) run(args, 0, scratch);
        free(scratch);
        return 0;
    }
    lone_phase p = {run, args, count};
    return run_team(run_lone_phase, &p, scratch_bytes);
}

#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include "rebnn.h"

typedef struct {
    void (*task)(void *, int);
    void *argument;
    atomic_int *go; /* 0: wait, 1: run, -1: give up */
    int thread;
} start;

static void relax(int turn)
{
    if (turn < 2000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    } else {
        sched_yield();
    }
}

void barrier_wait(barrier *b)
{
    int round = atomic_load_explicit(&b->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&b->waiting, 1, memory_order_acq_rel) == b->threads - 1) {
        atomic_store_explicit(&b->waiting, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(&b->round, 1, memory_order_release);
        return;
    }
    for (int turn = 0; atomic_load_explicit(&b->round, memory_order_acquire) == round; turn++)
        relax(turn);
}

static void *run(void *pointer)
{
    start *s = pointer;
    int go = 1;
    for (int turn = 0; s->go && !(go = atomic_load_explicit(s->go, memory_order_acquire)); turn++)
        relax(turn);
    if (go > 0)
        s->task(s->argument, s->thread);
    return NULL;
}

int run_threads(int threads, int independent, void (*task)(void *, int), void *argument)
{
    if (threads == 1) {
        task(argument, 0);
        return 1;
    }
    atomic_int go = 0;
    start starts[REBNN_MAX_THREADS];
    pthread_t ids[REBNN_MAX_THREADS];
    int started = 0;
    for (; started < threads - 1; started++) {
        starts[started] = (start){task, argument, independent ? NULL : &go, started};
        if (pthread_create(&ids[started], NULL, run, &starts[started]))
            break;
    }
    int complete = started == threads - 1;
    if (!independent)
        atomic_store_explicit(&go, complete ? 1 : -1, memory_order_release);
    if (complete || independent)
        for (int thread = started; thread < threads; thread++)
            task(argument, thread);
    for (int i = 0; i < started; i++)
        pthread_join(ids[i], NULL);
    return complete || independent;
}

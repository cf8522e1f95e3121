/* Threads for the time of one call. Internal. */
#ifndef REBNN_PARALLEL_H
#define REBNN_PARALLEL_H

#include <stdatomic.h>

/* Meeting point of the threads of a call: they spin for a moment, then yield. */
typedef struct {
    atomic_int waiting, round;
    int threads;
} barrier;

void barrier_wait(barrier *b);

/* Runs task(argument, thread) for thread 0..threads-1, the last on the calling thread, and waits for all. Where the
 * system gives no more threads, the caller does their share one after the other if `independent`, else returns 0
 * without having run anything; 1 for success. */
int run_threads(int threads, int independent, void (*task)(void *argument, int thread), void *argument);

#endif

/* How fast two threads read memory: sweep THREADS BYTES SWEEPS prints the GB/s (10^9 bytes) of the best sweep.
 *
 * Each thread reads its own share of one buffer, far beyond any cache, and adds it up in eight independent sums, so that
 * loads and not additions are what it waits for; they are asked for some way ahead, which brought a fifth more on the
 * machine it was written on, and at two places in turn, which brought a tenth. The buffer is in huge pages where the
 * system gives them. A sweep lasts from the first thread's start, after a barrier, to the last one's end, by their own
 * clocks: a thread that is kept from running makes it longer, never shorter.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define AHEAD 1024 /* bytes; 4,096 brought next to nothing */
#define PLACES 2   /* four brought no more */
#define AT_ONCE (8 / PLACES)
typedef uint64_t lanes __attribute__((vector_size(64)));

static pthread_barrier_t gate;
static const lanes *buffer;
static size_t share; /* vectors of 64 bytes for each thread */
static int num_sweeps;
static double *times; /* start and end, for each sweep of each thread */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void *reader(void *argument) {
    const lanes *start = buffer + (size_t)(intptr_t)argument * share;
    double *clock = times + (size_t)(intptr_t)argument * num_sweeps * 2;
    lanes sum[8] = {{0}};
    for (int sweep = 0; sweep < num_sweeps; sweep++) {
        pthread_barrier_wait(&gate);
        clock[2 * sweep] = now();
        for (size_t i = 0; i < share / PLACES; i += AT_ONCE)
            for (int place = 0; place < PLACES; place++) {
                const lanes *at = start + share / PLACES * place + i;
                for (int k = 0; k < AT_ONCE; k++) __builtin_prefetch((const char *)(at + k) + AHEAD);
                for (int k = 0; k < AT_ONCE; k++) sum[place * AT_ONCE + k] += at[k];
            }
        __asm__ volatile("" : : "r"(sum) : "memory"); /* read before the clock is */
        clock[2 * sweep + 1] = now();
    }
    uint64_t total = 0;
    for (int k = 0; k < 8; k++) total += sum[k][0]; /* used, so that nothing is left out */
    return (void *)(uintptr_t)total;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int num_threads = atoi(argv[1]);
    num_sweeps = atoi(argv[3]);
    share = strtoull(argv[2], 0, 10) / 64 / num_threads / 8 * 8;
    size_t bytes = share * num_threads * sizeof(lanes);
    uint64_t *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || num_threads < 1) return 1;
    madvise(memory, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < bytes / 8; i++) memory[i] = i; /* pages of their own: zeros would share one */
    buffer = (const lanes *)memory;
    pthread_barrier_init(&gate, 0, num_threads);
    pthread_t *threads = calloc(num_threads, sizeof *threads);
    times = calloc((size_t)num_threads * num_sweeps * 2, sizeof *times);
    for (intptr_t i = 0; i < num_threads; i++) pthread_create(&threads[i], 0, reader, (void *)i);
    uintptr_t total = 0;
    for (int i = 0; i < num_threads; i++) {
        void *sum;
        pthread_join(threads[i], &sum);
        total += (uintptr_t)sum;
    }
    double best = 1e9;
    for (int sweep = 0; sweep < num_sweeps; sweep++) {
        double began = 1e300, ended = 0;
        for (int i = 0; i < num_threads; i++) {
            double *clock = times + ((size_t)i * num_sweeps + sweep) * 2;
            if (clock[0] < began) began = clock[0];
            if (clock[1] > ended) ended = clock[1];
        }
        if (ended - began < best) best = ended - began;
    }
    printf("%.3f\n", bytes / best * 1e-9);
    return total == 42; /* never */
}

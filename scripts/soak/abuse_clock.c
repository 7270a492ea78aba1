/* Shifts the wall clock of a process that preloads it, by the seconds in the file ABUSE_CLOCK.
 *
 * The file is mapped: a shift is seen at once, in all processes. The monotonic clock and the times
 * of files stay as they are, as they do when the clock of a machine is set. Waits until a time of
 * the wall clock are told that time by the real one; one that already runs sees no shift.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define YEARS 1000000000 /* seconds; no machine runs for 30 years, so more is of the wall clock */
#define REAL(name)                                                                                 \
    ({                                                                                             \
        static __typeof__(&name) real;                                                             \
        if (!real) real = (__typeof__(&name))find(#name);                                          \
        real;                                                                                      \
    })

static const volatile int64_t *shift;

__attribute__((constructor)) static void map_shift(void) {
    const char *path = getenv("ABUSE_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof *shift, PROT_READ, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) shift = found;
    close(file);
}

static int64_t seconds(void) { return shift ? *shift : 0; }

/* The conditions of pthreads have an old version besides, which other lookups may find. */
static void *find(const char *name) {
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");
    return found ? found : dlsym(RTLD_NEXT, name);
}

static const struct timespec *real_time(const struct timespec *until, struct timespec *own) {
    if (!until || until->tv_sec < YEARS) return until;
    *own = *until;
    own->tv_sec -= seconds();
    return own;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = REAL(clock_gettime)(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += seconds();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = REAL(gettimeofday)(now, zone);
    if (!failed) now->tv_sec += seconds();
    return failed;
}

time_t time(time_t *now) {
    time_t found = REAL(time)(NULL) + seconds();
    if (now) *now = found;
    return found;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    struct timespec own;
    return REAL(pthread_cond_timedwait)(condition, mutex, real_time(until, &own));
}

int pthread_cond_clockwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           clockid_t clock, const struct timespec *restrict until) {
    struct timespec own;
    return REAL(pthread_cond_clockwait)(condition, mutex, clock, real_time(until, &own));
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex,
                            const struct timespec *restrict until) {
    struct timespec own;
    return REAL(pthread_mutex_timedlock)(mutex, real_time(until, &own));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    struct timespec own;
    return REAL(sem_timedwait)(semaphore, real_time(until, &own));
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t clock,
                  const struct timespec *restrict until) {
    struct timespec own;
    return REAL(sem_clockwait)(semaphore, clock, real_time(until, &own));
}

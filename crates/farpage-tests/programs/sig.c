/* Signals and threads: write barriers, timers, jumps out of handlers, cancelled threads. */
#include "common.h"
#include <setjmp.h>
#include <sys/resource.h>
#include <sys/time.h>

static char *data;
static size_t pages;

static void setup(void) {
    pages = data_bytes / PAGE;
    data = map_pages(pages);
    fill(data, pages, 1, 0);
}

/* A garbage collector's write barrier: protected pages, the handler opens the one that was touched. */
static volatile size_t barrier_hits;
static unsigned char *dirty;
static int closed;
static void barrier_hit(int s, siginfo_t *info, void *context) {
    (void)s;
    (void)context;
    char *p = (char *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1));
    if (info->si_code != SEGV_ACCERR || p < data || p >= data + pages * PAGE) die("SIGSEGV at %p, code %d", info->si_addr, info->si_code);
    size_t i = (size_t)(p - data) / PAGE;
    if (dirty[i]) die("page %zu hit twice", i);
    dirty[i] = 1;
    barrier_hits++;
    ok(mprotect(p, PAGE, PROT_READ | PROT_WRITE) == 0);
}
static void barrier(void) {
    setup();
    dirty = map_bytes(MIB);
    struct sigaction sa = {.sa_sigaction = barrier_hit, .sa_flags = SA_SIGINFO | SA_NODEFER};
    ok(sigaction(SIGSEGV, &sa, NULL) == 0);
    uint64_t rng = 3;
    static uint64_t seed_of[1 << 20];
    for (size_t i = 0; i < pages; i++) seed_of[i] = 1;
    for (uint64_t round = 2; round < 8; round++) {
        closed = round % 2 ? PROT_NONE : PROT_READ;
        memset(dirty, 0, pages);
        barrier_hits = 0;
        ok(mprotect(data, pages * PAGE, closed) == 0);
        if (round % 3 == 0) evict(data, pages * PAGE);
        size_t expect = 0;
        for (size_t n = 0; n < 1500; n++) {
            size_t i = draw(&rng) % pages;
            if (closed == PROT_READ) check_page(data + i * PAGE, seed_of[i], i, "read through a write barrier");
            bool first = !dirty[i];
            fill_page(data + i * PAGE, round, i);
            expect += first;
            seed_of[i] = round;
            if (!dirty[i]) die("page %zu was written without its barrier", i);
        }
        ok(expect == barrier_hits);
        for (size_t i = 0; i < pages; i++) {
            if (closed == PROT_NONE && !dirty[i] && i % 8) continue; /* opening every page takes long */
            check_page(data + i * PAGE, seed_of[i], i, "behind the barrier");
        }
    }
    ok(mprotect(data, pages * PAGE, PROT_READ | PROT_WRITE) == 0);
    for (size_t i = 0; i < pages; i++) check_page(data + i * PAGE, seed_of[i], i, "barrier lifted");
}

/* Timers fire during faults; the handler touches pages that are away itself. */
static volatile long ticks;
static void on_tick(int s) {
    (void)s;
    static _Thread_local uint64_t rng = 17;
    int e = errno;
    size_t i = draw(&rng) % pages;
    check_page(data + i * PAGE, 1, i, "in a timer's handler");
    ticks++;
    errno = e;
}
static void timers(void) {
    setup();
    struct sigaction sa = {.sa_handler = on_tick, .sa_flags = SA_RESTART};
    ok(sigaction(SIGALRM, &sa, NULL) == 0);
    struct itimerval every = {{0, 700}, {0, 700}}, never = {{0, 0}, {0, 0}};
    ok(setitimer(ITIMER_REAL, &every, NULL) == 0);
    uint64_t rng = 5;
    double until = now() + 2;
    while (now() < until || ticks < 50) {
        size_t i = draw(&rng) % pages;
        check_page(data + i * PAGE, 1, i, "beside a timer");
        fill_page(data + i * PAGE, 1, i);
    }
    ok(setitimer(ITIMER_REAL, &never, NULL) == 0);
    check(data, pages, 1, 0, "after timers");
}

/* Jumps out of handlers, from amid faults and from true access errors. */
static sigjmp_buf jump;
static volatile sig_atomic_t may_jump;
static void on_jump(int s) {
    if (s == SIGSEGV || may_jump) siglongjmp(jump, s);
}
static void longjmps(void) {
    setup();
    struct sigaction sa = {.sa_handler = on_jump};
    ok(sigaction(SIGSEGV, &sa, NULL) == 0 && sigaction(SIGALRM, &sa, NULL) == 0);
    char *none = mmap(NULL, MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ok(none != MAP_FAILED);
    struct itimerval every = {{0, 900}, {0, 900}}, never = {{0, 0}, {0, 0}};
    static volatile long faults, alarms;
    static volatile uint64_t rng = 8;
    ok(setitimer(ITIMER_REAL, &every, NULL) == 0);
    static volatile double until;
    until = now() + 2;
    while (now() < until || alarms < 50) {
        int s = sigsetjmp(jump, 1);
        if (s == SIGALRM) {
            may_jump = 0;
            alarms++;
            continue;
        }
        if (s == SIGSEGV) {
            may_jump = 0;
            faults++;
            continue;
        }
        may_jump = 1;
        for (int n = 0; n < 50; n++) {
            size_t i = mix(rng++) % pages;
            check_page(data + i * PAGE, 1, i, "left by a jump");
        }
        *(volatile char *)(none + mix(rng) % MIB) = 1;
        die("memory without access was written");
    }
    may_jump = 0;
    ok(setitimer(ITIMER_REAL, &never, NULL) == 0);
    ok(faults > 0 && munmap(none, MIB) == 0);
    check(data, pages, 1, 0, "after jumps");
}

/* Threads that are cancelled in the middle of faults. */
static void *touch_for_ever(void *arg) {
    int old;
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &old);
    uint64_t rng = (uint64_t)(uintptr_t)arg;
    for (;;) {
        volatile uint64_t *w = (uint64_t *)(data + draw(&rng) % pages * PAGE);
        *w = *w;
    }
    return NULL;
}
static void cancel(void) {
    setup();
    uint64_t rng = 4;
    for (int n = 0; n < 40; n++) {
        pthread_t t[3];
        for (int i = 0; i < 3; i++) t[i] = start(touch_for_ever, (void *)(uintptr_t)(n * 3 + i));
        for (size_t k = draw(&rng) % 200; k > 0; k--) {
            size_t i = draw(&rng) % pages;
            check_page(data + i * PAGE, 1, i, "beside threads that are cancelled");
        }
        for (int i = 0; i < 3; i++) {
            void *result;
            ok(pthread_cancel(t[i]) == 0 && pthread_join(t[i], &result) == 0 && result == PTHREAD_CANCELED);
        }
    }
    check(data, pages, 1, 0, "after cancelled threads");
}

/* Many short threads, each touching a few pages that are away. */
static void *touch_few(void *arg) {
    uint64_t rng = (uint64_t)(uintptr_t)arg;
    for (int n = 0; n < 16; n++) {
        size_t i = draw(&rng) % pages;
        check_page(data + i * PAGE, 1, i, "short thread");
    }
    return NULL;
}
static void threads(void) {
    setup();
    for (int n = 0; n < 100; n++) {
        pthread_t t[8];
        for (int i = 0; i < 8; i++) t[i] = start(touch_few, (void *)(uintptr_t)(n * 8 + i));
        for (int i = 0; i < 8; i++) join(t[i]);
    }
    check(data, pages, 1, 0, "after short threads");
}

/* Several threads on the very same pages at the same time. */
static pthread_barrier_t line;
static void *same_pages(void *arg) {
    (void)arg;
    for (size_t from = 0; from + 64 <= pages; from += 64) {
        pthread_barrier_wait(&line);
        for (size_t i = from; i < from + 64; i++) {
            check_page(data + i * PAGE, 1, i, "several threads on one page");
            atomic_fetch_add((_Atomic uint64_t *)(data + i * PAGE), 0);
        }
    }
    return NULL;
}
static void together(void) {
    setup();
    ok(pthread_barrier_init(&line, NULL, 4) == 0);
    pthread_t t[4];
    for (int i = 0; i < 4; i++) t[i] = start(same_pages, NULL);
    for (int i = 0; i < 4; i++) join(t[i]);
    check(data, pages, 1, 0, "after threads together");
}

/* A thread that blocks every signal takes faults like any other. */
static void masked(void) {
    setup();
    sigset_t all;
    sigfillset(&all);
    ok(pthread_sigmask(SIG_BLOCK, &all, NULL) == 0);
    check(data, pages, 1, 0, "with all signals blocked");
    fill(data, pages, 2, 0);
    check(data, pages, 2, 0, "with all signals blocked, written");
}

/* True access errors stay what they are: the child dies of them, with its memory away. */
static volatile uintptr_t nowhere = 16;
static void fatal(void) {
    setup();
    for (int n = 0; n < 4; n++) {
        pid_t pid = fork();
        if (pid < 0) die("fork");
        if (pid == 0) {
            struct rlimit no_core = {0, 0};
            setrlimit(RLIMIT_CORE, &no_core);
            evict(data, pages * PAGE);
            if (n == 0) raise(SIGSEGV);
            if (n == 1) *(volatile int *)nowhere = 1;
            if (n == 2) {
                ok(mprotect(data, PAGE, PROT_READ) == 0);
                *(volatile int *)data = 1;
            }
            if (n == 3) {
                ok(munmap(data + MIB, MIB) == 0);
                *(volatile int *)(data + MIB) = 1;
            }
            _exit(0);
        }
        int status;
        ok(waitpid(pid, &status, 0) == pid);
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSEGV) die("round %d: wait status %#x, expected SIGSEGV", n, (unsigned)status);
    }
    check(data, pages, 1, 0, "parent");
}

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"barrier", barrier}, {"timers", timers},     {"longjmp", longjmps}, {"cancel", cancel}, {"threads", threads},
        {"masked", masked},   {"together", together}, {"fatal", fatal},      {NULL, NULL},
    };
    return run_case(argc, argv, cases);
}

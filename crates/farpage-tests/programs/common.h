/* What every test program shares: pages whose contents follow from a seed, pressure, cases by name.
 *
 * A program is called as `prog CASE [MIB]`. It checks itself, prints one line that does not depend on
 * timing, and exits with 0 (all is right), 1 (something is wrong; stderr says what) or 77 (this machine
 * cannot do it; stdout says `SKIPPED: reason`). */
#ifndef COMMON_H
#define COMMON_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define PAGE ((size_t)4096)
#define WORDS (PAGE / 8)
#define MIB ((size_t)1 << 20)

/* Bytes of data a case works on (the second argument, in MiB; 64 without one). */
static size_t data_bytes = 64 * MIB;

#define die(...) die_at(__FILE__, __LINE__, __VA_ARGS__)
__attribute__((format(printf, 3, 4), noreturn)) static inline void die_at(const char *file, int line,
                                                                          const char *format, ...) {
    char text[512];
    int e = errno;
    int n = snprintf(text, sizeof text, "%s:%d: pid %d: ", file, line, (int)getpid());
    va_list args;
    va_start(args, format);
    n += vsnprintf(text + n, sizeof text - (size_t)n - 80, format, args);
    va_end(args);
    n += snprintf(text + n, sizeof text - (size_t)n, " (errno %d: %s)\n", e, strerrordesc_np(e));
    if (write(2, text, (size_t)n) < 0) _exit(2);
    _exit(1);
}

__attribute__((format(printf, 1, 2), noreturn)) static inline void skip(const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("SKIPPED: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    fflush(stdout);
    _exit(77);
}

/* Ends the program unless the expression holds; use for system calls: ok(close(fd) == 0). */
#define ok(expr)                                  \
    do {                                          \
        if (!(expr)) die("failed: %s", #expr);    \
    } while (0)

static inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* A small generator of its own for each thread. */
static inline uint64_t draw(uint64_t *state) { return mix((*state)++); }

enum kind { HALF, NOISE, SAME, ZERO };

static inline uint64_t word_of(enum kind kind, uint64_t seed, uint64_t page, size_t i) {
    uint64_t base = mix(seed * 0x100000001b3u + page);
    switch (kind) {
    case HALF:
        return i < WORDS / 2 ? mix(base + i) : base;
    case NOISE:
        return mix(base + i);
    case SAME:
        return base;
    case ZERO:
        break;
    }
    return 0;
}

static inline void fill_kind(void *p, enum kind kind, uint64_t seed, uint64_t page) {
    volatile uint64_t *w = p;
    for (size_t i = 0; i < WORDS; i++) w[i] = word_of(kind, seed, page, i);
}

static inline void check_kind(const void *p, enum kind kind, uint64_t seed, uint64_t page, const char *where) {
    const volatile uint64_t *w = p;
    for (size_t i = 0; i < WORDS; i++) {
        uint64_t want = word_of(kind, seed, page, i), got = w[i];
        if (got != want) {
            errno = 0;
            die("%s: page %lu at %p word %zu: found %016lx, expected %016lx", where, (unsigned long)page,
                (void *)p, i, (unsigned long)got, (unsigned long)want);
        }
    }
}

static inline void fill_page(void *p, uint64_t seed, uint64_t page) { fill_kind(p, HALF, seed, page); }
static inline void check_page(const void *p, uint64_t seed, uint64_t page, const char *where) {
    check_kind(p, HALF, seed, page, where);
}

/* `n` pages from `p` on, numbered from `first`. */
static inline void fill(void *p, size_t n, uint64_t seed, uint64_t first) {
    for (size_t i = 0; i < n; i++) fill_page((char *)p + i * PAGE, seed, first + i);
}
static inline void check(const void *p, size_t n, uint64_t seed, uint64_t first, const char *where) {
    for (size_t i = 0; i < n; i++) check_page((const char *)p + i * PAGE, seed, first + i, where);
}
static inline void check_zero(const void *p, size_t n, const char *where) {
    for (size_t i = 0; i < n; i++) check_kind((const char *)p + i * PAGE, ZERO, 0, i, where);
}

static inline void *map_bytes(size_t len) {
    void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("mmap of %zu bytes", len);
    return p;
}
static inline void *map_pages(size_t n) { return map_bytes(n * PAGE); }

/* Asks for the range to be paged out now. Harmless without farpage. */
static inline void evict(void *p, size_t len) {
    if (madvise(p, len, MADV_PAGEOUT) != 0 && errno != EINVAL) die("MADV_PAGEOUT");
}

/* farpage learns of raw mapping changes from the kernel, and is on its guard from the first one on (docs/guarantees.md, "Known
 * gaps"): here is that first one, on memory that nobody else uses. */
static inline void raw_first(void) {
    size_t len = 512 * PAGE;
    char *p = map_bytes(len);
    memset(p, 1, len);
    evict(p, len);
    if (syscall(SYS_munmap, p, len) != 0) die("munmap");
}

/* Other memory that is made busy, so that what is away has its frames used again. */
static char *ballast;
static size_t ballast_pages;
static inline void make_ballast(size_t bytes) {
    ballast_pages = bytes / PAGE;
    ballast = map_pages(ballast_pages);
    fill(ballast, ballast_pages, 777, 0);
}
/* Reads and verifies half of the ballast and writes one word in each of its pages again. */
static inline void pressure(void) {
    static _Atomic size_t next;
    size_t n = ballast_pages / 2;
    size_t from = atomic_fetch_add_explicit(&next, n, memory_order_relaxed);
    for (size_t i = 0; i < n; i++) {
        size_t page = (from + i) % ballast_pages;
        char *p = ballast + page * PAGE;
        atomic_fetch_add_explicit((_Atomic uint64_t *)p, 0, memory_order_relaxed);
        check_page(p, 777, page, "ballast");
    }
}

static inline double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static inline pthread_t start(void *(*body)(void *), void *arg) {
    pthread_t t;
    int e = pthread_create(&t, NULL, body, arg);
    if (e) {
        errno = e;
        die("pthread_create");
    }
    return t;
}
static inline void join(pthread_t t) {
    int e = pthread_join(t, NULL);
    if (e) {
        errno = e;
        die("pthread_join");
    }
}

/* Waits for a child that must end with exit status `want`. */
static inline void reap(pid_t pid, int want, const char *what) {
    int status;
    while (waitpid(pid, &status, 0) != pid)
        if (errno != EINTR) die("%s: waitpid", what);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != want)
        die("%s: child %d ended with wait status %#x, expected exit %d", what, (int)pid, (unsigned)status, want);
}

/* A system call that no wrapper of the C library sees. */
static inline long raw6(long n, long a, long b, long c, long d, long e, long f) {
#if defined(__x86_64__)
    long ret;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = n;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
#else
#error "this architecture has no raw system call here yet"
#endif
}
#define RAW(n, a, b, c, d, e, f) raw6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

struct test_case {
    const char *name;
    void (*body)(void);
};

static inline int run_case(int argc, char **argv, const struct test_case *cases) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 2) data_bytes = (size_t)strtoul(argv[2], NULL, 10) * MIB;
    if (argc > 1 && data_bytes >= MIB)
        for (const struct test_case *c = cases; c->name; c++)
            if (strcmp(c->name, argv[1]) == 0) {
                c->body();
                printf("%s: all right\n", c->name);
                fflush(stdout);
                return 0;
            }
    fprintf(stderr, "usage: %s CASE [MIB]\ncases:", argv[0]);
    for (const struct test_case *c = cases; c->name; c++) fprintf(stderr, " %s", c->name);
    fprintf(stderr, "\n");
    return 2;
}
#endif

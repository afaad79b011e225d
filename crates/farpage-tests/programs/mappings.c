/* Everything that changes a mapping, on pages that are away, staged and resident. */
#include "common.h"
#include <fcntl.h>
#include <sys/resource.h>

#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

/* A region of 1024 pages, brought into a state; each case goes through all states. */
enum { N = 1024, H = N / 2, Q = N / 4 };
enum state { AWAY, STAGED, RESIDENT, MIXED, STATES };
static const char *state_name[] = {"away", "staged", "resident", "mixed"};
static enum state state;
static char text[96];

static const char *at(const char *what) {
    snprintf(text, sizeof text, "%s, pages %s", what, state_name[state]);
    return text;
}

static void bring(char *p, size_t n) {
    switch (state) {
    case AWAY:
        evict(p, n * PAGE);
        pressure();
        break;
    case STAGED:
        evict(p, n * PAGE);
        break;
    case RESIDENT:
        pressure();
        for (size_t i = 0; i < n; i++) atomic_fetch_add((_Atomic uint64_t *)(p + i * PAGE), 0);
        break;
    case MIXED:
        pressure();
        for (size_t i = 0; i < n; i += 3) atomic_fetch_add((_Atomic uint64_t *)(p + i * PAGE), 0);
        for (size_t i = 0; i + 7 < n; i += 31) evict(p + i * PAGE, 7 * PAGE);
        break;
    case STATES:
        break;
    }
}

static char *region(void) {
    char *p = map_pages(N);
    fill(p, N, 1, 0);
    bring(p, N);
    return p;
}

static void drop(void *p, size_t n) { ok(munmap(p, n * PAGE) == 0); }

/* True where nothing is mapped. */
static bool hole(const void *p) {
    unsigned char v;
    return mincore((void *)p, PAGE, &v) != 0 && errno == ENOMEM;
}

static void each(void (*body)(void)) {
    make_ballast(data_bytes);
    for (state = 0; state < STATES; state++)
        for (int n = 0; n < 2; n++) body();
    /* The neighbours took no harm. */
    for (size_t i = 0; i < ballast_pages; i++) check_page(ballast + i * PAGE, 777, i, "ballast at the end");
}

static void do_munmap(void) {
    char *p = region();
    drop(p + Q * PAGE, Q);
    ok(hole(p + Q * PAGE) && hole(p + (H - 1) * PAGE));
    check(p, Q, 1, 0, at("before a hole"));
    check(p + H * PAGE, H, 1, H, at("after a hole"));
    /* Single pages, every second one. */
    for (size_t i = H; i < N; i += 2) drop(p + i * PAGE, 1);
    for (size_t i = H + 1; i < N; i += 2) check_page(p + i * PAGE, 1, i, at("between holes"));
    /* What is mapped there anew is empty. */
    char *again = mmap(p + Q * PAGE, Q * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    ok(again == p + Q * PAGE);
    check_zero(again, Q, at("mapped again"));
    fill(again, Q, 2, 0);
    bring(p, H);
    check(again, Q, 2, 0, at("written again"));
    drop(p, N);
    ok(munmap(p, N * PAGE) == 0); /* nothing there any more: allowed */
    ok(munmap(p + 1, PAGE) == -1 && errno == EINVAL);
}

static void do_grow(void) {
    char *p = region();
    char *q = mremap(p, N * PAGE, 2 * N * PAGE, MREMAP_MAYMOVE);
    ok(q != MAP_FAILED);
    check(q, N, 1, 0, at("grown"));
    check_zero(q + N * PAGE, N, at("the part that grew"));
    fill(q + N * PAGE, N, 3, N);
    bring(q, 2 * N);
    /* Something in the way: it must move. */
    char *wall = mmap(q + 2 * N * PAGE, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (wall == MAP_FAILED) ok(errno == EEXIST);
    char *none = mremap(q, 2 * N * PAGE, 3 * N * PAGE, 0);
    ok(none == MAP_FAILED && errno == ENOMEM);
    char *r = mremap(q, 2 * N * PAGE, 3 * N * PAGE, MREMAP_MAYMOVE);
    ok(r != MAP_FAILED && r != q && hole(q));
    check(r, N, 1, 0, at("moved"));
    check(r + N * PAGE, N, 3, N, at("moved"));
    if (wall != MAP_FAILED) drop(wall, 1);
    drop(r, 3 * N);
}

static void do_shrink(void) {
    char *p = region();
    ok(mremap(p, N * PAGE, Q * PAGE, 0) == p);
    ok(hole(p + Q * PAGE) && hole(p + (N - 1) * PAGE));
    check(p, Q, 1, 0, at("shrunk"));
    /* Grown in place again, the rest is empty. */
    char *q = mremap(p, Q * PAGE, H * PAGE, MREMAP_MAYMOVE);
    ok(q != MAP_FAILED);
    check(q, Q, 1, 0, at("shrunk and grown"));
    check_zero(q + Q * PAGE, Q, at("shrunk and grown"));
    drop(q, H);
}

static void do_fixed_move(void) {
    char *p = region();
    char *target = map_pages(N);
    fill(target, N, 4, 0);
    bring(target, N);
    /* A part of one over a part of the other. */
    char *q = mremap(p + Q * PAGE, Q * PAGE, Q * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target + H * PAGE);
    ok(q == target + H * PAGE && hole(p + Q * PAGE));
    check(target, H, 4, 0, at("before what moved in"));
    check(q, Q, 1, Q, at("what moved in"));
    check(target + (H + Q) * PAGE, Q, 4, H + Q, at("after what moved in"));
    check(p, Q, 1, 0, at("left of what moved away"));
    check(p + H * PAGE, H, 1, H, at("right of what moved away"));
    /* And back, page by page. */
    for (size_t i = 0; i < Q; i += 16)
        ok(mremap(q + i * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, p + (Q + i) * PAGE) == p + (Q + i) * PAGE);
    bring(p + H * PAGE, H);
    for (size_t i = 0; i < Q; i++) {
        if (i % 16 == 0)
            check_page(p + (Q + i) * PAGE, 1, Q + i, at("moved back"));
        else
            check_page(q + i * PAGE, 1, Q + i, at("not moved back"));
    }
    drop(p, N);
    drop(target, N);
}

/* A mapping too small to be managed grows, and moves over managed memory: what it brings along must not be given back
 * to the budget as if it had been charged. */
static void do_small_over(void) {
    enum { SMALL = 16 };
    for (int round = 0; round < 8; round++) {
        char *small = mmap(NULL, SMALL * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        ok(small != MAP_FAILED);
        fill(small, SMALL, 21, 0);
        char *big = mremap(small, SMALL * PAGE, N * PAGE, MREMAP_MAYMOVE);
        ok(big != MAP_FAILED);
        fill(big + SMALL * PAGE, N - SMALL, 21, SMALL);
        char *target = map_pages(N);
        fill(target, N, 4, 0);
        bring(target, N);
        ok(mremap(big, N * PAGE, N * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
        check(target, N, 21, 0, at("a small mapping, grown, over another"));
        fill(target, N, 22, 0);
        pressure();
        check(target, N, 22, 0, at("a small mapping, moved and written"));
        drop(target, N);
    }
}

static void do_dontunmap(void) {
    char *p = region();
    char *q = mremap(p, N * PAGE, N * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    if (q == MAP_FAILED && errno == EINVAL) skip("MREMAP_DONTUNMAP: %s", strerror(errno));
    ok(q != MAP_FAILED && q != p);
    check(q, N, 1, 0, at("moved with MREMAP_DONTUNMAP"));
    check_zero(p, N, at("left by MREMAP_DONTUNMAP"));
    fill(p, N, 5, 0);
    bring(p, N);
    bring(q, N);
    check(p, N, 5, 0, at("written where MREMAP_DONTUNMAP left nothing"));
    check(q, N, 1, 0, at("moved with MREMAP_DONTUNMAP, later"));
    drop(p, N);
    drop(q, N);
}

/* Whether one may read or write there, asked of the kernel (pipes copy from and to user memory). */
static bool readable(char *p) {
    static int fd[2] = {-1, -1};
    if (fd[0] < 0) ok(pipe(fd) == 0);
    char c;
    ssize_t n = write(fd[1], p, 1);
    if (n == 1) ok(read(fd[0], &c, 1) == 1);
    return n == 1;
}
static bool writable(char *p) {
    static int fd = -1;
    if (fd < 0) ok((fd = open("/dev/zero", O_RDONLY)) >= 0);
    char was;
    if (!readable(p)) return false;
    was = *(volatile char *)p;
    bool yes = read(fd, p, 1) == 1;
    if (yes) *(volatile char *)p = was;
    return yes;
}

static void do_protect(void) {
    char *p = region();
    ok(mprotect(p + Q * PAGE, H * PAGE, PROT_NONE) == 0);
    ok(!readable(p + Q * PAGE) && !readable(p + (Q + H - 1) * PAGE) && readable(p) && writable(p + (Q + H) * PAGE));
    check(p, Q, 1, 0, at("beside PROT_NONE"));
    pressure();
    ok(mprotect(p + H * PAGE, Q * PAGE, PROT_READ) == 0);
    check(p + H * PAGE, Q, 1, H, at("read-only"));
    ok(!writable(p + H * PAGE) && readable(p + H * PAGE));
    evict(p + H * PAGE, Q * PAGE);
    check(p + H * PAGE, Q, 1, H, at("read-only, paged out"));
    ok(mprotect(p, N * PAGE, PROT_READ | PROT_WRITE) == 0);
    check(p, N, 1, 0, at("unprotected"));
    fill(p, N, 2, 0);
    bring(p, N);
    check(p, N, 2, 0, at("written after PROT_NONE"));
    /* Page by page, so that the mapping is in pieces. */
    for (size_t i = 0; i < N; i += 8) ok(mprotect(p + i * PAGE, PAGE, i % 16 ? PROT_READ : PROT_NONE) == 0);
    bring(p + H * PAGE + PAGE, 7);
    for (size_t i = 0; i < N; i++)
        if (i % 16 != 0) check_page(p + i * PAGE, 2, i, at("in pieces"));
    ok(mprotect(p, N * PAGE, PROT_READ | PROT_WRITE) == 0);
    check(p, N, 2, 0, at("whole again"));
    drop(p, N);
}

static void do_dontneed(void) {
    char *p = region();
    ok(madvise(p + Q * PAGE, H * PAGE, MADV_DONTNEED) == 0);
    check_zero(p + Q * PAGE, H, at("after MADV_DONTNEED"));
    check(p, Q, 1, 0, at("before MADV_DONTNEED"));
    check(p + (Q + H) * PAGE, Q, 1, Q + H, at("behind MADV_DONTNEED"));
    fill(p + Q * PAGE, H, 6, Q);
    bring(p, N);
    check(p + Q * PAGE, H, 6, Q, at("written after MADV_DONTNEED"));
    for (size_t i = 0; i < N; i += 2) ok(madvise(p + i * PAGE, PAGE, MADV_DONTNEED) == 0);
    for (size_t i = 0; i < N; i += 2) check_zero(p + i * PAGE, 1, at("single pages after MADV_DONTNEED"));
    drop(p, N);
}

static void do_free(void) {
    char *p = region();
    ok(madvise(p, H * PAGE, MADV_FREE) == 0);
    /* What is written after MADV_FREE stays; the others hold their old bytes or zeros. */
    for (size_t i = 0; i < H; i += 2) fill_page(p + i * PAGE, 7, i);
    bring(p, N);
    for (size_t i = 0; i < H; i++) {
        if (i % 2 == 0)
            check_page(p + i * PAGE, 7, i, at("written after MADV_FREE"));
        else if (*(volatile uint64_t *)(p + i * PAGE) == 0)
            check_zero(p + i * PAGE, 1, at("freed"));
        else
            check_page(p + i * PAGE, 1, i, at("not freed yet"));
    }
    check(p + H * PAGE, H, 1, H, at("behind MADV_FREE"));
    drop(p, N);
}

/* Freed pages that the kernel is asked to take away, here and where the manager has put them meanwhile. */
static void do_free_pageout(void) {
    char *p = region();
    for (uint64_t round = 0; round < 6; round++) {
        fill(p, N, 40 + round, 0);
        ok(madvise(p, N * PAGE, MADV_FREE) == 0);
        evict(p, N * PAGE);
        bring(p, N);
        for (size_t i = 0; i < N; i += 5) fill_page(p + i * PAGE, 60 + round, i);
        for (size_t i = 0; i < N; i++) {
            if (i % 5 == 0)
                check_page(p + i * PAGE, 60 + round, i, at("written after MADV_FREE"));
            else if (*(volatile uint64_t *)(p + i * PAGE) == 0)
                check_zero(p + i * PAGE, 1, at("freed"));
            else
                check_page(p + i * PAGE, 40 + round, i, at("not freed yet"));
        }
    }
    drop(p, N);
}

/* Pages of which the neighbours are unmapped are paged as before: that this much of them fits shows the budget. */
static void do_cut(void) {
    enum { PIECE = 64 };
    size_t n = 12 * N, gone = state % 2 ? PIECE / 2 : 0;
    char *p = map_pages(n);
    for (size_t i = 0; i < n; i += PIECE) {
        fill(p + i * PAGE, PIECE, 1, i);
        drop(p + (i + gone) * PAGE, 1);
        if (state == MIXED) drop(p + (i + gone + 9) * PAGE, 2);
    }
    for (size_t i = 0; i < n; i++) {
        size_t in = i % PIECE - gone;
        if (in != 0 && !(state == MIXED && (in == 9 || in == 10))) check_page(p + i * PAGE, 1, i, at("beside a hole"));
    }
    drop(p, n);
}

static void do_advise(void) {
    static const int advice[] = {MADV_WILLNEED, MADV_COLD,          MADV_PAGEOUT,        MADV_POPULATE_READ, MADV_POPULATE_WRITE,
                                 MADV_RANDOM,   MADV_SEQUENTIAL,    MADV_NORMAL,         MADV_HUGEPAGE,      MADV_NOHUGEPAGE,
                                 MADV_DONTDUMP, MADV_DODUMP};
    char *p = region();
    for (size_t a = 0; a < sizeof advice / sizeof *advice; a++) {
        if (madvise(p + Q * PAGE, H * PAGE, advice[a]) != 0 && errno != EINVAL) die("madvise(%d)", advice[a]);
        check(p, N, 1, 0, at("after advice"));
        bring(p, N);
        if (madvise(p, N * PAGE, advice[a]) != 0 && errno != EINVAL) die("madvise(%d)", advice[a]);
        for (size_t i = 0; i < N; i += 5) fill_page(p + i * PAGE, 1, i);
    }
    check(p, N, 1, 0, at("after all advice"));
    ok(madvise(p, PAGE, 9999) == -1 && errno == EINVAL);
    drop(p, N);
}

static void do_mlock(void) {
    struct rlimit limit;
    ok(getrlimit(RLIMIT_MEMLOCK, &limit) == 0);
    if (geteuid() != 0 && limit.rlim_cur < 8 * MIB) skip("RLIMIT_MEMLOCK is %lu", (unsigned long)limit.rlim_cur);
    char *p = region();
    ok(mlock(p + Q * PAGE, Q * PAGE) == 0);
    pressure();
    check(p, N, 1, 0, at("mlock"));
    ok(munlock(p + Q * PAGE, Q * PAGE) == 0);
    if (mlock2(p, H * PAGE, MLOCK_ONFAULT) != 0) ok(errno == ENOSYS || errno == EINVAL);
    fill(p, H, 8, 0);
    pressure();
    check(p, H, 8, 0, at("mlock2"));
    ok(mprotect(p, Q * PAGE, PROT_READ) == 0);
    ok(mprotect(p, Q * PAGE, PROT_READ | PROT_WRITE) == 0);
    ok(munlock(p, N * PAGE) == 0);
    bring(p, N);
    check(p, H, 8, 0, at("munlock"));
    check(p + H * PAGE, H, 1, H, at("munlock"));
    drop(p, N);
}

static void do_mlockall(void) {
    if (geteuid() != 0) skip("mlockall needs CAP_IPC_LOCK");
    char *p = region();
    ok(mlockall(MCL_CURRENT) == 0);
    check(p, N, 1, 0, at("mlockall"));
    ok(munlockall() == 0);
    bring(p, N);
    check(p, N, 1, 0, at("munlockall"));
    ok(mlockall(MCL_FUTURE) == 0);
    char *q = map_pages(N);
    fill(q, N, 2, 0);
    ok(munlockall() == 0);
    bring(q, N);
    check(q, N, 2, 0, at("mapped under MCL_FUTURE"));
    drop(p, N);
    drop(q, N);
}

static int file_of(size_t n) {
    char path[] = "/tmp/farpage-test-XXXXXX";
    int fd = mkstemp(path);
    ok(fd >= 0 && unlink(path) == 0);
    static char page[PAGE];
    for (size_t i = 0; i < n; i++) {
        fill_page(page, 11, i);
        ok(write(fd, page, PAGE) == (ssize_t)PAGE);
    }
    return fd;
}

static void do_fixed(void) {
    char *p = region();
    int rw = PROT_READ | PROT_WRITE;
    /* Fresh anonymous memory over a part. */
    char *q = mmap(p + Q * PAGE, Q * PAGE, rw, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    ok(q == p + Q * PAGE);
    check_zero(q, Q, at("MAP_FIXED"));
    check(p, Q, 1, 0, at("before MAP_FIXED"));
    check(p + H * PAGE, H, 1, H, at("behind MAP_FIXED"));
    fill(q, Q, 9, 0);
    bring(p, N);
    /* A file over a part, shared and private. */
    int fd = file_of(Q);
    char *f = mmap(p + H * PAGE, Q * PAGE, rw, MAP_SHARED | MAP_FIXED, fd, 0);
    ok(f == p + H * PAGE);
    char *g = mmap(p, Q * PAGE, rw, MAP_PRIVATE | MAP_FIXED, fd, 0);
    ok(g == p);
    pressure();
    check(f, Q, 11, 0, at("a shared file over a part"));
    check(g, Q, 11, 0, at("a private file over a part"));
    fill(g, Q / 2, 12, 0);
    fill(f + Q / 2 * PAGE, Q / 2, 13, 0);
    bring(q, Q);
    check(g, Q / 2, 12, 0, at("a private file, written"));
    check(g + Q / 2 * PAGE, Q / 2, 13, 0, at("a private file, seen through the shared one"));
    check(f, Q / 2, 11, 0, at("a shared file, not written"));
    check(q, Q, 9, 0, at("between files"));
    check(p + (H + Q) * PAGE, Q, 1, H + Q, at("behind the file"));
    /* Shared anonymous memory, then plain memory again. */
    char *s = mmap(p + H * PAGE, Q * PAGE, rw, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    ok(s == p + H * PAGE);
    check_zero(s, Q, at("shared anonymous memory over a file"));
    q = mmap(p, N * PAGE, rw, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    ok(q == p);
    check_zero(p, N, at("MAP_FIXED over all"));
    fill(p, N, 14, 0);
    bring(p, N);
    check(p, N, 14, 0, at("written after MAP_FIXED over all"));
    ok(close(fd) == 0);
    drop(p, N);
}

static void do_noreplace(void) {
    char *p = region();
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    ok(mmap(p + Q * PAGE, PAGE, PROT_READ, flags, -1, 0) == MAP_FAILED && errno == EEXIST);
    check(p, N, 1, 0, at("MAP_FIXED_NOREPLACE"));
    drop(p + Q * PAGE, Q);
    ok(mmap(p + Q * PAGE, Q * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) == p + Q * PAGE);
    check_zero(p + Q * PAGE, Q, at("MAP_FIXED_NOREPLACE into a hole"));
    drop(p, N);
}

static void do_populate(void) {
    char *p = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    ok(p != MAP_FAILED);
    bring(p, N);
    check_zero(p, N, at("MAP_POPULATE"));
    fill(p, N, 1, 0);
    bring(p, N);
    check(p, N, 1, 0, at("MAP_POPULATE"));
    drop(p, N);
}

/* As allocators do it: reserve with PROT_NONE, commit piece by piece, give back with MADV_DONTNEED or by
 * mapping PROT_NONE over it. */
static void do_reserve(void) {
    size_t all = 8 * N;
    char *p = mmap(NULL, all * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ok(p != MAP_FAILED);
    for (size_t i = 0; i < 8; i += 2) {
        ok(mprotect(p + i * N * PAGE, H * PAGE, PROT_READ | PROT_WRITE) == 0);
        fill(p + i * N * PAGE, H, 20 + i, 0);
    }
    for (size_t i = 0; i < 8; i += 2) bring(p + i * N * PAGE, H);
    for (size_t i = 0; i < 8; i += 2) check(p + i * N * PAGE, H, 20 + i, 0, at("committed"));
    ok(!readable(p + N * PAGE));
    ok(mprotect(p, N * PAGE, PROT_READ | PROT_WRITE) == 0);
    check_zero(p + H * PAGE, H, at("committed later"));
    ok(madvise(p + 2 * N * PAGE, H * PAGE, MADV_DONTNEED) == 0);
    ok(mprotect(p + 2 * N * PAGE, H * PAGE, PROT_NONE) == 0);
    ok(mmap(p + 4 * N * PAGE, H * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == p + 4 * N * PAGE);
    ok(!readable(p + 2 * N * PAGE) && !readable(p + 4 * N * PAGE));
    ok(mprotect(p + 2 * N * PAGE, 3 * N * PAGE, PROT_READ | PROT_WRITE) == 0);
    check_zero(p + 2 * N * PAGE, 3 * N, at("decommitted and committed"));
    check(p, H, 20, 0, at("kept"));
    check(p + 6 * N * PAGE, H, 26, 0, at("kept"));
    drop(p, all);
}

static void do_sparse(void) {
    size_t len = (size_t)64 << 30;
    char *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) skip("64 GiB of address space: %s", strerror(errno));
    size_t step = len / N;
    for (size_t i = 0; i < N; i++) fill_page(p + i * step, 1, i);
    for (size_t i = 0; i < N; i += 2) evict(p + i * step, PAGE);
    pressure();
    for (size_t i = 0; i < N; i++) check_page(p + i * step, 1, i, at("sparse"));
    for (size_t i = 0; i < N; i++) check_zero(p + i * step + PAGE, 1, at("between sparse pages"));
    ok(madvise(p, len / 2, MADV_DONTNEED) == 0);
    for (size_t i = 0; i < N; i++) {
        if (i < H)
            check_zero(p + i * step, 1, at("sparse, given up"));
        else
            check_page(p + i * step, 1, i, at("sparse, kept"));
    }
    ok(munmap(p, len) == 0);
}

static void do_shared(void) {
    char *p = region();
    char *s = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int fd = file_of(N);
    char *f = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ok(s != MAP_FAILED && f != MAP_FAILED);
    fill(s, N, 30, 0);
    bring(s, N);
    bring(f, N);
    pid_t pid = fork();
    if (pid < 0) die("fork");
    if (pid == 0) {
        check(p, N, 1, 0, at("child, private"));
        check(s, N, 30, 0, at("child, shared"));
        fill(s, H, 31, 0);
        fill(f, H, 32, 0);
        fill(p, H, 33, 0);
        _exit(0);
    }
    reap(pid, 0, "do_shared");
    check(s, H, 31, 0, at("shared, written by the child"));
    check(f, H, 32, 0, at("file, written by the child"));
    check(f + H * PAGE, H, 11, H, at("file"));
    check(p, N, 1, 0, at("private, written by the child"));
    ok(close(fd) == 0);
    drop(p, N);
    drop(s, N);
    drop(f, N);
}

/* The same calls where no wrapper of the C library sees them: by syscall(2) and by the instruction. */
static bool by_instruction;
#define SYS(n, a, b, c, d, e, f) \
    (by_instruction ? RAW(n, a, b, c, d, e, f) : syscall(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f)))
static void do_raw(void) {
    raw_first();
    by_instruction = !by_instruction;
    int rw = PROT_READ | PROT_WRITE, anon = MAP_PRIVATE | MAP_ANONYMOUS;
    char *p = region();
    /* munmap, and fresh memory in the hole. */
    ok(SYS(SYS_munmap, p + Q * PAGE, Q * PAGE, 0, 0, 0, 0) == 0);
    ok(hole(p + Q * PAGE));
    char *q = (char *)SYS(SYS_mmap, p + Q * PAGE, Q * PAGE, rw, anon | MAP_FIXED, -1, 0);
    ok(q == p + Q * PAGE);
    check_zero(q, Q, at("raw mmap"));
    fill(q, Q, 40, 0);
    /* mmap over what is there. */
    bring(p, N);
    ok((char *)SYS(SYS_mmap, p, Q * PAGE, rw, anon | MAP_FIXED, -1, 0) == p);
    check_zero(p, Q, at("raw mmap over"));
    check(q, Q, 40, 0, at("behind raw mmap over"));
    check(p + H * PAGE, H, 1, H, at("behind raw mmap over"));
    /* madvise. */
    bring(p, N);
    ok(SYS(SYS_madvise, q, Q / 2 * PAGE, MADV_DONTNEED, 0, 0, 0) == 0);
    check_zero(q, Q / 2, at("raw MADV_DONTNEED"));
    ok(SYS(SYS_madvise, q, Q * PAGE, MADV_PAGEOUT, 0, 0, 0) == 0);
    check(q + Q / 2 * PAGE, Q / 2, 40, Q / 2, at("raw MADV_PAGEOUT"));
    /* mprotect. */
    ok(SYS(SYS_mprotect, q, Q * PAGE, PROT_NONE, 0, 0, 0) == 0);
    ok(!readable(q));
    pressure();
    ok(SYS(SYS_mprotect, q, Q * PAGE, rw, 0, 0, 0) == 0);
    check(q + Q / 2 * PAGE, Q / 2, 40, Q / 2, at("raw mprotect"));
    /* mremap: away, on top of other memory, and leaving the mapping. */
    bring(p, N);
    char *target = map_pages(N);
    fill(target, N, 41, 0);
    bring(target, N);
    ok((char *)SYS(SYS_mremap, p + H * PAGE, H * PAGE, H * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target, 0) == target);
    check(target, H, 1, H, at("raw mremap"));
    check(target + H * PAGE, H, 41, H, at("behind raw mremap"));
    ok(hole(p + H * PAGE));
    char *r = (char *)SYS(SYS_mremap, target, H * PAGE, N * PAGE, MREMAP_MAYMOVE, 0, 0);
    ok((long)r > 0 && r != target && hole(target));
    check(r, H, 1, H, at("raw mremap grown"));
    check_zero(r + H * PAGE, H, at("raw mremap grown"));
    fill(r + H * PAGE, H, 42, H);
    bring(r, N);
    char *s = (char *)SYS(SYS_mremap, r, N * PAGE, N * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0, 0);
    ok((long)s > 0 && s != r);
    check(s, H, 1, H, at("raw MREMAP_DONTUNMAP"));
    check(s + H * PAGE, H, 42, H, at("raw MREMAP_DONTUNMAP"));
    check_zero(r, N, at("left by raw MREMAP_DONTUNMAP"));
    check(target + H * PAGE, H, 41, H, at("behind raw mremap grown"));
    ok(SYS(SYS_mlock, s, Q * PAGE, 0, 0, 0, 0) == 0 || geteuid() != 0);
    pressure();
    ok(SYS(SYS_munlock, s, Q * PAGE, 0, 0, 0, 0) == 0);
    check(s, H, 1, H, at("raw mlock"));
    drop(s, N);
    drop(r, N);
    drop(target + H * PAGE, H);
    drop(p, H);
}

/* The break, by sbrk and by the system call. */
static void do_brk(void) {
    char *start = sbrk(0);
    char *p = (char *)(((uintptr_t)start + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    ok(sbrk(p - start + (long)(N * PAGE)) == start);
    check_zero(p, N, at("the break"));
    fill(p, N, 1, 0);
    bring(p, N);
    check(p, N, 1, 0, at("the break"));
    bring(p, N);
    ok((char *)RAW(SYS_brk, p + H * PAGE, 0, 0, 0, 0, 0) == p + H * PAGE);
    check(p, H, 1, 0, at("the break, shrunk"));
    ok(hole(p + H * PAGE));
    ok((char *)RAW(SYS_brk, p + N * PAGE, 0, 0, 0, 0, 0) == p + N * PAGE);
    check_zero(p + H * PAGE, H, at("the break, grown again"));
    ok(brk(start) == 0);
}

#define CASE(name) \
    static void case_##name(void) { each(do_##name); }
CASE(munmap)
CASE(grow)
CASE(shrink)
CASE(fixed_move)
CASE(dontunmap)
CASE(small_over)
CASE(protect)
CASE(dontneed)
CASE(free)
CASE(free_pageout)
CASE(cut)
CASE(advise)
CASE(mlock)
CASE(mlockall)
CASE(fixed)
CASE(noreplace)
CASE(populate)
CASE(reserve)
CASE(sparse)
CASE(shared)
CASE(raw)
CASE(brk)

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"munmap", case_munmap},
        {"grow", case_grow},
        {"shrink", case_shrink},
        {"fixed-move", case_fixed_move},
        {"dontunmap", case_dontunmap},
        {"small-over", case_small_over},
        {"protect", case_protect},
        {"dontneed", case_dontneed},
        {"free", case_free},
        {"free-pageout", case_free_pageout},
        {"cut", case_cut},
        {"advise", case_advise},
        {"mlock", case_mlock},
        {"mlockall", case_mlockall},
        {"fixed", case_fixed},
        {"noreplace", case_noreplace},
        {"populate", case_populate},
        {"reserve", case_reserve},
        {"sparse", case_sparse},
        {"shared", case_shared},
        {"raw", case_raw},
        {"brk", case_brk},
        {NULL, NULL},
    };
    return run_case(argc, argv, cases);
}

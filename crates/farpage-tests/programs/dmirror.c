// The HMM test device, used as a program uses it: dmirror CASE. Preloaded: libfarpage_dmirror.so.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define PAGE 4096ul
#define HUGE (2ul << 20)
#define CHECK(cond) \
    do { \
        if (!(cond)) { \
            fprintf(stderr, "%s:%d: %s does not hold (errno %d: %s)\n", __FILE__, __LINE__, #cond, errno, strerror(errno)); \
            exit(1); \
        } \
    } while (0)

struct command {
    uint64_t addr, ptr, npages, cpages, faults;
};
enum { READ, WRITE, TO_DEV, TO_SYS, SNAPSHOT, EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE, FLAGS };

static struct command last;

// 0 or the error.
static int command(int fd, int nr, void *addr, void *ptr, size_t pages) {
    struct command c = {(uintptr_t)addr, (uintptr_t)ptr, pages, 77, 78};
    int r = ioctl(fd, 0xc0284800ul + nr, &c);
    last = c;
    if (r != 0) {
        CHECK(r == -1 && c.cpages == 77 && c.faults == 78); // nothing is copied back
        return errno;
    }
    return 0;
}

static int mirror(int minor) {
    char path[32];
    snprintf(path, sizeof path, "/dev/hmm_dmirror%d", minor);
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0);
    return fd;
}

static char *map(size_t len, int prot, int flags) {
    char *p = mmap(NULL, len, prot, flags, -1, 0);
    CHECK(p != MAP_FAILED);
    return p;
}

static char *anon(size_t len) { return map(len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS); }

static void fill(char *p, size_t len, unsigned seed) {
    for (size_t i = 0; i < len / 4; i++) ((unsigned *)p)[i] = seed + (unsigned)i * 2654435761u;
}

static int holds(const char *p, size_t len, unsigned seed) {
    for (size_t i = 0; i < len / 4; i++)
        if (((const unsigned *)p)[i] != seed + (unsigned)i * 2654435761u) return 0;
    return 1;
}

static uint64_t pagemap(const void *p) {
    int fd = open("/proc/self/pagemap", O_RDONLY);
    uint64_t word = 0;
    CHECK(fd >= 0 && pread(fd, &word, 8, (uintptr_t)p / PAGE * 8) == 8);
    close(fd);
    return word;
}

static unsigned long status(const char *field) {
    char line[256];
    unsigned long kb = 0;
    FILE *f = fopen("/proc/self/status", "r");
    CHECK(f);
    while (fgets(line, sizeof line, f))
        if (strncmp(line, field, strlen(field)) == 0) kb = strtoul(line + strlen(field), NULL, 10);
    fclose(f);
    return kb;
}

static void errors(int minor) {
    int fd = mirror(minor);
    char *p = anon(8 * PAGE), *buf = anon(8 * PAGE);
    CHECK(command(fd, READ, p + 1, buf, 1) == EINVAL);
    CHECK(command(fd, READ, p, buf, 0) == EINVAL);
    CHECK(command(fd, READ, p, buf, ~0ul / PAGE) == EINVAL);
    CHECK(command(fd, 9, p, buf, 1) == EINVAL);
    for (int i = 0; i < 2; i++) { // beyond the address space, and far past its mappings
        char *far = i ? (char *)0x800000000000 : p;
        size_t pages = i ? 1 : 1ul << 45;
        int r = command(fd, READ, far, buf, pages);
        CHECK(r == EFAULT || r == ENOMEM);
        CHECK(command(fd, TO_DEV, far, buf, pages) == EINVAL);
        CHECK(command(fd, TO_SYS, far, buf, pages) == EINVAL);
    }
    CHECK(command(fd, READ, p, (void *)16, 1) == EFAULT);
    CHECK(ioctl(fd, 0xc0284800ul, (void *)16) == -1 && errno == EFAULT);
    CHECK(ioctl(fd, 0x5401ul, &last) == -1 && errno == EINVAL);
    munmap(p + PAGE, PAGE);
    CHECK(command(fd, READ, p, buf, 3) == EFAULT);
    CHECK(command(fd, TO_DEV, p, buf, 3) == EINVAL);
    CHECK(command(fd, TO_SYS, p, buf, 3) == EINVAL);
    mprotect(p + 2 * PAGE, PAGE, PROT_NONE);
    CHECK(command(fd, READ, p + 2 * PAGE, buf, 1) == EFAULT);
    CHECK(command(fd, WRITE, p + 2 * PAGE, buf, 1) == EFAULT);
    CHECK(command(fd, TO_DEV, p + 2 * PAGE, buf, 1) == EINVAL);
    mprotect(p + 2 * PAGE, PAGE, PROT_READ);
    CHECK(command(fd, WRITE, p + 2 * PAGE, buf, 1) == EPERM);
    char *shared = map(PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS);
    CHECK(command(fd, TO_DEV, shared, buf, 1) == ENOENT);
    CHECK(open("/dev/hmm_dmirror4", O_RDWR) == -1 && errno == ENOENT);
    CHECK(command(fd, TO_DEV, p + 3 * PAGE, buf, 1) == 0 && last.cpages == 1);
    int other = mirror(minor ^ 1);
    CHECK(command(other, TO_DEV, p + 3 * PAGE, buf, 1) == ENOENT);
    CHECK(close(fd) == 0 && close(other) == 0);
    CHECK(ioctl(fd, 0xc0284800ul, &last) == -1 && errno == EBADF);
}

// The first use faults once; what has not changed is reached without.
static void faults(int minor) {
    int fd = mirror(minor);
    char *p = anon(16 * PAGE), *buf = anon(16 * PAGE);
    fill(p, 16 * PAGE, 1);
    CHECK(command(fd, READ, p, buf, 16) == 0 && last.cpages == 16 && last.faults == 1 && holds(buf, 16 * PAGE, 1));
    CHECK(command(fd, READ, p, buf, 16) == 0 && last.faults == 0);
    CHECK(command(fd, WRITE, p, buf, 16) == 0 && last.faults == 0);
    mprotect(p, 16 * PAGE, PROT_READ);
    CHECK(command(fd, READ, p, buf, 16) == 0 && last.faults == 1);
    mprotect(p, 16 * PAGE, PROT_READ | PROT_WRITE);
    fill(buf, 16 * PAGE, 2);
    CHECK(command(fd, WRITE, p, buf, 16) == 0 && last.faults == 1 && holds(p, 16 * PAGE, 2));
    madvise(p, 16 * PAGE, MADV_DONTNEED);
    CHECK(command(fd, READ, p, buf, 16) == 0 && last.faults == 1 && buf[100] == 0);
    CHECK(command(fd, TO_DEV, p, buf, 16) == 0);
    CHECK(command(fd, READ, p, buf, 16) == 0 && last.faults == 0);
    fill(buf, 16 * PAGE, 3);
    CHECK(command(fd, WRITE, p, buf, 16) == 0 && last.faults == 0 && holds(p, 16 * PAGE, 3));
}

// A page that is migrated is out of the process, and comes back when it is touched: it alone.
static void migrate(int minor) {
    size_t pages = 4096;
    int fd = mirror(minor), other = mirror(minor ^ 1);
    char *p = anon(pages * PAGE), *buf = anon(pages * PAGE);
    unsigned char *seen = malloc(pages);
    int coherent = minor >= 2;
    fill(p, pages * PAGE, 7);
    memset(buf, 1, pages * PAGE);
    unsigned long before = status("RssAnon:");
    CHECK(command(fd, TO_DEV, p, buf, pages) == 0 && last.cpages == pages && holds(buf, pages * PAGE, 7));
    CHECK(before - status("RssAnon:") > pages * 4 * 9 / 10);
    CHECK(command(fd, SNAPSHOT, p, seen, pages) == 0 && last.cpages == pages);
    for (size_t i = 0; i < pages; i++) CHECK(seen[i] == (coherent ? 0x42 : 0x22));
    CHECK(command(other, SNAPSHOT, p, seen, pages) == 0);
    for (size_t i = 0; i < pages; i++) CHECK(seen[i] == (coherent ? 0x52 : 0));
    uint64_t word = pagemap(p + 5 * PAGE);
    CHECK(coherent ? word >> 63 : (word >> 62) == 1);
    CHECK(((volatile unsigned *)(p + 9 * PAGE))[0] == 7 + (unsigned)(9 * 1024) * 2654435761u);
    CHECK(command(fd, SNAPSHOT, p, seen, pages) == 0);
    CHECK(seen[8] == (coherent ? 0x42 : 0x22) && seen[10] == seen[8] && seen[9] == (coherent ? 0x42 : 0x02));
    ((volatile unsigned *)(p + 9 * PAGE))[0] += 0;
    CHECK(command(fd, TO_SYS, p, buf, pages) == 0 && last.cpages == (coherent ? pages : pages - 1));
    CHECK(holds(p, pages * PAGE, 7));
    // Holes, read-only pages, and everything that a release brings back.
    char *hole = anon(4 * PAGE);
    fill(hole, PAGE, 9);
    mprotect(hole, 4 * PAGE, PROT_READ);
    CHECK(command(fd, TO_DEV, hole, buf, 4) == 0 && last.cpages == 4 && holds(buf, PAGE, 9) && buf[PAGE] == 0);
    CHECK(command(fd, SNAPSHOT, hole, seen, 4) == 0 && seen[0] == (coherent ? 0x41 : 0x21) && seen[3] == seen[0]);
    CHECK(command(fd, RELEASE, hole, buf, 1) == 0);
    CHECK(command(fd, SNAPSHOT, hole, seen, 4) == 0 && seen[0] == 1);
    CHECK(holds(hole, PAGE, 9) && hole[3 * PAGE] == 0);
    // And closing, too.
    CHECK(command(fd, TO_DEV, p, buf, pages) == 0);
    int copy = dup(fd);
    close(fd);
    CHECK(command(copy, SNAPSHOT, p, seen, 1) == 0 && seen[0] == (coherent ? 0x42 : 0x22));
    close(copy);
    CHECK(pagemap(p) >> 63 && holds(p, pages * PAGE, 7));
}

static void forks(int minor) {
    int fd = mirror(minor);
    size_t len = 64 * PAGE;
    char *p = anon(len), *buf = anon(len);
    fill(p, len, 1);
    CHECK(command(fd, TO_DEV, p, buf, 64) == 0);
    pid_t child = fork();
    if (child == 0) {
        CHECK(command(fd, READ, p, buf, 1) == EINVAL); // it mirrors the parent
        CHECK(holds(p, len, 1));
        int own = mirror(minor);
        CHECK(command(own, TO_DEV, p, buf, 64) == 0 && holds(buf, len, 1));
        pid_t grandchild = fork();
        if (grandchild == 0) {
            CHECK(holds(p, len, 1));
            int third = mirror(minor);
            fill(buf, len, 3);
            CHECK(command(third, WRITE, p, buf, 64) == 0 && last.faults == 1 && holds(p, len, 3));
            CHECK(command(third, TO_DEV, p, buf, 64) == 0 && holds(buf, len, 3));
            _exit(0);
        }
        int status = 1;
        CHECK(waitpid(grandchild, &status, 0) == grandchild && status == 0);
        CHECK(holds(p, len, 1));
        fill(p, len, 2);
        CHECK(command(own, TO_DEV, p, buf, 64) == 0 && holds(buf, len, 2));
        raise(SIGKILL);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    CHECK(holds(p, len, 1));
    CHECK(command(fd, TO_DEV, p, buf, 64) == 0 && holds(buf, len, 1));
    CHECK(holds(p, len, 1));
}

static void mappings(int minor) {
    int fd = mirror(minor);
    char *buf = anon(HUGE);
    for (int round = 0; round < 3; round++) {
        char *p = anon(4 * HUGE);
        fill(p, HUGE, 5);
        CHECK(command(fd, TO_DEV, p, buf, HUGE / PAGE) == 0 && holds(buf, HUGE, 5));
        char *to = p + 2 * HUGE;
        int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (round == 1 ? MREMAP_DONTUNMAP : 0);
        CHECK(mremap(p, HUGE, HUGE, flags, to) == to && holds(to, HUGE, 5));
        CHECK(command(fd, TO_DEV, to, buf, HUGE / PAGE) == 0);
        munmap(to + HUGE / 4, HUGE / 2);
        CHECK(holds(to, HUGE / 4, 5));
        CHECK(*(unsigned *)(to + HUGE * 3 / 4) == 5 + (unsigned)(HUGE * 3 / 16) * 2654435761u);
        CHECK(command(fd, TO_DEV, to, buf, HUGE / 4 / PAGE) == 0);
        CHECK(madvise(to, HUGE / 4, round == 2 ? MADV_FREE : MADV_DONTNEED) == 0);
        if (round != 2) CHECK(to[5] == 0 && to[HUGE / 4 - 1] == 0);
        munmap(p, 4 * HUGE);
    }
    // A private mapping of a file: what was written moves; what is the file's does not.
    int file = memfd_create("file", 0);
    CHECK(ftruncate(file, 8 * PAGE) == 0);
    char *p = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    fill(p, 4 * PAGE, 6);
    CHECK(command(fd, TO_DEV, p, buf, 4) == 0 && holds(buf, 4 * PAGE, 6) && holds(p, 4 * PAGE, 6));
    CHECK(command(fd, TO_DEV, p + 4 * PAGE, buf, 1) == ENOENT);
    char *shared = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    fill(buf, 8 * PAGE, 8);
    CHECK(command(fd, WRITE, shared, buf, 8) == 0 && last.faults == 1);
    CHECK(pread(file, buf + 8 * PAGE, 8 * PAGE, 0) == (ssize_t)(8 * PAGE) && holds(buf + 8 * PAGE, 8 * PAGE, 8));
    // Memory of the device itself: zeros, a mapping's own.
    unsigned char seen = 9;
    char *device = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(device != MAP_FAILED && command(fd, SNAPSHOT, device, &seen, 1) == 0 && seen == 1 && device[0] == 0);
    CHECK(command(fd, TO_DEV, device, buf, 1) == EINVAL);
}

static void snapshot(int minor) {
    int fd = mirror(minor);
    unsigned char seen[6];
    char *p = map(6 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS);
    munmap(p + PAGE, PAGE);
    mprotect(p + 2 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE);
    CHECK(((volatile char *)p)[2 * PAGE] == 0);
    p[3 * PAGE] = p[4 * PAGE] = 1;
    mprotect(p + 3 * PAGE, PAGE, PROT_READ);
    CHECK(command(fd, SNAPSHOT, p, seen, 6) == 0 && last.cpages == 6);
    CHECK(seen[0] == 0xff && seen[1] == 0xff && seen[2] == 0x11 && seen[3] == 1 && seen[4] == 2 && seen[5] == 0);
    CHECK(command(fd, SNAPSHOT, p, (void *)16, 6) == EFAULT);
}

static void exclusive(int minor) {
    int fd = mirror(minor);
    char *p = anon(32 * PAGE), *buf = anon(32 * PAGE);
    fill(p, 32 * PAGE, 4);
    CHECK(command(fd, EXCLUSIVE, p, buf, 32) == 0 && last.cpages == 32 && holds(buf, 32 * PAGE, 4));
    CHECK(command(fd, CHECK_EXCLUSIVE, p, buf, 32) == EPERM);
    ((volatile char *)p)[0] += 0;
    CHECK(command(fd, CHECK_EXCLUSIVE, p, buf, 1) == 0);
    CHECK(command(fd, CHECK_EXCLUSIVE, p + PAGE, buf, 1) == EPERM);
    CHECK(holds(p, 32 * PAGE, 4));
    CHECK(command(fd, CHECK_EXCLUSIVE, p, buf, 32) == 0);
    mprotect(p, 32 * PAGE, PROT_READ);
    CHECK(command(fd, EXCLUSIVE, p, buf, 32) == EFAULT);
}

static void huge(int minor) {
    int fd = mirror(minor);
    size_t n = HUGE / PAGE;
    unsigned char *seen = malloc(n);
    char *raw = anon(2 * HUGE), *buf = anon(HUGE);
    char *p = (char *)(((uintptr_t)raw + HUGE - 1) & ~(HUGE - 1));
    madvise(p, HUGE, MADV_HUGEPAGE);
    fill(p, HUGE, 1);
    if (madvise(p, HUGE, MADV_COLLAPSE) != 0) {
        printf("SKIP no huge page to be had\n");
        exit(77);
    }
    CHECK(command(fd, SNAPSHOT, p, seen, n) == 0 && seen[0] == 6 && seen[n - 1] == 6);
    CHECK(command(fd, TO_DEV, p, buf, n) == 0 && holds(buf, HUGE, 1));
    CHECK(command(fd, SNAPSHOT, p, seen, n) == 0);
    for (size_t i = 0; i < n; i++) CHECK(seen[i] == (minor >= 2 ? 0x42 : 0x26));
    CHECK(command(fd, TO_SYS, p, buf, n) == 0 && last.cpages == n && holds(p, HUGE, 1));
    if (minor < 2) {
        CHECK(madvise(p, HUGE, MADV_COLLAPSE) == 0);
        CHECK(command(fd, FLAGS, p, buf, 1) == 0);
        CHECK(command(fd, TO_DEV, p, buf, n) == 0 && last.cpages == n);
        CHECK(command(fd, SNAPSHOT, p, seen, n) == 0 && seen[0] == 0x22);
    }
    CHECK(holds(p, HUGE, 1));
}

// Huge ranges in which nothing was ever written, and MADV_FREE of one that is away.
static void huge_zero(int minor) {
    int fd = mirror(minor);
    size_t n = HUGE / PAGE;
    char *buf = anon(HUGE);
    for (int round = 0; round < 4; round++) {
        char *raw = map(2 * HUGE, PROT_READ | (round < 2 ? 0 : PROT_WRITE), MAP_PRIVATE | MAP_ANONYMOUS);
        char *p = (char *)(((uintptr_t)raw + HUGE - 1) & ~(HUGE - 1));
        CHECK(madvise(p, HUGE, MADV_HUGEPAGE) == 0 || errno == EINVAL);
        if (round % 2) CHECK(((volatile char *)p)[0] == 0);
        memset(buf, 0xff, HUGE);
        if (round == 3) CHECK(command(fd, FLAGS, p, buf, 1) == 0);
        CHECK(command(fd, TO_DEV, p, buf, n) == 0 && last.cpages == n);
        for (size_t i = 0; i < HUGE; i++) CHECK(buf[i] == 0);
        if (round == 2) CHECK(madvise(p, HUGE, MADV_FREE) == 0);
        for (size_t i = 0; i < HUGE; i++) CHECK(p[i] == 0);
        munmap(raw, 2 * HUGE);
    }
}

static void all(int fd, char *p, size_t pages, int want) {
    unsigned char *seen = malloc(pages);
    CHECK(seen && command(fd, SNAPSHOT, p, seen, pages) == 0);
    for (size_t i = 0; i < pages; i++)
        if (seen[i] != want) {
            fprintf(stderr, "page %zu is %#x, not %#x\n", i, seen[i], want);
            exit(1);
        }
    free(seen);
}

static char *huge_place(int prot) {
    char *raw = map(2 * HUGE, prot, MAP_PRIVATE | MAP_ANONYMOUS);
    char *p = (char *)(((uintptr_t)raw + HUGE - 1) & ~(HUGE - 1));
    CHECK(madvise(p, HUGE, MADV_HUGEPAGE) == 0 || errno == EINVAL);
    return p;
}

static void collapse(char *p) {
    if (madvise(p, HUGE, MADV_COLLAPSE) != 0) {
        printf("SKIP no huge page to be had\n");
        exit(77);
    }
}

// A huge page that is touched on a private device comes back as one, unless it has been split there.
static void huge_fault(int minor) {
    int fd = mirror(minor);
    size_t n = HUGE / PAGE;
    char *buf = anon(HUGE);
    int away = minor >= 2 ? 0x42 : 0x26;
    for (int round = 0; round < 6; round++) {
        char *p = huge_place(PROT_READ | PROT_WRITE);
        fill(p, HUGE, round);
        collapse(p);
        all(fd, p, n, 6);
        CHECK(command(fd, TO_DEV, p, buf, n) == 0 && last.cpages == n && holds(buf, HUGE, round));
        all(fd, p, n, away);
        if (minor >= 2) { // never faults
            CHECK(holds(p, HUGE, round));
            all(fd, p, n, away);
            continue;
        }
        volatile unsigned *word = (unsigned *)(p + 77 * PAGE);
        if (round == 0) CHECK(*word == 77 * 1024 * 2654435761u);
        if (round == 1) *word += 0;
        if (round < 2) all(fd, p, n, 6);
        if (round == 2) { // a part of it goes: page by page from now on
            CHECK(munmap(p + HUGE / 2, HUGE / 2) == 0);
            all(fd, p, n / 2, 0x22);
            *word += 0;
            all(fd, p, 77, 0x22);
            all(fd, p + 78 * PAGE, n / 2 - 78, 0x22);
            CHECK(holds(p, HUGE / 2, round));
            continue;
        }
        if (round == 3) { // one page comes back by itself, and what is left is small
            CHECK(command(fd, TO_SYS, p + PAGE, buf, 1) == 0 && last.cpages == 1);
            *word += 0;
            all(fd, p + 2 * PAGE, 75, 0x22);
        }
        if (round == 4) { // when it leaves again in pieces it is no huge page any more
            CHECK(command(fd, TO_SYS, p + PAGE, buf, 1) == 0 && command(fd, TO_DEV, p + PAGE, buf, 1) == 0);
            all(fd, p, n, 0x22);
            *word += 0;
            all(fd, p, 77, 0x22);
        }
        if (round == 5) { // a child and its parent each get all of it
            pid_t child = fork();
            if (child == 0) {
                CHECK(holds(p, HUGE, round));
                fill(p, HUGE, 99);
                _exit(0);
            }
            int status = 1;
            CHECK(waitpid(child, &status, 0) == child && status == 0);
        }
        CHECK(holds(p, HUGE, round));
        CHECK(command(fd, TO_DEV, p, buf, n) == 0 && holds(buf, HUGE, round) && holds(p, HUGE, round));
    }
}

// The paths and descriptors are those of devices, before the first is opened, too.
static void paths(int minor) {
    char path[32];
    struct stat st, other;
    snprintf(path, sizeof path, "/dev/hmm_dmirror%d", minor);
    CHECK(access(path, F_OK) == 0 && access(path, R_OK | W_OK) == 0);
    CHECK(access(path, X_OK) == -1 && errno == EACCES);
    CHECK(access(path, 64) == -1 && errno == EINVAL);
    CHECK(access("/dev/hmm_dmirror4", F_OK) == -1 && errno == ENOENT);
    CHECK(stat("/dev/hmm_dmirror4", &st) == -1 && errno == ENOENT);
    CHECK(stat(path, &st) == 0 && S_ISCHR(st.st_mode) && st.st_nlink == 1 && st.st_rdev == makedev(major(st.st_rdev), minor));
    CHECK(lstat(path, &other) == 0 && other.st_rdev == st.st_rdev && other.st_mode == st.st_mode);
    CHECK(fstatat(AT_FDCWD, path, &other, 0) == 0 && other.st_rdev == st.st_rdev);
    struct statx x;
    CHECK(statx(AT_FDCWD, path, 0, STATX_BASIC_STATS, &x) == 0 && x.stx_mode == st.st_mode);
    CHECK(x.stx_rdev_major == major(st.st_rdev) && x.stx_rdev_minor == (unsigned)minor && x.stx_uid == st.st_uid);
    CHECK(statx(AT_FDCWD, "/", 0, STATX_BASIC_STATS, &x) == 0 && S_ISDIR(x.stx_mode));
    CHECK(faccessat(AT_FDCWD, path, R_OK, 0) == 0 && faccessat(AT_FDCWD, "/", X_OK, AT_EACCESS) == 0);
    int fd = mirror(minor);
    CHECK(fstat(fd, &other) == 0 && other.st_rdev == st.st_rdev && S_ISCHR(other.st_mode) && other.st_size == 0);
    pid_t child = fork();
    if (child == 0) _exit(fstat(fd, &other) != 0 || other.st_rdev != st.st_rdev || !S_ISCHR(other.st_mode));
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(stat("/sys/kernel/debug/gup_test", &st) == 0 && S_ISREG(st.st_mode) && access("/sys/kernel/debug/gup_test", W_OK) == 0);
    CHECK(stat("/proc/self/exe", &st) == 0 && S_ISREG(st.st_mode) && lstat("/proc/self/exe", &other) == 0 && S_ISLNK(other.st_mode));
    CHECK(fstat(0, &other) == 0 && fstat(99, &other) == -1 && errno == EBADF && access("/", F_OK) == 0);
}

// A huge page on a device that is moved stays one where it is aligned.
static void huge_move(int minor) {
    if (minor >= 2) return;
    int fd = mirror(minor);
    size_t n = HUGE / PAGE;
    char *buf = anon(HUGE);
    for (int round = 0; round < 3; round++) {
        char *p = huge_place(PROT_READ | PROT_WRITE);
        char *raw = map(4 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS);
        char *to = (char *)(((uintptr_t)raw + HUGE - 1) & ~(HUGE - 1)) + (round == 1 ? PAGE : 0);
        fill(p, HUGE, round);
        collapse(p);
        CHECK(command(fd, TO_DEV, p, buf, n) == 0);
        all(fd, p, n, 0x26);
        size_t len = round == 2 ? HUGE / 2 : HUGE;
        CHECK(mremap(p, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
        all(fd, to, len / PAGE, round == 0 ? 0x26 : 0x22);
        if (round == 2) all(fd, p + len, len / PAGE, 0x22);
        CHECK(*(volatile unsigned *)(to + PAGE) == round + 1024 * 2654435761u);
        all(fd, to + 2 * PAGE, len / PAGE - 2, round == 0 ? 6 : 0x22);
        CHECK(holds(to, len, round));
    }
}

// Two MiB in which there is nothing, or the huge zero page, leave as one page.
static void huge_empty(int minor) {
    if (minor >= 2) return;
    int fd = mirror(minor);
    size_t n = HUGE / PAGE;
    char *buf = anon(2 * HUGE);
    for (int round = 0; round < 6; round++) {
        int write = round % 2;
        char *p = huge_place(PROT_READ | (write ? PROT_WRITE : 0));
        int small = write ? 0x22 : 0x21;
        if (round < 2) CHECK(((volatile char *)p)[5] == 0); // the zero page, huge if the machine has it
        if (round / 2 == 1) CHECK(command(fd, FLAGS, p, buf, 1) == 0);
        int at = round / 2 == 2 ? HUGE / 2 : 0; // half of it first: small pages
        if (at) CHECK(command(fd, TO_DEV, p, buf, n / 2) == 0);
        memset(buf, 0xff, HUGE);
        CHECK(command(fd, TO_DEV, p + at, buf, n - at / PAGE) == 0 && last.cpages == n - at / PAGE);
        for (size_t i = 0; i < HUGE - at; i++) CHECK(buf[i] == 0);
        unsigned char seen = 0;
        CHECK(command(fd, SNAPSHOT, p, &seen, 1) == 0);
        if (round >= 2) CHECK(seen == small);
        if (round < 2) CHECK(seen == small || seen == (small | 4));
        all(fd, p, n, seen);
        for (size_t i = 0; i < HUGE; i++) CHECK(p[i] == 0);
    }
    for (int write = 0; write < 2; write++) { // nothing there at all
        char *p = huge_place(PROT_READ | (write ? PROT_WRITE : 0));
        CHECK(command(fd, TO_DEV, p, buf, n) == 0 && last.cpages == n);
        all(fd, p, n, write ? 0x26 : 0x25);
        CHECK(((volatile char *)p)[5] == 0);
        CHECK(pagemap(p) >> 63 && pagemap(p + HUGE - PAGE) >> 63); // all of it came back
        if (write) all(fd, p, n, 6);
    }
    // A huge page that the range does not begin with goes in small ones: the device looks at two MiB at a time.
    char *raw = map(4 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS);
    char *p = (char *)(((uintptr_t)raw + HUGE - 1) & ~(HUGE - 1)) + HUGE;
    CHECK(command(fd, TO_DEV, p - PAGE, buf, n + 1) == 0);
    all(fd, p, n, 0x22);
}

// On devices of 1 MiB, which each process of this test fills: what those held that were killed is free again, or the next
// would find no room.
static void killed(int minor) {
    size_t n = 256;
    char *p = anon(n * PAGE), *buf = anon(n * PAGE);
    fill(p, n * PAGE, 1);
    int fd = mirror(minor);
    CHECK(command(fd, TO_DEV, p, buf, n) == 0 && holds(buf, n * PAGE, 1));
    char *more = anon(PAGE);
    more[0] = 5;
    CHECK(command(fd, TO_DEV, more, buf, 1) == ENOENT && more[0] == 5); // full
    CHECK(holds(p, n * PAGE, 1));
    for (int round = 0; round < 6; round++) {
        CHECK(command(fd, TO_SYS, p, buf, n) == 0);
        int ready[2];
        char c;
        CHECK(pipe(ready) == 0);
        pid_t child = fork();
        if (child == 0) {
            int own = mirror(minor);
            fill(p, n * PAGE, 10 + round);
            CHECK(command(own, TO_DEV, p, buf, n) == 0 && last.cpages == n);
            CHECK(write(ready[1], "", 1) == 1);
            pause();
        }
        close(ready[1]);
        CHECK(read(ready[0], &c, 1) == 1);
        CHECK(command(fd, TO_DEV, p, buf, n) == ENOENT);
        CHECK(holds(p, n * PAGE, 1));
        CHECK(command(fd, TO_SYS, p, buf, n) == 0);
        CHECK(kill(child, SIGKILL) == 0);
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        if (round % 2) { // a fork finds the dead, too
            pid_t other = fork();
            if (other == 0) _exit(0);
            CHECK(waitpid(other, &status, 0) == other && status == 0);
        }
        close(ready[0]);
        CHECK(command(fd, TO_DEV, p, buf, n) == 0 && last.cpages == n && holds(buf, n * PAGE, 1));
    }
    close(fd);
}

// Whoever has opened the page map goes on mapping and unmapping, and the manager's own looks at it are the kernel's.
static void page_map(int minor) {
    int fd = mirror(minor);
    size_t n = 64;
    char *p = anon(n * PAGE), *kept = anon(n * PAGE), *buf = anon(n * PAGE);
    fill(p, n * PAGE, 1);
    fill(kept, n * PAGE, 2);
    CHECK(command(fd, TO_DEV, p, buf, n) == 0 && command(fd, TO_DEV, kept, buf, n) == 0);
    for (size_t i = 0; i < n; i++) CHECK(minor >= 2 ? pagemap(p + i * PAGE) >> 63 : pagemap(p + i * PAGE) >> 62 == 1);
    CHECK(munmap(p + n / 2 * PAGE, n / 2 * PAGE) == 0 && holds(p, n / 2 * PAGE, 1));
    CHECK(munmap(p, n / 2 * PAGE) == 0);
    char *moved = mremap(kept, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, anon(n * PAGE));
    CHECK(moved != MAP_FAILED && holds(moved, n * PAGE, 2));
    CHECK(command(fd, TO_DEV, moved, buf, n) == 0 && holds(buf, n * PAGE, 2));
    CHECK(madvise(moved, n * PAGE, MADV_DONTNEED) == 0 && moved[0] == 0 && pagemap(moved) >> 63);
}

static int stop;
static char *raced;
static void *toucher(void *arg) {
    volatile unsigned *count = arg;
    while (!__atomic_load_n(&stop, __ATOMIC_SEQ_CST))
        for (int i = 0; i < 16; i++) __atomic_fetch_add((unsigned *)(raced + i * PAGE), 1, __ATOMIC_SEQ_CST), ++*count;
    return NULL;
}

// Nothing that a thread writes meanwhile is lost.
static void threads(int minor) {
    int fd = mirror(minor);
    char *buf = anon(16 * PAGE);
    unsigned count[2] = {0};
    pthread_t t[2];
    raced = anon(16 * PAGE);
    for (int i = 0; i < 2; i++) pthread_create(&t[i], NULL, toucher, &count[i]);
    for (int i = 0; i < 150; i++) {
        int r = command(fd, i % 2 ? TO_SYS : TO_DEV, raced, buf, 16);
        CHECK(r == 0 || r == ENOENT);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    unsigned sum = 0;
    for (int i = 0; i < 2; i++) pthread_join(t[i], NULL);
    for (int i = 0; i < 16; i++) sum += *(unsigned *)(raced + i * PAGE);
    CHECK(sum == count[0] + count[1]);
}

static void *wide_toucher(void *arg) {
    unsigned *count = arg;
    for (unsigned x = 1 + (unsigned)(uintptr_t)arg; !__atomic_load_n(&stop, __ATOMIC_SEQ_CST); ++*count) {
        x = x * 1103515245 + 12345;
        __atomic_fetch_add((unsigned *)(raced + x / 65536 % (HUGE / PAGE) * PAGE), 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

// Nor where two threads touch a huge page on the device at once, while it leaves, comes back, is made anew and shared with children.
static void huge_threads(int minor) {
    int fd = mirror(minor);
    size_t n = HUGE / PAGE;
    char *buf = anon(HUGE);
    unsigned count[2] = {0}, whole = 0;
    pthread_t t[2];
    raced = huge_place(PROT_READ | PROT_WRITE);
    memset(raced, 0, HUGE);
    for (int i = 0; i < 2; i++) pthread_create(&t[i], NULL, wide_toucher, &count[i]);
    for (int i = 0; i < (minor < 2 ? 100 : 15); i++) {
        whole += madvise(raced, HUGE, MADV_COLLAPSE) == 0;
        int r = command(fd, TO_DEV, raced, buf, n);
        CHECK(r == 0 || r == ENOENT);
        if (i % 3 == 0) CHECK(command(fd, TO_SYS, raced, buf, i % 2 ? n : 1) == 0);
        if (i % 14 == 13) {
            pid_t child = fork();
            if (child == 0) {
                for (size_t k = 0; k < n; k++) *(volatile unsigned *)(raced + k * PAGE) = 0;
                _exit(0);
            }
            int status = 1;
            CHECK(waitpid(child, &status, 0) == child && status == 0);
        }
    }
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    unsigned sum = 0;
    for (int i = 0; i < 2; i++) pthread_join(t[i], NULL);
    for (size_t i = 0; i < n; i++) sum += *(unsigned *)(raced + i * PAGE);
    CHECK(sum == count[0] + count[1]);
    if (whole == 0) {
        printf("SKIP no huge page to be had\n");
        exit(77);
    }
}

static void gup(int minor) {
    struct {
        uint64_t get, put, addr, size;
        uint32_t per_call, flags, test, which[9];
    } g = {0};
    _Static_assert(sizeof g == 80, "");
    int fd = mirror(minor), gup = open("/sys/kernel/debug/gup_test", O_RDWR);
    CHECK(gup >= 0);
    char *p = anon(8 * PAGE), *buf = anon(8 * PAGE);
    unsigned char seen[8];
    fill(p, 8 * PAGE, 1);
    CHECK(command(fd, TO_DEV, p, buf, 8) == 0);
    for (unsigned nr = 1; nr <= 6; nr++) {
        g.addr = (uintptr_t)p + (nr - 1) * PAGE, g.size = PAGE, g.per_call = 1, g.flags = 1;
        CHECK(ioctl(gup, 0xc0506700 + nr, &g) == 0 && g.size == PAGE);
    }
    CHECK(command(fd, SNAPSHOT, p, seen, 8) == 0);
    CHECK(seen[0] == (minor >= 2 ? 0x42 : 2) && seen[2] == 2 && seen[7] == (minor >= 2 ? 0x42 : 0x22));
    struct {
        uint64_t addr, size;
        uint32_t flags;
    } l = {(uintptr_t)p, 8 * PAGE, 1};
    CHECK(ioctl(gup, 0x6708, 0) == -1 && errno == EINVAL);
    CHECK(ioctl(gup, 0x40186707, &l) == 0);
    CHECK(ioctl(gup, 0x40186707, &l) == -1 && errno == EINVAL);
    uint64_t to = (uintptr_t)buf;
    CHECK(ioctl(gup, 0x40086709, &to) == 0 && holds(buf, 8 * PAGE, 1));
    CHECK(command(fd, TO_DEV, p, buf, 1) == ENOENT); // what is pinned stays
    CHECK(ioctl(gup, 0x6708, 0) == 0);
    CHECK(command(fd, TO_DEV, p, buf, 1) == 0 && holds(p, 8 * PAGE, 1));
    CHECK(ioctl(gup, 0x5401, &l) == -1 && errno == EINVAL);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(int);
    } cases[] = {{"errors", errors},     {"faults", faults},       {"migrate", migrate},
                 {"forks", forks},       {"mappings", mappings},   {"snapshot", snapshot},
                 {"exclusive", exclusive}, {"huge", huge}, {"page-map", page_map}, {"huge-threads", huge_threads}, {"paths", paths}, {"huge-move", huge_move}, {"killed", killed}, {"huge-fault", huge_fault}, {"huge-empty", huge_empty}, {"huge-zero", huge_zero},         {"threads", threads}, {"gup", gup}};
    CHECK(argc == 3);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (strcmp(cases[i].name, argv[1]) == 0) {
            cases[i].run(atoi(argv[2]));
            return 0;
        }
    fprintf(stderr, "no case %s\n", argv[1]);
    return 2;
}

/* System calls whose arguments and buffers lie in pages that are away. */
#include "common.h"
#include "uring.h"
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <setjmp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>

static char *data;
static size_t pages;

static void setup(void) {
    pages = data_bytes / 4 / PAGE;
    data = map_pages(pages);
    fill(data, pages, 1, 0);
    make_ballast(data_bytes * 3 / 4);
}

static void away(void) {
    evict(data, pages * PAGE);
    pressure();
}

static int temp_file(void) {
    char path[] = "/tmp/farpage-test-XXXXXX";
    int fd = mkstemp(path);
    if (fd < 0) die("mkstemp");
    ok(unlink(path) == 0);
    return fd;
}

static void write_all(int fd, const char *p, size_t len) {
    while (len > 0) {
        ssize_t n = write(fd, p, len);
        if (n <= 0) die("write returned %zd", n);
        p += n;
        len -= (size_t)n;
    }
}
static void files(void) {
    setup();
    int fd = temp_file();
    size_t len = pages * PAGE;
    away();
    write_all(fd, data, len);
    away();
    fill(data, pages, 2, 0);
    away();
    /* pread in odd pieces that cross pages, into pages that are away. */
    for (size_t off = 0; off < len;) {
        size_t want = 10000 + off % 7919;
        if (want > len - off) want = len - off;
        ssize_t n = pread(fd, data + off, want, (off_t)off);
        if (n <= 0) die("pread at %zu: %zd", off, n);
        off += (size_t)n;
    }
    check(data, pages, 1, 0, "pread");
    /* writev and readv over scattered pages, the vector itself in a page that is away. */
    struct iovec *iov = map_bytes(MIB);
    size_t many = 64;
    for (size_t i = 0; i < many; i++) iov[i] = (struct iovec){data + (i * 37 % pages) * PAGE, PAGE};
    evict(iov, MIB);
    away();
    ok(lseek(fd, 0, SEEK_SET) == 0);
    ok(writev(fd, iov, (int)many) == (ssize_t)(many * PAGE));
    for (size_t i = 0; i < many; i++) fill_page(data + (i * 37 % pages) * PAGE, 3, i);
    evict(iov, MIB);
    away();
    ok(lseek(fd, 0, SEEK_SET) == 0);
    ok(readv(fd, iov, (int)many) == (ssize_t)(many * PAGE));
    check(data, pages, 1, 0, "readv");
    /* The same by the instruction. */
    fill(data, 64, 4, 0);
    away();
    ok(RAW(SYS_pwrite64, fd, data, 64 * PAGE, 0, 0, 0) == (long)(64 * PAGE));
    fill(data, 64, 5, 0);
    away();
    ok(RAW(SYS_pread64, fd, data, 64 * PAGE, 0, 0, 0) == (long)(64 * PAGE));
    check(data, 64, 4, 0, "raw pread");
}

/* Small structures that the kernel reads or fills in. */
static void small(void) {
    setup();
    char *room = map_bytes(2 * MIB);
    char *path = room + 3 * PAGE - 6; /* crosses a page */
    struct stat *st = (struct stat *)(room + 5 * PAGE - 40);
    char *cwd = room + 8 * PAGE - 3;
    char here[PATH_MAX];
    struct stat want;
    ok(getcwd(here, sizeof here) && stat("/", &want) == 0);
    for (int n = 0; n < 8; n++) {
        strcpy(path, "/../../../");
        memset(cwd, 'x', 64);
        evict(room, 2 * MIB);
        away();
        ok(stat(path, st) == 0);
        ok(st->st_ino == want.st_ino && st->st_dev == want.st_dev);
        evict(room, 2 * MIB);
        away();
        ok(getcwd(cwd, PATH_MAX) == cwd);
        ok(strcmp(cwd, here) == 0);
        struct timespec *ts = (struct timespec *)(room + 20 * PAGE);
        evict(room, 2 * MIB);
        ok(clock_gettime(CLOCK_MONOTONIC, ts) == 0 && ts->tv_sec > 0);
        ok(RAW(SYS_clock_gettime, CLOCK_MONOTONIC, ts + 1, 0, 0, 0, 0) == 0 && ts[1].tv_sec >= ts->tv_sec);
        int *p = (int *)(room + 30 * PAGE);
        evict(room, 2 * MIB);
        ok(pipe(p) == 0);
        struct pollfd *pfd = (struct pollfd *)(room + 31 * PAGE);
        *pfd = (struct pollfd){.fd = p[1], .events = POLLOUT};
        evict(room, 2 * MIB);
        ok(poll(pfd, 1, 1000) == 1 && pfd->revents == POLLOUT);
        int ep = epoll_create1(0);
        struct epoll_event *ev = (struct epoll_event *)(room + 40 * PAGE);
        *ev = (struct epoll_event){.events = EPOLLOUT, .data.u64 = 4711};
        evict(room, 2 * MIB);
        ok(epoll_ctl(ep, EPOLL_CTL_ADD, p[1], ev) == 0);
        memset(ev, 0, sizeof *ev);
        evict(room, 2 * MIB);
        ok(epoll_wait(ep, ev, 1, 1000) == 1 && ev->data.u64 == 4711);
        ok(close(p[0]) == 0 && close(p[1]) == 0 && close(ep) == 0);
    }
    check(data, pages, 1, 0, "beside small structures");
}

struct half {
    int fd;
    char *p;
};
static void *send_all(void *arg) {
    struct half *h = arg;
    for (size_t off = 0; off < pages * PAGE;) {
        ssize_t n = send(h->fd, data + off, pages * PAGE - off > 30000 ? 30000 : pages * PAGE - off, 0);
        if (n <= 0) die("send returned %zd", n);
        off += (size_t)n;
    }
    return NULL;
}
static void *write_through(void *arg) {
    struct half *h = arg;
    write_all(h->fd, data, pages * PAGE);
    return NULL;
}

static void sockets(void) {
    setup();
    char *copy = map_pages(pages);
    for (int n = 0; n < 3; n++) {
        int s[2];
        ok((n == 2 ? pipe(s) : socketpair(AF_UNIX, SOCK_STREAM, 0, s)) == 0);
        fill(copy, pages, 8, 0);
        evict(copy, pages * PAGE);
        away();
        struct half h = {s[1], data};
        pthread_t t = start(n == 2 ? write_through : send_all, &h);
        for (size_t off = 0; off < pages * PAGE;) {
            ssize_t got = n == 2 ? read(s[0], copy + off, pages * PAGE - off)
                                 : recv(s[0], copy + off, pages * PAGE - off, n == 1 ? MSG_WAITALL : 0);
            if (got <= 0) die("recv returned %zd", got);
            off += (size_t)got;
        }
        join(t);
        check(copy, pages, 1, 0, "received");
        ok(close(s[0]) == 0 && close(s[1]) == 0);
    }
    check(data, pages, 1, 0, "sent");
}

/* Reads and writes of one's own memory by way of the kernel. For these the kernel does not wait for a page that is away:
 * it says so (EIO, EFAULT or a short count), and never delivers other bytes. Who has touched the page gets at it. */
static ssize_t by_proc_mem(char *at, char *buffer, bool write) {
    static int mem = -1;
    if (mem < 0) mem = open("/proc/self/mem", O_RDWR);
    if (mem < 0) skip("/proc/self/mem: %s", strerror(errno));
    off_t where = (off_t)(uintptr_t)at;
    return write ? pwrite(mem, buffer, PAGE, where) : pread(mem, buffer, PAGE, where);
}
static ssize_t by_process_vm(char *at, char *buffer, bool write) {
    struct iovec here = {buffer, PAGE}, there = {at, PAGE};
    ssize_t n = write ? process_vm_writev(getpid(), &here, 1, &there, 1, 0) : process_vm_readv(getpid(), &here, 1, &there, 1, 0);
    if (n < 0 && errno == EPERM) skip("process_vm_readv: %s", strerror(errno));
    return n;
}
static void by_kernel(ssize_t (*call)(char *, char *, bool), char *at, char *buffer, bool write) {
    for (int tries = 0; tries < 10000; tries++) {
        ssize_t n = call(at, buffer, write);
        if (n == (ssize_t)PAGE) return;
        if (n < 0 && errno != EIO && errno != EFAULT) die("access to memory that is away");
        (void)*(volatile char *)at;
    }
    die("a page that was touched stays out of the kernel's reach");
}
static void procmem(void) {
    setup();
    char *copy = map_pages(1);
    ssize_t (*const calls[])(char *, char *, bool) = {by_proc_mem, by_process_vm};
    for (uint64_t c = 0; c < 2; c++) {
        away();
        for (size_t i = 0; i < pages; i += 7) {
            by_kernel(calls[c], data + i * PAGE, copy, false);
            check_page(copy, 1 + c, i, "read by way of the kernel");
        }
        away();
        for (size_t i = 0; i < pages; i++) {
            fill_page(copy, 2 + c, i);
            by_kernel(calls[c], data + i * PAGE, copy, true);
        }
        away();
        check(data, pages, 2 + c, 0, "written by way of the kernel");
    }
}

/* Words that threads wait on, in memory that is paged out all the time. */
struct shared_words {
    _Atomic uint32_t turn;
    char pad[PAGE - 4];
    pthread_mutex_t mutex;
    char pad2[PAGE];
    pthread_cond_t cond;
    char pad3[PAGE];
    long counter;
};
static struct shared_words *words;
enum { TURNS = 2000 };
static atomic_bool done;

static void *futex_player(void *arg) {
    uint32_t me = (uint32_t)(uintptr_t)arg;
    for (int n = 0; n < TURNS; n++) {
        uint32_t seen;
        while ((seen = atomic_load(&words->turn)) % 2 != me) {
            long r = syscall(SYS_futex, &words->turn, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            if (r < 0 && errno != EAGAIN && errno != EINTR) die("FUTEX_WAIT");
        }
        atomic_fetch_add(&words->turn, 1);
        ok(syscall(SYS_futex, &words->turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0) >= 0);
    }
    return NULL;
}

static void *cond_player(void *arg) {
    long me = (long)(uintptr_t)arg;
    for (int n = 0; n < TURNS; n++) {
        pthread_mutex_lock(&words->mutex);
        while (words->counter % 2 != me) pthread_cond_wait(&words->cond, &words->mutex);
        words->counter++;
        pthread_cond_broadcast(&words->cond);
        pthread_mutex_unlock(&words->mutex);
    }
    return NULL;
}

static void *pager(void *arg) {
    (void)arg;
    while (!atomic_load(&done)) {
        evict(words, MIB);
        pressure();
    }
    return NULL;
}

static void futex(void) {
    setup();
    words = map_bytes(MIB);
    pthread_mutex_init(&words->mutex, NULL);
    pthread_cond_init(&words->cond, NULL);
    pthread_t p = start(pager, NULL);
    pthread_t a = start(futex_player, (void *)0), b = start(futex_player, (void *)1);
    join(a);
    join(b);
    ok(words->turn == 2 * TURNS);
    a = start(cond_player, (void *)0);
    b = start(cond_player, (void *)1);
    join(a);
    join(b);
    ok(words->counter == 2 * TURNS);
    /* A waiter whose word is away when the time runs out, and when somebody wakes it. */
    for (int n = 0; n < 10; n++) {
        struct timespec *limit = (struct timespec *)((char *)words + 200 * PAGE);
        *limit = (struct timespec){0, 3000000};
        evict(words, MIB);
        errno = 0;
        long r = syscall(SYS_futex, &words->turn, FUTEX_WAIT_PRIVATE, 2 * TURNS, limit, NULL, 0);
        if (r != -1 || errno != ETIMEDOUT) die("FUTEX_WAIT with a limit returned %ld", r);
    }
    atomic_store(&done, true);
    join(p);
    check(data, pages, 1, 0, "beside futexes");
}

/* Signals on an alternate stack that is away. */
static char *stack;
static volatile uintptr_t nowhere = 16;
static volatile int handled;
static sigjmp_buf back;
static int deep(int n) {
    volatile char room[1024];
    memset((char *)room, n, sizeof room);
    int below = n > 0 ? deep(n - 1) : 0;
    return room[512] == (char)n ? below + 1 : -1000000;
}
static void on_signal(int s) {
    (void)s;
    char here;
    if (&here < stack || &here >= stack + MIB) die("the handler is not on its stack");
    if (deep(100) != 101) die("the handler's stack lost something");
    handled++;
}
static void on_fault(int s) {
    (void)s;
    if (deep(100) != 101) die("the handler's stack lost something");
    siglongjmp(back, 1);
}
static void altstack(void) {
    setup();
    stack = map_bytes(MIB);
    stack_t ss = {.ss_sp = stack, .ss_size = MIB};
    ok(sigaltstack(&ss, NULL) == 0);
    struct sigaction sa = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    ok(sigaction(SIGUSR1, &sa, NULL) == 0);
    for (int n = 0; n < 30; n++) {
        evict(stack, MIB);
        if (n % 3 == 0) pressure();
        ok(raise(SIGUSR1) == 0);
        ok(handled == n + 1);
    }
    /* The fault handler of a program with its stack away, too. */
    sa.sa_handler = on_fault;
    ok(sigaction(SIGSEGV, &sa, NULL) == 0);
    for (volatile int n = 0; n < 20; n++) {
        evict(stack, MIB);
        if (sigsetjmp(back, 1) == 0) {
            *(volatile int *)nowhere = 1;
            die("address 16 could be written");
        }
    }
    check(data, pages, 1, 0, "beside signals");
}

/* Threads whose stacks are managed memory and away between the calls. */
static void *on_own_stack(void *arg) {
    char *bottom = arg;
    char local[3 * PAGE];
    fill_page((char *)(((uintptr_t)local + PAGE - 1) & ~(uintptr_t)(PAGE - 1)), 12, 0);
    for (int n = 0; n < 5; n++) {
        evict(bottom, MIB);
        pressure();
        ok(deep(200) == 201);
        check_page((char *)(((uintptr_t)local + PAGE - 1) & ~(uintptr_t)(PAGE - 1)), 12, 0, "stack");
    }
    return NULL;
}
static void stacks(void) {
    setup();
    pthread_t t[4];
    for (int i = 0; i < 4; i++) {
        char *bottom = map_bytes(MIB);
        pthread_attr_t attr;
        ok(pthread_attr_init(&attr) == 0 && pthread_attr_setstack(&attr, bottom, MIB) == 0);
        ok(pthread_create(&t[i], &attr, on_own_stack, bottom) == 0);
    }
    for (int i = 0; i < 4; i++) join(t[i]);
    check(data, pages, 1, 0, "beside stacks");
}

/* io_uring: reads and writes with pressure going on. */
static void *presser(void *arg) {
    (void)arg;
    while (!atomic_load(&done)) {
        pressure();
        evict(data, pages * PAGE);
    }
    return NULL;
}

static void uring_rounds(bool fixed) {
    setup();
    struct ring r;
    ring_open(&r, 8);
    int fd = temp_file();
    size_t chunk = 16, chunks = 32; /* 32 buffers of 16 pages in the middle of the data */
    char *buf = data + (pages / 2) * PAGE;
    struct iovec iov[32];
    for (size_t i = 0; i < chunks; i++) iov[i] = (struct iovec){buf + i * chunk * PAGE, chunk * PAGE};
    away();
    if (fixed) {
        /* Eight buffers stay within the usual RLIMIT_MEMLOCK. */
        chunks = 8;
        ring_register_buffers(&r, iov, (unsigned)chunks);
    }
    pthread_t t = start(presser, NULL);
    for (uint64_t round = 1; round <= 20; round++) {
        for (int writing = 1; writing >= 0; writing--) {
            for (size_t i = 0; i < chunks; i++) {
                char *p = iov[i].iov_base;
                fill(p, chunk, writing ? 50 + round : 7, i * chunk);
            }
            for (size_t i = 0; i < chunks; i++) {
                struct io_uring_sqe sqe = {
                    .opcode = fixed ? (writing ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED)
                                    : (writing ? IORING_OP_WRITE : IORING_OP_READ),
                    .fd = fd,
                    .addr = (uintptr_t)iov[i].iov_base,
                    .len = (uint32_t)iov[i].iov_len,
                    .off = i * chunk * PAGE,
                    .buf_index = (uint16_t)(fixed ? i : 0),
                    .flags = i % 2 ? IOSQE_ASYNC : 0,
                    .user_data = i,
                };
                ring_push(&r, &sqe);
                if (r.pending == 8 || i + 1 == chunks) {
                    unsigned n = r.pending;
                    ring_submit(&r, 0);
                    while (n-- > 0) {
                        struct completion cqe = ring_pop(&r);
                        if (cqe.res != (int)(chunk * PAGE)) die("io_uring request %lu: %d", (unsigned long)cqe.user_data, cqe.res);
                    }
                }
            }
        }
        for (size_t i = 0; i < chunks; i++) check(iov[i].iov_base, chunk, 50 + round, i * chunk, "io_uring read");
    }
    atomic_store(&done, true);
    join(t);
    ok(close(r.fd) == 0);
    check(data, pages / 2, 1, 0, "before the buffers");
    check(buf + 32 * chunk * PAGE, pages - pages / 2 - 32 * chunk, 1, pages / 2 + 32 * chunk, "after the buffers");
}
static void uring(void) { uring_rounds(false); }
static void uring_fixed(void) { uring_rounds(true); }

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"files", files},   {"small", small},       {"sockets", sockets}, {"procmem", procmem},         {"futex", futex},
        {"stacks", stacks}, {"altstack", altstack}, {"uring", uring},     {"uring-fixed", uring_fixed}, {NULL, NULL},
    };
    return run_case(argc, argv, cases);
}

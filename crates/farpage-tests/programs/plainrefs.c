/* Pages that the kernel holds by a plain reference, not by a pin: they must keep their bytes for the holder
 * although the page leaves DRAM and its frame gets other work. */
#include "common.h"
#include "uring.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#ifndef MSG_ZEROCOPY
#define MSG_ZEROCOPY 0x4000000
#endif
#ifndef SO_EE_ORIGIN_ZEROCOPY
#define SO_EE_ORIGIN_ZEROCOPY 5
#endif

/* Sixteen pages are what a pipe holds. */
enum { HELD = 16 };
static char *data;
static size_t pages;

static void setup(void) {
    pages = data_bytes / 4 / PAGE;
    data = map_pages(pages);
    fill(data, pages, 1, 0);
    make_ballast(data_bytes * 3 / 4);
}

/* Pages out what is held and keeps the frames busy: with the ballast, and with fresh pages of other bytes. */
static void evict_and_reuse(char *p, size_t len) {
    evict(p, len);
    pressure();
    char *other = map_pages(pages);
    fill(other, pages, 66, 0);
    evict(other, pages * PAGE);
    fill(other, pages, 67, 0);
    pressure();
    ok(munmap(other, pages * PAGE) == 0);
}

static void read_and_check(int fd, uint64_t seed, size_t first, size_t n, const char *what) {
    static _Thread_local char copy[PAGE];
    for (size_t i = 0; i < n; i++) {
        for (size_t got = 0; got < PAGE;) {
            ssize_t r = read(fd, copy + got, PAGE - got);
            if (r <= 0) die("%s: read returned %zd", what, r);
            got += (size_t)r;
        }
        check_page(copy, seed, first + i, what);
    }
}

static long by_libc(int fd, struct iovec *iov) { return vmsplice(fd, iov, 1, 0); }
static long by_syscall(int fd, struct iovec *iov) { return syscall(SYS_vmsplice, fd, iov, 1, 0); }
static long by_instruction(int fd, struct iovec *iov) { return RAW(SYS_vmsplice, fd, iov, 1, 0, 0, 0); }

static void give(int fd, size_t first, long (*how)(int, struct iovec *)) {
    struct iovec iov = {data + first * PAGE, HELD * PAGE};
    long n = how(fd, &iov);
    if (n != (long)(HELD * PAGE)) die("vmsplice returned %ld", n);
}

static void vmsplice_rounds(long (*how)(int, struct iovec *), const char *what) {
    setup();
    for (size_t n = 0; n < 12; n++) {
        int p[2];
        ok(pipe(p) == 0);
        size_t first = n * HELD * 3;
        /* In every third round the page was away before, in every third it is fresh from a fault. */
        if (n % 3 == 0) evict(data + first * PAGE, HELD * PAGE);
        if (n % 3 == 1) check(data + first * PAGE, HELD, 1, first, what);
        give(p[1], first, how);
        evict_and_reuse(data + first * PAGE, HELD * PAGE);
        if (n % 2) check(data + first * PAGE, HELD, 1, first, what);
        read_and_check(p[0], 1, first, HELD, what);
        check(data + first * PAGE, HELD, 1, first, what);
        ok(close(p[0]) == 0 && close(p[1]) == 0);
    }
    check(data, pages, 1, 0, what);
}
static void vmsplice_libc(void) { vmsplice_rounds(by_libc, "vmsplice"); }
static void vmsplice_syscall(void) { vmsplice_rounds(by_syscall, "syscall(SYS_vmsplice)"); }
static void vmsplice_raw(void) { vmsplice_rounds(by_instruction, "SYS_vmsplice by the instruction"); }

/* The memory is unmapped, or given up, while the pipe holds its pages. */
static void vmsplice_unmap(void) {
    setup();
    for (size_t n = 0; n < 8; n++) {
        int p[2];
        ok(pipe(p) == 0);
        size_t first = n * HELD * 3;
        char *at = data + first * PAGE;
        give(p[1], first, n % 2 ? by_instruction : by_libc);
        if (n % 4 < 2) {
            ok(munmap(at, HELD * PAGE) == 0);
        } else {
            ok(madvise(at, HELD * PAGE, MADV_DONTNEED) == 0);
            check_zero(at, HELD, "after MADV_DONTNEED");
        }
        evict_and_reuse(data + pages / 2 * PAGE, pages / 2 * PAGE);
        read_and_check(p[0], 1, first, HELD, "vmsplice of what is gone since");
        ok(close(p[0]) == 0 && close(p[1]) == 0);
    }
}

/* The child holds the pipe and reads it late; parent and child both write their copies meanwhile. */
static void vmsplice_child(void) {
    setup();
    for (size_t n = 0; n < 6; n++) {
        int p[2], turn[2], late[2];
        ok(pipe(p) == 0 && pipe(turn) == 0 && pipe(late) == 0);
        size_t first = n * HELD * 3;
        char *at = data + first * PAGE;
        if (n % 2) give(p[1], first, n % 4 == 1 ? by_libc : by_instruction);
        pid_t pid = fork();
        if (pid < 0) die("fork");
        if (pid == 0) {
            char c;
            if (n % 2 == 0) give(p[1], first, by_libc);
            ok(write(turn[1], "g", 1) == 1);
            evict_and_reuse(at, HELD * PAGE);
            ok(read(late[0], &c, 1) == 1); /* the parent has made its own pressure */
            read_and_check(p[0], 1, first, HELD, "the child reads the pipe");
            check(at, HELD, 1, first, "the child's memory");
            _exit(0);
        }
        char c;
        ok(read(turn[0], &c, 1) == 1);
        evict_and_reuse(at, HELD * PAGE);
        ok(write(late[1], "l", 1) == 1);
        reap(pid, 0, "vmsplice-child");
        check(at, HELD, 1, first, "the parent's memory");
        ok(close(p[0]) == 0 && close(p[1]) == 0 && close(turn[0]) == 0 && close(turn[1]) == 0);
        ok(close(late[0]) == 0 && close(late[1]) == 0);
    }
    check(data, pages, 1, 0, "parent");
}

/* Page-sized gifts keep their bytes when the page moves on to a file, too. */
static void vmsplice_splice(void) {
    setup();
    char path[] = "/tmp/farpage-test-XXXXXX";
    int fd = mkstemp(path), p[2];
    ok(fd >= 0 && unlink(path) == 0 && pipe(p) == 0);
    for (size_t n = 0; n < 8; n++) {
        size_t first = n * HELD;
        give(p[1], first, by_libc);
        evict_and_reuse(data + first * PAGE, HELD * PAGE);
        for (size_t left = HELD * PAGE; left > 0;) {
            ssize_t s = splice(p[0], NULL, fd, NULL, left, 0);
            if (s <= 0) die("splice returned %zd", s);
            left -= (size_t)s;
        }
    }
    ok(lseek(fd, 0, SEEK_SET) == 0);
    read_and_check(fd, 1, 0, 8 * HELD, "spliced to a file");
    check(data, pages, 1, 0, "parent");
}

/* A TCP connection whose receiver is slow and whose window is small: what is sent stays with the sender. */
static void tcp_pair(int *from, int *to) {
    int l = socket(AF_INET, SOCK_STREAM, 0), small = 8192, one = 1;
    ok(l >= 0);
    ok(setsockopt(l, SOL_SOCKET, SO_RCVBUF, &small, sizeof small) == 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    ok(bind(l, (void *)&a, sizeof a) == 0 && listen(l, 1) == 0 && getsockname(l, (void *)&a, &len) == 0);
    *from = socket(AF_INET, SOCK_STREAM, 0);
    int large = (int)(8 * MIB);
    ok(setsockopt(*from, SOL_SOCKET, SO_SNDBUF, &large, sizeof large) == 0);
    ok(connect(*from, (void *)&a, sizeof a) == 0);
    *to = accept(l, NULL, NULL);
    ok(*to >= 0 && close(l) == 0);
    ok(setsockopt(*from, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) == 0);
}

enum { SENT = 64 }; /* pages a round: far more than the receiver takes in */

/* Reads `len` bytes that were sent from page `first` on; a send may have ended inside a page. */
static void receive(int fd, size_t first, size_t len, const char *what) {
    read_and_check(fd, 1, first, len / PAGE, what);
    static uint64_t rest[WORDS];
    size_t tail = len % PAGE;
    for (size_t got = 0; got < tail;) {
        ssize_t n = read(fd, (char *)rest + got, tail - got);
        ok(n > 0);
        got += (size_t)n;
    }
    for (size_t i = 0; i < tail / 8; i++)
        if (rest[i] != word_of(HALF, 1, first + len / PAGE, i)) die("%s: the end of what was sent, word %zu", what, i);
}

static void zerocopy(void) {
    setup();
    int from, to, one = 1;
    tcp_pair(&from, &to);
    if (setsockopt(from, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof one) != 0) skip("SO_ZEROCOPY: %s", strerror(errno));
    uint32_t sent_calls = 0;
    for (size_t n = 0; n < 10; n++) {
        size_t first = n * SENT;
        char *at = data + first * PAGE;
        if (n % 2) evict(at, SENT * PAGE);
        size_t sent = 0;
        while (sent < SENT * PAGE) {
            ssize_t r = n % 3 == 2 ? RAW(SYS_sendto, from, at + sent, SENT * PAGE - sent, MSG_ZEROCOPY | MSG_DONTWAIT, 0, 0)
                                   : send(from, at + sent, SENT * PAGE - sent, MSG_ZEROCOPY | MSG_DONTWAIT);
            if (n % 3 == 2 && r < 0) errno = (int)-r, r = -1;
            if (r < 0 && (errno == EAGAIN || errno == ENOBUFS)) break; /* as much as fits is what is tested */
            if (r <= 0) die("send with MSG_ZEROCOPY returned %zd", r);
            sent += (size_t)r;
            sent_calls++;
        }
        if (sent < 16 * PAGE) die("only %zu bytes could be sent", sent);
        evict_and_reuse(at, SENT * PAGE);
        receive(to, first, sent, "MSG_ZEROCOPY");
        check(at, SENT, 1, first, "sent with MSG_ZEROCOPY");
    }
    /* The kernel says when it is done with each call's pages. */
    uint32_t told = 0;
    while (told < sent_calls) {
        struct pollfd pfd = {.fd = from};
        ok(poll(&pfd, 1, 10000) == 1);
        char control[256];
        struct msghdr msg = {.msg_control = control, .msg_controllen = sizeof control};
        ssize_t r = recvmsg(from, &msg, MSG_ERRQUEUE | MSG_DONTWAIT);
        if (r < 0 && errno == EAGAIN) continue;
        ok(r >= 0);
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
            struct sock_extended_err *e = (void *)CMSG_DATA(c);
            ok(e->ee_errno == 0 && e->ee_origin == SO_EE_ORIGIN_ZEROCOPY);
            told += e->ee_data - e->ee_info + 1;
        }
    }
    check(data, pages, 1, 0, "after MSG_ZEROCOPY");
}

static void send_zc(void) {
    setup();
    struct ring r;
    ring_open(&r, 8);
    int from, to;
    tcp_pair(&from, &to);
    for (size_t n = 0; n < 10; n++) {
        size_t first = n * SENT;
        char *at = data + first * PAGE;
        if (n % 2) evict(at, SENT * PAGE);
        struct io_uring_sqe sqe = {.opcode = IORING_OP_SEND_ZC,
                                   .fd = from,
                                   .addr = (uintptr_t)at,
                                   .len = SENT * PAGE,
                                   .msg_flags = MSG_DONTWAIT,
                                   .user_data = n};
        ring_push(&r, &sqe);
        ring_submit(&r, 0);
        struct completion c = ring_pop(&r);
        if (c.res == -EINVAL || c.res == -EOPNOTSUPP) skip("IORING_OP_SEND_ZC: %s", strerror(-c.res));
        if (c.res < (int)(16 * PAGE)) die("IORING_OP_SEND_ZC sent %d", c.res);
        bool more = c.flags & IORING_CQE_F_MORE;
        evict_and_reuse(at, SENT * PAGE);
        receive(to, first, (size_t)c.res, "IORING_OP_SEND_ZC");
        if (more) ok(ring_pop(&r).flags & IORING_CQE_F_NOTIF);
        check(at, SENT, 1, first, "sent with IORING_OP_SEND_ZC");
    }
    check(data, pages, 1, 0, "after IORING_OP_SEND_ZC");
}

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"vmsplice", vmsplice_libc},         {"vmsplice-syscall", vmsplice_syscall}, {"vmsplice-raw", vmsplice_raw},
        {"vmsplice-unmap", vmsplice_unmap},  {"vmsplice-child", vmsplice_child},     {"vmsplice-splice", vmsplice_splice},
        {"zerocopy", zerocopy},              {"send-zc", send_zc},                   {NULL, NULL},
    };
    return run_case(argc, argv, cases);
}

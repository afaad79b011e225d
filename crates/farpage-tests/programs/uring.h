/* A minimal io_uring by raw system calls: one ring, one request at a time in the queue or a few. */
#ifndef URING_H
#define URING_H
#include "common.h"
#include <linux/io_uring.h>

struct ring {
    int fd;
    struct io_uring_params params;
    char *sq, *cq;
    struct io_uring_sqe *sqes;
    unsigned pending;
};

static inline void ring_open(struct ring *r, unsigned entries) {
    memset(r, 0, sizeof *r);
    r->fd = (int)syscall(__NR_io_uring_setup, entries, &r->params);
    if (r->fd < 0) skip("io_uring_setup: %s", strerror(errno));
    size_t sq = r->params.sq_off.array + r->params.sq_entries * sizeof(unsigned);
    size_t cq = r->params.cq_off.cqes + r->params.cq_entries * sizeof(struct io_uring_cqe);
    int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    r->sq = mmap(NULL, sq, prot, flags, r->fd, IORING_OFF_SQ_RING);
    r->cq = mmap(NULL, cq, prot, flags, r->fd, IORING_OFF_CQ_RING);
    r->sqes = mmap(NULL, r->params.sq_entries * sizeof(struct io_uring_sqe), prot, flags, r->fd, IORING_OFF_SQES);
    ok(r->sq != MAP_FAILED && r->cq != MAP_FAILED && r->sqes != MAP_FAILED);
}

/* Puts a request into the queue. */
static inline void ring_push(struct ring *r, const struct io_uring_sqe *sqe) {
    _Atomic unsigned *tail = (_Atomic unsigned *)(r->sq + r->params.sq_off.tail);
    unsigned mask = *(unsigned *)(r->sq + r->params.sq_off.ring_mask);
    unsigned *array = (unsigned *)(r->sq + r->params.sq_off.array);
    unsigned t = atomic_load_explicit(tail, memory_order_relaxed);
    r->sqes[t & mask] = *sqe;
    array[t & mask] = t & mask;
    atomic_store_explicit(tail, t + 1, memory_order_release);
    r->pending++;
}

static inline void ring_submit(struct ring *r, unsigned wait_for) {
    long n;
    do
        n = syscall(__NR_io_uring_enter, r->fd, r->pending, wait_for, wait_for ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
    while (n < 0 && errno == EINTR);
    if (n < 0) die("io_uring_enter");
    r->pending -= (unsigned)n;
}

struct completion {
    uint64_t user_data;
    int res;
    unsigned flags;
};

/* The next completion; waits for it. */
static inline struct completion ring_pop(struct ring *r) {
    _Atomic unsigned *head = (_Atomic unsigned *)(r->cq + r->params.cq_off.head);
    _Atomic unsigned *tail = (_Atomic unsigned *)(r->cq + r->params.cq_off.tail);
    unsigned mask = *(unsigned *)(r->cq + r->params.cq_off.ring_mask);
    unsigned h = atomic_load_explicit(head, memory_order_relaxed);
    while (h == atomic_load_explicit(tail, memory_order_acquire)) ring_submit(r, 1);
    struct io_uring_cqe *cqe = (struct io_uring_cqe *)(r->cq + r->params.cq_off.cqes) + (h & mask);
    struct completion c = {cqe->user_data, cqe->res, cqe->flags};
    atomic_store_explicit(head, h + 1, memory_order_release);
    return c;
}

static inline void ring_register_buffers(struct ring *r, struct iovec *iov, unsigned n) {
    if (syscall(__NR_io_uring_register, r->fd, IORING_REGISTER_BUFFERS, iov, n) < 0) {
        if (errno == ENOMEM || errno == EPERM) skip("io_uring fixed buffers: %s (RLIMIT_MEMLOCK)", strerror(errno));
        die("IORING_REGISTER_BUFFERS");
    }
}
#endif

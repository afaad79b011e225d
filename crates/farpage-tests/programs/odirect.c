/* O_DIRECT transfers on a file given by path, on a file system that may hold the buffer by plain references
 * for as long as the transfer takes; other threads page the buffer out meanwhile.
 *
 * `odirect CASE MIB PATH`: the file must exist, be at least 4 MiB long and hold fill_page(page, 1, index). */
#include "common.h"
#include <fcntl.h>
#include <sys/stat.h>

enum { CHUNK = 16, CHUNKS = 64 };
static const char *path;
static char *data;
static size_t pages;
static atomic_bool done;

static void *pager(void *arg) {
    (void)arg;
    while (!atomic_load(&done)) {
        evict(data, pages * PAGE);
        pressure();
    }
    return NULL;
}

static int open_direct(int flags) {
    int fd = open(path, flags | O_DIRECT);
    if (fd < 0) die("open %s with O_DIRECT", path);
    return fd;
}

static void setup(void) {
    pages = CHUNK * CHUNKS;
    data = map_pages(pages);
    fill(data, pages, 5, 0);
    make_ballast(data_bytes);
}

struct reader {
    int fd;
    size_t first;
    bool raw;
};
static void *read_chunks(void *arg) {
    struct reader *r = arg;
    for (uint64_t round = 0; round < 3; round++)
        for (size_t c = r->first; c < CHUNKS; c += 2) {
            char *p = data + c * CHUNK * PAGE;
            long n = r->raw ? RAW(SYS_pread64, r->fd, p, CHUNK * PAGE, c * CHUNK * PAGE, 0, 0)
                            : pread(r->fd, p, CHUNK * PAGE, (off_t)(c * CHUNK * PAGE));
            if (n != (long)(CHUNK * PAGE)) die("pread with O_DIRECT returned %ld", n);
            check(p, CHUNK, 1, c * CHUNK, "read with O_DIRECT");
            fill(p, CHUNK, 9 + round, c * CHUNK);
        }
    return NULL;
}
static void reading(bool raw) {
    setup();
    int fd = open_direct(O_RDONLY);
    struct reader r[2] = {{fd, 0, raw}, {fd, 1, raw}};
    pthread_t p = start(pager, NULL), a = start(read_chunks, &r[0]), b = start(read_chunks, &r[1]);
    join(a);
    join(b);
    atomic_store(&done, true);
    join(p);
    check(data, pages, 11, 0, "at the end");
}
static void reads(void) { reading(false); }
static void reads_raw(void) { reading(true); }

static void writes(void) {
    setup();
    int fd = open_direct(O_RDWR);
    pthread_t p = start(pager, NULL);
    for (uint64_t round = 20; round < 22; round++) {
        for (size_t c = 0; c < CHUNKS; c++) fill(data + c * CHUNK * PAGE, CHUNK, round, c * CHUNK);
        for (size_t c = 0; c < CHUNKS; c++)
            ok(pwrite(fd, data + c * CHUNK * PAGE, CHUNK * PAGE, (off_t)(c * CHUNK * PAGE)) == (ssize_t)(CHUNK * PAGE));
        fill(data, pages, 6, 0);
        for (size_t c = 0; c < CHUNKS; c++)
            ok(pread(fd, data + c * CHUNK * PAGE, CHUNK * PAGE, (off_t)(c * CHUNK * PAGE)) == (ssize_t)(CHUNK * PAGE));
        check(data, pages, round, 0, "written and read with O_DIRECT");
    }
    atomic_store(&done, true);
    join(p);
}

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"reads", reads}, {"reads-raw", reads_raw}, {"writes", writes}, {NULL, NULL}};
    if (argc < 4) {
        fprintf(stderr, "usage: odirect CASE MIB PATH\n");
        return 2;
    }
    path = argv[3];
    return run_case(argc, argv, cases);
}

/* Ways to walk through memory, kinds of bytes, and the heap. */
#include "common.h"
#include <malloc.h>

static char *data;
static size_t pages;

static void setup(enum kind kind) {
    pages = data_bytes / PAGE;
    data = map_pages(pages);
    for (size_t i = 0; i < pages; i++) fill_kind(data + i * PAGE, kind, 1, i);
}

static void sequential(void) {
    setup(HALF);
    for (int n = 0; n < 3; n++) check(data, pages, 1, 0, "sequential");
    fill(data, pages, 2, 0);
    check(data, pages, 2, 0, "sequential, written");
}
static void reverse(void) {
    setup(HALF);
    for (int n = 0; n < 3; n++)
        for (size_t i = pages; i-- > 0;) check_page(data + i * PAGE, 1, i, "reverse");
    for (size_t i = pages; i-- > 0;) fill_page(data + i * PAGE, 2, i);
    for (size_t i = pages; i-- > 0;) check_page(data + i * PAGE, 2, i, "reverse, written");
}
static void strided(void) {
    setup(HALF);
    static const size_t steps[] = {2, 3, 16, 17, 63, 64, 65, 509};
    for (size_t s = 0; s < sizeof steps / sizeof *steps; s++)
        for (size_t i = s; i < pages; i += steps[s]) {
            check_page(data + i * PAGE, 1, i, "strided");
            if (i % 2) fill_page(data + i * PAGE, 1, i);
        }
    check(data, pages, 1, 0, "strided");
}
static void scattered(void) {
    setup(HALF);
    static uint32_t seed_of[1 << 20];
    uint64_t rng = 6;
    for (size_t n = 0; n < 2 * pages; n++) {
        size_t i = draw(&rng) % pages;
        check_page(data + i * PAGE, seed_of[i] + 1, i, "scattered");
        if (n % 2) fill_page(data + i * PAGE, ++seed_of[i] + 1, i);
    }
    for (size_t i = 0; i < pages; i++) check_page(data + i * PAGE, seed_of[i] + 1, i, "scattered, at the end");
}
/* Most accesses go to an eighth of the memory. */
static void hot(void) {
    setup(HALF);
    uint64_t rng = 7;
    for (size_t n = 0; n < 4 * pages; n++) {
        size_t i = draw(&rng) % 20 ? draw(&rng) % (pages / 8) : draw(&rng) % pages;
        check_page(data + i * PAGE, 1, i, "hot set");
    }
}
static void zeros(void) {
    setup(ZERO);
    check_zero(data, pages, "zeros");
    /* Never touched at all. */
    char *more = map_pages(pages);
    check_zero(more, pages, "never written");
    for (size_t i = 0; i < pages; i += 9) fill_page(more + i * PAGE, 3, i);
    check_zero(data, pages, "zeros again");
    for (size_t i = 0; i < pages; i++) {
        if (i % 9 == 0)
            check_page(more + i * PAGE, 3, i, "between zeros");
        else
            check_zero(more + i * PAGE, 1, "beside written pages");
    }
    /* Back to zero. */
    for (size_t i = 0; i < pages; i += 9) memset(more + i * PAGE, 0, PAGE);
    check_zero(data, pages, "zeros, third time");
    check_zero(more, pages, "zero again");
}
static void same(void) {
    setup(SAME);
    for (size_t i = 0; i < pages; i++) check_kind(data + i * PAGE, SAME, 1, i, "same-filled");
    /* One word that differs, at the first, the last and a middle place. */
    for (size_t i = 0; i < pages; i++) ((uint64_t *)(data + i * PAGE))[i % 3 == 0 ? 0 : i % 3 == 1 ? WORDS - 1 : i % WORDS] ^= 1;
    for (size_t i = 0; i < pages; i++) ((uint64_t *)(data + i * PAGE))[i % 3 == 0 ? 0 : i % 3 == 1 ? WORDS - 1 : i % WORDS] ^= 1;
    for (size_t i = 0; i < pages; i++) check_kind(data + i * PAGE, SAME, 1, i, "same-filled again");
}
static void noise(void) {
    setup(NOISE);
    for (int n = 0; n < 2; n++)
        for (size_t i = 0; i < pages; i++) check_kind(data + i * PAGE, NOISE, 1, i, "incompressible");
}
static void mixed(void) {
    pages = data_bytes / PAGE;
    data = map_pages(pages);
    for (uint64_t round = 0; round < 3; round++) {
        for (size_t i = 0; i < pages; i++) fill_kind(data + i * PAGE, (enum kind)((i + round) % 4), round, i);
        for (size_t i = 0; i < pages; i++) check_kind(data + i * PAGE, (enum kind)((i + round) % 4), round, i, "mixed");
    }
}
/* One byte a page is written: what was clean is dirty. */
static void bytes(void) {
    setup(HALF);
    check(data, pages, 1, 0, "bytes");
    for (size_t i = 0; i < pages; i++) data[i * PAGE + i % PAGE] ^= 1;
    for (size_t i = 0; i < pages; i++) data[i * PAGE + i % PAGE] ^= 1;
    check(data, pages, 1, 0, "bytes");
}

/* The heap: blocks of all sizes, filled by what they are. */
struct block {
    unsigned char *p;
    size_t len;
    uint64_t seed;
};
static void put(struct block *b) {
    for (size_t i = 0; i < b->len; i++) b->p[i] = (unsigned char)(b->seed + i / 5);
}
static void look(const struct block *b, size_t len) {
    for (size_t i = 0; i < len; i++)
        if (b->p[i] != (unsigned char)(b->seed + i / 5)) die("block of %zu at %p lost byte %zu", b->len, (void *)b->p, i);
}
static void *heap_user(void *arg) {
    enum { BLOCKS = 3000 };
    struct block *b = calloc(BLOCKS, sizeof *b);
    ok(b != NULL);
    uint64_t rng = (uint64_t)(uintptr_t)arg;
    size_t live = 0, limit = data_bytes / 4;
    for (int n = 0; n < 8000; n++) {
        struct block *c = &b[draw(&rng) % BLOCKS];
        uint64_t how = draw(&rng) % 8;
        size_t len = draw(&rng) % (how == 0 ? 2 * MIB : how < 4 ? 20000 : 300) + 1;
        if (c->p && (how % 2 || live + len > limit)) {
            look(c, c->len);
            live -= c->len;
            free(c->p);
            c->p = NULL;
        } else if (c->p) {
            size_t keep = len < c->len ? len : c->len;
            live += len - c->len;
            c->p = realloc(c->p, len);
            ok(c->p != NULL);
            look(c, keep);
            c->len = len;
            put(c);
        } else if (live + len <= limit) {
            void *p = NULL;
            if (how == 2) {
                p = calloc(1, len);
                for (size_t i = 0; i < len; i++) ok(((unsigned char *)p)[i] == 0);
            } else if (how == 4) {
                ok(posix_memalign(&p, 4096, len) == 0 && (uintptr_t)p % 4096 == 0);
            } else {
                p = malloc(len);
            }
            ok(p != NULL && malloc_usable_size(p) >= len);
            *c = (struct block){p, len, draw(&rng)};
            put(c);
            live += len;
        }
    }
    for (size_t i = 0; i < BLOCKS; i++)
        if (b[i].p) {
            look(&b[i], b[i].len);
            free(b[i].p);
        }
    free(b);
    return NULL;
}
static void heap(void) {
    setup(HALF);
    pthread_t t[4];
    for (int i = 0; i < 4; i++) t[i] = start(heap_user, (void *)(uintptr_t)(i + 1));
    for (int i = 0; i < 4; i++) join(t[i]);
    check(data, pages, 1, 0, "beside the heap");
    ok(malloc((size_t)-1 / 2) == NULL && errno == ENOMEM);
}

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"sequential", sequential}, {"reverse", reverse}, {"strided", strided}, {"scattered", scattered},
        {"hot", hot},               {"zeros", zeros},     {"same", same},       {"noise", noise},
        {"mixed", mixed},           {"bytes", bytes},     {"heap", heap},       {NULL, NULL},
    };
    return run_case(argc, argv, cases);
}

/* Threads that change mappings in a loop beside threads that verify other parts, all of it under pressure.
 *
 * The arena is cut into slots of 1 MiB: even slots are stable and always hold seed 1, odd ones belong to one
 * changing thread each. Content-preserving calls race with readers on the stable slots, too. */
#include "common.h"

enum { SLOT = 256 };
static char *arena;
static size_t slots;
static atomic_bool done;
static double seconds = 2.0;

static char *slot_at(size_t i) { return arena + i * SLOT * PAGE; }

static void setup(void) {
    slots = data_bytes / (SLOT * PAGE);
    arena = map_pages(slots * SLOT);
    for (size_t i = 0; i < slots; i++) fill(slot_at(i), SLOT, 1, i * SLOT);
}

static void *verifier(void *arg) {
    uint64_t rng = (uint64_t)(uintptr_t)arg;
    while (!atomic_load(&done)) {
        size_t slot = draw(&rng) % (slots / 2) * 2, page = draw(&rng) % SLOT, n = draw(&rng) % 32 + 1;
        for (; n > 0 && page < SLOT; n--, page++)
            check_page(slot_at(slot) + page * PAGE, 1, slot * SLOT + page, "stable slot");
    }
    return NULL;
}

/* Runs changers, two verifiers and a clock. */
static void race(void *(*changer)(void *), size_t changers) {
    raw_first();
    setup();
    pthread_t t[16];
    size_t n = 0;
    for (size_t i = 0; i < changers; i++) t[n++] = start(changer, (void *)(uintptr_t)(2 * i + 1));
    t[n++] = start(verifier, (void *)101);
    t[n++] = start(verifier, (void *)202);
    struct timespec length = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&length, NULL);
    atomic_store(&done, true);
    for (size_t i = 0; i < n; i++) join(t[i]);
    for (size_t i = 0; i < slots; i += 2) check(slot_at(i), SLOT, 1, i * SLOT, "stable slot at the end");
}

static int rw = PROT_READ | PROT_WRITE, anon = MAP_PRIVATE | MAP_ANONYMOUS;

/* Each changer owns slot `own` and knows what must be in it. */
static void *unmapper(void *arg) {
    size_t own = (size_t)(uintptr_t)arg;
    char *p = slot_at(own);
    uint64_t rng = own;
    bool raw = own % 4 == 3;
    for (uint64_t round = 2; !atomic_load(&done); round++) {
        fill(p, SLOT, round, 0);
        if (draw(&rng) % 2) evict(p, SLOT * PAGE);
        size_t from = draw(&rng) % SLOT, n = draw(&rng) % (SLOT - from) + 1;
        if (draw(&rng) % 2) ok((raw ? RAW(SYS_munmap, p + from * PAGE, n * PAGE, 0, 0, 0, 0) : munmap(p + from * PAGE, n * PAGE)) == 0);
        char *q = raw ? (char *)RAW(SYS_mmap, p + from * PAGE, n * PAGE, rw, anon | MAP_FIXED, -1, 0)
                      : mmap(p + from * PAGE, n * PAGE, rw, anon | MAP_FIXED, -1, 0);
        ok(q == p + from * PAGE);
        check_zero(q, n, "mapped anew in a race");
        check(p, from, round, 0, "before what was mapped anew in a race");
        check(q + n * PAGE, SLOT - from - n, round, from + n, "behind what was mapped anew in a race");
    }
    return NULL;
}

static void *mover(void *arg) {
    size_t own = (size_t)(uintptr_t)arg;
    char *p = slot_at(own), *elsewhere = map_pages(2 * SLOT);
    uint64_t rng = own;
    for (uint64_t round = 2; !atomic_load(&done); round++) {
        fill(p, SLOT, round, 0);
        if (draw(&rng) % 2) evict(p, SLOT * PAGE);
        char *to = elsewhere + draw(&rng) % SLOT * PAGE;
        int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        size_t len = SLOT * PAGE;
        ok(mremap(p, len, len, flags, to) == to);
        if (draw(&rng) % 2) evict(to, len);
        check(to, SLOT, round, 0, "moved in a race");
        ok(mremap(to, len, len, flags, p) == p);
        check(p, SLOT, round, 0, "moved back in a race");
        ok(mmap(elsewhere, 2 * len, rw, anon | MAP_FIXED, -1, 0) == elsewhere);
    }
    return NULL;
}

static void *protector(void *arg) {
    size_t own = (size_t)(uintptr_t)arg;
    char *p = slot_at(own);
    uint64_t rng = own;
    for (uint64_t round = 2; !atomic_load(&done); round++) {
        fill(p, SLOT, round, 0);
        size_t from = draw(&rng) % SLOT, n = draw(&rng) % (SLOT - from) + 1;
        if (draw(&rng) % 2) evict(p, SLOT * PAGE);
        ok(mprotect(p + from * PAGE, n * PAGE, draw(&rng) % 2 ? PROT_NONE : PROT_READ) == 0);
        check(p, from, round, 0, "before what is protected in a race");
        ok(mprotect(p + from * PAGE, n * PAGE, rw) == 0);
        check(p, SLOT, round, 0, "unprotected in a race");
        /* A stable slot becomes read-only for a moment; who reads it must not notice. */
        char *stable = slot_at(draw(&rng) % (slots / 2) * 2);
        ok(mprotect(stable + from * PAGE, n * PAGE, PROT_READ) == 0);
        ok(mprotect(stable + from * PAGE, n * PAGE, rw) == 0);
    }
    return NULL;
}

static void *dropper(void *arg) {
    size_t own = (size_t)(uintptr_t)arg;
    char *p = slot_at(own);
    uint64_t rng = own;
    bool raw = own % 4 == 3;
    for (uint64_t round = 2; !atomic_load(&done); round++) {
        fill(p, SLOT, round, 0);
        if (draw(&rng) % 2) evict(p, SLOT * PAGE);
        size_t from = draw(&rng) % SLOT, n = draw(&rng) % (SLOT - from) + 1;
        bool lazy = draw(&rng) % 4 == 0;
        int advice = lazy ? MADV_FREE : MADV_DONTNEED;
        ok((raw ? RAW(SYS_madvise, p + from * PAGE, n * PAGE, advice, 0, 0, 0) : madvise(p + from * PAGE, n * PAGE, advice)) == 0);
        if (!lazy) check_zero(p + from * PAGE, n, "after MADV_DONTNEED in a race");
        fill(p + from * PAGE, n, round, from);
        check(p, SLOT, round, 0, "written after MADV_DONTNEED in a race");
    }
    return NULL;
}

static void *adviser(void *arg) {
    static const int advice[] = {MADV_PAGEOUT, MADV_COLD, MADV_WILLNEED, MADV_POPULATE_READ, MADV_POPULATE_WRITE};
    uint64_t rng = (uint64_t)(uintptr_t)arg;
    while (!atomic_load(&done)) {
        char *stable = slot_at(draw(&rng) % (slots / 2) * 2);
        size_t from = draw(&rng) % SLOT, n = draw(&rng) % (SLOT - from) + 1;
        size_t which = draw(&rng) % 7;
        if (which < 5) {
            if (madvise(stable + from * PAGE, n * PAGE, advice[which]) != 0 && errno != EINVAL && errno != EFAULT) die("madvise(%d)", advice[which]);
        } else if (which == 5 && geteuid() == 0) {
            ok(mlock(stable + from * PAGE, n * PAGE) == 0);
            ok(munlock(stable + from * PAGE, n * PAGE) == 0);
        }
    }
    return NULL;
}

/* MADV_DONTNEED on pages that others read at that moment: each word is the old one or zero. */
static void *giver_up(void *arg) {
    size_t own = (size_t)(uintptr_t)arg;
    char *p = slot_at(own);
    uint64_t rng = own;
    while (!atomic_load(&done)) {
        size_t from = draw(&rng) % SLOT, n = draw(&rng) % 16 + 1;
        if (from + n > SLOT) n = SLOT - from;
        if (draw(&rng) % 4 == 0) evict(p, SLOT * PAGE);
        ok(madvise(p + from * PAGE, n * PAGE, MADV_DONTNEED) == 0);
        check_zero(p + from * PAGE, n, "given up");
        for (size_t i = from; i < from + n; i++) fill_page(p + i * PAGE, 1, own * SLOT + i);
    }
    return NULL;
}
static void *old_or_zero(void *arg) {
    uint64_t rng = (uint64_t)(uintptr_t)arg;
    while (!atomic_load(&done)) {
        size_t slot = draw(&rng) % 4 * 2 + 1, page = draw(&rng) % SLOT;
        volatile uint64_t *w = (uint64_t *)(slot_at(slot) + page * PAGE);
        for (size_t i = 0; i < WORDS; i++) {
            uint64_t got = w[i], want = word_of(HALF, 1, slot * SLOT + page, i);
            if (got != want && got != 0)
                die("slot %zu page %zu word %zu: found %016lx, neither %016lx nor 0", slot, page, i, (unsigned long)got, (unsigned long)want);
        }
    }
    return NULL;
}
static void *giver_or_reader(void *arg) { return (uintptr_t)arg < 8 ? giver_up(arg) : old_or_zero(arg); }

/* Children come and go while others change mappings. */
static void *forker(void *arg) {
    size_t own = (size_t)(uintptr_t)arg;
    while (!atomic_load(&done)) {
        pid_t pid = fork();
        if (pid < 0) die("fork");
        if (pid == 0) {
            for (size_t i = 0; i < slots; i += 2) {
                size_t page = (i * 31 + own) % SLOT;
                check_page(slot_at(i) + page * PAGE, 1, i * SLOT + page, "child in a race");
            }
            _exit(0);
        }
        reap(pid, 0, "child in a race");
    }
    return NULL;
}

static void *anything(void *arg) {
    static void *(*const changers[])(void *) = {unmapper, mover, protector, dropper, adviser, forker};
    return changers[(uintptr_t)arg / 2 % 6](arg);
}

static void unmap(void) { race(unmapper, 4); }
static void move(void) { race(mover, 4); }
static void protect(void) { race(protector, 4); }
static void dropping(void) { race(dropper, 4); }
static void advise(void) { race(adviser, 4); }
static void give_up(void) { race(giver_or_reader, 6); }
static void forks(void) { race(forker, 2); }
static void all(void) {
    seconds = 4.0;
    race(anything, 6);
}

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"unmap", unmap},     {"move", move},   {"protect", protect}, {"drop", dropping}, {"advise", advise},
        {"give-up", give_up}, {"fork", forks},  {"all", all},         {NULL, NULL},
    };
    return run_case(argc, argv, cases);
}

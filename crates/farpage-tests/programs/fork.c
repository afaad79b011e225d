/* fork in all its shapes: parent and child each see exactly their own memory while both go on. */
#include "common.h"
#include <dlfcn.h>
#include <locale.h>
#include <wctype.h>
#include <fcntl.h>
#include <sched.h>
#include <spawn.h>
#include <sys/prctl.h>

extern char **environ;

static char *data;
static size_t pages;

static void setup(void) {
    pages = data_bytes / PAGE;
    data = map_pages(pages);
    fill(data, pages, 1, 0);
}

static pid_t fork_or_die(void) {
    pid_t pid = fork();
    if (pid < 0) die("fork");
    return pid;
}

/* Writers that never stop: page by page, round after round. `at` is the page in work. */
struct writer {
    char *from;
    size_t n;
    volatile size_t at;
    volatile uint64_t round;
    atomic_bool stop;
};

static void *write_rounds(void *arg) {
    struct writer *w = arg;
    while (!atomic_load(&w->stop)) {
        fill_page(w->from + w->at * PAGE, w->round, w->at);
        if (w->at + 1 == w->n) {
            w->round++;
            atomic_signal_fence(memory_order_seq_cst);
            w->at = 0;
        } else {
            w->at++;
        }
    }
    return NULL;
}

/* In a fork child: all before `at` is of this round, all after it of the one before. The page at `at`, and
 * around the turn of a round its neighbour too, may be half written. */
static void check_rounds(struct writer *w) {
    size_t at = w->at;
    uint64_t round = w->round;
    if (at + 1 == w->n || at == 0) {
        for (size_t i = 1; i + 1 < w->n; i++) {
            uint64_t first = *(volatile uint64_t *)(w->from + i * PAGE);
            uint64_t of = first == word_of(HALF, round - 1, i, 0) ? round - 1 : first == word_of(HALF, round, i, 0) ? round : round - 2;
            check_page(w->from + i * PAGE, of, i, "snapshot at the turn of a round");
        }
        return;
    }
    for (size_t i = 0; i < at; i++) check_page(w->from + i * PAGE, round, i, "snapshot before the writer");
    for (size_t i = at + 1; i < w->n; i++) check_page(w->from + i * PAGE, round - 1, i, "snapshot after the writer");
}

/* The child's view is of one moment, although two threads of the parent keep writing. */
static void snapshot(void) {
    setup();
    size_t live = pages / 4;
    struct writer w[2] = {{.from = data, .n = live, .round = 2}, {.from = data + live * PAGE, .n = live, .round = 2}};
    for (int i = 0; i < 2; i++) fill(w[i].from, live, 1, 0);
    pthread_t t[2] = {start(write_rounds, &w[0]), start(write_rounds, &w[1])};
    char *still = data + 2 * live * PAGE;
    size_t still_pages = pages - 2 * live;
    for (int n = 0; n < 6; n++) {
        pid_t pid = fork_or_die();
        if (pid == 0) {
            check_rounds(&w[0]);
            check_rounds(&w[1]);
            check(still, still_pages, 1, 2 * live, "child");
            check_rounds(&w[0]);
            fill(data, 2 * live, 100, 0);
            check(data, 2 * live, 100, 0, "what the child wrote");
            _exit(0);
        }
        check(still, still_pages, 1, 2 * live, "parent beside the child");
        reap(pid, 0, "snapshot");
    }
    for (int i = 0; i < 2; i++) atomic_store(&w[i].stop, true);
    for (int i = 0; i < 2; i++) join(t[i]);
    check_rounds(&w[0]);
    check_rounds(&w[1]);
}

static void *check_all(void *arg) {
    check(data, pages, (uint64_t)(uintptr_t)arg, 0, "thread of a child");
    return NULL;
}

/* Each generation rewrites half of what it got, in threads too; nobody sees another's writes. */
static void generation(int depth) {
    if (depth == 0) return;
    pid_t pid = fork_or_die();
    if (pid == 0) {
        for (size_t i = 0; i < pages; i += 2) fill_page(data + i * PAGE, 10 + (uint64_t)depth, i);
        generation(depth - 1);
        for (size_t i = 1; i < pages; i += 2) fill_page(data + i * PAGE, 10 + (uint64_t)depth, i);
        pthread_t a = start(check_all, (void *)(uintptr_t)(10 + depth));
        pthread_t b = start(check_all, (void *)(uintptr_t)(10 + depth));
        join(a);
        join(b);
        _exit(0);
    }
    reap(pid, 0, "generation");
}

static void modify(void) {
    setup();
    generation(3);
    check(data, pages, 1, 0, "parent after its children");
    /* The parent writes while the child verifies. */
    pid_t pid = fork_or_die();
    if (pid == 0) {
        check(data, pages, 1, 0, "child while the parent writes");
        check(data, pages, 1, 0, "child while the parent writes, again");
        _exit(0);
    }
    fill(data, pages, 2, 0);
    reap(pid, 0, "modify");
    check(data, pages, 2, 0, "parent");
}

static void storm(void) {
    setup();
    pid_t alive[6] = {0};
    uint64_t rng = 5;
    for (int n = 0; n < 60; n++) {
        int slot = n % 6;
        if (alive[slot]) reap(alive[slot], 0, "storm");
        pid_t pid = fork_or_die();
        if (pid == 0) {
            uint64_t mine = (uint64_t)n * 1000;
            size_t touched[64];
            for (int i = 0; i < 64; i++) {
                touched[i] = draw(&mine) % pages;
                uint64_t seen = *(volatile uint64_t *)(data + touched[i] * PAGE);
                if (seen != word_of(HALF, 500 + (uint64_t)n, touched[i], 0))
                    check_page(data + touched[i] * PAGE, 1, touched[i], "storm child");
                fill_page(data + touched[i] * PAGE, 500 + (uint64_t)n, touched[i]);
            }
            for (int i = 0; i < 64; i++)
                check_page(data + touched[i] * PAGE, 500 + (uint64_t)n, touched[i], "what a storm child wrote");
            _exit(0);
        }
        alive[slot] = pid;
        for (int i = 0; i < 32; i++) {
            size_t page = draw(&rng) % pages;
            check_page(data + page * PAGE, 1, page, "storm parent");
        }
    }
    for (int i = 0; i < 6; i++) reap(alive[i], 0, "storm");
    check(data, pages, 1, 0, "parent after the storm");
}

/* Children killed in the middle of their work. */
static void killed(void) {
    setup();
    uint64_t rng = 9;
    for (int n = 0; n < 20; n++) {
        int p[2];
        ok(pipe(p) == 0);
        pid_t pid = fork_or_die();
        if (pid == 0) {
            for (uint64_t round = 0;; round++)
                for (size_t i = 0; i < pages; i++) {
                    fill_page(data + i * PAGE, round, i);
                    if (i % 16 == 0 && write(p[1], "x", 1) != 1) _exit(1);
                }
        }
        /* The child says how far it is; somewhere within its first round it dies. */
        size_t steps = draw(&rng) % (pages / 16);
        for (size_t i = 0; i <= steps; i++) {
            char c;
            ok(read(p[0], &c, 1) == 1);
        }
        ok(kill(pid, SIGKILL) == 0);
        int status;
        ok(waitpid(pid, &status, 0) == pid);
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) die("wait status %#x after SIGKILL", (unsigned)status);
        ok(close(p[0]) == 0 && close(p[1]) == 0);
        for (size_t i = (size_t)n % 4; i < pages; i += 4) check_page(data + i * PAGE, 1, i, "parent of a killed child");
    }
    check(data, pages, 1, 0, "parent of killed children");
}

static void expect_exec(pid_t pid, const char *what) {
    if (pid < 0) die("%s", what);
    reap(pid, 0, what);
    for (size_t i = 0; i < pages; i += 8) check_page(data + i * PAGE, 1, i, what);
}

/* Programs that are started from a process whose memory is away; this program itself among them. */
static void execs(void) {
    setup();
    char *truth[] = {"/bin/true", NULL};
    char *self[] = {"/proc/self/exe", "leaf", "24", NULL};
    char mine[4096];
    ssize_t len = readlink("/proc/self/exe", mine, sizeof mine - 1);
    ok(len > 0);
    mine[len] = 0;
    self[0] = mine;
    for (int n = 0; n < 3; n++) {
        evict(data, pages * PAGE);
        pid_t pid = fork_or_die();
        if (pid == 0) {
            check(data, 64, 1, 0, "before exec");
            execv(self[0], self);
            _exit(126);
        }
        expect_exec(pid, "fork and exec");

        ok(posix_spawn(&pid, self[0], NULL, NULL, self, environ) == 0);
        expect_exec(pid, "posix_spawn");

        pid = vfork();
        if (pid == 0) {
            execv(truth[0], truth);
            _exit(126);
        }
        expect_exec(pid, "vfork and exec");

        pid = vfork();
        if (pid == 0) _exit(0);
        expect_exec(pid, "vfork and _exit");

        ok(system("exit 3") == 3 << 8);
        FILE *f = popen("echo through a pipe", "r");
        ok(f != NULL);
        char line[64];
        ok(fgets(line, sizeof line, f) && strcmp(line, "through a pipe\n") == 0);
        ok(pclose(f) == 0);
    }
    check(data, pages, 1, 0, "after all execs");
    /* And the program replaces itself while its memory is away. */
    self[1] = "leaf";
    fflush(stdout);
    execv(self[0], self);
    die("execv");
}

/* What execs starts: memory of its own, filled and verified. */
static void leaf(void) {
    setup();
    check(data, pages, 1, 0, "leaf");
}

/* Bytes of this process in DRAM. */
static size_t in_dram(void) {
    FILE *f = fopen("/proc/self/smaps_rollup", "r");
    char line[256];
    unsigned long kib = 0;
    ok(f != NULL);
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "Anonymous: %lu", &kib) == 1) break;
    ok(fclose(f) == 0);
    return kib * 1024;
}

/* Nobody but this process needs DRAM: it soon has most of what it had. */
static void has_room_again(size_t before, const char *what) {
    double deadline = now() + 15;
    size_t most = 0;
    do {
        fill(data, pages, 1, 0);
        size_t n = in_dram();
        if (n > most) most = n;
        if (most >= before / 4 * 3) return;
    } while (now() < deadline);
    die("%s: %zu KiB in DRAM, before it were %zu", what, most / 1024, before / 1024);
}

/* Children that begin another program before any other thread of theirs has run: what was theirs goes back at once. */
static void exec_at_once(void) {
    setup();
    size_t before = in_dram();
    cpu_set_t all, one;
    ok(sched_getaffinity(0, sizeof all, &all) == 0);
    CPU_ZERO(&one);
    CPU_SET((size_t)sched_getcpu(), &one);
    ok(sched_setaffinity(0, sizeof one, &one) == 0);
    pid_t child[3];
    int p[2];
    ok(pipe2(p, O_CLOEXEC) == 0);
    for (int n = 0; n < 3; n++) {
        child[n] = fork_or_die();
        if (child[n] == 0) {
            /* A program that is not managed, and needs no DRAM of the budget. */
            char *nothing[] = {NULL};
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            execle("/bin/sleep", "sleep", "100", NULL, nothing);
            _exit(126);
        }
    }
    /* At its end all of them are at another program. */
    ok(close(p[1]) == 0);
    char c;
    ok(read(p[0], &c, 1) == 0);
    ok(sched_setaffinity(0, sizeof all, &all) == 0);
    has_room_again(before, "beside children that have begun another program");
    for (int n = 0; n < 3; n++) {
        ok(kill(child[n], SIGKILL) == 0);
        int status;
        ok(waitpid(child[n], &status, 0) == child[n]);
    }
    check(data, pages, 1, 0, "parent");
}

/* A namespace whose first process has ended has no room for others: the kernel has copied everything when it finds that out. */
static void fail_late(pid_t (*make)(void)) {
    setup();
    size_t before = in_dram();
    if (unshare(CLONE_NEWPID) != 0) skip("unshare(CLONE_NEWPID): %s", strerrordesc_np(errno));
    reap(make() ?: (_exit(0), 0), 0, "first of its namespace");
    for (int n = 0; n < 3; n++)
        if (make() >= 0 || errno != ENOMEM) die("a fork into a namespace that has ended");
    has_room_again(before, "after forks that failed");
    check(data, pages, 1, 0, "parent");
}
/* Children that end at once where their numbers mean others outside. */
static void namespace(void) {
    setup();
    if (unshare(CLONE_NEWPID) != 0) skip("unshare(CLONE_NEWPID): %s", strerrordesc_np(errno));
    pid_t first = fork_or_die();
    if (first == 0) {
        for (int n = 0; n < 8; n++) {
            pid_t pid = fork_or_die();
            if (pid == 0) _exit(0);
            reap(pid, 0, "child in a namespace");
        }
        check(data, pages, 1, 0, "first of its namespace");
        _exit(0);
    }
    reap(first, 0, "first of its namespace");
    check(data, pages, 1, 0, "parent");
}
static void fails_late(void) { fail_late(fork); }
/* By a way on which nobody but the kernel knows that it has failed. */
static void fails_unseen(void) {
    pid_t (*make)(void) = (pid_t (*)(void))dlsym(RTLD_DEFAULT, "__fork");
    if (!make) skip("this C library has no __fork");
    fail_late(make);
}

static void *fork_here(void *arg) {
    (void)arg;
    for (int n = 0; n < 5; n++) {
        pid_t pid = fork_or_die();
        if (pid == 0) {
            check(data, pages, 1, 0, "child of a thread");
            pid_t inner = fork_or_die();
            if (inner == 0) {
                fill(data, pages / 2, 3, 0);
                check(data, pages / 2, 3, 0, "grandchild of a thread");
                _exit(0);
            }
            reap(inner, 0, "grandchild of a thread");
            check(data, pages / 2, 1, 0, "child of a thread, after its own child");
            _exit(0);
        }
        reap(pid, 0, "child of a thread");
    }
    return NULL;
}

static void thread(void) {
    setup();
    pthread_t a = start(fork_here, NULL), b = start(fork_here, NULL);
    check(data, pages, 1, 0, "parent beside forking threads");
    join(a);
    join(b);
    check(data, pages, 1, 0, "parent");
}

static void raw_children(const char *what, long (*make)(void)) {
    for (int n = 0; n < 3; n++) {
        long pid = make();
        if (pid < 0) die("%s: %ld", what, pid);
        if (pid == 0) {
            for (size_t i = 0; i < pages; i++) check_page(data + i * PAGE, 1, i, what);
            fill(data, pages / 2, 4, 0);
            check(data, pages / 2, 4, 0, what);
            _exit(0);
        }
        for (size_t i = 0; i < pages; i += 3) check_page(data + i * PAGE, 1, i, what);
        reap((pid_t)pid, 0, what);
        check(data, pages, 1, 0, what);
    }
}

static long by_syscall_clone(void) { return syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0); }
static long by_raw_clone(void) { return RAW(SYS_clone, SIGCHLD, 0, 0, 0, 0, 0); }
static void raw_syscall(void) {
    setup();
    raw_children("syscall(SYS_clone)", by_syscall_clone);
}
static void raw_asm(void) {
    setup();
    raw_children("SYS_clone by the instruction", by_raw_clone);
}
#ifdef SYS_fork
static long by_syscall_fork(void) { return syscall(SYS_fork); }
static long by_raw_fork(void) { return RAW(SYS_fork, 0, 0, 0, 0, 0, 0); }
static void raw_fork(void) {
    setup();
    raw_children("syscall(SYS_fork)", by_syscall_fork);
    raw_children("SYS_fork by the instruction", by_raw_fork);
}
#else
static void raw_fork(void) { skip("this architecture has no fork system call"); }
#endif

/* The parents of a chain end before their children do. */
static void orphan(void) {
    setup();
    int p[2];
    ok(pipe(p) == 0);
    pid_t first = fork_or_die();
    if (first == 0) {
        for (int depth = 0; depth < 4; depth++) {
            pid_t pid = fork_or_die();
            if (pid > 0) _exit(0);
            fill(data + (size_t)depth * (pages / 8) * PAGE, pages / 8, 20 + (uint64_t)depth, 0);
        }
        for (int depth = 0; depth < 4; depth++)
            check(data + (size_t)depth * (pages / 8) * PAGE, pages / 8, 20 + (uint64_t)depth, 0, "orphan, its own");
        check(data + pages / 2 * PAGE, pages / 2, 1, pages / 2, "orphan, inherited");
        ok(write(p[1], "done", 4) == 4);
        _exit(0);
    }
    reap(first, 0, "first of the chain");
    ok(close(p[1]) == 0);
    char said[5] = "";
    ok(read(p[0], said, 4) == 4 && strcmp(said, "done") == 0);
    check(data, pages, 1, 0, "parent");
}

/* MADV_DONTFORK is gone in the child, MADV_WIPEONFORK reads as zeros there; both stay in the parent. */
static void advice(void) {
    setup();
    size_t part = pages / 8;
    char *wiped = data + part * PAGE, *kept_back = data + 2 * part * PAGE;
    ok(madvise(wiped, part * PAGE, MADV_WIPEONFORK) == 0);
    ok(madvise(kept_back, part * PAGE, MADV_DONTFORK) == 0);
    /* In DRAM when the child is forked, which is not to be charged for it: audits come several times a second. */
    check(kept_back, part, 1, 2 * part, "parent, before the fork");
    pid_t pid = fork_or_die();
    if (pid == 0) {
        struct timespec pause = {0, 400 * 1000 * 1000};
        nanosleep(&pause, NULL);
        check_zero(wiped, part, "MADV_WIPEONFORK");
        check(data, part, 1, 0, "before MADV_WIPEONFORK");
        check(data + 3 * part * PAGE, pages - 3 * part, 1, 3 * part, "after MADV_DONTFORK");
        unsigned char there;
        if (mincore(kept_back, PAGE, &there) == 0 || errno != ENOMEM) die("MADV_DONTFORK: the range is in the child");
        char *again = mmap(kept_back, part * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        ok(again == kept_back);
        check_zero(again, part, "fresh memory where MADV_DONTFORK left a hole");
        _exit(0);
    }
    reap(pid, 0, "advice");
    check(data, pages, 1, 0, "parent");
}

/* What was said of a range holds where `mremap` has put it, for what it grew by, and for the place that it left. */
static void advice_moved(void) {
    setup();
    size_t part = pages / 8;
    char *place = mmap(NULL, 4 * part * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ok(place != MAP_FAILED);
    char *wiped = data + part * PAGE, *kept_back = data + 2 * part * PAGE, *left = data + 3 * part * PAGE;
    ok(madvise(wiped, part * PAGE, MADV_WIPEONFORK) == 0);
    ok(madvise(kept_back, part * PAGE, MADV_DONTFORK) == 0);
    ok(madvise(left, part * PAGE, MADV_WIPEONFORK) == 0);
    wiped = mremap(wiped, part * PAGE, 2 * part * PAGE, MREMAP_MAYMOVE);
    ok(wiped != MAP_FAILED);
    fill(wiped + part * PAGE, part, 7, 0);
    ok(mremap(kept_back, part * PAGE, part * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
    kept_back = place;
    char *moved = mremap(left, part * PAGE, part * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    if (moved != MAP_FAILED) fill(left, part, 8, 0);
    pressure();
    pid_t pid = fork_or_die();
    if (pid == 0) {
        check_zero(wiped, 2 * part, "MADV_WIPEONFORK, then mremap");
        if (moved != MAP_FAILED) {
            check_zero(moved, part, "MADV_WIPEONFORK, then MREMAP_DONTUNMAP");
            check_zero(left, part, "left behind by MREMAP_DONTUNMAP");
        }
        unsigned char there;
        if (mincore(kept_back, PAGE, &there) == 0 || errno != ENOMEM) die("MADV_DONTFORK: the range is in the child");
        check(data, part, 1, 0, "what was not moved");
        _exit(0);
    }
    reap(pid, 0, "advice_moved");
    check(wiped, part, 1, part, "parent, grown");
    check(wiped + part * PAGE, part, 7, 0, "parent, what it grew by");
    check(kept_back, part, 1, 2 * part, "parent, moved");
    if (moved != MAP_FAILED) {
        check(moved, part, 1, 3 * part, "parent, moved from a place that stays");
        check(left, part, 8, 0, "parent, left behind");
    }
}

/* The data of a locale is in the program's heap, and what starts a thread reads it: also in a child in which nobody answers
 * faults yet. All of the heap is pushed out before each fork. */
static void locale(void) {
    if (setlocale(LC_ALL, "C.UTF-8") == NULL) skip("there is no locale C.UTF-8");
    setup();
    char *heap[64];
    for (size_t i = 0; i < 64; i++) ok((heap[i] = calloc(1, 4096 * (1 + i % 7))) != NULL);
    for (int round = 0; round < 6; round++) {
        for (int i = 0; i < 4; i++) pressure();
        uintptr_t here = (uintptr_t)heap[round] / (64 * MIB) * (64 * MIB);
        /* Where nothing is mapped that is an error, and no harm. */
        for (size_t i = 0; i < 64; i++) (void)madvise((void *)(here + i * MIB), MIB, MADV_PAGEOUT);
        pid_t pid = fork_or_die();
        if (pid == 0) {
            check(data, pages, 1, 0, "child with a locale");
            if (towupper(L'\u00e4') != L'\u00c4') die("the locale is not what it was");
            _exit(0);
        }
        reap(pid, 0, "locale");
    }
    for (size_t i = 0; i < 64; i++) free(heap[i]);
}

/* Three children and the parent write for ever, each says so now and then: for tests that kill. */
static void endless(void) {
    setup();
    for (int n = 0; n < 3; n++)
        if (fork_or_die() == 0) break;
    uint64_t rng = (uint64_t)getpid();
    for (uint64_t step = 1;; step++) {
        size_t page = draw(&rng) % pages;
        fill_page(data + page * PAGE, step, page);
        if (step % 256 == 0) {
            if (write(1, "tick\n", 5) != 5) _exit(1);
        }
    }
}

/* Forks `worker`s; those that somebody kills are replaced, those that end must have ended well. Says
 * `worker PID` for each; ends after 12 workers. */
static void workers(void) {
    setup();
    int made = 0, alive = 0;
    setvbuf(stdout, NULL, _IONBF, 0);
    while (made < 12 || alive > 0) {
        if (alive < 3 && made < 12) {
            pid_t pid = fork_or_die();
            if (pid == 0) {
                for (int round = 0; round < 2; round++) {
                    for (size_t i = (size_t)made % 3; i < pages; i += 3) fill_page(data + i * PAGE, 30 + (uint64_t)made, i);
                    for (size_t i = (size_t)made % 3; i < pages; i += 3)
                        check_page(data + i * PAGE, 30 + (uint64_t)made, i, "worker");
                }
                _exit(0);
            }
            made++;
            alive++;
            char line[32];
            int n = snprintf(line, sizeof line, "worker %d\n", (int)pid);
            ok(write(2, line, (size_t)n) == n);
            continue;
        }
        int status;
        ok(wait(&status) > 0);
        if (!(WIFEXITED(status) && WEXITSTATUS(status) == 0) && !(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL))
            die("a worker ended with wait status %#x", (unsigned)status);
        alive--;
    }
    check(data, pages, 1, 0, "parent of workers");
}

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"snapshot", snapshot}, {"modify", modify},           {"storm", storm},     {"killed", killed},
        {"execs", execs},       {"leaf", leaf},               {"thread", thread},   {"raw-syscall", raw_syscall},
        {"raw-asm", raw_asm},   {"raw-fork", raw_fork},       {"orphan", orphan},   {"advice", advice},
        {"advice-moved", advice_moved},
        {"locale", locale},
        {"endless", endless},   {"workers", workers},         {"exec-at-once", exec_at_once},
        {"namespace", namespace}, {"fails-late", fails_late}, {"fails-unseen", fails_unseen}, {NULL, NULL},
    };
    return run_case(argc, argv, cases);
}

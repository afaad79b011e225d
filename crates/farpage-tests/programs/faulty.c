/* Programs for devices that fail: pages that cannot be read any more, and memory that runs out. */
#include "common.h"
#include <setjmp.h>

static char *data;
static size_t pages;

static void setup(void) {
    pages = data_bytes / PAGE;
    data = map_pages(pages);
    fill(data, pages, 1, 0);
}

static sigjmp_buf back;
static char *volatile touched;
static pthread_t toucher;
static void on_bus(int s, siginfo_t *info, void *context) {
    (void)s;
    (void)context;
    if (!pthread_equal(pthread_self(), toucher)) die("SIGBUS in a thread that touched nothing bad");
    if ((char *)info->si_addr < touched || (char *)info->si_addr >= touched + PAGE) die("SIGBUS at %p, touched %p", info->si_addr, (void *)touched);
    siglongjmp(back, 1);
}

/* True where the page is right, false where touching it raises SIGBUS; anything else ends the program. */
static bool alive(size_t i) {
    touched = data + i * PAGE;
    if (sigsetjmp(back, 1)) return false;
    check_page(touched, 1, i, "beside poisoned pages");
    return true;
}

static atomic_bool done;
static char *other;
static void *beside(void *arg) {
    (void)arg;
    while (!atomic_load(&done)) check(other, 512, 9, 0, "another thread's memory");
    return NULL;
}

/* Counts the pages that raise SIGBUS; nothing else is harmed, and they stay bad. The count is on stderr as
 * `poisoned N`: it depends on the device. */
static void poisoned(void) {
    toucher = pthread_self();
    struct sigaction sa = {.sa_sigaction = on_bus, .sa_flags = SA_SIGINFO};
    ok(sigaction(SIGBUS, &sa, NULL) == 0);
    setup();
    other = map_pages(512);
    fill(other, 512, 9, 0);
    pthread_t t = start(beside, NULL);
    static bool bad[1 << 20];
    size_t count = 0;
    for (size_t i = 0; i < pages; i++)
        if (!alive(i)) {
            bad[i] = true;
            count++;
        }
    for (size_t i = 0; i < pages; i++) {
        bool good = alive(i);
        if (bad[i] && good) die("page %zu was poisoned and is not any more", i);
        if (bad[i]) continue;
        if (!good) count++, bad[i] = true;
    }
    /* Fresh memory in its place is good again. */
    for (size_t i = 0; i < pages; i++)
        if (bad[i]) {
            char *p = data + i * PAGE;
            ok(mmap(p, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p);
            check_zero(p, 1, "mapped over a poisoned page");
            fill_page(p, 1, i);
            if (!alive(i)) die("page %zu, mapped again, is still poisoned", i);
        }
    atomic_store(&done, true);
    join(t);
    fprintf(stderr, "poisoned %zu\n", count);
}

/* A child dies of SIGBUS; the parent's fresh memory and its life go on. The child's end is on stderr. */
static void child(void) {
    pid_t pid = fork();
    if (pid < 0) die("fork");
    if (pid == 0) {
        setup();
        check(data, pages, 1, 0, "child");
        check(data, pages, 1, 0, "child");
        _exit(0);
    }
    int status;
    ok(waitpid(pid, &status, 0) == pid);
    fprintf(stderr, "child %s\n", WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS ? "SIGBUS" : status == 0 ? "ended well" : "failed");
    data_bytes /= 16;
    setup();
    check(data, pages, 1, 0, "parent");
}

/* Maps and fills 1 MiB after the other until mmap says no, 256 MiB at most; all that was mapped is right. Where
 * it ended is on stderr as `mapped N` (the plain run maps all). */
static void until_full(void) {
    enum { MOST = 256 };
    static char *chunk[MOST];
    size_t n = 0, each = MIB / PAGE;
    for (; n < MOST; n++) {
        char *p = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) {
            ok(errno == ENOMEM);
            break;
        }
        chunk[n] = p;
        for (size_t i = 0; i < each; i++) fill_kind(p + i * PAGE, NOISE, n, i);
    }
    for (size_t c = 0; c < n; c++)
        for (size_t i = 0; i < each; i++) check_kind(chunk[c] + i * PAGE, NOISE, c, i, "mapped before memory ran out");
    fprintf(stderr, "mapped %zu\n", n);
    /* What is given back can be had again. */
    for (size_t c = 0; c < n / 2; c++) ok(munmap(chunk[c], MIB) == 0);
    char *p = map_bytes(MIB);
    fill(p, each, 3, 0);
    check(p, each, 3, 0, "mapped after some was given back");
}

int main(int argc, char **argv) {
    static const struct test_case cases[] = {
        {"poisoned", poisoned}, {"child", child}, {"until-full", until_full}, {NULL, NULL}};
    return run_case(argc, argv, cases);
}

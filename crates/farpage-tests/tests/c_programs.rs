//! The C programs of `programs/`, each case plainly and under farpage with a quarter of its memory.

use std::process::ExitCode;
use std::time::Duration;

use farpage_tests::{Expect, Job, Test, program, run_both, suite};

/// Program, case, expectation. Each works on 64 MiB (`programs/common.h`) within 16 MiB.
const CASES: &[(&str, &[&str])] = &[
    (
        "fork",
        &[
            "snapshot",
            "modify",
            "storm",
            "killed",
            "execs",
            "thread",
            "orphan",
            "advice",
            "advice-moved",
            "locale",
            "workers",
            "exec-at-once",
            "namespace",
            "fails-late",
            "fails-unseen",
        ],
    ),
    (
        "syscalls",
        &["files", "small", "sockets", "procmem", "futex", "stacks", "altstack", "uring", "uring-fixed"],
    ),
    (
        "plainrefs",
        &[
            "vmsplice",
            "vmsplice-syscall",
            "vmsplice-raw",
            "vmsplice-unmap",
            "vmsplice-child",
            "vmsplice-splice",
            "zerocopy",
            "send-zc",
        ],
    ),
    (
        "mappings",
        &[
            "munmap",
            "grow",
            "shrink",
            "fixed-move",
            "dontunmap",
            "small-over",
            "dontneed",
            "free",
            "free-pageout",
            "cut",
            "advise",
            "fixed",
            "noreplace",
            "populate",
            "reserve",
            "sparse",
            "shared",
            "raw",
            "brk",
        ],
    ),
    ("races", &["unmap", "move", "drop", "fork", "all"]),
    ("sig", &["timers", "longjmp", "cancel", "threads", "masked", "together", "fatal"]),
    (
        "touch",
        &[
            "sequential",
            "reverse",
            "strided",
            "scattered",
            "hot",
            "zeros",
            "same",
            "noise",
            "mixed",
            "bytes",
            "heap",
        ],
    ),
];

/// Cases that keep memory in DRAM that cannot move.
const UNMOVABLE: &[(&str, &str)] = &[
    ("mappings", "protect"),
    ("mappings", "mlock"),
    ("mappings", "mlockall"),
    ("races", "protect"),
    ("races", "advise"),
    ("sig", "barrier"),
];
/// Threads that touch what another drops at that moment get it from the kernel without our being asked: it is charged when the
/// call is over, and may be a page or two above the budget.
const GIVEN: &[(&str, &str)] = &[("races", "give-up")];
/// Children that came into being past the C library run outside the budget.
const OUTSIDE: &[(&str, &str)] = &[("fork", "raw-syscall"), ("fork", "raw-asm"), ("fork", "raw-fork")];

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for (name, cases) in CASES {
        for case in *cases {
            tests.push(test(name, case, "16M", Expect::PAGED));
        }
    }
    // What is locked stays in DRAM because that was asked for, what is read-only because the kernel does not move it
    // (docs/guarantees.md).
    for (name, case) in UNMOVABLE.iter().chain(GIVEN).chain(OUTSIDE) {
        tests.push(test(name, case, "16M", Expect { within_budget: false, ..Expect::PAGED }));
    }
    suite(tests)
}

fn test(name: &'static str, case: &'static str, dram: &'static str, expect: Expect) -> Test {
    let body = move || {
        let path = match program(name) {
            Ok(path) => path,
            Err(verdict) => return verdict,
        };
        let job = Job::new([path.into_os_string(), case.into(), "64".into()]);
        run_both(&job.expect(expect).limit(Duration::from_secs(60)), dram)
    };
    (format!("{name}::{case}"), Box::new(body))
}

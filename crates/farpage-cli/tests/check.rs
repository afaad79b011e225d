//! `farpage check` where there is nothing to check: one sentence and 125. What it finds is tested with real programs
//! (`crates/farpage-tests/tests/audit.rs`).

mod common;

use std::os::unix::process::CommandExt;
use std::process::Command;

use common::{FARPAGE, public_copy, refusal, root, skipped};

fn check(pid: &str) -> String {
    let (code, text) = refusal(Command::new(FARPAGE).args(["check", pid]));
    assert_eq!(code, 125, "{text}");
    text
}

#[test]
fn a_process_that_does_not_exist() {
    // Higher than any kernel's highest.
    assert!(check("2000000000").contains("there is no process 2000000000"));
}

#[test]
fn what_is_no_process_number() {
    for bad in ["0", "12x", "99999999999"] {
        assert!(check(bad).contains(bad));
    }
    let (code, text) = refusal(Command::new(FARPAGE).arg("check"));
    assert!(code == 125 && text.contains("see 'farpage --help'"), "{code}: {text}");
}

#[test]
fn a_process_that_is_not_managed() {
    let own = std::process::id().to_string();
    assert!(check(&own).contains("does not run under 'farpage run'"));
}

#[test]
fn a_process_of_another_user() {
    let tmp = tempfile::tempdir().unwrap();
    let own = std::process::id().to_string();
    let (code, text) = if root() {
        refusal(Command::new(public_copy(tmp.path())).uid(65534).args(["check", &own]))
    } else if std::fs::read_dir("/proc/1/fd").is_err() {
        refusal(Command::new(FARPAGE).args(["check", "1"]))
    } else {
        return skipped("everybody may look at every process here");
    };
    assert!(code == 125 && text.contains("no permission to look at process"), "{code}: {text}");
}

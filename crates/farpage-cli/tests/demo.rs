//! `farpage demo` as a user runs it: its result is right, and it keeps to its DRAM. Besides, its memory comes as huge
//! pages that leave while they are young, which is where a kernel's `UFFDIO_MOVE` was once found to miscount.

use std::process::Command;

mod common;

use common::{FARPAGE, runs_here};

#[test]
fn the_demonstration_ends_with_the_right_result_within_its_dram() {
    if !runs_here() {
        return;
    }
    let output = Command::new(FARPAGE).arg("demo").output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert!(out.contains("Verified"), "{out}{err}");
    assert!(err.is_empty(), "{err}");
}

//! The examples run, check what they did, and say so.

use std::path::PathBuf;
use std::process::Command;

/// An example's program: `cargo test` builds them beside the tests.
fn example(name: &str) -> PathBuf {
    let deps = std::env::current_exe().unwrap();
    let dir = deps.parent().unwrap().with_file_name("examples");
    dir.join(name)
}

fn run(name: &str, args: &[&str]) -> String {
    let out = Command::new(example(name)).args(args).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(out.status.success(), "{name}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn paged_vector() {
    assert!(run("paged_vector", &["64M", "8M"]).contains("64M of data in at most 8M of DRAM"));
}

#[test]
fn sort() {
    assert!(run("sort", &["64M", "16M"]).contains("8388608 numbers (64M) sorted within 16M of DRAM"));
}

#[test]
fn device() {
    assert!(run("device", &[]).contains("hold 100 different pages"));
}

#[test]
fn buffer_pool() {
    assert!(
        run("buffer_pool", &["64M", "8M"])
            .contains("1024 blocks of 64K, 1024 reads of the file for 3072 uses")
    );
}

//! What the tests of the command share.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The command under test.
pub const FARPAGE: &str = env!("CARGO_BIN_EXE_farpage");

/// `farpage run`, with options, `--`, and a shell that runs `script`.
pub fn shell(options: &[&str], script: &str) -> Command {
    let mut command = Command::new(FARPAGE);
    command.arg("run").args(options).args(["--", "sh", "-c", script]);
    command.env_remove("FARPAGE_DOMAIN").stdin(Stdio::null());
    command
}

/// A command that fails before it starts anything: its exit status and its one sentence.
pub fn refusal(command: &mut Command) -> (i32, String) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.stdout.is_empty(), "{command:?} wrote to standard output");
    assert_eq!(text.lines().count(), 1, "not one sentence: {text}");
    assert!(text.starts_with("farpage: "), "{text}");
    (output.status.code().unwrap(), text)
}

/// A copy of the command that another user can reach.
pub fn public_copy(dir: &Path) -> PathBuf {
    let copy = dir.join("farpage");
    // By another process: a file that this one has open for writing is inherited by what another test starts at that
    // moment, and cannot be executed until that has exec'd.
    assert!(Command::new("cp").arg(FARPAGE).arg(&copy).status().unwrap().success());
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

/// Says that a test could not be made, and why.
pub fn skipped(why: &str) {
    // Not by `eprintln!`, which the test harness keeps to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// Whether the tests run as root.
pub fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether `farpage run` works here; says why not.
pub fn runs_here() -> bool {
    let doctor = Command::new(FARPAGE).arg("doctor").output().unwrap();
    if !doctor.status.success() {
        skipped(&format!("farpage run does not work here:\n{}", String::from_utf8_lossy(&doctor.stdout)));
    }
    doctor.status.success()
}

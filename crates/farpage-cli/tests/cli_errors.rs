//! Every bad input gives one sentence on standard error and the exit status of `env(1)` and `timeout(1)`:
//! 125 for farpage's own errors, 126 for what cannot be run, 127 for what is not found.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{FARPAGE, public_copy, refusal, root, runs_here, skipped};

/// `farpage run OPTIONS -- true` must fail with 125 and a sentence that has `words`.
fn own_error(options: &[&str], words: &[&str]) {
    let mut command = Command::new(FARPAGE);
    let (code, text) = refusal(command.arg("run").args(options).args(["--", "true"]));
    assert_eq!(code, 125, "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is missing: {text}");
    }
}

/// `farpage run -- PROGRAM` must fail with `code` and a sentence that has `word`.
fn program_error(program: &Path, code: i32, word: &str) {
    let mut command = Command::new(FARPAGE);
    let (got, text) = refusal(command.args(["run", "--"]).arg(program));
    assert!(got == code && text.contains(word), "{got}: {text}");
}

fn executable(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn unknown_commands_and_options() {
    for args in [&["nonsense"][..], &["run", "--nonsense", "--", "true"], &["run"], &["run", "--dram"]] {
        let (code, text) = refusal(Command::new(FARPAGE).args(args));
        assert!(code == 125 && text.contains("see 'farpage --help'"), "{code}: {text}");
    }
}

#[test]
fn help_is_no_error() {
    for args in [&["--help"][..], &["run", "--help"], &["--version"]] {
        let output = Command::new(FARPAGE).args(args).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty() && output.stderr.is_empty());
    }
}

#[test]
fn unknown_devices() {
    for device in ["tape", "ram:", "ram:x", "file", "file:", ""] {
        own_error(&["--device", device], &["--device"]);
    }
}

#[test]
fn directories_that_cannot_hold_pages() {
    let tmp = tempfile::tempdir().unwrap();
    let missing = format!("file:{}", tmp.path().join("missing").display());
    own_error(&["--device", &missing], &["missing", "existing directory"]);
    let file = tmp.path().join("file");
    fs::write(&file, "").unwrap();
    own_error(&["--device", &format!("file:{}", file.display())], &["existing directory"]);
    // /proc is not writable even for root.
    own_error(&["--device", "file:/proc/self"], &["/proc/self", "write"]);
}

#[test]
fn a_directory_of_another_user() {
    if !root() {
        return skipped("only root can become another user");
    }
    let tmp = tempfile::tempdir().unwrap();
    let copy = public_copy(tmp.path());
    let device = format!("file:{}", tmp.path().display());
    let mut command = Command::new(copy);
    let (code, text) = refusal(command.uid(65534).args(["run", "--device", &device, "--", "true"]));
    assert!(code == 125 && text.contains("Permission denied"), "{text}");
}

#[test]
fn sizes_that_cannot_work() {
    own_error(&["--dram", "0"], &["too small", "smallest that works is 8M"]);
    own_error(&["--dram", "1M"], &["too small", "smallest that works is 8M"]);
    own_error(&["--dram", "12x"], &["12x"]);
    own_error(&["--dram", "99999999999999999999T"], &["--dram"]);
    own_error(&["--device", "ram:0"], &["too small", "smallest that works is 1M"]);
    own_error(&["--device", "ram:512K"], &["too small", "smallest that works is 1M"]);
    own_error(&["--device", "file:/tmp:4K"], &["too small", "smallest that works is 1M"]);
    own_error(&["--device", "ram:16777215T"], &["too large"]);
    own_error(&["--min-size", "0"], &["too small", "4K"]);
}

#[test]
fn more_than_the_machine_has() {
    own_error(&["--dram", "1000T"], &["larger than this machine", "auto"]);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = meminfo.split_whitespace().nth(1).unwrap().parse().unwrap();
    let pool = format!("ram:{}K", total + 4);
    own_error(&["--device", &pool], &["larger than this machine", "file device"]);
}

#[test]
fn statistics_that_cannot_be_written() {
    if runs_here() {
        own_error(&["--stats-json", "/nonexistent/x"], &["/nonexistent/x"]);
        own_error(&["--stats-json", "/tmp"], &["/tmp"]);
    }
}

#[test]
fn inside_another_run() {
    let mut command = Command::new(FARPAGE);
    let (code, text) = refusal(command.env("FARPAGE_DOMAIN", "/proc/1/fd/3").args(["run", "--", "true"]));
    assert!(code == 125 && text.contains("already inside"), "{text}");
}

#[test]
fn programs_that_are_not_found() {
    let tmp = tempfile::tempdir().unwrap();
    program_error(Path::new("no-such-program-here"), 127, "not found");
    program_error(Path::new(""), 127, "not found");
    program_error(&tmp.path().join("missing"), 127, "not found");
    let script = executable(tmp.path(), "script", b"#!/no/such/interpreter\n");
    program_error(&script, 127, "/no/such/interpreter");
}

#[test]
fn programs_that_cannot_be_run() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    program_error(dir, 126, "not an executable file");
    let plain = executable(dir, "plain", b"true\n");
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    program_error(&plain, 126, "chmod +x");
    program_error(&executable(dir, "binary", b"\0\x01\x02"), 126, "neither");
    let mut elf = fs::read("/proc/self/exe").unwrap();
    elf[18] ^= 1;
    program_error(&executable(dir, "foreign", &elf), 126, "another architecture");
}

#[test]
fn a_static_program() {
    let tmp = tempfile::tempdir().unwrap();
    let (source, program) = (tmp.path().join("s.c"), tmp.path().join("s"));
    fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let built =
        Command::new("cc").arg("-static").arg(&source).arg("-o").arg(&program).stderr(Stdio::null()).status();
    if !built.is_ok_and(|s| s.success()) {
        return skipped("no C compiler that links statically");
    }
    program_error(&program, 126, "statically linked");
    let script = executable(tmp.path(), "script", format!("#!{}\n", program.display()).as_bytes());
    program_error(&script, 126, "statically linked");
}

#[test]
fn a_setuid_program() {
    if !root() {
        return skipped("only root can make a program setuid to another user");
    }
    let tmp = tempfile::tempdir().unwrap();
    let program = executable(tmp.path(), "su", &fs::read("/proc/self/exe").unwrap());
    std::os::unix::fs::chown(&program, Some(1), None).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    program_error(&program, 126, "setuid");
}

#[test]
fn a_kernel_that_is_too_old() {
    // The kernel can be asked to say that it is Linux 2.6.
    let works = Command::new("setarch").args(["--uname-2.6", "true"]).status().is_ok_and(|s| s.success());
    if !works {
        return skipped("setarch --uname-2.6 does not work");
    }
    let mut command = Command::new("setarch");
    let (code, text) = refusal(command.args(["--uname-2.6", FARPAGE, "run", "--", "true"]));
    assert!(code == 125 && text.contains("the kernel is 2.6.") && text.contains("6.8"), "{code}: {text}");
}

#[test]
fn no_permission_for_userfaultfd() {
    if !root() {
        return skipped("only root can become a user without rights");
    }
    if fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|v| v.trim() == "1")
        || fs::metadata("/dev/userfaultfd").is_ok_and(|m| m.permissions().mode() & 0o006 != 0)
    {
        return skipped("every user may use userfaultfd here");
    }
    let tmp = tempfile::tempdir().unwrap();
    let mut command = Command::new(public_copy(tmp.path()));
    let (code, text) = refusal(command.uid(65534).args(["run", "--", "true"]));
    assert_eq!(code, 125, "{text}");
    for words in ["chmod a+rw /dev/userfaultfd", "vm.unprivileged_userfaultfd=1", "CAP_SYS_PTRACE"] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_command_with_file_capabilities() {
    let tmp = tempfile::tempdir().unwrap();
    let copy = public_copy(tmp.path());
    let set = Command::new("setcap").arg("cap_sys_ptrace+ep").arg(&copy).status();
    if !root() || !set.is_ok_and(|s| s.success()) {
        return skipped("setcap does not work here");
    }
    let (code, text) = refusal(Command::new(copy).uid(65534).args(["run", "--", "true"]));
    assert!(code == 125 && text.contains("file capabilities"), "{code}: {text}");
}

#[test]
fn a_library_that_cannot_be_loaded() {
    // In a process namespace of its own, executable memory files are forbidden.
    let script = format!("echo 2 > /proc/sys/vm/memfd_noexec && exec {FARPAGE} run -- true");
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "sh", "-c"]);
    let usable = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "sh", "-c", "echo 2 > /proc/sys/vm/memfd_noexec"])
        .stderr(Stdio::null())
        .status();
    if !usable.is_ok_and(|s| s.success()) || !runs_here() {
        return skipped("vm.memfd_noexec cannot be set in a namespace");
    }
    let (code, text) = refusal(command.arg(script));
    assert!(code == 125 && text.contains("vm.memfd_noexec"), "{code}: {text}");
}

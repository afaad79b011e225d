//! The program's exit status and signals pass through, and nothing stays behind.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{FARPAGE, runs_here, shell, skipped};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, kill_process_group, pidfd_open, waitpid,
};

/// How long to wait for something that takes milliseconds.
const DEADLINE: Duration = Duration::from_secs(20);

/// A run whose standard output is read line by line.
struct Run {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Run {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }
    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
    /// Fails rather than waits for ever.
    fn readable(&self) {
        if self.out.buffer().is_empty() {
            let timeout = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
            let ready = poll(&mut [PollFd::new(self.out.get_ref(), PollFlags::IN)], Some(&timeout));
            assert_eq!(ready, Ok(1), "nothing comes, and some process keeps the output open");
        }
    }
    fn line(&mut self) -> String {
        self.readable();
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
    fn pid_line(&mut self) -> Pid {
        Pid::from_raw(self.line().parse().unwrap()).unwrap()
    }
    /// Reads until every process that has the standard output has ended.
    fn rest(&mut self) -> String {
        let mut text = String::new();
        loop {
            self.readable();
            match self.out.read_line(&mut text) {
                Ok(0) => return text,
                other => other.unwrap(),
            };
        }
    }
    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }
    fn code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // A test that failed leaves nothing running.
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = self.child.kill();
        }
    }
}

/// Waits until the process has ended (it may still be a zombie).
fn ended(pid: Pid) {
    if let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) {
        let timeout = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap(),
            1,
            "{pid} still runs"
        );
    }
}

/// Waits for what the kernel announces by no event.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < DEADLINE, "not so in time: {what}");
        std::thread::yield_now();
    }
}

/// A field of /proc/PID/stat behind the name: 0 is the state, 1 the parent.
fn stat(pid: Pid, field: usize) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(") ")?.1.split_whitespace().nth(field).map(str::to_owned)
}

fn parent(pid: Pid) -> Pid {
    Pid::from_raw(stat(pid, 1).unwrap().parse().unwrap()).unwrap()
}

fn fifo(dir: &Path) -> String {
    let path = dir.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn exit_status_passes() {
    if !runs_here() {
        return;
    }
    for code in [0, 1, 42, 124, 125, 255] {
        let status = shell(&[], &format!("exit {code}")).status().unwrap();
        assert_eq!(status.code(), Some(code));
    }
}

#[test]
fn death_by_signal_passes() {
    if !runs_here() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    for signal in
        [libc::SIGTERM, libc::SIGKILL, libc::SIGINT, libc::SIGSEGV, libc::SIGABRT, libc::SIGUSR1, 40]
    {
        let status =
            shell(&[], &format!("ulimit -c 0; kill -{signal} $$")).current_dir(tmp.path()).status().unwrap();
        assert_eq!(status.signal(), Some(signal));
        assert!(!status.core_dumped());
    }
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
}

#[test]
fn the_program_sees_what_it_would_see_without_farpage() {
    if !runs_here() {
        return;
    }
    let script = "pwd; cat; printf '%s|' \"$0\" \"$@\"; grep -E '^SigBlk' /proc/self/status; \
                  sed -nE 's/^SigIgn:.*(.{8})$/\\1/p' /proc/self/status; tr '\\0' '\\n' < /proc/self/environ | \
                  grep -vE '^(LD_PRELOAD|FARPAGE_DOMAIN|_)=' | sort";
    let run = |command: &mut Command| {
        let args = ["sh", "-c", script, "name", "two words", "", "--", "-x"];
        let mut child = command
            .args(args)
            .current_dir("/usr")
            .env("X", "y z")
            .env_remove("FARPAGE_DOMAIN")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"input\n").unwrap();
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    };
    let plain = run(&mut Command::new("env"));
    let managed = run(Command::new(FARPAGE).args(["run", "--"]));
    assert_eq!(managed, plain);
    assert!(plain.starts_with("/usr\ninput\nname|two words||--|-x|"), "{plain}");
}

/// A shell gives any number below ten to a file, and so do `flock`, `configure` and programs that call `dup2`.
#[test]
fn descriptors_are_the_programs_to_number() {
    if !runs_here() {
        return;
    }
    let script = "for n in 3 4 5 6 7 8 9; do eval \"exec $n>f$n\" || echo \"cannot open $n\"; done
        for n in 3 4 5 6 7 8 9; do echo \"shell $n\" >&$n; /bin/echo \"child $n\" >&$n; done
        exec 3>&- 4<f5; cat f? <&4
        out=$( { echo to-out; echo to-err >&2; } 3>&1 1>&2 2>&3 ); echo \"captured: $out\"
        (flock -n 9 && echo locked) 9>lock
        ls -l /proc/self/fd | sed -n 's/.* \\([0-9]\\) -> .*/\\1/p'";
    let run = |command: &mut Command| {
        let dir = tempfile::tempdir().unwrap();
        let command = command.current_dir(&dir).stdin(Stdio::null()).stderr(Stdio::null());
        let output = command.args(["sh", "-c", script]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let plain = run(&mut Command::new("env"));
    let managed = run(Command::new(FARPAGE).args(["run", "--"]).env_remove("FARPAGE_DOMAIN"));
    assert!(plain.contains("shell 3\nchild 3\n") && plain.contains("captured: to-err\n"), "{plain}");
    assert_eq!(managed, plain);
}

#[test]
fn blocked_signals_stay_blocked() {
    if !runs_here() {
        return;
    }
    let output = Command::new("env")
        .args(["--block-signal=USR1", FARPAGE, "run", "--", "grep", "SigBlk", "/proc/self/status"])
        .env_remove("FARPAGE_DOMAIN")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, "SigBlk:\t0000000000000200\n", "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_text_file_without_interpreter_runs_in_the_shell() {
    use std::os::unix::fs::PermissionsExt;
    if !runs_here() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("script");
    fs::write(&file, "echo $1; exit 9\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(FARPAGE).args(["run", "--"]).arg(&file).arg("x").output().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(9), &b"x\n"[..]));
}

#[test]
fn every_process_of_the_tree_loads_the_library() {
    if !runs_here() {
        return;
    }
    // Other directory, closed descriptors, exec, a shell in a shell.
    let count = "grep -c memfd:farpage-preload /proc/self/maps";
    let script = format!(
        "cd /; exec 3>&- 4>&- 5>&- 6>&- 7>&-; {count}; sh -c 'cd /usr; {count}; exec sh -c \"{count}\"'"
    );
    let output = shell(&[], &script).env("LD_PRELOAD", "").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().filter(|l| l.parse::<u32>().unwrap() > 0).count(), 3, "{text}");
    let quiet = String::from_utf8(output.stderr).unwrap();
    assert!(!quiet.contains("from LD_PRELOAD"), "{quiet}");

    let output = shell(&[], "echo $LD_PRELOAD").env("LD_PRELOAD", "libc.so.6").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("/proc/") && text.trim_end().ends_with(":libc.so.6"), "{text}");
}

#[test]
fn signals_are_passed_on_once() {
    if !runs_here() {
        return;
    }
    let script = "for s in HUP INT QUIT USR1 USR2 ALRM TERM; do trap \"echo $s\" $s; done; \
                  trap 'echo end; exit 7' WINCH; echo ready; while :; do read x; done";
    let mut run = Run::start(shell(&[], script).stdin(Stdio::piped()));
    assert_eq!(run.line(), "ready");
    for (signal, name) in [
        (Signal::HUP, "HUP"),
        (Signal::INT, "INT"),
        (Signal::QUIT, "QUIT"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
        (Signal::ALARM, "ALRM"),
        (Signal::TERM, "TERM"),
    ] {
        run.signal(signal);
        assert_eq!(run.line(), name);
    }
    run.signal(Signal::WINCH);
    assert_eq!(run.rest(), "end\n");
    assert_eq!(run.code(), Some(7));
}

#[test]
fn an_unhandled_signal_ends_program_and_command_alike() {
    if !runs_here() {
        return;
    }
    let mut run = Run::start(&mut shell(&[], "echo ready; exec sleep 1000"));
    assert_eq!(run.line(), "ready");
    run.signal(Signal::TERM);
    assert_eq!(run.child.wait().unwrap().signal(), Some(libc::SIGTERM));
}

#[test]
fn ctrl_c_reaches_the_program_once_and_leaves_the_command_alone() {
    if !runs_here() {
        return;
    }
    // `script` gives it a terminal of its own. With `exec`, for the shell in between would die of Ctrl-C.
    let inner =
        format!("exec {FARPAGE} run -- sh -c 'trap \"echo caught\" INT; echo ready; read x; read x; exit 6'");
    let child = Command::new("script")
        .args(["-qefc", &inner, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else { return skipped("no script(1)") };
    let mut input = child.stdin.take().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let mut run = Run { child, out };
    assert_eq!(run.line(), "ready");
    input.write_all(b"\x03").unwrap();
    eventually("the program catches Ctrl-C", || run.line().contains("caught"));
    input.write_all(b"a\nb\n").unwrap();
    let rest = run.rest();
    assert!(!rest.contains("caught"), "{rest}");
    assert_eq!(run.code(), Some(6));
}

#[test]
fn a_signal_to_the_group_leaves_the_command_waiting_for_the_program() {
    if !runs_here() {
        return;
    }
    let script = "trap 'echo caught; exit 3' INT; echo ready; while :; do read x; done";
    let mut run = Run::start(shell(&[], script).stdin(Stdio::piped()).process_group(0));
    assert_eq!(run.line(), "ready");
    kill_process_group(run.pid(), Signal::INT).unwrap();
    assert!(run.rest().starts_with("caught\n"));
    assert_eq!(run.code(), Some(3));
}

#[test]
fn stopping_and_continuing() {
    if !runs_here() {
        return;
    }
    let mut run = Run::start(shell(&[], "echo $$; read x; exit 4").stdin(Stdio::piped()).process_group(0));
    let program = run.pid_line();
    for stop in [Signal::TSTP, Signal::STOP] {
        // TSTP reaches the program through the command; STOP hits the program itself.
        if stop == Signal::TSTP {
            run.signal(stop)
        } else {
            kill_process(program, stop).unwrap()
        };
        eventually("the command stops like the program", || {
            let options = WaitOptions::UNTRACED | WaitOptions::NOHANG;
            waitpid(Some(run.pid()), options).unwrap().is_some_and(|(_, status)| status.stopped())
        });
        assert_eq!(stat(program, 0).unwrap(), "T");
        run.signal(Signal::CONT);
        eventually("the program goes on", || stat(program, 0).unwrap() != "T");
    }
    run.child.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(run.code(), Some(4));
}

/// A tree with a background child, one in a session of its own, and an orphan; prints the program's process id.
const FAMILY: &str = "trap '' TERM HUP INT; echo $$; (trap '' TERM HUP; sleep 1000) & \
                      setsid sh -c 'sleep 1000; true' & \
                      (sh -c 'sleep 1000; true' &) ; echo started; wait";

#[test]
fn killing_the_command_leaves_no_process() {
    if !runs_here() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let mut run = Run::start(shell(&[], FAMILY).env("TMPDIR", tmp.path()));
    let program = run.pid_line();
    assert_eq!(run.line(), "started");
    let keeper = parent(program);
    run.signal(Signal::KILL);
    // The standard output closes when the last process has ended.
    assert_eq!(run.rest(), "");
    ended(keeper);
    ended(program);
    assert_eq!(run.child.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
}

#[test]
fn killing_the_keeper_leaves_no_process() {
    if !runs_here() {
        return;
    }
    let mut run = Run::start(&mut shell(&[], FAMILY));
    let program = run.pid_line();
    assert_eq!(run.line(), "started");
    kill_process(parent(program), Signal::KILL).unwrap();
    assert_eq!(run.rest(), "");
    assert_eq!(run.child.wait().unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn a_background_child_keeps_the_command_until_it_ends() {
    if !runs_here() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let fifo = fifo(tmp.path());
    let script = format!("echo $$; (read x < {fifo}; echo late) & echo $!; exit 5");
    let mut run = Run::start(&mut shell(&[], &script));
    let (program, child) = (run.pid_line(), run.pid_line());
    let keeper = parent(child);
    ended(program);
    eventually("the program is reaped", || stat(program, 0).is_none());
    eventually("the keeper adopts the orphan", || parent(child) != program);
    assert!(keeper == program || keeper == parent(child));
    assert!(run.child.try_wait().unwrap().is_none());
    fs::write(&fifo, "\n").unwrap();
    assert_eq!(run.rest(), "late\n");
    assert_eq!(run.code(), Some(5));
}

#[test]
fn signals_reach_what_the_program_left_running() {
    if !runs_here() {
        return;
    }
    let script = "echo $$; (trap 'echo told; exit' TERM; echo ready; while :; do read x; done) <&0 & exit 5";
    let mut run = Run::start(shell(&[], script).stdin(Stdio::piped()));
    let program = run.pid_line();
    assert_eq!(run.line(), "ready");
    eventually("the program is reaped", || stat(program, 0).is_none());
    run.signal(Signal::TERM);
    assert_eq!(run.rest(), "told\n");
    assert_eq!(run.code(), Some(5));
}

#[test]
fn orphans_are_reaped_while_the_program_runs() {
    if !runs_here() {
        return;
    }
    let mut run = Run::start(shell(&[], "(sh -c 'echo $$' &); read x; exit 0").stdin(Stdio::piped()));
    let orphan = run.pid_line();
    eventually("the orphan is reaped", || stat(orphan, 0).is_none());
    assert!(run.child.try_wait().unwrap().is_none());
    drop(run.child.stdin.take());
    assert_eq!(run.code(), Some(0));
}

#[test]
fn statistics_and_nothing_else_are_left() {
    if !runs_here() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let shm = || {
        let names = fs::read_dir("/dev/shm").into_iter().flatten().flatten().map(|e| e.file_name());
        names.filter(|n| n.to_string_lossy().contains("farpage")).count()
    };
    let before = shm();
    let json = tmp.path().join("stats.json");
    fs::write(&json, "x".repeat(100_000)).unwrap();
    let options = ["--stats", "--dram", "64M", "--stats-json", json.to_str().unwrap()];
    let output = shell(&options, "exit 8").env("TMPDIR", tmp.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(8));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.lines().count() >= 10 && text.lines().all(|l| l.starts_with("farpage: ")), "{text}");
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(stats["dram_budget"], 64 << 20);
    assert_eq!(stats["leaked_frames"], 0);
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    assert_eq!(shm(), before);
}

#[test]
fn closed_standard_streams_do_no_harm() {
    if !runs_here() {
        return;
    }
    let status = shell(&[], &format!("exec {FARPAGE} doctor >&- 2>&-")).status().unwrap();
    assert_eq!(status.code(), Some(0));
    let script = format!("{FARPAGE} run --stats --verbose -- sh -c 'exit 3' 2>&- >&- <&-");
    let status = Command::new("sh").args(["-c", &script]).status().unwrap();
    assert_eq!(status.code(), Some(3));
}

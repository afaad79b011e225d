//! A command, run plainly and under `farpage run`.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

use crate::stats::{Expect, Stats};
use crate::suite::{Verdict, plain_only};
use crate::{farpage, tree};

/// Why a test failed.
#[derive(Debug, thiserror::Error)]
pub enum TestError {
    /// An operating system call of the test itself failed.
    #[error("{0}: {1}")]
    Os(String, #[source] std::io::Error),
    /// The command did not end in time (it has been killed).
    #[error("{name} did not do what was waited for within {limit:?}\n{state}")]
    Hangs {
        /// What was run.
        name: String,
        /// How long it had.
        limit: Duration,
        /// Its processes and threads, and what it had said.
        state: String,
    },
    /// Something is not as it must be.
    #[error("{0}")]
    Wrong(String),
}

impl From<TestError> for String {
    fn from(e: TestError) -> Self {
        e.to_string()
    }
}

/// How often every run under farpage is audited, in milliseconds.
const AUDIT_MS: &str = "100";

/// A command and how to run it under farpage.
#[derive(Debug, Clone)]
pub struct Job {
    command: Vec<OsString>,
    dram: String,
    devices: Vec<String>,
    options: Vec<String>,
    limit: Duration,
    dir: Option<PathBuf>,
    env: Vec<(OsString, OsString)>,
    expect: Expect,
}

impl Job {
    /// A command with its arguments; 16M of DRAM, one `ram:512M` device, three minutes, [`Expect::PAGED`].
    pub fn new<S: Into<OsString>>(command: impl IntoIterator<Item = S>) -> Self {
        Self {
            command: command.into_iter().map(Into::into).collect(),
            dram: "16M".to_owned(),
            devices: Vec::new(),
            options: Vec::new(),
            limit: Duration::from_secs(180),
            dir: None,
            env: Vec::new(),
            expect: Expect::PAGED,
        }
    }

    /// Sets `--dram`.
    pub fn dram(mut self, size: &str) -> Self {
        self.dram = size.to_owned();
        self
    }

    /// Adds a `--device`.
    pub fn device(mut self, spec: &str) -> Self {
        self.devices.push(spec.to_owned());
        self
    }

    /// Adds another option of `farpage run`.
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// The time after which the command is killed and the test fails.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The working directory.
    pub fn dir(mut self, dir: &Path) -> Self {
        self.dir = Some(dir.to_path_buf());
        self
    }

    /// Adds an environment variable.
    pub fn env(mut self, key: &str, value: impl Into<OsString>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// What must hold of the stats.
    pub fn expect(mut self, expect: Expect) -> Self {
        self.expect = expect;
        self
    }

    fn name(&self) -> String {
        self.command.iter().map(|s| s.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    /// Starts the command plainly.
    pub fn start_plain(&self) -> Result<Running, TestError> {
        let mut argv = self.command.iter();
        let program = argv.next().ok_or_else(|| TestError::Wrong("an empty command".to_owned()))?;
        let mut command = Command::new(program);
        command.args(argv);
        self.start(command, None)
    }

    /// Starts the command under `farpage run`.
    pub fn start_farpage(&self) -> Result<Running, TestError> {
        let stats =
            tempfile::NamedTempFile::new().map_err(|e| TestError::Os("a temporary file".to_owned(), e))?;
        let mut command = Command::new(farpage().map_err(TestError::Wrong)?);
        command.args(["run", "--audit", AUDIT_MS, "--dram", &self.dram]);
        if self.devices.is_empty() {
            command.args(["--device", "ram:512M"]);
        }
        for device in &self.devices {
            command.args(["--device", device]);
        }
        command.args(&self.options).arg("--stats-json").arg(stats.path()).arg("--").args(&self.command);
        self.start(command, Some(stats))
    }

    fn start(
        &self,
        mut command: Command,
        stats: Option<tempfile::NamedTempFile>,
    ) -> Result<Running, TestError> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command.env("LC_ALL", "C").envs(self.env.iter().map(|(k, v)| (k, v)));
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        let mut child = command.spawn().map_err(|e| TestError::Os(self.name(), e))?;
        let out = Stream::collect(child.stdout.take());
        let err = Stream::collect(child.stderr.take());
        Ok(Running {
            child,
            out,
            err,
            stats,
            name: self.name(),
            deadline: Instant::now() + self.limit,
            limit: self.limit,
        })
    }
}

/// The bytes of a pipe as they come in, collected by a thread.
#[derive(Debug, Clone, Default)]
struct Stream(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    read: Mutex<Collected>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn collect<R: Read + Send + 'static>(pipe: Option<R>) -> Self {
        let stream = Self::default();
        let shared = Arc::clone(&stream.0);
        std::thread::spawn(move || {
            let mut buffer = [0u8; 8192];
            let mut pipe = pipe;
            loop {
                let n = pipe.as_mut().map_or(0, |p| p.read(&mut buffer).unwrap_or(0));
                let mut state = shared.read.lock().unwrap_or_else(PoisonError::into_inner);
                state.bytes.extend_from_slice(&buffer[..n]);
                state.ended = n == 0;
                shared.more.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        stream
    }

    /// Waits until `enough(bytes, ended)`; false when the deadline comes first.
    fn wait(&self, deadline: Instant, mut enough: impl FnMut(&[u8], bool) -> bool) -> bool {
        let mut state = self.0.read.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if enough(&state.bytes, state.ended) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.0.more.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.read.lock().unwrap_or_else(PoisonError::into_inner).bytes.clone()
    }
}

/// A command that has been started. Dropped, it is killed with all below it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    out: Stream,
    err: Stream,
    stats: Option<tempfile::NamedTempFile>,
    name: String,
    deadline: Instant,
    limit: Duration,
}

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error, as text.
    pub stderr: String,
    /// Its exit status as a shell sees it: a signal counts as 128 + its number.
    pub status: i32,
    /// Its farpage stats, where it ran under farpage and left some.
    pub stats: Option<Stats>,
    /// How long it took.
    pub took: Duration,
}

impl Outcome {
    /// The end of standard error, for a message.
    pub fn tail(&self) -> String {
        text(self.stderr.as_bytes())
    }
}

impl Running {
    /// The process (under farpage: the launcher's).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the text on standard output (or on standard error) satisfies `enough`.
    pub fn wait_for(&self, stderr: bool, enough: impl Fn(&str) -> bool) -> Result<(), TestError> {
        let stream = if stderr { &self.err } else { &self.out };
        let mut ended = false;
        let found = stream.wait(self.deadline, |bytes, end| {
            let yes = enough(&String::from_utf8_lossy(bytes));
            ended = end && !yes;
            yes || end
        });
        if found && !ended { Ok(()) } else { Err(self.hangs(if ended { "(output ended)\n" } else { "" })) }
    }

    /// Sends a signal to one process.
    pub fn kill(pid: u32, signal: Signal) {
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            // It may have ended meanwhile: that is what a kill test has to live with.
            let _ = kill_process(pid, signal);
        }
    }

    /// What it and every process below it are doing, and what it has said.
    pub fn describe(&self) -> String {
        let mut out = tree::describe(self.pid());
        for pid in tree::descendants(self.pid()) {
            out.push_str(&tree::describe(pid));
        }
        out + &format!("stdout:\n{}\nstderr:\n{}", text(&self.out.bytes()), text(&self.err.bytes()))
    }

    fn hangs(&self, note: &str) -> TestError {
        TestError::Hangs {
            name: self.name.clone(),
            limit: self.limit,
            state: note.to_owned() + &self.describe(),
        }
    }

    /// Waits for its end, within the job's time limit.
    pub fn finish(mut self) -> Result<Outcome, TestError> {
        let os = |e: rustix::io::Errno| TestError::Os(self.name.clone(), e.into());
        let started = self.deadline - self.limit;
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| TestError::Wrong("no process".to_owned()))?;
        let fd = pidfd_open(pid, PidfdFlags::empty()).map_err(os)?;
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let left = rustix::event::Timespec::try_from(left).map_err(|_| os(rustix::io::Errno::INVAL))?;
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Err(self.hangs("")),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(os(e)),
            }
        }
        let status = self.child.wait().map_err(|e| TestError::Os(self.name.clone(), e))?;
        let took = started.elapsed();
        // The pipes end when the last process that holds them does: soon, if nothing stays behind.
        let grace = Instant::now() + Duration::from_secs(20);
        if !self.out.wait(grace, |_, end| end) || !self.err.wait(grace, |_, end| end) {
            return Err(TestError::Wrong(format!(
                "{}: it has ended, but something still holds its output",
                self.name
            )));
        }
        let stats = match &self.stats {
            Some(file) if file.path().metadata().is_ok_and(|m| m.len() > 0) => {
                Some(Stats::read(file.path()).map_err(TestError::Wrong)?)
            }
            _ => None,
        };
        Ok(Outcome {
            stdout: self.out.bytes(),
            stderr: String::from_utf8_lossy(&self.err.bytes()).into_owned(),
            status: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stats,
            took,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let below = tree::descendants(self.pid());
        if let Some(group) = i32::try_from(self.pid()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        for pid in below {
            Self::kill(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    const MOST: usize = 8192;
    let tail = &bytes[bytes.len().saturating_sub(MOST)..];
    String::from_utf8_lossy(tail).into_owned()
}

/// Runs the job plainly.
pub fn run_plain(job: &Job) -> Result<Outcome, TestError> {
    job.start_plain()?.finish()
}

/// Runs the job under `farpage run`; its stats are there and hold what the job expects.
pub fn run_farpage(job: &Job) -> Result<(Outcome, Stats), TestError> {
    let outcome = job.start_farpage()?.finish()?;
    let stats = outcome.stats.clone().ok_or_else(|| {
        TestError::Wrong(format!(
            "{}: farpage left no stats (status {})\nstderr:\n{}",
            job.name(),
            outcome.status,
            outcome.tail()
        ))
    })?;
    job.expect.check(&stats).map_err(|e| {
        TestError::Wrong(format!(
            "{} (status {}): {e}\nstderr:\n{}",
            job.name(),
            outcome.status,
            outcome.tail()
        ))
    })?;
    Ok((outcome, stats))
}

/// Runs the job plainly, then under farpage with `dram`, and compares output and exit status; the stats must
/// hold what the job expects. Exit status 77 of the plain run is a skip (its output says why).
pub fn run_both(job: &Job, dram: &str) -> Result<Verdict, String> {
    run_both_and(job, dram, |_| Ok(()))
}

/// As [`run_both`]; `check` looks at the stats of the run under farpage, too.
pub fn run_both_and(
    job: &Job,
    dram: &str,
    check: impl FnOnce(&Stats) -> Result<(), String>,
) -> Result<Verdict, String> {
    let plain = run_plain(job)?;
    if plain.status == 77 {
        let said = text(&plain.stdout);
        return Ok(Verdict::Skipped(said.trim().trim_start_matches("SKIPPED: ").to_owned()));
    }
    if plain.status != 0 {
        return Err(format!(
            "{} fails without farpage: status {}\nstdout:\n{}\nstderr:\n{}",
            job.name(),
            plain.status,
            text(&plain.stdout),
            plain.tail()
        ));
    }
    if plain_only() {
        return Ok(Verdict::Passed);
    }
    let (paged, stats) = match run_farpage(&job.clone().dram(dram)) {
        Ok(done) => done,
        Err(e) => return Err(e.to_string()),
    };
    if paged.status != plain.status {
        return Err(format!(
            "{}: status {} under farpage\nstderr:\n{}",
            job.name(),
            paged.status,
            paged.stderr
        ));
    }
    if paged.stdout != plain.stdout {
        return Err(format!(
            "{}: other output under farpage\nplain:\n{}\nfarpage:\n{}\nstderr:\n{}",
            job.name(),
            text(&plain.stdout),
            text(&paged.stdout),
            paged.tail()
        ));
    }
    check(&stats).map(|()| Verdict::Passed)
}

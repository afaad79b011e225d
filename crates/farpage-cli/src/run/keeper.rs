//! The process that owns the domain and is the parent of the program's tree.

use std::ffi::OsString;
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, getpid, wait};

use super::auditor::Auditor;
use super::library::Library;
use super::{DOMAIN_VARIABLE, Job, report, tree};
use crate::error::{CliError, EXIT_OWN, system};
use crate::plainrefs::{self, Installer};
use crate::program::ProgramError;
use crate::say;
use crate::sys::{Signals, die_of, send, spawn_bound};
use farpage::domain::{Launcher, Stats};

/// The housekeeping thread looks at least this often, should it have missed a change.
const HOUSEKEEPING: Duration = Duration::from_secs(60);

/// Creates the domain, runs the program and waits until its whole tree has ended. Gives the program's exit
/// status, or ends this process by the program's signal.
pub fn run(job: Job, signals: &Signals, front: Pid, front_fd: &OwnedFd) -> Result<u8, CliError> {
    // For `ps`, and so that a signal sent by name reaches the front alone.
    let _ = rustix::thread::set_name(c"farpage-keeper");
    rustix::process::set_child_subreaper(Some(getpid())).map_err(system("becoming subreaper failed"))?;
    let library = Library::create()?;
    let launcher = Arc::new(Launcher::create(&job.config)?);
    let installer = plainrefs::watch(launcher.clone(), job.config.verbose)
        .map_err(system("starting the watch over system calls failed"))?;
    let program = start(&job, &library, &launcher, signals, installer)?;
    let auditor = job.audit.map(|every| Auditor::start(launcher.clone(), every)).transpose()?;
    keep_house(launcher.clone(), auditor.clone())?;

    let auditor = auditor.as_deref();
    let status = Tree { program, signals, front, front_fd, launcher: &launcher, auditor }.wait()?;
    finish(job, &launcher.finish(), auditor);
    if auditor.is_some_and(|a| a.differences() > 0) {
        return Ok(EXIT_OWN);
    }
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(code as u8),
        (None, signal) => die_of(signal.unwrap_or(libc::SIGKILL)),
    }
}

/// Starts the program with the library in it.
fn start(
    job: &Job,
    library: &Library,
    launcher: &Launcher,
    signals: &Signals,
    installer: Installer,
) -> Result<Pid, CliError> {
    let (path, script) = job.program.command();
    let mut command = Command::new(path);
    command.arg0(&job.command[0]);
    if let Some(script) = script {
        command.arg(script);
    }
    command.args(&job.command[1..]);
    let existing: Option<OsString> = std::env::var_os("LD_PRELOAD");
    command.env("LD_PRELOAD", library.preload(existing.as_deref()));
    command.env(DOMAIN_VARIABLE, launcher.env_value());
    let child = spawn_bound(&mut command, signals, move || installer.install())
        .map_err(|source| exec_error(path, source))?;
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| CliError::Other("the program has no process id: try again".into()))
}

fn exec_error(path: &std::path::Path, source: io::Error) -> ProgramError {
    match source.kind() {
        io::ErrorKind::NotFound => ProgramError::NotFound(path.into()),
        _ => ProgramError::Exec { program: path.into(), source },
    }
}

/// Gives back what dead processes held, also those whose death this process is not told of (a process that
/// has a living parent in the tree). Runs until the keeper exits.
fn keep_house(launcher: Arc<Launcher>, auditor: Option<Arc<Auditor>>) -> Result<(), CliError> {
    let work = move || {
        loop {
            launcher.wait_change(HOUSEKEEPING);
            if let Some(auditor) = &auditor {
                auditor.before_reaping();
            }
            launcher.reap();
        }
    };
    let thread = std::thread::Builder::new().name("farpage-house".into()).spawn(work);
    thread.map(drop).map_err(system("starting a thread failed"))
}

/// The program and everything that it starts.
struct Tree<'a> {
    program: Pid,
    signals: &'a Signals,
    front: Pid,
    front_fd: &'a OwnedFd,
    launcher: &'a Launcher,
    auditor: Option<&'a Auditor>,
}

impl Tree<'_> {
    /// Waits until the last process has ended; gives the program's status.
    fn wait(&self) -> Result<ExitStatus, CliError> {
        let mut status = None;
        loop {
            if self.reap(&mut status)? {
                break;
            }
            let mut fds =
                [PollFd::new(self.signals, PollFlags::IN), PollFd::new(self.front_fd, PollFlags::IN)];
            // An interrupted or failed poll only means: look again.
            let _ = poll(&mut fds, None);
            if !fds[1].revents().is_empty() {
                tree::kill_all();
                break;
            }
            while let Some(received) = self.signals.next() {
                // Others' signals are for the front, which the user knows; a group's signal reached the program.
                if received.sender == self.front.as_raw_nonzero().get() {
                    self.forward(received.signal, status.is_none());
                }
            }
        }
        // Without a status the program was just killed, together with its tree.
        Ok(status.unwrap_or(ExitStatus::from_raw(libc::SIGKILL)))
    }

    /// Takes note of every child that has changed. True if none is left.
    fn reap(&self, status: &mut Option<ExitStatus>) -> Result<bool, CliError> {
        let mut died = false;
        let ended = loop {
            match wait(WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED) {
                Ok(Some((pid, changed))) => {
                    let is_program = pid == self.program && status.is_none();
                    if changed.stopped() || changed.continued() {
                        if is_program {
                            // The shell has to see what the program does.
                            send(self.front, if changed.stopped() { libc::SIGSTOP } else { libc::SIGCONT });
                        }
                        continue;
                    }
                    died = true;
                    if is_program {
                        *status = Some(ExitStatus::from_raw(changed.as_raw()));
                    }
                }
                Ok(None) => break false,
                Err(Errno::CHILD) => break true,
                Err(Errno::INTR) => {}
                Err(e) => return Err(system("waiting for the program failed")(e)),
            }
        };
        if died {
            if let Some(auditor) = self.auditor {
                auditor.before_reaping();
            }
            self.launcher.reap();
        }
        Ok(ended)
    }

    /// Passes a signal on: to the program or, when it has ended, to what it left running.
    fn forward(&self, signal: i32, program_lives: bool) {
        if program_lives {
            send(self.program, signal);
        } else {
            for pid in tree::children() {
                send(pid, signal);
            }
        }
    }
}

/// Writes the statistics that were asked for, and what the user has to know in any case.
fn finish(mut job: Job, stats: &Stats, auditor: Option<&Auditor>) {
    let mut value = match serde_json::to_value(stats) {
        Ok(value) => value,
        Err(e) => return say(&format!("the statistics cannot be written: {e}")),
    };
    if let Some(auditor) = auditor {
        auditor.finish(&mut value);
    }
    for warning in report::warnings(&value) {
        say(&warning);
    }
    if job.stats {
        let _ = io::stderr().write_all(report::summary(&value).as_bytes());
    }
    if let Some(file) = &mut job.stats_json {
        // Shortened only where it can be: the file may be a pipe.
        let _ = file.rewind().and_then(|()| file.set_len(0));
        if let Err(e) = writeln!(file, "{value:#}") {
            say(&format!("the statistics cannot be written: {e}"));
        }
    }
}

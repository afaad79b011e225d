//! Staying: while a command runs, for a time, until a signal, or until somebody else wants what is held.

use std::ffi::OsString;
use std::io::{self, PipeReader, Read};
use std::ops::Range;
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;

use super::parse::show;
use crate::error::{CliError, system};
use crate::program::ProgramError;
use crate::say;
use crate::sys::{self, Received, Signals};

/// For how long.
#[derive(Debug, Default, clap::Args)]
pub struct For {
    /// Stays so long (a whole number with ms, s, m, h or d).
    #[arg(long = "for", value_name = "TIME", value_parser = super::parse_time, conflicts_with = "command")]
    time: Option<Duration>,
    /// Stays while this command runs, and ends as it does.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Why it is over.
#[derive(Debug)]
pub enum End {
    /// The time is up, or a signal came.
    Time,
    /// The command ended.
    Command(ExitStatus),
    /// Another wants what is held, and there was no command.
    Asked,
}

/// What stops a process that does not mind.
const STOPS: &[i32] = &[libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
/// What asks to end.
const ENDS: &[i32] = &[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

impl For {
    /// Whether a command was given, whose output is not to be mixed with ours.
    pub fn has_command(&self) -> bool {
        !self.command.is_empty()
    }

    /// Whether anything was given.
    pub fn is_given(&self) -> bool {
        self.has_command() || self.time.is_some()
    }

    /// Stays. `asked` has 16 bytes (first byte, one past the last) for each time that somebody wants what is held; a command
    /// is asked to end then (SIGTERM), and waited for, because it works on what is held.
    pub fn stay(&self, mut asked: Option<PipeReader>) -> Result<End, CliError> {
        // From here on signals are read, not delivered.
        let signals = Signals::take().map_err(system("taking over signals failed"))?;
        let mut child = self.start(&signals)?;
        let deadline = self.time.map(|time| Instant::now() + time);
        loop {
            while let Some(received) = signals.next() {
                match &child {
                    Some(child) => pass_on(received, child),
                    None if ENDS.contains(&received.signal) => return Ok(End::Time),
                    None => {}
                }
                if STOPS.contains(&received.signal) {
                    // We stop as well, and go on when the shell says so.
                    sys::send(rustix::process::getpid(), libc::SIGSTOP);
                }
            }
            // After the signals: its end may be among those just read, and a later one wakes us.
            if let Some(child) = &mut child
                && let Some(status) = child.try_wait().map_err(system("waiting for the command failed"))?
            {
                return Ok(End::Command(status));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(End::Time);
            }
            let wanted = wait(&signals, asked.as_mut(), deadline)?;
            if let Some(range) = wanted {
                match &child {
                    None => {
                        say(&format!("another wants {}: given up", show(&range)));
                        return Ok(End::Asked);
                    }
                    Some(child) => {
                        say(&format!(
                            "another wants {}: the command is asked to end (SIGTERM)",
                            show(&range)
                        ));
                        send(child, libc::SIGTERM);
                    }
                }
            }
        }
    }

    fn start(&self, signals: &Signals) -> Result<Option<Child>, CliError> {
        let Some((program, arguments)) = self.command.split_first() else { return Ok(None) };
        let mut command = Command::new(program);
        command.args(arguments);
        // Bound: if we are killed what it works on is not held any more.
        let child = sys::spawn_bound(&mut command, signals, || Ok(()));
        child.map(Some).map_err(|source| {
            CliError::from(match source.kind() {
                io::ErrorKind::NotFound => ProgramError::NotFound(program.clone()),
                _ => ProgramError::Exec { program: program.into(), source },
            })
        })
    }
}

/// Waits until there may be something to do; gives what another wants.
fn wait(
    signals: &Signals,
    asked: Option<&mut PipeReader>,
    deadline: Option<Instant>,
) -> Result<Option<Range<u64>>, CliError> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
    let asks = asked.as_ref().map(|asked| asked.as_fd().try_clone_to_owned());
    let asks = asks.transpose().map_err(system("waiting failed"))?;
    fds.extend(asks.as_ref().map(|asked| PollFd::new(asked, PollFlags::IN)));
    // An interrupted poll only means: look again.
    if poll(&mut fds, left.as_ref()).is_err() {
        return Ok(None);
    }
    let is_asked = fds.get(1).is_some_and(|fd| fd.revents().contains(PollFlags::IN));
    let Some(asked) = asked.filter(|_| is_asked) else { return Ok(None) };
    let mut bytes = [0; 16];
    asked.read_exact(&mut bytes).map_err(system("waiting failed"))?;
    let bytes = bytes.as_chunks::<8>().0;
    Ok(Some(u64::from_ne_bytes(bytes[0])..u64::from_ne_bytes(bytes[1])))
}

/// The command gets what was sent to us alone: what the terminal sends it has already.
fn pass_on(received: Received, child: &Child) {
    if !received.from_kernel && received.signal != libc::SIGCHLD {
        send(child, received.signal);
    }
}

fn send(child: &Child, signal: i32) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        sys::send(pid, signal);
    }
}

impl End {
    /// The exit status, or the end by the signal by which the command ended. Nothing may be held any more.
    pub fn exit(self) -> u8 {
        use std::os::unix::process::ExitStatusExt;
        match self {
            Self::Time => 0,
            Self::Asked => crate::error::EXIT_GIVEN_UP,
            Self::Command(status) => match status.signal() {
                Some(signal) => sys::die_of(signal),
                None => status.code().unwrap_or(0) as u8,
            },
        }
    }
}

//! What can go wrong in the command, and the exit status of each, as `env(1)` and `timeout(1)` use them.

use std::io;
use std::path::PathBuf;

use crate::budget::BudgetError;
use crate::probe::Unsupported;
use crate::program::ProgramError;

/// `farpage dax hold --long` gave up what it held before its time, because another wanted it.
pub const EXIT_GIVEN_UP: u8 = 1;
/// What was waited for did not come in time (`farpage dax`).
pub const EXIT_TIMED_OUT: u8 = 124;
/// farpage itself failed; the program was not started.
pub const EXIT_OWN: u8 = 125;
/// The program is there but cannot be run.
pub const EXIT_CANNOT_RUN: u8 = 126;
/// The program was not found.
pub const EXIT_NOT_FOUND: u8 = 127;

/// Why a command failed. Each prints as one sentence that says what to do, without the leading `farpage: `.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line makes no sense.
    #[error("{0}; see 'farpage --help'")]
    Usage(String),
    /// `farpage run` inside `farpage run`.
    #[error(
        "this is already inside 'farpage run': start the inner program without it, it shares the outer memory budget"
    )]
    Nested,
    /// farpage is setuid or has file capabilities: the program could not reach the domain.
    #[error(
        "farpage itself must not be setuid or carry file capabilities, its programs could not use them: \
         remove them and give the capability to the process (setpriv --inh-caps +sys_ptrace --ambient-caps +sys_ptrace)"
    )]
    Privileged,
    /// The kernel lacks something or does not permit it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The memory or the devices asked for cannot be had.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// The domain could not be created.
    #[error("cannot set up the managed memory: {0}")]
    Domain(#[from] farpage::domain::DomainError),
    /// The injected library cannot be loaded.
    #[error(transparent)]
    Library(#[from] crate::run::library::LibraryError),
    /// The program cannot be run or not be managed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A DAX file is in use, or is none.
    #[error(transparent)]
    Dax(#[from] crate::dax::DaxCommandError),
    /// There is nothing to check.
    #[error(transparent)]
    Check(#[from] crate::check::CheckError),
    /// A file that the command line names cannot be written.
    #[error("cannot write {}: {source}: name a file that can be written", path.display())]
    Output {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A system call failed that has no reason to.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Anything else, as one sentence (`bench` and `demo`).
    #[error("{0}")]
    Other(String),
}

impl CliError {
    /// The exit status that says it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Program(e) => e.exit_code(),
            Self::Dax(e) => e.exit_code(),
            _ => EXIT_OWN,
        }
    }
}

/// For `map_err`: says what was tried when a system call failed.
pub fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> CliError {
    move |e| CliError::System { what, source: e.into() }
}

//! What keeps the test bench from working.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Why the bench cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The machine lacks something: nothing is tested, and this says so.
    #[error("{0}")]
    Missing(String),
    /// A command that has to work did not.
    #[error("`{command}` failed: {why}")]
    Command { command: String, why: String },
    /// A file could not be read or written.
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
    /// What was found is not what it should be.
    #[error("{0}")]
    Wrong(String),
}

impl VmError {
    /// Turns the error of a file operation on `path` into ours.
    pub fn file(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |error| Self::File { path: path.to_owned(), error }
    }
}

/// Runs `command` and gives what it prints; what it says on standard error is the reason if it fails.
pub fn output(command: &mut Command) -> Result<String, VmError> {
    let words = words(command);
    let output =
        command.output().map_err(|e| VmError::Command { command: words.clone(), why: e.to_string() })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().last().unwrap_or_default();
    Err(VmError::Command { command: words, why: format!("{}: {said}", output.status) })
}

/// The command as one would type it.
pub fn words(command: &Command) -> String {
    let mut words = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        words.push(' ');
        words.push_str(&arg.to_string_lossy());
    }
    words
}

//! What can go wrong with `farpage dax`, and the exit status of each.

use std::path::PathBuf;

use farpage::dax::DaxError;

use crate::error::{EXIT_OWN, EXIT_TIMED_OUT};

/// Why a DAX file was not looked at, held or changed. The file is as it was.
#[derive(Debug, thiserror::Error)]
pub enum DaxCommandError {
    /// It is not DAX, and the page cache was not asked for.
    #[error("{0} with --page-cache")]
    NotDax(DaxError),
    /// What the library says.
    #[error("{0}")]
    Library(DaxError),
    /// There is nothing to map or hold.
    #[error("{} is empty: there is nothing to {what}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What was wanted.
        what: &'static str,
    },
    /// The directory of tables.
    #[error(
        "cannot read /dev/shm, where the users of DAX files are counted: {0}: mount it (mount -t tmpfs tmpfs /dev/shm)"
    )]
    Tables(std::io::Error),
}

impl From<DaxError> for DaxCommandError {
    fn from(error: DaxError) -> Self {
        match error {
            // These messages end with "... or accept the page cache".
            DaxError::NotDax { .. } | DaxError::BlockSize { .. } => Self::NotDax(error),
            error => Self::Library(error),
        }
    }
}

impl DaxCommandError {
    /// 124 if somebody holds the pages for longer than was to be waited, as `timeout(1)` has it; else 125.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Library(DaxError::Held { .. }) => EXIT_TIMED_OUT,
            _ => EXIT_OWN,
        }
    }
}

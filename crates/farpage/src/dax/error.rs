//! What can go wrong with DAX files, each with what to do about it.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;

use super::users::User;
use crate::pagemap::HoldError;

/// What a file lacks to be a DAX file.
///
/// See the example of [`DaxError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// The kernel does not set `STATX_ATTR_DAX`: the file is read through the page cache.
    Dax,
    /// A mapping is not granted `MAP_SYNC`: flushing the CPU's caches would not make it durable.
    MapSync,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dax => {
                "its pages are in the page cache (no STATX_ATTR_DAX): put it on persistent memory in fsdax mode, on \
                 ext4 or xfs mounted with '-o dax=always' (or 'dax=inode' and `chattr +x`), or accept the page cache"
            }
            Self::MapSync => {
                "it is DAX, but the kernel grants no MAP_SYNC for it (as on virtio-pmem and virtiofs): accept that \
                 flushing is a system call then"
            }
        })
    }
}

/// Why something could not be done with a DAX file. Nothing has changed then, unless it says so.
///
/// ```
/// use farpage::Pin;
/// use farpage::dax::{DaxError, DaxOptions, Missing};
///
/// let dir = tempfile::tempdir()?;
/// let options = DaxOptions::new().tables(dir.path());
/// // Each says what it was about and, where something can be done, what.
/// let plain = options.create(dir.path().join("file"));
/// if let Err(e @ DaxError::NotDax { missing: Missing::Dax, .. }) = &plain {
///     assert!(e.to_string().contains("mounted with '-o dax=always'"), "{e}");
/// }
/// assert!(matches!(options.open(dir.path()), Err(DaxError::NotAFile { .. })));
///
/// let file = options.page_cache(true).create(dir.path().join("file"))?;
/// assert!(matches!(file.map(0..1), Err(DaxError::Range { .. })), "the file has no bytes");
/// file.write_at(b"bytes", 0)?;
/// assert!(matches!(file.pin(0..1, Pin::LongTerm), Err(DaxError::LongTerm { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DaxError {
    /// The file is not DAX.
    #[error("{} is not a DAX file: {missing}", path.display())]
    NotDax {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        missing: Missing,
    },
    /// DAX maps blocks as pages, so they must be as large.
    #[error(
        "{} cannot be a DAX file: the blocks of its file system are {block} bytes, which is no multiple of the page \
         size of {page}: make the file system anew (mkfs.ext4 -b {page}, mkfs.xfs -b size={page}), or accept the page \
         cache", path.display()
    )]
    BlockSize {
        /// The file.
        path: PathBuf,
        /// Bytes of a block.
        block: u64,
        /// Bytes of a page.
        page: usize,
    },
    /// A directory, a device, a pipe.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// What it is not.
        path: PathBuf,
    },
    /// The range is empty, not of whole pages, or not inside what it must be inside of.
    #[error("{start:#x}..{end:#x} {what}")]
    Range {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Beyond what can be counted.
    #[error("{} is or would be larger than {max} bytes, for which there are reference counts: see DaxOptions::max_len", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most.
        max: u64,
    },
    /// The pages in the way were not given up in time. The file is as it was.
    #[error("{} is in use at {:#x}..{:#x}, after {:.1} s of waiting: {}", path.display(), range.start, range.end, waited.as_secs_f32(), holders(users))]
    Held {
        /// The file.
        path: PathBuf,
        /// What was to be had or changed.
        range: Range<u64>,
        /// Who holds pages of it.
        users: Vec<User>,
        /// For how long he was waited for.
        waited: Duration,
    },
    /// The wait was interrupted. The file is as it was.
    #[error("interrupted while waiting for {} to be given up at {:#x}..{:#x}", path.display(), range.start, range.end)]
    Interrupted {
        /// The file.
        path: PathBuf,
        /// What was to be changed.
        range: Range<u64>,
    },
    /// The pages are gone: the file was truncated.
    #[error("{:#x}..{:#x} has been cut off {}", range.start, range.end, path.display())]
    Cut {
        /// The file.
        path: PathBuf,
        /// The part that is gone.
        range: Range<u64>,
    },
    /// Nobody could ever truncate what is pinned for long.
    #[error(
        "pages of {} cannot be pinned for long, nobody could truncate it then: open it with DaxOptions::on_revoke, and \
         give the pin up when asked to", path.display()
    )]
    LongTerm {
        /// The file.
        path: PathBuf,
    },
    /// The file was opened with [`super::DaxOptions::read_only`].
    #[error("cannot {what} {}: it was opened for reading only", path.display())]
    ReadOnly {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
    },
    /// The handle was closed, or made before a `fork`.
    #[error("{} was opened by another process or has been closed: open it again", path.display())]
    Closed {
        /// The file.
        path: PathBuf,
    },
    /// The table of reference counts cannot be used.
    #[error("cannot use {}, where the users of a DAX file are counted: {why}", path.display())]
    Table {
        /// The table.
        path: PathBuf,
        /// Why.
        why: TableError,
    },
    /// References could not be taken.
    #[error("{}: {why}", path.display())]
    Hold {
        /// The file.
        path: PathBuf,
        /// Why.
        why: HoldError,
    },
    /// The end of what was to be appended could not be written, and its beginning was not cut off again: somebody holds pages
    /// of it, or has written behind it.
    #[error("cannot append to {}: {errno}; {:#x}..{:#x} of it stay: they are in use", path.display(), range.start, range.end)]
    AppendedInPart {
        /// The file.
        path: PathBuf,
        /// What was written.
        range: Range<u64>,
        /// Why there is no more of it.
        errno: Errno,
    },
    /// A system call failed.
    #[error("cannot {what} {}: {errno}", path.display())]
    Sys {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        errno: Errno,
    },
}

/// What is wrong with a table.
///
/// ```
/// use farpage::dax::{DaxError, DaxOptions, TableError};
///
/// let dir = tempfile::tempdir()?;
/// let options = DaxOptions::new().page_cache(true).tables(dir.path().join("missing"));
/// match options.create(dir.path().join("file")) {
///     Err(DaxError::Table { why: TableError::Sys(errno), .. }) => assert_eq!(errno, rustix::io::Errno::NOENT),
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// A system call failed. A full or missing /dev/shm, mostly.
    #[error("{0}")]
    Sys(#[from] Errno),
    /// Somebody else's: references in it cannot be trusted, and ours cannot be seen by him.
    #[error("it belongs to user {0}: only one user at a time can use a DAX file, and root with him")]
    Foreign(u32),
    /// Made by a user who does not own the file, which is no table for root: he could change in it what he likes.
    #[error(
        "user {0} made it, who does not own the file: it cannot be trusted, so remove it when nobody uses it any more"
    )]
    Untrusted(u32),
    /// Made by another version.
    #[error("it was made by another version of farpage, which still uses the file")]
    Version,
    /// All process slots are taken.
    #[error("too many processes use the file")]
    Full,
    /// All places for tables in this process are taken.
    #[error("this process has too many DAX files open, or too many mappings of them")]
    TooMany,
}

fn holders(users: &[User]) -> String {
    if users.is_empty() {
        return "who, could not be found out".to_owned();
    }
    let named: Vec<String> = users.iter().map(User::to_string).collect();
    named.join("; ")
}

//! A DAX file: what is done with its bytes.

use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FallocateFlags;

use super::error::DaxError;
use super::inner::Inner;
use super::mapping::DaxMapping;
use super::options::DaxOptions;
use super::pin::DaxPin;
use super::users::{Difference, User};
use super::{Change, Wait};
use crate::PAGE_SIZE;
use crate::frame::Pfn;
use crate::space::pin::Pin;

/// How a file's pages are reached.
///
/// See the example of [`DaxOptions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// They are the storage: no page cache, no second copy.
    Direct {
        /// A mapping is durable as soon as the CPU's caches are written back.
        map_sync: bool,
    },
    /// Through the page cache.
    PageCache,
}

/// A file whose pages live by the one rule: whoever uses a page holds a reference to it, in whatever process, and the file
/// is cut only where nobody does. See the module's description.
///
/// A handle is cheap to clone; clones are one user of the file.
///
/// ```
/// use farpage::dax::{Access, Change, DaxOptions, Wait};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("file");
/// let options = DaxOptions::new().page_cache(true).tables(dir.path());
/// let file = options.create(&path)?;
/// assert_eq!((file.path(), file.is_empty()?), (path.as_path(), true));
/// println!("reached in place: {}", matches!(file.access(), Access::Direct { .. }));
///
/// file.allocate(0..16 << 12)?; // blocks for 16 pages, which are zeros
/// assert_eq!(file.write_at(&[1; 4 << 12], 0)?, 4 << 12);
/// assert_eq!(file.append(b"the end")?, 16 << 12);
/// file.flush(0..file.len()?)?;
///
/// // What takes pages out of the file waits for those who use them. Nobody does here.
/// file.punch_hole(0..1 << 12)?;
/// let mut page = [9; 4096];
/// assert_eq!(file.read_at(&mut page, 0)?, 4096);
/// assert_eq!(page, [0; 4096]);
/// // Not every file system can do these two.
/// for change in [Change::ZeroRange(1 << 12..2 << 12), Change::CollapseRange(0..1 << 12)] {
///     let wait = Wait { timeout: file.timeout(), stop: None };
///     if let Err(e) = file.change(change, &wait) {
///         println!("{e}");
///     }
/// }
/// file.truncate(5000)?;
/// assert_eq!(file.len()?, 5000);
/// assert_eq!(rustix::fs::fstat(file.as_fd())?.st_size, 5000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DaxFile(Arc<Inner>);

/// What [`DaxFile::close`] gives back with the file that could not be closed.
///
/// See the example of [`DaxFile::close`].
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct CloseError {
    /// The file, as it was.
    pub file: DaxFile,
    /// Why it could not be closed.
    pub error: DaxError,
}

impl DaxFile {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// Opens a DAX file for reading and writing; [`DaxOptions`] for anything else.
    ///
    /// ```
    /// use farpage::dax::{DaxError, DaxFile};
    ///
    /// assert!(matches!(DaxFile::open("/nowhere"), Err(DaxError::Sys { .. })));
    /// assert!(matches!(DaxFile::open("/"), Err(DaxError::NotAFile { .. })));
    /// ```
    ///
    /// # Errors
    /// See [`DaxError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DaxError> {
        DaxOptions::new().open(path)
    }

    /// Opens a DAX file, or creates it.
    ///
    /// See the example of [`DaxOptions`].
    ///
    /// # Errors
    /// See [`DaxOptions::create`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self, DaxError> {
        DaxOptions::new().create(path)
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// How its pages are reached.
    pub fn access(&self) -> Access {
        self.0.access
    }

    /// Its descriptor, for calls that are not here. What is done with it nobody waits for.
    pub fn as_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.0.fd.as_fd()
    }

    /// Its length in bytes.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn len(&self) -> Result<u64, DaxError> {
        self.0.len()
    }

    /// Whether it has no bytes.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn is_empty(&self) -> Result<bool, DaxError> {
        Ok(self.len()? == 0)
    }

    /// Maps bytes of the file: from the beginning of a page, to the end of one or of the file. Where `range` and the
    /// file's blocks are aligned to 2 MiB the kernel can map them with huge pages; the address is chosen so.
    ///
    /// # Errors
    /// [`DaxError::Range`] if the file has no such pages; see [`DaxError`].
    pub fn map(&self, range: Range<u64>) -> Result<DaxMapping, DaxError> {
        self.0.check_open()?;
        if !range.start.is_multiple_of(PAGE_SIZE as u64) {
            return Err(self.0.bad_range(&range, "does not begin with a page"));
        }
        DaxMapping::new(&self.0, self.0.pages_of(&range)?)
    }

    /// Pins the pages of these bytes: nobody cuts them while the pin lives. Waits while somebody is about to.
    ///
    /// # Errors
    /// [`DaxError::LongTerm`] unless the file was opened with [`DaxOptions::on_revoke`]; [`DaxError::Held`] if a change of
    /// these pages does not come to an end; see [`DaxError`].
    pub fn pin(&self, range: Range<u64>, pin: Pin) -> Result<DaxPin, DaxError> {
        self.0.check_open()?;
        DaxPin::new(&self.0, self.0.pages_of(&range)?, pin)
    }

    /// Reads into `buf` from `at` on; less than asked for only at the end of the file.
    ///
    /// # Errors
    /// What `pread` says.
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> Result<usize, DaxError> {
        self.0.read_at(buf, at)
    }

    /// Makes the bytes of this range durable, however they were written: when it returns they survive a loss of power.
    /// (The kernel writes back all of the file.) [`DaxMapping::flush`] is cheaper for what was written through a mapping.
    ///
    /// # Errors
    /// A write that failed.
    pub fn flush(&self, range: Range<u64>) -> Result<(), DaxError> {
        if range.is_empty() {
            return Ok(());
        }
        self.0.sync()
    }

    /// Has the file system set blocks aside for these bytes, so that writing them finds space; may grow the file.
    ///
    /// # Errors
    /// No space; not supported.
    pub fn allocate(&self, range: Range<u64>) -> Result<(), DaxError> {
        if range.start >= range.end {
            return Err(self.0.bad_range(&range, "is empty"));
        }
        self.0.check_writable("set blocks aside for")?;
        let len = range.end - range.start;
        rustix::fs::fallocate(&self.0.fd, FallocateFlags::empty(), range.start, len)
            .map_err(|e| self.0.failed("set blocks aside for", e))?;
        self.0.table.announce_growth();
        Ok(())
    }

    /// Sets the file's length. Pages beyond it are waited for; see [`Self::change`].
    ///
    /// # Errors
    /// As [`Self::change`].
    pub fn truncate(&self, len: u64) -> Result<(), DaxError> {
        self.change(Change::Truncate(len), &self.waits())
    }

    /// Makes bytes zero and gives the blocks of whole pages back to the file system.
    ///
    /// # Errors
    /// As [`Self::change`].
    pub fn punch_hole(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.change(Change::PunchHole(range), &self.waits())
    }

    /// Makes bytes zero; the blocks stay set aside. Does not grow the file.
    ///
    /// ```
    /// # use farpage::dax::DaxOptions;
    /// # let dir = tempfile::tempdir()?;
    /// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
    /// # let file = options.create(dir.path().join("file"))?;
    /// file.write_at(&[1; 8192], 0)?;
    /// match file.zero_range(100..5000) {
    ///     Ok(()) => {
    ///         let mut bytes = [9; 8192];
    ///         file.read_at(&mut bytes, 0)?;
    ///         assert_eq!((bytes[99], bytes[100], bytes[4999], bytes[5000]), (1, 0, 0, 1));
    ///     }
    ///     Err(e) => println!("not on this file system: {e}"),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::change`].
    pub fn zero_range(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.change(Change::ZeroRange(range), &self.waits())
    }

    /// Takes a part of the file out, of whole blocks; what follows moves up. Everything from `range.start` on is waited for.
    ///
    /// ```
    /// # use farpage::dax::DaxOptions;
    /// # let dir = tempfile::tempdir()?;
    /// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
    /// # let file = options.create(dir.path().join("file"))?;
    /// file.write_at(&[1; 8192], 0)?;
    /// file.write_at(&[2; 4096], 8192)?;
    /// match file.collapse_range(0..8192) {
    ///     Ok(()) => {
    ///         let mut byte = [0];
    ///         file.read_at(&mut byte, 0)?;
    ///         assert_eq!((byte[0], file.len()?), (2, 4096));
    ///     }
    ///     Err(e) => println!("not on this file system: {e}"),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::change`].
    pub fn collapse_range(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.change(Change::CollapseRange(range), &self.waits())
    }

    fn waits(&self) -> Wait<'static> {
        Wait { timeout: self.0.options.wait, stop: None }
    }

    /// Who has the file open, in all processes, and what they hold of it.
    ///
    /// See the example of [`User`].
    pub fn users(&self) -> Vec<User> {
        if !self.0.table.is_ours() {
            return Vec::new(); // a forked child, which cannot say
        }
        self.0.table.reap();
        self.0.table.users(&(0..Pfn::MAX))
    }

    /// Compares the count of every page with the references that are recorded. Empty: all is right.
    pub fn audit(&self) -> Vec<Difference> {
        if !self.0.table.is_ours() {
            return Vec::new(); // a forked child, which cannot say
        }
        self.0.table.reap();
        self.0.table.differences()
    }

    /// Ends the use of the file through this handle and its clones: they give no new references, mappings and pins made
    /// through them are waited for. What other processes hold stays theirs.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use farpage::Pin;
    /// use farpage::dax::{DaxError, DaxOptions, Wait};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
    /// # let file = options.create(dir.path().join("file"))?;
    /// file.write_at(&[1; 4096], 0)?;
    /// let pin = file.pin(0..4096, Pin::Short)?;
    /// let soon = Wait { timeout: Duration::from_millis(20), stop: None };
    /// let refused = file.close(&soon).unwrap_err();
    /// assert!(matches!(refused.error, DaxError::Held { .. }), "{refused}");
    /// drop(pin);
    /// refused.file.close(&soon)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// They were not given up in time; the file comes back, usable.
    pub fn close(self, wait: &Wait<'_>) -> Result<(), CloseError> {
        match self.0.close(wait) {
            Ok(()) => Ok(()),
            Err(error) => Err(CloseError { file: self, error }),
        }
    }

    /// How long this handle waits.
    pub fn timeout(&self) -> Duration {
        self.0.options.wait
    }
}

//! A DAX file: what is done with its bytes, and how references to its pages are taken.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::change::after;
use super::error::{DaxError, TableError};
use super::lease::PinLease;
use super::mapping::DaxMapping;
use super::options::DaxOptions;
use super::pin::DaxPin;
use super::refs::Refs;
use super::table::Table;
use super::users::{Difference, User, bytes};
use super::{Change, Wait};
use crate::PAGE_SIZE;
use crate::frame::Pfn;
use crate::frame::cuts::{CUTS, Cut, Phase};
use crate::frame::ledger::HolderKind;
use crate::pagemap::HoldError;
use crate::space::pin::Pin;
use crate::sys::dax::How;

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

pub(super) struct Inner {
    pub path: PathBuf,
    pub fd: OwnedFd,
    pub table: Arc<Table>,
    pub access: Access,
    pub options: DaxOptions,
    pub lease: PinLease,
    /// Mappings and pins that were made through this handle.
    holds: AtomicUsize,
    closed: AtomicBool,
    /// The cut of which the owner of long-term pins was told last, for each place of one.
    revoked: [AtomicU64; CUTS],
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DaxFile")
            .field("path", &self.path)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

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

impl Inner {
    pub fn new(
        path: PathBuf,
        fd: OwnedFd,
        table: Arc<Table>,
        access: Access,
        options: DaxOptions,
    ) -> Arc<Self> {
        let inner = Arc::new(Self {
            path,
            fd,
            table,
            access,
            options,
            lease: PinLease::default(),
            holds: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            revoked: [const { AtomicU64::new(0) }; CUTS],
        });
        let mut files = inner.table.files.lock();
        files.retain(|file| file.strong_count() > 0);
        files.push(Arc::downgrade(&inner));
        drop(files);
        inner
    }

    pub fn failed(&self, what: &'static str, errno: Errno) -> DaxError {
        DaxError::Sys { path: self.path.clone(), what, errno }
    }

    pub fn table_error(&self, why: TableError) -> DaxError {
        DaxError::Table { path: self.path.clone(), why }
    }

    pub fn bad_range(&self, range: &Range<u64>, what: &'static str) -> DaxError {
        DaxError::Range { start: range.start, end: range.end, what }
    }

    pub fn len(&self) -> Result<u64, DaxError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(|e| self.failed("look at", e))?;
        Ok(stat.st_size as u64)
    }

    /// Its length in pages, the last one perhaps not full.
    pub fn pages(&self) -> Result<Pfn, DaxError> {
        let pages = self.len()?.div_ceil(PAGE_SIZE as u64);
        Ok(Pfn::try_from(pages).unwrap_or(Pfn::MAX))
    }

    /// The pages that these bytes touch, all of which the file has.
    pub fn pages_of(&self, range: &Range<u64>) -> Result<Range<Pfn>, DaxError> {
        if range.start >= range.end {
            return Err(self.bad_range(range, "is empty"));
        }
        let page = PAGE_SIZE as u64;
        let (start, end) = (range.start / page, range.end.div_ceil(page));
        if end > u64::from(self.pages()?) {
            return Err(self.bad_range(range, "goes beyond the end of the file"));
        }
        let frames = self.table.frames();
        if end > u64::from(frames) {
            return Err(DaxError::TooLarge { path: self.path.clone(), max: u64::from(frames) * page });
        }
        Ok(start as Pfn..end as Pfn)
    }

    /// The bytes of these pages that the file has, for people.
    pub fn bytes_of(&self, pages: &Range<Pfn>) -> Range<u64> {
        let range = bytes(pages);
        let end = self.len().unwrap_or(u64::MAX);
        range.start..range.end.min(end.max(range.start))
    }

    pub fn check_open(&self) -> Result<(), DaxError> {
        // SeqCst, with `close`.
        if self.table.is_ours() && !self.closed.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(DaxError::Closed { path: self.path.clone() })
    }

    /// Makes something that [`DaxFile::close`] waits for. Counted first, and then the handle is looked at
    /// ([`Self::try_take`]): either that sees that it is closed, or who closes sees the count. If it is made, whoever drops
    /// it calls [`Self::gone`].
    pub fn counted<T>(&self, make: impl FnOnce() -> Result<T, DaxError>) -> Result<T, DaxError> {
        // SeqCst, with `close`.
        self.holds.fetch_add(1, Ordering::SeqCst);
        make().inspect_err(|_| self.gone())
    }

    /// One less of those.
    pub fn gone(&self) {
        // SeqCst, with `close`: who finds none left finds that its pages are nobody's.
        self.holds.fetch_sub(1, Ordering::SeqCst);
        self.table.announce_to_waiters();
    }

    /// For what writes to or changes the file.
    pub fn check_writable(&self, what: &'static str) -> Result<(), DaxError> {
        if self.options.read_only {
            return Err(DaxError::ReadOnly { path: self.path.clone(), what });
        }
        Ok(())
    }

    pub fn how_to_map(&self) -> How {
        let sync = matches!(self.access, Access::Direct { map_sync: true });
        How { write: !self.options.read_only, sync }
    }

    /// References to pages, or the cut that is in their way.
    pub fn try_take(&self, kind: HolderKind, pages: &Range<Pfn>) -> Result<Result<Refs, Cut>, DaxError> {
        self.check_open()?;
        let refs = self.table.take(kind, pages).map_err(|why| self.hold_error(why))?;
        // Between the caller's look at the length and our references the file may have been cut.
        let result = match self.table.cuts().over(pages) {
            Some(cut) => Ok(Err(cut)),
            None => match self.pages() {
                Ok(end) if end >= pages.end => return Ok(Ok(refs)),
                Ok(_) => Err(self.bad_range(&bytes(pages), "goes beyond the end of the file")),
                Err(e) => Err(e),
            },
        };
        // A cutter may have seen ours.
        self.give_back(refs);
        result
    }

    pub fn hold_error(&self, why: HoldError) -> DaxError {
        DaxError::Hold { path: self.path.clone(), why }
    }

    /// Waits for a cut that is in the way to end, once `event` is past.
    pub fn wait_for_cut(&self, event: u32, deadline: Instant, pages: &Range<Pfn>) -> Result<(), DaxError> {
        if self.table.wait(event, deadline) {
            return Ok(());
        }
        let cutter = self.table.cuts().overlapping(pages).map(|cut| cut.owner);
        let users = self.table.user(cutter);
        Err(DaxError::Held {
            path: self.path.clone(),
            range: self.bytes_of(pages),
            users,
            waited: self.options.wait,
        })
    }

    /// Gives references back, and says so to those who wait.
    pub fn give_back(&self, refs: Refs) {
        self.table.give(refs);
        self.table.announce_to_waiters();
    }

    /// A pin for the length of a call.
    pub fn pin_bytes(self: &Arc<Self>, range: &Range<u64>) -> Result<DaxPin, DaxError> {
        self.pin_part(range, Pin::Short)
    }

    /// A pin of what a mapping has, or had.
    pub fn pin_part(self: &Arc<Self>, range: &Range<u64>, pin: Pin) -> Result<DaxPin, DaxError> {
        self.check_open()?;
        let pages = self.pages_of(range);
        // Beyond the end of the file, now or when the pages are pinned: what was there has been cut off.
        pages.and_then(|pages| DaxPin::new(self, pages, pin)).map_err(|e| match e {
            DaxError::Range { .. } => DaxError::Cut { path: self.path.clone(), range: range.clone() },
            e => e,
        })
    }

    pub fn read_at(&self, buf: &mut [u8], at: u64) -> Result<usize, DaxError> {
        let mut read = 0;
        while read < buf.len() {
            match rustix::io::pread(&self.fd, &mut buf[read..], at + read as u64) {
                Ok(0) => break,
                Ok(n) => read += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.failed("read", e)),
            }
        }
        Ok(read)
    }

    pub fn write_some_at(&self, buf: &[u8], at: u64) -> Result<usize, DaxError> {
        let mut written = 0;
        while written < buf.len() {
            match rustix::io::pwrite(&self.fd, &buf[written..], at + written as u64) {
                Ok(n) if n > 0 => written += n,
                Err(Errno::INTR) => {}
                // What has been written is there: say so, as `pwrite` does.
                Ok(_) | Err(_) if written > 0 => break,
                Ok(_) => return Err(self.failed("write", Errno::IO)),
                Err(e) => return Err(self.failed("write", e)),
            }
        }
        Ok(written)
    }

    pub fn write_all_at(&self, buf: &[u8], at: u64) -> Result<(), DaxError> {
        let mut written = 0;
        while written < buf.len() {
            written += self.write_some_at(&buf[written..], at + written as u64)?;
        }
        Ok(())
    }

    /// Makes what was written by system calls durable.
    pub fn sync(&self) -> Result<(), DaxError> {
        rustix::fs::fdatasync(&self.fd).map_err(|e| self.failed("write back", e))
    }

    /// For the agent: has the owner of long-term pins told that they are in the way of a cut, once for each cut.
    pub fn revoke(&self) {
        let Some(revoke) = &self.options.revoke else { return };
        for cut in self.table.cuts().iter().filter(|cut| cut.phase == Phase::Pins) {
            let me = self.table.owner();
            let mine = self.table.pagemap().ledger.of(me).map(|(_, e)| e);
            let mine = mine.filter(|e| e.kind == HolderKind::LongPin).map(|e| self.table.pages_held(&e));
            let parts = mine.map(|held| held.start.max(cut.pages.start)..held.end.min(cut.pages.end));
            let parts: Vec<Range<Pfn>> = parts.filter(|part| !part.is_empty()).collect();
            // Relaxed: the agent's alone.
            if !parts.is_empty() && self.revoked[cut.place].swap(cut.id(), Ordering::Relaxed) != cut.id() {
                parts.iter().for_each(|part| revoke(bytes(part)));
            }
        }
    }
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
        let inner = &self.0;
        if !inner.table.is_ours() {
            return Ok(()); // a forked child: nothing was made through it
        }
        // SeqCst, before the count: see `counted`.
        inner.closed.store(true, Ordering::SeqCst);
        let deadline = after(Instant::now(), wait.timeout);
        loop {
            let event = inner.table.event();
            // SeqCst: with `counted` and `gone`.
            if inner.holds.load(Ordering::SeqCst) == 0 {
                return Ok(());
            }
            let interrupted = wait.is_stopped();
            if interrupted || !inner.table.wait(event, deadline) {
                // SeqCst, as above.
                inner.closed.store(false, Ordering::SeqCst);
                let (path, range) = (inner.path.clone(), 0..u64::MAX);
                let error = if interrupted {
                    DaxError::Interrupted { path, range }
                } else {
                    let mut users = inner.table.holders_of(&(0..Pfn::MAX));
                    users.retain(|user| user.pid == std::process::id());
                    DaxError::Held { path, range, users, waited: wait.timeout }
                };
                return Err(CloseError { file: self, error });
            }
        }
    }

    /// How long this handle waits.
    pub fn timeout(&self) -> Duration {
        self.0.options.wait
    }
}

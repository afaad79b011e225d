//! Opening a DAX file, and finding out whether it is one.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::error::{DaxError, Missing};
use super::file::{Access, DaxFile};
use super::inner::Inner;
use super::refs::TABLE_ALIGN;
use super::table::{self, Table};
use crate::PAGE_SIZE;
use crate::sys::dax;

/// What is called when somebody wants pages that are pinned for long: with their bytes in the file.
pub(super) type Revoke = dyn Fn(Range<u64>) + Send + Sync;

/// For so many bytes of a file, and no more, there can be counts.
const MOST: u64 = 8 << 40;

/// How a file is opened.
///
/// ```
/// use farpage::dax::{Access, DaxError, DaxFile, DaxOptions};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("file");
/// // On a file system without DAX this says so, and how to mount it...
/// if let Err(e) = DaxFile::create(&path) {
///     assert!(matches!(e, DaxError::NotDax { .. } | DaxError::BlockSize { .. }), "{e}");
/// }
/// // ... unless the page cache will do.
/// let file = DaxOptions::new().page_cache(true).create(&path)?;
/// # assert!(matches!(file.access(), Access::PageCache | Access::Direct { .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// All that can be said:
///
/// ```
/// use std::time::Duration;
///
/// use farpage::Pin;
/// use farpage::dax::DaxOptions;
///
/// let dir = tempfile::tempdir()?;
/// let file = DaxOptions::new()
///     .page_cache(true)
///     .map_sync(false)
///     .wait(Duration::from_secs(1))
///     .lease(false)
///     .on_revoke(|bytes| println!("{bytes:?} are wanted: give your long-term pins of them up"))
///     .max_len(1 << 30)
///     .tables(dir.path())
///     .create(dir.path().join("file"))?;
/// file.write_at(&[1; 4096], 0)?;
/// let pin = file.pin(0..4096, Pin::LongTerm)?;
/// assert_eq!(file.timeout(), Duration::from_secs(1));
/// # drop(pin);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct DaxOptions {
    page_cache: bool,
    map_sync: bool,
    pub(super) read_only: bool,
    pub(super) wait: Duration,
    pub(super) lease: bool,
    pub(super) revoke: Option<Arc<Revoke>>,
    max_len: u64,
    tables: PathBuf,
}

impl Default for DaxOptions {
    fn default() -> Self {
        Self {
            page_cache: false,
            map_sync: true,
            read_only: false,
            wait: Duration::from_secs(10),
            lease: true,
            revoke: None,
            max_len: 1 << 36,
            tables: table::DIR.into(),
        }
    }
}

impl std::fmt::Debug for DaxOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DaxOptions").field("page_cache", &self.page_cache).finish_non_exhaustive()
    }
}

impl DaxOptions {
    /// The file must be DAX and grant MAP_SYNC; who is in the way of a change is waited for 10 s; a lease is taken.
    pub fn new() -> Self {
        Self::default()
    }

    /// Accepts a file that is not DAX: everything means the same, but its bytes are read and written through the page
    /// cache, and made durable by system calls.
    #[must_use]
    pub fn page_cache(mut self, accept: bool) -> Self {
        self.page_cache = accept;
        self
    }

    /// Whether a DAX file must grant MAP_SYNC (by default it must). Without it [`super::DaxMapping::flush`] is a system call.
    #[must_use]
    pub fn map_sync(mut self, must: bool) -> Self {
        self.map_sync = must;
        self
    }

    /// Opens the file for reading only, as one must who may not write it: mappings cannot be written (SIGSEGV), and what writes to
    /// or changes the file fails with [`DaxError::ReadOnly`]. References count as any others.
    ///
    /// ```
    /// use farpage::Pin;
    /// use farpage::dax::{DaxError, DaxOptions};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("file");
    /// # let options = DaxOptions::new().page_cache(true).tables(dir.path());
    /// # options.create(&path)?.write_at(&[7; 8192], 0)?;
    /// let file = options.read_only(true).open(&path)?;
    /// let map = file.map(0..8192)?;
    /// let pin = map.pin(0..4096, Pin::Short)?;
    /// // SAFETY: pinned.
    /// assert_eq!(unsafe { pin.as_ptr().unwrap().read_volatile() }, 7);
    /// assert!(matches!(file.truncate(0), Err(DaxError::ReadOnly { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn read_only(mut self, only: bool) -> Self {
        self.read_only = only;
        self
    }

    /// For how long those are waited for who hold pages that are to be changed, and changes that are in the way of a
    /// mapping or a pin.
    #[must_use]
    pub fn wait(mut self, timeout: Duration) -> Self {
        self.wait = timeout;
        self
    }

    /// Whether a lease is taken while pages are pinned, which holds programs off that do not use farpage (see
    /// docs/dax.md for where it can be had). It is by default.
    #[must_use]
    pub fn lease(mut self, take: bool) -> Self {
        self.lease = take;
        self
    }

    /// Allows long-term pins: `revoke` is called, in a thread of farpage's, when somebody wants to change pages
    /// that are pinned for long, with their bytes in the file. It has them given up soon, here or elsewhere, and
    /// returns soon; as long as they are not, the change waits. It must not change the file itself, nor panic, which ends
    /// the process.
    #[must_use]
    pub fn on_revoke(mut self, revoke: impl Fn(Range<u64>) + Send + Sync + 'static) -> Self {
        self.revoke = Some(Arc::new(revoke));
        self
    }

    /// The longest that the file can become, in bytes (by default 64 GiB, or twice its length): address space of a
    /// thousandth is set aside for counts. Who opens it first decides.
    #[must_use]
    pub fn max_len(mut self, bytes: u64) -> Self {
        self.max_len = bytes;
        self
    }

    /// Where the tables of users are (by default `/dev/shm`): the same place for all who use the file.
    #[must_use]
    pub fn tables(mut self, dir: impl Into<PathBuf>) -> Self {
        self.tables = dir.into();
        self
    }

    /// Opens a file for reading and, unless it is [`Self::read_only`], writing.
    ///
    /// ```
    /// # use farpage::dax::{DaxError, DaxOptions};
    /// # let dir = tempfile::tempdir()?;
    /// let options = DaxOptions::new().page_cache(true).tables(dir.path());
    /// assert!(matches!(options.open(dir.path().join("none")), Err(DaxError::Sys { .. })), "it is not there");
    /// options.create(dir.path().join("file"))?;
    /// options.open(dir.path().join("file"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// See [`DaxError`].
    pub fn open(&self, path: impl AsRef<Path>) -> Result<DaxFile, DaxError> {
        self.open_at(path.as_ref())
    }

    /// As [`Self::open`]; creates the file (0600) if it is not there.
    ///
    /// # Errors
    /// See [`DaxError`]. A file that it has created stays, also if it turns out not to be DAX.
    pub fn create(&self, path: impl AsRef<Path>) -> Result<DaxFile, DaxError> {
        let path = path.as_ref();
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
        match rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR) {
            Ok(_) | Err(Errno::EXIST) => self.open(path),
            Err(errno) => Err(DaxError::Sys { path: path.to_owned(), what: "create", errno }),
        }
    }

    fn open_at(&self, path: &Path) -> Result<DaxFile, DaxError> {
        let failed = |what| {
            let path = path.to_owned();
            move |errno| DaxError::Sys { path, what, errno }
        };
        // First without opening it: a process that has a lease of it is to give that back when it sees us in the table.
        let name = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let name = name.map_err(failed("open"))?;
        let stat = rustix::fs::fstat(&name).map_err(failed("look at"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(DaxError::NotAFile { path: path.to_owned() });
        }
        let identity = dax::file_identity(name.as_fd()).map_err(failed("look at"))?;
        let len = stat.st_size as u64;
        // Twice its length as far as there can be counts.
        let max = self.max_len.max(len.saturating_mul(2).min(MOST)).max(len);
        // Such that their frames have numbers, those of huge pages, too.
        let pages = u32::try_from(max.div_ceil(PAGE_SIZE as u64)).ok().filter(|pages| *pages <= 1 << 31);
        let pages = pages.map(|pages| pages.next_multiple_of(TABLE_ALIGN));
        let pages = pages.ok_or_else(|| DaxError::TooLarge { path: path.to_owned(), max: MOST })?;
        let table_path = Table::path_of(&self.tables, &identity);
        let table_error = |why| DaxError::Table { path: table_path.clone(), why };
        // A name that means something to others, too.
        let name = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let table = Table::attach(&table_path, &name, stat.st_uid, pages, None).map_err(table_error)?;
        let flags = OFlags::CLOEXEC | if self.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let fd = {
            let _opening = table.without_leases();
            rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open"))?
        };
        // The name may be another file's by now.
        if dax::file_identity(fd.as_fd()).map_err(failed("look at"))? != identity {
            return Err(failed("open")(Errno::STALE));
        }
        let access = self.access(&fd, path)?;
        Ok(DaxFile::new(Inner::new(path.to_owned(), fd, table, access, self.clone())))
    }

    /// How the file's pages are reached, if that will do.
    fn access(&self, fd: &OwnedFd, path: &Path) -> Result<Access, DaxError> {
        let failed = |errno| DaxError::Sys { path: path.to_owned(), what: "look at", errno };
        let direct = dax::is_dax(fd.as_fd()).map_err(failed)?;
        let map_sync = direct && dax::grants_map_sync(fd.as_fd(), !self.read_only);
        match (direct, map_sync) {
            (true, true) => return Ok(Access::Direct { map_sync }),
            (true, false) if self.page_cache || !self.map_sync => return Ok(Access::Direct { map_sync }),
            (false, _) if self.page_cache => return Ok(Access::PageCache),
            _ => {}
        }
        // Why not: a cause that can be named comes before what follows from it.
        let block = rustix::fs::fstatfs(fd).map_err(failed)?.f_bsize as u64;
        if block == 0 || !block.is_multiple_of(PAGE_SIZE as u64) {
            return Err(DaxError::BlockSize { path: path.to_owned(), block, page: PAGE_SIZE });
        }
        let missing = if direct { Missing::MapSync } else { Missing::Dax };
        Err(DaxError::NotDax { path: path.to_owned(), missing })
    }
}

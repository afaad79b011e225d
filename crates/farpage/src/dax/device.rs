//! Device-dax: memory that is a device of its own, without a file system.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;

use super::change::Wait;
use super::error::{DaxError, TableError};
use super::table::{DIR, Table};
use super::users::{Difference, User, bytes};
use crate::PAGE_SIZE;
use crate::device::MemoryType;
use crate::device::memory::{DeviceMemory, InPlace, MemoryError, MemorySpec, Source};
use crate::frame::Pfn;
use crate::frame::ledger::HolderKind;
use crate::pagemap::{HoldError, Run};
use crate::space::pin::Pin;
use crate::sys::dax::How;
use crate::sys::{self, after, dax};

/// A device-dax node (`/dev/dax0.0`) whose pages live by the one rule, in all processes that use farpage: a page that is
/// mapped or pinned has a count above 0, whoever goes last frees it.
///
/// There are two ways to use it, which do not go together: as a store whose places mean something ([`Self::map`]), or
/// as memory that is handed out ([`Self::allocate`]).
///
/// ```
/// use std::time::Duration;
///
/// use farpage::Pin;
/// use farpage::dax::{DaxDevice, DaxError, Wait};
///
/// # let dir = tempfile::tempdir()?;
/// let device = match DaxDevice::open("/dev/dax0.0") {
///     // A device of yours is for you to use.
///     Ok(device) => return Ok(println!("{}: {} bytes", device.path().display(), device.size())),
///     // A file in its place, of 64 pages.
///     Err(_) => DaxDevice::open_file(dir.path().join("device"), 64 << 12, dir.path())?,
/// };
/// assert_eq!((device.size(), device.align(), device.target_node()), (64 << 12, 4096, None));
///
/// // Memory that is handed out: zeros, until the last who has it goes.
/// let memory = device.allocate(16 << 12, 1 << 12)?;
/// assert_eq!((memory.len(), memory.is_empty(), device.in_use()), (16 << 12, false, 16 << 12));
/// // SAFETY: inside the mapping, of which nobody else knows.
/// unsafe { memory.as_ptr().write_volatile(1) };
/// println!("durable: {}", memory.flush(0..4096)); // false where the CPU cannot
///
/// let start = memory.range().start;
/// let pin = device.pin(start..start + 4096, Pin::LongTerm)?;
/// assert_eq!(pin.range(), start..start + 4096);
/// let again = device.map(memory.range())?; // the same pages once more
/// drop((memory, again));
/// assert_eq!(device.in_use(), 4096, "what is pinned stays");
///
/// let wait = Wait { timeout: Duration::from_millis(20), stop: None };
/// assert!(matches!(device.wait_idle(&wait), Err(DaxError::Held { .. })));
/// assert_eq!(device.users()[0].holds.len(), 1);
/// assert!(device.audit().is_empty());
/// drop(pin);
/// device.wait_idle(&wait)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DaxDevice(Arc<Device>);

struct Device {
    path: PathBuf,
    file: OwnedFd,
    is: InPlace,
    table: Arc<Table>,
}

/// A part of a device in memory; each page has one reference for it. A forked child does not inherit it.
///
/// See the example of [`DaxDevice`].
#[derive(Debug)]
pub struct DeviceMapping {
    device: Arc<Device>,
    addr: usize,
    run: Option<Run>,
    pages: Range<Pfn>,
}

/// Pinned pages of a device.
///
/// See the example of [`DaxDevice`].
#[derive(Debug)]
pub struct DevicePin {
    device: Arc<Device>,
    run: Option<Run>,
    pages: Range<Pfn>,
}

/// Why a device cannot be used.
///
/// ```
/// use farpage::dax::{DaxDevice, DeviceOpenError};
///
/// let error = DaxDevice::open("/dev/dax99.0").unwrap_err();
/// assert!(matches!(error, DeviceOpenError::Memory(_)));
/// assert!(error.to_string().contains("No such file"), "{error}");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceOpenError {
    /// The memory cannot be opened.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The table of reference counts cannot be used.
    #[error("cannot use {}, where the users of the device are counted: {why}", path.display())]
    Table {
        /// The table.
        path: PathBuf,
        /// Why.
        why: TableError,
    },
}

impl DaxDevice {
    /// Opens a device-dax node.
    ///
    /// # Errors
    /// See [`DeviceOpenError`]: no such node, no permission, it is no device-dax node, a `farpage run` pages to it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DeviceOpenError> {
        let device = Self::open_in(path.as_ref(), None, Path::new(DIR))?;
        if device.0.is.is_device {
            return Ok(device);
        }
        let name = path.as_ref().display().to_string();
        Err(MemoryError::Sys { name, what: "use it as a device-dax node", errno: Errno::NODEV }.into())
    }

    /// Opens a file that stands for a device: on hugetlbfs for one of huge pages, elsewhere of small ones. For programs that
    /// are to run where there is no device, and for tests. It is made `size` bytes long if it is shorter. Tables of users
    /// are in `tables` (for devices: `/dev/shm`).
    ///
    /// # Errors
    /// See [`DeviceOpenError`].
    pub fn open_file(path: impl AsRef<Path>, size: u64, tables: &Path) -> Result<Self, DeviceOpenError> {
        Self::open_in(path.as_ref(), Some(size), tables)
    }

    fn open_in(path: &Path, size: Option<u64>, tables: &Path) -> Result<Self, DeviceOpenError> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let spec = MemorySpec { memory_type: MemoryType::Generic, source: Source::Path(path.clone()), size };
        let failed = |what| {
            let name = spec.to_string();
            move |errno| MemoryError::Sys { name, what, errno }
        };
        let (memory, is) = spec.in_place()?;
        let file = memory.file().get().map_err(failed("look at it"))?;
        let own = file
            .try_clone_to_owned()
            .map_err(|e| failed("open it again")(Errno::from_io_error(&e).unwrap_or(Errno::MFILE)))?;
        // The device, by whatever name.
        let stat = rustix::fs::fstat(file).map_err(failed("look at it"))?;
        let identity = if is.is_device {
            [b"device-dax".as_slice(), &stat.st_rdev.to_ne_bytes()].concat()
        } else {
            dax::file_identity(file).map_err(failed("look at it"))?
        };
        let table_path = Table::path_of(tables, &identity);
        let frames = memory.frames();
        let table = Table::attach(&table_path, &path, stat.st_uid, frames, Some(memory))
            .map_err(|why| DeviceOpenError::Table { path: table_path.clone(), why })?;
        // A file in its place that has grown since.
        if table.frames() < frames {
            return Err(DeviceOpenError::Table { path: table_path, why: TableError::Version });
        }
        Ok(Self(Arc::new(Device { path, file: own, is, table })))
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.0.is.size
    }

    /// Mappings begin and end at multiples of so many bytes.
    pub fn align(&self) -> u64 {
        self.0.is.align
    }

    /// The memory node that it would be if the system used it as ordinary memory.
    pub fn target_node(&self) -> Option<u32> {
        self.0.is.target_node
    }

    /// Maps a part of the device: what is there, and stays there. One more reference for each of its pages, or the first.
    ///
    /// # Errors
    /// [`DaxError::Range`] if it does not begin and end at multiples of [`Self::align`] inside the device.
    pub fn map(&self, range: Range<u64>) -> Result<DeviceMapping, DaxError> {
        let pages = self.0.pages_of(&range, self.align())?;
        let run = self.0.hold(HolderKind::Mapping, &pages)?;
        DeviceMapping::new(&self.0, run)
    }

    /// Allocates `len` bytes that nobody has, at a multiple of `align` bytes, and maps them: zeros. They are given back
    /// with the last mapping or pin of them, in whatever process. (4 KiB, 2 MiB, 1 GiB: what the device's own alignment allows.)
    ///
    /// # Errors
    /// [`DaxError::Range`] if `len` is no multiple of [`Self::align`]; [`DaxError::Hold`]: there are not so many in a row.
    pub fn allocate(&self, len: u64, align: u64) -> Result<DeviceMapping, DaxError> {
        let whole = self.0.pages_of(&(0..len), self.align())?;
        let align = align.max(self.align()).div_ceil(PAGE_SIZE as u64).min(1 << 31) as u32;
        let table = &self.0.table;
        // It will be among the first that are free.
        let end = table.pagemap().frames.end_used().saturating_add(whole.len() as u32).saturating_add(align);
        table.provide(&(0..end.min(table.frames()))).map_err(|why| self.0.hold_error(why))?;
        let run = table
            .pagemap()
            .alloc_run(table.owner(), HolderKind::Mapping, whole.len() as u32, align)
            .map_err(|why| self.0.hold_error(why))?;
        let mapping = DeviceMapping::new(&self.0, run)?;
        if table.pagemap().device.ops().memory().is_some_and(DeviceMemory::must_clear) {
            sys::dax::fill_zero(mapping.addr, mapping.len());
        }
        Ok(mapping)
    }

    /// Pins a part of the device, for as long as one likes: its memory never moves. Only of pages that somebody has, as
    /// a pin alone is nothing to reach them by.
    ///
    /// # Errors
    /// [`DaxError::Range`]; [`DaxError::Hold`]: nobody has a page of them.
    pub fn pin(&self, range: Range<u64>, pin: Pin) -> Result<DevicePin, DaxError> {
        let pages = self.0.pages_of(&range, PAGE_SIZE as u64)?;
        let kind = if pin == Pin::Short { HolderKind::Pin } else { HolderKind::LongPin };
        let run = self.0.table.begin_run(kind, &pages, false).map_err(|why| self.0.hold_error(why))?;
        Ok(DevicePin { device: self.0.clone(), run: Some(run), pages })
    }

    /// Who uses the device, in all processes, and what they hold of it.
    pub fn users(&self) -> Vec<User> {
        if !self.0.table.is_ours() {
            return Vec::new(); // a forked child, which cannot say
        }
        self.0.table.reap();
        self.0.table.users(&(0..Pfn::MAX))
    }

    /// Bytes that somebody has.
    pub fn in_use(&self) -> u64 {
        self.0.table.pagemap().frames.used() as u64 * PAGE_SIZE as u64
    }

    /// Compares the count of every page with the references that are recorded. Empty: all is right.
    pub fn audit(&self) -> Vec<Difference> {
        if !self.0.table.is_ours() {
            return Vec::new(); // a forked child, which cannot say
        }
        self.0.table.reap();
        self.0.table.differences()
    }

    /// Waits until nobody has a page of it, in any process.
    ///
    /// # Errors
    /// [`DaxError::Held`], with those who do; [`DaxError::Interrupted`].
    pub fn wait_idle(&self, wait: &Wait<'_>) -> Result<(), DaxError> {
        let (device, table) = (&self.0, &self.0.table);
        let deadline = after(Instant::now(), wait.timeout);
        loop {
            let event = table.event();
            if !table.is_used(&(0..table.frames())) {
                return Ok(());
            }
            let (path, range) = (device.path.clone(), 0..device.is.size);
            if wait.is_stopped() {
                return Err(DaxError::Interrupted { path, range });
            }
            if !table.wait(event, deadline) {
                let users = table.holders_of(&(0..Pfn::MAX));
                return Err(DaxError::Held { path, range, users, waited: wait.timeout });
            }
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DaxDevice").field("path", &self.path).field("is", &self.is).finish_non_exhaustive()
    }
}

impl Device {
    fn hold_error(&self, why: HoldError) -> DaxError {
        DaxError::Hold { path: self.path.clone(), why }
    }

    fn pages_of(&self, range: &Range<u64>, align: u64) -> Result<Range<Pfn>, DaxError> {
        let bad = |what| DaxError::Range { start: range.start, end: range.end, what };
        if !self.table.is_ours() {
            return Err(DaxError::Closed { path: self.path.clone() });
        }
        if range.start >= range.end {
            return Err(bad("is empty"));
        }
        if !range.start.is_multiple_of(align) || !range.end.is_multiple_of(align) {
            return Err(bad("does not begin and end at multiples of the device's alignment"));
        }
        if range.end > self.is.size {
            return Err(bad("goes beyond the end of the device"));
        }
        let page = PAGE_SIZE as u64;
        Ok((range.start / page) as Pfn..(range.end / page) as Pfn)
    }

    fn hold(&self, kind: HolderKind, pages: &Range<Pfn>) -> Result<Run, DaxError> {
        self.table.begin_run(kind, pages, true).map_err(|why| self.hold_error(why))
    }

    fn give_back(&self, run: Option<Run>) {
        if let Some(run) = run {
            self.table.pagemap().end_run(run);
            self.table.announce_to_waiters();
        }
    }
}

impl DeviceMapping {
    fn new(device: &Arc<Device>, run: Run) -> Result<Self, DaxError> {
        let pages = run.pfn()..run.end();
        let range = bytes(&pages);
        let len = (range.end - range.start) as usize;
        // The kernel chooses an address of the device's alignment.
        match dax::map_file(device.file.as_fd(), range.start, len, How { write: true, sync: false }) {
            Ok(addr) => Ok(Self { device: device.clone(), addr, run: Some(run), pages }),
            Err(errno) => {
                device.give_back(Some(run));
                Err(DaxError::Sys { path: device.path.clone(), what: "map", errno })
            }
        }
    }

    /// The first byte. Others may map the same pages: the bytes can change at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.addr as *mut u8
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.pages.len() * PAGE_SIZE
    }

    /// Whether it maps nothing (it never does).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Which bytes of the device.
    pub fn range(&self) -> Range<u64> {
        bytes(&self.pages)
    }

    /// Makes what was written durable, if the device is: writes back the CPU's caches. False where that cannot be done.
    #[must_use]
    pub fn flush(&self, range: Range<usize>) -> bool {
        let end = range.end.min(self.len());
        range.start >= end || dax::write_back(self.addr + range.start, end - range.start)
    }
}

impl Drop for DeviceMapping {
    fn drop(&mut self) {
        if self.device.table.is_ours() {
            // Out of reach before the references go.
            let _gone = sys::unmap(self.addr, self.len());
            self.device.give_back(self.run.take());
        }
    }
}

impl DevicePin {
    /// Which bytes of the device.
    pub fn range(&self) -> Range<u64> {
        bytes(&self.pages)
    }
}

impl Drop for DevicePin {
    fn drop(&mut self) {
        if self.device.table.is_ours() {
            self.device.give_back(self.run.take());
        }
    }
}

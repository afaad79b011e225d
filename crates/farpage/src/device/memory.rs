//! Memory that the CPU reaches in place: device-dax nodes, files on DAX, huge pages, memory of a node.
//!
//! | specification | memory type | the memory |
//! |---|---|---|
//! | `generic:SOURCE[:SIZE]` | `Generic` | never moves |
//! | `coherent:SOURCE[:SIZE]` | `Coherent` | moves on request |
//! | `numa:NODE[:SIZE]` | `Coherent` | of that memory node and no other |
//! | `p2pdma:SOURCE[:SIZE]` | `P2pDma` | its driver's; mapped only on request |
//!
//! Memory of the first three can be a device of a domain as well: then its frames, of 4 KiB each, serve as storage of pages
//! ([`super::spec::Spec::Memory`], [`MemorySpec::attach`]).
//!
//! `SOURCE` is a device-dax node (`/dev/dax0.0`), a regular file without data (on a DAX file system it is the storage itself),
//! a directory for an unlinked file (hugetlbfs: huge pages), or one of the words `memfd` and `hugetlb` (huge pages
//! without a mount). A frame is what the memory is handed out in: 4 KiB, or 2 MiB for huge pages and a device-dax node
//! aligned so. The memory of a free frame is given back to the system where it can be (not on device-dax).
//!
//! Files and nodes are locked (`flock`): who stores pages in one has it alone.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{FallocateFlags, FlockOperation, MemfdFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::spec::{backing_path, split_dir};
use super::{Device, DeviceError, LoadOp, MemoryType, PagemapOps, StoreOp, Sum, Usage};
use crate::frame::{Owner, Pfn};
use crate::size::{SizeError, format_size};
use crate::sys::{SharedArea, SharedMap, SteadyFile, numa};
use crate::{PAGE_SIZE, Page};

/// Bytes of a huge page.
pub const HUGE: u64 = 2 << 20;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// File systems that write a page to a new place each time, where a store into a mapping may find no room although the
/// page has some: btrfs, bcachefs, ZFS.
const COPY_ON_WRITE: [u64; 3] = [0x9123_683e, 0xca45_1a4e, 0x2fc1_2fc1];
/// The smallest: a page.
pub const MIN_SIZE: u64 = PAGE_SIZE as u64;
/// The largest: what 32-bit frame numbers and their counts can do.
pub const MAX_SIZE: u64 = 8 << 40;

/// Where memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Source {
    /// Anonymous memory.
    Memfd,
    /// Huge pages of 2 MiB.
    Hugetlb,
    /// Memory of one node.
    Node(u32),
    /// A device-dax node, a file, or a directory for one.
    Path(PathBuf),
}

/// Which memory, and how much.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemorySpec {
    /// `Generic`, `Coherent` or `P2pDma`.
    pub memory_type: MemoryType,
    /// Where it comes from.
    pub source: Source,
    /// Bytes; `None`: all that the device-dax node or the file has.
    pub size: Option<u64>,
}

/// Why a text is not such memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemorySpecError {
    /// No such kind.
    #[error(
        "unknown memory `{0}` (there are generic:, coherent:, p2pdma: with memfd, hugetlb or a path, and numa:NODE)"
    )]
    Unknown(String),
    /// The size is none.
    #[error("memory `{0}`: {1}")]
    Size(String, SizeError),
    /// The node is no number.
    #[error("memory `{0}` names no node (write `numa:NODE` or `numa:NODE:SIZE`)")]
    Node(String),
}

/// Why memory could not be set up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// A system call.
    #[error("memory {name}: cannot {what}: {errno}")]
    Sys {
        /// The specification.
        name: String,
        /// What was tried.
        what: &'static str,
        /// Why.
        errno: Errno,
    },
    /// No size was given and there is none to be found.
    #[error("memory {0} needs a size (write {0}:SIZE)")]
    NoSize(String),
    /// The size is no multiple of the page size of the memory, or none at all.
    #[error("memory {name}: {size} bytes are not a whole number of its {} pages, or more than there are", format_size(*.frame_size))]
    Size {
        /// The specification.
        name: String,
        /// The size.
        size: u64,
        /// Bytes of a frame.
        frame_size: u64,
    },
    /// The machine has no such memory node.
    #[error("memory {name}: this machine has no such node (nodes with memory: {nodes:?})")]
    NoNode {
        /// The specification.
        name: String,
        /// Those that it has.
        nodes: Vec<u32>,
    },
    /// The memory node has less.
    #[error("memory {name}: the node has {} of memory", format_size(*.total))]
    NodeTooSmall {
        /// The specification.
        name: String,
        /// Bytes of the node.
        total: u64,
    },
    /// The file has data, which would be overwritten.
    #[error(
        "memory {0}: the file holds data (of a run that was killed? if nobody needs it, empty or remove the file)"
    )]
    HasData(String),
    /// Another process has it.
    #[error("memory {0} is in use by another process")]
    InUse(String),
    /// Pages cannot be stored in a mapping of such a file safely.
    #[error(
        "memory {0}: this file system copies on write, so that a store into a mapping may fail for want of space: \
         use file:DIR"
    )]
    CopyOnWrite(String),
}

/// Memory that can be mapped; see the module's description. It is a pagemap's driver ([`PagemapOps`]), of each type
/// the same; what `Coherent` adds is that it stores and loads pages ([`Device`]).
pub struct DeviceMemory {
    name: String,
    memory_type: MemoryType,
    frames: u32,
    frame_size: u64,
    /// Memory can be given back in pieces of so many bytes, which are zero afterwards; `None`: it cannot.
    piece: Option<u64>,
    /// Pages are stored in its frames, by another who has this ([`super::mem::Mem`]).
    stores: bool,
    file: SteadyFile,
    /// What the first process opened, by whose path the others open it.
    _origin: Option<OwnedFd>,
    /// All of it, for copies in and out: if it is `Coherent`, or stores pages.
    whole: Option<SharedMap>,
}

/// Memory that has been opened or made, and has its size.
struct Opened {
    file: OwnedFd,
    kind: FileKind,
    size: u64,
}

/// What memory behind a descriptor is like.
#[derive(Clone, Copy)]
enum FileKind {
    Dax(Dax),
    HugePages,
    Pages,
}

impl FileKind {
    fn of(file: impl AsFd) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(&file)?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device() {
            return Dax::of(file).map(Self::Dax);
        }
        let hugetlb = rustix::fs::fstatfs(&file).is_ok_and(|fs| fs.f_type as u64 == HUGETLBFS_MAGIC);
        Ok(if hugetlb { Self::HugePages } else { Self::Pages })
    }

    /// Bytes that are mapped together at least.
    fn unit(self) -> u64 {
        match self {
            Self::Dax(dax) => dax.align.max(PAGE_SIZE as u64),
            Self::HugePages => HUGE,
            Self::Pages => PAGE_SIZE as u64,
        }
    }

    /// Bytes that can be given back together; `None`: none can.
    fn piece(self) -> Option<u64> {
        match self {
            Self::Dax(_) => None,
            Self::HugePages | Self::Pages => Some(self.unit()),
        }
    }
}

impl MemorySpec {
    fn failed(&self, what: &'static str) -> impl Fn(Errno) -> MemoryError + use<> {
        let name = self.to_string();
        move |errno| MemoryError::Sys { name: name.clone(), what, errno }
    }

    /// Whether it takes the machine's ordinary memory.
    pub fn takes_memory(&self) -> bool {
        matches!(self.source, Source::Memfd | Source::Node(_))
    }

    /// The bytes that a device-dax node or a file has, for those who gave no size.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn available(&self) -> Result<u64, MemoryError> {
        if !matches!(self.source, Source::Path(_)) {
            return Err(MemoryError::NoSize(self.to_string()));
        }
        let file = self.open().map_err(self.failed("open it"))?;
        let has = match FileKind::of(&file).map_err(self.failed("look at it"))? {
            FileKind::Dax(dax) => dax.size,
            _ => rustix::fs::fstat(&file).map_err(self.failed("look at it"))?.st_size as u64,
        };
        if has == 0 { Err(MemoryError::NoSize(self.to_string())) } else { Ok(has) }
    }

    /// Opens or makes the memory.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn create(&self) -> Result<DeviceMemory, MemoryError> {
        let Opened { file, kind, size } = self.open_sized(FlockOperation::NonBlockingLockShared)?;
        let frame_size = if kind.unit() >= HUGE { HUGE } else { PAGE_SIZE as u64 };
        let whole = matches!(self.memory_type, MemoryType::Coherent)
            .then(|| SharedMap::new(&file, 0, size as usize))
            .transpose()
            .map_err(self.failed("map it"))?;
        let steady = SteadyFile::open(&backing_path(&file), OFlags::RDWR);
        Ok(DeviceMemory {
            name: self.to_string(),
            memory_type: self.memory_type,
            frames: (size / frame_size) as u32,
            frame_size,
            piece: kind.piece(),
            stores: false,
            file: steady.map_err(self.failed("open it again"))?,
            _origin: Some(file),
            whole,
        })
    }

    /// Opens or makes the memory for a domain that stores pages in it, and has it alone: nobody else gets it while the
    /// descriptor is open. Every process of the domain, this one as well, then calls [`Self::attach`]. The size must have been given.
    ///
    /// A file that was made for it loses its name at once, so that it goes with the last process.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn create_backing(&self) -> Result<OwnedFd, MemoryError> {
        let new = match &self.source {
            Source::Path(path) => (!path.exists()).then_some(path),
            _ => None,
        };
        let Opened { file, kind, size } = self.open_sized(FlockOperation::NonBlockingLockExclusive)?;
        match new.map(std::fs::remove_file) {
            Some(Err(e)) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(self.failed("remove its name")(Errno::from_io_error(&e).unwrap_or(Errno::IO)));
            }
            _ => {}
        }
        if !size.is_multiple_of(kind.unit()) {
            return Err(MemoryError::Size { name: self.to_string(), size, frame_size: kind.unit() });
        }
        let on_cow = rustix::fs::fstatfs(&file).is_ok_and(|fs| COPY_ON_WRITE.contains(&(fs.f_type as u64)));
        if on_cow && matches!(kind, FileKind::Pages) {
            return Err(MemoryError::CopyOnWrite(self.to_string()));
        }
        Ok(file)
    }

    /// In each process of a domain: the memory at `path` (what [`backing_path`] said of the descriptor of
    /// [`Self::create_backing`]), as frames of 4 KiB in which pages are stored.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn attach(&self, path: &str) -> Result<DeviceMemory, MemoryError> {
        let size = self.size.ok_or_else(|| MemoryError::NoSize(self.to_string()))?;
        let steady = SteadyFile::open(path, OFlags::RDWR).map_err(self.failed("open it in this process"))?;
        let file = steady.get().map_err(self.failed("open it in this process"))?;
        let kind = FileKind::of(file).map_err(self.failed("look at it"))?;
        let whole = SharedMap::new(file, 0, size as usize)
            .map_err(self.failed("map it (is an address space limit set? see `ulimit -v`)"))?;
        Ok(DeviceMemory {
            name: self.to_string(),
            memory_type: self.memory_type,
            frames: (size / PAGE_SIZE as u64) as u32,
            frame_size: PAGE_SIZE as u64,
            piece: kind.piece(),
            stores: true,
            file: steady,
            _origin: None,
            whole: Some(whole),
        })
    }

    fn open_sized(&self, lock: FlockOperation) -> Result<Opened, MemoryError> {
        let name = || self.to_string();
        let file = self.open().map_err(self.failed("open it"))?;
        if let Source::Path(_) = self.source {
            rustix::fs::flock(&file, lock).map_err(|errno| match errno {
                Errno::WOULDBLOCK => MemoryError::InUse(name()),
                errno => self.failed("lock it")(errno),
            })?;
        }
        let kind = FileKind::of(&file).map_err(self.failed("look at it"))?;
        let has = match kind {
            FileKind::Dax(dax) => dax.size,
            _ => rustix::fs::fstat(&file).map_err(self.failed("look at it"))?.st_size as u64,
        };
        // All of a file on hugetlbfs counts as data.
        let may_have_data = matches!(kind, FileKind::Pages) && has > 0;
        if may_have_data && rustix::fs::seek(&file, SeekFrom::Data(0)).is_ok() {
            return Err(MemoryError::HasData(name()));
        }
        let size = match self.size {
            None if has == 0 => return Err(MemoryError::NoSize(name())),
            None => has,
            Some(size) => size,
        };
        let frame_size = if kind.unit() >= HUGE { HUGE } else { PAGE_SIZE as u64 };
        let is_dax = matches!(kind, FileKind::Dax(_));
        let right = size >= frame_size && size.is_multiple_of(frame_size) && size <= MAX_SIZE;
        if !right || (is_dax && size > has) {
            return Err(MemoryError::Size { name: name(), size, frame_size });
        }
        if !is_dax && has < size {
            // (ftruncate beyond the limit would end us with SIGXFSZ.)
            let limit = getrlimit(Resource::Fsize).current;
            let sized = if limit.is_some_and(|limit| limit < size) {
                Err(Errno::FBIG)
            } else {
                rustix::fs::ftruncate(&file, size)
            };
            sized.map_err(self.failed("size it (see `ulimit -f`)"))?;
        }
        if let Source::Node(node) = self.source {
            self.bind(&file, size, node)?;
        }
        Ok(Opened { file, kind, size })
    }

    /// The file's pages come from `node`, whoever touches them first.
    fn bind(&self, file: &OwnedFd, size: u64, node: u32) -> Result<(), MemoryError> {
        let name = self.to_string();
        let nodes = numa::memory_nodes();
        if !nodes.contains(&node) {
            return Err(MemoryError::NoNode { name, nodes });
        }
        if let Some(total) = numa::memory_of(node).filter(|total| *total < size) {
            return Err(MemoryError::NodeTooSmall { name, total });
        }
        let map = SharedMap::new(file, 0, size as usize).map_err(self.failed("map it"))?;
        let bound = numa::bind_memory(map.addr(), map.len(), node);
        map.unmap();
        bound.map_err(self.failed("bind it to the node"))
    }

    fn open(&self) -> Result<OwnedFd, Errno> {
        let rw = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        match &self.source {
            Source::Memfd | Source::Node(_) => {
                rustix::fs::memfd_create("farpage-memory", MemfdFlags::CLOEXEC)
            }
            Source::Hugetlb => {
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
                rustix::fs::memfd_create("farpage-huge", flags)
            }
            Source::Path(path) if path.is_dir() => rustix::fs::open(path, rw | OFlags::TMPFILE, mode),
            Source::Path(path) => {
                // A mistyped node does not become a file.
                let makes_one = self.size.is_some() && path.parent() != Some("/dev".as_ref());
                let create = if makes_one { OFlags::CREATE } else { OFlags::empty() };
                rustix::fs::open(path, rw | create, mode)
            }
        }
    }
}

/// What the kernel says of a device-dax node.
#[derive(Clone, Copy)]
struct Dax {
    size: u64,
    align: u64,
}

impl Dax {
    fn of(file: impl AsFd) -> Result<Self, Errno> {
        let rdev = rustix::fs::fstat(file)?.st_rdev;
        let dir = format!("/sys/dev/char/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
        let dir = Path::new(&dir);
        let bus = dir.join("subsystem").canonicalize().map_err(|_| Errno::NODEV)?;
        if bus.file_name() != Some("dax".as_ref()) {
            return Err(Errno::NODEV);
        }
        let number = |file: &str| {
            let text = std::fs::read_to_string(dir.join(file)).ok()?;
            let text = text.trim();
            text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
        };
        let size = number("size").ok_or(Errno::NODEV)?;
        Ok(Self { size, align: number("align").unwrap_or(HUGE) })
    }
}

impl DeviceMemory {
    /// Its type.
    pub fn memory_type(&self) -> MemoryType {
        self.memory_type
    }

    /// How many frames it has.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Bytes of a frame.
    pub fn frame_size(&self) -> u64 {
        self.frame_size
    }

    /// The file that is to be mapped; frame `n` is at `n` times [`Self::frame_size`].
    pub fn file(&self) -> &SteadyFile {
        &self.file
    }

    /// Whether frames that are allocated may hold old bytes: whoever hands them out clears them.
    pub fn must_clear(&self) -> bool {
        self.stores || self.piece.is_none()
    }

    /// Whether pages are stored in its frames.
    pub fn stores_pages(&self) -> bool {
        self.stores
    }

    /// Whether the memory of a single frame of 4 KiB can be given back to the system.
    pub(super) fn gives_back_pages(&self) -> bool {
        self.piece == Some(PAGE_SIZE as u64)
    }

    /// Whether its memory can be given back at all.
    pub(super) fn gives_back(&self) -> bool {
        self.piece.is_some()
    }

    /// All of it, where there is a mapping.
    pub(super) fn area(&self) -> Option<SharedArea> {
        self.whole.map(|map| map.area(0, map.len()))
    }

    /// Bytes of the system's memory that it takes just now.
    pub fn in_use(&self) -> Result<u64, Errno> {
        Ok(rustix::fs::fstat(self.file.get()?)?.st_blocks as u64 * 512)
    }

    fn punch(&self, pfn: Pfn, frames: u32) -> Result<(), Errno> {
        let (at, len) = (u64::from(pfn) * self.frame_size, u64::from(frames) * self.frame_size);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.file.get()?, hole, at, len)
    }

    /// A frame's bytes in the mapping of the whole, for copies. Only frames of 4 KiB are moved.
    fn offset(&self, pfn: Pfn) -> Option<(SharedMap, usize)> {
        let map = self.whole.filter(|_| pfn < self.frames && self.frame_size == PAGE_SIZE as u64)?;
        Some((map, pfn as usize * PAGE_SIZE))
    }

    fn read(&self, pfn: Pfn, page: &mut Page) -> Result<Sum, DeviceError> {
        let (map, at) = self.offset(pfn).ok_or(DeviceError::Io(libc::EINVAL))?;
        map.area(0, map.len()).read(at, &mut page.0);
        Ok(Sum::of(page))
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.whole.into_iter().for_each(SharedMap::unmap);
    }
}

impl PagemapOps for DeviceMemory {
    fn name(&self) -> &str {
        &self.name
    }

    fn page_free(&self, pfns: &[Pfn], _owner: Owner) {
        if self.piece.is_none() {
            return;
        }
        let mut sorted: arrayvec::ArrayVec<Pfn, { crate::frame::BATCH }> = arrayvec::ArrayVec::new();
        for batch in pfns.chunks(crate::frame::BATCH) {
            sorted.clear();
            sorted.extend(batch.iter().copied());
            sorted.sort_unstable();
            for run in sorted.chunk_by(|a, b| a + 1 == *b) {
                if let Err(e) = self.punch(run[0], run.len() as u32) {
                    // Old bytes would be seen by the next user.
                    crate::sys::say(&format!("memory {}: cannot free frame {}: {e}", self.name, run[0]));
                }
            }
        }
    }

    fn migrate_to_ram(&self) -> Option<&(dyn Device + 'static)> {
        self.whole.is_some().then_some(self as _)
    }

    fn memory(&self) -> Option<&DeviceMemory> {
        Some(self)
    }

    fn remove(&self, _owner: Owner) -> Result<(), Errno> {
        if self.piece.is_some() { self.punch(0, self.frames) } else { Ok(()) }
    }
}

/// Pages are copied in and out in place; the CPU may change them there, so a checksum says what they are now.
impl Device for DeviceMemory {
    fn name(&self) -> &str {
        &self.name
    }

    fn frames(&self) -> u32 {
        self.frames
    }

    fn store(&self, ops: &mut [StoreOp<'_>], _owner: Owner) {
        for op in ops {
            // Memory that cannot be had is an error here and not a SIGBUS at the first byte.
            op.result = self.offset(op.pfn).ok_or(DeviceError::Io(libc::EINVAL)).and_then(|(map, at)| {
                let area = map.area(0, map.len());
                area.populate(at, PAGE_SIZE).map_err(|_| DeviceError::Full)?;
                area.write(at, &op.page.0);
                Ok(())
            });
        }
    }

    fn load(&self, ops: &mut [LoadOp<'_>]) {
        ops.iter_mut().for_each(|op| op.result = self.read(op.pfn, op.page));
    }

    fn sum(&self, pfn: Pfn) -> Sum {
        self.read(pfn, &mut Page([0; PAGE_SIZE])).unwrap_or_default()
    }

    fn free(&self, pfns: &[Pfn], owner: Owner) {
        PagemapOps::page_free(self, pfns, owner);
    }

    fn usage(&self) -> Usage {
        let used = self.in_use().unwrap_or(0);
        let capacity = u64::from(self.frames) * self.frame_size;
        Usage { capacity, used, payload: used, peak: used }
    }
}

impl FromStr for MemorySpec {
    type Err = MemorySpecError;

    fn from_str(text: &str) -> Result<Self, MemorySpecError> {
        let unknown = || MemorySpecError::Unknown(text.to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(unknown)?;
        let (source, size) = split_dir(rest).map_err(|e| MemorySpecError::Size(text.to_owned(), e))?;
        let memory_type = match kind {
            "generic" => MemoryType::Generic,
            "coherent" | "numa" => MemoryType::Coherent,
            "p2pdma" => MemoryType::P2pDma,
            _ => return Err(unknown()),
        };
        let source = match (kind, source) {
            ("numa", node) => Source::Node(node.parse().map_err(|_| MemorySpecError::Node(text.to_owned()))?),
            (_, "") => return Err(unknown()),
            (_, "memfd") => Source::Memfd,
            (_, "hugetlb") => Source::Hugetlb,
            (_, path) => Source::Path(path.into()),
        };
        Ok(Self { memory_type, source, size })
    }
}

impl fmt::Display for MemorySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.source, self.memory_type) {
            (Source::Node(node), _) => write!(f, "numa:{node}")?,
            (source, memory_type) => {
                f.write_str(match memory_type {
                    MemoryType::Coherent => "coherent:",
                    MemoryType::P2pDma => "p2pdma:",
                    _ => "generic:",
                })?;
                match source {
                    Source::Memfd => f.write_str("memfd")?,
                    Source::Hugetlb => f.write_str("hugetlb")?,
                    Source::Path(path) => write!(f, "{}", path.display())?,
                    Source::Node(node) => write!(f, "{node}")?,
                }
            }
        }
        match (self.size, &self.source) {
            (Some(size), _) => write!(f, ":{}", format_size(size)),
            // A path that ends in something like a size.
            (None, Source::Path(path)) => {
                let path = path.display().to_string();
                let clear = split_dir(&path).is_ok_and(|split| split == (&path, None));
                f.write_str(if clear { "" } else { ":" })
            }
            (None, _) => Ok(()),
        }
    }
}

//! Opening memory, or making it: for a pagemap of its own, or for a domain that stores pages in it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::{DeviceMemory, HUGE, MAX_SIZE, MemorySpec, Source};
use crate::PAGE_SIZE;
use crate::device::MemoryType;
use crate::device::spec::backing_path;
use crate::size::format_size;
use crate::sys::{SharedMap, SteadyFile, numa};

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// File systems that write a page to a new place each time, where a store into a mapping may find no room although the
/// page has some: btrfs, bcachefs, ZFS.
const COPY_ON_WRITE: [u64; 3] = [0x9123_683e, 0xca45_1a4e, 0x2fc1_2fc1];

/// Why memory could not be set up.
///
/// See the example of [`MemorySpec`].
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
/// What memory is like that is mapped in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(hidden)]
pub struct InPlace {
    /// Bytes.
    pub size: u64,
    /// Mappings begin and end at multiples of so many bytes.
    pub align: u64,
    /// The memory node that it would become if it were made ordinary memory.
    pub target_node: Option<u32>,
    /// A device-dax node, and no file in its place.
    pub is_device: bool,
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
    #[doc(hidden)]
    pub fn takes_memory(&self) -> bool {
        matches!(self.source, Source::Memfd | Source::Node(_))
    }

    /// The bytes that a device-dax node or a file has, for those who gave no size.
    ///
    /// # Errors
    /// See [`MemoryError`].
    #[doc(hidden)]
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
    /// See the example of [`MemorySpec`].
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
    #[doc(hidden)]
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
    #[doc(hidden)]
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

    /// The memory of a device-dax node, or of a file or directory that stands for one, as frames of 4 KiB that are only
    /// mapped: nothing is stored in it, and what it holds stays. Others may have it open, unless they store pages in it.
    /// With it comes what it is like.
    ///
    /// # Errors
    /// See [`MemoryError`].
    #[doc(hidden)]
    pub fn in_place(&self) -> Result<(DeviceMemory, InPlace), MemoryError> {
        let file = self.open().map_err(self.failed("open it"))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).map_err(|errno| match errno {
            Errno::WOULDBLOCK => MemoryError::InUse(self.to_string()),
            errno => self.failed("lock it")(errno),
        })?;
        let kind = FileKind::of(&file).map_err(self.failed("look at it"))?;
        let has = rustix::fs::fstat(&file).map_err(self.failed("look at it"))?.st_size as u64;
        let (size, target_node) = match kind {
            FileKind::Dax(dax) => (dax.size, dax.target_node),
            _ => (has.max(self.size.unwrap_or(0)), None),
        };
        let align = kind.unit();
        if size < align || !size.is_multiple_of(align) || size > MAX_SIZE {
            return Err(MemoryError::Size { name: self.to_string(), size, frame_size: align });
        }
        if has < size && !matches!(kind, FileKind::Dax(_)) {
            rustix::fs::ftruncate(&file, size).map_err(self.failed("size it (see `ulimit -f`)"))?;
        }
        let steady = SteadyFile::open(&backing_path(&file), OFlags::RDWR);
        let memory = DeviceMemory {
            name: self.to_string(),
            memory_type: MemoryType::Generic,
            frames: (size / PAGE_SIZE as u64) as u32,
            frame_size: PAGE_SIZE as u64,
            // As a device does, a file in its place keeps what it holds.
            piece: None,
            stores: false,
            file: steady.map_err(self.failed("open it again"))?,
            _origin: Some(file),
            whole: None,
        };
        Ok((memory, InPlace { size, align, target_node, is_device: matches!(kind, FileKind::Dax(_)) }))
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
    target_node: Option<u32>,
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
        let target_node = number("target_node").and_then(|node| u32::try_from(node).ok());
        Ok(Self { size, align: number("align").unwrap_or(HUGE), target_node })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> MemorySpec {
        text.parse().unwrap()
    }

    fn backing(text: &str) -> Result<OwnedFd, String> {
        spec(text).create_backing().map_err(|e| e.to_string())
    }

    #[test]
    fn who_stores_pages_in_a_file_has_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        std::fs::write(&path, "").unwrap();
        let text = format!("generic:{}:1M", path.display());
        let file = backing(&text).unwrap();
        let in_use = format!("memory {text} is in use by another process");
        assert_eq!(backing(&text).unwrap_err(), in_use);
        assert_eq!(spec(&text).create().err().unwrap().to_string(), in_use);
        // In the processes of the domain.
        let path_of = backing_path(&file);
        let memory = spec(&text).attach(&path_of).unwrap();
        assert_eq!((memory.frames(), memory.frame_size(), memory.must_clear()), (256, 4096, true));
        memory.area().unwrap().write(5000, b"a page");
        drop((memory, file));
        assert!(backing(&text).unwrap_err().contains("holds data"), "of a run that was killed");
        std::fs::write(&path, "").unwrap();
        let shared = (spec(&text).create().unwrap(), spec(&text).create().unwrap());
        assert_eq!(backing(&text).unwrap_err(), in_use, "others map it");
        drop(shared);
        assert!(backing(&text).is_ok() && path.exists(), "a file that was there stays");
    }

    #[test]
    fn a_file_that_is_made_for_it_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!("coherent:{}:1M", dir.path().join("new").display());
        let file = backing(&text).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let stat = rustix::fs::fstat(&file).unwrap();
        assert_eq!((stat.st_size, stat.st_mode & 0o777, stat.st_nlink), (1 << 20, 0o600, 0));
        assert!(spec(&text).attach(&backing_path(&file)).is_ok());
        assert!(backing(&text).is_ok(), "another one");
    }

    #[test]
    fn sizes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let text = format!("generic:{}", path.display());
        assert!(matches!(spec(&text).available(), Err(MemoryError::Sys { errno: Errno::NOENT, .. })));
        let file = std::fs::File::create(&path).unwrap();
        assert_eq!(spec(&text).available(), Err(MemoryError::NoSize(text.clone())));
        file.set_len(3 << 20).unwrap();
        assert_eq!(spec(&text).available(), Ok(3 << 20));
        assert!(matches!(spec("generic:memfd").available(), Err(MemoryError::NoSize(_))));
        assert!(matches!(
            spec("generic:/dev/null").available(),
            Err(MemoryError::Sys { errno: Errno::NODEV, .. })
        ));
        assert!(
            backing("generic:memfd:5000")
                .unwrap_err()
                .contains("5000 bytes are not a whole number of its 4K pages")
        );
        assert!(backing("generic:hugetlb:3M").unwrap_err().contains("whole number of its 2M pages"));
        if let Some(node) = numa::memory_nodes().first() {
            let error = backing(&format!("numa:{node}:7T")).unwrap_err();
            assert!(error.contains("the node has "), "{error}");
        }
    }
}

//! Device specifications: `ram[:SIZE]`, `mem:SIZE`, `file:DIR[:SIZE]`, memory of its own (`generic:SOURCE[:SIZE]`,
//! `coherent:SOURCE[:SIZE]`, `numa:NODE:SIZE`), and for tests `inject:RULES:SPEC`.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;

use rustix::io::Errno;

use super::inject::{Inject, Rules, RulesError};
use super::memory::{self, MemoryError, MemorySpec, MemorySpecError, Source};
use super::{Attach, Device, MemoryType, file, mem, ram};
use crate::size::{SizeError, format_size, looks_like_size, parse_size};

/// Which device, and how large.
///
/// ```
/// use farpage::device::spec::{Spec, SpecError};
///
/// let spec: Spec = "file:/scratch:2G".parse()?;
/// assert_eq!(spec, Spec::File { dir: "/scratch".into(), size: Some(2 << 30) });
/// assert_eq!((spec.size(), spec.frames()), (Some(2 << 30), 1 << 19));
/// assert_eq!(spec.to_string(), "file:/scratch:2G");
///
/// // Without a size, whoever makes the domain decides.
/// let spec: Spec = "ram".parse()?;
/// let (min, max) = spec.limits();
/// assert_eq!((spec.size(), spec.with_size(0).size()), (None, Some(min)));
/// assert_eq!("ram:1T".parse::<Spec>(), Err(SpecError::TooLarge("ram:1T".into(), max)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Spec {
    /// LZ4-compressed pages in memory; `size` bytes at most (`None`: the launcher decides).
    Ram {
        /// Bytes the compressed pool may occupy.
        size: Option<u64>,
    },
    /// Uncompressed pages in memory.
    Mem {
        /// Bytes the pages may occupy.
        size: u64,
    },
    /// Pages in an unlinked file in `dir`; `size` bytes at most (`None`: the launcher decides).
    File {
        /// The directory.
        dir: PathBuf,
        /// Bytes the file may occupy.
        size: Option<u64>,
    },
    /// Uncompressed pages in memory of a type of its own (`None` as its size: all that there is).
    Memory(MemorySpec),
    /// Another device with faults injected, for tests.
    Inject {
        /// Which operations fail, and how.
        rules: Rules,
        /// The device.
        inner: Box<Spec>,
    },
}

/// Why a text is not a device.
///
/// See the example of [`Spec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No such kind of device.
    #[error(
        "unknown device `{0}` (there are `ram[:SIZE]`, `mem:SIZE`, `file:DIR[:SIZE]`, `generic:SOURCE[:SIZE]`, \
         `coherent:SOURCE[:SIZE]` and `numa:NODE:SIZE`)"
    )]
    Unknown(String),
    /// Memory of its own.
    #[error(transparent)]
    Memory(MemorySpecError),
    /// Memory that is its driver's.
    #[error("device `{0}`: peer-to-peer memory is its driver's, no pages are stored in it")]
    Peer(String),
    /// The size is none.
    #[error("device `{0}`: {1}")]
    Size(String, SizeError),
    /// The size is below the smallest that works.
    #[error("device `{0}` is too small: the smallest that works is {min}", min = format_size(*.1))]
    TooSmall(String, u64),
    /// The size is above the largest that works.
    #[error("device `{0}` is too large: the largest that works is {max}", max = format_size(*.1))]
    TooLarge(String, u64),
    /// `mem`, or memory of its own that is made for it, without a size.
    #[error("device `{0}` needs a size (write `{0}:SIZE`)")]
    NoSize(String),
    /// `file` without a directory.
    #[error("device `{0}` names no directory (write `file:DIR` or `file:DIR:SIZE`)")]
    NoDirectory(String),
    /// The rules of an `inject` device.
    #[error("device `{0}`: {1}")]
    Rules(String, RulesError),
    /// `inject` without a device.
    #[error("device `{0}` names no device to inject faults into (write `inject:RULES:SPEC`)")]
    NoInner(String),
}

/// Why a device could not be set up.
///
/// Part of a [`DomainError`](crate::domain::DomainError): see the example of [`DomainError`](crate::domain::DomainError).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// The directory cannot hold the backing file.
    #[error("cannot create a file of {} in `{dir}`: {errno}", format_size(*.size))]
    Create {
        /// The directory.
        dir: String,
        /// Bytes wanted.
        size: u64,
        /// Why.
        errno: Errno,
    },
    /// Memory of its own cannot be had, or not be reached in this process.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The size that a file or a node has does not work.
    #[error(transparent)]
    Size(#[from] SpecError),
    /// The backing file, which the launcher created, cannot be opened in this process.
    #[error("device `{name}` cannot open its file `{path}`: {errno}")]
    Open {
        /// The device.
        name: String,
        /// The launcher's path.
        path: String,
        /// Why.
        errno: Errno,
    },
}

/// The path by which every process of the domain can open a backing file that this process, the launcher, keeps
/// open: what [`Attach::path`] wants.
#[doc(hidden)]
pub fn backing_path(file: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", rustix::process::getpid().as_raw_nonzero(), file.as_raw_fd())
}

impl Spec {
    /// Its size in bytes, if it was given.
    pub fn size(&self) -> Option<u64> {
        match self {
            Self::Ram { size } | Self::File { size, .. } => *size,
            Self::Mem { size } => Some(*size),
            Self::Memory(memory) => memory.size,
            Self::Inject { inner, .. } => inner.size(),
        }
    }

    /// The device itself, without injected faults.
    #[doc(hidden)]
    pub fn base(&self) -> &Self {
        match self {
            Self::Inject { inner, .. } => inner.base(),
            device => device,
        }
    }

    /// In the launcher: the same device with the size that the file or the node of [`Spec::Memory`] has, if none was given.
    /// (Others get theirs from whoever divides the memory.)
    ///
    /// # Errors
    /// [`SetupError`]: it is not there, or has no size.
    #[doc(hidden)]
    pub fn resolved(self) -> Result<Self, SetupError> {
        match self.base() {
            Self::Memory(memory) if memory.size.is_none() => {
                let text = self.to_string();
                let size = memory.available()?;
                let resolved = self.set_size(size);
                Ok(resolved.check_size(&text)?)
            }
            _ => Ok(self),
        }
    }

    /// The same device with this size in bytes, brought within what works.
    pub fn with_size(self, bytes: u64) -> Self {
        let (min, max) = self.limits();
        self.set_size(bytes.clamp(min, max))
    }

    fn set_size(self, bytes: u64) -> Self {
        let size = Some(bytes);
        match self {
            Self::Ram { .. } => Self::Ram { size },
            Self::Mem { .. } => Self::Mem { size: bytes },
            Self::File { dir, .. } => Self::File { dir, size },
            Self::Memory(memory) => Self::Memory(MemorySpec { size, ..memory }),
            Self::Inject { rules, inner } => Self::Inject { rules, inner: Box::new(inner.set_size(bytes)) },
        }
    }

    /// The smallest and the largest size that work, in bytes.
    pub fn limits(&self) -> (u64, u64) {
        match self {
            Self::Ram { .. } => (ram::MIN_SIZE, ram::MAX_SIZE),
            Self::Mem { .. } => (mem::MIN_SIZE, mem::MAX_SIZE),
            Self::File { .. } => (file::MIN_SIZE, file::MAX_SIZE),
            Self::Memory(_) => (memory::MIN_SIZE, memory::MAX_SIZE),
            Self::Inject { inner, .. } => inner.limits(),
        }
    }

    /// The size that counts: the smallest that works if none was given and none was set by `with_size`.
    fn bytes(&self) -> u64 {
        let (min, max) = self.limits();
        self.size().unwrap_or(min).clamp(min, max)
    }

    /// How many frames the device has.
    pub fn frames(&self) -> u32 {
        match self {
            Self::Ram { .. } => ram::frames(self.bytes()),
            Self::Mem { .. } | Self::Memory(_) => mem::frames(self.bytes()),
            Self::File { .. } => file::frames(self.bytes()),
            Self::Inject { inner, .. } => inner.frames(),
        }
    }

    /// Bytes of shared memory that the device needs. (Sparse: what is never touched costs nothing.)
    #[doc(hidden)]
    pub fn shared_len(&self) -> usize {
        match self {
            Self::Ram { .. } => ram::shared_len(self.bytes()),
            Self::Mem { .. } => mem::shared_len(self.bytes()),
            Self::Memory(_) => mem::notes_len(self.bytes()),
            Self::File { .. } => file::shared_len(self.bytes()),
            Self::Inject { inner, .. } => Inject::SHARED_LEN + inner.shared_len(),
        }
    }

    /// In the launcher: creates the backing file, where there is one. The launcher keeps it open as long as the
    /// domain lives and passes its [`backing_path`] as [`Attach::path`].
    #[doc(hidden)]
    pub fn create_backing(&self) -> Result<Option<OwnedFd>, SetupError> {
        match self {
            Self::Ram { .. } | Self::Mem { .. } => Ok(None),
            Self::Inject { inner, .. } => inner.create_backing(),
            Self::Memory(memory) => Ok(Some(memory.create_backing()?)),
            Self::File { dir, .. } => file::create_backing(dir, self.bytes()).map(Some).map_err(|errno| {
                SetupError::Create { dir: dir.display().to_string(), size: self.bytes(), errno }
            }),
        }
    }

    /// In every process of the domain: the device over its shared area.
    #[doc(hidden)]
    pub fn attach(&self, attach: Attach) -> Result<Box<dyn Device>, SetupError> {
        Ok(match self {
            Self::Ram { .. } => Box::new(ram::Ram::attach(self.bytes(), attach)),
            Self::Mem { .. } => Box::new(mem::Mem::attach(self.bytes(), &attach)),
            Self::Memory(memory) => Box::new(mem::Mem::attach_memory(memory, &attach)?),
            Self::File { .. } => {
                let name = self.clone().with_size(self.bytes()).to_string();
                Box::new(file::File::attach(name.clone(), self.bytes(), &attach).map_err(|errno| {
                    SetupError::Open { name, path: attach.path.clone().unwrap_or_default(), errno }
                })?)
            }
            Self::Inject { rules, inner } => {
                let (own, area) = attach.area.split(Inject::SHARED_LEN);
                let name = self.clone().with_size(self.bytes()).to_string();
                Box::new(Inject::new(name, rules.clone(), own, inner.attach(Attach { area, ..attach })?))
            }
        })
    }

    fn check_size(self, text: &str) -> Result<Self, SpecError> {
        let (min, max) = self.limits();
        match self.size() {
            Some(size) if size < min => Err(SpecError::TooSmall(text.to_owned(), min)),
            Some(size) if size > max => Err(SpecError::TooLarge(text.to_owned(), max)),
            _ => Ok(self),
        }
    }
}

/// `DIR`, `DIR:SIZE`, or `DIR:` for a directory (or another name) that itself ends in something like a size.
pub(crate) fn split_dir(text: &str) -> Result<(&str, Option<u64>), SizeError> {
    match text.rsplit_once(':') {
        Some((dir, "")) => Ok((dir, None)),
        Some((dir, size)) if looks_like_size(size) => Ok((dir, Some(parse_size(size)?))),
        _ => Ok((text, None)),
    }
}

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let size_error = |e| SpecError::Size(text.to_owned(), e);
        match text.split_once(':').unwrap_or((text, "")) {
            ("ram", size) => {
                let given = text != "ram";
                let size = given.then(|| parse_size(size)).transpose().map_err(size_error)?;
                Self::Ram { size }.check_size(text)
            }
            ("mem", size) => {
                if text == "mem" {
                    return Err(SpecError::NoSize(text.to_owned()));
                }
                Self::Mem { size: parse_size(size).map_err(size_error)? }.check_size(text)
            }
            ("file", rest) => {
                let (dir, size) = split_dir(rest).map_err(size_error)?;
                if dir.is_empty() {
                    return Err(SpecError::NoDirectory(text.to_owned()));
                }
                Self::File { dir: dir.into(), size }.check_size(text)
            }
            ("generic" | "coherent" | "numa" | "p2pdma", _) => {
                let memory: MemorySpec = text.parse().map_err(SpecError::Memory)?;
                if memory.memory_type == MemoryType::P2pDma {
                    return Err(SpecError::Peer(text.to_owned()));
                }
                if memory.size.is_none() && !matches!(memory.source, Source::Path(_)) {
                    return Err(SpecError::NoSize(text.trim_end_matches(':').to_owned()));
                }
                Self::Memory(memory).check_size(text)
            }
            ("inject", rest) => {
                let (rules, inner) =
                    rest.split_once(':').ok_or_else(|| SpecError::NoInner(text.to_owned()))?;
                let rules = rules.parse().map_err(|e| SpecError::Rules(text.to_owned(), e))?;
                // One level only: rules on top of rules say nothing that one set of rules cannot.
                if inner.starts_with("inject") {
                    return Err(SpecError::NoInner(text.to_owned()));
                }
                Ok(Self::Inject { rules, inner: Box::new(inner.parse()?) })
            }
            _ => Err(SpecError::Unknown(text.to_owned())),
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ram { size: None } => write!(f, "ram"),
            Self::Ram { size: Some(size) } => write!(f, "ram:{}", format_size(*size)),
            Self::Mem { size } => write!(f, "mem:{}", format_size(*size)),
            Self::File { dir, size: Some(size) } => {
                write!(f, "file:{}:{}", dir.display(), format_size(*size))
            }
            Self::File { dir, size: None } => {
                let dir = dir.display().to_string();
                let clear = split_dir(&dir).is_ok_and(|split| split == (&dir, None));
                write!(f, "file:{dir}{}", if clear { "" } else { ":" })
            }
            Self::Memory(memory) => write!(f, "{memory}"),
            Self::Inject { rules, inner } => write!(f, "inject:{rules}:{inner}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(dir: &str, size: Option<u64>) -> Spec {
        Spec::File { dir: dir.into(), size }
    }

    fn memory(memory_type: MemoryType, source: Source, size: Option<u64>) -> Spec {
        Spec::Memory(MemorySpec { memory_type, source, size })
    }

    #[test]
    fn reads_devices() {
        for (text, spec) in [
            ("ram", Spec::Ram { size: None }),
            ("ram:1G", Spec::Ram { size: Some(1 << 30) }),
            ("ram:1048576", Spec::Ram { size: Some(1 << 20) }),
            ("mem:64M", Spec::Mem { size: 64 << 20 }),
            ("file:/scratch", file("/scratch", None)),
            ("file:/scratch:2T", file("/scratch", Some(2 << 40))),
            ("file:a:b", file("a:b", None)),
            ("file:a:b:64m", file("a:b", Some(64 << 20))),
            ("file:/a:64M:", file("/a:64M", None)),
            ("file:/a::", file("/a:", None)),
            ("file:/a:12X", file("/a:12X", None)),
            ("generic:memfd:64M", memory(MemoryType::Generic, Source::Memfd, Some(64 << 20))),
            ("coherent:hugetlb:64M", memory(MemoryType::Coherent, Source::Hugetlb, Some(64 << 20))),
            ("numa:1:1G", memory(MemoryType::Coherent, Source::Node(1), Some(1 << 30))),
            ("generic:/dev/dax0.0", memory(MemoryType::Generic, Source::Path("/dev/dax0.0".into()), None)),
            ("generic:/a:64M:", memory(MemoryType::Generic, Source::Path("/a:64M".into()), None)),
            ("coherent:a:b:2G", memory(MemoryType::Coherent, Source::Path("a:b".into()), Some(2 << 30))),
        ] {
            assert_eq!(text.parse(), Ok(spec), "{text}");
        }
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, message) in [
            ("", "unknown device ``"),
            ("disk", "unknown device `disk`"),
            ("rams", "unknown device `rams`"),
            ("ram:", "`` is not a size"),
            ("ram:lots", "`lots` is not a size"),
            ("ram:0", "device `ram:0` is too small: the smallest that works is 1M"),
            ("ram:1023K", "smallest that works is 1M"),
            ("ram:1T", "largest that works is 128G"),
            ("mem", "needs a size"),
            ("mem:", "`` is not a size"),
            ("mem:4K", "smallest that works is 1M"),
            ("mem:2T", "largest that works is 1T"),
            ("file", "names no directory"),
            ("file:", "names no directory"),
            ("file::1G", "names no directory"),
            ("file:/a:4095", "smallest that works is 1M"),
            ("file:/a:9T", "largest that works is 8T"),
            ("file:/a:99999999T", "size `99999999T` is too large"),
            ("generic", "unknown memory `generic`"),
            ("generic:", "unknown memory"),
            ("generic:memfd", "device `generic:memfd` needs a size (write `generic:memfd:SIZE`)"),
            ("generic:hugetlb:", "device `generic:hugetlb` needs a size"),
            ("numa:1", "device `numa:1` needs a size (write `numa:1:SIZE`)"),
            ("numa:one:1G", "names no node"),
            ("generic:memfd:100", "smallest that works is 4K"),
            ("coherent:/a:9T", "largest that works is 8T"),
            ("generic:memfd:99999999T", "size `99999999T` is too large"),
            ("p2pdma:memfd:1M", "peer-to-peer memory is its driver's"),
            ("inject", "names no device"),
            ("inject:fail-store=1", "names no device"),
            ("inject:nonsense:ram", "nonsense"),
            ("inject:fail-store=1:disk", "unknown device `disk`"),
        ] {
            let error = text.parse::<Spec>().unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_resolved_within_what_works() {
        let spec: Spec = "inject:fail-store=1:file:/tmp".parse().unwrap();
        assert_eq!(spec.size(), None);
        let spec = spec.with_size(0);
        assert_eq!(spec.size(), Some(1 << 20));
        assert_eq!(spec.to_string(), "inject:fail-store=1:file:/tmp:1M");
        assert_eq!(Spec::Ram { size: None }.with_size(u64::MAX).size(), Some(128 << 30));
    }

    #[test]
    fn a_file_that_is_there_has_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let text = format!("inject:full=1:generic:{}", path.display());
        let spec: Spec = text.parse().unwrap();
        let error = spec.clone().resolved().unwrap_err().to_string();
        assert!(error.contains("cannot open it: No such file"), "{error}");
        std::fs::File::create(&path).unwrap().set_len(5 << 20).unwrap();
        let spec = spec.resolved().unwrap();
        assert_eq!((spec.size(), spec.frames()), (Some(5 << 20), 1280));
        assert_eq!(spec.to_string(), format!("{text}:5M"));
        std::fs::File::create(&path).unwrap().set_len(100).unwrap();
        let error = text.parse::<Spec>().unwrap().resolved().unwrap_err().to_string();
        assert!(error.contains("smallest that works is 4K"), "{error}");
        assert_eq!("ram".parse::<Spec>().unwrap().resolved(), Ok(Spec::Ram { size: None }));
    }

    #[test]
    fn a_missing_directory_is_named() {
        let spec: Spec = "file:/nowhere/at/all:1M".parse().unwrap();
        let error = spec.create_backing().unwrap_err().to_string();
        assert!(error.starts_with("cannot create a file of 1M in `/nowhere/at/all`: "), "{error}");
    }

    proptest! {
        #[test]
        fn no_input_panics_and_what_parses_round_trips(
            text in prop_oneof![
                any::<String>(),
                "(ram|mem|file|inject)(:[a-z0-9=x,+*%-]{0,12}){0,3}(:(ram|mem|file))?(:[/a-zKMGT0-9.]{0,6}){0,3}:?",
                "(inject:full=1:)?(generic|coherent|numa|p2pdma):(memfd|hugetlb|[0-9]{0,3}|/[a-z0-9:KMG]{0,8})(:[0-9]{1,9}[KMGT]?)?:?",
            ]
        ) {
            if let Ok(spec) = text.parse::<Spec>() {
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }

        #[test]
        fn every_directory_round_trips(dir in "[^\0]{1,12}", size in proptest::option::of(1u64 << 20..1 << 40)) {
            let spec = file(&dir, size);
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            if dir != "memfd" && dir != "hugetlb" {
                let spec = memory(MemoryType::Generic, Source::Path(dir.into()), size);
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }
    }
}

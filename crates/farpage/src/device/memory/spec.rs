//! Which memory, as a text.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::device::MemoryType;
use crate::device::spec::split_dir;
use crate::size::{SizeError, format_size};

/// Where memory comes from.
///
/// See the example of [`MemorySpec`].
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
///
/// ```
/// use farpage::device::MemoryType;
/// use farpage::device::memory::{MemoryError, MemorySpec, MemorySpecError, Source};
///
/// let spec: MemorySpec = "generic:memfd:4M".parse()?;
/// assert_eq!((spec.memory_type, &spec.source, spec.size), (MemoryType::Generic, &Source::Memfd, Some(4 << 20)));
/// let memory = spec.create()?;
/// assert_eq!((memory.memory_type(), memory.frames(), memory.frame_size()), (MemoryType::Generic, 1024, 4096));
/// assert_eq!(memory.in_use()?, 0, "no page of it has been used");
///
/// assert_eq!("disk:1M".parse::<MemorySpec>(), Err(MemorySpecError::Unknown("disk:1M".into())));
/// let error = "generic:/dev/dax99.0".parse::<MemorySpec>()?.create().err().unwrap();
/// assert!(matches!(error, MemoryError::Sys { .. }), "{error}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
///
/// See the example of [`MemorySpec`].
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

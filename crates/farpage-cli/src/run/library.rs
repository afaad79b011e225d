//! The injected library, carried inside the command and given to the loader as a memory file.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::probe;

/// The crate `farpage-preload`, built by the build script.
const LIBRARY: &[u8] = include_bytes!(env!("FARPAGE_PRELOAD_LIBRARY"));

/// Why the library cannot be loaded into programs.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// A limit on file sizes counts for memory files, too.
    #[error(
        "the library, of {} KiB, is larger than files may become here: raise the limit (`ulimit -f`)", LIBRARY.len() >> 10
    )]
    FileSize,
    /// No executable memory file.
    #[error(
        "the library cannot be put into an executable memory file ({0}): \
         permit it with `sysctl vm.memfd_noexec=1`, or outside of this sandbox"
    )]
    Memfd(io::Error),
    /// The program would not reach it, or not be allowed to execute it.
    #[error(
        "the library cannot be loaded from {path} ({source}): farpage needs /proc, and permission to execute memory files"
    )]
    Load {
        /// Where it is.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// The library in a memory file, which exists as long as this does.
#[derive(Debug)]
pub struct Library {
    file: OwnedFd,
}

impl Library {
    /// Writes the library to a sealed memory file and tries whether the loader will be able to map it.
    pub fn create() -> Result<Self, LibraryError> {
        let library = Self {
            file: write().map_err(|e| match e.kind() {
                io::ErrorKind::FileTooLarge => LibraryError::FileSize,
                _ => LibraryError::Memfd(e),
            })?,
        };
        let path = library.path();
        match File::open(&path).and_then(|file| Ok(probe::map_executable(file)?)) {
            Ok(()) => Ok(library),
            Err(source) => Err(LibraryError::Load { path, source }),
        }
    }

    /// Where every process of the tree finds it, whatever it did to its descriptors and directories.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// The value of `LD_PRELOAD`: the library before what was there.
    pub fn preload(&self, existing: Option<&OsStr>) -> OsString {
        let mut value = OsString::from(self.path());
        if let Some(existing) = existing.filter(|e| !e.is_empty()) {
            value.push(":");
            value.push(existing);
        }
        value
    }
}

fn write() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::EXEC;
    let mut file = File::from(memfd_create("farpage-preload", flags)?);
    file.write_all(LIBRARY)?;
    fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_sealed_and_comes_first() {
        let library = Library::create().unwrap();
        let write = File::options().write(true).open(library.path()).and_then(|mut f| f.write_all(b"x"));
        assert!(write.is_err());
        assert_eq!(std::fs::read(library.path()).unwrap(), LIBRARY);
        assert_eq!(library.preload(None), *library.path());
        assert_eq!(library.preload(Some(OsStr::new(""))), *library.path());
        assert_eq!(library.preload(Some(OsStr::new("a b"))), *format!("{}:a b", library.path()));
    }
}

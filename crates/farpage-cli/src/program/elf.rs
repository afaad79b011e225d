//! Reads as much of an ELF file as is needed to say whether glibc's loader would preload a library into it.

use std::io;
use std::path::{Path, PathBuf};

/// What an ELF file begins with.
pub const MAGIC: &[u8] = b"\x7fELF";

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;
#[cfg(target_arch = "riscv64")]
const MACHINE: u16 = 243;

const PT_INTERP: u32 = 3;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// Why a program that could run cannot be managed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No dynamic loader, so nothing can be preloaded.
    #[error(
        "is statically linked, so farpage's library cannot be loaded into it: use a dynamically linked build"
    )]
    Static,
    /// Another processor, or 32 bits.
    #[error("is built for another architecture than farpage ({0}): use a build for {arch}", arch = std::env::consts::ARCH)]
    Architecture(&'static str),
    /// A loader of another C library.
    #[error("is loaded by {}, not by glibc's loader, so farpage's library does not fit: use a glibc build", .0.display())]
    Loader(PathBuf),
    /// The loader is not installed.
    #[error("needs the loader {}, which is not there: install the C library it was built for", .0.display())]
    LoaderMissing(PathBuf),
    /// The file is damaged.
    #[error("is a damaged ELF file ({0})")]
    Damaged(&'static str),
    /// Neither ELF nor script nor text.
    #[error("is neither an ELF program nor a script")]
    UnknownFormat,
    /// setuid.
    #[error("is setuid (user {0}), and the loader preloads nothing into it: run farpage as that user")]
    SetUser(u32),
    /// setgid.
    #[error("is setgid (group {0}), and the loader preloads nothing into it: run farpage with that group")]
    SetGroup(u32),
    /// File capabilities.
    #[error(
        "carries file capabilities, and the loader preloads nothing into it: run it as root or from a copy without them"
    )]
    FileCapabilities,
}

/// Fills the buffer from an offset, or fails.
pub type ReadAt<'a> = &'a dyn Fn(&mut [u8], u64) -> io::Result<()>;

/// Checks that the ELF file is a dynamic program of this architecture that glibc's loader starts.
pub fn check(read_at: ReadAt<'_>) -> Result<(), Refusal> {
    let mut header = [0u8; HEADER];
    // A 32-bit header is shorter, but no program is: 64 bytes are always there.
    read_at(&mut header, 0).map_err(|_| Refusal::Damaged("its header is cut off"))?;
    if header[4] != 2 {
        return Err(Refusal::Architecture("32 bits"));
    }
    let little = cfg!(target_endian = "little");
    if header[5] != if little { 1 } else { 2 } {
        return Err(Refusal::Architecture("the other byte order"));
    }
    if u16_at(&header, 18) != MACHINE {
        return Err(Refusal::Architecture("another processor"));
    }
    let kind = u16_at(&header, 16);
    if kind != 2 && kind != 3 {
        return Err(Refusal::Damaged("it is not a program"));
    }
    let (offset, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER {
        return Err(Refusal::Damaged("its program headers have the wrong size"));
    }
    for i in 0..u64::from(count) {
        let mut entry = [0u8; PROGRAM_HEADER];
        offset
            .checked_add(i * PROGRAM_HEADER as u64)
            .and_then(|at| read_at(&mut entry, at).ok())
            .ok_or(Refusal::Damaged("its program headers are cut off"))?;
        if u32_at(&entry, 0) == PT_INTERP {
            return check_loader(&loader(read_at, u64_at(&entry, 8), u64_at(&entry, 32))?);
        }
    }
    Err(Refusal::Static)
}

/// The loader's path that the file names.
fn loader(read_at: ReadAt<'_>, at: u64, len: u64) -> Result<PathBuf, Refusal> {
    let damaged = Refusal::Damaged("the path of its loader is wrong");
    let Ok(len @ 2..=4096) = usize::try_from(len) else { return Err(damaged) };
    let mut path = vec![0u8; len];
    read_at(&mut path, at).map_err(|_| damaged.clone())?;
    if path.pop() != Some(0) || path.contains(&0) {
        return Err(damaged);
    }
    String::from_utf8(path).map(PathBuf::from).map_err(|_| damaged)
}

/// glibc calls its loader `ld-linux-ARCH.so.N` on every architecture that farpage knows.
fn check_loader(path: &Path) -> Result<(), Refusal> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
    if !name.starts_with("ld-linux") {
        Err(Refusal::Loader(path.into()))
    } else if !path.exists() {
        Err(Refusal::LoaderMissing(path.into()))
    } else {
        Ok(())
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

//! Directories for `file` devices: which one is the temporary directory, and can it hold pages.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};

const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;

/// A directory that was passed over, and why.
#[derive(Debug)]
pub struct Refused {
    /// The directory.
    pub dir: PathBuf,
    /// Why.
    pub why: String,
}

/// The first of `candidates` that is writable and not in memory, and those passed over before it.
pub fn temp_dir(candidates: impl IntoIterator<Item = PathBuf>) -> (Option<PathBuf>, Vec<Refused>) {
    let mut refused = Vec::new();
    for dir in candidates {
        match check_writable(&dir).and_then(|()| in_memory(&dir)) {
            Ok(false) => return (Some(dir), refused),
            Ok(true) => refused.push(Refused { dir, why: "it lies in memory (tmpfs)".into() }),
            Err(e) => refused.push(Refused { dir, why: e.to_string() }),
        }
    }
    (None, refused)
}

/// Whether the directory exists and a file can be made in it; leaves nothing there.
pub fn check_writable(dir: &Path) -> io::Result<()> {
    if !dir.metadata()?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    match unnamed(dir, OFlags::empty()) {
        Ok(_) => Ok(()),
        // A file system without unnamed files: take the permissions' word for it.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) if holds_files(dir)? => {
            let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
            Ok(rustix::fs::accessat(CWD, dir, access, AtFlags::EACCESS)?)
        }
        Err(e) => Err(e.into()),
    }
}

/// Whether files can be made there at all, whatever the permissions say.
fn holds_files(dir: &Path) -> io::Result<bool> {
    const PROC: i64 = 0x9fa0;
    const SYSFS: i64 = 0x6265_6572;
    let kind = rustix::fs::statfs(dir)?.f_type as i64;
    Ok(kind != PROC && kind != SYSFS)
}

/// Opens a file without a name in `dir`.
pub fn unnamed(dir: &Path, flags: OFlags) -> rustix::io::Result<File> {
    let flags = flags | OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// Bytes that this user may still write in the file system.
pub fn free_space(dir: &Path) -> io::Result<u64> {
    let fs = rustix::fs::statvfs(dir)?;
    Ok(fs.f_bavail.saturating_mul(fs.f_frsize))
}

/// Whether what is written there stays in memory.
pub fn in_memory(dir: &Path) -> io::Result<bool> {
    let kind = rustix::fs::statfs(dir)?.f_type as i64;
    Ok(kind == TMPFS || kind == RAMFS)
}

/// Where temporary files go: `TMPDIR` if set, then the usual places.
pub fn candidates() -> impl Iterator<Item = PathBuf> {
    let set = std::env::var_os("TMPDIR").filter(|d| !d.is_empty()).map(PathBuf::from);
    set.into_iter().chain(["/tmp".into(), "/var/tmp".into()])
}

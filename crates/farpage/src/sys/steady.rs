//! A file that stays open although the program around us closes descriptors it does not know.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// A file opened by a path that stays valid, opened again whenever its descriptor was closed behind our back
/// (`closefrom`) or, worse, stands for another file now.
pub struct SteadyFile {
    path: String,
    flags: OFlags,
    /// Device and inode: what tells our file from another.
    identity: (u64, u64),
    fd: AtomicI32,
}

impl SteadyFile {
    /// Opens the file at `path`. `flags` as for `open(2)`; `O_CLOEXEC` is added.
    pub fn open(path: &str, flags: OFlags) -> Result<Self, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        let fd = open_high(path, flags)?;
        let identity = identity(fd.as_fd())?;
        Ok(Self { path: path.to_owned(), flags, identity, fd: AtomicI32::new(fd.into_raw_fd()) })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A descriptor of our file, now. (Another thread of the program may still close it before it is used; the
    /// call then fails, or in the worst case meets a file opened in between. The descriptor's number is high to
    /// keep out of the way of numbers that are used again soon.)
    pub fn get(&self) -> Result<BorrowedFd<'_>, Errno> {
        let raw = self.fd.load(Ordering::Relaxed);
        // SAFETY: only borrowed for calls that tolerate a descriptor of another file or of none (`fstat` here, whose
        // answer is what we go by); it is never closed through this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(raw) };
        if identity(fd) == Ok(self.identity) {
            return Ok(fd);
        }
        self.reopen(raw)
    }

    fn reopen(&self, old: RawFd) -> Result<BorrowedFd<'_>, Errno> {
        let new = open_high(&self.path, self.flags)?;
        if identity(new.as_fd())? != self.identity {
            return Err(Errno::STALE);
        }
        // Relaxed: the number carries no data with it. The old one is not ours any more: leave it alone.
        match self.fd.compare_exchange(old, new.as_raw_fd(), Ordering::Relaxed, Ordering::Relaxed) {
            // SAFETY: as in `get`; the descriptor stays open, `into_raw_fd` has given it to `self.fd`.
            Ok(_) => Ok(unsafe { BorrowedFd::borrow_raw(new.into_raw_fd()) }),
            // Another thread was first; ours is closed by its drop.
            // SAFETY: as in `get`.
            Err(now) => Ok(unsafe { BorrowedFd::borrow_raw(now) }),
        }
    }
}

impl Drop for SteadyFile {
    fn drop(&mut self) {
        if let Ok(fd) = self.get() {
            // SAFETY: it is our file, and nobody borrows from `self` any more.
            unsafe { rustix::io::close(fd.as_raw_fd()) };
        }
    }
}

/// Device and inode of a file.
///
/// # Errors
/// It is no descriptor.
pub fn identity(fd: BorrowedFd<'_>) -> Result<(u64, u64), Errno> {
    rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

/// Opens with a descriptor number that programs do not count on.
fn open_high(path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    Ok(move_high(rustix::fs::open(path, flags, Mode::empty())?))
}

/// The same file under a descriptor number that programs do not count on: shells give the low ones to `exec 3>file`.
pub fn move_high(fd: OwnedFd) -> OwnedFd {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1024);
    let lowest = (limit - limit / 8).min(1000) as RawFd;
    // Without a free number up there the low one has to do.
    rustix::io::fcntl_dupfd_cloexec(&fd, lowest).unwrap_or(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_closing_and_replacing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "hello").unwrap();
        let file = SteadyFile::open(path.to_str().unwrap(), OFlags::RDWR).unwrap();
        let read = || {
            let mut buf = [0; 5];
            rustix::io::pread(file.get().unwrap(), &mut buf, 0).unwrap();
            buf
        };
        assert_eq!(&read(), b"hello");
        let first = file.get().unwrap().as_raw_fd();
        assert!(first > 100, "{first}");

        // SAFETY: what a program does that closes all descriptors.
        unsafe { rustix::io::close(first) };
        assert_eq!(&read(), b"hello");

        // The number stands for another file: ours is opened again and the other is left alone.
        let second = file.get().unwrap().as_raw_fd();
        let other = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: dup2 onto a number of our own.
        assert_eq!(unsafe { libc::dup2(other.as_raw_fd(), second) }, second);
        assert_eq!(&read(), b"hello");
        assert_ne!(file.get().unwrap().as_raw_fd(), second);
        // SAFETY: ours, opened by the dup2.
        assert_eq!(unsafe { libc::close(second) }, 0, "the other file was closed");

        // Another file by the same path is not our file.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "other").unwrap();
        assert_eq!(&read(), b"hello");
        // SAFETY: as above.
        unsafe { rustix::io::close(file.get().unwrap().as_raw_fd()) };
        assert_eq!(file.get().unwrap_err(), Errno::STALE);
    }
}

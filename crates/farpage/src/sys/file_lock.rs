//! Locks of bytes of a file, whether there are such bytes or not.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::{Errno, Result};

use super::SharedMap;

/// A lock that this process has for as long as its memory lives: until no thread of it can run any more, in the kernel
/// neither. Neither closing descriptors nor `fork` ends it or hands it on; `exec` ends it, when all other threads are gone.
///
/// It belongs to an open file that nothing but a mapping keeps open, and that mapping is not a child's. (A child that is forked
/// while this is being made may have the lock as well, until it ends or calls `exec`.)
pub struct LifeLock(SharedMap);

impl LifeLock {
    /// Locks the byte `at`. `file` was opened for writing, for this lock alone.
    ///
    /// # Errors
    /// EAGAIN: somebody has it; the file system has no locks; no memory.
    pub fn hold(file: impl AsFd, at: i64) -> Result<Self> {
        let map = SharedMap::new(&file, 0, crate::PAGE_SIZE)?;
        let locked = map
            .keep_from_children()
            .and_then(|()| call(file.as_fd(), libc::F_OFD_SETLK, &mut byte(libc::F_WRLCK, at)));
        match locked {
            Ok(()) => Ok(Self(map)),
            Err(e) => {
                map.unmap();
                Err(e)
            }
        }
    }

    /// Gives it back: not in a child, where it is nothing.
    pub fn end(self) {
        self.0.unmap();
    }
}

/// Whether anybody has a lock of the byte `at`, also this process by another open file.
///
/// # Errors
/// It is no file, or its file system has no locks.
pub fn is_locked(file: BorrowedFd<'_>, at: i64) -> Result<bool> {
    let mut lock = byte(libc::F_WRLCK, at);
    call(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Waits for the lock of the first byte, which is the process's: it ends with it, or when it closes any descriptor of the
/// file; a child does not have it.
///
/// # Errors
/// The file system has no locks.
pub fn lock_first_byte(file: BorrowedFd<'_>) -> Result<()> {
    loop {
        match call(file, libc::F_SETLKW, &mut byte(libc::F_WRLCK, 0)) {
            Err(Errno::INTR) => {}
            locked => return locked,
        }
    }
}

/// Gives the lock of the first byte back.
pub fn unlock_first_byte(file: BorrowedFd<'_>) {
    // A lock of ours, on an open file: that does not fail.
    let _unlocked = call(file, libc::F_SETLK, &mut byte(libc::F_UNLCK, 0));
}

fn byte(kind: libc::c_int, at: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

fn call(file: BorrowedFd<'_>, command: libc::c_int, lock: &mut libc::flock) -> Result<()> {
    // SAFETY: the descriptor is open, and the lock lives across the call, which may write to it.
    let done = unsafe { libc::syscall(libc::SYS_fcntl, file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if done == 0 { Ok(()) } else { Err(super::last_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_lock_outlives_descriptors_and_is_no_childs() {
        const AT: i64 = 1 << 40;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = std::fs::File::create_new(&path).unwrap();
        let open = || std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let life = LifeLock::hold(open(), AT).unwrap();
        drop(open());
        let locked = |at| is_locked(file.as_fd(), at).unwrap();
        assert!(locked(AT) && !locked(AT + 1) && !locked(0));
        assert_eq!(LifeLock::hold(open(), AT).err(), Some(Errno::AGAIN));
        let (mut child_ends, parent) = std::io::pipe().unwrap();
        // SAFETY: the child only waits for the other end of the pipe to be closed, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: a system call that reads into a local byte; ends the child without the test harness's code.
            unsafe {
                libc::close(parent.as_raw_fd());
                let mut byte = 0u8;
                libc::read(child_ends.as_raw_fd(), (&raw mut byte).cast(), 1);
                libc::_exit(0)
            }
        }
        life.end();
        assert!(!locked(AT), "a child has it");
        drop(parent);
        let mut status = 0;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(std::io::Read::read(&mut child_ends, &mut [0]).unwrap(), 0);
        lock_first_byte(file.as_fd()).unwrap();
        assert!(locked(0) && !locked(1));
        unlock_first_byte(file.as_fd());
        assert!(!locked(0));
    }
}

//! `ioctl(2)` past the C library: the HMM test device replaces its function, and looks at page maps there.

use std::os::fd::RawFd;

use rustix::io::Errno;

/// The call's result, which is not negative.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// `arg` must be what `op` takes: a number, or a pointer that is valid for what the request reads and writes.
pub unsafe fn ioctl(fd: RawFd, op: u64, arg: usize) -> rustix::io::Result<usize> {
    // SAFETY: the caller's contract.
    let r = unsafe { libc::syscall(libc::SYS_ioctl, fd, op, arg) };
    if r < 0 {
        let e = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        return Err(Errno::from_raw_os_error(e));
    }
    Ok(r as usize)
}

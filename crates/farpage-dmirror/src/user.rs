//! The process's memory, as a device reaches it: with the mapping's permissions, and an error where there is none.

use rustix::io::Errno;

/// Calls of this size at most: the kernel moves no more than 2 GiB at once.
const CHUNK: usize = 64 << 20;

fn each(addr: usize, len: usize, mut call: impl FnMut(usize, usize) -> isize) -> Result<(), Errno> {
    let mut at = 0;
    while at < len {
        let want = (len - at).min(CHUNK);
        let n = call(addr.wrapping_add(at), want);
        if n < 0 {
            let e = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EFAULT);
            return Err(Errno::from_raw_os_error(e));
        }
        if n == 0 {
            return Err(Errno::FAULT);
        }
        at += n as usize;
    }
    Ok(())
}

/// Copies what is at `addr` of this process. EFAULT where it may not be read, or nothing is there.
pub fn read(addr: usize, buffer: &mut [u8]) -> Result<(), Errno> {
    let base = buffer.as_mut_ptr();
    each(addr, buffer.len(), |remote, len| {
        let at = remote.wrapping_sub(addr);
        // SAFETY: the local side is within `buffer`; the kernel checks the other.
        unsafe {
            let local = libc::iovec { iov_base: base.add(at).cast(), iov_len: len };
            let remote = libc::iovec { iov_base: remote as *mut _, iov_len: len };
            libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        }
    })
}

/// Copies to `addr` of this process, as a write of the program would: a shared page becomes its own. EFAULT where
/// it may not be written, or nothing is there.
pub fn write(addr: usize, bytes: &[u8]) -> Result<(), Errno> {
    let base = bytes.as_ptr();
    each(addr, bytes.len(), |remote, len| {
        let at = remote.wrapping_sub(addr);
        // SAFETY: the local side is within `bytes`, and only read; the kernel checks the other, which is the program's
        // to name: it asked for this.
        unsafe {
            let local = libc::iovec { iov_base: base.add(at).cast_mut().cast(), iov_len: len };
            let remote = libc::iovec { iov_base: remote as *mut _, iov_len: len };
            libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        }
    })
}

/// Faults `[start, end)` in, for reading or for writing.
///
/// # Errors
/// EFAULT where that is not possible: no mapping, no permission, beyond the end of a file.
pub fn populate(start: usize, end: usize, write: bool) -> Result<(), Errno> {
    use rustix::mm::Advice;
    let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
    loop {
        // SAFETY: populating changes no byte.
        match unsafe { rustix::mm::madvise(start as *mut _, end - start, advice) } {
            Ok(()) => return Ok(()),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::NOMEM | Errno::INVAL | Errno::HWPOISON) => return Err(Errno::FAULT),
            Err(e) => return Err(e),
        }
    }
}

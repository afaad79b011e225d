//! The system calls of the swap benchmark that no crate wraps.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Starts swapping to a block device that holds a swap signature. Fails as `swapon(2)` does.
pub fn swapon(device: &Path) -> io::Result<()> {
    let path = CString::new(device.as_os_str().as_bytes())?;
    // SAFETY: `path` is a string that ends in 0 and lives through the call.
    check(unsafe { libc::swapon(path.as_ptr(), 0) })
}

/// Brings everything back from a swap device. Fails as `swapoff(2)` does.
pub fn swapoff(device: &Path) -> io::Result<()> {
    let path = CString::new(device.as_os_str().as_bytes())?;
    // SAFETY: `path` is a string that ends in 0 and lives through the call.
    check(unsafe { libc::swapoff(path.as_ptr()) })
}

fn check(status: i32) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

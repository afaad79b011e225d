//! What programs learn of our paths and descriptors without using them: `stat`, `access` and their relatives.

use std::ffi::{CStr, c_char};

use farpage_preload::fail;
use libc::{c_int, c_uint};
use rustix::io::Errno;

use crate::files::{self, File};
use crate::uapi::Node;

/// One of the numbers that the kernel gives to drivers when they come; which, no program may rely on.
const MAJOR: c_uint = 240;
const MODE: libc::mode_t = 0o600;

/// # Safety
/// `path` is null or a C string.
unsafe fn node(path: *const c_char) -> Option<Node> {
    // SAFETY: the caller's contract.
    if path.is_null() { None } else { Node::from_path(unsafe { CStr::from_ptr(path) }) }
}

/// A device node of whoever asks; `gup_test` is an ordinary file of debugfs.
fn fill(st: &mut libc::stat, mirror: bool, minor: u8) {
    st.st_mode = MODE | if mirror { libc::S_IFCHR } else { libc::S_IFREG };
    st.st_rdev = if mirror { libc::makedev(MAJOR, minor.into()) } else { 0 };
    (st.st_size, st.st_blocks) = (0, 0);
}

/// # Safety
/// As `fstatat(2)`.
unsafe fn stat_at(dir: c_int, path: *const c_char, buf: *mut libc::stat, flags: c_int) -> c_int {
    // SAFETY: the caller's contract.
    let Some(node) = (unsafe { node(path) }) else {
        // SAFETY: the caller's contract; on 64-bit Linux the C library's structure is the kernel's.
        return unsafe { libc::syscall(libc::SYS_newfstatat, dir, path, buf, flags) as c_int };
    };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // SAFETY: all zeros are a stat; the caller's contract.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        (st.st_nlink, st.st_uid, st.st_gid, st.st_blksize) = (1, uid, gid, farpage::PAGE_SIZE as _);
        match node {
            Node::Mirror(minor) => fill(&mut st, true, minor),
            Node::GupTest => fill(&mut st, false, 0),
        }
        buf.write(st);
    }
    0
}

/// # Safety
/// As `stat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stat(path: *const c_char, buf: *mut libc::stat) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { stat_at(libc::AT_FDCWD, path, buf, 0) }
}

/// # Safety
/// As `stat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stat64(path: *const c_char, buf: *mut libc::stat) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { stat_at(libc::AT_FDCWD, path, buf, 0) }
}

/// # Safety
/// As `lstat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lstat(path: *const c_char, buf: *mut libc::stat) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { stat_at(libc::AT_FDCWD, path, buf, libc::AT_SYMLINK_NOFOLLOW) }
}

/// # Safety
/// As `lstat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lstat64(path: *const c_char, buf: *mut libc::stat) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { stat_at(libc::AT_FDCWD, path, buf, libc::AT_SYMLINK_NOFOLLOW) }
}

/// # Safety
/// As `fstatat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fstatat(
    dir: c_int,
    path: *const c_char,
    buf: *mut libc::stat,
    flags: c_int,
) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { stat_at(dir, path, buf, flags) }
}

/// # Safety
/// As `fstatat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fstatat64(
    dir: c_int,
    path: *const c_char,
    buf: *mut libc::stat,
    flags: c_int,
) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { stat_at(dir, path, buf, flags) }
}

/// # Safety
/// As `fstat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fstat(fd: c_int, buf: *mut libc::stat) -> c_int {
    // SAFETY: the caller's contract; on 64-bit Linux the C library's structure is the kernel's.
    let r = unsafe { libc::syscall(libc::SYS_fstat, fd, buf) } as c_int;
    // SAFETY: the call has filled it. (Of other files nothing is asked: this may be a signal handler.)
    if r == 0
        && unsafe { (*buf).st_size } as u64 == files::FILE_LEN
        && let Some(file) = files::find(fd)
    {
        let (mirror, minor) = match &file {
            File::Mirror(m) => (true, files::quiet(m).minor()),
            File::Foreign(minor) => (true, *minor),
            File::GupTest(_) => (false, 0),
        };
        // SAFETY: the call has filled it.
        fill(unsafe { &mut *buf }, mirror, minor);
    }
    r
}

/// # Safety
/// As `fstat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fstat64(fd: c_int, buf: *mut libc::stat) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { fstat(fd, buf) }
}

/// # Safety
/// As `access(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn access(path: *const c_char, mode: c_int) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { may(path, mode) }.unwrap_or_else(|| {
        // SAFETY: the caller's contract.
        unsafe { libc::syscall(libc::SYS_faccessat, libc::AT_FDCWD, path, mode) as c_int }
    })
}

/// # Safety
/// As `faccessat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn faccessat(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { may(path, mode) }.unwrap_or_else(|| {
        let call = if flags == 0 { libc::SYS_faccessat } else { libc::SYS_faccessat2 };
        // SAFETY: the caller's contract.
        unsafe { libc::syscall(call, dir, path, mode, flags) as c_int }
    })
}

/// # Safety
/// As `statx(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn statx(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    buf: *mut libc::statx,
) -> c_int {
    // SAFETY: the caller's contract.
    if unsafe { node(path) }.is_none() {
        // SAFETY: the caller's contract.
        return unsafe { libc::syscall(libc::SYS_statx, dir, path, flags, mask, buf) as c_int };
    }
    // SAFETY: all zeros are a stat, which the call fills; all zeros are a statx; the caller's contract.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        stat_at(dir, path, &raw mut st, 0);
        let mut out: libc::statx = std::mem::zeroed();
        out.stx_mask = libc::STATX_BASIC_STATS;
        (out.stx_mode, out.stx_nlink, out.stx_blksize) = (st.st_mode as u16, 1, farpage::PAGE_SIZE as u32);
        (out.stx_uid, out.stx_gid) = (st.st_uid, st.st_gid);
        (out.stx_rdev_major, out.stx_rdev_minor) = (libc::major(st.st_rdev), libc::minor(st.st_rdev));
        buf.write(out);
    }
    0
}

/// # Safety
/// `path` is null or a C string.
unsafe fn may(path: *const c_char, mode: c_int) -> Option<c_int> {
    // SAFETY: the caller's contract.
    unsafe { node(path) }?;
    Some(match mode {
        _ if mode & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 => fail::<i8>(Errno::INVAL).into(),
        _ if mode & libc::X_OK != 0 => fail::<i8>(Errno::ACCESS).into(),
        _ => 0,
    })
}

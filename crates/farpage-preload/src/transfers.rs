//! The read family: O_DIRECT reads that write to the buffer by plain references have it held for the call.
//!
//! Only in processes that the launcher has marked, because they have opened a file for O_DIRECT on a file system that does
//! not pin; in all others this is one look at a flag. The call itself is the C library's: it may be a cancellation point.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

use farpage::space::{Hold, Space};
use libc::{c_int, iovec, off_t, size_t, ssize_t};

use crate::{hooks, init};

/// Segments that are held one by one; with more, everything between the first and the last byte is.
const SEGMENTS: usize = 8;

/// The C library's function of this name, looked up once.
pub struct Real(&'static CStr, AtomicPtr<c_void>);

impl Real {
    pub const fn new(name: &'static CStr) -> Self {
        Self(name, AtomicPtr::new(std::ptr::null_mut()))
    }

    /// It.
    pub fn get(&self) -> *mut c_void {
        let known = self.1.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: a terminated name; what comes after us in the search order is the C library.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.0.as_ptr()) };
        if found.is_null() {
            farpage::sys::fatal(&format!("the C library has no {}", self.0.to_string_lossy()));
        }
        self.1.store(found, Ordering::Relaxed);
        found
    }
}

/// The manager, if a read from `fd` has to hold its buffer.
fn holder(fd: c_int) -> Option<&'static Space> {
    let space = init::ready().filter(|s| s.must_hold())?;
    // SAFETY: a number only; errno is put back.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        let flags = libc::fcntl(fd, libc::F_GETFL);
        *errno = before;
        (flags != -1 && flags & libc::O_DIRECT != 0).then_some(space)
    }
}

fn hold(fd: c_int, buffer: *const c_void, len: size_t) -> Option<Hold<'static>> {
    let start = buffer as usize;
    holder(fd).map(|space| space.hold(start, start.saturating_add(len)))
}

fn hold_all(fd: c_int, segments: *const iovec, n: c_int) -> [Option<Hold<'static>>; SEGMENTS] {
    let mut holds = [const { None }; SEGMENTS];
    let Some(space) = holder(fd).filter(|_| (1..=libc::UIO_MAXIOV).contains(&n) && !segments.is_null())
    else {
        return holds;
    };
    // SAFETY: the caller of readv vouches for so many segments.
    let segments = unsafe { std::slice::from_raw_parts(segments, n as usize) };
    let range = |s: &iovec| (s.iov_base as usize, (s.iov_base as usize).saturating_add(s.iov_len));
    if segments.len() <= SEGMENTS {
        for (hold, (start, end)) in holds.iter_mut().zip(segments.iter().map(range)) {
            *hold = Some(space.hold(start, end));
        }
    } else {
        let start = segments.iter().map(|s| range(s).0).min().unwrap_or(0);
        let end = segments.iter().map(|s| range(s).1).max().unwrap_or(0);
        holds[0] = Some(space.hold(start, end));
    }
    holds
}

/// Tells the hook what has been read.
macro_rules! tell {
    ($hooks:ident, hold($fd:ident, $buffer:ident, $len:ident), $n:ident, $at:expr) => {
        // SAFETY: so many bytes of the buffer have just been written.
        let bytes = unsafe { std::slice::from_raw_parts_mut($buffer.cast::<u8>(), $n as usize) };
        ($hooks.has_read)($fd, $at, bytes);
    };
    ($hooks:ident, hold_all($fd:ident, $buffer:ident, $len:ident), $n:ident, $at:expr) => {
        let mut left = $n as usize;
        let mut at: Option<off_t> = $at;
        if at.is_none() {
            // SAFETY: numbers only.
            at = Some(unsafe { libc::lseek($fd, 0, libc::SEEK_CUR) } - $n as off_t);
        }
        // SAFETY: the call succeeded with so many segments, and has just written so many bytes to them.
        unsafe {
            for segment in std::slice::from_raw_parts($buffer, $len as usize) {
                let len = segment.iov_len.min(left);
                let bytes = std::slice::from_raw_parts_mut(segment.iov_base.cast::<u8>(), len);
                ($hooks.has_read)($fd, at, bytes);
                left -= len;
                at = at.map(|at| at + len as off_t);
            }
        }
    };
}

/// Defines a function that holds its buffer and calls the C library's of the same name.
macro_rules! held {
    ($name:ident, $hold:ident($fd:ident, $buffer:ident, $len:ident), ($($arg:ident: $type:ty),*), $at:expr) => {
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> ssize_t {
            static REAL: Real = Real::new(
                match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => c"",
                }
            );
            let _held = $hold($fd, $buffer.cast(), $len);
            // SAFETY: the C library's function of this name has this type.
            let real = unsafe {
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> ssize_t>(REAL.get())
            };
            // SAFETY: the caller's contract.
            let n = unsafe { real($($arg),*) };
            if n > 0 && let Some(hooks) = hooks::get() {
                tell!(hooks, $hold($fd, $buffer, $len), n, $at);
            }
            n
        }
    };
}

held!(read, hold(fd, buf, len), (fd: c_int, buf: *mut c_void, len: size_t), None);
held!(pread, hold(fd, buf, len), (fd: c_int, buf: *mut c_void, len: size_t, at: off_t), Some(at));
held!(pread64, hold(fd, buf, len), (fd: c_int, buf: *mut c_void, len: size_t, at: off_t), Some(at));
held!(__read_chk, hold(fd, buf, len), (fd: c_int, buf: *mut c_void, len: size_t, room: size_t), None);
held!(__pread_chk, hold(fd, buf, len), (fd: c_int, buf: *mut c_void, len: size_t, at: off_t, room: size_t), Some(at));
held!(__pread64_chk, hold(fd, buf, len), (fd: c_int, buf: *mut c_void, len: size_t, at: off_t, room: size_t), Some(at));
held!(readv, hold_all(fd, iov, n), (fd: c_int, iov: *const iovec, n: c_int), None);
held!(preadv, hold_all(fd, iov, n), (fd: c_int, iov: *const iovec, n: c_int, at: off_t), Some(at));
held!(preadv64, hold_all(fd, iov, n), (fd: c_int, iov: *const iovec, n: c_int, at: off_t), Some(at));
held!(preadv2, hold_all(fd, iov, n), (fd: c_int, iov: *const iovec, n: c_int, at: off_t, flags: c_int), Some(at));
held!(preadv64v2, hold_all(fd, iov, n), (fd: c_int, iov: *const iovec, n: c_int, at: off_t, flags: c_int), Some(at));

/// Looks all of them up, by calls that do nothing, before a signal handler may be the first to make one.
pub fn look_up() {
    let (nothing, none) = (std::ptr::null_mut(), std::ptr::null());
    // SAFETY: there is no descriptor -1: nothing is read.
    unsafe {
        read(-1, nothing, 0);
        pread(-1, nothing, 0, 0);
        pread64(-1, nothing, 0, 0);
        __read_chk(-1, nothing, 0, 0);
        __pread_chk(-1, nothing, 0, 0, 0);
        __pread64_chk(-1, nothing, 0, 0, 0);
        readv(-1, none, 0);
        preadv(-1, none, 0, 0);
        preadv64(-1, none, 0, 0);
        preadv2(-1, none, 0, 0, 0);
        preadv64v2(-1, none, 0, 0, 0);
    }
}

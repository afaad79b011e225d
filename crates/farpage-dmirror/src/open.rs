//! The open family: paths of ours give descriptors of ours, all others go to the kernel.

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

use farpage_preload::fail;
use libc::{FILE, c_int, mode_t};
use rustix::io::Errno;

use crate::uapi::Node;
use crate::{files, pagemap};

/// The C library's functions, which are cancellation points; until they have been looked up, the plain system call.
struct Real(&'static CStr, AtomicPtr<c_void>);

impl Real {
    const fn new(name: &'static CStr) -> Self {
        Self(name, AtomicPtr::new(std::ptr::null_mut()))
    }

    fn look_up(&self) {
        // SAFETY: a terminated name.
        self.1.store(unsafe { libc::dlsym(libc::RTLD_NEXT, self.0.as_ptr()) }, Ordering::Release);
    }

    fn get(&self) -> Option<*mut c_void> {
        Some(self.1.load(Ordering::Acquire)).filter(|p| !p.is_null())
    }
}

static OPENAT: Real = Real::new(c"openat");
static FOPEN: Real = Real::new(c"fopen");

/// In the constructor: later nobody waits for the dynamic linker.
pub fn look_up() {
    OPENAT.look_up();
    FOPEN.look_up();
}

fn open_node(node: Node, flags: c_int) -> c_int {
    match files::open(node, flags) {
        Ok(fd) => fd,
        Err(e) => fail::<i8>(e).into(),
    }
}

/// The path, if it is one that concerns us: absolute (or relative to a directory that does not matter).
///
/// # Safety
/// `path` is null or a C string.
unsafe fn node(path: *const c_char) -> Option<Node> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's contract.
    let path = unsafe { CStr::from_ptr(path) };
    pagemap::opens(path.to_bytes());
    Node::from_path(path)
}

/// # Safety
/// As `openat(2)`.
unsafe fn open_at(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's contract.
    if let Some(node) = unsafe { node(path) } {
        return open_node(node, flags);
    }
    // SAFETY: the C library's function has this type.
    let real = OPENAT.get().map(|p| unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int, *const c_char, c_int, ...) -> c_int>(p)
    });
    // SAFETY: the caller's contract.
    unsafe {
        match real {
            Some(real) => real(dir, path, flags, mode),
            None => libc::syscall(libc::SYS_openat, dir, path, flags, mode) as c_int,
        }
    }
}

// The C functions take the mode as a variable argument, which on this architecture arrives where a named third or fourth
// argument would; without O_CREAT it is not looked at.

/// # Safety
/// As `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { open_at(libc::AT_FDCWD, path, flags, mode) }
}

/// # Safety
/// As `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { open_at(libc::AT_FDCWD, path, flags | libc::O_LARGEFILE, mode) }
}

/// # Safety
/// As `openat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { open_at(dir, path, flags, mode) }
}

/// # Safety
/// As `openat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { open_at(dir, path, flags | libc::O_LARGEFILE, mode) }
}

/// What `open` without a mode becomes under `_FORTIFY_SOURCE`.
///
/// # Safety
/// As `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { open_at(libc::AT_FDCWD, path, flags, 0) }
}

/// # Safety
/// As `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { open_at(libc::AT_FDCWD, path, flags | libc::O_LARGEFILE, 0) }
}

/// # Safety
/// As `openat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { open_at(dir, path, flags, 0) }
}

/// # Safety
/// As `openat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { open_at(dir, path, flags | libc::O_LARGEFILE, 0) }
}

/// # Safety
/// As `fopen(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE {
    // SAFETY: the caller's contract.
    unsafe {
        if let Some(node) = node(path) {
            let text = CStr::from_ptr(mode).to_bytes();
            let flags = match text.first() {
                _ if text.contains(&b'+') => libc::O_RDWR,
                Some(b'r') => libc::O_RDONLY,
                _ => libc::O_WRONLY,
            };
            let cloexec = if text.contains(&b'e') { libc::O_CLOEXEC } else { 0 };
            let fd = open_node(node, flags | cloexec);
            return if fd < 0 { std::ptr::null_mut() } else { libc::fdopen(fd, mode) };
        }
        match FOPEN.get() {
            Some(p) => std::mem::transmute::<
                *mut c_void,
                unsafe extern "C" fn(*const c_char, *const c_char) -> *mut FILE,
            >(p)(path, mode),
            None => {
                FOPEN.look_up();
                if FOPEN.get().is_none() {
                    fail::<i8>(Errno::NOSYS);
                    return std::ptr::null_mut();
                }
                fopen(path, mode)
            }
        }
    }
}

/// # Safety
/// As `fopen(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE {
    // SAFETY: the caller's contract.
    unsafe { fopen(path, mode) }
}

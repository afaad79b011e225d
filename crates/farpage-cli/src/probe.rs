//! What the kernel offers, found out by doing it: `farpage run` asks before it starts, `farpage doctor` shows it.
//!
//! The raw system calls are here because rustix has no userfaultfd operations; every function is safe to call.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{NonNull, null_mut};

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, Opcode, Updater, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

const PAGE: usize = farpage::PAGE_SIZE;
/// The oldest kernel with `UFFDIO_MOVE`.
pub const MIN_KERNEL: (u32, u32) = (6, 8);
const DEVICE: &str = "/dev/userfaultfd";

/// The parts of userfaultfd that farpage needs, with the names that the kernel's headers give them.
pub const NEEDED: &[(&str, u64)] = &[
    ("EVENT_REMAP", 1 << 2),
    ("EVENT_REMOVE", 1 << 3),
    ("EVENT_UNMAP", 1 << 6),
    ("THREAD_ID", 1 << 8),
    ("POISON", POISON_BIT),
    ("MOVE", MOVE_BIT),
];
/// Wanted, but only a process with CAP_SYS_PTRACE may have it.
const EVENT_FORK: u64 = 1 << 1;
const POISON_BIT: u64 = 1 << 14;
const MOVE_BIT: u64 = 1 << 16;
const UFFD_API: u64 = 0xAA;
const REGISTER_MODE_MISSING: u64 = 1;

/// Why `farpage run` does not work here; each sentence says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Too old.
    #[error("the kernel is {found}, but farpage needs Linux {}.{} or newer: boot a newer kernel", MIN_KERNEL.0, MIN_KERNEL.1)]
    Kernel {
        /// `uname -r`.
        found: String,
    },
    /// Compiled out, or a sandbox hides it.
    #[error(
        "the kernel has no userfaultfd: use a kernel with CONFIG_USERFAULTFD, or a sandbox that permits the system call"
    )]
    Missing,
    /// Only page faults of user code, at best: a system call into a page that is away would fail.
    #[error(
        "this user may not use userfaultfd fully, so system calls of the program would fail on pages that are away: \
         run with CAP_SYS_PTRACE (`sudo setpriv --reuid USER --inh-caps +sys_ptrace --ambient-caps +sys_ptrace`, \
         in a container --cap-add SYS_PTRACE), or let an administrator permit it: `chmod a+rw /dev/userfaultfd` \
         (for good: the udev rule KERNEL==\"userfaultfd\", MODE=\"0666\") or `sysctl vm.unprivileged_userfaultfd=1`"
    )]
    Permission,
    /// A feature bit that is not there.
    #[error(
        "userfaultfd of this kernel lacks {0}: use a kernel of version 6.8 or newer, with no feature disabled"
    )]
    Feature(String),
    /// The feature bit is there, the operation fails.
    #[error(
        "userfaultfd's {operation} does not work here ({errno}): use a kernel of version 6.8 or newer for this processor"
    )]
    Operation {
        /// Which.
        operation: &'static str,
        /// How it failed.
        errno: Errno,
    },
    /// Something else failed.
    #[error("{0} failed unexpectedly ({1}): see 'farpage doctor'")]
    Other(&'static str, Errno),
}

/// How a userfaultfd can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The system call gives a full one.
    Syscall,
    /// `/dev/userfaultfd` gives a full one.
    Device,
}

/// Whether everything that `farpage run` needs works.
pub fn check() -> Result<Access, Unsupported> {
    kernel()?;
    let (access, _) = open()?;
    features(access)?;
    for operation in [try_move, try_poison] {
        operation(access)?;
    }
    Ok(access)
}

/// The running kernel, if it is new enough.
pub fn kernel() -> Result<String, Unsupported> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if parse_version(&release).is_some_and(|version| version >= MIN_KERNEL) {
        Ok(release)
    } else {
        Err(Unsupported::Kernel { found: release })
    }
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A new full userfaultfd, not only for faults of user code.
pub fn open() -> Result<(Access, OwnedFd), Unsupported> {
    // SAFETY: userfaultfd takes flags only; the descriptor is ours.
    let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if raw >= 0 {
        // SAFETY: a fresh descriptor that nobody else owns.
        return Ok((Access::Syscall, unsafe { OwnedFd::from_raw_fd(raw as i32) }));
    }
    let error = io::Error::last_os_error();
    if let Ok(device) = File::options().read(true).write(true).open(DEVICE) {
        return new_from(&device).map(|fd| (Access::Device, fd)).map_err(|e| Unsupported::Other(DEVICE, e));
    }
    match error.raw_os_error() {
        Some(libc::EPERM) => Err(Unsupported::Permission),
        Some(libc::ENOSYS) => Err(Unsupported::Missing),
        other => {
            Err(Unsupported::Other("userfaultfd()", Errno::from_raw_os_error(other.unwrap_or(libc::EIO))))
        }
    }
}

/// `USERFAULTFD_IOC_NEW`.
fn new_from(device: &File) -> rustix::io::Result<OwnedFd> {
    struct New;
    // SAFETY: the request takes flags by value and gives a descriptor as its result.
    unsafe impl Ioctl for New {
        type Output = OwnedFd;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> Opcode {
            opcode::none(0xAA, 0)
        }
        fn as_ptr(&mut self) -> *mut libc::c_void {
            (libc::O_CLOEXEC | libc::O_NONBLOCK) as usize as *mut libc::c_void
        }
        unsafe fn output_from_ptr(out: i32, _: *mut libc::c_void) -> rustix::io::Result<OwnedFd> {
            // SAFETY: the kernel's fresh descriptor, which nobody else owns.
            Ok(unsafe { OwnedFd::from_raw_fd(out) })
        }
    }
    // SAFETY: the request belongs to this device.
    unsafe { rustix::ioctl::ioctl(device, New) }
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Move {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

#[repr(C)]
struct Poison {
    range: Range,
    mode: u64,
    updated: i64,
}

const API: Opcode = opcode::read_write::<Api>(0xAA, 0x3F);
const REGISTER: Opcode = opcode::read_write::<Register>(0xAA, 0x00);
const MOVE: Opcode = opcode::read_write::<Move>(0xAA, 0x05);
const POISON: Opcode = opcode::read_write::<Poison>(0xAA, 0x08);

/// Switches the features on; gives those that the kernel knows.
fn handshake(fd: BorrowedFd<'_>, features: u64) -> rustix::io::Result<u64> {
    let mut api = Api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes this structure.
    unsafe { rustix::ioctl::ioctl(fd, Updater::<API, Api>::new(&mut api))? };
    Ok(api.features)
}

/// Whether all that is needed can be switched on at once.
pub fn features(access: Access) -> Result<(), Unsupported> {
    let other = |e| Unsupported::Other("UFFDIO_API", e);
    let known = handshake(again(access)?.as_fd(), 0).map_err(other)?;
    let lacking: Vec<&str> =
        NEEDED.iter().filter(|(_, bit)| known & bit == 0).map(|(name, _)| *name).collect();
    if !lacking.is_empty() {
        return Err(Unsupported::Feature(lacking.join(", ")));
    }
    handshake(again(access)?.as_fd(), all_needed()).map(drop).map_err(other)
}

/// Whether the kernel reports forks: only to a process with CAP_SYS_PTRACE. Without it the library sees the forks
/// that go through the C library, but not a raw system call.
pub fn fork_events(access: Access) -> bool {
    again(access).is_ok_and(|fd| handshake(fd.as_fd(), all_needed() | EVENT_FORK).is_ok())
}

fn all_needed() -> u64 {
    NEEDED.iter().fold(0, |all, (_, bit)| all | bit)
}

/// Another userfaultfd, got as the first one was.
fn again(access: Access) -> Result<OwnedFd, Unsupported> {
    let (got, fd) = open()?;
    debug_assert_eq!(got, access);
    Ok(fd)
}

/// Private anonymous memory, unmapped when dropped.
struct Memory {
    base: NonNull<u8>,
    len: usize,
}

impl Memory {
    fn new(pages: usize) -> rustix::io::Result<Self> {
        let len = pages * PAGE;
        // SAFETY: the kernel chooses the address, so no existing mapping is touched.
        let base = unsafe {
            mmap_anonymous(null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        Ok(Self { base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?, len })
    }

    fn addr(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// A registered range of this length, without any page.
    fn registered(fd: BorrowedFd<'_>, pages: usize) -> rustix::io::Result<Self> {
        let memory = Self::new(pages)?;
        let range = Range { start: memory.addr(), len: memory.len as u64 };
        let mut register = Register { range, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes this structure; the range is ours alone and nobody
        // touches its absent pages.
        unsafe { rustix::ioctl::ioctl(fd, Updater::<REGISTER, Register>::new(&mut register))? };
        Ok(memory)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference remains.
        let _unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A userfaultfd with the features that the two operations need; events would have to be read.
fn ready(access: Access) -> Result<OwnedFd, Unsupported> {
    let fd = again(access)?;
    handshake(fd.as_fd(), MOVE_BIT | POISON_BIT).map_err(|e| Unsupported::Other("UFFDIO_API", e))?;
    Ok(fd)
}

/// Moves a page and looks whether its bytes arrived.
pub fn try_move(access: Access) -> Result<(), Unsupported> {
    let failed = |errno| Unsupported::Operation { operation: "MOVE", errno };
    let fd = ready(access)?;
    let target = Memory::registered(fd.as_fd(), 1).map_err(failed)?;
    let source = Memory::new(1).map_err(failed)?;
    // SAFETY: our own page, which nobody else knows.
    unsafe { std::ptr::write_bytes(source.base.as_ptr(), 0xA5, PAGE) };
    let mut arg = Move { dst: target.addr(), src: source.addr(), len: PAGE as u64, mode: 0, moved: 0 };
    // SAFETY: UFFDIO_MOVE reads and writes this structure; both ranges are ours alone.
    unsafe { rustix::ioctl::ioctl(&fd, Updater::<MOVE, Move>::new(&mut arg)) }.map_err(failed)?;
    if arg.moved != PAGE as i64 {
        return Err(failed(Errno::IO));
    }
    // SAFETY: the page is there now, so reading it does not fault into the userfaultfd.
    let bytes = unsafe { std::slice::from_raw_parts(target.base.as_ptr(), PAGE) };
    if bytes.iter().all(|&b| b == 0xA5) { Ok(()) } else { Err(failed(Errno::IO)) }
}

/// Poisons a page and looks whether the kernel refuses to read it.
pub fn try_poison(access: Access) -> Result<(), Unsupported> {
    let failed = |errno| Unsupported::Operation { operation: "POISON", errno };
    let fd = ready(access)?;
    let target = Memory::registered(fd.as_fd(), 1).map_err(failed)?;
    let range = Range { start: target.addr(), len: PAGE as u64 };
    let mut arg = Poison { range, mode: 0, updated: 0 };
    // SAFETY: UFFDIO_POISON reads and writes this structure; the range is ours alone.
    unsafe { rustix::ioctl::ioctl(&fd, Updater::<POISON, Poison>::new(&mut arg)) }.map_err(failed)?;
    if arg.updated != PAGE as i64 {
        return Err(failed(Errno::IO));
    }
    let (_reader, writer) = rustix::pipe::pipe().map_err(failed)?;
    // SAFETY: the kernel reads the byte, not we; a poisoned page makes it fail with EFAULT.
    let wrote = unsafe { libc::write(writer.as_raw_fd(), target.base.as_ptr().cast(), 1) };
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EFAULT) if wrote < 0 => Ok(()),
        _ => Err(failed(Errno::IO)),
    }
}

/// Whether a seccomp filter with a user-space listener can be installed. Tried in a child, because a filter
/// cannot be taken off again.
pub fn seccomp_listener() -> io::Result<()> {
    const NEW_LISTENER: libc::c_ulong = 1 << 3;
    let allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 };
    let program = libc::sock_fprog { len: 1, filter: std::ptr::from_ref(&allow).cast_mut() };
    crate::sys::in_child(|| {
        if rustix::thread::set_no_new_privs(true).is_err() {
            return libc::EPERM;
        }
        let mode = libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER);
        // SAFETY: the filter is a valid program of one instruction that outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_seccomp, mode, NEW_LISTENER, &raw const program) };
        if fd >= 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) }
    })
}

/// Whether an io_uring can be set up.
pub fn io_uring() -> io::Result<()> {
    // `struct io_uring_params` has 120 bytes, all 0 for a plain ring.
    let mut params = [0u64; 15];
    // SAFETY: the kernel reads and writes the 120 bytes given.
    let raw = unsafe { libc::syscall(libc::SYS_io_uring_setup, 2, params.as_mut_ptr()) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns; it closes here.
    drop(unsafe { OwnedFd::from_raw_fd(raw as i32) });
    Ok(())
}

/// Whether the file can be mapped executable, as the loader does with a library.
pub fn map_executable(file: impl AsFd) -> rustix::io::Result<()> {
    // SAFETY: the kernel chooses the address; nothing is executed.
    unsafe {
        let flags = ProtFlags::READ | ProtFlags::EXEC;
        let base = rustix::mm::mmap(null_mut(), PAGE, flags, MapFlags::PRIVATE, file, 0)?;
        munmap(base, PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(parse_version("6.18.44-x"), Some((6, 18)));
        assert_eq!(parse_version("6.8"), Some((6, 8)));
        assert_eq!(parse_version("10.0-rc1"), Some((10, 0)));
        assert_eq!(parse_version("six"), None);
        assert!((6, 18) >= MIN_KERNEL && (6, 7) < MIN_KERNEL && (7, 0) >= MIN_KERNEL);
    }

    #[test]
    fn the_request_numbers_are_the_kernels() {
        assert_eq!((API, REGISTER), (0xc018_aa3f, 0xc020_aa00));
        assert_eq!((MOVE, POISON), (0xc028_aa05, 0xc020_aa08));
        assert_eq!(size_of::<Move>(), 40);
    }

    #[test]
    fn the_operations_work_or_say_why_not() {
        match check() {
            Ok(_) => {}
            Err(e @ (Unsupported::Permission | Unsupported::Missing)) => {
                crate::skipped!("{e}");
            }
            Err(e) => panic!("{e}"),
        }
    }
}

//! What the kernel offers, found out by doing it: `farpage run` asks before it starts, `farpage doctor` shows it.
//!
//! Userfaultfd by the code that the library uses. The other raw system calls are here because rustix does not have them; every
//! function is safe to call.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{NonNull, null_mut};

pub use farpage::sys::uffd::Access;
use farpage::sys::uffd::{DEVICE, Uffd, features as bits};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

const PAGE: usize = farpage::PAGE_SIZE;
/// The oldest kernel with `UFFDIO_MOVE`.
pub const MIN_KERNEL: (u32, u32) = (6, 8);

/// The parts of userfaultfd that farpage needs, with the names that the kernel's headers give them.
pub const NEEDED: &[(&str, u64)] = &[
    ("EVENT_REMAP", bits::EVENT_REMAP),
    ("EVENT_REMOVE", bits::EVENT_REMOVE),
    ("EVENT_UNMAP", bits::EVENT_UNMAP),
    ("THREAD_ID", bits::THREAD_ID),
    ("POISON", bits::POISON),
    ("MOVE", bits::MOVE),
];

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

/// Whether everything that `farpage run` needs works.
pub fn check() -> Result<Access, Unsupported> {
    kernel()?;
    let access = open()?;
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

/// How a full userfaultfd can be had, not only one for faults of user code.
pub fn open() -> Result<Access, Unsupported> {
    let Err(error) = Uffd::open_by(Access::Syscall, 0) else { return Ok(Access::Syscall) };
    match Uffd::open_by(Access::Device, 0) {
        Ok(_) => return Ok(Access::Device),
        // It is not there, or not for us.
        Err(Errno::NOENT | Errno::NXIO | Errno::NODEV | Errno::ACCESS | Errno::PERM) => {}
        Err(e) => return Err(Unsupported::Other(DEVICE, e)),
    }
    match error {
        Errno::PERM => Err(Unsupported::Permission),
        Errno::NOSYS => Err(Unsupported::Missing),
        other => Err(Unsupported::Other("userfaultfd()", other)),
    }
}

/// Whether all that is needed can be switched on at once.
pub fn features(access: Access) -> Result<(), Unsupported> {
    let other = |e| Unsupported::Other("UFFDIO_API", e);
    let (_, known) = Uffd::open_by(access, 0).map_err(other)?;
    let lacking: Vec<&str> =
        NEEDED.iter().filter(|(_, bit)| known & bit == 0).map(|(name, _)| *name).collect();
    if !lacking.is_empty() {
        return Err(Unsupported::Feature(lacking.join(", ")));
    }
    Uffd::open_by(access, all_needed()).map(drop).map_err(other)
}

/// Whether the kernel reports forks: only to a process with CAP_SYS_PTRACE. Without it the library sees the forks
/// that go through the C library, but not a raw system call.
pub fn fork_events(access: Access) -> bool {
    Uffd::open_by(access, all_needed() | bits::EVENT_FORK).is_ok()
}

fn all_needed() -> u64 {
    NEEDED.iter().fold(0, |all, (_, bit)| all | bit)
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

    fn addr(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// A registered range of this length, without any page.
    fn registered(uffd: &Uffd, pages: usize) -> rustix::io::Result<Self> {
        let memory = Self::new(pages)?;
        uffd.register(memory.addr(), memory.len)?;
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
fn ready(access: Access) -> Result<Uffd, Unsupported> {
    let opened = Uffd::open_by(access, bits::MOVE | bits::POISON);
    opened.map(|(uffd, _)| uffd).map_err(|e| Unsupported::Other("UFFDIO_API", e))
}

/// Moves a page and looks whether its bytes arrived.
pub fn try_move(access: Access) -> Result<(), Unsupported> {
    let failed = |errno| Unsupported::Operation { operation: "MOVE", errno };
    let uffd = ready(access)?;
    let target = Memory::registered(&uffd, 1).map_err(failed)?;
    let source = Memory::new(1).map_err(failed)?;
    // SAFETY: our own page, which nobody else knows.
    unsafe { std::ptr::write_bytes(source.base.as_ptr(), 0xA5, PAGE) };
    match uffd.move_pages(target.addr(), source.addr(), PAGE, false) {
        (PAGE, None) => {}
        (_, stop) => return Err(failed(stop.map_or(Errno::IO, |stop| stop.errno()))),
    }
    // SAFETY: the page is there now, so reading it does not fault into the userfaultfd.
    let bytes = unsafe { std::slice::from_raw_parts(target.base.as_ptr(), PAGE) };
    if bytes.iter().all(|&b| b == 0xA5) { Ok(()) } else { Err(failed(Errno::IO)) }
}

/// Poisons a page and looks whether the kernel refuses to read it.
pub fn try_poison(access: Access) -> Result<(), Unsupported> {
    let failed = |errno| Unsupported::Operation { operation: "POISON", errno };
    let uffd = ready(access)?;
    let target = Memory::registered(&uffd, 1).map_err(failed)?;
    uffd.poison(target.addr(), PAGE).map_err(|stop| failed(stop.errno()))?;
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

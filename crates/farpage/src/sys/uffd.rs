//! userfaultfd: the kernel interface (`linux/userfaultfd.h`), with the results that its callers must tell apart.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Features of the interface that farpage asks for.
pub mod features {
    /// A fork is announced with a descriptor for the child. Needs CAP_SYS_PTRACE.
    pub const EVENT_FORK: u64 = 1 << 1;
    /// `mremap` is announced and keeps the registration.
    pub const EVENT_REMAP: u64 = 1 << 2;
    /// `madvise(DONTNEED, FREE, REMOVE)` is announced before it happens.
    pub const EVENT_REMOVE: u64 = 1 << 3;
    /// `munmap` is announced.
    pub const EVENT_UNMAP: u64 = 1 << 6;
    /// No messages: a fault raises SIGBUS.
    pub const SIGBUS: u64 = 1 << 7;
    /// A fault names its thread.
    pub const THREAD_ID: u64 = 1 << 8;
    /// `UFFDIO_POISON`.
    pub const POISON: u64 = 1 << 14;
    /// `UFFDIO_MOVE`.
    pub const MOVE: u64 = 1 << 16;
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct UffdRange {
    start: u64,
    len: u64,
}
#[repr(C)]
struct Register {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}
/// COPY and MOVE have the same shape.
#[repr(C)]
struct Transfer {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    done: i64,
}
#[repr(C)]
struct Poison {
    range: UffdRange,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct WriteProtect {
    range: UffdRange,
    mode: u64,
}

const fn iowr(nr: u64, size: usize) -> u64 {
    (3 << 30) | ((size as u64) << 16) | (0xAA << 8) | nr
}
const UFFDIO_API: u64 = iowr(0x3F, size_of::<Api>());
const UFFDIO_REGISTER: u64 = iowr(0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: u64 = (2 << 30) | ((size_of::<UffdRange>() as u64) << 16) | (0xAA << 8) | 0x01;
const UFFDIO_WAKE: u64 = (2 << 30) | ((size_of::<UffdRange>() as u64) << 16) | (0xAA << 8) | 0x02;
const UFFDIO_COPY: u64 = iowr(0x03, size_of::<Transfer>());
const UFFDIO_WRITEPROTECT: u64 = iowr(0x06, size_of::<WriteProtect>());
const UFFDIO_MOVE: u64 = iowr(0x05, size_of::<Transfer>());
const UFFDIO_POISON: u64 = iowr(0x08, size_of::<Poison>());
/// On `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: u64 = 0xAA00;

/// `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: libc::c_int = 1;

/// Of COPY and MOVE: wake nobody. We always wake with [`wake`], after our locks are released: a handler of
/// low priority is preempted by the thread it wakes.
const DONTWAKE: u64 = 1 << 0;
const MOVE_ALLOW_SRC_HOLES: u64 = 1 << 1;

/// Why a page operation stopped, after `done` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// An event is pending: the messages have to be read before this can go on (EAGAIN).
    Again,
    /// The target is already there (EEXIST).
    Exists,
    /// Source or target is not (or no longer) mapped or present (ENOENT).
    Gone,
    /// A source page is pinned or shared (EBUSY).
    Busy,
    /// The mappings do not allow it: protection, mlock state, more than one mapping (EINVAL).
    Invalid,
    /// No memory (ENOMEM).
    NoMemory,
    /// Anything else.
    Other(i32),
}

impl Stop {
    /// The errno, or the first of those that mean the same.
    pub fn errno(self) -> rustix::io::Errno {
        rustix::io::Errno::from_raw_os_error(match self {
            Stop::Again => libc::EAGAIN,
            Stop::Exists => libc::EEXIST,
            Stop::Gone => libc::ENOENT,
            Stop::Busy => libc::EBUSY,
            Stop::Invalid => libc::EINVAL,
            Stop::NoMemory => libc::ENOMEM,
            Stop::Other(e) => e,
        })
    }

    fn from_errno(e: i32) -> Self {
        match e {
            libc::EAGAIN => Stop::Again,
            libc::EEXIST => Stop::Exists,
            libc::ENOENT | libc::ESRCH | libc::EFAULT => Stop::Gone,
            libc::EBUSY => Stop::Busy,
            libc::EINVAL => Stop::Invalid,
            libc::ENOMEM | libc::ENOSPC => Stop::NoMemory,
            e => Stop::Other(e),
        }
    }
}

/// What a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Msg {
    /// A thread waits for the page at `addr` (rounded down to the page).
    Fault {
        /// The page's address.
        addr: usize,
        /// The thread (0 without THREAD_ID).
        tid: u32,
    },
    /// The process forked; the child's userfaultfd.
    Fork(RawFd),
    /// `[from, from+len)` is now at `to`.
    Remap {
        /// Old address.
        from: usize,
        /// New address.
        to: usize,
        /// Bytes.
        len: usize,
    },
    /// The pages of `[start, end)` are about to be dropped.
    Remove {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
    /// `[start, end)` has been unmapped.
    Unmap {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
    /// Something newer than this code.
    Unknown(u8),
}

/// How a userfaultfd can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// By the system call.
    Syscall,
    /// From [`DEVICE`].
    Device,
}

/// Gives userfaultfds to whoever may open it.
pub const DEVICE: &str = "/dev/userfaultfd";

/// A userfaultfd of this process.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl From<OwnedFd> for Uffd {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.fd
    }
}

/// Bytes of a message.
const MSG_SIZE: usize = 32;
/// Messages read at once.
pub const MSG_BATCH: usize = 16;

impl Uffd {
    /// Opens one with exactly these features. Tries the system call, then `/dev/userfaultfd`; never asks for a
    /// user-mode-only one, in which a system call that meets an absent page would fail.
    ///
    /// # Errors
    /// The errno of the last attempt: EPERM/EACCES (no permission), ENOSYS (not built in), EINVAL (a
    /// feature is missing).
    pub fn open(features: u64) -> rustix::io::Result<Self> {
        Self::with_api(Self::any_mode()?, features).map(|(uffd, _)| uffd)
    }

    /// As [`Self::open`], in this way and no other. Also tells which features the kernel knows.
    ///
    /// # Errors
    /// As [`Self::open`]; and those of opening the device.
    pub fn open_by(access: Access, features: u64) -> rustix::io::Result<(Self, u64)> {
        let fd = match access {
            Access::Syscall => Self::from_syscall(0),
            Access::Device => Self::from_device(),
        };
        Self::with_api(fd?, features)
    }

    /// As [`Self::open`], for faults of user mode only where no more is permitted: any process may have that. For those who
    /// resolve faults by SIGBUS, where a system call that meets an absent page fails anyway.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for_sigbus(features: u64) -> rustix::io::Result<Self> {
        let fd = match Self::any_mode() {
            Ok(fd) => fd,
            Err(_) => Self::from_syscall(USER_MODE_ONLY)?,
        };
        Self::with_api(fd, features | self::features::SIGBUS).map(|(uffd, _)| uffd)
    }

    fn any_mode() -> rustix::io::Result<OwnedFd> {
        Self::from_syscall(0).or_else(|e| Self::from_device().map_err(|_| e))
    }

    fn with_api(fd: OwnedFd, features: u64) -> rustix::io::Result<(Self, u64)> {
        let mut api = Api { api: 0xAA, features, ioctls: 0 };
        // SAFETY: the structure is the one this ioctl takes and lives across the call.
        unsafe { ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api)? };
        Ok((Self { fd: super::move_high(fd) }, api.features))
    }

    fn from_syscall(flags: libc::c_int) -> rustix::io::Result<OwnedFd> {
        // SAFETY: userfaultfd takes flags only and returns a new descriptor that nobody else owns.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, flags | libc::O_CLOEXEC | libc::O_NONBLOCK);
            if fd < 0 { Err(super::last_error()) } else { Ok(OwnedFd::from_raw_fd(fd as RawFd)) }
        }
    }

    fn from_device() -> rustix::io::Result<OwnedFd> {
        use rustix::fs::{Mode, OFlags};
        let dev = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // SAFETY: this ioctl takes flags by value and returns a new descriptor that nobody else owns.
        unsafe {
            let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as usize;
            let fd = super::ioctl::ioctl(dev.as_raw_fd(), USERFAULTFD_IOC_NEW, flags)?;
            Ok(OwnedFd::from_raw_fd(fd as RawFd))
        }
    }

    /// Takes over a descriptor that a message brought ([`Msg::Fork`]).
    pub fn from_raw(fd: RawFd) -> Self {
        // SAFETY: the message made its reader the owner of the descriptor, and he passes it on here.
        Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } }
    }

    /// The descriptor's number.
    pub fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Registers a range for missing pages.
    pub fn register(&self, start: usize, len: usize) -> rustix::io::Result<()> {
        let mut arg = Register { range: range(start, len), mode: 1, ioctls: 0 };
        // SAFETY: as in `open`; registering changes no byte of memory.
        unsafe { ioctl(self.raw(), UFFDIO_REGISTER, &mut arg) }
    }

    /// Takes a range out again and wakes who waits in it.
    pub fn unregister(&self, start: usize, len: usize) -> rustix::io::Result<()> {
        // SAFETY: as in `register`.
        unsafe { ioctl(self.raw(), UFFDIO_UNREGISTER, &mut range(start, len)) }
    }

    /// Copies bytes into absent pages of the registered range. Wakes nobody: see [`wake`].
    /// Returns the bytes done and, if fewer than asked, why.
    pub fn copy(&self, dst: usize, src: usize, len: usize) -> (usize, Option<Stop>) {
        self.transfer(UFFDIO_COPY, dst, src, len, DONTWAKE)
    }

    /// Moves pages; absent source pages are skipped if `holes`. As [`Uffd::copy`].
    pub fn move_pages(&self, dst: usize, src: usize, len: usize, holes: bool) -> (usize, Option<Stop>) {
        self.transfer(
            UFFDIO_MOVE,
            dst,
            src,
            len,
            if holes { DONTWAKE | MOVE_ALLOW_SRC_HOLES } else { DONTWAKE },
        )
    }

    fn transfer(&self, op: u64, dst: usize, src: usize, len: usize, mode: u64) -> (usize, Option<Stop>) {
        super::point::point();
        let mut at = 0;
        while at < len {
            let (d, s) = ((dst + at) as u64, (src + at) as u64);
            let mut arg = Transfer { dst: d, src: s, len: (len - at) as u64, mode, done: 0 };
            // SAFETY: the kernel checks both ranges; the caller owns them (space/ and reclaim/ hold the granule's lock).
            let r = unsafe { ioctl(self.raw(), op, &mut arg) };
            match r {
                Ok(()) => return (len, None),
                // Part of it is done: EAGAIN then says nothing of why the rest is not. Ask again for the rest.
                Err(_) if arg.done > 0 => at += arg.done as usize,
                Err(e) => {
                    let errno = if arg.done < 0 { -arg.done as i32 } else { e.raw_os_error() };
                    return (at, Some(Stop::from_errno(errno)));
                }
            }
        }
        (len, None)
    }

    /// From now on who writes to `[start, start + len)`, memory of a shared file, waits for a wake-up; until it is unregistered or
    /// replaced.
    pub fn stop_writes(&self, start: usize, len: usize) -> rustix::io::Result<()> {
        let mut arg = Register { range: range(start, len), mode: 2, ioctls: 0 };
        let mut protect = WriteProtect { range: range(start, len), mode: 1 };
        // SAFETY: as in `register`; nor does write protection change a byte.
        unsafe {
            ioctl(self.raw(), UFFDIO_REGISTER, &mut arg)?;
            ioctl(self.raw(), UFFDIO_WRITEPROTECT, &mut protect)
        }
    }

    /// Makes absent pages raise SIGBUS in whoever touches them, for ever, and wakes who waits.
    pub fn poison(&self, start: usize, len: usize) -> Result<(), Stop> {
        let mut arg = Poison { range: range(start, len), mode: 0, done: 0 };
        // SAFETY: as in `transfer`.
        unsafe { ioctl(self.raw(), UFFDIO_POISON, &mut arg) }.map_err(|e| Stop::from_errno(e.raw_os_error()))
    }
}

/// Wakes the threads that wait for a page in the range; they look again. By number, for use when the locks that the
/// descriptor lies behind have been released: it must be open in this thread's table, as handlers see to.
pub fn wake(fd: RawFd, start: usize, len: usize) {
    // SAFETY: as in `register`. A range that has just been unmapped has nobody waiting in it: no error to handle.
    let _gone = unsafe { ioctl(fd, UFFDIO_WAKE, &mut range(start, len)) };
}

/// Waits until there is a message, or `stop` (a descriptor; negative: none) can be read, at most `timeout` (for ever without one).
pub fn wait(fd: RawFd, stop: RawFd, timeout: Option<std::time::Duration>) {
    let mut poll = [fd, stop].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let ms = timeout.map_or(-1, |t| t.as_millis() as libc::c_int);
    // SAFETY: two structures, which live across the call; a negative descriptor is passed over. Every outcome means to the
    // caller: go and read.
    let _outcome = unsafe { libc::poll(poll.as_mut_ptr(), 2, ms) };
}

/// Reads messages into `out`, at most [`MSG_BATCH`], and returns how many; EAGAIN: there are none.
pub fn read(fd: RawFd, out: &mut [Msg]) -> rustix::io::Result<usize> {
    let mut raw = [[0u8; MSG_SIZE]; MSG_BATCH];
    let raw = &mut raw[..out.len().min(MSG_BATCH)];
    // SAFETY: any bytes are valid for an array of bytes.
    let n = unsafe { libc::read(fd, raw.as_mut_ptr().cast(), size_of_val(raw)) };
    if n < 0 {
        return Err(super::last_error());
    }
    let n = n as usize / MSG_SIZE;
    for (o, m) in out.iter_mut().zip(&raw[..n]) {
        *o = parse(m);
    }
    Ok(n)
}

fn parse(m: &[u8; MSG_SIZE]) -> Msg {
    let word = |i: usize| u64::from_ne_bytes(std::array::from_fn(|k| m[8 + i * 8 + k])) as usize;
    match m[0] {
        0x12 => Msg::Fault { addr: word(1) & !(crate::PAGE_SIZE - 1), tid: word(2) as u32 },
        0x13 => Msg::Fork(word(0) as u32 as RawFd),
        0x14 => Msg::Remap { from: word(0), to: word(1), len: word(2) },
        0x15 => Msg::Remove { start: word(0), end: word(1) },
        0x16 => Msg::Unmap { start: word(0), end: word(1) },
        other => Msg::Unknown(other),
    }
}

fn range(start: usize, len: usize) -> UffdRange {
    UffdRange { start: start as u64, len: len as u64 }
}

/// # Safety
/// `arg` must be the structure that `op` takes.
unsafe fn ioctl<T>(fd: RawFd, op: u64, arg: &mut T) -> rustix::io::Result<()> {
    // SAFETY: the caller's contract.
    unsafe { super::ioctl::ioctl(fd, op, std::ptr::from_mut(arg) as usize).map(|_| ()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_numbers_are_the_kernels() {
        assert_eq!((UFFDIO_API, UFFDIO_REGISTER), (0xc018_aa3f, 0xc020_aa00));
        assert_eq!((UFFDIO_UNREGISTER, UFFDIO_WAKE), (0x8010_aa01, 0x8010_aa02));
        assert_eq!((UFFDIO_COPY, UFFDIO_MOVE), (0xc028_aa03, 0xc028_aa05));
        assert_eq!((UFFDIO_WRITEPROTECT, UFFDIO_POISON), (0xc018_aa06, 0xc020_aa08));
    }

    #[test]
    fn stops_are_errnos() {
        for e in
            [libc::EAGAIN, libc::EEXIST, libc::ENOENT, libc::EBUSY, libc::EINVAL, libc::ENOMEM, libc::EPERM]
        {
            assert_eq!(Stop::from_errno(e).errno().raw_os_error(), e);
        }
    }
}

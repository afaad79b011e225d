//! What DAX files need of the kernel: who a file is, whether it is DAX, mappings at fixed addresses, write-back of the
//! CPU's caches, leases.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// `linux/stat.h`.
const STATX_ATTR_DAX: u64 = 0x0020_0000;
/// `fcntl.h`.
const F_SETSIG: libc::c_int = 10;
/// The largest file handle (`linux/exportfs.h`: MAX_HANDLE_SZ).
const HANDLE: usize = 128;

fn statx(fd: BorrowedFd<'_>, mask: libc::c_uint) -> Result<libc::statx, Errno> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH is the descriptor itself; the structure lives across the call.
    let r =
        unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, stat.as_mut_ptr()) };
    // SAFETY: zeroed is a valid value, and the kernel has written a valid one over it.
    if r == 0 { Ok(unsafe { stat.assume_init() }) } else { Err(super::last_error()) }
}

/// What tells a file from every other one that there is or was: its device, and the handle by which the file system
/// knows it, which holds the inode's number and generation; where it has no handles, inode and time of birth. `fd` may be
/// O_PATH.
///
/// # Errors
/// The file cannot be looked at.
pub fn file_identity(fd: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        data: [u8; HANDLE],
    }
    let stat = statx(fd, libc::STATX_INO | libc::STATX_BTIME)?;
    let mut id = Vec::with_capacity(HANDLE + 16);
    id.extend(stat.stx_dev_major.to_ne_bytes());
    id.extend(stat.stx_dev_minor.to_ne_bytes());
    let mut handle = Handle { bytes: HANDLE as u32, kind: 0, data: [0; HANDLE] };
    let mut mount = 0;
    // SAFETY: the structure has room for as many bytes as it says; all pointers live across the call.
    let r = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if r == 0 {
        id.extend(handle.kind.to_ne_bytes());
        id.extend(&handle.data[..(handle.bytes as usize).min(HANDLE)]);
    } else {
        id.extend(stat.stx_ino.to_ne_bytes());
        id.extend(stat.stx_btime.tv_sec.to_ne_bytes());
        id.extend(stat.stx_btime.tv_nsec.to_ne_bytes());
    }
    Ok(id)
}

/// Whether the kernel says that the file's pages are its storage.
///
/// # Errors
/// The file cannot be looked at.
pub fn is_dax(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let stat = statx(fd, libc::STATX_BASIC_STATS)?;
    Ok(stat.stx_attributes & stat.stx_attributes_mask & STATX_ATTR_DAX != 0)
}

fn protection(write: bool) -> ProtFlags {
    if write { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ }
}

/// Whether a mapping of the file, to read or to write, may be durable by writing back the CPU's caches alone (MAP_SYNC).
pub fn grants_map_sync(fd: BorrowedFd<'_>, write: bool) -> bool {
    let len = crate::PAGE_SIZE;
    let flags = MapFlags::SHARED_VALIDATE | MapFlags::SYNC;
    // SAFETY: the kernel chooses the address; the mapping is not touched.
    let map = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection(write), flags, fd, 0) };
    map.is_ok_and(|addr| {
        // SAFETY: the mapping just made, of which nobody knows.
        unsafe { rustix::mm::munmap(addr, len) }.is_ok()
    })
}

/// How a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// It can be written.
    pub write: bool,
    /// With MAP_SYNC.
    pub sync: bool,
}

/// Maps `[offset, offset + len)` of a file where the kernel likes; a forked child does not get it. (One that is forked in the
/// middle of this call does, at an address that nobody knows.)
///
/// # Errors
/// What `mmap` or `madvise` says; nothing is mapped then.
pub fn map_file(fd: BorrowedFd<'_>, offset: u64, len: usize, how: How) -> Result<usize, Errno> {
    let flags = if how.sync { MapFlags::SHARED_VALIDATE | MapFlags::SYNC } else { MapFlags::SHARED };
    // SAFETY: the kernel chooses the address.
    let addr =
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection(how.write), flags, fd, offset)? }
            as usize;
    if let Err(e) = super::keep_from_children(addr, len) {
        super::unmap(addr, len)?;
        return Err(e);
    }
    Ok(addr)
}

/// Maps `[offset, offset + len)` of a file at `addr`, in place of what is there; a forked child does not get it, at
/// whatever moment it is forked: the mapping is made elsewhere, kept from children, and moved here then.
///
/// # Errors
/// What the calls say; the range is then what it was.
pub fn map_file_at(fd: BorrowedFd<'_>, offset: u64, addr: usize, len: usize, how: How) -> Result<(), Errno> {
    let made = map_file(fd, offset, len, how)?;
    super::remap(made, len, len, Some(addr)).map(drop).inspect_err(|_| _ = super::unmap(made, len))
}

/// An empty file. One for all, and for ever: who is to give a mapping up may have no descriptor left.
fn nothing() -> Result<BorrowedFd<'static>, Errno> {
    static NOTHING: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(nothing) = NOTHING.get() {
        return Ok(nothing.as_fd());
    }
    let made = rustix::fs::memfd_create("farpage-nothing", MemfdFlags::CLOEXEC)?;
    Ok(NOTHING.get_or_init(|| made).as_fd())
}

/// Sees to it that [`map_nothing_at`] needs no descriptor. For who is about to map something.
///
/// # Errors
/// There is none now.
pub fn prepare_nothing() -> Result<(), Errno> {
    nothing().map(drop)
}

/// Puts memory in place of what is mapped in the range that raises SIGBUS when it is touched, as pages beyond the end of
/// a file do: those of an empty file.
///
/// # Errors
/// No memory; the range is then what it was.
pub fn map_nothing_at(addr: usize, len: usize) -> Result<(), Errno> {
    map_file_at(nothing()?, 0, addr, len, How { write: true, sync: false })
}

/// Makes what this CPU and others wrote in `[addr, addr + len)` of a MAP_SYNC mapping durable: writes the lines back and
/// waits. Only on x86-64, where MAP_SYNC exists for memory that is reached by the caches' protocol; false elsewhere.
#[must_use]
pub fn write_back(addr: usize, len: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::asm;
        use std::arch::x86_64::{_mm_clflush, _mm_sfence};
        let kind = write_back_kind();
        for line in (addr & !63..addr + len).step_by(64) {
            // SAFETY: the caller's own mapping; the instructions change no byte. CLWB and CLFLUSHOPT are there, as CPUID
            // has said.
            unsafe {
                match kind {
                    WriteBack::Clwb => asm!("clwb [{}]", in(reg) line, options(nostack, preserves_flags)),
                    WriteBack::ClflushOpt => {
                        asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags));
                    }
                    WriteBack::Clflush => _mm_clflush(line as *const u8),
                }
            }
        }
        // SAFETY: part of every x86-64.
        unsafe { _mm_sfence() };
        true
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _range = (addr, len);
        false
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
enum WriteBack {
    Clwb,
    ClflushOpt,
    Clflush,
}

#[cfg(target_arch = "x86_64")]
fn write_back_kind() -> WriteBack {
    static KIND: std::sync::OnceLock<WriteBack> = std::sync::OnceLock::new();
    // Leaf 7, EBX: bit 24 CLWB, bit 23 CLFLUSHOPT.
    *KIND.get_or_init(|| match std::arch::x86_64::__cpuid_count(7, 0).ebx {
        ebx if ebx & 1 << 24 != 0 => WriteBack::Clwb,
        ebx if ebx & 1 << 23 != 0 => WriteBack::ClflushOpt,
        _ => WriteBack::Clflush,
    })
}

/// Makes the bytes of a mapping that the caller has alone zero.
pub fn fill_zero(addr: usize, len: usize) {
    // SAFETY: the caller's own mapping, which nobody else knows yet.
    unsafe { std::ptr::write_bytes(addr as *mut u8, 0, len) };
}

/// Writes what was changed in a mapping to its file, and waits (`msync`).
///
/// # Errors
/// What `msync` says: a write that failed.
pub fn sync_mapping(addr: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: writes back; changes no byte.
    unsafe { rustix::mm::msync(addr as *mut _, len, rustix::mm::MsyncFlags::SYNC) }
}

/// A descriptor by its number, for a look (`fstat`) in a signal handler; negative: none.
pub fn borrowed(fd: i32) -> Option<BorrowedFd<'static>> {
    // SAFETY: it is only looked through, and a look through a number that is another file's by now gives an answer that
    // the caller must expect.
    (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
}

/// What a lease is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// None.
    None,
    /// Who opens the file waits until the lease is given back, at most `/proc/sys/fs/lease-break-time`.
    Write,
}

/// Takes or gives back a lease of the file (`F_SETLEASE`). A break is announced by a signal that nobody minds (SIGURG); the
/// default, SIGIO, would end the process.
///
/// # Errors
/// The file is open elsewhere (EAGAIN), is not ours (EACCES), or the file system has no leases.
pub fn set_lease(fd: BorrowedFd<'_>, lease: Lease) -> Result<(), Errno> {
    let kind = match lease {
        Lease::None => libc::F_UNLCK,
        Lease::Write => libc::F_WRLCK,
    };
    // SAFETY: both calls take numbers only. Each time: giving a lease back makes the kernel forget the signal.
    let r = unsafe {
        if lease == Lease::Write && libc::fcntl(fd.as_raw_fd(), F_SETSIG, libc::SIGURG) != 0 {
            return Err(super::last_error());
        }
        libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, kind)
    };
    if r == 0 { Ok(()) } else { Err(super::last_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart_also_through_o_path() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "a").unwrap();
        std::fs::write(&b, "b").unwrap();
        let of = |path: &std::path::Path, flags| {
            let fd = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
            file_identity(fd.as_fd()).unwrap()
        };
        use rustix::fs::OFlags;
        assert_eq!(of(&a, OFlags::RDONLY), of(&a, OFlags::PATH));
        assert_ne!(of(&a, OFlags::RDONLY), of(&b, OFlags::RDONLY));
        let before = of(&a, OFlags::RDONLY);
        std::fs::remove_file(&a).unwrap();
        std::fs::write(&a, "a").unwrap();
        assert_ne!(before, of(&a, OFlags::RDONLY), "the same name, and perhaps the same inode number");
    }

    #[test]
    fn an_ordinary_file_is_not_dax() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(is_dax(file.as_fd()), Ok(false));
        assert!(![false, true].iter().any(|write| grants_map_sync(file.as_fd(), *write)));
    }

    #[test]
    fn writing_back_changes_nothing() {
        let bytes = vec![7u8; 10_000];
        assert_eq!(write_back(bytes.as_ptr() as usize + 1, 9_000), cfg!(target_arch = "x86_64"));
        assert!(bytes.iter().all(|b| *b == 7));
    }
}

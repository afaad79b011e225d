//! Calls on the process's own mappings, made directly: not through the wrappers that the injected library replaces.

/// Asks the CPU to fetch the cache lines of `[addr, addr + len)`: they are going to be read soon. Never a fault.
pub fn prefetch(addr: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (addr..addr + len).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint; it reads nothing that the program can see and does not fault, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line as *const i8) };
    }
}

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::PAGE_SIZE;

/// Drops the pages of `[start, start+len)`, which the caller knows to hold nothing of value.
pub fn drop_pages(start: usize, len: usize) {
    // SAFETY: the caller owns the range and gives up its contents. It is mapped, so the call does not fail; should
    // it, the pages stay, which costs memory and nothing else.
    let _dropped = unsafe { rustix::mm::madvise(start as *mut _, len, Advice::LinuxDontNeed) };
}

/// Drops one page.
pub fn drop_page(addr: usize) {
    drop_pages(addr, PAGE_SIZE);
}

/// Write-faults pages without changing a byte: shared ones become this process's own. Errors (not mapped, not
/// writable) mean that it could not be done, which the caller sees from what he does next.
pub fn write_fault(start: usize, len: usize) {
    // SAFETY: populating changes no byte.
    let _tried = unsafe { rustix::mm::madvise(start as *mut _, len, Advice::LinuxPopulateWrite) };
}

/// Read-faults pages. As [`write_fault`].
pub fn read_fault(start: usize, len: usize) {
    // SAFETY: populating changes no byte.
    let _tried = unsafe { rustix::mm::madvise(start as *mut _, len, Advice::LinuxPopulateRead) };
}

/// Faults pages in, to be read or to be written, without changing a byte.
///
/// # Errors
/// Not mapped, or not allowed: some page could not be had.
pub fn populate(start: usize, len: usize, write: bool) -> Result<(), Errno> {
    let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
    // SAFETY: populating changes no byte.
    unsafe { rustix::mm::madvise(start as *mut _, len, advice) }
}

/// Asks the kernel to make huge pages of `[start, start + len)` now (`MADV_COLLAPSE`).
///
/// # Errors
/// As the kernel's: no huge page, something is pinned or absent, not supported.
pub fn collapse(start: usize, len: usize) -> Result<(), Errno> {
    const MADV_COLLAPSE: libc::c_int = 25;
    // SAFETY: the pages' bytes and addresses stay as they are.
    let r = unsafe { libc::syscall(libc::SYS_madvise, start, len, MADV_COLLAPSE) };
    if r == 0 {
        return Ok(());
    }
    Err(Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)))
}

/// Where the calling thread's stack is just now.
#[inline(never)]
pub fn stack_pointer() -> usize {
    let here = 0u8;
    std::ptr::from_ref(std::hint::black_box(&here)) as usize
}

/// A page of private anonymous memory, for ever.
pub fn private_page() -> Result<usize, Errno> {
    // SAFETY: the kernel chooses the address.
    let p = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            PAGE_SIZE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )?
    };
    Ok(p as usize)
}

/// Fresh private memory of `len` bytes, where the kernel likes; nothing is reserved.
pub fn map_anonymous(len: usize) -> Result<usize, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses the address.
    let p = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags)? };
    Ok(p as usize)
}

/// Unmaps what the caller owns.
pub fn unmap(start: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: the caller's memory, which he gives up.
    unsafe { rustix::mm::munmap(start as *mut _, len) }
}

/// `mremap` of what the caller owns; it may move, or goes to `to`.
pub fn remap(from: usize, len: usize, new_len: usize, to: Option<usize>) -> Result<usize, Errno> {
    use rustix::mm::MremapFlags;
    // SAFETY: the caller's memory, whose old address he gives up; what is at `to` he gives up as well.
    let p = unsafe {
        match to {
            None => rustix::mm::mremap(from as *mut _, len, new_len, MremapFlags::MAYMOVE)?,
            Some(to) => {
                rustix::mm::mremap_fixed(from as *mut _, len, new_len, MremapFlags::MAYMOVE, to as *mut _)?
            }
        }
    };
    Ok(p as usize)
}

/// A forked child gets nothing of this range.
pub fn keep_from_children(start: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: changes nothing in this process.
    unsafe { rustix::mm::madvise(start as *mut _, len, Advice::LinuxDontFork) }
}

/// The opposite of [`keep_from_children`].
pub fn leave_to_children(start: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: changes nothing in this process.
    unsafe { rustix::mm::madvise(start as *mut _, len, Advice::LinuxDoFork) }
}

/// A mark that a forked child finds cleared, however it was forked.
pub struct ForkMark(&'static AtomicU32);

impl ForkMark {
    /// A mark that is set.
    pub fn new() -> Result<Self, Errno> {
        let page = private_page()?;
        // SAFETY: our own page, which changes nothing but what a child finds in it.
        unsafe { rustix::mm::madvise(page as *mut _, PAGE_SIZE, Advice::LinuxWipeOnFork)? };
        // SAFETY: the page is never unmapped, page-aligned, and only ever used as this one atomic.
        let mark = Self(unsafe { &*(page as *const AtomicU32) });
        mark.set();
        Ok(mark)
    }

    /// Sets it.
    pub fn set(&self) {
        self.0.store(1, Ordering::Relaxed);
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }
}

/// This process's number, as `getpid` gives it, but without a system call: it is kept where a forked child finds a 0.
pub fn pid() -> u32 {
    static KEPT: std::sync::OnceLock<Option<ForkMark>> = std::sync::OnceLock::new();
    let Some(mark) = KEPT.get_or_init(|| ForkMark::new().inspect(|m| m.0.store(0, Ordering::Relaxed)).ok())
    else {
        return std::process::id();
    };
    // Relaxed: every thread that finds a 0 stores the same.
    match mark.0.load(Ordering::Relaxed) {
        0 => {
            mark.0.store(std::process::id(), Ordering::Relaxed);
            std::process::id()
        }
        pid => pid,
    }
}

/// Reserves `len` bytes of address space at `target` (replacing what is there), or where the kernel likes.
pub fn reserve(target: Option<usize>, len: usize) -> Result<usize, Errno> {
    let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    if target.is_some() {
        flags |= MapFlags::FIXED;
    }
    // SAFETY: with a target, the caller (an `mremap` with a fixed target) asked for its replacement.
    let p =
        unsafe { rustix::mm::mmap_anonymous(target.unwrap_or(0) as *mut _, len, ProtFlags::empty(), flags)? };
    Ok(p as usize)
}

/// The kernel's mappings within `[start, end)`, cut at its edges.
pub fn mappings_in(start: usize, end: usize) -> Result<Vec<(usize, usize)>, Errno> {
    let maps = std::fs::read_to_string("/proc/self/maps")
        .map_err(|e| Errno::from_raw_os_error(e.raw_os_error().unwrap_or(libc::EIO)))?;
    let mut found = Vec::new();
    for line in maps.lines() {
        let Some((range, _)) = line.split_once(' ') else { continue };
        let Some((s, e)) = range.split_once('-') else { continue };
        let (Ok(s), Ok(e)) = (usize::from_str_radix(s, 16), usize::from_str_radix(e, 16)) else { continue };
        if e > start && s < end {
            found.push((s.max(start), e.min(end)));
        }
    }
    Ok(found)
}

//! The mmap family. What is managed: private anonymous mappings of at least the configured size that are neither
//! executable nor huge nor stacks. Everything else goes to the kernel as it is.

use std::ffi::c_void;

use farpage::PAGE_SIZE;
use farpage::space::Space;
use libc::{c_int, off_t, size_t};
use rustix::io::Errno;

use crate::{arena, fail, hooks, init};

const MAP_FAILED: *mut c_void = libc::MAP_FAILED;

fn result(r: isize) -> Result<usize, Errno> {
    if (-4095..0).contains(&r) { Err(Errno::from_raw_os_error(-r as i32)) } else { Ok(r as usize) }
}

/// A system call, past every wrapper.
///
/// # Safety
/// As the call's.
unsafe fn raw(n: libc::c_long, a: [usize; 6]) -> Result<usize, Errno> {
    // SAFETY: the caller's contract.
    let r = unsafe { libc::syscall(n, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if r == -1 {
        // SAFETY: errno is this thread's own.
        return Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }));
    }
    result(r as isize)
}

fn round(len: usize) -> usize {
    len.div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE)
}

/// The manager for calls of the program; the manager's own threads go to the kernel directly.
fn managed() -> Option<&'static Space> {
    if arena::is_manager() { None } else { init::space() }
}

fn out(r: Result<usize, Errno>) -> *mut c_void {
    match r {
        Ok(p) => p as *mut c_void,
        Err(e) => {
            fail::<i8>(e);
            MAP_FAILED
        }
    }
}

fn wants_managing(space: &Space, len: usize, prot: c_int, flags: c_int) -> bool {
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let not = libc::MAP_SHARED | libc::MAP_HUGETLB | libc::MAP_GROWSDOWN | libc::MAP_STACK | libc::MAP_LOCKED;
    flags & (kind | not) == kind && prot & libc::PROT_EXEC == 0 && len as u64 >= space.domain.config.min_size
}

/// # Safety
/// As `mmap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    if flags & libc::MAP_ANONYMOUS == 0
        && let Some(other) = hooks::get().and_then(|h| (h.mapping)(fd, len))
    {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&other);
        // SAFETY: the caller's contract, with another file.
        let p = unsafe { mmap(addr, len, prot, flags, fd, 0) };
        if p != MAP_FAILED {
            farpage::sys::read_fault(p as usize, round(len));
        }
        return p;
    }
    let size = round(len);
    let replaced = flags & libc::MAP_FIXED != 0;
    if replaced {
        hooks::changing(addr as usize, (addr as usize).saturating_add(size));
    }
    // SAFETY: the caller's contract.
    let result = unsafe { mmap_managed(addr, len, prot, flags, fd, offset) };
    if replaced {
        hooks::changed(addr as usize, (addr as usize).saturating_add(size));
    }
    result
}

/// # Safety
/// As `mmap(2)`.
unsafe fn mmap_managed(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let call = |flags: c_int| {
        let args = [addr as usize, len, prot as usize, flags as usize, fd as usize, offset as usize];
        // SAFETY: the caller's contract.
        unsafe { raw(libc::SYS_mmap, args) }
    };
    let Some(space) = managed() else { return out(call(flags)) };
    let future = LOCK_FUTURE.load(std::sync::atomic::Ordering::Relaxed);
    let flags = if future != 0 { flags | libc::MAP_LOCKED } else { flags };
    let size = round(len);
    let manage = len != 0 && wants_managing(space, size, prot, flags);
    let fixed = flags & libc::MAP_FIXED != 0;
    let replaces = fixed && space.manages(addr as usize, (addr as usize).saturating_add(size));
    if !manage && !replaces {
        return out(call(flags));
    }
    let populate = flags & libc::MAP_POPULATE != 0;
    let flags = if manage { flags & !libc::MAP_POPULATE } else { flags };
    let mapped = space.change(|world| {
        if manage && space.refuses(size) {
            return Err(Errno::NOMEM);
        }
        let p = if replaces {
            space.unmap(world, addr as usize, addr as usize + size, || call(flags))?
        } else {
            call(flags)?
        };
        if manage && space.add(world, p, p + size).is_err() {
            // It stays an ordinary mapping.
            space.count(farpage::domain::Counter::Unmanaged, 1);
        }
        Ok(p)
    });
    if let (Ok(p), true) = (mapped, populate && manage) {
        farpage::sys::write_fault(p, size);
    }
    out(mapped)
}

/// # Safety
/// As `mmap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the caller's contract.
    unsafe { mmap(addr, len, prot, flags, fd, offset) }
}

/// # Safety
/// As `munmap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(addr: *mut c_void, len: size_t) -> c_int {
    let (start, size) = (addr as usize, round(len));
    // SAFETY: the caller's contract.
    let call = || unsafe { raw(libc::SYS_munmap, [start, len, 0, 0, 0, 0]) };
    hooks::changing(start, start.saturating_add(size));
    let space = managed().filter(|s| s.manages(start, start.saturating_add(size)));
    let r = match space {
        Some(space) => space.change(|world| space.unmap(world, start, start + size, call)),
        None => call(),
    };
    hooks::changed(start, start.saturating_add(size));
    r.map_or_else(|e| c_int::from(fail::<i8>(e)), |_| 0)
}

/// # Safety
/// As `mremap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: size_t,
    new_len: size_t,
    flags: c_int,
    new_addr: *mut c_void,
) -> *mut c_void {
    let (from, old_size, new_size) = (old as usize, round(old_len), round(new_len));
    // SAFETY: the caller's contract.
    let whole =
        || unsafe { raw(libc::SYS_mremap, [from, old_len, new_len, flags as usize, new_addr as usize, 0]) };
    let fixed = flags & libc::MREMAP_FIXED != 0;
    let target = fixed.then_some(new_addr as usize);
    let touches = |s: &&Space| {
        s.manages(from, from.saturating_add(old_size))
            || target.is_some_and(|t| s.manages(t, t.saturating_add(new_size)))
    };
    let moved = |hook: fn(usize, usize)| {
        hook(from, from.saturating_add(old_size.max(new_size)));
        if let Some(t) = target {
            hook(t, t.saturating_add(new_size));
        }
    };
    moved(hooks::changing);
    let Some(space) = managed().filter(touches) else {
        let r = whole();
        moved(hooks::changed);
        return out(r);
    };
    let r = space.change(|world| {
        space.remap(
            world,
            (from, old_size),
            new_size,
            target,
            flags & libc::MREMAP_DONTUNMAP != 0,
            |s, l, n, t| {
                let flags = match t {
                    Some(_) => flags | libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE,
                    None => flags,
                };
                let to = t.unwrap_or(new_addr as usize);
                // SAFETY: the caller's contract; pieces of it, with places inside the whole.
                unsafe { raw(libc::SYS_mremap, [s, l, n, flags as usize, to, 0]) }
            },
        )
    });
    moved(hooks::changed);
    out(r)
}

/// # Safety
/// As `madvise(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(addr: *mut c_void, len: size_t, advice: c_int) -> c_int {
    let (start, size) = (addr as usize, round(len));
    let end = start.saturating_add(size);
    let drops = matches!(
        advice,
        libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE | libc::MADV_DONTNEED_LOCKED
    );
    if drops {
        hooks::changing(start, end);
    }
    // SAFETY: the caller's contract.
    let result = unsafe { madvise_managed(addr, len, advice) };
    if drops {
        hooks::changed(start, end);
    }
    result
}

/// # Safety
/// As `madvise(2)`.
unsafe fn madvise_managed(addr: *mut c_void, len: size_t, advice: c_int) -> c_int {
    let (start, size) = (addr as usize, round(len));
    let end = start.saturating_add(size);
    // SAFETY: the caller's contract.
    let call_with = |advice: c_int| unsafe { raw(libc::SYS_madvise, [start, len, advice as usize, 0, 0, 0]) };
    let call = || call_with(advice);
    let Some(space) = managed().filter(|s| size != 0 && s.manages(start, end)) else {
        return call().map_or_else(|e| c_int::from(fail::<i8>(e)), |_| 0);
    };
    let r = match advice {
        // At once: freed pages that the kernel takes whenever it likes would stay charged, and go from where they are staged.
        libc::MADV_FREE => {
            space.change(|world| space.discard(world, start, end, || call_with(libc::MADV_DONTNEED)))
        }
        libc::MADV_DONTNEED | libc::MADV_REMOVE | libc::MADV_DONTNEED_LOCKED => {
            space.change(|world| space.discard(world, start, end, call))
        }
        libc::MADV_WILLNEED => call().inspect(|_| space.will_need(start, end)),
        libc::MADV_COLD | libc::MADV_PAGEOUT => {
            call().inspect(|_| space.page_out(start, end, advice == libc::MADV_PAGEOUT))
        }
        libc::MADV_DONTFORK | libc::MADV_WIPEONFORK => {
            space.change(|world| call().inspect(|_| space.set_fork(world, start, end, true)))
        }
        libc::MADV_DOFORK | libc::MADV_KEEPONFORK => {
            space.change(|world| call().inspect(|_| space.set_fork(world, start, end, false)))
        }
        _ => call(),
    };
    r.map_or_else(|e| c_int::from(fail::<i8>(e)), |_| 0)
}

/// Whether mappings to come are to be locked (`MCL_FUTURE`), and how.
static LOCK_FUTURE: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(0);

/// `mlockall`: all that is the program's, but not the manager's tables, which reserve far more than they use.
///
/// # Safety
/// As `mlockall(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlockall(flags: c_int) -> c_int {
    let known = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    let Some(space) = managed() else {
        // SAFETY: a number only.
        return unsafe { raw(libc::SYS_mlockall, [flags as usize, 0, 0, 0, 0, 0]) }
            .map_or_else(|e| c_int::from(fail::<i8>(e)), |_| 0);
    };
    if flags == 0 || flags & !known != 0 || flags == libc::MCL_ONFAULT {
        return c_int::from(fail::<i8>(Errno::INVAL));
    }
    if flags & libc::MCL_CURRENT != 0 {
        let how = if flags & libc::MCL_ONFAULT != 0 { libc::MLOCK_ONFAULT as usize } else { 0 };
        let maps = match farpage::sys::mappings_in(0, usize::MAX) {
            Ok(maps) => maps,
            Err(e) => return c_int::from(fail::<i8>(e)),
        };
        for (start, end) in maps {
            if arena::holds(start) || space.is_own(start) {
                continue;
            }
            // SAFETY: locking changes no byte. What cannot be locked (vsyscall, PROT_NONE) is passed over, as
            // mlockall(2) does.
            let r = unsafe { raw(libc::SYS_mlock2, [start, end - start, how, 0, 0, 0]) };
            if let Err(e @ (Errno::PERM | Errno::AGAIN)) = r {
                return c_int::from(fail::<i8>(e));
            }
        }
    }
    let future = if flags & libc::MCL_FUTURE != 0 { flags } else { 0 };
    LOCK_FUTURE.store(future, std::sync::atomic::Ordering::Relaxed);
    0
}

/// # Safety
/// As `munlockall(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munlockall() -> c_int {
    LOCK_FUTURE.store(0, std::sync::atomic::Ordering::Relaxed);
    // SAFETY: takes nothing.
    unsafe { raw(libc::SYS_munlockall, [0; 6]) }.map_or_else(|e| c_int::from(fail::<i8>(e)), |_| 0)
}

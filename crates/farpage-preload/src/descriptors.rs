//! Keeps the program from closing the manager's descriptors, which it cannot know of (`closefrom(3)` is common).

use libc::{c_int, c_uint};
use rustix::io::Errno;

use crate::{fail, hooks, init};

fn ours(fd: c_int) -> bool {
    init::ready().is_some_and(|s| s.owns_descriptor(fd))
}

unsafe fn syscall3(n: libc::c_long, a: libc::c_long, b: libc::c_long, c: libc::c_long) -> c_int {
    // SAFETY: the callers pass what these calls take: numbers only.
    unsafe { libc::syscall(n, a, b, c) as c_int }
}

/// `close`, but for the manager's.
#[unsafe(no_mangle)]
pub extern "C" fn close(fd: c_int) -> c_int {
    if ours(fd) {
        return c_int::from(fail::<i8>(Errno::BADF));
    }
    hooks::closing(fd, fd);
    // SAFETY: numbers only.
    unsafe { syscall3(libc::SYS_close, fd.into(), 0, 0) }
}

/// `close_range`, around the manager's.
#[unsafe(no_mangle)]
pub extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if flags & libc::CLOSE_RANGE_CLOEXEC as c_int == 0 && first <= last {
        hooks::closing(first.min(c_int::MAX as c_uint) as c_int, last.min(c_int::MAX as c_uint) as c_int);
    }
    let mut ours: Vec<c_uint> =
        init::ready().map_or(Vec::new(), |s| s.descriptors().iter().map(|&f| f as c_uint).collect());
    ours.retain(|f| (first..=last).contains(f));
    ours.sort_unstable();
    ours.dedup();
    let mut from = first;
    for fd in ours {
        if fd > from {
            // SAFETY: numbers only.
            let r = unsafe { syscall3(libc::SYS_close_range, from.into(), (fd - 1).into(), flags.into()) };
            if r != 0 {
                return r;
            }
        }
        from = fd + 1;
    }
    if from > last {
        return 0;
    }
    // SAFETY: numbers only.
    unsafe { syscall3(libc::SYS_close_range, from.into(), last.into(), flags.into()) }
}

/// `closefrom`, around the manager's.
#[unsafe(no_mangle)]
pub extern "C" fn closefrom(low: c_int) {
    close_range(low.max(0) as c_uint, c_uint::MAX, 0);
}

/// `dup2`: a program that wants one of the manager's numbers is refused, as if beyond its limit.
#[unsafe(no_mangle)]
pub extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    if ours(new) {
        return c_int::from(fail::<i8>(Errno::BADF));
    }
    if old != new {
        hooks::closing(new, new);
    }
    // SAFETY: numbers only.
    unsafe { syscall3(libc::SYS_dup2, old.into(), new.into(), 0) }
}

/// As [`dup2`].
#[unsafe(no_mangle)]
pub extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    if ours(new) {
        return c_int::from(fail::<i8>(Errno::BADF));
    }
    if old != new {
        hooks::closing(new, new);
    }
    // SAFETY: numbers only.
    unsafe { syscall3(libc::SYS_dup3, old.into(), new.into(), flags.into()) }
}

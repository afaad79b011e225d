//! `libfarpage_dmirror.so`: preloaded into an unmodified program, it provides `/dev/hmm_dmirror0` to `3` and
//! `/sys/kernel/debug/gup_test`, the kernel's HMM test device, over this library's [`farpage::space::Space`].
//!
//! A page that is migrated really leaves the process, and its frame is counted on the device. See `docs/dmirror.md`.

mod files;
mod gup;
mod mirror;
mod open;
mod own;
mod pagemap;
mod pages;
mod private_file;
mod stat;
mod uapi;
mod user;
mod vma;

use farpage_preload::{fail, hooks};
use libc::{c_int, c_ulong, c_void, size_t};
use rustix::io::Errno;

use files::{File, quiet};
use uapi::{Command, GupRequest, Request};

extern "C" fn constructor() {
    open::look_up();
    hooks::set(hooks::Hooks {
        changing: files::changing,
        changed: files::changed,
        mapping: files::mapping,
        closing: files::closing,
        has_read: pagemap::has_read,
    });
    // SAFETY: functions that live as long as the process.
    unsafe {
        libc::pthread_atfork(
            Some(files::before_fork),
            Some(files::after_fork_in_parent),
            Some(files::after_fork_in_child),
        );
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

fn errno<T>(r: Result<T, Errno>) -> c_int {
    match r {
        Ok(_) => 0,
        Err(e) => fail::<i8>(e).into(),
    }
}

/// # Safety
/// As `ioctl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let at = argument as usize;
    // The kernel takes an int, and so do many callers.
    let request = c_ulong::from(request as u32);
    match files::find(fd) {
        Some(File::Mirror(mirror)) => errno((|| {
            // The kernel fetches first and looks what is asked then.
            let mut command = Command::fetch(at)?;
            command.range()?;
            let request = Request::from_number(request).ok_or(Errno::INVAL)?;
            quiet(&mirror).command(request, &mut command)?;
            command.give_back(at)
        })()),
        Some(File::GupTest(test)) => errno((|| {
            let request = GupRequest::from_number(request).ok_or(Errno::INVAL)?;
            quiet(&test).command(request, at)
        })()),
        // Another address space is mirrored.
        Some(File::Foreign(_)) => fail::<i8>(Errno::INVAL).into(),
        None => {
            if request == pagemap::PAGEMAP_SCAN
                && let Some(result) = pagemap::scan(fd, at)
            {
                return result.unwrap_or_else(|e| fail::<i8>(e).into());
            }
            // SAFETY: the caller's contract.
            unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) as c_int }
        }
    }
}

/// # Safety
/// As `mprotect(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(addr: *mut c_void, len: size_t, prot: c_int) -> c_int {
    // SAFETY: the caller's contract.
    let r = unsafe { libc::syscall(libc::SYS_mprotect, addr, len, prot) } as c_int;
    if r == 0 {
        files::changed(addr as usize, (addr as usize).saturating_add(len));
    }
    r
}

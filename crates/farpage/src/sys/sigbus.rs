//! SIGBUS: the one piece of state of the whole process that resolving faults in the faulting thread needs.

use std::mem::MaybeUninit;
use std::sync::OnceLock;

type Resolve = fn(usize) -> bool;

/// Who is asked, in this order: inline regions and DAX files, as far as they are used.
static RESOLVE: [OnceLock<Resolve>; 4] = [const { OnceLock::new() }; 4];
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// From now on `resolve` is called with the address of each access that raises SIGBUS, in the thread that made it, with all
/// signals blocked; if it returns true the access is tried again. Otherwise the others who have asked for it are called,
/// then whoever handled SIGBUS before, and if that was nobody the process ends. To be called any number of times with the
/// same function.
///
/// # Errors
/// What `sigaction` says.
pub fn on_sigbus(resolve: fn(usize) -> bool) -> rustix::io::Result<()> {
    let taken = RESOLVE.iter().find(|r| std::ptr::fn_addr_eq(*r.get_or_init(|| resolve), resolve));
    debug_assert!(taken.is_some(), "one place for each that there is");
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: a sigaction of zeros is valid, and all fields that matter are set; both structures live across the call. The
    // handler is made for any thread at any time: see there.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = handler as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigfillset(&raw mut new.sa_mask);
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        if libc::sigaction(libc::SIGBUS, &raw const new, old.as_mut_ptr()) != 0 {
            return Err(rustix::io::Errno::from_raw_os_error(*libc::__errno_location()));
        }
        // If two threads install it at once one of them finds ours: that is nobody before us.
        let old = old.assume_init();
        if old.sa_sigaction != new.sa_sigaction {
            BEFORE.get_or_init(|| old);
        }
    }
    Ok(())
}

/// Runs in the middle of an access to memory: of a program that holds locks of its own, but none of ours, because we touch
/// no memory that can be away while we hold one.
extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers; errno is this thread's own.
    let (addr, errno) = unsafe { ((*info).si_addr() as usize, *libc::__errno_location()) };
    let resolved = RESOLVE.iter().filter_map(OnceLock::get).any(|resolve| resolve(addr));
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !resolved {
        // SAFETY: the arguments are the kernel's.
        unsafe { before(signal, info, context) };
    }
}

/// What would have happened without us.
///
/// # Safety
/// The arguments must be those of a signal handler.
unsafe fn before(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let action = BEFORE.get().map_or(libc::SIG_DFL, |b| b.sa_sigaction);
    let flags = BEFORE.get().map_or(0, |b| b.sa_flags);
    if action == libc::SIG_DFL || action == libc::SIG_IGN {
        // The access is made again and ends the process: a fault cannot be ignored.
        // SAFETY: resets a signal to its default.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    } else if flags & libc::SA_SIGINFO != 0 {
        type Action = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: with SA_SIGINFO the word is a function of this type, installed by who was here before.
        unsafe { std::mem::transmute::<usize, Action>(action)(signal, info, context) };
    } else {
        // SAFETY: without it the word is a function of one argument.
        unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(action)(signal) };
    }
}

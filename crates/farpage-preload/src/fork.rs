//! fork: parent and child each go on with what is theirs. The C library calls these for every `fork` it makes.

use std::cell::{Cell, UnsafeCell};
use std::sync::atomic::{AtomicUsize, Ordering};

use farpage::space::fork::{Forking, Prepared};

use crate::startup::{self, Held};
use crate::transfers::Real;
use crate::{arena, init};

struct InProgress(UnsafeCell<Option<(Forking, Held)>>);
// SAFETY: written in `prepare` and taken in `parent` or `child`, between which the world is held exclusively.
unsafe impl Sync for InProgress {}
static FORKING: InProgress = InProgress(UnsafeCell::new(None));

thread_local! {
    /// For whom this thread has last prepared a slot.
    static LAST: Cell<Option<Prepared>> = const { Cell::new(None) };
}

/// The C library calls the three below, but does not say whether the fork has failed.
///
/// # Safety
/// As `fork(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fork() -> libc::pid_t {
    static REAL: Real = Real::new(c"fork");
    LAST.set(None);
    // SAFETY: the C library's function of this name has this type; the caller's contract.
    let pid =
        unsafe { std::mem::transmute::<*mut libc::c_void, extern "C" fn() -> libc::pid_t>(REAL.get())() };
    if let Some(child) = LAST.take().filter(|_| pid < 0)
        && let Some(space) = init::ready()
    {
        // SAFETY: errno is this thread's own; it says why there is no child.
        unsafe {
            let errno = *libc::__errno_location();
            space.fork_failed(child);
            *libc::__errno_location() = errno;
        }
    }
    pid
}

extern "C" fn prepare() {
    let Some(space) = init::space() else { return };
    let held = startup::hold(space);
    match space.before_fork() {
        Ok(forking) => {
            // SAFETY: `before_fork` gave us the world: nobody else is here.
            unsafe { *FORKING.0.get() = Some((forking, held)) };
        }
        Err(e) => farpage::sys::fatal(&format!("cannot prepare a fork: {e}")),
    }
}

extern "C" fn parent() {
    let Some(space) = init::space() else { return };
    // SAFETY: we still hold the world.
    if let Some((forking, _held)) = unsafe { (*FORKING.0.get()).take() } {
        LAST.set(Some(space.after_fork_in_parent(forking)));
    }
}

extern "C" fn child() {
    // SAFETY: this is the only thread.
    let forking = unsafe { (*FORKING.0.get()).take() };
    // Without preparation (the parent was not managed) there is nothing to take over.
    let (Some(space), Some((forking, _held))) = (init::inherited(), forking) else { return };
    // SAFETY: as above.
    unsafe { arena::renew() };
    match space.after_fork_in_child(forking) {
        Ok(_life) => init::start_threads(space),
        Err(e) => farpage::sys::fatal(&format!("a forked child cannot be managed: {e}")),
    }
}

type Handler = Option<unsafe extern "C" fn()>;
type RegisterAtfork = unsafe extern "C" fn(Handler, Handler, Handler, *mut libc::c_void) -> libc::c_int;

/// Registers the three, once, before anyone else registers: the first to register prepares last, when nothing of the program
/// runs any more before the fork, and is the first to be called in the child.
pub fn register() -> RegisterAtfork {
    static REAL: AtomicUsize = AtomicUsize::new(0);
    let real = REAL.load(Ordering::Acquire);
    if real != 0 {
        // SAFETY: what was stored is the C library's function.
        return unsafe { std::mem::transmute::<usize, RegisterAtfork>(real) };
    }
    // SAFETY: the name is a C string.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"__register_atfork".as_ptr()) } as usize;
    if found == 0 {
        farpage::sys::fatal("this C library has no __register_atfork");
    }
    // SAFETY: the symbol has this type in every glibc; the handlers live as long as the process.
    let (real, failed) = unsafe {
        let real = std::mem::transmute::<usize, RegisterAtfork>(found);
        let first = REAL.compare_exchange(0, found, Ordering::AcqRel, Ordering::Acquire).is_ok();
        (real, first && real(Some(prepare), Some(parent), Some(child), std::ptr::null_mut()) != 0)
    };
    if failed {
        farpage::sys::fatal("cannot register for fork");
    }
    real
}

/// What `pthread_atfork` of the program and its libraries calls: ours come first.
///
/// # Safety
/// As `pthread_atfork(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __register_atfork(
    before: Handler,
    in_parent: Handler,
    in_child: Handler,
    dso: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the caller's contract.
    unsafe { register()(before, in_parent, in_child, dso) }
}

//! Joining the domain: on the first mapping, which may come before any constructor has run; the threads start in ours.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use farpage::domain::{Domain, DomainError, ENV_DOMAIN};
use farpage::space::Space;

use crate::arena;

const FRESH: u32 = 0;
const JOINING: u32 = 1;
const READY: u32 = 2;
const OFF: u32 = 3;

static STATE: AtomicU32 = AtomicU32::new(FRESH);
static SPACE: OnceLock<&'static Space> = OnceLock::new();

/// The address space's manager, once the domain is joined. `None` while joining, or without a domain.
pub fn space() -> Option<&'static Space> {
    match STATE.load(Ordering::Acquire) {
        READY => ready(),
        FRESH => join(),
        _ => None,
    }
}

/// The manager if the domain is joined already.
pub fn ready() -> Option<&'static Space> {
    inherited().filter(|s| s.is_mine())
}

/// The same, also where it is a parent's.
pub fn inherited() -> Option<&'static Space> {
    if STATE.load(Ordering::Acquire) == READY { SPACE.get().copied() } else { None }
}

fn join() -> Option<&'static Space> {
    if STATE.compare_exchange(FRESH, JOINING, Ordering::AcqRel, Ordering::Acquire).is_err() {
        return None;
    }
    let Some(path) = env_value(ENV_DOMAIN) else {
        STATE.store(OFF, Ordering::Release);
        return None;
    };
    let space = Domain::attach(&path).and_then(Space::new);
    match space {
        Ok(space) => {
            let space: &'static Space = Box::leak(Box::new(space));
            let _first = SPACE.set(space);
            STATE.store(READY, Ordering::Release);
            Some(space)
        }
        Err(e) => {
            // To go on unmanaged in silence would break the budget.
            farpage::sys::say(&format!("process {} cannot be managed: {e}", std::process::id()));
            // SAFETY: ends the process; nothing of the program has run yet.
            unsafe { libc::_exit(125) }
        }
    }
}

/// Begins to manage a process that has no domain in its environment, in the middle of its life: `space` is a new one's.
/// Only for the first who asks, in which case the manager's threads run when this returns.
pub fn begin(
    make: impl FnOnce() -> Result<Space, DomainError>,
) -> Result<Option<&'static Space>, DomainError> {
    if STATE.compare_exchange(OFF, JOINING, Ordering::AcqRel, Ordering::Acquire).is_err() {
        return Ok(space());
    }
    let space: &'static Space = match make() {
        Ok(space) => Box::leak(Box::new(space)),
        Err(e) => {
            STATE.store(OFF, Ordering::Release);
            return Err(e);
        }
    };
    let _first = SPACE.set(space);
    crate::fork::register();
    crate::transfers::look_up();
    STATE.store(READY, Ordering::Release);
    start_threads(space);
    Ok(Some(space))
}

/// An environment variable as `exec` gave it: before the C library is initialised, `getenv` does not work.
fn env_value(name: &str) -> Option<String> {
    let environ = std::fs::read("/proc/self/environ").ok()?;
    environ.split(|&b| b == 0).find_map(|var| {
        let value = var.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        String::from_utf8(value.to_vec()).ok()
    })
}

extern "C" fn handler_thread(index: *mut libc::c_void) -> *mut libc::c_void {
    if let Some(space) = space() {
        farpage::sys::keep_only(&space.descriptors());
        farpage::fault::handler::run(space, index as usize)
    }
    std::ptr::null_mut()
}

extern "C" fn worker_thread(_: *mut libc::c_void) -> *mut libc::c_void {
    if let Some(space) = space() {
        farpage::sys::keep_only(&space.descriptors());
        farpage::reclaim::worker::run(space)
    }
    std::ptr::null_mut()
}

/// Starts the manager's threads: in the constructor and in a forked child, where this is the only thread. When this returns the
/// process has its life sign: it may end, or begin another program.
pub fn start_threads(space: &'static Space) {
    let _signals = farpage::sys::BlockedSignals::new();
    let started = spawn(worker_thread, 0) && spawn(handler_thread, 0);
    if !started {
        farpage::sys::fatal("cannot start the manager's threads");
    }
    space.set_running(|index| spawn(handler_thread, index));
    space.wait_until_live();
}

fn spawn(f: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void, arg: usize) -> bool {
    let Some(stack) = arena::stack() else { return false };
    let create = || {
        // SAFETY: the attributes live across the call, the stack for ever.
        unsafe {
            let mut attr = std::mem::zeroed();
            let mut thread = std::mem::zeroed();
            libc::pthread_attr_init(&raw mut attr) == 0
                && libc::pthread_attr_setstack(&raw mut attr, stack as *mut _, arena::STACK - 4096) == 0
                && libc::pthread_attr_setdetachstate(&raw mut attr, libc::PTHREAD_CREATE_DETACHED) == 0
                && libc::pthread_create(&raw mut thread, &raw const attr, f, arg as *mut _) == 0
        }
    };
    if arena::is_manager() { create() } else { arena::as_manager(create) }
}

extern "C" fn constructor() {
    if let Some(space) = space() {
        crate::fork::register();
        crate::transfers::look_up();
        start_threads(space);
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

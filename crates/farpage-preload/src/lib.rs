//! The library that `farpage run` injects into a program: it serves malloc and the mmap family, and runs the threads
//! that resolve faults and reclaim memory.
//!
//! Manager threads must never touch managed memory, or they would wait for themselves. All that they allocate, and all
//! that the C library allocates on their behalf, comes from the [`arena`], which is not managed.

mod arena;
mod descriptors;
mod fork;
pub mod hooks;
pub mod init;
mod malloc;
mod map;
mod startup;
mod transfers;

/// Whether this is one of the manager's threads.
pub fn is_manager() -> bool {
    arena::is_manager()
}

/// Whether an address is in memory of the manager's own.
pub fn is_own(addr: usize) -> bool {
    arena::holds(addr) || init::ready().is_some_and(|space| space.is_own(addr))
}

/// Returns the C convention: -1 and errno.
pub fn fail<T: From<i8>>(e: rustix::io::Errno) -> T {
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() = e.raw_os_error() };
    T::from(-1)
}

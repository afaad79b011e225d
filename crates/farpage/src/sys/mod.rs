//! The kernel's ABI: userfaultfd, PAGEMAP_SCAN, futexes, shared memory. Knows nothing of farpage.
//!
//! All calls go to the kernel directly (no libc wrapper in between): the injected library replaces those
//! wrappers, and the manager's own mappings must not come back to it.

pub mod dax;
mod file_lock;
mod fork_mutex;
mod futex;
pub(crate) mod in_place;
mod ioctl;
mod lock;
pub mod lz4;
mod mappings;
mod memory;
mod mutex;
pub mod numa;
mod pagemap_scan;
pub mod point;
mod process;
mod relay;
mod ring;
mod rwlock;
mod shared;
mod sigbus;
mod slots;
mod steady;
mod stop;
mod stream;
pub mod uffd;

pub use file_lock::{LifeLock, is_locked, lock_first_byte, unlock_first_byte};
pub use fork_mutex::ForkMutex;
pub use futex::{futex_wait, futex_wait_any, futex_wake};
pub use lock::{Locked, Peers, RobustLock};
pub use mappings::{Mapping, Mappings};
pub use memory::{
    ForkMark, collapse, drop_page, drop_pages, keep_from_children, leave_to_children, map_anonymous,
    mappings_in, pid, populate, prefetch, private_page, read_fault, remap, reserve, stack_pointer, unmap,
    write_fault,
};
pub use mutex::{Mutex, MutexGuard};
pub use pagemap_scan::{Kind, PageScan};
pub use process::{
    BlockedSignals, FUTEX_OWNER_DIED, LentLife, bind, cpu_of, cpus_allowed, end_life, fatal, gettid,
    hold_for_life, keep_off, keep_only, lend_life, number_in_proc, run_delay_ns, say, set_idle_policy,
    take_over_life,
};
pub use relay::{Relay, relay};
pub use ring::{Ring, Transfer};
pub use rwlock::{Read, RwLock, Write};
pub use shared::{Buffer, SharedArea, SharedMap};
pub use sigbus::on_sigbus;
pub use slots::{Slots, Taken};
pub use steady::{SteadyFile, identity, move_high};
pub use stop::Stopper;
pub use stream::Streaming;

/// What the last system call of the C library's says.
fn last_error() -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(rustix::io::Errno::IO)
}

/// So long after that; or in a hundred years, if a clock does not go as far.
pub fn after(start: std::time::Instant, timeout: std::time::Duration) -> std::time::Instant {
    start.checked_add(timeout).unwrap_or_else(|| start + std::time::Duration::from_secs(100 * 365 * 86_400))
}

/// Milliseconds of a clock that only goes forward.
pub fn now_ms() -> u64 {
    now_ns() / 1_000_000
}

/// Nanoseconds of the same clock.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Lets another thread run.
pub fn yield_now() {
    if point::yielded() {
        return;
    }
    rustix::thread::sched_yield();
}

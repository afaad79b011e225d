//! A lock around what a process has for itself, which a forked child begins with anew.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{Mutex, MutexGuard, pid, yield_now};

/// As [`Mutex`], for a static of the process: a child forked at any moment, by whatever call and while any thread held the
/// lock, finds it free, around the value that the process began with.
pub struct ForkMutex<T> {
    inner: Mutex<T>,
    /// Whose the value is; 0: nobody's yet.
    owner: AtomicU32,
    fresh: fn() -> T,
}

/// The value is just being made anew.
const RENEWING: u32 = u32::MAX;

impl<T> ForkMutex<T> {
    /// A lock around a value, and how a child's is made.
    pub const fn new(value: T, fresh: fn() -> T) -> Self {
        Self { inner: Mutex::new(value), owner: AtomicU32::new(0), fresh }
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let me = pid();
        loop {
            // Acquire pairs with the Release below: the value is this process's.
            let owner = self.owner.load(Ordering::Acquire);
            if owner == me {
                return self.inner.lock();
            }
            if owner == RENEWING {
                yield_now();
                continue;
            }
            if self.owner.compare_exchange(owner, RENEWING, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                if owner != 0 {
                    // SAFETY: the lock and whoever holds it are the parent's; threads of this process come here first, and
                    // only one of them has got past the exchange.
                    unsafe { self.inner.renew((self.fresh)()) };
                }
                self.owner.store(me, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static LOCK: ForkMutex<Vec<u32>> = ForkMutex::new(Vec::new(), Vec::new);

    #[test]
    fn a_child_begins_anew() {
        let mut held = LOCK.lock();
        held.push(7);
        // SAFETY: the child only takes the lock and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let empty = LOCK.lock().is_empty();
            // SAFETY: ends the child without running the test harness's code.
            unsafe { libc::_exit(i32::from(!empty)) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert_eq!(*held, [7]);
    }
}

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

/// The value is just being made anew, by a thread of the process whose number this goes with.
const RENEWING: u32 = 1 << 31;

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
            if owner == me | RENEWING {
                yield_now();
                continue;
            }
            // Another process's, also one that was at it when we were forked. Acquire: after what that did.
            let mine =
                self.owner.compare_exchange(owner, me | RENEWING, Ordering::Acquire, Ordering::Relaxed);
            if mine.is_ok() {
                if owner != 0 {
                    // SAFETY: the lock and whoever holds it are the parent's; threads of this process come here first, and
                    // only one of them has got past the exchange.
                    unsafe { self.inner.renew((self.fresh)()) };
                }
                // Release pairs with the Acquire above.
                self.owner.store(me, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static LOCK: ForkMutex<Vec<u32>> = ForkMutex::new(Vec::new(), Vec::new);

    /// A child that is forked while a thread of its parent is making the value anew.
    #[test]
    fn what_a_parent_was_making_is_made_anew() {
        static LOCK: ForkMutex<Vec<u32>> = ForkMutex::new(Vec::new(), || vec![1]);
        let parent = std::os::unix::process::parent_id();
        LOCK.owner.store(parent | RENEWING, Ordering::Relaxed);
        assert_eq!(*LOCK.lock(), [1]);
        assert_eq!(LOCK.owner.load(Ordering::Relaxed), pid());
    }

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

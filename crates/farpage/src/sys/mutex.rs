//! A lock of one process that survives `fork`: plain words, no thread identity.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{futex_wait, futex_wake};

/// Looks before sleeping: holders leave within microseconds.
const SPINS: u32 = 100;

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and somebody may sleep.
const AWAITED: u32 = 2;

/// As `std`'s, but a child that was forked while another thread of its parent held the lock can begin anew
/// ([`Mutex::renew`]). There is no poison: a panic of a manager thread aborts the process.
pub struct Mutex<T> {
    state: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the lock hands the value to one thread at a time.
unsafe impl<T: Send> Sync for Mutex<T> {}

/// The value, locked.
pub struct MutexGuard<'a, T>(&'a Mutex<T>);

impl<T> Mutex<T> {
    /// A lock around a value.
    pub const fn new(value: T) -> Self {
        Self { state: AtomicU32::new(FREE), value: UnsafeCell::new(value) }
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // Acquire pairs with the guard's Release.
        if self.state.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_err() {
            for _ in 0..SPINS {
                std::hint::spin_loop();
                if self.state.compare_exchange_weak(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
                {
                    return MutexGuard(self);
                }
            }
            // Who has slept cannot know whether others still do.
            while self.state.swap(AWAITED, Ordering::Acquire) != FREE {
                futex_wait(&self.state, AWAITED, None);
            }
        }
        MutexGuard(self)
    }

    /// Unlocks it with another value; what it held is forgotten, not dropped.
    ///
    /// # Safety
    /// The caller is the only thread of the process, just forked, and holds no guard of it.
    pub unsafe fn renew(&self, value: T) {
        // SAFETY: no other thread, no guard. The old value may be half changed, so it is not looked at.
        unsafe { self.value.get().write(value) };
        self.state.store(FREE, Ordering::Release);
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: we hold the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: we hold the lock.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        // Release: the next holder sees what we did.
        if self.0.state.swap(FREE, Ordering::Release) == AWAITED {
            futex_wake(&self.0.state, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excludes_threads() {
        let value = Mutex::new(0u32);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..5000 {
                        let mut held = value.lock();
                        let v = *held;
                        std::hint::black_box(&mut held);
                        *held = v + 1;
                    }
                });
            }
        });
        assert_eq!(*value.lock(), 20000);
    }

    #[test]
    fn a_lock_that_was_held_elsewhere_begins_anew() {
        let value = Mutex::new(vec![1]);
        std::mem::forget(value.lock());
        // SAFETY: as in a child: nobody else is here, the guard is forgotten.
        unsafe { value.renew(vec![2]) };
        assert_eq!(*value.lock(), [2]);
    }
}

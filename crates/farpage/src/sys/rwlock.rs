//! A reader-writer lock of one process that survives `fork`: plain words, no thread identity.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::{futex_wait, futex_wake};

const WRITER: u32 = 1 << 31;

/// Many readers or one writer; a waiting writer keeps new readers out. Unlike `std`'s, a lock that was
/// write-locked across `fork` can be unlocked in the child, and a reader can refuse to wait.
pub struct RwLock<T> {
    /// Readers, and the bit WRITER: a writer holds it or waits for the readers to leave.
    state: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the lock hands out `&T` to many threads or `&mut T` to one.
unsafe impl<T: Send + Sync> Sync for RwLock<T> {}

/// Shared access.
pub struct Read<'a, T>(&'a RwLock<T>);
/// Exclusive access.
pub struct Write<'a, T>(&'a RwLock<T>);

impl<T> RwLock<T> {
    /// A lock around a value.
    pub const fn new(value: T) -> Self {
        Self { state: AtomicU32::new(0), value: UnsafeCell::new(value) }
    }

    /// Shared access, unless a writer holds the lock or waits for it.
    pub fn try_read(&self) -> Option<Read<'_, T>> {
        let mut s = self.state.load(Ordering::Relaxed);
        while s & WRITER == 0 {
            // Acquire pairs with the Release of the last writer's unlock.
            match self.state.compare_exchange_weak(s, s + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Read(self)),
                Err(now) => s = now,
            }
        }
        None
    }

    /// Shared access; waits for writers.
    pub fn read(&self) -> Read<'_, T> {
        loop {
            if let Some(guard) = self.try_read() {
                return guard;
            }
            let s = self.state.load(Ordering::Relaxed);
            if s & WRITER != 0 {
                futex_wait(&self.state, s, None);
            }
        }
    }

    /// Exclusive access, unless another writer has it or waits for it, or the readers do not leave within `timeout`; new
    /// ones stay out meanwhile.
    pub fn try_write_for(&self, timeout: Duration) -> Option<Write<'_, T>> {
        if self.state.fetch_or(WRITER, Ordering::Acquire) & WRITER != 0 {
            return None;
        }
        let deadline = super::after(Instant::now(), timeout);
        loop {
            // Acquire pairs with the Release of the last reader's leaving.
            let s = self.state.load(Ordering::Acquire);
            if s == WRITER {
                return Some(Write(self));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.state.fetch_and(!WRITER, Ordering::Relaxed);
                futex_wake(&self.state, i32::MAX);
                return None;
            }
            futex_wait(&self.state, s, Some(left));
        }
    }

    /// Exclusive access; waits for readers and other writers.
    pub fn write(&self) -> Write<'_, T> {
        loop {
            let s = self.state.load(Ordering::Relaxed);
            if s & WRITER != 0 {
                futex_wait(&self.state, s, None);
                continue;
            }
            if self.state.compare_exchange(s, s | WRITER, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                break;
            }
        }
        // New readers stay out; wait for those inside. Acquire pairs with their Release.
        loop {
            let s = self.state.load(Ordering::Acquire);
            if s == WRITER {
                return Write(self);
            }
            futex_wait(&self.state, s, None);
        }
    }
}

impl<T> Drop for Read<'_, T> {
    fn drop(&mut self) {
        // Release: what this reader did under the lock comes before the writer's turn.
        if self.0.state.fetch_sub(1, Ordering::Release) == WRITER | 1 {
            futex_wake(&self.0.state, i32::MAX);
        }
    }
}

impl<T> Drop for Write<'_, T> {
    fn drop(&mut self) {
        // Release: readers see what was changed.
        self.0.state.store(0, Ordering::Release);
        futex_wake(&self.0.state, i32::MAX);
    }
}

impl<T> std::ops::Deref for Read<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: readers exclude writers.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> std::ops::Deref for Write<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: we are the only one inside.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> std::ops::DerefMut for Write<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: we are the only one inside.
        unsafe { &mut *self.0.value.get() }
    }
}

//! A few values that threads borrow one at a time, without blocking and across `fork`.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicI32, Ordering};

/// `N` values; a thread takes one that nobody uses.
///
/// A lock would be inherited locked by a child that `fork` made while another thread held it. Here each slot
/// names the process that holds it, so that a child sees what it inherited as stale and takes it over.
pub struct Slots<T, const N: usize> {
    holders: [AtomicI32; N],
    values: [UnsafeCell<T>; N],
}

// SAFETY: a value is reached only by the one thread that holds its slot (see `try_take`).
unsafe impl<T: Send, const N: usize> Sync for Slots<T, N> {}

/// A value taken from [`Slots`]; dropping it gives it back.
pub struct Taken<'a, T> {
    holder: &'a AtomicI32,
    value: &'a mut T,
    /// The value was in use in the parent when this process was forked: it may be half changed.
    pub stale: bool,
}

impl<T, const N: usize> Slots<T, N> {
    /// Slots with these values, all free.
    pub fn new(values: [T; N]) -> Self {
        Self { holders: [const { AtomicI32::new(0) }; N], values: values.map(UnsafeCell::new) }
    }

    /// A free value, or one that only a parent process was using, or `None`: all are in use.
    pub fn try_take(&self) -> Option<Taken<'_, T>> {
        self.try_take_if(|_| true)
    }

    /// As [`Self::try_take`], one that `suits` accepts, or that only a parent process was using.
    pub fn try_take_if(&self, suits: impl Fn(&T) -> bool) -> Option<Taken<'_, T>> {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        for (holder, value) in self.holders.iter().zip(&self.values) {
            let now = holder.load(Ordering::Relaxed);
            // Acquire pairs with the Release of `Taken::drop`: what the last user did is over.
            if now != me && holder.compare_exchange(now, me, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                // SAFETY: the exchange made this thread the slot's only user in this process: another thread of
                // it would have left our process id there, and a parent's threads have their own copy of the memory.
                let taken = Taken { holder, value: unsafe { &mut *value.get() }, stale: now != 0 };
                if taken.stale || suits(taken.value) {
                    return Some(taken);
                }
            }
        }
        None
    }

    /// As [`Self::try_take`], waiting for a free one.
    pub fn take(&self) -> Taken<'_, T> {
        loop {
            match self.try_take() {
                Some(taken) => return taken,
                None => super::yield_now(),
            }
        }
    }
}

impl<T> Deref for Taken<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.value
    }
}

impl<T> DerefMut for Taken<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value
    }
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        // Release: the next user sees what we did.
        self.holder.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_has_one_user() {
        let slots = Slots::<u32, 2>::new([1, 2]);
        let (mut a, b) = (slots.try_take().unwrap(), slots.try_take().unwrap());
        assert_ne!(*a, *b);
        assert!(slots.try_take().is_none());
        *a = 7;
        assert!(!a.stale);
        drop(a);
        assert_eq!(*slots.take(), 7);
    }

    #[test]
    fn what_a_parent_held_is_stale() {
        let slots = Slots::<u32, 1>::new([0]);
        slots.holders[0].store(i32::MAX, Ordering::Relaxed); // a process id that is not ours
        let taken = slots.try_take().unwrap();
        assert!(taken.stale);
        assert!(slots.try_take().is_none());
    }
}

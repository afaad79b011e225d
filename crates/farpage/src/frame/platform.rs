//! What the frame table stands on: atomics, futexes, yielding. Under `--cfg loom` these are loom's, so that loom
//! decides who runs next at each of them, and any of them can be the last thing that a process does (`crash`).

#[cfg(not(loom))]
pub use crate::sys::point::point;
#[cfg(not(loom))]
pub use crate::sys::{futex_wait, futex_wake, yield_now};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

#[cfg(loom)]
pub use modelled::*;

#[cfg(loom)]
#[allow(missing_docs, reason = "the atomics' own methods, for models only")]
mod modelled {
    use std::cell::Cell;
    use std::time::Duration;

    pub use loom::sync::atomic::{Ordering, fence};
    use loom::sync::{Condvar, Mutex};

    pub use loom::thread::yield_now;

    /// Loom has its own, at each atomic operation.
    pub fn point() {}

    loom::thread_local! {
        static STEPS: Cell<Option<u32>> = Cell::new(None);
    }
    loom::lazy_static! {
        // Every futex of the model, in one: a wake of one word may wake the waiters of another, who look again.
        static ref FUTEX: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    /// Runs `f`, which dies before its atomic operation number `steps` (from 0). True: it ended before that.
    pub fn crash(steps: u32, f: impl FnOnce()) -> bool {
        STEPS.with(|left| left.set(Some(steps)));
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        STEPS.with(|left| left.set(None));
        match ended {
            Ok(()) => true,
            Err(e) if e.is::<Killed>() => false,
            Err(e) => std::panic::resume_unwind(e),
        }
    }

    struct Killed;

    fn step() {
        STEPS.with(|left| match left.get() {
            Some(0) => std::panic::resume_unwind(Box::new(Killed)),
            Some(n) => left.set(Some(n - 1)),
            None => {}
        });
    }

    macro_rules! atomic {
        ($name:ident, $int:ty) => {
            #[derive(Debug)]
            pub struct $name(loom::sync::atomic::$name);

            impl $name {
                pub fn new(value: $int) -> Self {
                    Self(loom::sync::atomic::$name::new(value))
                }
                pub fn load(&self, order: Ordering) -> $int {
                    step();
                    self.0.load(order)
                }
                pub fn store(&self, value: $int, order: Ordering) {
                    step();
                    self.0.store(value, order)
                }
                pub fn fetch_add(&self, value: $int, order: Ordering) -> $int {
                    step();
                    self.0.fetch_add(value, order)
                }
                pub fn fetch_sub(&self, value: $int, order: Ordering) -> $int {
                    step();
                    self.0.fetch_sub(value, order)
                }
                pub fn fetch_or(&self, value: $int, order: Ordering) -> $int {
                    step();
                    self.0.fetch_or(value, order)
                }
                pub fn fetch_and(&self, value: $int, order: Ordering) -> $int {
                    step();
                    self.0.fetch_and(value, order)
                }
                pub fn fetch_max(&self, value: $int, order: Ordering) -> $int {
                    step();
                    self.0.fetch_max(value, order)
                }
                pub fn compare_exchange(
                    &self,
                    old: $int,
                    new: $int,
                    ok: Ordering,
                    no: Ordering,
                ) -> Result<$int, $int> {
                    step();
                    self.0.compare_exchange(old, new, ok, no)
                }
                pub fn compare_exchange_weak(
                    &self,
                    old: $int,
                    new: $int,
                    ok: Ordering,
                    no: Ordering,
                ) -> Result<$int, $int> {
                    self.compare_exchange(old, new, ok, no)
                }
            }
        };
    }
    atomic!(AtomicU32, u32);
    atomic!(AtomicU64, u64);

    /// As the kernel's: sleeps if the word has the value, until a wake. No timeout in models: a lost wake is
    /// then a deadlock, which loom reports.
    pub fn futex_wait(word: &AtomicU32, expected: u32, _timeout: Option<Duration>) {
        step();
        let held = FUTEX.0.lock().expect("no model panics with it held");
        if word.0.load(Ordering::SeqCst) == expected {
            drop(FUTEX.1.wait(held));
        }
    }

    /// As the kernel's.
    pub fn futex_wake(_word: &AtomicU32, _n: i32) {
        step();
        let _held = FUTEX.0.lock().expect("no model panics with it held");
        FUTEX.1.notify_all();
    }
}

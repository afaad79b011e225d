//! Where another thread's step may come in between, for models: under `--cfg shuttle` shuttle decides there who goes on, and
//! whoever would sleep or yield lets others go on. Otherwise all this is nothing, and the atomics are `std`'s.
//!
//! Models (`models.rs`) run the real code on the real kernel: all tasks of a model are in one thread, which shuttle
//! switches only at these places. Every model is of sequentially consistent steps; what weaker orderings allow is loom's
//! part (`frame/platform.rs`).

#[cfg(not(shuttle))]
mod real {
    pub use std::hint::spin_loop as spin;
    pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    /// Nothing.
    #[inline(always)]
    pub fn point() {}

    /// Nothing has been done instead of sleeping.
    #[inline(always)]
    pub(in crate::sys) fn yielded() -> bool {
        false
    }
}

#[cfg(shuttle)]
#[allow(missing_docs, reason = "for models only")]
mod real {
    use std::cell::Cell;

    pub use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    thread_local! {
        static MODELLED: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs `f`, inside a model, with the points being points.
    pub fn modelled(f: impl FnOnce()) {
        MODELLED.set(true);
        f();
        MODELLED.set(false);
    }

    /// Another task may go on here.
    pub fn point() {
        if MODELLED.get() {
            let _switch = AtomicBool::new(false).load(Ordering::SeqCst);
        }
    }

    /// Whoever waits by spinning lets others go on.
    pub fn spin() {
        if !yielded() {
            std::hint::spin_loop();
        }
    }

    pub(in crate::sys) fn yielded() -> bool {
        if MODELLED.get() {
            shuttle::thread::yield_now();
        }
        MODELLED.get()
    }
}

pub use real::*;

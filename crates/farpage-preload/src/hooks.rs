//! Where a library that is built over this one takes part in the calls that are replaced here (farpage-dmirror).

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use libc::{c_int, off_t};

/// What is to be called. Each runs in the thread that makes the call, with no lock of ours held.
pub struct Hooks {
    /// `[start, end)` is about to be mapped otherwise, or to lose its pages.
    pub changing: fn(start: usize, end: usize),
    /// It has been (Linux: `mmu_notifier`).
    pub changed: fn(start: usize, end: usize),
    /// `len` bytes of this file are to be mapped: what to map in its place, from its first byte on, if anything.
    pub mapping: fn(fd: c_int, len: usize) -> Option<OwnedFd>,
    /// Descriptors `first..=last` are about to be closed.
    pub closing: fn(first: c_int, last: c_int),
    /// These bytes were read from a file: from this offset, or (`None`) from its position, which is behind them now.
    pub has_read: fn(fd: c_int, at: Option<off_t>, bytes: &mut [u8]),
}

static HOOKS: OnceLock<Hooks> = OnceLock::new();

/// Sets them, once.
pub fn set(hooks: Hooks) {
    let _the_first = HOOKS.set(hooks);
}

/// They, if there are any; the manager's own threads have none.
pub(crate) fn get() -> Option<&'static Hooks> {
    HOOKS.get().filter(|_| !crate::arena::is_manager())
}

/// See [`Hooks::changing`].
pub(crate) fn changing(start: usize, end: usize) {
    if let Some(h) = get() {
        (h.changing)(start, end);
    }
}

/// See [`Hooks::changed`].
pub(crate) fn changed(start: usize, end: usize) {
    if let Some(h) = get() {
        (h.changed)(start, end);
    }
}

/// See [`Hooks::closing`].
pub(crate) fn closing(first: c_int, last: c_int) {
    if let Some(h) = get() {
        (h.closing)(first, last);
    }
}

//! Leases: how programs that do not use farpage are held off a file while its pages are pinned.
//!
//! A write lease (`F_SETLEASE`) can be had while nobody else has the file open. Whoever opens it then waits in the kernel until
//! the lease is given back, at most `/proc/sys/fs/lease-break-time` (45 s); so does a `truncate` by name. It is given
//! back with the last pin, and at once when another farpage process opens the file: that one sees our pins.

use std::os::fd::AsFd;

use super::file::Inner;
use super::table::Table;
use crate::sys::Mutex;
use crate::sys::dax::{self, Lease};

/// The lease of one handle.
pub(super) struct PinLease(Mutex<State>);

#[derive(Default)]
struct State {
    pins: u32,
    had: bool,
}

impl Default for PinLease {
    fn default() -> Self {
        Self(Mutex::new(State::default()))
    }
}

impl PinLease {
    /// One pin more.
    pub fn pinned(&self, file: &Inner) {
        if !file.options.lease {
            return;
        }
        let mut state = self.0.lock();
        state.pins += 1;
        if state.pins == 1 && !file.table.is_shared() {
            // Whether it can be had is the system's affair: docs/dax.md says when.
            state.had = dax::set_lease(file.fd.as_fd(), Lease::Write).is_ok();
            // One who came meanwhile has announced himself before we had it.
            if state.had && file.table.is_shared() {
                state.give_back(file);
            }
        }
    }

    /// One pin less.
    pub fn unpinned(&self, file: &Inner) {
        if file.options.lease {
            let mut state = self.0.lock();
            state.pins -= 1;
            if state.pins == 0 {
                state.give_back(file);
            }
        }
    }

    /// Another process of ours wants to open the file.
    fn yield_to_others(&self, file: &Inner) {
        self.0.lock().give_back(file);
    }
}

impl State {
    fn give_back(&mut self, file: &Inner) {
        if std::mem::take(&mut self.had) {
            let _given = dax::set_lease(file.fd.as_fd(), Lease::None);
        }
    }
}

impl Table {
    /// For the agent: gives leases back that are in the way of others who use the table, and tells those whose long-term
    /// pins are in the way of a cut.
    pub(super) fn serve_files(&self) {
        let files: Vec<_> = self.files.lock().iter().filter_map(std::sync::Weak::upgrade).collect();
        if files.is_empty() {
            return;
        }
        let shared = self.is_shared();
        for file in files {
            if shared {
                file.lease.yield_to_others(&file);
            }
            file.revoke();
        }
    }
}

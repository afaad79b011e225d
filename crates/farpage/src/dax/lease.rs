//! Leases: how programs that do not use farpage are held off a file while its pages are pinned.
//!
//! A write lease (`F_SETLEASE`) can be had while nobody else has the file open. Whoever opens it then waits in the kernel until
//! the lease is given back, at most `/proc/sys/fs/lease-break-time` (45 s); so does a `truncate` by name. It is given
//! back soon after the last pin, and at once when another farpage process opens the file: that one sees our pins.
//!
//! An `open` by the process that has the lease waits like any other's, and it is this process that would have to give the
//! lease back: while it opens the file, it has none ([`Table::without_leases`]).
//!
//! Taking a lease costs more than pinning, so it is kept for a few rounds of the agent ([`super::table::ROUND`]): pins that
//! follow each other share it, and a stranger waits that much longer.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::inner::Inner;
use super::table::Table;
use crate::sys::Mutex;
use crate::sys::dax::{self, Lease};

/// The lease of one handle.
pub(super) struct PinLease(Mutex<State>);

#[derive(Default)]
struct State {
    pins: u32,
    had: bool,
    /// Nothing was pinned at the agent's last look.
    idle: bool,
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
        state.idle = false;
        if state.pins == 1 && state.take(file) {
            // The agent is to look when it can go.
            file.table.announce();
        }
    }

    /// One pin less.
    pub fn unpinned(&self, file: &Inner) {
        if file.options.lease {
            self.0.lock().pins -= 1;
        }
    }

    /// The agent's look; true if it is to look again.
    fn look(&self, file: &Inner, shared: bool) -> bool {
        let mut state = self.0.lock();
        let unused = state.pins == 0;
        let shared = shared || file.table.is_opening();
        if shared || (unused && state.idle) {
            state.give_back(file);
        } else if !unused {
            // It could not be had before: somebody may have closed the file.
            state.take(file);
        }
        state.idle = unused;
        state.had
    }
}

impl State {
    /// Takes it if it can be had, which is the system's affair: docs/dax.md says when. True: it is new.
    fn take(&mut self, file: &Inner) -> bool {
        let may = !self.had && !file.table.is_shared() && !file.table.is_opening();
        if !may || dax::set_lease(file.fd.as_fd(), Lease::Write).is_err() {
            return false;
        }
        self.had = true;
        if file.table.is_shared() {
            // One who came meanwhile has announced himself before we had it.
            self.give_back(file);
        }
        self.had
    }

    fn give_back(&mut self, file: &Inner) {
        if std::mem::take(&mut self.had) {
            let _given = dax::set_lease(file.fd.as_fd(), Lease::None);
        }
    }
}

/// This process is opening the file: see [`Table::without_leases`].
pub(super) struct Opening<'t>(&'t Table);

impl Table {
    /// Has this process give back its leases of the file, and take none while this lives.
    pub(super) fn without_leases(&self) -> Opening<'_> {
        // SeqCst, with `is_opening`, which is looked at under the lock of a lease's state: whoever has looked before has taken
        // his lease when we come to it.
        self.opening.fetch_add(1, Ordering::SeqCst);
        for file in self.open_files() {
            file.lease.0.lock().give_back(&file);
        }
        Opening(self)
    }

    fn is_opening(&self) -> bool {
        // SeqCst, with `without_leases`.
        self.opening.load(Ordering::SeqCst) != 0
    }

    fn open_files(&self) -> Vec<Arc<Inner>> {
        self.files.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// For the agent: gives leases back that are in the way of others who use the table, and tells those whose long-term
    /// pins are in the way of a cut. True: it is to look again in a [`super::table::ROUND`].
    pub(super) fn serve_files(&self) -> bool {
        let files = self.open_files();
        let shared = self.is_shared();
        let mut again = false;
        for file in files {
            again |= file.lease.look(&file, shared);
            file.revoke();
        }
        again
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        // SeqCst, with `is_opening`.
        self.0.opening.fetch_sub(1, Ordering::SeqCst);
        // Where pages are pinned the agent is to see whether there can be a lease.
        if self.0.open_files().iter().any(|file| file.lease.0.lock().pins > 0) {
            self.0.announce();
        }
    }
}

//! Faults: messages of userfaultfd to resolved pages.
//!
//! A handler thread reads messages and resolves faults at once (`resolve`). What it cannot do at once (the world is
//! held by a mapping change, an event is pending) it puts aside, because the change may be waiting for it to read an
//! event: it never waits for anything but the next message and locks that are held for microseconds.

pub(crate) mod follow;
pub mod handler;
pub(crate) mod inline;
pub(crate) mod mail;
pub(crate) mod resolve;
mod stream;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{MutexGuard, PoisonError};

use stream::Streams;

use crate::sys::{self, Mutex};

/// A fault or event that waits until the world is free.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Deferred {
    /// A thread waits for this page.
    Fault(usize, u32),
    /// A mapping was changed by a call that went past us.
    Change(Change),
}

/// What the kernel tells us of a call that changed a mapping.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change {
    /// The pages of `[.0, .1)` are about to be dropped.
    Removed(usize, usize),
    /// `[.0, .1)` was unmapped.
    Unmapped(usize, usize),
    /// `.2` bytes at `.0` are at `.1` now.
    Moved(usize, usize, usize),
    /// A child was forked; its userfaultfd is next in the world's relay.
    Forked,
}

impl Change {
    /// What it happened to.
    pub(crate) fn range(self) -> (usize, usize) {
        match self {
            Change::Removed(start, end) | Change::Unmapped(start, end) => (start, end),
            Change::Moved(from, _, len) => (from, from + len),
            Change::Forked => (usize::MAX, usize::MAX),
        }
    }
}

/// So much can be put aside without allocating memory: while a thread forks it may hold the locks of the program's allocator,
/// and waits until its fork, which is behind the faults, has been read.
const DEFERRED: usize = 4096;

/// Threads of the manager at most.
const MANAGERS: usize = 16;

/// The state of fault handling of a process.
pub struct Faults {
    /// Changes, in order, before faults: what was dropped must be dropped before it is touched again.
    deferred: Mutex<VecDeque<Deferred>>,
    /// How many of them are changes.
    changes: AtomicUsize,
    /// Held from the reading of messages until all changes among them are noted. Who has made a call that the kernel
    /// announces, and then takes this lock, knows that the announcement has been noted.
    reading: Mutex<()>,
    /// What we are changing ourselves: announcements of that are no news.
    expected: Mutex<Vec<(usize, usize)>>,
    /// Its length, to look at without the mutex.
    waiting: AtomicUsize,
    /// The program changes mappings by raw system calls.
    raw_changes: AtomicBool,
    streams: std::sync::Mutex<Streams>,
    /// A registered page whose removal makes a handler return from its read: see [`Faults::nudge`].
    bell: AtomicUsize,
    /// Manager threads, whose own faults are resolved without locks.
    managers: [AtomicU32; MANAGERS],
    /// See [`follow`].
    pub(crate) follow: follow::Follow,
    /// See [`mail`].
    mail: mail::Mail,
    /// Pages of this process, or of the one that it was forked from, have been poisoned.
    poisoned: AtomicBool,
}

impl Faults {
    pub(crate) fn new() -> Self {
        Self {
            deferred: Mutex::new(VecDeque::with_capacity(DEFERRED)),
            changes: AtomicUsize::new(0),
            reading: Mutex::new(()),
            expected: Mutex::new(Vec::new()),
            waiting: AtomicUsize::new(0),
            raw_changes: AtomicBool::new(false),
            streams: std::sync::Mutex::new(Streams::default()),
            bell: AtomicUsize::new(0),
            managers: [const { AtomicU32::new(0) }; MANAGERS],
            follow: follow::Follow::new(),
            mail: mail::Mail::new(),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Reads messages from `fd` into `out` and notes the changes among them; the faults are the caller's.
    pub(crate) fn read(
        &self,
        fd: i32,
        out: &mut [sys::uffd::Msg],
        mut change: impl FnMut(&sys::uffd::Msg),
    ) -> rustix::io::Result<usize> {
        let _reading = self.reading.lock();
        let n = sys::uffd::read(fd, out)?;
        out[..n].iter().for_each(&mut change);
        Ok(n)
    }

    /// Returns when every change that the kernel has announced to a caller's satisfaction is noted.
    pub(crate) fn caught_up(&self) {
        drop(self.reading.lock());
    }

    pub(crate) fn set_raw_changes(&self) {
        self.raw_changes.store(true, Ordering::SeqCst);
    }

    pub(crate) fn set_poisoned(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
    }

    pub(crate) fn has_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }

    pub(crate) fn raw_changes(&self) -> bool {
        self.raw_changes.load(Ordering::SeqCst)
    }

    /// While the guard lives no announcement is read, so nobody who changes a mapping past us is let go. Only in programs
    /// that have done so before: faults wait for the guard, too. And waiting for a fault meanwhile would be for ever.
    pub(crate) fn no_news(&self) -> Option<sys::MutexGuard<'_, ()>> {
        self.raw_changes().then(|| self.reading.lock())
    }

    /// We are about to change this ourselves, with the world held; until [`Faults::expect_nothing`].
    pub(crate) fn expect(&self, start: usize, end: usize) {
        self.expected.lock().push((start, end));
    }

    /// Our changes are done, and whatever they caused was announced.
    pub(crate) fn expect_nothing(&self) {
        self.expected.lock().clear();
    }

    /// A change that the kernel announces. False: it is our own doing.
    pub(crate) fn note(&self, change: Change) -> bool {
        let (start, end) = change.range();
        if self.expected.lock().iter().any(|&(s, e)| s <= start && end <= e) {
            return false;
        }
        let mut list = self.deferred.lock();
        let at = self.changes.fetch_add(1, Ordering::SeqCst);
        list.insert(at, Deferred::Change(change));
        self.waiting.store(list.len(), Ordering::SeqCst);
        true
    }

    /// A fault is put aside.
    pub(crate) fn defer(&self, addr: usize, tid: u32) {
        let mut list = self.deferred.lock();
        // A thread that is interrupted in its wait faults again.
        let known = |d: &Deferred| matches!(*d, Deferred::Fault(a, t) if a == addr && t == tid);
        if !list.iter().any(known) {
            list.push_back(Deferred::Fault(addr, tid));
        }
        // SeqCst with the load in `nudge`: a deferrer looks at the world again after this; whoever frees the world
        // looks at this after that.
        self.waiting.store(list.len(), Ordering::SeqCst);
    }

    /// Whether something is put aside.
    pub(crate) fn waits(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) != 0
    }

    /// Whether changes are put aside: no fault may be resolved before them.
    pub(crate) fn has_changes(&self) -> bool {
        self.changes.load(Ordering::SeqCst) != 0
    }

    /// The first change that was put aside.
    pub(crate) fn next_change(&self) -> Option<Change> {
        if !self.has_changes() {
            return None;
        }
        let mut list = self.deferred.lock();
        let Some(&Deferred::Change(change)) = list.front() else { return None };
        list.pop_front();
        self.changes.fetch_sub(1, Ordering::SeqCst);
        self.waiting.store(list.len(), Ordering::SeqCst);
        Some(change)
    }

    /// The first fault that was put aside, if no change waits.
    pub(crate) fn next_fault(&self) -> Option<(usize, u32)> {
        if !self.waits() {
            return None;
        }
        let mut list = self.deferred.lock();
        let Some(&Deferred::Fault(addr, tid)) = list.front() else { return None };
        list.pop_front();
        self.waiting.store(list.len(), Ordering::SeqCst);
        Some((addr, tid))
    }

    /// The page to ring with; it is registered with the userfaultfd.
    pub(crate) fn set_bell(&self, addr: usize) {
        self.bell.store(addr, Ordering::Release);
    }

    pub(crate) fn bell(&self) -> usize {
        self.bell.load(Ordering::Acquire)
    }

    /// If faults were put aside: makes a handler look at them, by an event of its own (dropping the bell page).
    /// Called without any lock.
    pub(crate) fn nudge(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        let bell = self.bell();
        if self.waiting.load(Ordering::SeqCst) != 0 && bell != 0 {
            crate::sys::drop_page(bell);
        }
    }

    /// This thread is one of the manager's.
    pub(crate) fn add_manager(&self, tid: u32) {
        for m in &self.managers {
            if m.compare_exchange(0, tid, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return;
            }
        }
    }

    pub(crate) fn is_manager(&self, tid: u32) -> bool {
        self.managers.iter().any(|m| m.load(Ordering::Relaxed) == tid)
    }

    /// In a forked child: the parent's threads are not here.
    ///
    /// # Safety
    /// The caller is the only thread of the process.
    pub(crate) unsafe fn renew(&self) {
        self.managers.iter().for_each(|m| m.store(0, Ordering::Relaxed));
        // The faults put aside are the parent's threads'; the thread that forked cannot be among them.
        // SAFETY: the caller's contract; the parent's handler may have held these.
        unsafe {
            self.deferred.renew(VecDeque::with_capacity(DEFERRED));
            self.reading.renew(());
            self.expected.renew(Vec::new());
        }
        self.changes.store(0, Ordering::SeqCst);
        self.waiting.store(0, Ordering::SeqCst);
        self.follow.reset();
        self.mail.reset();
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

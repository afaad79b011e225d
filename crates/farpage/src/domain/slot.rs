//! Process slots: what the domain knows of each of its processes.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::layout::SLOT_SIZE;
use crate::sys::FUTEX_OWNER_DIED;

/// State of a slot.
pub mod state {
    /// Nobody's.
    pub const FREE: u32 = 0;
    /// Taken by a process whose worker has not raised its life sign yet.
    pub const FORMING: u32 = 1;
    /// Its process has a life sign.
    pub const LIVE: u32 = 2;
    /// Somebody gives back what it held.
    pub const REAPING: u32 = 3;
}

/// Counters of one process; the domain's statistics are their sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum Counter {
    Faults,
    FaultsZero,
    FaultsDevice,
    Refaults,
    PagesOut,
    PagesIn,
    PagesClean,
    PagesSame,
    Prefetched,
    PinnedSkips,
    HeldSkips,
    StoreErrors,
    LoadErrors,
    Poisoned,
    OverBudget,
    Granted,
    Unmanaged,
    PlainRefs,
}
/// How many counters there are.
pub const COUNTERS: usize = Counter::PlainRefs as usize + 1;

/// One process of the domain. Lies in shared memory; zero is a valid (free) slot.
#[repr(C, align(64))]
pub struct Slot {
    /// See [`state`].
    pub state: AtomicU32,
    /// The process.
    pub pid: AtomicU32,
    /// A robust futex that the process's worker owns (in a child that was just forked: its only thread): the kernel marks it
    /// when the address space ends, by death or by `exec`. 0: nobody owns it yet. Before a forked child owns it, it is the
    /// ticket by which the child does (`domain/child.rs`).
    pub life: AtomicU32,
    /// Its reclaim worker sleeps on this: bumped when there is something to do.
    pub work: AtomicU32,
    /// Not 0: the kernel may hold plain references to this process's pages (see `docs/guarantees.md`).
    pub plain_refs: AtomicU32,
    /// Pages that others of the tree want this process to give back to the kernel.
    pub wanted: AtomicU32,
    /// Pages of DRAM charged to it.
    pub charge: AtomicU64,
    /// When its oldest granule arrived (a stamp of the domain's clock), `u64::MAX` if it has none.
    pub oldest: AtomicU64,
    /// Pages that it has pinned.
    pub pinned: AtomicU64,
    /// Since when the child that this slot was prepared for is there or never will be (milliseconds).
    pub over_since: AtomicU64,
    /// Who prepared it, while that may be of interest.
    pub parent: AtomicU32,
    _line: AtomicU32,
    /// See [`Counter`].
    pub counters: [AtomicU64; COUNTERS],
    /// Bumped by an audit that wants the process to compare its charge with what is there.
    pub audit_asked: AtomicU32,
    /// As of which question the answer is.
    pub audit_answered: AtomicU32,
    /// The answer: pages charged in the upper half, pages found in the lower.
    pub audit_answer: AtomicU64,
}

const _: () = assert!(size_of::<Slot>() <= SLOT_SIZE);

impl Slot {
    /// Whether its address space has ended (death or `exec`).
    pub fn is_dead(&self) -> bool {
        // Acquire: pairs with the kernel's store when the owner died.
        self.life.load(Ordering::Acquire) & FUTEX_OWNER_DIED != 0
    }

    /// Adds to a counter.
    pub fn count(&self, c: Counter, n: u64) {
        // Relaxed: a statistic, ordered with nothing.
        self.counters[c as usize].fetch_add(n, Ordering::Relaxed);
    }
}

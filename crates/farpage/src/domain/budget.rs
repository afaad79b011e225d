//! The DRAM budget: one for the tree.
//!
//! The truth is each process's own charge; the total is their sum, so that a killed process takes its charge with
//! it and no counter can drift. Charges change rarely (frames circulate between a program and its staging
//! slots), so summing is cheap.

use std::sync::atomic::Ordering;

use super::Domain;
use crate::frame::Owner;

impl Domain {
    /// The budget in pages.
    pub fn budget(&self) -> u64 {
        self.config.dram / crate::PAGE_SIZE as u64
    }

    /// The most pages that may be pinned in the whole tree (see [`crate::space::Space::pin`]).
    pub fn pin_limit(&self) -> u64 {
        self.config.max_pinned.map_or(self.budget() / 2, |bytes| bytes / crate::PAGE_SIZE as u64)
    }

    /// Pages that are pinned in the whole tree; a page counts once for each pin.
    pub fn pinned(&self) -> u64 {
        self.slots().map(|(_, s)| s.pinned.load(Ordering::SeqCst)).sum()
    }

    /// Pages charged to the whole tree.
    pub fn charged(&self) -> u64 {
        self.slots().map(|(_, s)| s.charge.load(Ordering::Relaxed)).sum()
    }

    /// Charges `pages` to `owner` if the tree stays within `limit` pages. Two at once may both be refused, but
    /// never both admitted beyond it: each adds first and looks then.
    #[doc(hidden)]
    pub fn try_charge(&self, owner: Owner, pages: u64, limit: u64) -> bool {
        let charge = &self.slot(owner).charge;
        // SeqCst: of two who charge at once, at least one sees the other's.
        charge.fetch_add(pages, Ordering::SeqCst);
        let total: u64 = self.slots().map(|(_, s)| s.charge.load(Ordering::SeqCst)).sum();
        if total > limit {
            charge.fetch_sub(pages, Ordering::SeqCst);
            return false;
        }
        self.words.peak.fetch_max(total, Ordering::Relaxed);
        true
    }

    /// Charges beyond the budget: the program must go on. Counted by the caller.
    #[doc(hidden)]
    pub fn force_charge(&self, owner: Owner, pages: u64) {
        self.slot(owner).charge.fetch_add(pages, Ordering::SeqCst);
        self.words.peak.fetch_max(self.charged(), Ordering::Relaxed);
    }

    /// Gives a charge back.
    #[doc(hidden)]
    pub fn uncharge(&self, owner: Owner, pages: u64) {
        let before = self.slot(owner).charge.fetch_sub(pages, Ordering::SeqCst);
        debug_assert!(before >= pages);
    }
}

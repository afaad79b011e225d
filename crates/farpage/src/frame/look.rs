//! Looking at a whole table at once, as an audit does.

use super::platform::Ordering;
use super::{FROZEN, FrameTable, Pfn, count, transit};

/// What a frame's word said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Look(u32);

impl Look {
    /// The references.
    pub fn count(self) -> u32 {
        count(self.0)
    }

    /// Whether somebody was changing the count, or had frozen it: then no statement can be made of who holds it.
    pub fn is_changing(self) -> bool {
        self.0 & FROZEN != 0 || transit(self.0) != 0
    }
}

impl FrameTable {
    /// The first frame of `[start, end)` that is in use, or whose storage is just being handed back; SeqCst, for those who
    /// have put up a sign first and look then.
    pub fn first_used(&self, start: Pfn, end: Pfn) -> Option<Pfn> {
        // Acquire: frames beyond the mark were never in use. Who raises it for a frame takes a reference afterwards, and
        // looks for signs after that.
        let used = u32::try_from(self.groups_used() * 64).unwrap_or(u32::MAX);
        self.runs(start, end.min(used)).flatten().find(|pfn| self.word(*pfn).load(Ordering::SeqCst) != 0)
    }

    /// The word of each frame that may ever have been in use, in the order of frame numbers. Each is read for
    /// itself: another may change before the next is read.
    pub fn look(&self) -> Vec<Look> {
        // Acquire pairs with the Release of `settle`, `put` and `unfreeze`: whoever sees such a word and reads the
        // entries then, sees the entries that go with it.
        self.words_used().map(|(_, w)| Look(w.load(Ordering::Acquire))).collect()
    }
}

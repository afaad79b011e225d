//! Page entries: what a process knows of each of its pages, 8 bytes each.
//!
//! | entry | the page |
//! |---|---|
//! | 0 | is the kernel's: in DRAM, or never touched |
//! | `FRAME` | is in DRAM (or staged); a clean copy, or an older one, is on a device |
//! | `AWAY + FRAME` | is on a device |
//! | `AWAY + SAME` | is one 32-bit value repeated; takes no frame |
//! | `AWAY + LOST` | could not be read back: SIGBUS for who touches it |
//!
//! Each entry with `FRAME` holds one reference to that frame, whoever's it is after a fork.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::frame::Pfn;
use crate::sys::SharedMap;

const AWAY: u64 = 1;
const FRAME: u64 = 2;
const SAME: u64 = 4;
const LOST: u64 = 8;

/// A decoded page entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// In DRAM, staged, or never touched; no copy elsewhere.
    Kernel,
    /// In DRAM or staged, with a copy on device `.0` in frame `.1`.
    Copied(u8, Pfn),
    /// On device `.0` in frame `.1`.
    Away(u8, Pfn),
    /// This value repeated.
    Same(u32),
    /// Lost.
    Lost,
}

impl Entry {
    /// The frame that this entry holds a reference to.
    pub fn frame(self) -> Option<(u8, Pfn)> {
        match self {
            Entry::Copied(d, p) | Entry::Away(d, p) => Some((d, p)),
            _ => None,
        }
    }

    /// Whether the page is not in DRAM.
    pub fn is_away(self) -> bool {
        matches!(self, Entry::Away(..) | Entry::Same(_) | Entry::Lost)
    }

    fn encode(self) -> u64 {
        let frame = |d: u8, p: Pfn| FRAME | u64::from(d) << 8 | u64::from(p) << 32;
        match self {
            Entry::Kernel => 0,
            Entry::Copied(d, p) => frame(d, p),
            Entry::Away(d, p) => AWAY | frame(d, p),
            Entry::Same(v) => AWAY | SAME | u64::from(v) << 32,
            Entry::Lost => AWAY | LOST,
        }
    }

    pub(super) fn decode(w: u64) -> Self {
        let value = (w >> 32) as u32;
        let device = (w >> 8) as u8;
        match w & (AWAY | FRAME | SAME | LOST) {
            FRAME => Entry::Copied(device, value),
            w if w == AWAY | FRAME => Entry::Away(device, value),
            w if w == AWAY | SAME => Entry::Same(value),
            w if w == AWAY | LOST => Entry::Lost,
            _ => Entry::Kernel,
        }
    }
}

/// The page entries of one process: lookup is arithmetic.
#[derive(Clone, Copy)]
pub struct Entries {
    words: &'static [AtomicU64],
}

impl Entries {
    /// Over a window ([`super::Domain::map_window`]).
    pub fn new(window: &SharedMap) -> Self {
        Self { words: window.area(0, window.len()).atomics64() }
    }

    /// The entry of the page at `addr`.
    pub fn get(&self, addr: usize) -> Entry {
        // Acquire pairs with the Release in `set`; besides, the granule's lock orders the process's own threads.
        Entry::decode(self.words[addr / crate::PAGE_SIZE].load(Ordering::Acquire))
    }

    /// Replaces it.
    pub fn set(&self, addr: usize, e: Entry) {
        // Release: a reaper that sees the entry sees the count that goes with it.
        self.words[addr / crate::PAGE_SIZE].store(e.encode(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trips(d in 0u8..16, p: u32, kind in 0..5) {
            let e = match kind {
                0 => Entry::Kernel,
                1 => Entry::Copied(d, p),
                2 => Entry::Away(d, p),
                3 => Entry::Same(p),
                _ => Entry::Lost,
            };
            prop_assert_eq!(Entry::decode(e.encode()), e);
        }
    }
}

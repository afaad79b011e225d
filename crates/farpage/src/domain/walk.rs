//! Walking the page entries of a process from outside it.

use std::sync::atomic::Ordering;

use rustix::fs::SeekFrom;

use super::Domain;
use super::entry::{Entries, Entry};
use super::layout::{self, WINDOW};
use crate::frame::Owner;
use crate::sys::SharedMap;

impl Domain {
    /// Calls `f` with every entry of `owner` that is not `Kernel`. `window`: a mapping of its entries. Only the parts
    /// of it that were ever written are looked at: a look at another would make the kernel allocate it.
    pub(super) fn each_entry(&self, owner: Owner, window: &SharedMap, mut f: impl FnMut(Entry)) {
        let entries = Entries::new(window);
        let base = layout::window_offset(owner);
        let end = base + WINDOW as u64;
        let mut at = base;
        while let Ok(data) = rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            if data >= end {
                break;
            }
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data)).unwrap_or(end).min(end);
            let words = &entries.raw()[(data - base) as usize / 8..(hole - base) as usize / 8];
            for word in words {
                // Acquire pairs with the Release in `Entries::set`.
                match Entry::decode(word.load(Ordering::Acquire)) {
                    Entry::Kernel => {}
                    e => f(e),
                }
            }
            at = hole;
        }
    }
}

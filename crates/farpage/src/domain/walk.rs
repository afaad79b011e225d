//! Walking the page entries of a process from outside it.

use rustix::fs::SeekFrom;

use super::entry::{Entries, Entry};
use super::layout::{self, WINDOW};
use super::{Domain, DomainError};
use crate::frame::Owner;
use crate::sys::SharedMap;

impl Domain {
    /// [`Self::each_entry`] with a mapping of its own.
    ///
    /// # Errors
    /// The entries cannot be mapped.
    pub(super) fn for_entries(&self, owner: Owner, f: impl FnMut(usize, Entry)) -> Result<(), DomainError> {
        let window = self.map_window(owner)?;
        self.each_entry(owner, &window, f);
        window.unmap();
        Ok(())
    }

    /// Calls `f` with every entry of `owner` that is not `Kernel`, and the address of its page. `window`: a mapping of its entries. Only the parts
    /// of it that were ever written are looked at: a look at another would make the kernel allocate it.
    pub(super) fn each_entry(&self, owner: Owner, window: &SharedMap, mut f: impl FnMut(usize, Entry)) {
        let entries = Entries::new(window);
        let base = layout::window_offset(owner);
        let end = base + WINDOW as u64;
        let mut at = base;
        while let Ok(data) = rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            if data >= end {
                break;
            }
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data)).unwrap_or(end).min(end);
            for page in (data - base) as usize / 8..(hole - base) as usize / 8 {
                let addr = page * crate::PAGE_SIZE;
                match entries.get(addr) {
                    Entry::Kernel => {}
                    entry => f(addr, entry),
                }
            }
            at = hole;
        }
    }
}

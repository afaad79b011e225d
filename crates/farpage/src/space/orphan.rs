//! Children that came into being past the C library, by a raw system call: nobody has prepared page entries for them,
//! and no thread of ours runs in them. What their parent has away is put into them, through the userfaultfd that the
//! kernel hands us with its announcement, and then they go on without us: outside the budget, with their memory whole.
//! Where a page cannot be put there it is poisoned: a child never reads zeros for something else.

use std::sync::atomic::Ordering;

use super::range::{GRANULE, flag};
use super::{Space, World};
use crate::device::{DeviceError, LoadOp};
use crate::domain::Counter;
use crate::domain::entry::Entry;
use crate::fault::Change;
use crate::sys::uffd::{MSG_BATCH, Msg, Stop, Uffd};
use crate::{PAGE_SIZE, Page};

/// A child, and what it has done to its mappings since: it runs while we fill it.
struct Orphan {
    uffd: Uffd,
    history: Vec<Change>,
}

impl Orphan {
    /// Where the page that was at `at` when the child was forked is now.
    fn place(&self, mut at: usize) -> Option<usize> {
        for &change in &self.history {
            let (start, end) = change.range();
            if at < start || end <= at {
                continue;
            }
            match change {
                Change::Moved(from, to, _) => at = at - from + to,
                _ => return None,
            }
        }
        Some(at)
    }

    /// Puts a page in place, or poison for `None`. Announcements that come first are read; a grandchild is returned.
    fn give(&mut self, page_at: usize, page: Option<&Page>, grandchildren: &mut Vec<Orphan>) {
        while let Some(at) = self.place(page_at) {
            let stop = match page {
                Some(page) => self.uffd.copy(at, page.0.as_ptr() as usize, PAGE_SIZE).1,
                None => self.uffd.poison(at, PAGE_SIZE).err(),
            };
            match stop {
                Some(Stop::Again) => self.hear(grandchildren),
                // Done; or the page is there, or its mapping is gone.
                None | Some(Stop::Exists | Stop::Gone) => return,
                Some(_) if page.is_some() => return self.give(page_at, None, grandchildren),
                // It waits there until we let go of its userfaultfd, and then reads zeros: that has to be known.
                Some(why) => {
                    return crate::sys::say(&format!(
                        "a page at {at:#x} of a child that was forked by a raw system call is lost ({why:?}): it reads zeros there"
                    ));
                }
            }
        }
    }

    fn hear(&mut self, grandchildren: &mut Vec<Orphan>) {
        let mut messages = [Msg::Unknown(0); MSG_BATCH];
        let n = crate::sys::uffd::read(self.uffd.raw(), &mut messages).unwrap_or(0);
        for m in &messages[..n] {
            match *m {
                Msg::Remove { start, end } => self.history.push(Change::Removed(start, end)),
                Msg::Unmap { start, end } => self.history.push(Change::Unmapped(start, end)),
                Msg::Remap { from, to, len } => self.history.push(Change::Moved(from, to, len)),
                Msg::Fork(fd) => {
                    grandchildren.push(Orphan { uffd: Uffd::from_raw(fd), history: self.history.clone() });
                }
                // It waits until its page is there, or until we let go of it.
                Msg::Fault { .. } | Msg::Unknown(_) => {}
            }
        }
        crate::sys::yield_now();
    }
}

impl Space {
    /// Gives a child everything that this process has away. The world is held since before anything was brought in or
    /// evicted by a fault that came after the fork.
    pub(super) fn fill_orphan(&self, world: &World) {
        let child = match world.relay.receive() {
            Ok(child) => Uffd::from(child),
            Err(e) => {
                crate::sys::fatal(&format!("cannot fill a child that was forked by a raw system call: {e}"))
            }
        };
        let before = self.slot().counters[Counter::Unmanaged as usize].fetch_add(1, Ordering::Relaxed);
        if before == 0 {
            crate::sys::say(&format!(
                "process {} forks by raw system calls, past the C library: its children run unmanaged, outside the budget",
                std::process::id()
            ));
        }
        let mut orphans = vec![Orphan { uffd: child, history: Vec::new() }];
        let mut buffer = Box::new(Page([0; PAGE_SIZE]));
        for range in world.ranges.iter().filter(|r| !r.not_for_children) {
            for found in range.iter().filter(|f| f.granule.has(flag::ENTRIES)) {
                let base = found.start / GRANULE * GRANULE;
                let slot = found.granule.slot();
                for at in (found.start..found.end).step_by(PAGE_SIZE) {
                    let i = (at - base) / PAGE_SIZE;
                    let staged = slot.filter(|&s| self.slots.staged(s) & (1 << i) != 0);
                    let page = match staged {
                        // With the world held exclusively nobody settles it.
                        Some(slot) => Some(self.slots.staged_page(slot, i)),
                        None => match self.entries.get(at) {
                            Entry::Kernel | Entry::Copied(..) => continue,
                            away => self.read_away(away, &mut buffer).then_some(&*buffer),
                        },
                    };
                    let mut k = 0;
                    while k < orphans.len() {
                        let mut grandchildren = Vec::new();
                        orphans[k].give(at, page, &mut grandchildren);
                        orphans.append(&mut grandchildren);
                        k += 1;
                    }
                }
            }
        }
    }

    /// Reads a page that is away. False: it is lost.
    fn read_away(&self, entry: Entry, page: &mut Page) -> bool {
        match entry {
            Entry::Away(dev, pfn) => {
                let mut op = [LoadOp { pfn, page, result: Err(DeviceError::Corrupt) }];
                let (_, bad, result) = self.domain.pagemap(dev).load(&mut op);
                self.count(Counter::LoadErrors, bad);
                result.is_ok()
            }
            Entry::Same(v) => {
                page.fill(v);
                true
            }
            _ => false,
        }
    }
}

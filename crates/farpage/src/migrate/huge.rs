//! Huge pages on a device: 2 MiB that left as one page come back as one page when any of it is touched. When part of it comes
//! back by itself, or is unmapped, what is left are small pages.

use super::{Outcome, WINDOW};
use crate::PAGE_SIZE;
use crate::domain::entry::Entry;
use crate::reclaim::Hands;
use crate::space::range::{Found, GRANULE, Range, flag};
use crate::space::{Space, World};
use crate::sys::{self, BlockedSignals};

impl Space {
    /// The 2 MiB at `block` (aligned), all of which one device has, are one page. Otherwise nothing happens.
    #[doc(hidden)]
    pub fn set_huge_on_device(&self, block: usize) {
        let _signals = BlockedSignals::new();
        let world = self.world.read();
        if let Some(range) = world.ranges.find(block)
            && self.whole_on_device(range, block).is_some()
        {
            range.granule(block).granule.set(flag::HUGE);
        }
    }

    /// The huge pages on devices that have some of their bytes in `[start, end)`: first byte and device, in order.
    #[doc(hidden)]
    pub fn huge_on_devices(&self, start: usize, end: usize) -> Vec<(usize, u8)> {
        let _signals = BlockedSignals::new();
        let world = self.world.read();
        let blocks = (start / WINDOW * WINDOW, end.saturating_add(WINDOW - 1) / WINDOW * WINDOW);
        let granules = world.ranges.granules(blocks.0, blocks.1).filter(|(f, ..)| f.granule.has(flag::HUGE));
        granules
            .filter_map(|(f, at, _)| Some((at, self.whole_on_device(f.range, at)?)))
            .filter(|&(at, _)| at < end && at + WINDOW > start)
            .collect()
    }

    /// The device that has all of the block.
    fn whole_on_device(&self, range: &Range, block: usize) -> Option<u8> {
        let inside = block.is_multiple_of(WINDOW) && range.start <= block && block + WINDOW <= range.end;
        let with_entries = |at: usize| range.granule(at).granule.has(flag::ENTRIES);
        if !inside || !(block..block + WINDOW).step_by(GRANULE).all(with_entries) {
            return None;
        }
        let device = |at: usize| match self.entries.get(at) {
            Entry::Away(device, _) => Some(device),
            _ => None,
        };
        let first = device(block)?;
        (block..block + WINDOW).step_by(PAGE_SIZE).all(|at| device(at) == Some(first)).then_some(first)
    }

    /// Pages of `[start, end)`, which lies in one block, are about to leave: if the block is no huge page any more, it does not
    /// become one by being whole again.
    pub(super) fn forget_huge(&self, range: &Range, start: usize) {
        let block = start / WINDOW * WINDOW;
        if range.start <= block
            && range.granule(block).granule.has(flag::HUGE)
            && self.whole_on_device(range, block).is_none()
        {
            range.granule(block).granule.clear(flag::HUGE);
        }
    }

    /// A fault on a page that is away: if it is part of a huge page, all of that comes, and is one page again if the kernel has
    /// one. False: the page is still to be brought.
    pub(crate) fn fault_huge(
        &self,
        world: &World,
        found: &Found<'_>,
        addr: usize,
        hands: &mut Hands,
    ) -> bool {
        let (range, block) = (found.range, addr / WINDOW * WINDOW);
        if block < range.start || !range.granule(block).granule.has(flag::HUGE) {
            return false;
        }
        let whole = self.whole_on_device(range, block).is_some();
        // A page of it alone, or all: it is none any more.
        range.granule(block).granule.clear(flag::HUGE);
        if !whole {
            return false;
        }
        let mut pages = [Outcome::There; WINDOW / PAGE_SIZE];
        let mut room = pages.len();
        self.migrate_back(world, range, (block, block + WINDOW), &mut room, &mut pages, hands);
        if pages.iter().all(|&o| o == Outcome::Moved) {
            // What does not become huge again stays as it is.
            let _small = sys::collapse(block, WINDOW);
        }
        !self.entries.get(addr).is_away()
    }
}

//! The second half of the way out: staged pages are found clean, same-filled, or are stored on a device.
//!
//! Until the device has confirmed the store, the staged page is the page: a fault takes it back at any moment,
//! and what was stored for nothing is put.

use crate::device::{DeviceError, StoreOp, Sum};
use crate::domain::Counter;
use crate::domain::entry::Entry;
use crate::frame::Pfn;
use crate::pagemap::Pagemap;
use crate::space::bits::members;
use crate::space::puts::Puts;
use crate::space::range::{Found, GRANULE, GRANULE_PAGES, flag};
use crate::space::{Space, World};
use crate::{PAGE_SIZE, Page};

use super::Hands;

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Some pages are settled, more are staged.
    More,
    /// The slot is done with and no longer staged.
    Done,
    /// No device takes what is left.
    Full,
}

/// A page that has to be stored.
struct Dirty {
    page: usize,
    sum: Sum,
    stored: Option<(u8, Pfn)>,
    error: Option<DeviceError>,
}

/// Where pages are to settle, and what has become of them: sets of the slot's pages.
#[derive(Default)]
pub(crate) struct Settling {
    /// On this device and no other, each page in a frame of its own (a migration); else on the first that takes the page.
    pub on: Option<u8>,
    /// Settled.
    pub moved: u64,
    /// Not taken by the device; not tried again.
    pub refused: u64,
    /// Of these, because the device failed, not because it is full.
    pub failed: u64,
}

impl Space {
    /// Settles some of what has been staged longest, and returns the slot to its queue if that was not all. `None`: nothing is
    /// staged.
    pub(crate) fn settle_next(&self, world: &World, hands: &mut Hands) -> Option<Settled> {
        let slot = self.slots.oldest()?;
        let settled = self.settle(world, slot, hands);
        if settled != Settled::Done {
            self.slots.unsettled(slot, settled == Settled::More);
        }
        Some(settled)
    }

    /// Settles some pages of a slot that the caller has taken with [`crate::space::slots::Slots::oldest`]. Unless `Done`, he
    /// returns it with `unsettled`.
    pub(crate) fn settle(&self, world: &World, slot: u32, hands: &mut Hands) -> Settled {
        self.settle_on(world, slot, hands, &mut Settling::default())
    }

    /// As [`Space::settle`], where `job` says.
    pub(crate) fn settle_on(
        &self,
        world: &World,
        slot: u32,
        hands: &mut Hands,
        job: &mut Settling,
    ) -> Settled {
        let _working = self.quiet.read();
        let addr = self.slots.granule_of(slot);
        // Under the lock: who attaches or takes back is done with it.
        let attached = |f: &Found<'_>| {
            let _guard = f.granule.lock();
            f.granule.slot() == Some(slot)
        };
        let found = world.ranges.granule(addr).filter(attached);
        let Some(found) = found else {
            // Unmapped, or all of it came back.
            self.slots.detach(slot);
            return Settled::Done;
        };
        let base = addr / GRANULE * GRANULE;
        // To memory, pages go straight from where they are staged; what may take longer, or fails in its own ways, works on
        // copies and without the lock.
        let in_place = self.targets(job.on).all(|map| map.device.is_memory());
        let mut dirty: Vec<Dirty> = Vec::with_capacity(GRANULE_PAGES);
        let mut puts = Puts::new(&self.domain, self.me());
        let mut stored_all = true;
        {
            let _guard = found.granule.lock();
            let staged = self.slots.staged(slot);
            let mut freed = 0u64;
            let (mut clean, mut same) = (0, 0);
            self.fetch(slot, staged, base);
            self.slots.begin_copy(slot);
            for i in members(staged & !job.refused) {
                let at = base + i * PAGE_SIZE;
                // The page is staged and we hold its granule's lock.
                let page = self.slots.staged_page(slot, i);
                let old = self.entries.get(at);
                if job.on.is_none()
                    && let Some(value) = same_filled(&page.0)
                {
                    puts.begin(old);
                    self.entries.set(at, Entry::Same(value));
                    freed |= 1 << i;
                    same += 1;
                    continue;
                }
                let copy = old.frame().filter(|&(dev, _)| job.on.is_none_or(|on| on == dev));
                let sum = if in_place && copy.is_none() { Sum::default() } else { Sum::of(page) };
                match copy {
                    Some((dev, pfn)) if self.domain.pagemap(dev).device.sum(pfn) == sum => {
                        self.entries.set(at, Entry::Away(dev, pfn));
                        freed |= 1 << i;
                        clean += 1;
                    }
                    _ => {
                        if !in_place {
                            hands.pages[dirty.len()].0.copy_from_slice(&page.0);
                        }
                        dirty.push(Dirty { page: i, sum, stored: None, error: None });
                    }
                }
            }
            if in_place && !dirty.is_empty() {
                stored_all = self.store(&mut dirty, |d, _| self.slots.staged_page(slot, d.page), job);
                freed |= self.publish(&dirty, base, u64::MAX, &mut puts);
                dirty.clear();
            }
            job.moved |= freed;
            self.slots.set_staged(slot, staged & !freed);
            self.retire(slot, freed);
            self.count(Counter::PagesClean, clean);
            self.count(Counter::PagesSame, same);
        }
        if !dirty.is_empty() {
            stored_all = self.store(&mut dirty, |_, k| &hands.pages[k], job);
        }
        let mut undone: Vec<(u8, Pfn)> = Vec::new();
        let (done, untried) = {
            let _guard = found.granule.lock();
            let staged = self.slots.staged(slot);
            let freed = self.publish(&dirty, base, staged & !self.slots.rewritten(slot), &mut puts);
            // Taken back meanwhile, or changed by a device: stored for nothing.
            undone.extend(dirty.iter().filter(|d| freed & (1 << d.page) == 0).filter_map(|d| d.stored));
            job.moved |= freed;
            self.slots.set_staged(slot, staged & !freed);
            self.retire(slot, freed);
            let done = staged & !freed == 0;
            // (Another's by now, if all that was staged here was dropped meanwhile.)
            if done && found.granule.slot() == Some(slot) {
                found.granule.set_slot(None);
                if found.granule.clear(flag::REQUEUE) {
                    self.enqueue(&found);
                }
            }
            (done, staged & !freed & !job.refused != 0)
        };
        for (dev, pfn) in undone {
            self.domain.pagemap(dev).put_in_transit(&[pfn], self.me());
        }
        drop(puts);
        if done {
            self.slots.detach(slot);
            Settled::Done
        } else if if job.on.is_some() { untried } else { stored_all } {
            Settled::More
        } else {
            Settled::Full
        }
    }

    /// The devices that pages may settle on.
    fn targets(&self, on: Option<u8>) -> impl Iterator<Item = &Pagemap> {
        self.domain.pagemaps.iter().filter(move |map| on.is_none_or(|on| on == map.id))
    }

    /// What has been stored, and is still among the `staged`, is on its device from now on. Under the granule's lock; returns the
    /// set.
    fn publish(&self, dirty: &[Dirty], base: usize, staged: u64, puts: &mut Puts<'_>) -> u64 {
        let mut freed = 0;
        for d in dirty.iter().filter(|d| staged & (1 << d.page) != 0) {
            let Some((dev, pfn)) = d.stored else { continue };
            let at = base + d.page * PAGE_SIZE;
            puts.begin(self.entries.get(at));
            self.entries.set(at, Entry::Away(dev, pfn));
            self.domain.pagemap(dev).frames.settle(pfn);
            freed |= 1 << d.page;
        }
        freed
    }

    /// Has what is needed first of the staged pages fetched into the cache, all at the same time.
    fn fetch(&self, slot: u32, staged: u64, base: usize) {
        for i in members(staged) {
            crate::sys::prefetch(self.slots.addr(slot, i), 256);
        }
        for map in &self.domain.pagemaps {
            let copies = members(staged).filter_map(|i| match self.entries.get(base + i * PAGE_SIZE) {
                Entry::Copied(dev, pfn) if dev == map.id => Some(pfn),
                _ => None,
            });
            map.device.soon(&mut { copies });
        }
    }

    /// Stores pages (`page` says where number so-and-so lies) on the first device that takes them, of those that the job allows.
    /// False if some found no place.
    fn store<'p>(
        &self,
        dirty: &mut [Dirty],
        page: impl Fn(&Dirty, usize) -> &'p Page,
        job: &mut Settling,
    ) -> bool {
        for map in self.targets(job.on) {
            let mut ops: Vec<StoreOp<'_>> = Vec::with_capacity(dirty.len());
            let mut which: Vec<usize> = Vec::with_capacity(dirty.len());
            for (k, d) in dirty.iter().enumerate().filter(|(_, d)| d.stored.is_none()) {
                let Some(pfn) = map.alloc(self.me()) else { break };
                ops.push(StoreOp { pfn, page: page(d, k), sum: d.sum, result: Err(DeviceError::Full) });
                which.push(k);
            }
            if ops.is_empty() {
                continue;
            }
            map.device.store(&mut ops, self.me());
            for (op, &k) in ops.iter().zip(&which) {
                match &op.result {
                    Ok(()) => dirty[k].stored = Some((map.id, op.pfn)),
                    Err(e) => {
                        map.put_in_transit(&[op.pfn], self.me());
                        if *e != DeviceError::Full {
                            self.store_failed(map.device.name(), e);
                        }
                        dirty[k].error = Some(e.clone());
                    }
                }
            }
            if dirty.iter().all(|d| d.stored.is_some()) {
                return true;
            }
        }
        for d in dirty.iter().filter(|d| d.stored.is_none()) {
            if job.on.is_some() {
                job.refused |= 1 << d.page;
            }
            if matches!(d.error, Some(ref e) if *e != DeviceError::Full) {
                job.failed |= 1 << d.page;
            }
        }
        false
    }

    pub(crate) fn store_failed(&self, device: &str, e: &DeviceError) {
        self.count(Counter::StoreErrors, 1);
        // The first of each thousand, not to flood the program's stderr.
        if self.slot().counters[Counter::StoreErrors as usize].load(std::sync::atomic::Ordering::Relaxed)
            % 1000
            == 1
        {
            crate::sys::say(&format!(
                "device {device} could not store a page ({e}); it stays in DRAM or goes to the next device"
            ));
        }
    }

    /// Gives up clean copies of pages that are in DRAM, to make room for pages that are not. Returns how many.
    pub(crate) fn drop_copies(&self, world: &World, want: usize) -> usize {
        let mut n = 0;
        for range in world.ranges.iter() {
            for found in range.iter().filter(|f| f.granule.has(flag::ENTRIES)) {
                let mut puts = Puts::new(&self.domain, self.me());
                {
                    let _guard = found.granule.lock();
                    for at in (found.start..found.end).step_by(PAGE_SIZE) {
                        let e = self.entries.get(at);
                        if matches!(e, Entry::Copied(..)) {
                            puts.begin(e);
                            self.entries.set(at, Entry::Kernel);
                            n += 1;
                        }
                    }
                }
                drop(puts);
                if n >= want {
                    return n;
                }
            }
        }
        n
    }
}

/// The value that fills the page, if it is one 32-bit value repeated.
fn same_filled(page: &[u8; PAGE_SIZE]) -> Option<u32> {
    let first = u64::from_ne_bytes(std::array::from_fn(|i| page[i]));
    let value = first as u32;
    if (first >> 32) as u32 != value {
        return None;
    }
    // Most pages differ early; 64 bytes at a time lets the compiler use wide registers.
    for chunk in page.chunks_exact(64) {
        let mut diff = 0;
        for w in chunk.chunks_exact(8) {
            diff |= u64::from_ne_bytes(std::array::from_fn(|i| w[i])) ^ first;
        }
        if diff != 0 {
            return None;
        }
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_filled_means_every_word() {
        let mut page = [7u8; PAGE_SIZE];
        assert_eq!(same_filled(&page), Some(0x0707_0707));
        page[PAGE_SIZE - 1] = 8;
        assert_eq!(same_filled(&page), None);
        let mut page = [0u8; PAGE_SIZE];
        assert_eq!(same_filled(&page), Some(0));
        page[2] = 1;
        assert_eq!(same_filled(&page), None);
        for w in page.chunks_exact_mut(4) {
            w.copy_from_slice(&0x1234_5678u32.to_ne_bytes());
        }
        assert_eq!(same_filled(&page), Some(0x1234_5678));
    }
}

//! Compaction: frames move within a device, so that runs of them become free, and a device can shrink while it is in use.
//!
//! A frame moves if the one reference to it is this process's page entry: its count is frozen at exactly that one while it is
//! copied. A frame with one reference more (a forked child's, somebody's who is just reading it) stays where it is, and
//! so do a page that is mapped in place, and the frames of the domain's other processes: each compacts its own.

use super::MigrateError;
use crate::PAGE_SIZE;
use crate::device::{DeviceError, LoadOp, StoreOp, Sum};
use crate::domain::entry::Entry;
use crate::frame::Pfn;
use crate::reclaim::Hands;
use crate::space::ops::window;
use crate::space::puts::Puts;
use crate::space::range::Found;
use crate::space::{Space, World};

/// Frames of a huge page: what a device is compacted to multiples of.
const RUN: u32 = 512;

/// What a compaction came to.
///
/// See the example of [`Space::shrink`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compacted {
    /// Frames that were moved.
    pub moved: usize,
    /// Clean copies of pages in DRAM that were given up instead.
    pub dropped: usize,
    /// Frames of this process that stay where they are: shared, or there was no room below, or the device failed.
    pub stayed: usize,
    /// Frames that are in use above the limit still, whoever's they are.
    pub in_use: usize,
    /// Bytes of memory that the device gave back.
    pub given_back: u64,
}

struct Progress {
    dev: u8,
    limit: Pfn,
    at: usize,
    result: Compacted,
}

impl Space {
    /// Makes `dev` have `frames` frames (at least one) from now on: none at or above is allocated any more, and this process's
    /// pages that are there move below. What stays in use above is told; it is free when it is put. To let it grow again,
    /// shrink it to more frames.
    ///
    /// ```
    /// use farpage::{Domain, Target};
    ///
    /// let space = Domain::builder().dram("8M").device("mem:16M").build()?.start_inline()?;
    /// let mut v = space.region_from_fn(8 << 20, |i| (i >> 12) as u8)?;
    /// space.migrate(v.pages(..), Target::Device(0))?;
    /// v.resize(1 << 20)?; // 256 pages are left, in frames anywhere
    ///
    /// let result = space.compact(0)?;
    /// assert_eq!(result.stayed, 0);
    /// // The 4096 frames of the device become 512, and the memory behind the others is the system's.
    /// let result = space.shrink(0, 512)?;
    /// assert_eq!((result.in_use, result.stayed), (0, 0));
    /// assert_eq!(v[255 << 12], 255);
    /// space.shrink(0, u32::MAX)?; // all of it again
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`MigrateError::NoDevice`].
    pub fn shrink(&self, dev: u8, frames: u32) -> Result<Compacted, MigrateError> {
        let map = self.domain.pagemaps.get(usize::from(dev)).ok_or(MigrateError::NoDevice(dev))?;
        let limit = frames.clamp(1, map.frames.len() as Pfn);
        map.set_limit(limit);
        let progress = Progress { dev, limit, at: 0, result: Compacted::default() };
        let mut result = self.on_worker(progress, Space::compact_next).result;
        let all = map.frames.len() as Pfn;
        result.in_use = (limit..all).filter(|&pfn| map.frames.count(pfn) != 0).count();
        result.given_back = map.device.shrunk(limit, all);
        Ok(result)
    }

    /// Moves this process's pages on `dev` to the lowest frames that are free, so that the others are free in runs of 2 MiB.
    ///
    /// See the example of [`Space::shrink`].
    ///
    /// # Errors
    /// [`MigrateError::NoDevice`].
    pub fn compact(&self, dev: u8) -> Result<Compacted, MigrateError> {
        let map = self.domain.pagemaps.get(usize::from(dev)).ok_or(MigrateError::NoDevice(dev))?;
        let before = map.limit();
        let needed = (map.frames.used() as Pfn).next_multiple_of(RUN);
        let result = self.shrink(dev, needed.min(before));
        map.set_limit(before);
        result
    }

    /// One granule's part. True: that was the last.
    fn compact_next(&self, world: &World, hands: &mut Hands, p: &mut Progress) -> bool {
        let Some(found) = world.ranges.with_entries_from(p.at) else { return true };
        p.at = found.end;
        self.compact_granule(&found, hands, p);
        false
    }

    fn compact_granule(&self, found: &Found<'_>, hands: &mut Hands, p: &mut Progress) {
        let map = self.domain.pagemap(p.dev);
        let me = self.me();
        let mut puts = Puts::new(&self.domain, me);
        let in_place = self.granule_in_place(found);
        let _guard = found.granule.lock();
        for at in (found.start..found.end).step_by(PAGE_SIZE) {
            let entry = self.entries.get(at);
            let Some((_, old)) = entry.frame().filter(|&(dev, pfn)| dev == p.dev && pfn >= p.limit) else {
                continue;
            };
            if matches!(entry, Entry::Copied(..)) {
                puts.begin(entry);
                self.entries.set(at, Entry::Kernel);
                p.result.dropped += 1;
                continue;
            }
            let is_mapped = in_place & window(at, at + PAGE_SIZE) != 0;
            if is_mapped || !map.frames.freeze(old, 1, me) {
                p.result.stayed += 1;
                continue;
            }
            let page = &mut hands.pages[0];
            let loaded = map.load(&mut [LoadOp { pfn: old, page, result: Err(DeviceError::Corrupt) }]).2;
            // Alone still: a fork would need the world. From here on it is a change of an entry like any other.
            map.frames.unfreeze(old, 1);
            let new = loaded.ok().and_then(|()| map.alloc(me));
            let Some(new) = new else {
                p.result.stayed += 1;
                continue;
            };
            let page = &hands.pages[0];
            let sum = if map.device.is_memory() { Sum::default() } else { Sum::of(page) };
            let mut op = [StoreOp { pfn: new, page, sum, result: Err(DeviceError::Full) }];
            map.device.store(&mut op, me);
            if op[0].result.is_err() {
                map.put_in_transit(&[new], me);
                p.result.stayed += 1;
                continue;
            }
            puts.begin(entry);
            self.entries.set(at, Entry::Away(p.dev, new));
            map.frames.settle(new);
            p.result.moved += 1;
        }
    }
}

//! Managed ranges and their granules.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use super::pin::GranulePins;
use crate::PAGE_SIZE;

/// Pages of a granule, the unit of reclaim: 64, so that a set of them is a `u64`.
pub const GRANULE_PAGES: usize = 64;
/// Bytes of a granule (256 KiB), which is aligned to its size.
pub const GRANULE: usize = GRANULE_PAGES * PAGE_SIZE;

/// The most granules that move together (2 MiB). Each call that moves pages flushes the TLBs of the CPUs on which the program runs, which
/// on a virtual machine takes as long as decompressing 50 pages.
pub const STRETCH: usize = 8;

/// A granule's flags.
pub mod flag {
    /// In the queue of arrival.
    pub const QUEUED: u32 = 1;
    /// Has pages in DRAM again while its staging slot is not settled yet: queue it then.
    pub const REQUEUE: u32 = 2;
    /// Not registered with userfaultfd: the kernel fills it with zeros; charged in full.
    pub const GRANTED: u32 = 4;
    /// Registered, and nothing of it was ever touched.
    pub const VIRGIN: u32 = 8;
    /// Pages of it have been out: its page entries may be other than `Kernel`. Without the flag nobody looks,
    /// because a look makes the kernel allocate the entries.
    pub const ENTRIES: u32 = 16;
    /// The first of 2 MiB that left as one page. Where not all of them are on one device any more it means nothing.
    pub const HUGE: u32 = 32;
    /// Was cut off a granule that was queued or parked, and is so by the name of that one's first byte.
    pub const CUT: u32 = 64;
}

/// What is known of a granule (of the part of it that lies in one range).
#[derive(Default)]
pub struct Granule {
    lock: AtomicU32,
    /// Its staging slot + 1; 0 = none. Changed under the lock.
    slot: AtomicU32,
    flags: AtomicU32,
    /// What is pinned of it; made by the first pin.
    pins: OnceLock<Arc<GranulePins>>,
}

/// A granule's lock, held.
pub struct GranuleGuard<'a>(&'a Granule);

impl Granule {
    /// Takes the lock, which is held for microseconds; the holder never waits for a fault inside.
    pub fn lock(&self) -> GranuleGuard<'_> {
        crate::sys::point::point();
        let mut spins = 0u32;
        // Acquire pairs with the guard's Release.
        while self.lock.compare_exchange_weak(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            spins += 1;
            if spins < 200 {
                std::hint::spin_loop();
            } else {
                // The holder may have been preempted on our CPU.
                crate::sys::futex_wait(&self.lock, 1, Some(std::time::Duration::from_micros(50)));
            }
        }
        GranuleGuard(self)
    }

    /// Its staging slot.
    pub fn slot(&self) -> Option<u32> {
        self.slot.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Sets or clears its staging slot; under the lock.
    pub fn set_slot(&self, slot: Option<u32>) {
        self.slot.store(slot.map_or(0, |s| s + 1), Ordering::Relaxed);
    }

    /// The pages of it that are pinned.
    pub(crate) fn pinned(&self) -> u64 {
        self.pins.get().map_or(0, |pins| pins.pages())
    }

    /// In a forked child: what is pinned is the parent's.
    pub(crate) fn forget_pins(&self) {
        if let Some(pins) = self.pins.get() {
            pins.clear();
        }
    }

    /// For pinning some of it.
    pub(crate) fn pins(&self) -> &Arc<GranulePins> {
        self.pins.get_or_init(Arc::default)
    }

    /// Whether a flag is set.
    pub fn has(&self, f: u32) -> bool {
        self.flags.load(Ordering::Relaxed) & f != 0
    }

    /// Sets flags; returns whether any was set before. Relaxed: flags are hints or changed under locks.
    pub fn set(&self, f: u32) -> bool {
        self.flags.fetch_or(f, Ordering::Relaxed) & f != 0
    }

    /// Clears flags; returns whether any was set before.
    pub fn clear(&self, f: u32) -> bool {
        self.flags.fetch_and(!f, Ordering::Relaxed) & f != 0
    }
}

impl Drop for GranuleGuard<'_> {
    fn drop(&mut self) {
        // Release pairs with the Acquire in `lock`.
        self.0.lock.store(0, Ordering::Release);
    }
}

/// One managed mapping, or what is left of it.
pub struct Range {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
    /// A forked child does not get it (`MADV_DONTFORK`, `MADV_WIPEONFORK`).
    pub not_for_children: bool,
    granules: Vec<Granule>,
}

/// A granule as found by address.
#[derive(Clone, Copy)]
pub struct Found<'a> {
    /// The range.
    pub range: &'a Range,
    /// The granule.
    pub granule: &'a Granule,
    /// First byte of the granule that is in the range.
    pub start: usize,
    /// One past its last byte in the range.
    pub end: usize,
}

/// Granules of one range, one after the other, at most [`STRETCH`].
pub struct Stretch<'a> {
    founds: [Found<'a>; STRETCH],
    len: usize,
}

impl<'a> Stretch<'a> {
    /// All their locks, taken in the order of addresses; nobody who holds a granule's lock waits for one before it.
    pub fn lock(&self) -> [Option<GranuleGuard<'a>>; STRETCH] {
        std::array::from_fn(|i| (i < self.len).then(|| self.founds[i].granule.lock()))
    }

    /// First byte of the first one's place, whether it is in the range or not.
    pub fn base(&self) -> usize {
        self.founds[0].start / GRANULE * GRANULE
    }
}

impl<'a> std::ops::Deref for Stretch<'a> {
    type Target = [Found<'a>];
    fn deref(&self) -> &[Found<'a>] {
        &self.founds[..self.len]
    }
}

impl Range {
    /// A range of whole pages, not empty; flags for all its granules.
    pub fn new(start: usize, end: usize, flags: u32) -> Self {
        let n = (end.next_multiple_of(GRANULE) - start / GRANULE * GRANULE) / GRANULE;
        let granules =
            (0..n).map(|_| Granule { flags: AtomicU32::new(flags), ..Granule::default() }).collect();
        Self { start, end, not_for_children: false, granules }
    }

    /// The granule that holds `addr`, which lies in the range.
    pub fn granule(&self, addr: usize) -> Found<'_> {
        let base = addr / GRANULE * GRANULE;
        Found {
            range: self,
            granule: &self.granules[base / GRANULE - self.start / GRANULE],
            start: base.max(self.start),
            end: (base + GRANULE).min(self.end),
        }
    }

    /// The granules that hold `[start, end)`, which lies in the range and is not empty: the first few of them.
    pub fn stretch(&self, start: usize, end: usize) -> Stretch<'_> {
        let len = (end.div_ceil(GRANULE) - start / GRANULE).min(STRETCH);
        let found = |i: usize| self.granule(start.max((start / GRANULE + i.min(len - 1)) * GRANULE));
        Stretch { founds: std::array::from_fn(found), len }
    }

    /// Its granules in address order.
    pub fn iter(&self) -> impl Iterator<Item = Found<'_>> {
        (self.start / GRANULE..self.end.div_ceil(GRANULE))
            .map(|g| self.granule((g * GRANULE).max(self.start)))
    }

    /// Cuts the range at `at` (inside it); the lower part stays, the upper part is returned. A granule that is cut
    /// through exists in both, each with its part; the caller has settled its slot.
    fn split_off(&mut self, at: usize) -> Range {
        let first = at / GRANULE - self.start / GRANULE;
        let mut upper: Vec<Granule> = Vec::new();
        if !at.is_multiple_of(GRANULE) {
            let shared = &self.granules[first];
            let flags = shared.flags.load(Ordering::Relaxed);
            let flags = AtomicU32::new(if flags & flag::QUEUED != 0 { flags | flag::CUT } else { flags });
            debug_assert!(shared.slot().is_none());
            // Pins go by the page's place in the granule, so both parts can have the same.
            upper.push(Granule { flags, pins: shared.pins.clone(), ..Granule::default() });
            upper.extend(self.granules.drain(first + 1..));
        } else {
            upper.extend(self.granules.drain(first..));
        }
        let range =
            Range { start: at, end: self.end, not_for_children: self.not_for_children, granules: upper };
        self.end = at;
        range
    }
}

/// The managed ranges of a process, by address.
#[derive(Default)]
pub struct Ranges {
    map: BTreeMap<usize, Range>,
}

impl Ranges {
    /// The range that holds `addr`.
    pub fn find(&self, addr: usize) -> Option<&Range> {
        self.map.range(..=addr).next_back().map(|(_, r)| r).filter(|r| addr < r.end)
    }

    /// The granule that holds `addr`.
    pub fn granule(&self, addr: usize) -> Option<Found<'_>> {
        self.find(addr).map(|r| r.granule(addr))
    }

    /// The ranges that overlap `[start, end)`.
    pub fn overlapping(&self, start: usize, end: usize) -> impl Iterator<Item = &Range> {
        let first = self.find(start).map_or(start, |r| r.start);
        self.map.range(first..end.max(first)).map(|(_, r)| r).filter(move |r| r.end > start && r.start < end)
    }

    /// The granules that overlap `[start, end)`, in address order, each with the first byte and the end of its part of that.
    pub fn granules(&self, start: usize, end: usize) -> impl Iterator<Item = (Found<'_>, usize, usize)> {
        self.overlapping(start, end).flat_map(move |range| {
            let (start, end) = (range.start.max(start), range.end.min(end));
            (start / GRANULE..end.div_ceil(GRANULE)).map(move |g| {
                let found = range.granule((g * GRANULE).max(start));
                (found, found.start.max(start), found.end.min(end))
            })
        })
    }

    /// The first granule from `addr` on of which some page entry may be other than *kernel*.
    pub fn with_entries_from(&self, addr: usize) -> Option<Found<'_>> {
        let mut all = self.granules(addr, crate::domain::ADDRESS_LIMIT).map(|(found, ..)| found);
        all.find(|f| f.granule.has(flag::ENTRIES))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Range> {
        self.map.values()
    }

    /// Those that overlap `[start, end)`, cut at its edges, to change.
    pub fn cut(&mut self, start: usize, end: usize) -> impl Iterator<Item = &mut Range> {
        let whole = self.take(start, end);
        whole.into_iter().for_each(|r| self.insert(r));
        self.map.range_mut(start..end.max(start)).map(|(_, r)| r)
    }

    /// Adds one that overlaps none.
    pub fn insert(&mut self, range: Range) {
        debug_assert!(self.overlapping(range.start, range.end).next().is_none());
        self.map.insert(range.start, range);
    }

    /// Takes out all that lies in `[start, end)`, cutting ranges that reach over its edges.
    pub fn take(&mut self, start: usize, end: usize) -> Vec<Range> {
        for at in [start, end] {
            let cut = self.find(at).map(|r| r.start).filter(|&s| s < at);
            if let Some(lower) = cut.and_then(|start| self.map.get_mut(&start)) {
                let upper = lower.split_off(at);
                self.map.insert(at, upper);
            }
        }
        let keys: Vec<usize> = self.map.range(start..end.max(start)).map(|(&k, _)| k).collect();
        keys.iter().filter_map(|k| self.map.remove(k)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a plain set of pages.
        #[test]
        fn take_and_insert_agree_with_a_set(ops in prop::collection::vec((any::<bool>(), 0usize..400, 1usize..200), 1..40)) {
            let mut ranges = Ranges::default();
            let mut model = std::collections::BTreeSet::new();
            for (add, first, n) in ops {
                let (start, end) = (first * PAGE_SIZE, (first + n) * PAGE_SIZE);
                let taken: usize = ranges.take(start, end).iter().map(|r| (r.end - r.start) / PAGE_SIZE).sum();
                let before = model.len();
                model.retain(|p| !(first..first + n).contains(p));
                prop_assert_eq!(before - model.len(), taken);
                if add {
                    ranges.insert(Range::new(start, end, 0));
                    model.extend(first..first + n);
                }
                // The granules of a stretch cover exactly its managed pages, once, in order.
                let (s, e) = (start.saturating_sub(70 * PAGE_SIZE), end + 70 * PAGE_SIZE);
                let mut covered = Vec::new();
                for (f, from, to) in ranges.granules(s, e) {
                    prop_assert!(f.start <= from && from < to && to <= f.end);
                    covered.extend(from / PAGE_SIZE..to / PAGE_SIZE);
                }
                let managed: Vec<usize> = model.range(s / PAGE_SIZE..e / PAGE_SIZE).copied().collect();
                prop_assert_eq!(covered, managed);
                for page in 0..600 {
                    let found = ranges.granule(page * PAGE_SIZE);
                    prop_assert_eq!(found.is_some(), model.contains(&page));
                    if let Some(f) = found {
                        prop_assert!(f.start <= page * PAGE_SIZE && page * PAGE_SIZE < f.end);
                        prop_assert!(f.end - f.start <= GRANULE && f.start / GRANULE == (f.end - 1) / GRANULE);
                    }
                }
            }
        }
    }
}

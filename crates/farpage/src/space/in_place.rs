//! Memory that the CPU reaches where it is (`Coherent`): a page on a device whose frames are memory of this machine is
//! mapped from there, at the address where it was in DRAM.
//!
//! Such a mapping is shared by nature: a fork would give the child the same page, not a copy. So who maps pages in place
//! brings them back before a fork, and before a call that drops pages (a shared page would only be unmapped). A migration, a
//! device's end and a long-term pin bring back what they meet, unless it is pinned.

use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::ops::window;
use super::puts::Puts;
use super::range::{Found, flag};
use super::{Space, World};
use crate::device::{DeviceError, LoadOp};
use crate::domain::entry::Entry;
use crate::frame::Pfn;
use crate::pagemap::Pagemap;
use crate::sys::{Mappings, in_place as sys};
use crate::{PAGE_SIZE, Page};

/// May be read, written, executed.
pub type Rights = (bool, bool, bool);

/// The parts of `[start, end)`, which is managed, that are no private memory: what is mapped in place.
fn shared(mappings: &Mappings, start: usize, end: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
    let mut at = start;
    let next = move || {
        let m = mappings.from(at).filter(|m| at < end && m.start < end)?;
        at = m.end;
        Some(m)
    };
    let shared = std::iter::from_fn(next).filter(|m| m.shared);
    shared.map(move |m| (m.start.max(start), m.end.min(end)))
}

impl Space {
    /// Maps the pages of `[start, end)` that are on `device` from there, but for those that another process has as well, since a
    /// fork. Returns how many.
    ///
    /// `rights`: whether the pages may be read, written, executed there. A write goes to the device's memory, without a fault.
    ///
    /// ```
    /// use farpage::{Domain, Target};
    ///
    /// let space = Domain::builder().dram("8M").device("coherent:memfd:16M").build()?.start_inline()?;
    /// let mut v = space.region_from_fn(1 << 20, |i| i as u8)?;
    /// let pages = v.pages(..);
    /// space.migrate(pages.clone(), Target::Device(0))?;
    ///
    /// // 256 pages of the device, at their addresses in the program.
    /// assert_eq!(space.map_in_place(pages.start, pages.end, 0, (true, true, false))?, 256);
    /// assert_eq!(space.in_place(pages.start, pages.end)?, [(pages.start, pages.end)]);
    /// v[300] += 1;
    /// assert_eq!((v[300], space.domain.stats().pages_in), (45, 0));
    ///
    /// // Back to DRAM, with what was written. Migrating them, or removing the device, does that as well.
    /// assert_eq!(space.unmap_in_place(pages.start, pages.end, 0)?, 256);
    /// assert_eq!(v[300], 45);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// ENODEV: the CPU does not reach that device's frames. Else the kernel's; what is mapped stays so.
    pub fn map_in_place(&self, start: usize, end: usize, device: u8, rights: Rights) -> Result<usize, Errno> {
        // Before the first: who looks for such mappings afterwards finds them.
        self.maps_in_place.store(true, Ordering::SeqCst);
        self.change(|world| {
            let mut mapped = 0;
            let mine = |pfn| self.domain.pagemap(device).frames.count(pfn) == 1;
            for (s, e, first) in self.runs_on(world, start, end, device, |_, pfn| mine(pfn)) {
                let (file, offset) = self.domain.file_of(device, first).ok_or(Errno::NODEV)?;
                // The kernel announces that what was here is unmapped.
                self.faults.expect(s, e);
                sys::map_shared(s, e - s, rights, file, offset)?;
                mapped += (e - s) / PAGE_SIZE;
            }
            Ok(mapped)
        })
    }

    /// Brings pages of `[start, end)` that are mapped from `device` back to DRAM. Returns how many.
    ///
    /// See the example of [`Space::map_in_place`].
    ///
    /// # Errors
    /// The kernel's; the pages that are not back yet are where they were.
    pub fn unmap_in_place(&self, start: usize, end: usize, device: u8) -> Result<usize, Errno> {
        self.unmap_from(start, end, device, true)
    }

    /// What of `[start, end)` is mapped in place: parts, first byte and end.
    ///
    /// See the example of [`Space::map_in_place`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn in_place(&self, start: usize, end: usize) -> Result<Vec<(usize, usize)>, Errno> {
        if !self.maps_in_place.load(Ordering::SeqCst) {
            return Ok(Vec::new());
        }
        let mappings = Mappings::open()?;
        let managed = self.managed_parts(start, end);
        Ok(managed.into_iter().flat_map(|(s, e)| shared(&mappings, s, e)).collect())
    }

    /// The same, of the world that the caller has in hand; nothing, if the kernel does not say.
    pub(super) fn in_place_of(&self, world: &World, start: usize, end: usize) -> Vec<(usize, usize)> {
        if !self.maps_in_place.load(Ordering::SeqCst) {
            return Vec::new();
        }
        let Ok(mappings) = Mappings::open() else { return Vec::new() };
        let managed = world.ranges.overlapping(start, end).map(|r| (r.start.max(start), r.end.min(end)));
        managed.flat_map(|(s, e)| shared(&mappings, s, e)).collect()
    }

    /// The same of one granule, as a set of its pages; all of it, if the kernel does not say.
    pub(crate) fn granule_in_place(&self, found: &Found<'_>) -> u64 {
        let (start, end) = (found.start, found.end);
        if !self.maps_in_place.load(Ordering::SeqCst) {
            return 0;
        }
        let Ok(mappings) = Mappings::open() else { return window(start, end) };
        shared(&mappings, start, end).fold(0, |set, (s, e)| set | window(s, e))
    }

    /// Pages of `[start, end)` that are mapped in place from devices that `leaves` names come back to DRAM, but for those that are
    /// pinned. Returns the parts that are mapped in place still, from whatever device.
    ///
    /// # Errors
    /// The kernel's; the pages that are not back yet are where they were.
    pub(crate) fn leave_in_place(
        &self,
        start: usize,
        end: usize,
        leaves: impl Fn(&Pagemap) -> bool,
    ) -> Result<Vec<(usize, usize)>, Errno> {
        let parts = self.in_place(start, end)?;
        if parts.is_empty() {
            return Ok(parts);
        }
        for map in self.domain.pagemaps.iter().filter(|map| leaves(map)) {
            for &(s, e) in &parts {
                self.unmap_from(s, e, map.id, false)?;
            }
        }
        self.in_place(start, end)
    }

    fn unmap_from(&self, start: usize, end: usize, device: u8, pinned_too: bool) -> Result<usize, Errno> {
        self.change(|world| {
            let mut back = 0;
            let goes = |at, _| pinned_too || !self.is_pinned(world, at);
            for (s, e, first) in self.runs_on(world, start, end, device, goes) {
                let rights = sys::rights(s).ok_or(Errno::FAULT)?;
                let mut fresh = sys::Fresh::new(e - s)?;
                // Who writes from here on waits until the page is DRAM: nothing is written to what has been copied.
                let copied = world
                    .uffd
                    .stop_writes(s, e - s)
                    .and_then(|()| self.copy_frames(device, first, fresh.pages()));
                self.faults.expect(s, e);
                if let Err(error) = copied.and_then(|()| fresh.replace(s, rights)) {
                    let _open_again = world.uffd.unregister(s, e - s);
                    return Err(error);
                }
                self.domain.force_charge(self.me(), ((e - s) / PAGE_SIZE) as u64);
                let mut puts = Puts::new(&self.domain, self.me());
                for at in (s..e).step_by(PAGE_SIZE) {
                    puts.begin(self.entries.get(at));
                    self.entries.set(at, Entry::Kernel);
                }
                drop(puts);
                for (found, ..) in world.ranges.granules(s, e) {
                    self.enqueue(&found);
                }
                world.uffd.register(s, e - s)?;
                back += (e - s) / PAGE_SIZE;
            }
            Ok(back)
        })
    }

    fn copy_frames(&self, device: u8, first: Pfn, pages: &mut [Page]) -> Result<(), Errno> {
        let map = self.domain.pagemap(device);
        for (pfn, page) in (first..).zip(pages) {
            let mut op = [LoadOp { pfn, page, result: Err(DeviceError::Corrupt) }];
            map.load(&mut op).2.map_err(|_| Errno::IO)?;
        }
        Ok(())
    }

    /// Whether a page is to stay where it is. (Nobody pins while the world is held.)
    fn is_pinned(&self, world: &World, at: usize) -> bool {
        let page = window(at, at + PAGE_SIZE);
        let pinned = |found: Found<'_>| found.granule.pinned() & page != 0;
        world.ranges.granule(at).is_some_and(pinned) || self.holds_any(at, at + PAGE_SIZE)
    }

    /// The pages of `[start, end)` on `device` that are `wanted` (address, frame), in runs whose frames follow one another: first
    /// byte, end, first frame.
    fn runs_on(
        &self,
        world: &World,
        start: usize,
        end: usize,
        device: u8,
        wanted: impl Fn(usize, Pfn) -> bool,
    ) -> Vec<(usize, usize, Pfn)> {
        let mut runs: Vec<(usize, usize, Pfn)> = Vec::new();
        for (found, s, e) in world.ranges.granules(start, end) {
            if !found.granule.has(flag::ENTRIES) {
                continue;
            }
            let staged = found.granule.slot().map_or(0, |slot| self.slots.staged(slot));
            for at in (s..e).step_by(PAGE_SIZE) {
                let Entry::Away(dev, pfn) = self.entries.get(at) else { continue };
                if dev != device || staged & window(at, at + PAGE_SIZE) != 0 || !wanted(at, pfn) {
                    continue;
                }
                match runs.last_mut() {
                    Some(r) if r.1 == at && r.2 + ((at - r.0) / PAGE_SIZE) as Pfn == pfn => r.1 += PAGE_SIZE,
                    _ => runs.push((at, at + PAGE_SIZE, pfn)),
                }
            }
        }
        runs
    }

    /// The parts of `[start, end)` that are managed.
    #[doc(hidden)]
    pub fn managed_parts(&self, start: usize, end: usize) -> Vec<(usize, usize)> {
        let _signals = crate::sys::BlockedSignals::new();
        let world = self.world.read();
        world.ranges.overlapping(start, end).map(|r| (r.start.max(start), r.end.min(end))).collect()
    }
}

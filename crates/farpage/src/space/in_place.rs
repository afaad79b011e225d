//! Memory that the CPU reaches where it is (`Coherent`): a page on a device whose frames are memory of this machine is
//! mapped from there, at the address where it was in DRAM.
//!
//! Such a mapping is shared by nature: a fork would give the child the same page, not a copy. So who maps pages in place
//! brings them back before a fork, and before a call that drops pages (a shared page would only be unmapped).

use rustix::io::Errno;

use super::ops::window;
use super::puts::Puts;
use super::range::flag;
use super::{Space, World};
use crate::device::{DeviceError, LoadOp};
use crate::domain::entry::Entry;
use crate::frame::Pfn;
use crate::sys::in_place as sys;
use crate::{PAGE_SIZE, Page};

/// May be read, written, executed.
pub type Rights = (bool, bool, bool);

impl Space {
    /// Maps the pages of `[start, end)` that are on `device` from there. Returns how many.
    ///
    /// # Errors
    /// ENODEV: the CPU does not reach that device's frames. Else the kernel's; what is mapped stays so.
    pub fn map_in_place(&self, start: usize, end: usize, device: u8, rights: Rights) -> Result<usize, Errno> {
        self.change(|world| {
            let mut mapped = 0;
            for (s, e, first) in self.runs_on(world, start, end, device) {
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
    /// # Errors
    /// The kernel's; the pages that are not back yet are where they were.
    pub fn unmap_in_place(&self, start: usize, end: usize, device: u8) -> Result<usize, Errno> {
        self.change(|world| {
            let mut back = 0;
            for (s, e, first) in self.runs_on(world, start, end, device) {
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

    /// The pages of `[start, end)` on `device`, in runs whose frames follow one another: first byte, end, first frame.
    fn runs_on(&self, world: &World, start: usize, end: usize, device: u8) -> Vec<(usize, usize, Pfn)> {
        let mut runs: Vec<(usize, usize, Pfn)> = Vec::new();
        for (found, s, e) in world.ranges.granules(start, end) {
            if !found.granule.has(flag::ENTRIES) {
                continue;
            }
            let staged = found.granule.slot().map_or(0, |slot| self.slots.staged(slot));
            for at in (s..e).step_by(PAGE_SIZE) {
                let Entry::Away(dev, pfn) = self.entries.get(at) else { continue };
                if dev != device || staged & window(at, at + PAGE_SIZE) != 0 {
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
    pub fn managed_parts(&self, start: usize, end: usize) -> Vec<(usize, usize)> {
        let _signals = crate::sys::BlockedSignals::new();
        let world = self.world.read();
        world.ranges.overlapping(start, end).map(|r| (r.start.max(start), r.end.min(end))).collect()
    }
}

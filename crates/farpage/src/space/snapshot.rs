//! What each page of a range is just now.

use std::ops::Range;

use super::Space;
use super::range::{GRANULE, flag};
use crate::PAGE_SIZE;
use crate::domain::entry::Entry;
use crate::migrate::{MigrateError, check};
use crate::sys::{Kind, Mappings};

/// Where a page is.
///
/// See the example of [`Space::snapshot`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Place {
    /// Nothing is mapped there.
    #[default]
    Unmapped,
    /// Mapped, and there is no page: it reads as zeros, or as the file behind it.
    Hole,
    /// The kernel's page of zeros.
    Zero,
    /// In DRAM, in the program.
    System,
    /// In the kernel's own swap.
    Swapped,
    /// In DRAM, out of the program: on its way to a device, or taken exclusively.
    Staged,
    /// On the device with this number.
    Device(u8),
    /// Away as one 32-bit value repeated, without a frame.
    Same,
    /// Lost: who touches it gets SIGBUS.
    Lost,
}

/// A page, as [`Space::snapshot`] finds it.
///
/// See the example of [`Space::snapshot`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageState {
    /// Where it is.
    pub place: Place,
    flags: u8,
}

const READABLE: u8 = 1;
const WRITABLE: u8 = 2;
const DIRTY: u8 = 4;
const PINNED: u8 = 8;
const HUGE: u8 = 16;
const MANAGED: u8 = 32;
const EXCLUSIVE: u8 = 64;

impl PageState {
    fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Its mapping may be read.
    pub fn readable(self) -> bool {
        self.has(READABLE)
    }

    /// Its mapping may be written. (Whether the kernel has to copy it first, after a fork, is not told.)
    pub fn writable(self) -> bool {
        self.has(WRITABLE)
    }

    /// It is in DRAM and no device has a copy of it. (One that has a copy may have changed since; whether it has is found out when
    /// it leaves.)
    pub fn dirty(self) -> bool {
        self.has(DIRTY)
    }

    /// Pinned by [`Space::pin`].
    pub fn pinned(self) -> bool {
        self.has(PINNED)
    }

    /// Mapped as part of a huge page.
    pub fn huge(self) -> bool {
        self.has(HUGE)
    }

    /// Farpage manages it.
    pub fn managed(self) -> bool {
        self.has(MANAGED)
    }

    /// A device has it exclusively ([`Space::exclusive`]).
    pub fn exclusive(self) -> bool {
        self.has(EXCLUSIVE)
    }
}

impl Space {
    /// What each page of `range` (whole pages) is. A picture of a moment for each granule of 64 pages, not of one moment for all
    /// of them.
    ///
    /// ```
    /// use farpage::space::snapshot::Place;
    /// use farpage::{Domain, Pin, Target};
    ///
    /// let space = Domain::builder().dram("8M").device("mem:16M").build()?.start_inline()?;
    /// let mut v = space.region::<u8>(3 << 12)?;
    /// v[0] = 1;
    /// v[1 << 12] = 1;
    /// let pin = space.pin(v.pages(..1), Pin::Short, false)?;
    /// space.migrate(v.pages(1 << 12..2 << 12), Target::Device(0))?;
    ///
    /// let pages = space.snapshot(v.pages(..))?;
    /// assert_eq!(pages.iter().map(|p| p.place).collect::<Vec<_>>(), [Place::System, Place::Device(0), Place::Hole]);
    /// assert!(pages.iter().all(|p| p.managed() && p.readable() && p.writable()));
    /// assert!(pages[0].pinned() && pages[0].dirty() && !pages[1].dirty());
    /// assert!(!pages[0].huge() && !pages[0].exclusive());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`MigrateError::Range`].
    pub fn snapshot(&self, range: Range<usize>) -> Result<Vec<PageState>, MigrateError> {
        check(&range)?;
        let Range { start, end } = range;
        // Before the world is taken: memory for it may have to be faulted in.
        let mut pages = vec![PageState { place: Place::Unmapped, flags: 0 }; (end - start) / PAGE_SIZE];
        let index = |at: usize| (at - start) / PAGE_SIZE;
        if let Ok(mappings) = Mappings::open() {
            let mut at = start;
            while let Some(m) = mappings.from(at).filter(|m| m.start < end && m.end > at) {
                let flags = if m.read { READABLE } else { 0 } | if m.write { WRITABLE } else { 0 };
                pages[index(m.start.max(start))..index(m.end.min(end))]
                    .fill(PageState { place: Place::Hole, flags });
                at = m.end;
                if at >= end {
                    break;
                }
            }
        }
        let world = self.read_world();
        let _unknown = world.scan.kinds(start, end, |s, e, kind: Kind| {
            let place = match kind {
                Kind { swapped: true, .. } => Place::Swapped,
                Kind { zero: true, .. } => Place::Zero,
                _ => Place::System,
            };
            let dirty = if place == Place::System { DIRTY } else { 0 };
            let huge = if kind.huge { HUGE } else { 0 };
            for page in &mut pages[index(s)..index(e)] {
                page.place = place;
                page.flags |= dirty | huge;
            }
        });
        for (found, s, e) in world.ranges.granules(start, end) {
            let pages = &mut pages[index(s)..index(e)];
            let pinned = found.granule.pinned();
            let bit = |at: usize| 1u64 << (at % GRANULE / PAGE_SIZE);
            let with_entries = found.granule.has(flag::ENTRIES);
            if pinned == 0 && !with_entries {
                pages.iter_mut().for_each(|page| page.flags |= MANAGED);
                continue;
            }
            let staged = found.granule.slot().map_or(0, |slot| self.slots.staged(slot));
            for (page, at) in pages.iter_mut().zip((s..e).step_by(PAGE_SIZE)) {
                page.flags |= MANAGED | if pinned & bit(at) != 0 { PINNED } else { 0 };
                // The granule was looked at after the mapping: what has moved between the two is where it is now.
                match if with_entries { self.entries.get(at) } else { Entry::Kernel } {
                    _ if staged & bit(at) != 0 => page.place = Place::Staged,
                    Entry::Away(dev, _) => page.place = Place::Device(dev),
                    Entry::Same(_) => page.place = Place::Same,
                    Entry::Lost => page.place = Place::Lost,
                    Entry::Copied(..) => {
                        page.flags &= !DIRTY;
                        if page.place == Place::Hole {
                            page.place = Place::System;
                        }
                        continue;
                    }
                    Entry::Kernel => continue,
                }
                page.flags &= !(DIRTY | HUGE);
            }
        }
        drop(world);
        self.mark_exclusive(start, end, |at| pages[index(at)].flags |= EXCLUSIVE);
        Ok(pages)
    }
}

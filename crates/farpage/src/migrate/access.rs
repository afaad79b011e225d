//! Pages that are not in the program, used where they are: what a device does with memory that it has been given.

use crate::PAGE_SIZE;
use crate::device::{DeviceError, LoadOp, StoreOp, Sum};
use crate::domain::Counter;
use crate::domain::entry::Entry;
use crate::reclaim::Hands;
use crate::space::puts::Puts;
use crate::space::range::{Found, GRANULE, flag};
use crate::space::{Space, World};

/// Why a device could not use a page.
///
/// See the example of [`Space::device_read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The page is in the program, or there is none: the CPU's to use, not a device's.
    #[error("the page at {0:#x} is not on a device")]
    InDram(usize),
    /// There is no memory, or none that farpage manages.
    #[error("the page at {0:#x} is not managed memory")]
    NotManaged(usize),
    /// No room for the changed page.
    #[error("the device has no room for the page at {0:#x}")]
    NoMemory(usize),
    /// The device failed.
    #[error("the device failed with the page at {0:#x}")]
    Device(usize),
}

/// Bytes for or from a device.
struct Access {
    start: usize,
    bytes: Vec<u8>,
    done: usize,
    result: Result<(), AccessError>,
}

impl Space {
    /// Reads bytes of pages that are on a device, or staged for one, without bringing them in.
    ///
    /// ```
    /// use farpage::migrate::AccessError;
    /// use farpage::{Domain, Target};
    ///
    /// let space = Domain::builder().dram("8M").device("mem:16M").build()?.start_inline()?;
    /// let v = space.region_from_fn(2 << 12, |i| i as u8)?;
    /// let at = v.as_ptr() as usize;
    /// let mut bytes = [0; 3];
    /// assert_eq!(space.device_read(at, &mut bytes), Err(AccessError::InDram(at)), "it is the CPU's to use");
    ///
    /// space.migrate(v.pages(..), Target::Device(0))?;
    /// space.device_read(at + 5, &mut bytes)?;
    /// assert_eq!(bytes, [5, 6, 7]);
    /// space.device_write(at + 6, &[99])?;
    /// assert_eq!(space.domain.stats().pages_in, 0, "nothing came to DRAM for it");
    /// assert_eq!(v[5..8], [5, 99, 7]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// ```
    /// # use farpage::{Domain, migrate::AccessError};
    /// # let space = Domain::builder().dram("8M").device("mem:16M").build()?.start_inline()?;
    /// let beyond = space.device_read(usize::MAX - 100, &mut [0; 200]);
    /// assert!(matches!(beyond, Err(AccessError::NotManaged(_))));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`AccessError`]: which page is not; what lies before it has been read.
    pub fn device_read(&self, start: usize, out: &mut [u8]) -> Result<(), AccessError> {
        let access = Access { start, bytes: vec![0; out.len()], done: 0, result: Ok(()) };
        let access = self.on_worker(access, |space, world, hands, a| {
            space.access_next(world, a, hands, |page, bytes| bytes.copy_from_slice(page), false)
        });
        out.copy_from_slice(&access.bytes);
        access.result
    }

    /// Writes bytes to pages that are on a device, or staged for one, without bringing them in. A page on a device gets a new
    /// frame: frames are never changed in place, because a forked child may share them.
    ///
    /// See the example of [`Space::device_read`].
    ///
    /// # Errors
    /// [`AccessError`]: which page is not; what lies before it has been written.
    pub fn device_write(&self, start: usize, data: &[u8]) -> Result<(), AccessError> {
        let access = Access { start, bytes: data.to_vec(), done: 0, result: Ok(()) };
        self.on_worker(access, |space, world, hands, a| {
            space.access_next(world, a, hands, |page, bytes| page.copy_from_slice(bytes), true)
        })
        .result
    }

    /// The part that lies in one granule. True: that was the last, or it failed.
    fn access_next(
        &self,
        world: &World,
        a: &mut Access,
        hands: &mut Hands,
        copy: fn(&mut [u8], &mut [u8]),
        write: bool,
    ) -> bool {
        // (What is done lies in managed memory, far below the last address.)
        let until = ((a.start + a.done) / GRANULE * GRANULE).saturating_add(GRANULE);
        while a.done < a.bytes.len() && a.start + a.done < until {
            let at = a.start + a.done;
            let (page, offset) = (at / PAGE_SIZE * PAGE_SIZE, at % PAGE_SIZE);
            let n = (PAGE_SIZE - offset).min(a.bytes.len() - a.done);
            let Some(found) = world.ranges.granule(page) else {
                a.result = Err(AccessError::NotManaged(page));
                return true;
            };
            let bytes = &mut a.bytes[a.done..a.done + n];
            if let Err(e) =
                self.access_page(&found, page, hands, write, |p| copy(&mut p[offset..offset + n], bytes))
            {
                a.result = Err(e);
                return true;
            }
            a.done += n;
        }
        a.done == a.bytes.len()
    }

    fn access_page(
        &self,
        found: &Found<'_>,
        at: usize,
        hands: &mut Hands,
        write: bool,
        mut f: impl FnMut(&mut [u8; PAGE_SIZE]),
    ) -> Result<(), AccessError> {
        let mut puts = Puts::new(&self.domain, self.me());
        let _guard = found.granule.lock();
        let i = at % GRANULE / PAGE_SIZE;
        if let Some(slot) = found.granule.slot().filter(|&s| self.slots.staged(s) & (1 << i) != 0) {
            if !write {
                let buffer = &mut hands.pages[0].0;
                buffer.copy_from_slice(&self.slots.staged_page(slot, i).0);
                f(buffer);
                return Ok(());
            }
            // An older copy is known to be older by its checksum.
            f(&mut self.slots.staged_page_mut(slot, i).0);
            return Ok(());
        }
        let entry = if found.granule.has(flag::ENTRIES) { self.entries.get(at) } else { Entry::Kernel };
        let page = &mut hands.pages[0];
        let home = match entry {
            Entry::Away(dev, pfn) => {
                let mut op = [LoadOp { pfn, page, result: Err(DeviceError::Corrupt) }];
                let (_, bad, result) = self.domain.pagemap(dev).load(&mut op);
                self.count(Counter::LoadErrors, bad);
                result.map_err(|_| AccessError::Device(at))?;
                Some(dev)
            }
            Entry::Same(value) => {
                page.fill(value);
                None
            }
            Entry::Lost => return Err(AccessError::Device(at)),
            Entry::Kernel | Entry::Copied(..) => return Err(AccessError::InDram(at)),
        };
        let page = &mut hands.pages[0];
        f(&mut page.0);
        if !write {
            return Ok(());
        }
        let page = &hands.pages[0];
        let mut error = AccessError::NoMemory(at);
        for map in self.domain.pagemaps.iter().filter(|m| home.is_none_or(|home| home == m.id)) {
            let Some(pfn) = map.alloc(self.me()) else { continue };
            let mut op = [StoreOp { pfn, page, sum: Sum::of(page), result: Err(DeviceError::Full) }];
            map.device.store(&mut op, self.me());
            match &op[0].result {
                Ok(()) => {
                    puts.begin(entry);
                    self.entries.set(at, Entry::Away(map.id, pfn));
                    map.frames.settle(pfn);
                    return Ok(());
                }
                Err(e) => {
                    map.put_in_transit(&[pfn], self.me());
                    if *e != DeviceError::Full {
                        self.store_failed(map.device.name(), e);
                        error = AccessError::Device(at);
                    }
                }
            }
        }
        Err(error)
    }
}

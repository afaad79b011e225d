//! `mem:SIZE`: pages as they are, in the domain's shared memory.
//!
//! A store or a load is one copy, in batches, without a lock: a frame's bytes belong to whoever has allocated it, and
//! nobody changes them afterwards. The device is the fast end of the scale (a stand-in for memory that is reached
//! by copying: a GPU's, a slower tier), and the reference for what a migration costs beside the copy itself.
//!
//! Memory is not checked by us but by the machine, so this device asks for no checksum and its loads are not
//! verified ([`Device::is_memory`]). Where one is given all the same (faults are injected), it is kept and handed back.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{Attach, Device, DeviceError, LoadOp, StoreOp, Sum, Usage};
use crate::frame::{Owner, Pfn};
use crate::size::format_size;
use crate::sys::{SharedArea, Streaming};
use crate::{PAGE_SIZE, Page};

/// The smallest `mem` device, in bytes.
pub const MIN_SIZE: u64 = 1 << 20;
/// The largest, in bytes.
pub const MAX_SIZE: u64 = 1 << 40;

/// Pages that get memory from the kernel together: first touches are page faults, and a fault that finds no memory
/// would be a SIGBUS; asking for it is an error that can be handled.
const CHUNK_PAGES: usize = 64;
const CHUNK: usize = CHUNK_PAGES * PAGE_SIZE;

/// Number of frames.
pub fn frames(size: u64) -> u32 {
    u32::try_from(size / PAGE_SIZE as u64).unwrap_or(u32::MAX)
}

/// Bytes of shared memory.
pub fn shared_len(size: u64) -> usize {
    let n = frames(size) as usize;
    64 + (n * 12).next_multiple_of(64) + 2 * bits_len(n) + PAGE_SIZE + n * PAGE_SIZE
}

fn bits_len(frames: usize) -> usize {
    (frames.div_ceil(64) * 8).next_multiple_of(64)
}

/// The device; see the module's description.
pub struct Mem {
    name: String,
    size: u64,
    frames: u32,
    /// Frames stored, chunks that have memory, the most of those.
    counters: &'static [AtomicU64],
    /// Three words a frame; zero = none was given.
    sums: &'static [AtomicU32],
    /// One bit a frame: it is stored.
    stored: &'static [AtomicU64],
    /// One bit a chunk: the kernel has provided its memory.
    there: &'static [AtomicU64],
    data: SharedArea,
}

impl Mem {
    /// The device over its shared area, which has the length that [`shared_len`] gave for `size`.
    pub fn attach(size: u64, attach: &Attach) -> Self {
        let n = frames(size) as usize;
        let (head, rest) = attach.area.split(64);
        let (sums, rest) = rest.split(n * 12);
        let (stored, rest) = rest.split(bits_len(n));
        let (there, rest) = rest.split(bits_len(n));
        // Pages on pages. Every process maps the segment at a page boundary, so this is the same offset in all.
        let pad = rest.addr().next_multiple_of(PAGE_SIZE) - rest.addr();
        Self {
            name: format!("mem:{}", format_size(size)),
            size,
            frames: n as u32,
            counters: head.atomics64(),
            sums: sums.atomics32(),
            stored: stored.atomics64(),
            there: there.atomics64(),
            data: rest.part(pad, n * PAGE_SIZE),
        }
    }

    /// Has the kernel provide the memory of the frame's chunk.
    fn provide(&self, pfn: Pfn) -> Result<(), DeviceError> {
        let chunk = pfn as usize / CHUNK_PAGES;
        let (word, bit) = (&self.there[chunk / 64], 1 << (chunk % 64));
        // Relaxed: the kernel's part is done or is done again; nothing else hangs on the bit.
        if word.load(Ordering::Relaxed) & bit != 0 {
            return Ok(());
        }
        let at = chunk * CHUNK;
        self.data.populate(at, CHUNK.min(self.data.len() - at)).map_err(|_| DeviceError::Full)?;
        if word.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            let used = self.counters[1].fetch_add(1, Ordering::Relaxed) + 1;
            self.counters[2].fetch_max(used, Ordering::Relaxed);
        }
        Ok(())
    }

    fn store_one(
        &self,
        pfn: Pfn,
        page: &Page,
        sum: Sum,
        streaming: Option<&Streaming>,
    ) -> Result<(), DeviceError> {
        if pfn >= self.frames {
            return Err(DeviceError::Io(libc::EINVAL));
        }
        self.provide(pfn)?;
        match streaming {
            Some(streaming) => streaming.write(self.data, pfn as usize * PAGE_SIZE, page),
            None => self.data.write(pfn as usize * PAGE_SIZE, &page.0),
        }
        for (word, value) in self.sums[pfn as usize * 3..].iter().zip(sum.0) {
            word.store(value, Ordering::Relaxed);
        }
        // Relaxed: publishing the frame in a page entry is what orders the bytes before their readers.
        let bit = 1 << (pfn % 64);
        if self.stored[pfn as usize / 64].fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            self.counters[0].fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn kept_sum(&self, pfn: Pfn) -> Sum {
        Sum(std::array::from_fn(|i| self.sums[pfn as usize * 3 + i].load(Ordering::Relaxed)))
    }

    fn is_stored(&self, pfn: Pfn) -> bool {
        pfn < self.frames && self.stored[pfn as usize / 64].load(Ordering::Relaxed) & (1 << (pfn % 64)) != 0
    }

    /// Gives memory of chunks without a stored frame back to the kernel; returns how many bytes. The caller sees to it
    /// that no frame of `[first, end)` is allocated meanwhile.
    fn give_back(&self, first: Pfn, end: Pfn) -> u64 {
        let mut given = 0;
        for chunk in (first as usize).div_ceil(CHUNK_PAGES)..(end.min(self.frames) as usize) / CHUNK_PAGES {
            let (word, bit) = (&self.there[chunk / 64], 1 << (chunk % 64));
            if self.stored[chunk].load(Ordering::Relaxed) != 0 || word.load(Ordering::Relaxed) & bit == 0 {
                continue;
            }
            word.fetch_and(!bit, Ordering::Relaxed);
            if self.data.give_back(chunk * CHUNK, CHUNK).is_ok() {
                self.counters[1].fetch_sub(1, Ordering::Relaxed);
                given += CHUNK as u64;
            } else {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        given
    }
}

impl Device for Mem {
    fn name(&self) -> &str {
        &self.name
    }

    fn frames(&self) -> u32 {
        self.frames
    }

    fn is_memory(&self) -> bool {
        true
    }

    fn address_of(&self, pfn: Pfn) -> Option<usize> {
        (pfn < self.frames).then(|| self.data.addr() + pfn as usize * PAGE_SIZE)
    }

    fn store(&self, ops: &mut [StoreOp<'_>], _owner: Owner) {
        let streaming = Streaming::of(ops.len());
        for op in ops {
            op.result = self.store_one(op.pfn, op.page, op.sum, streaming.as_ref());
        }
    }

    fn load(&self, ops: &mut [LoadOp<'_>]) {
        let streaming = Streaming::of(ops.len());
        for op in ops {
            if !self.is_stored(op.pfn) {
                op.result = Err(DeviceError::Corrupt);
                continue;
            }
            match &streaming {
                Some(streaming) => streaming.read(self.data, op.pfn as usize * PAGE_SIZE, op.page),
                None => self.data.read(op.pfn as usize * PAGE_SIZE, &mut op.page.0),
            }
            op.result = Ok(self.kept_sum(op.pfn));
        }
    }

    fn sum(&self, pfn: Pfn) -> Sum {
        if !self.is_stored(pfn) {
            return Sum::default();
        }
        let kept = self.kept_sum(pfn);
        if kept != Sum::default() {
            return kept;
        }
        let mut page = Page([0; PAGE_SIZE]);
        self.data.read(pfn as usize * PAGE_SIZE, &mut page.0);
        Sum::of(&page)
    }

    fn free(&self, pfns: &[Pfn], _owner: Owner) {
        for &pfn in pfns.iter().filter(|p| **p < self.frames) {
            let bit = 1 << (pfn % 64);
            if self.stored[pfn as usize / 64].fetch_and(!bit, Ordering::Relaxed) & bit != 0 {
                self.counters[0].fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn shrunk(&self, first: Pfn, end: Pfn) -> u64 {
        self.give_back(first, end)
    }

    fn remove(&self, _owner: Owner) -> Result<(), rustix::io::Errno> {
        // The last chunk may be a part of one.
        self.data.give_back(0, self.data.len())?;
        self.there.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        self.counters[1].store(0, Ordering::Relaxed);
        Ok(())
    }

    fn usage(&self) -> Usage {
        let counter = |i: usize| self.counters[i].load(Ordering::Relaxed);
        Usage {
            capacity: self.size,
            used: counter(1) * CHUNK as u64,
            payload: counter(0) * PAGE_SIZE as u64,
            peak: counter(2) * CHUNK as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::testing::{self, load, page, store_all};

    #[test]
    fn pages_come_back_as_they_were_and_memory_goes_back_when_it_shrinks() {
        let dev = testing::device("mem:4M");
        assert_eq!((dev.frames(), dev.is_memory()), (1024, true));
        let pages: Vec<_> = (0..1024).map(|i| (1023 - i, page(i))).collect();
        assert!(store_all(&*dev, &pages).iter().all(Result::is_ok));
        for (pfn, page) in &pages {
            assert_eq!(load(&*dev, *pfn).unwrap().0, page.0);
            assert_eq!(dev.sum(*pfn), Sum::of(page));
        }
        let usage = dev.usage();
        assert_eq!((usage.used, usage.payload), (4 << 20, 4 << 20));
        let upper: Vec<Pfn> = (500..1024).chain(500..600).collect();
        dev.free(&upper, testing::ME);
        assert_eq!(dev.usage().payload, 500 * PAGE_SIZE as u64, "freeing twice is freeing once");
        assert_eq!(load(&*dev, 500).err(), Some(DeviceError::Corrupt));
        assert_eq!(dev.shrunk(500, 1024), 2 << 20, "whole chunks only, behind the last that is stored");
        assert_eq!(dev.usage().used, 2 << 20);
        assert_eq!(load(&*dev, 499).unwrap().0, page(1023 - 499).0);
        assert!(store_all(&*dev, &[(700, page(7))])[0].is_ok());
        assert_eq!(load(&*dev, 700).unwrap().0, page(7).0);
        assert_eq!(store_all(&*dev, &[(1024, page(7))]), [Err(DeviceError::Io(libc::EINVAL))]);
    }

    #[test]
    fn faults_that_are_injected_are_found_by_the_checksum() {
        let dev = testing::device("inject:corrupt-store=1:mem:1M");
        assert!(!dev.is_memory());
        assert!(testing::store(&*dev, 3, &page(1)).is_ok());
        assert_eq!(dev.sum(3), Sum::of(&page(1)));
        assert_ne!(load(&*dev, 3).unwrap().0, page(1).0);
    }
}

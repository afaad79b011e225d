//! Pages as they are, in memory: `mem:SIZE` in the domain's shared memory, and `generic:`, `coherent:` and `numa:` in memory of
//! their own ([`super::memory`]).
//!
//! A store or a load is one copy, in batches, without a lock: a frame's bytes belong to whoever has allocated it, and
//! nobody changes them afterwards. `mem` is the fast end of the scale (a stand-in for memory that is reached
//! by copying: a GPU's, a slower tier), and the reference for what a migration costs beside the copy itself.
//!
//! Memory is not checked by us but by the machine, so this device asks for no checksum and its loads are not
//! verified ([`Device::is_memory`]). Where one is given all the same (faults are injected), it is kept and handed back.
//!
//! # Whose memory
//!
//! First touches are page faults, and a fault that finds no memory would be a SIGBUS. So a run of frames that is going to be
//! stored gets its memory by a call that can fail. Only who has allocated a frame has its memory provided, and only who
//! frees it, before it is free, gives it back: nobody else is at it then, so there is nothing to lock, and the notes of it are
//! ordered as the bytes are, by the frame's count.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use arrayvec::ArrayVec;
use rustix::io::Errno;

use super::memory::{DeviceMemory, MemoryError, MemorySpec};
use super::{Attach, Device, DeviceError, LoadOp, StoreOp, Sum, Usage};
use crate::frame::{BATCH, Owner, Pfn};
use crate::size::format_size;
use crate::sys::{SharedArea, Streaming};
use crate::{PAGE_SIZE, Page};

/// The smallest `mem` device, in bytes.
pub const MIN_SIZE: u64 = 1 << 20;
/// The largest, in bytes.
pub const MAX_SIZE: u64 = 1 << 40;

/// Pages that free frames of memory of its own keep, at least: handing memory back and taking it again costs more than a copy.
const KEPT: u64 = 4096;

/// Number of frames.
pub fn frames(size: u64) -> u32 {
    u32::try_from(size / PAGE_SIZE as u64).unwrap_or(u32::MAX)
}

/// Bytes of shared memory, the pages among them.
pub fn shared_len(size: u64) -> usize {
    notes_len(size) + PAGE_SIZE + frames(size) as usize * PAGE_SIZE
}

/// Bytes of shared memory where the pages lie elsewhere.
pub fn notes_len(size: u64) -> usize {
    let n = frames(size) as usize;
    64 + (n * 12).next_multiple_of(64) + 2 * bits_len(n)
}

fn bits_len(frames: usize) -> usize {
    (frames.div_ceil(64) * 8).next_multiple_of(64)
}

/// The device; see the module's description.
pub struct Mem {
    name: String,
    size: u64,
    frames: u32,
    /// Frames stored, frames that have memory, the most of those. Exact but for what dying processes leave too high.
    counters: &'static [AtomicU64],
    /// Three words a frame; zero = none was given.
    sums: &'static [AtomicU32],
    /// One bit a frame: it is stored.
    stored: &'static [AtomicU64],
    /// One bit a frame: the kernel has provided its memory.
    there: &'static [AtomicU64],
    data: SharedArea,
    /// What `data` is a mapping of, where that is not the domain's segment.
    memory: Option<DeviceMemory>,
}

impl Mem {
    /// `mem` over its shared area, which has the length that [`shared_len`] gave for `size`.
    pub fn attach(size: u64, attach: &Attach) -> Self {
        Self::over(format!("mem:{}", format_size(size)), size, attach.area, |rest| {
            // Pages on pages. Every process maps the segment at a page boundary, so this is the same offset in all.
            let pad = rest.addr().next_multiple_of(PAGE_SIZE) - rest.addr();
            (rest.part(pad, frames(size) as usize * PAGE_SIZE), None)
        })
    }

    /// Memory of its own at `attach.path`; the shared area has the length that [`notes_len`] gave for its size.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn attach_memory(spec: &MemorySpec, attach: &Attach) -> Result<Self, MemoryError> {
        let memory = spec.attach(attach.path.as_deref().unwrap_or_default())?;
        let area = memory.area().ok_or_else(|| MemoryError::NoSize(spec.to_string()))?;
        let size = u64::from(memory.frames()) * PAGE_SIZE as u64;
        Ok(Self::over(spec.to_string(), size, attach.area, |_| (area, Some(memory))))
    }

    fn over(
        name: String,
        size: u64,
        area: SharedArea,
        data: impl FnOnce(SharedArea) -> (SharedArea, Option<DeviceMemory>),
    ) -> Self {
        let n = frames(size) as usize;
        let (head, rest) = area.split(64);
        let (sums, rest) = rest.split(n * 12);
        let (stored, rest) = rest.split(bits_len(n));
        let (there, rest) = rest.split(bits_len(n));
        let (data, memory) = data(rest);
        Self {
            name,
            size,
            frames: n as u32,
            counters: head.atomics64(),
            sums: sums.atomics32(),
            stored: stored.atomics64(),
            there: there.atomics64(),
            data,
            memory,
        }
    }

    fn is_there(&self, pfn: Pfn) -> bool {
        self.there[pfn as usize / 64].load(Ordering::Relaxed) & (1 << (pfn % 64)) != 0
    }

    /// Has the kernel provide the memory of a run of frames that are the caller's.
    fn provide(&self, first: Pfn, n: usize) -> Result<(), DeviceError> {
        let frames = first..first + n as Pfn;
        let missing = frames.clone().filter(|&pfn| !self.is_there(pfn)).count() as u64;
        if missing == 0 {
            return Ok(());
        }
        self.data.populate(first as usize * PAGE_SIZE, n * PAGE_SIZE).map_err(|errno| match errno {
            Errno::HWPOISON => DeviceError::Io(errno.raw_os_error()),
            _ => DeviceError::Full,
        })?;
        // Relaxed: the kernel's part is done; nothing else hangs on the bits. Counted first: who dies in between leaves
        // the count too high, not below what there is.
        let there = self.counters[1].fetch_add(missing, Ordering::Relaxed) + missing;
        self.counters[2].fetch_max(there, Ordering::Relaxed);
        for pfn in frames {
            self.there[pfn as usize / 64].fetch_or(1 << (pfn % 64), Ordering::Relaxed);
        }
        Ok(())
    }

    /// The memory of these frames, which are the caller's, goes back, unless it is kept for those that come next.
    fn let_go(&self, pfns: &[Pfn]) {
        let counter = |i: usize| self.counters[i].load(Ordering::Relaxed);
        let keeps = counter(1).saturating_sub(counter(0)) <= KEPT.max(counter(1) / 4);
        for batch in pfns.chunks(BATCH) {
            // (What was not stored was mapped, by somebody who did not tell us.)
            let goes = |pfn: &Pfn| *pfn < self.frames && !(keeps && self.is_there(*pfn));
            let mut going: ArrayVec<Pfn, BATCH> = batch.iter().copied().filter(goes).collect();
            going.sort_unstable();
            for run in going.chunk_by(|a, b| a + 1 == *b) {
                self.give_back(run[0], run.len());
            }
        }
    }

    /// Gives the memory of frames back, which nobody has; whether the kernel has taken it.
    fn give_back(&self, first: Pfn, n: usize) -> bool {
        let mut had = 0;
        for pfn in first..first + n as Pfn {
            let bit = 1 << (pfn % 64);
            // Before the memory goes: who dies in between leaves memory that is not noted, and not the reverse.
            had += u64::from(self.there[pfn as usize / 64].fetch_and(!bit, Ordering::Relaxed) & bit != 0);
        }
        let gone = self.data.give_back(first as usize * PAGE_SIZE, n * PAGE_SIZE).is_ok();
        self.counters[1].fetch_sub(had, Ordering::Relaxed);
        gone
    }

    fn store_one(&self, pfn: Pfn, page: &Page, sum: Sum, streaming: Option<&Streaming>) {
        match streaming {
            Some(streaming) => streaming.write(self.data, pfn as usize * PAGE_SIZE, page),
            None => self.data.write(pfn as usize * PAGE_SIZE, &page.0),
        }
        for (word, value) in self.sums[pfn as usize * 3..].iter().zip(sum.0) {
            word.store(value, Ordering::Relaxed);
        }
        // Relaxed: publishing the frame in a page entry is what orders the bytes before their readers.
        if !self.is_stored(pfn) {
            self.counters[0].fetch_add(1, Ordering::Relaxed);
            self.stored[pfn as usize / 64].fetch_or(1 << (pfn % 64), Ordering::Relaxed);
        }
    }

    fn kept_sum(&self, pfn: Pfn) -> Sum {
        Sum(std::array::from_fn(|i| self.sums[pfn as usize * 3 + i].load(Ordering::Relaxed)))
    }

    fn is_stored(&self, pfn: Pfn) -> bool {
        pfn < self.frames && self.stored[pfn as usize / 64].load(Ordering::Relaxed) & (1 << (pfn % 64)) != 0
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

    fn memory(&self) -> Option<&DeviceMemory> {
        self.memory.as_ref()
    }

    fn store(&self, ops: &mut [StoreOp<'_>], _owner: Owner) {
        let streaming = Streaming::of(ops.len());
        for run in ops.chunk_by_mut(|a, b| a.pfn.checked_add(1) == Some(b.pfn)) {
            let inside = run[run.len() - 1].pfn < self.frames;
            let all = inside && self.provide(run[0].pfn, run.len()).is_ok();
            for op in run {
                // Not for all of them: perhaps for some.
                op.result = match op.pfn {
                    _ if all => Ok(()),
                    pfn if pfn < self.frames => self.provide(pfn, 1),
                    _ => Err(DeviceError::Io(libc::EINVAL)),
                };
                if op.result.is_ok() {
                    self.store_one(op.pfn, op.page, op.sum, streaming.as_ref());
                }
            }
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
        if self.memory.as_ref().is_some_and(DeviceMemory::gives_back_pages) {
            self.let_go(pfns);
        }
    }

    fn shrunk(&self, first: Pfn, end: Pfn) -> u64 {
        if self.memory.is_some() {
            // Somebody may map frames there at any time. What is freed goes back when it is freed.
            return 0;
        }
        let mut given = 0;
        for word in first as usize / 64..(end.min(self.frames) as usize).div_ceil(64) {
            let base = (word * 64) as Pfn;
            let (from, to) = (first.saturating_sub(base), (end - base).min(64));
            let mask = (u64::MAX << from) & (u64::MAX >> (64 - to));
            let mut idle = self.there[word].load(Ordering::Relaxed) & mask;
            if idle != 0 {
                idle &= !self.stored[word].load(Ordering::Relaxed);
            }
            while idle != 0 {
                let at = idle.trailing_zeros();
                let n = (idle >> at).trailing_ones();
                if self.give_back(base + at, n as usize) {
                    given += u64::from(n) * PAGE_SIZE as u64;
                }
                idle &= !((u64::MAX >> (64 - n)) << at);
            }
        }
        given
    }

    fn remove(&self, _owner: Owner) -> Result<(), Errno> {
        if self.memory.as_ref().is_none_or(DeviceMemory::gives_back) {
            self.data.give_back(0, self.data.len())?;
        }
        self.there.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        self.counters[1].store(0, Ordering::Relaxed);
        Ok(())
    }

    fn usage(&self) -> Usage {
        let counter = |i: usize| self.counters[i].load(Ordering::Relaxed) * PAGE_SIZE as u64;
        // Huge pages are more than what is stored in them, and what is mapped is not noted here.
        let takes = self.memory.as_ref().map_or(0, |memory| memory.in_use().unwrap_or(0));
        let used = counter(1).max(takes);
        Usage { capacity: self.size, used, payload: counter(0), peak: counter(2).max(used) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::MemoryType;
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
        assert_eq!(dev.shrunk(500, 1024), 524 * PAGE_SIZE as u64);
        assert_eq!((dev.usage().used, dev.shrunk(500, 1024)), (500 * PAGE_SIZE as u64, 0));
        assert_eq!(load(&*dev, 499).unwrap().0, page(1023 - 499).0);
        assert!(store_all(&*dev, &[(700, page(7))])[0].is_ok());
        assert_eq!(load(&*dev, 700).unwrap().0, page(7).0);
        assert_eq!(store_all(&*dev, &[(1024, page(7))]), [Err(DeviceError::Io(libc::EINVAL))]);
    }

    #[test]
    fn memory_of_its_own_is_the_same_device() {
        let dir = tempfile::tempdir().unwrap();
        let in_dir = format!("generic:{}:4M", dir.path().display());
        for (spec, memory_type) in [
            ("generic:memfd:4M", MemoryType::Generic),
            ("coherent:memfd:4M", MemoryType::Coherent),
            (&in_dir, MemoryType::Generic),
        ] {
            let dev = testing::device(spec);
            assert_eq!((dev.frames(), dev.is_memory(), Device::name(&*dev)), (1024, true, spec));
            let memory = dev.memory().unwrap();
            assert_eq!((memory.memory_type(), memory.stores_pages()), (memory_type, true));
            let pages: Vec<_> = (0..600).map(|i| (1023 - i, page(i))).collect();
            assert!(store_all(&*dev, &pages).iter().all(Result::is_ok));
            for (pfn, page) in &pages {
                assert_eq!(load(&*dev, *pfn).unwrap().0, page.0);
            }
            assert_eq!(memory.in_use().unwrap(), 600 * PAGE_SIZE as u64, "{spec}");
            assert_eq!(load(&*dev, 0).err(), Some(DeviceError::Corrupt), "never stored");
            dev.free(&[1023, 1023], testing::ME);
            assert_eq!(load(&*dev, 1023).err(), Some(DeviceError::Corrupt));
            assert_eq!(dev.usage().payload, 599 * PAGE_SIZE as u64);
            assert_eq!(store_all(&*dev, &[(1024, page(7))]), [Err(DeviceError::Io(libc::EINVAL))]);
            // Somebody may map free frames: they are not touched.
            assert_eq!(dev.shrunk(0, 1024), 0);
            dev.remove(testing::ME).unwrap();
            assert_eq!((memory.in_use(), dev.usage().used), (Ok(0), 0));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn memory_of_freed_frames_goes_back_when_there_is_much_of_it() {
        let dev = testing::device("generic:memfd:48M");
        let pages: Vec<_> = (0..12288).map(|i| (i, page(i))).collect();
        assert!(store_all(&*dev, &pages).iter().all(Result::is_ok));
        let (takes, pages_of) = (|| dev.memory().unwrap().in_use().unwrap(), |n: u64| n * PAGE_SIZE as u64);
        assert_eq!(takes(), 48 << 20);
        dev.free(&(0..KEPT as Pfn).collect::<Vec<_>>(), testing::ME);
        assert_eq!(takes(), 48 << 20, "kept for what comes next");
        let more: Vec<Pfn> = (KEPT as Pfn..12000).collect();
        more.chunks(BATCH).for_each(|batch| dev.free(batch, testing::ME));
        assert!(takes() <= pages_of(KEPT + 288 + BATCH as u64) && takes() >= pages_of(288), "{}", takes());
        assert_eq!(dev.usage().used, takes());
        assert!((12000..12288).all(|i| load(&*dev, i).unwrap().0 == page(i).0), "what is stored stays");
        // What had gone is there again when it is stored.
        assert!(store_all(&*dev, &pages[..12000]).iter().all(Result::is_ok));
        assert!(pages.iter().all(|(pfn, page)| load(&*dev, *pfn).unwrap().0 == page.0));
        assert_eq!((takes(), dev.usage().used, dev.usage().peak), (48 << 20, 48 << 20, 48 << 20));
    }

    #[test]
    fn a_frame_that_was_only_mapped_goes_back_at_once() {
        let dev = testing::device("coherent:memfd:1M");
        let memory = dev.memory().unwrap();
        memory.area().unwrap().write(7 * PAGE_SIZE, b"somebody's");
        assert_eq!(memory.in_use(), Ok(PAGE_SIZE as u64));
        dev.free(&[7], testing::ME);
        assert_eq!(memory.in_use(), Ok(0));
        assert!(memory.must_clear(), "others may be given back later");
    }

    #[test]
    fn processes_store_and_load_in_the_same_memory() {
        let spec: crate::device::spec::Spec = "generic:memfd:1M".parse().unwrap();
        let (attach, _) = testing::attach(&spec);
        let (area, path, peers) = (attach.area, attach.path.clone(), attach.peers.clone());
        let dev = spec.attach(attach).unwrap();
        let child = testing::in_child(|| {
            // As after an exec: opened anew, by the launcher's path.
            let theirs = spec.attach(Attach { area, path, peers, create: false }).unwrap();
            assert!(testing::store(&*theirs, 5, &page(5)).is_ok());
            assert!(testing::store(&*dev, 6, &page(6)).is_ok(), "what it has from its parent is the same");
        });
        assert_eq!(testing::status(child), 0);
        assert_eq!((load(&*dev, 5).unwrap().0, load(&*dev, 6).unwrap().0), (page(5).0, page(6).0));
    }

    #[test]
    fn huge_pages_that_there_are_not_are_a_full_device() {
        // More than anyone has reserved; what there is of them works, the rest is an error and no SIGBUS.
        let dev = testing::device("generic:hugetlb:64G");
        let last = dev.frames() - 512;
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let free = text.lines().find_map(|l| l.strip_prefix("HugePages_Free:")).map_or("0", str::trim);
        let free: u32 = free.parse().unwrap();
        let stores: Vec<_> = (0..free + 1)
            .map(|i| store_all(&*dev, &[(last - i * 512, page(1)), (last - i * 512 + 1, page(2))]))
            .collect();
        assert!(
            stores.iter().any(|s| s[..] == [Err(DeviceError::Full), Err(DeviceError::Full)]),
            "{stores:?}"
        );
        for (i, _) in stores.iter().enumerate().filter(|(_, s)| s[0].is_ok()) {
            assert_eq!(load(&*dev, last - i as Pfn * 512 + 1).unwrap().0, page(2).0);
        }
        dev.remove(testing::ME).unwrap();
    }

    /// With `FARPAGE_DAX_DEVICE` naming a node that may be overwritten.
    #[test]
    fn a_device_dax_node_is_an_array_of_frames() {
        let Ok(node) = std::env::var("FARPAGE_DAX_DEVICE") else {
            println!("skipped: FARPAGE_DAX_DEVICE names no device-dax node");
            return;
        };
        let spec: crate::device::spec::Spec = format!("coherent:{node}").parse().unwrap();
        let spec = spec.resolved().unwrap();
        let dev = spec.attach(testing::attach(&spec).0).unwrap();
        let memory = dev.memory().unwrap();
        assert_eq!((memory.frames(), memory.frame_size()), (dev.frames(), PAGE_SIZE as u64));
        assert!(memory.must_clear() && !memory.gives_back() && dev.frames() > 1024);
        let last = dev.frames() - 1;
        let pages: Vec<_> = (0..1000).map(|i| (if i % 2 == 0 { i } else { last - i }, page(i))).collect();
        for _ in 0..2 {
            assert!(store_all(&*dev, &pages).iter().all(Result::is_ok));
            assert!(pages.iter().all(|(pfn, page)| load(&*dev, *pfn).unwrap().0 == page.0));
            dev.free(&pages.iter().map(|p| p.0).collect::<Vec<_>>(), testing::ME);
            assert_eq!(load(&*dev, 0).err(), Some(DeviceError::Corrupt));
        }
        dev.remove(testing::ME).unwrap();
        assert_eq!(dev.usage().used, 0);
        let again = spec.create_backing().unwrap_err().to_string();
        assert!(again.contains("in use by another process"), "{again}");
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

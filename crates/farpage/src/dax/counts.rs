//! The memory of a table's counts. A table's file is sparse: there are counts for as many pages as the file may ever have,
//! and memory for those that somebody uses. Where the file system of tables is full a touch of a count that has no memory
//! is SIGBUS, be it a look only; so memory is had before the first use, which can fail, and who looks at many counts
//! looks only where there is some.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::PAGE_SIZE;
use crate::frame::Pfn;
use crate::pagemap::{Pagemap, SharedArea};
use crate::sys::identity;

/// The counts of a table: see the module's description.
pub(super) struct Counts {
    area: SharedArea,
    /// The table's file, by the number of its descriptor, and which file it is: the program may have closed that.
    file: i32,
    identity: (u64, u64),
    /// Where the area begins in the file.
    offset: u64,
    frames: u32,
    /// A bit for each page of the area: it has memory, as far as this process knows. It keeps it.
    known: Box<[AtomicU64]>,
}

/// Counts of so many pages (64 MiB of a file) are looked at whether they have memory or not: to get it, once, is cheaper
/// than to ask each time.
const FEW: usize = 1 << 14;

/// What the kernel says where a page cannot be had.
pub(super) fn no_memory(e: Errno) -> Errno {
    // A fault that would be SIGBUS.
    if e == Errno::FAULT { Errno::NOSPC } else { e }
}

impl Counts {
    /// Of an area that begins with a page of `file`, for so many frames.
    pub fn new(
        area: SharedArea,
        file: BorrowedFd<'_>,
        identity: (u64, u64),
        offset: u64,
        frames: u32,
    ) -> Self {
        let words = area.len().div_ceil(PAGE_SIZE * 64);
        let known = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { area, file: file.as_raw_fd(), identity, offset, frames, known }
    }

    // Relaxed, all of these bits: they tell of memory only, never of what is in it.
    fn is_known(&self, page: usize) -> bool {
        self.known[page / 64].load(Ordering::Relaxed) & 1 << (page % 64) != 0
    }

    fn set_known(&self, page: usize) {
        self.known[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
    }

    /// Sees to it that the counts of these frames have memory.
    ///
    /// # Errors
    /// There is none.
    pub fn provide(&self, frames: &Range<Pfn>) -> Result<(), Errno> {
        // Hints first: who finds that a count has memory may touch its hint.
        let [words, hints] = Pagemap::counts_parts(self.frames, frames);
        self.provide_bytes(&hints)?;
        self.provide_bytes(&words)
    }

    /// The same of bytes of the area.
    ///
    /// # Errors
    /// There is none.
    pub fn provide_bytes(&self, bytes: &Range<usize>) -> Result<(), Errno> {
        let mut page = bytes.start / PAGE_SIZE;
        let end = bytes.end.div_ceil(PAGE_SIZE);
        while page < end {
            let n = (page..end).take_while(|page| !self.is_known(*page)).count();
            if n > 0 {
                let len = (n * PAGE_SIZE).min(self.area.len() - page * PAGE_SIZE);
                match self.area.populate(page * PAGE_SIZE, len) {
                    // Before Linux 5.14 one cannot ask for it.
                    Ok(()) | Err(Errno::INVAL) => (page..page + n).for_each(|page| self.set_known(page)),
                    Err(e) => return Err(no_memory(e)),
                }
            }
            page += n + 1;
        }
        Ok(())
    }

    /// Whether a page of the area has memory; if not, the first one behind it that has.
    fn has_memory(&self, page: usize) -> Result<(), Option<usize>> {
        if self.is_known(page) {
            return Ok(());
        }
        let at = self.offset + (page * PAGE_SIZE) as u64;
        let Some(file) = crate::sys::dax::borrowed(self.file) else { return Ok(()) };
        let data = rustix::fs::seek(file, SeekFrom::Data(at));
        if identity(file) != Ok(self.identity) {
            return Ok(()); // another file's answer
        }
        match data {
            Ok(data) if data < at + PAGE_SIZE as u64 => {
                self.set_known(page);
                Ok(())
            }
            Ok(data) => Err(Some((data - self.offset) as usize / PAGE_SIZE)),
            // Nothing behind it.
            Err(Errno::NXIO) => Err(None),
            // It cannot be found out on this file system.
            Err(_) => Ok(()),
        }
    }

    /// The first run of these frames whose counts have memory, in whole groups of 64. Who looks for the references that
    /// there are has entered his cut before: one who gets memory for a count after this will see that cut.
    pub fn next(&self, frames: Range<Pfn>) -> Option<Range<Pfn>> {
        if frames.len() <= FEW && self.provide(&frames).is_ok() {
            return Some(frames).filter(|frames| !frames.is_empty());
        }
        let base = Pagemap::counts_parts(self.frames, &(0..0))[0].start;
        let pages = |group: u32| {
            let bytes = base + group as usize * 256..base + (group as usize + 1) * 256;
            bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE)
        };
        let (mut group, last) = (frames.start / 64, frames.end.div_ceil(64));
        let mut found: Option<u32> = None;
        while group < last {
            match pages(group).try_for_each(|page| self.has_memory(page)) {
                Ok(()) => {
                    found = found.or(Some(group));
                    // As many groups as end in the same page.
                    let page = pages(group).end - 1;
                    let next = (((page + 1) * PAGE_SIZE - base) / 256) as u32;
                    group = next.max(group + 1);
                }
                Err(_) if found.is_some() => break,
                // Not before that page; what had memory before it was looked at.
                Err(Some(page)) => {
                    group = (((page * PAGE_SIZE).saturating_sub(base) / 256) as u32).max(group + 1)
                }
                Err(None) => return None,
            }
        }
        let start = found? * 64;
        Some(start.max(frames.start)..group.min(last).saturating_mul(64).min(frames.end))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::SharedMap;

    #[test]
    fn memory_is_found_where_it_is_and_no_memory_is_taken_to_look() {
        let frames = 1 << 20;
        let len = Pagemap::shared_len(frames);
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len as u64).unwrap();
        let blocks = || rustix::fs::fstat(&file).unwrap().st_blocks;
        let area = SharedMap::new(&file, 0, len).unwrap().area(0, len);
        let new = || Counts::new(area, file.as_fd(), identity(file.as_fd()).unwrap(), 0, frames);
        let runs = |counts: &Counts| {
            let mut from = 0;
            let next = || counts.next(from..frames).inspect(|run| from = run.end);
            let runs: Vec<Range<Pfn>> = std::iter::from_fn(next).collect();
            runs
        };
        let (ours, theirs) = (new(), new());
        assert_eq!((runs(&ours), blocks()), (vec![], 0));
        let wanted = [5..6, 100_000..100_001, 100_070..103_000, frames - 1..frames];
        wanted.iter().for_each(|frames| ours.provide(frames).unwrap());
        let before = blocks();
        for counts in [&ours, &theirs] {
            let found = runs(counts);
            for run in &wanted {
                assert!(found.iter().any(|f| f.start <= run.start && run.end <= f.end), "{run:?}: {found:?}");
            }
            assert!(found.iter().map(|f| f.len()).sum::<usize>() < 20_000, "{found:?}");
            assert!(found.windows(2).all(|two| two[0].end <= two[1].start), "{found:?}");
            assert_eq!(runs(counts), found);
            assert_eq!(counts.next(100_001..100_002), Some(100_001..100_002));
            assert_eq!(counts.next(200_000..900_000), None);
        }
        // Few are given memory.
        assert_eq!(theirs.next(300_000..300_001), Some(300_000..300_001));
        assert!((before + 1..=before + 24).contains(&blocks()));
        assert!(ours.next(200_000..900_000).unwrap().contains(&300_000));
        let before = blocks();
        // Each may be looked at.
        let [words, _] = Pagemap::counts_parts(frames, &(0..frames));
        let words = area.part(words.start, words.len()).atomics32();
        let all = runs(&theirs).into_iter().flat_map(|run| run.start..run.end);
        assert_eq!(all.map(|pfn| words[pfn as usize].load(Ordering::Relaxed)).sum::<u32>(), 0);
        assert_eq!(blocks(), before);
    }
}

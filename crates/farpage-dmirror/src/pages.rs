//! Where the process's pages are, and moving them: all that is asked of [`Space`].

use std::collections::BTreeSet;

use farpage::PAGE_SIZE;
use farpage::migrate::{MigrateReport, Outcome, Refusal, Target};
use farpage::space::Space;
use farpage_preload::init;
use rustix::io::Errno;
use rustix::mm::MprotectFlags;

use crate::pagemap::{self, PageMap};
use crate::uapi::is_coherent;
use crate::vma::Vma;

/// Bytes of a huge page.
pub const HUGE: usize = 2 << 20;

/// The private device and the frame that the page at `addr` is on.
pub fn hidden(addr: usize) -> Option<(u8, u32)> {
    let space = init::ready()?;
    let found = space.on_devices(addr, addr.checked_add(PAGE_SIZE)?);
    found.first().filter(|p| !is_coherent(p.device)).map(|p| (p.device, p.frame))
}

/// The runs of pages of `[start, end)` that are on private devices.
pub fn all_hidden(start: usize, end: usize) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    let pages = init::ready().map_or(Vec::new(), |space| space.on_devices(start, end));
    for p in pages.iter().filter(|p| !is_coherent(p.device)) {
        match found.last_mut() {
            Some(last) if last.1 == p.addr => last.1 += PAGE_SIZE,
            _ => found.push((p.addr, p.addr + PAGE_SIZE)),
        }
    }
    found
}

/// A page on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The device.
    pub device: u8,
    /// No other process has it as well, since a fork.
    pub own: bool,
}

/// What there is to know of the pages of a range.
pub struct View {
    start: usize,
    words: Vec<u64>,
    places: Vec<Option<Place>>,
}

impl View {
    /// Of `[start, end)`, now.
    pub fn new(space: &Space, start: usize, end: usize) -> Result<Self, Errno> {
        let mut words = PageMap::open()?.words(start, end)?;
        let mut places = vec![None; words.len()];
        for p in space.on_devices(start, end) {
            let i = (p.addr - start) / PAGE_SIZE;
            places[i] = Some(Place { device: p.device, own: p.count == 1 });
            if !is_coherent(p.device) {
                words[i] = pagemap::SWAP;
            }
        }
        Ok(Self { start, words, places })
    }

    /// The kernel's word of the page.
    pub fn word(&self, addr: usize) -> u64 {
        self.words[(addr - self.start) / PAGE_SIZE]
    }

    /// Whether the CPU reaches it.
    pub fn is_present(&self, addr: usize) -> bool {
        self.word(addr) & pagemap::PRESENT != 0
    }

    /// The device that it is on.
    pub fn place(&self, addr: usize) -> Option<Place> {
        self.places[(addr - self.start) / PAGE_SIZE]
    }

    /// Whether the page, which is in this mapping, may be written without a fault. (The kernel does not tell us. A private
    /// page that nobody else has is mapped so; of a shared mapping every page is.)
    pub fn is_writable(&self, addr: usize, vma: &Vma) -> bool {
        let word = self.word(addr);
        let mapped = match self.place(addr) {
            Some(place) => place.own,
            None if vma.shared => self.is_present(addr),
            None => {
                word & pagemap::PRESENT != 0 && word & pagemap::EXCLUSIVE != 0 && word & pagemap::FILE == 0
            }
        };
        vma.write && mapped
    }
}

/// Runs of pages of `[start, end)` for which `which` holds.
pub fn runs(start: usize, end: usize, which: impl Fn(usize) -> bool) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for at in (start..end).step_by(PAGE_SIZE).filter(|&at| which(at)) {
        match found.last_mut() {
            Some(last) if last.1 == at => last.1 = at + PAGE_SIZE,
            _ => found.push((at, at + PAGE_SIZE)),
        }
    }
    found
}

/// Has `[start, end)` of a private anonymous mapping managed.
pub fn manage(space: &Space, start: usize, end: usize) -> Result<(), Errno> {
    space.change(|world| {
        let gaps: Vec<(usize, usize)> = {
            let mut at = start;
            let mut gaps = Vec::new();
            for r in world.ranges.overlapping(start, end) {
                if r.start > at {
                    gaps.push((at, r.start));
                }
                at = at.max(r.end);
            }
            if at < end {
                gaps.push((at, end));
            }
            gaps
        };
        gaps.into_iter().try_for_each(|(s, e)| space.add(world, s, e))
    })
}

/// A mapping that may be written while this lives: the kernel moves no page out of another.
struct Writable<'a>(&'a Vma);

impl<'a> Writable<'a> {
    fn new(vma: &'a Vma) -> Result<Self, Errno> {
        let this = Self(vma);
        if !vma.write {
            this.protect(true)?;
        }
        Ok(this)
    }

    fn protect(&self, write: bool) -> Result<(), Errno> {
        let v = self.0;
        let mut flags = MprotectFlags::empty();
        for (has, flag) in
            [(v.read, MprotectFlags::READ), (write, MprotectFlags::WRITE), (v.exec, MprotectFlags::EXEC)]
        {
            flags.set(flag, has);
        }
        // SAFETY: for the moment of the move the mapping permits more than it did, then as much again; no byte changes.
        unsafe { rustix::mm::mprotect(v.start as *mut _, v.end - v.start, flags) }
    }
}

impl Drop for Writable<'_> {
    fn drop(&mut self) {
        if !self.0.write && self.protect(false).is_err() {
            farpage::sys::say("a mapping could not be made read-only again");
        }
    }
}

/// Moves the pages of `vma` to device `minor`, those that are there and those that are not; but not what is on
/// another device. `huge`: huge pages go as one. Returns which pages moved.
pub fn to_device(space: &Space, minor: u8, vma: &Vma, huge: &mut bool) -> Result<Vec<usize>, Errno> {
    if vma.shared {
        return Ok(Vec::new());
    }
    let (start, end) = (vma.start, vma.end);
    let map = PageMap::open()?;
    let mut candidates = runs(start, end, |_| true);
    if vma.file {
        let words = map.words(start, end)?;
        let own = |at: usize| {
            let word = words[(at - start) / PAGE_SIZE];
            word & pagemap::PRESENT != 0 && word & pagemap::FILE == 0
        };
        candidates = runs(start, end, own);
        candidates.retain(|&(s, e)| crate::private_file::make_anonymous(vma, s, e).is_ok());
    }
    for &(s, e) in &candidates {
        manage(space, s, e)?;
    }
    let view = View::new(space, start, end)?;
    // (What a private mapping of a file has of its own is not one page.)
    let whole = if vma.file { Vec::new() } else { whole(&map, &view, start, end, huge)? };
    let _writable = Writable::new(vma)?;
    let mut moved = Vec::new();
    for (s, e) in candidates {
        for (s, e) in runs(s, e, |at| view.place(at).is_none()) {
            let mut report = space.migrate(s..e, Target::Device(minor)).map_err(|_| Errno::INVAL)?;
            moved.extend(moved_by(&report));
            let full = report.refused().any(|(_, why)| why == Refusal::NoMemory);
            if full && crate::own::reap(space) > 0 {
                // There is room again, of somebody who was killed.
                report = space.migrate(s..e, Target::Device(minor)).map_err(|_| Errno::INVAL)?;
                moved.extend(moved_by(&report));
                moved.sort_unstable();
            }
        }
    }
    if is_coherent(minor) {
        let prot = (vma.read, vma.write, vma.exec);
        for (s, e) in runs(start, end, |at| moved.binary_search(&at).is_ok()) {
            space.map_in_place(s, e, minor, prot)?;
        }
    }
    for block in whole {
        space.set_huge_on_device(block);
    }
    Ok(moved)
}

fn moved_by(report: &MigrateReport) -> impl Iterator<Item = usize> + '_ {
    let addrs = (report.start..).step_by(PAGE_SIZE).zip(&report.pages);
    addrs.filter(|(_, o)| **o == Outcome::Moved).map(|(at, _)| at)
}

/// Which 2 MiB pieces of `[start, end)` are going to leave as one page: huge pages, and those in which there is nothing.
fn whole(map: &PageMap, view: &View, start: usize, end: usize, may: &mut bool) -> Result<Vec<usize>, Errno> {
    // The device looks at 2 MiB at a time, from the first byte on.
    if !start.is_multiple_of(HUGE) {
        return Ok(Vec::new());
    }
    let mut huge = BTreeSet::new();
    map.kinds(start, end, |s, e, kind| {
        if kind & pagemap::IS_HUGE != 0 {
            huge.extend((s.next_multiple_of(HUGE)..e.saturating_sub(HUGE - 1)).step_by(HUGE));
        }
    })?;
    let nothing =
        |at: usize| view.word(at) & (pagemap::PRESENT | pagemap::SWAP) == 0 && view.place(at).is_none();
    let empty = |block: usize| (block..block + HUGE).step_by(PAGE_SIZE).all(nothing);
    let blocks = (start..end.saturating_sub(HUGE - 1)).step_by(HUGE);
    let mut whole: Vec<usize> = blocks.filter(|b| huge.contains(b) || empty(*b)).collect();
    if !*may && !whole.is_empty() {
        // The allocation that fails, this once: its pages go one by one.
        whole.remove(0);
        *may = true;
    }
    Ok(whole)
}

/// Moves the pages of `[start, end)` that are on device `minor` back to DRAM; returns how many. `huge`: those that left
/// as a huge page become one again.
pub fn to_system(
    space: &Space,
    minor: u8,
    start: usize,
    end: usize,
    huge: &mut bool,
) -> Result<usize, Errno> {
    let blocks = space.huge_on_devices(start, end);
    let blocks = blocks.iter().filter(|&&(b, device)| device == minor && start <= b && b + HUGE <= end);
    let blocks: Vec<usize> = blocks.map(|b| b.0).collect();
    let mine: BTreeSet<usize> =
        space.on_devices(start, end).iter().filter(|p| p.device == minor).map(|p| p.addr).collect();
    let Some((&first, &last)) = mine.first().zip(mine.last()) else { return Ok(0) };
    let mut moved = 0;
    for (s, e) in runs(first, last + PAGE_SIZE, |at| mine.contains(&at)) {
        if is_coherent(minor) {
            moved += space.unmap_in_place(s, e, minor)?;
        } else {
            moved += space.migrate(s..e, Target::System).map_err(|_| Errno::INVAL)?.moved();
        }
    }
    for block in blocks {
        if !*huge {
            *huge = true;
        } else if !is_coherent(minor) {
            // What does not become huge again stays as it is.
            let _small = space.collapse(block..block + HUGE);
        }
    }
    Ok(moved)
}

//! Pins: pages that are in DRAM and stay at their addresses while somebody uses them (Linux: `pin_user_pages`).
//!
//! A pin is a count for each page, kept with the granule; reclaim and migrations leave pages with a count alone.
//! [`Space::hold`] keeps a buffer in place for one system call, whatever is in it; a pin also brings the pages in, is
//! counted and limited, and lives as long as its owner likes. Both are honoured at the same place, by the same protocol:
//! who is about to move pages says so first and looks then; who pins counts first and waits then until nobody moves.
//!
//! No lock is taken that a fault handler may wait for: the pinning thread's own stack may be managed memory.
//!
//! # What becomes of a pinned page when its mapping goes
//!
//! As in Linux, a pin stops nobody from unmapping, dropping (`MADV_DONTNEED`) or remapping the memory: the program owns it.
//! What the kernel itself has pinned (a transfer in flight, a registered buffer) keeps its frames until it lets go, and
//! frames that the kernel may hold are never recycled (docs/guarantees.md). The pin stays with the *address*: after a drop
//! it covers the fresh pages there; after `munmap` it covers nothing; after `mremap` the new place is not pinned.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;

use super::bits::{mask, runs};
use super::range::{GRANULE, GRANULE_PAGES, Ranges};
use super::{FaultMode, Space};
use crate::PAGE_SIZE;
use crate::migrate::{Refusal, Target};
use crate::pagemap::MemoryType;
use crate::reclaim::Hands;
use crate::sys::Mappings;

/// For how long pages may stay pinned.
///
/// See the example of [`Space::pin`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin {
    /// For a transfer.
    Short,
    /// For as long as the owner likes (`FOLL_LONGTERM`): only of memory that never has to move.
    LongTerm,
}

/// Why pages could not be pinned. Nothing is pinned then.
///
/// See the example of [`Space::pin`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// Not whole pages, none at all, or beyond the address space.
    #[error("{start:#x}..{end:#x} is no range of whole pages")]
    Range {
        /// First byte.
        start: usize,
        /// One past the last.
        end: usize,
    },
    /// There is no memory, or none that farpage manages.
    #[error("the page at {0:#x} is not managed memory")]
    NotManaged(usize),
    /// The page cannot be brought in, or may not be written.
    #[error("the page at {0:#x} cannot be {verb}", verb = if *.1 { "written" } else { "read" })]
    NoAccess(usize, bool),
    /// Too much would be pinned.
    #[error("{asked} pages more than the {pinned} that are pinned would exceed the limit of {limit}")]
    Limit {
        /// Pages asked for.
        asked: u64,
        /// Pages pinned already, in all processes of the domain.
        pinned: u64,
        /// The most that may be.
        limit: u64,
    },
    /// A long-term pin of memory of a type that could never be given back then.
    #[error(
        "the page at {0:#x} is {1:?} memory, which cannot be pinned for long: its owner could not take it back"
    )]
    LongTerm(usize, MemoryType),
    /// The memory is full of what may not leave, so that this cannot be brought in.
    #[error("there is no memory to bring in the page at {0:#x}")]
    NoMemory(usize),
}

/// The pins of one granule's pages.
pub(crate) struct GranulePins {
    /// Pins of all its pages.
    whole: AtomicU32,
    /// Pins of some of them.
    some: AtomicU32,
    pages: [AtomicU32; GRANULE_PAGES],
}

impl Default for GranulePins {
    fn default() -> Self {
        Self {
            whole: AtomicU32::new(0),
            some: AtomicU32::new(0),
            pages: [const { AtomicU32::new(0) }; GRANULE_PAGES],
        }
    }
}

impl GranulePins {
    /// The pages that are pinned. SeqCst, as all of this, with the fences of `begin_move` and `wait_for_moves`.
    pub fn pages(&self) -> u64 {
        if self.whole.load(Ordering::SeqCst) != 0 {
            return u64::MAX;
        }
        if self.some.load(Ordering::SeqCst) == 0 {
            return 0;
        }
        let pinned = |(i, n): (usize, &AtomicU32)| u64::from(n.load(Ordering::SeqCst) != 0) << i;
        self.pages.iter().enumerate().map(pinned).fold(0, |all, page| all | page)
    }

    fn add(&self, pages: u64) {
        if pages == u64::MAX {
            self.whole.fetch_add(1, Ordering::SeqCst);
            return;
        }
        for i in runs(pages).flat_map(|(first, n)| first..first + n) {
            self.pages[i].fetch_add(1, Ordering::SeqCst);
        }
        self.some.fetch_add(1, Ordering::SeqCst);
    }

    fn remove(&self, pages: u64) {
        if pages == u64::MAX {
            self.whole.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        self.some.fetch_sub(1, Ordering::SeqCst);
        for i in runs(pages).flat_map(|(first, n)| first..first + n) {
            self.pages[i].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// In a forked child.
    pub fn clear(&self) {
        self.whole.store(0, Ordering::SeqCst);
        self.some.store(0, Ordering::SeqCst);
        self.pages.iter().for_each(|n| n.store(0, Ordering::SeqCst));
    }
}

/// The process's pins.
#[derive(Default)]
pub(crate) struct Pins {
    /// Changes in a forked child: the pins before were its parent's.
    epoch: AtomicU32,
    /// Pages pinned for long.
    long_term: AtomicU64,
    /// There was a fork: pages may be shared, until they are written.
    shares: AtomicBool,
}

impl Pins {
    /// In a forked child: nothing is pinned. (What its parent has pinned are the parent's pages, even where the two still
    /// share the frames: the kernel copies for the child what the parent has pinned.)
    pub fn reset(&self, ranges: &Ranges) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        self.long_term.store(0, Ordering::SeqCst);
        self.forked();
        for found in ranges.iter().flat_map(super::range::Range::iter) {
            found.granule.forget_pins();
        }
    }

    /// After a fork, in parent and child.
    pub fn forked(&self) {
        self.shares.store(true, Ordering::SeqCst);
    }
}

/// Pages in DRAM that stay where they are while this lives.
///
/// See the example of [`Space::pin`].
pub struct PinnedRange<'a> {
    space: &'a Space,
    range: Range<usize>,
    kind: Pin,
    writable: bool,
    epoch: u32,
    granules: Vec<(Arc<GranulePins>, u64)>,
}

impl PinnedRange<'_> {
    /// First byte: what system calls and devices may be given.
    pub fn addr(&self) -> usize {
        self.range.start
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has no bytes (it always has).
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// How it was pinned.
    pub fn kind(&self) -> Pin {
        self.kind
    }

    /// Whether it was pinned to be written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The bytes.
    ///
    /// # Safety
    /// As for any memory that is found by its address: it stays mapped, and nobody writes it, while the slice lives.
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped and readable when it was pinned; the rest is the caller's contract.
        unsafe { std::slice::from_raw_parts(self.range.start as *const u8, self.range.len()) }
    }
}

impl Drop for PinnedRange<'_> {
    fn drop(&mut self) {
        // In a forked child that was another's pin.
        if self.epoch != self.space.pins.epoch.load(Ordering::SeqCst) {
            return;
        }
        for (pins, pages) in &self.granules {
            pins.remove(*pages);
        }
        let pages = (self.range.len() / PAGE_SIZE) as u64;
        self.space.slot().pinned.fetch_sub(pages, Ordering::SeqCst);
        if self.kind == Pin::LongTerm {
            self.space.pins.long_term.fetch_sub(pages, Ordering::SeqCst);
        }
    }
}

impl Space {
    /// Pages that this process has pinned; a page counts once for each pin.
    pub fn pinned(&self) -> u64 {
        self.slot().pinned.load(Ordering::SeqCst)
    }

    /// Of these, the ones pinned for long.
    pub fn pinned_long_term(&self) -> u64 {
        self.pins.long_term.load(Ordering::SeqCst)
    }

    /// Brings the pages of `range` (whole pages of managed memory) into DRAM and keeps them there, at their addresses, until
    /// the result is dropped. `write`: they are going to be written, by a system call or a device, so a page that is
    /// shared since a fork becomes this process's own first.
    ///
    /// ```
    /// use farpage::{Domain, Pin, PinError};
    ///
    /// let space = Domain::builder().dram("8M").device("ram:64M").max_pinned(2 << 20).build()?.start_inline()?;
    /// let mut v = space.region_from_fn(32 << 20, |i| i as u8)?; // most of it is away
    ///
    /// let pin = space.pin(v.pages(..1 << 20), Pin::Short, true)?;
    /// assert_eq!((pin.addr(), pin.len(), pin.is_empty()), (v.as_ptr() as usize, 1 << 20, false));
    /// assert_eq!((pin.kind(), pin.is_writable()), (Pin::Short, true));
    /// // SAFETY: nobody else uses the region.
    /// assert_eq!(unsafe { pin.as_slice() }[300], 44);
    /// // A system call may write there; in an inline space it needs the pin.
    /// std::io::Read::read_exact(&mut std::fs::File::open("/dev/zero")?, &mut v[..4096])?;
    /// assert_eq!(v[300], 0);
    ///
    /// let error = space.pin(v.pages(..2 << 20), Pin::LongTerm, false).err();
    /// assert_eq!(error, Some(PinError::Limit { asked: 512, pinned: 256, limit: 512 }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`PinError`]; nothing is pinned then.
    pub fn pin(&self, range: Range<usize>, kind: Pin, write: bool) -> Result<PinnedRange<'_>, PinError> {
        let (start, end) = (range.start, range.end);
        let limits = crate::domain::ADDRESS_LIMIT;
        if start % PAGE_SIZE != 0 || end % PAGE_SIZE != 0 || start >= end || end > limits {
            return Err(PinError::Range { start, end });
        }
        self.count_pins((range.len() / PAGE_SIZE) as u64, kind)?;
        let granules = Vec::with_capacity(range.len() / GRANULE + 2);
        let epoch = self.pins.epoch.load(Ordering::SeqCst);
        // From here on dropping it undoes everything.
        let mut pinned = PinnedRange { space: self, range, kind, writable: write, epoch, granules };
        if kind == Pin::LongTerm {
            self.leave_movable(start, end)?;
        }
        self.pin_granules(&mut pinned)?;
        self.wait_for_moves();
        self.make_resident(start, end, write)?;
        if kind == Pin::LongTerm {
            // Mapped in place again meanwhile: now it is pinned, and stays.
            self.none_in_place(self.in_place(start, end))?;
        }
        Ok(pinned)
    }

    fn count_pins(&self, pages: u64, kind: Pin) -> Result<(), PinError> {
        let limit = self.domain.pin_limit();
        let mine = &self.slot().pinned;
        // Added first and looked at then: two at once may both be refused, never both admitted beyond the limit.
        mine.fetch_add(pages, Ordering::SeqCst);
        let total = self.domain.pinned();
        if total > limit {
            mine.fetch_sub(pages, Ordering::SeqCst);
            return Err(PinError::Limit { asked: pages, pinned: total - pages, limit });
        }
        if kind == Pin::LongTerm {
            self.pins.long_term.fetch_add(pages, Ordering::SeqCst);
        }
        Ok(())
    }

    /// A long-term pin must not hold memory that its owner has to be able to take back. What is on a device and not reached
    /// in place comes to DRAM anyway; what is reached in place comes first, if nobody has pinned it there.
    fn leave_movable(&self, start: usize, end: usize) -> Result<(), PinError> {
        let world = self.read_world();
        for (found, s, e) in world.ranges.granules(start, end) {
            if !found.granule.has(super::range::flag::ENTRIES) {
                continue;
            }
            for at in (s..e).step_by(PAGE_SIZE) {
                let Some((dev, _)) = self.entries.get(at).frame() else { continue };
                let memory = self.domain.pagemap(dev).memory_type;
                if !pins_for_long(memory) {
                    return Err(PinError::LongTerm(at, memory));
                }
            }
        }
        drop(world);
        self.none_in_place(self.leave_in_place(start, end, |map| !stays_for_long(map.memory_type)))
    }

    /// Of what is mapped in place only that which need not move.
    fn none_in_place(&self, parts: Result<Vec<(usize, usize)>, Errno>) -> Result<(), PinError> {
        let parts = parts.map_err(|_| PinError::NoMemory(0))?;
        for at in parts.iter().flat_map(|&(s, e)| (s..e).step_by(PAGE_SIZE)) {
            let Some((dev, _)) = self.entries.get(at).frame() else { continue };
            let memory = self.domain.pagemap(dev).memory_type;
            if !stays_for_long(memory) {
                return Err(PinError::LongTerm(at, memory));
            }
        }
        Ok(())
    }

    fn pin_granules(&self, pinned: &mut PinnedRange<'_>) -> Result<(), PinError> {
        let (start, end) = (pinned.range.start, pinned.range.end);
        let world = self.read_world();
        let mut at = start;
        for (found, s, e) in world.ranges.granules(start, end) {
            if s != at {
                break;
            }
            // (A granule at a range's edge is whole only if its place is; see `Granule::pinned`.)
            let pages = mask(s % GRANULE / PAGE_SIZE, (e - s) / PAGE_SIZE);
            let pins = found.granule.pins();
            crate::sys::point::point();
            pins.add(pages);
            pinned.granules.push((pins.clone(), pages));
            at = e;
        }
        if at == end { Ok(()) } else { Err(PinError::NotManaged(at)) }
    }

    /// Every page is there, and may be written if it is to be.
    fn make_resident(&self, start: usize, end: usize, write: bool) -> Result<(), PinError> {
        let pages = ((end - start) / PAGE_SIZE) as u64;
        // The kernel's page of zeros is there, but it is nobody's to write to.
        let there = || {
            let scan = &self.read_world().scan;
            let own = if write { scan.count_own(start, end) } else { scan.count(start, end) };
            own == Ok(pages)
        };
        if there() && !(write && self.pins.shares.load(Ordering::SeqCst)) {
            return if write { may_write(start, end) } else { Ok(()) };
        }
        // In long stretches, where there is something to bring in; what was never touched comes with the faults below.
        if let Ok(report) = self.migrate(start..end, Target::System) {
            let lost = |why: Refusal| matches!(why, Refusal::NoMemory | Refusal::Device | Refusal::Lost);
            match report.refused().find(|&(_, why)| lost(why)) {
                Some((at, Refusal::NoMemory)) => return Err(PinError::NoMemory(at)),
                Some((at, _)) => return Err(PinError::NoAccess(at, write)),
                None => {}
            }
        }
        // What was on its way out when we said that we pin may have to be asked for more than once.
        for _ in 0..100 {
            while crate::sys::populate(start, end - start, write).is_err() {
                let absent = self.read_world().scan.first_absent(start, end);
                // Faults in the kernel are not answered in an inline space.
                let ours = absent.filter(|_| self.mode() == FaultMode::Inline);
                if !ours.is_some_and(|at| self.fault_here(at, &mut Hands::new())) {
                    return Err(PinError::NoAccess(absent.unwrap_or(start), write));
                }
            }
            if there() {
                return Ok(());
            }
        }
        Err(PinError::NoMemory(start))
    }
}

/// Whether a page whose memory is of this type can be pinned for long where it is, or can leave it first. What a space has on
/// `Private` or `Coherent` memory comes to DRAM, and the pin is on it there. A file's
/// block has to be given up when the file is cut, and a peer's memory goes with its driver.
fn pins_for_long(memory: MemoryType) -> bool {
    match memory {
        MemoryType::System | MemoryType::Private | MemoryType::Coherent | MemoryType::Generic => true,
        MemoryType::FsDax | MemoryType::P2pDma => false,
    }
}

/// Whether a page that is mapped in place, from memory of this type, can be pinned for long there: what never has to move.
fn stays_for_long(memory: MemoryType) -> bool {
    memory == MemoryType::Generic
}

/// Whether the mappings of `[start, end)` may be written.
fn may_write(start: usize, end: usize) -> Result<(), PinError> {
    let mappings = Mappings::open().map_err(|_| PinError::NoAccess(start, true))?;
    let mut at = start;
    while at < end {
        match mappings.at(at) {
            Some(m) if m.write => at = m.end,
            _ => return Err(PinError::NoAccess(at, true)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_pinned_as_long_as_any_pin_covers_it() {
        let pins = GranulePins::default();
        assert_eq!(pins.pages(), 0);
        pins.add(0b0110);
        pins.add(0b0011);
        assert_eq!(pins.pages(), 0b0111);
        pins.add(u64::MAX);
        assert_eq!(pins.pages(), u64::MAX);
        pins.remove(0b0110);
        pins.remove(u64::MAX);
        assert_eq!(pins.pages(), 0b0011);
        pins.remove(0b0011);
        assert_eq!(pins.pages(), 0);
    }
}

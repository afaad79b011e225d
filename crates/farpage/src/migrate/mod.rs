//! Migration: pages move to a device, back to DRAM, or between devices, on request.
//!
//! The three steps are those of Linux' `migrate_vma`. *Collect* (`out`): one `UFFDIO_MOVE` takes up to 2 MiB out of the
//! program into staging slots; whoever touches a page meanwhile gets it back, and it is not moved. *Copy*: the pages are
//! stored on the device straight from there. *Finalize*: the page entries name their new frames and the DRAM is free, or
//! the pages go back. It is the way that reclaim goes ([`crate::reclaim`]), with a device that is named; and the way in
//! (`back`) is that of a fault. A page that cannot move says why; the others go on.
//!
//! # Holes and zero pages
//!
//! What was asked to be on a device is there afterwards, each page in a frame of its own: a hole becomes a frame of zeros on the
//! device, without being faulted in, and so does a page that has left DRAM as one value repeated. (Reclaim keeps such
//! pages without any frame; but a device that is given a range wants to find it.) On the way back a frame of zeros is a page
//! like any other, and holes stay holes.
//!
//! # Whose thread
//!
//! The reclaim worker does the moving, and the caller waits: his stack, and what he allocates, may be the very memory that
//! moves. (What he hands over, the report and the closure, must not: a library that manages its program's heap needs a heap of
//! its own, as farpage-preload has.)

mod access;
mod back;
mod compact;
mod huge;
mod jobs;
mod out;
mod remove;

pub use access::AccessError;
pub use compact::Compacted;
pub(crate) use jobs::Jobs;

use std::ops::Range;

use crate::PAGE_SIZE;
use crate::reclaim::Hands;
use crate::space::range::{GRANULE, STRETCH};
use crate::space::{Space, World};

/// Bytes that move together at most: a huge page.
const WINDOW: usize = STRETCH * GRANULE;

/// Where to.
///
/// See the example of [`Space::migrate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// DRAM, in the program.
    System,
    /// The device with this number ([`crate::pagemap::Pagemap::id`]).
    Device(u8),
}

/// Why a page did not move. It is where it was, unless something else has moved it meanwhile.
///
/// See the example of [`Space::migrate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// Somebody has pinned it: by [`Space::pin`], by [`Space::hold`], or through the kernel (a registered buffer, a transfer in flight).
    Pinned,
    /// It is shared with another process since a fork and could not be made this one's own.
    Shared,
    /// Somebody else was at it: a fault brought it back, its mapping was being changed, another migration had it.
    Busy,
    /// The device is full, or there is no DRAM for it.
    NoMemory,
    /// Its mapping may not be written: the kernel moves no page out of such.
    ReadOnly,
    /// Its mapping is locked (`mlock`) or otherwise unlike ours: the kernel moves no page out of such.
    Locked,
    /// There is no memory, or none that farpage manages.
    Unmanaged,
    /// The device failed to store or to load it.
    Device,
    /// It was lost earlier: who touches it gets SIGBUS.
    Lost,
}

/// What became of a page.
///
/// See the example of [`Space::migrate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It moved.
    Moved,
    /// It is where it was asked to be already; or there is no page, and none was asked for.
    There,
    /// It did not move.
    Refused(Refusal),
}

/// What became of each page of a range.
///
/// See the example of [`Space::migrate`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrateReport {
    /// The first page's address.
    pub start: usize,
    /// Page by page.
    pub pages: Vec<Outcome>,
}

impl MigrateReport {
    /// How many moved.
    pub fn moved(&self) -> usize {
        self.pages.iter().filter(|&&o| o == Outcome::Moved).count()
    }

    /// How many are where they were asked to be.
    pub fn there(&self) -> usize {
        self.pages.iter().filter(|o| !matches!(o, Outcome::Refused(_))).count()
    }

    /// Those that did not move: address and reason.
    pub fn refused(&self) -> impl Iterator<Item = (usize, Refusal)> + '_ {
        self.pages.iter().enumerate().filter_map(|(i, o)| match o {
            Outcome::Refused(why) => Some((self.start + i * PAGE_SIZE, *why)),
            _ => None,
        })
    }
}

/// Why nothing could be migrated at all.
///
/// ```
/// use farpage::migrate::MigrateError;
/// use farpage::{Domain, Target};
///
/// let space = Domain::builder().dram("8M").build()?.start_inline()?;
/// let v = space.region::<u8>(4096)?;
/// assert_eq!(space.migrate(v.pages(..), Target::Device(9)), Err(MigrateError::NoDevice(9)));
/// assert!(matches!(space.migrate(1..2, Target::System), Err(MigrateError::Range { .. })), "no whole pages");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MigrateError {
    /// Not whole pages, none at all, or beyond the address space.
    #[error("{start:#x}..{end:#x} is no range of whole pages")]
    Range {
        /// First byte.
        start: usize,
        /// One past the last.
        end: usize,
    },
    /// No such device.
    #[error("there is no device {0}")]
    NoDevice(u8),
}

/// A migration under way.
struct Progress {
    start: usize,
    at: usize,
    end: usize,
    to: Target,
    /// Pages that may still come in: more would only push out what came first.
    room: usize,
    pages: Vec<Outcome>,
}

impl Space {
    /// Moves the pages of `range` (whole pages) to a device, or back to DRAM. Returns when all of it is done; what became of
    /// each page is in the report, as of the moment when it was its turn.
    ///
    /// ```
    /// use farpage::{Domain, Outcome, Pin, Refusal, Target};
    ///
    /// let space = Domain::builder().dram("8M").device("mem:16M").device("ram:16M").build()?.start_inline()?;
    /// let v = space.region_from_fn(4 * 512, |i| i as u64)?;
    /// let pin = space.pin(v.pages(512..1024), Pin::Short, false)?;
    ///
    /// let report = space.migrate(v.pages(..), Target::Device(0))?;
    /// let second = report.start + 4096;
    /// assert_eq!(report.pages[1], Outcome::Refused(Refusal::Pinned));
    /// assert_eq!(report.refused().collect::<Vec<_>>(), [(second, Refusal::Pinned)]);
    /// assert_eq!((report.moved(), report.there()), (3, 3));
    /// drop(pin);
    ///
    /// // From one device to another: three pages move there, and the one that was pinned leaves DRAM.
    /// assert_eq!(space.migrate(v.pages(..), Target::Device(1))?.moved(), 4);
    /// assert_eq!(space.migrate(v.pages(..), Target::Device(1))?.pages, [Outcome::There; 4]);
    /// assert_eq!(space.migrate(v.pages(..), Target::System)?.moved(), 4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`MigrateError`]: nothing was tried.
    pub fn migrate(&self, range: Range<usize>, to: Target) -> Result<MigrateReport, MigrateError> {
        check(&range)?;
        if let Target::Device(dev) = to
            && usize::from(dev) >= self.domain.pagemaps.len()
        {
            return Err(MigrateError::NoDevice(dev));
        }
        let Range { start, end } = range;
        Ok(MigrateReport { start, pages: self.migrate_all(start, end, to) })
    }

    /// What is mapped in place, from another device, comes to DRAM first, so that nobody writes to a frame that is being left; what
    /// is pinned there stays.
    fn migrate_all(&self, start: usize, end: usize, to: Target) -> Vec<Outcome> {
        let was = self.in_place(start, end).unwrap_or_default();
        let stay = self.leave_in_place(start, end, |map| to != Target::Device(map.id));
        let stay = stay.unwrap_or_else(|_| vec![(start, end)]);
        if was.is_empty() && stay.is_empty() {
            return self.migrate_part(start, end, to);
        }
        let index = |at: usize| (at - start) / PAGE_SIZE;
        let mut pages = vec![Outcome::There; index(end)];
        let mut at = start;
        for (s, e) in stay.into_iter().chain([(end, end)]) {
            if at < s {
                pages[index(at)..index(s)].copy_from_slice(&self.migrate_part(at, s, to));
            }
            for page in (s..e).step_by(PAGE_SIZE) {
                let there = self.entries.get(page).frame().is_some_and(|(dev, _)| to == Target::Device(dev));
                pages[index(page)] = if there { Outcome::There } else { Outcome::Refused(Refusal::Pinned) };
            }
            at = e;
        }
        // Moved, by the way.
        let back = was.into_iter().flat_map(|(s, e)| index(s)..index(e));
        for i in back.filter(|_| to == Target::System) {
            if pages[i] == Outcome::There {
                pages[i] = Outcome::Moved;
            }
        }
        pages
    }

    fn migrate_part(&self, start: usize, end: usize, to: Target) -> Vec<Outcome> {
        let pages = vec![Outcome::Refused(Refusal::Unmanaged); (end - start) / PAGE_SIZE];
        let budget = self.domain.budget() as usize;
        let progress = Progress { start, at: start, end, to, room: budget - budget / 8, pages };
        let progress = self.on_worker(progress, |space, world, hands, p| {
            let end = (p.at / WINDOW * WINDOW + WINDOW).min(p.end);
            let first = (p.at - p.start) / PAGE_SIZE;
            let pages = &mut p.pages[first..first + (end - p.at) / PAGE_SIZE];
            space.migrate_window(world, p.at, p.to, &mut p.room, pages, hands);
            p.at = end;
            p.at == p.end
        });
        progress.pages
    }

    /// One window (which does not cross a multiple of 2 MiB) from `start` on; `pages` says how long it is.
    fn migrate_window(
        &self,
        world: &World,
        start: usize,
        to: Target,
        room: &mut usize,
        pages: &mut [Outcome],
        hands: &mut Hands,
    ) {
        let end = start + pages.len() * PAGE_SIZE;
        for range in world.ranges.overlapping(start, end) {
            let (s, e) = (range.start.max(start), range.end.min(end));
            let pages = &mut pages[(s - start) / PAGE_SIZE..(e - start) / PAGE_SIZE];
            match to {
                Target::Device(dev) => {
                    self.forget_huge(range, s);
                    self.migrate_out(world, range, (s, e), dev, pages, hands);
                }
                Target::System => self.migrate_back(world, range, (s, e), room, pages, hands),
            }
        }
    }

    /// Has the kernel make huge pages of the 2 MiB pieces of `range` (`MADV_COLLAPSE`), which must be in DRAM, all of them.
    /// Returns how many are huge now. For a range that was huge, was migrated and came back in small pages.
    ///
    /// ```
    /// use farpage::{Domain, Target};
    ///
    /// let space = Domain::builder().dram("16M").device("mem:16M").build()?.start_inline()?;
    /// let v = space.region_from_fn(4 << 20, |i| i as u8)?; // 4 MiB: at least one whole piece of 2 MiB
    /// space.migrate(v.pages(..), Target::Device(0))?;
    /// space.migrate(v.pages(..), Target::System)?;
    /// let huge = space.collapse(v.pages(..))?; // 0 where the system has none to give
    /// println!("{huge} huge pages");
    /// # assert!(huge <= 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`MigrateError::Range`].
    pub fn collapse(&self, range: Range<usize>) -> Result<usize, MigrateError> {
        check(&range)?;
        let first = range.start.next_multiple_of(WINDOW);
        let pieces = (first..range.end.saturating_sub(WINDOW - 1)).step_by(WINDOW);
        Ok(pieces.filter(|&at| crate::sys::collapse(at, WINDOW).is_ok()).count())
    }
}

pub(crate) fn check(range: &Range<usize>) -> Result<(), MigrateError> {
    let &Range { start, end } = range;
    let whole = start.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE);
    if !whole || start >= end || end > crate::domain::ADDRESS_LIMIT {
        return Err(MigrateError::Range { start, end });
    }
    Ok(())
}

//! Exclusive access: pages that a device has to itself until the CPU touches them (Linux: device-exclusive entries).
//!
//! The pages leave the program (into staging slots, still in DRAM) and the device works on them through
//! [`ExclusiveRange::read`] and [`ExclusiveRange::write`]. A CPU that touches one takes it back by the fault that this
//! causes, and from then on the device has lost it, for good: that it is evicted later does not make it exclusive again.
//! Under memory pressure reclaim stores such pages on a device like any that are staged; they are exclusive all the same.
//! A fork gives everything back first.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::{Space, World};
use crate::PAGE_SIZE;
use crate::migrate::{AccessError, MigrateError, check};
use crate::sys;

/// The pages that one device has taken.
struct Taken {
    start: usize,
    end: usize,
    /// One bit a page: it is exclusive still.
    pages: Vec<AtomicU64>,
    over: AtomicBool,
}

impl Taken {
    fn word(&self, at: usize) -> (&AtomicU64, u64) {
        let i = (at - self.start) / PAGE_SIZE;
        (&self.pages[i / 64], 1 << (i % 64))
    }

    fn is_exclusive(&self, at: usize) -> bool {
        let (word, bit) = self.word(at);
        // Acquire pairs with the Release in `lose`.
        word.load(Ordering::Acquire) & bit != 0
    }

    fn lose(&self, start: usize, end: usize) {
        for at in (start.max(self.start)..end.min(self.end)).step_by(PAGE_SIZE) {
            let (word, bit) = self.word(at);
            word.fetch_and(!bit, Ordering::Release);
        }
    }
}

/// All that is taken exclusively in this process.
pub(crate) struct Exclusives {
    /// How many there are, to look at without the lock.
    live: AtomicU32,
    /// Taken by manager threads only, but for [`Space::mark_exclusive`].
    list: sys::Mutex<Vec<Arc<Taken>>>,
}

impl Default for Exclusives {
    fn default() -> Self {
        Self { live: AtomicU32::new(0), list: sys::Mutex::new(Vec::new()) }
    }
}

impl Exclusives {
    /// In a forked child: the fork has ended all, and a thread of the parent may have been looking.
    ///
    /// # Safety
    /// The caller is the only thread of the process.
    #[allow(unsafe_code, reason = "the contract of the lock")]
    #[doc(hidden)]
    pub unsafe fn renew(&self) {
        // SAFETY: the caller's contract.
        unsafe { self.list.renew(Vec::new()) }
        self.live.store(0, Ordering::SeqCst);
    }
}

/// Why exclusive pages could not be used.
///
/// See the example of [`Space::exclusive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExclusiveError {
    /// The CPU, a fork or an unmapping has taken the page back.
    #[error("the page at {0:#x} is not exclusive any more")]
    Lost(usize),
    /// Not in the range that was taken.
    #[error("{0:#x} is outside the range")]
    Outside(usize),
    /// The page could not be used.
    #[error(transparent)]
    Access(AccessError),
}

/// Pages that a device has to itself, until the CPU touches them. Dropping it ends that; the pages come back when they are
/// touched.
///
/// See the example of [`Space::exclusive`].
pub struct ExclusiveRange<'a> {
    space: &'a Space,
    taken: Arc<Taken>,
}

impl ExclusiveRange<'_> {
    /// The addresses.
    pub fn range(&self) -> Range<usize> {
        self.taken.start..self.taken.end
    }

    /// Whether the device still has the page at `addr`.
    pub fn is_still_exclusive(&self, addr: usize) -> bool {
        let at = addr / PAGE_SIZE * PAGE_SIZE;
        self.range().contains(&at) && self.taken.is_exclusive(at)
    }

    /// How many pages the device still has.
    pub fn pages(&self) -> usize {
        self.taken.pages.iter().map(|w| w.load(Ordering::Acquire).count_ones() as usize).sum()
    }

    /// The device reads.
    ///
    /// # Errors
    /// [`ExclusiveError`].
    pub fn read(&self, start: usize, out: &mut [u8]) -> Result<(), ExclusiveError> {
        self.check(start, out.len())?;
        let result = self.space.device_read(start, out);
        self.outcome(result, start, out.len())
    }

    /// The device writes. If the CPU takes a page back in the middle of it, that page has been written or it has not, and the error
    /// says that it is lost.
    ///
    /// # Errors
    /// [`ExclusiveError`].
    pub fn write(&self, start: usize, data: &[u8]) -> Result<(), ExclusiveError> {
        self.check(start, data.len())?;
        let result = self.space.device_write(start, data);
        self.outcome(result, start, data.len())
    }

    fn check(&self, start: usize, len: usize) -> Result<(), ExclusiveError> {
        let end = start.checked_add(len).ok_or(ExclusiveError::Outside(start))?;
        if start < self.taken.start || end > self.taken.end {
            return Err(ExclusiveError::Outside(start));
        }
        let first = start / PAGE_SIZE * PAGE_SIZE;
        match (first..end).step_by(PAGE_SIZE).find(|&at| !self.taken.is_exclusive(at)) {
            Some(lost) => Err(ExclusiveError::Lost(lost)),
            None => Ok(()),
        }
    }

    fn outcome(
        &self,
        result: Result<(), AccessError>,
        start: usize,
        len: usize,
    ) -> Result<(), ExclusiveError> {
        match result {
            Ok(()) => self.check(start, len),
            Err(AccessError::InDram(at) | AccessError::NotManaged(at)) => Err(ExclusiveError::Lost(at)),
            Err(e) => Err(ExclusiveError::Access(e)),
        }
    }
}

impl Drop for ExclusiveRange<'_> {
    fn drop(&mut self) {
        // Without the lock, which a handler may wait for: the list is swept by who takes it next.
        self.taken.over.store(true, Ordering::Release);
    }
}

impl Space {
    /// Takes the pages of `range` (whole pages of managed memory) away from the CPU. What cannot be taken (pinned, read-only, no
    /// page there yet) is not exclusive: ask [`ExclusiveRange::is_still_exclusive`].
    ///
    /// ```
    /// use farpage::Domain;
    /// use farpage::space::exclusive::ExclusiveError;
    ///
    /// let space = Domain::builder().dram("8M").device("mem:16M").build()?.start_inline()?;
    /// let v = space.region_from_fn(2 << 12, |i| i as u8)?;
    /// let device = space.exclusive(v.pages(..))?;
    /// assert_eq!((device.range(), device.pages()), (v.pages(..), 2));
    ///
    /// let at = v.as_ptr() as usize;
    /// let mut bytes = [0; 2];
    /// device.read(at + 7, &mut bytes)?;
    /// device.write(at + 7, &[bytes[0] + 1, bytes[1] + 1])?;
    /// // The CPU looks: the page is its own again, and the device is told so.
    /// assert_eq!(v[7..9], [8, 9]);
    /// assert!(!device.is_still_exclusive(at));
    /// assert_eq!(device.write(at, &[0]), Err(ExclusiveError::Lost(at)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`MigrateError::Range`].
    pub fn exclusive(&self, range: Range<usize>) -> Result<ExclusiveRange<'_>, MigrateError> {
        check(&range)?;
        let Range { start, end } = range;
        let n = (end - start) / PAGE_SIZE;
        let words = (0..n.div_ceil(64)).map(|w| AtomicU64::new(u64::MAX >> (64 - (n - w * 64).min(64))));
        let taken = Arc::new(Taken { start, end, pages: words.collect(), over: AtomicBool::new(false) });
        let state = (Arc::clone(&taken), start);
        self.on_worker(state, |space, world, _, (taken, at)| {
            if *at == taken.start {
                // Before anything is taken: a touch from here on counts.
                let mut list = space.exclusives.list.lock();
                list.retain(|t| !t.over.load(Ordering::Acquire));
                list.push(Arc::clone(taken));
                space.exclusives.live.store(list.len() as u32, Ordering::SeqCst);
            }
            *at = space.take_exclusively(world, taken, *at);
            *at >= taken.end
        });
        Ok(ExclusiveRange { space: self, taken })
    }

    /// Takes one window's pages; returns where the next begins.
    fn take_exclusively(&self, world: &World, taken: &Taken, at: usize) -> usize {
        let end = self.next_window(at).min(taken.end);
        self.stage_window(world, at, end);
        // What is in the program still, or is not there at all, was not taken.
        for page in (at..end).step_by(PAGE_SIZE) {
            let out = world.ranges.granule(page).is_some_and(|f| self.is_out(&f, page));
            if !out {
                taken.lose(page, page + PAGE_SIZE);
            }
        }
        end
    }

    /// Pages of `[start, end)` have come into the program, or have gone.
    pub(crate) fn touched(&self, start: usize, end: usize) {
        // SeqCst with `exclusive`: who takes pages has said so before they leave.
        if self.exclusives.live.load(Ordering::SeqCst) == 0 {
            return;
        }
        let list = self.exclusives.list.lock();
        list.iter().filter(|t| t.start < end && start < t.end).for_each(|t| t.lose(start, end));
    }

    /// Before a fork, with the world held: what is exclusive is so no longer.
    pub(super) fn end_exclusives(&self, world: &World) {
        if self.exclusives.live.load(Ordering::SeqCst) == 0 {
            return;
        }
        let list = std::mem::take(&mut *self.exclusives.list.lock());
        self.exclusives.live.store(0, Ordering::SeqCst);
        for taken in list {
            for (found, ..) in world.ranges.granules(taken.start, taken.end) {
                self.unstage(world, &found);
            }
            taken.lose(taken.start, taken.end);
        }
    }

    /// Tells of each page of `[start, end)` that some device has exclusively.
    pub(super) fn mark_exclusive(&self, start: usize, end: usize, mut f: impl FnMut(usize)) {
        if self.exclusives.live.load(Ordering::SeqCst) == 0 {
            return;
        }
        let list: Vec<Arc<Taken>> = self.exclusives.list.lock().clone();
        for t in list.iter().filter(|t| !t.over.load(Ordering::Acquire)) {
            let pages = (start.max(t.start)..end.min(t.end)).step_by(PAGE_SIZE);
            pages.filter(|&at| t.is_exclusive(at)).for_each(&mut f);
        }
    }
}

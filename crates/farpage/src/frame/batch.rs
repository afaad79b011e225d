//! Many frames at once: references dropped in one pass (Linux: `release_pages`), and runs of frames (huge pages).
use super::platform::{self, Ordering, fence};
use super::{FrameTable, GetError, Owner, Pfn};

/// Frames that are dropped or freed in one pass.
pub const BATCH: usize = 64;

impl FrameTable {
    /// Drops a reference of each of `pfns` (at most [`BATCH`]), as [`Self::put`], or where `in_transit` as
    /// [`Self::put_in_transit`]. Those whose last it was come first in `last`, and are now *being freed* by `owner`, who
    /// hands their storage back and calls [`Self::release_all`]. Returns how many.
    #[must_use]
    pub fn put_all(&self, pfns: &[Pfn], owner: Owner, in_transit: bool, last: &mut [Pfn; BATCH]) -> usize {
        let mut n = 0;
        for &pfn in pfns {
            let is_last = if in_transit { self.put_in_transit(pfn, owner) } else { self.put(pfn, owner) };
            if is_last {
                last[n] = pfn;
                n += 1;
            }
        }
        n
    }

    /// As [`Self::release`] for many: one visit to each group of hints, one look for waiters. Sorts them.
    pub fn release_all(&self, pfns: &mut [Pfn]) {
        if !pfns.is_sorted() {
            pfns.sort_unstable();
        }
        for group in pfns.chunk_by(|a, b| a / 64 == b / 64) {
            let mut freed = 0;
            for &pfn in group {
                self.check_release(pfn);
                // Release pairs with the Acquire of the next `claim`.
                self.word(pfn).store(0, Ordering::Release);
                freed |= 1 << (pfn % 64);
            }
            // After the words: who finds a frame by its hint finds it free.
            self.hints[group[0] as usize / 64].fetch_and(!freed, Ordering::Release);
        }
        // With the fence in `wait_idle`: either he sees 0 or we see him.
        fence(Ordering::SeqCst);
        if self.waiters.load(Ordering::Relaxed) != 0 {
            pfns.iter().for_each(|&pfn| platform::futex_wake(self.word(pfn), i32::MAX));
        }
    }

    /// Takes `len` free frames that follow each other from 0 to 1, as [`Self::alloc`]; the first one's number is a
    /// multiple of `align`. `None`: there is no such run.
    pub fn alloc_run(&self, owner: Owner, len: u32, align: u32) -> Option<Pfn> {
        if len == 0 || align == 0 {
            return None;
        }
        let mut start = 0u32;
        while let Some(end) = start.checked_add(len).filter(|end| *end as usize <= self.frames) {
            match self.first_in_use(start, end).or_else(|| self.claim_run(start, end, owner)) {
                None => return Some(start),
                Some(taken) => start = (taken + 1).checked_next_multiple_of(align)?,
            }
        }
        None
    }

    /// The last frame of `[start, end)` that is not to be had, by the hints.
    fn first_in_use(&self, start: Pfn, end: Pfn) -> Option<Pfn> {
        (start / 64..=(end - 1) / 64).rev().find_map(|group| {
            let (from, to) = (start.max(group * 64), end.min(group * 64 + 64));
            if !self.has_group(group as usize) {
                return Some(to - 1);
            }
            let mask = (u64::MAX >> (64 - (to - from))) << (from % 64);
            let used = self.hints[group as usize].load(Ordering::Relaxed) & mask;
            (used != 0).then(|| group * 64 + 63 - used.leading_zeros())
        })
    }

    /// Claims all of `[start, end)`, or none and says which one was in use.
    fn claim_run(&self, start: Pfn, end: Pfn, owner: Owner) -> Option<Pfn> {
        self.high.fetch_max((end - 1) / 64 + 1, Ordering::Relaxed);
        let taken = (start..end).find(|&pfn| {
            self.hints[pfn as usize / 64].fetch_or(1 << (pfn % 64), Ordering::Acquire);
            !self.claim(pfn, owner)
        })?;
        for pfn in start..taken {
            // Nobody can have found a frame in transit that no entry names.
            if self.put_in_transit(pfn, owner) {
                self.release(pfn);
            }
        }
        Some(taken)
    }

    /// Whether all of `[start, end)` lies in the table's ranges.
    pub fn covers(&self, start: Pfn, end: Pfn) -> bool {
        start < end && end as usize <= self.frames && {
            (start / 64..=(end - 1) / 64).all(|group| self.has_group(group as usize))
        }
    }

    /// Frames in use, for whoever waits for them.
    pub fn in_use(&self) -> impl Iterator<Item = (Pfn, u32)> + '_ {
        let used = self.words_used().map(|(pfn, w)| (pfn, w.load(Ordering::Acquire)));
        used.filter(|(_, w)| *w != 0).map(|(pfn, w)| (pfn, super::count(w)))
    }

    /// A reference for `owner` to exactly this frame: one more or, if it is free, the first. For memory whose frames have
    /// fixed places (the pages of a file), where whoever needs a free one allocates just that. In transit until it is
    /// settled, as after [`Self::get_in_transit`] or [`Self::alloc`].
    ///
    /// # Errors
    /// [`GetError::Transit`]: another was quicker, or is at it; try again. Never [`GetError::Free`].
    pub fn take_in_transit(&self, pfn: Pfn, owner: Owner) -> Result<(), GetError> {
        match self.get_in_transit(pfn, owner) {
            Err(GetError::Free) => {}
            r => return r,
        }
        let group = pfn / 64;
        // Before the claim, both, as in `alloc_below`.
        if self.high.load(Ordering::Relaxed) <= group {
            self.high.fetch_max(group + 1, Ordering::Relaxed);
        }
        let hint = &self.hints[group as usize];
        if hint.load(Ordering::Acquire) & 1 << (pfn % 64) == 0 {
            hint.fetch_or(1 << (pfn % 64), Ordering::Acquire);
        }
        if self.claim(pfn, owner) { Ok(()) } else { Err(GetError::Transit) }
    }

    /// As [`Self::get_in_transit`], waiting while another transfer or a freeze is under way. The caller must not be in
    /// transit on another frame.
    pub fn get_in_transit_waiting(&self, pfn: Pfn, owner: Owner) -> Result<(), GetError> {
        loop {
            match self.get_in_transit(pfn, owner) {
                Err(GetError::Transit | GetError::Frozen) => platform::yield_now(),
                r => return r,
            }
        }
    }
}

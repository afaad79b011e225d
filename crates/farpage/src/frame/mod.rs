//! The frame table: one reference count a frame, 0 = free.
//!
//! A table lies in shared memory, so that a count means the same to every process of a domain. Nothing
//! here knows what a frame holds: when [`FrameTable::put`] reports that the last reference is gone, the
//! caller runs the one path for that ([`crate::pagemap::Pagemap::put`]).
//!
//! # The word
//!
//! Each frame has one 32-bit word: `count` (19 bits), `frozen` (1 bit), `transit` (12 bits). `transit`
//! names the process slot that is changing this count *and* the page entry that goes with it. It makes
//! the pair recoverable: a process killed between the two leaves its slot number behind, and whoever
//! cleans up knows exactly which counts to check ([`FrameTable::recover`]).
//!
//! | count | frozen | transit | the frame is |
//! |---|---|---|---|
//! | 0 | no | 0 | free |
//! | n | no | 0 | in use, with n references |
//! | n | no | owner | in use; `owner` is changing one of its references and the entry that holds it |
//! | n | yes | owner | frozen by `owner`, who holds all n references |
//! | 0 | yes | owner | being freed: `owner` dropped the last reference and hands the storage back |
//!
//! # Waiting
//!
//! Only [`FrameTable::begin_put`] and a [`FrameTable::put`] of a frozen frame wait, for someone else's transfer
//! or freeze to end. **Who waits must not be in transit on another frame**: two processes that each are on one of two
//! shared frames and wait for the other's would wait for ever. Batches use [`FrameTable::try_begin_put`] and
//! finish what they have begun before they wait. A dead owner's transfers end when he is recovered; whoever does
//! that must not wait for another dead owner meanwhile, so he drops the dead's references with `put`.
//!
//! # What checks what
//!
//! Mutations tried by hand, and a test that catches each (`tests/frame_model.rs`: names with `model`;
//! `tests/loom_frame.rs`: the others):
//!
//! | mutation | caught by |
//! |---|---|
//! | the frame is freed when a put leaves one reference | `two_puts_free_once_and_after_all_use` and six more |
//! | `get` takes a frame from 0 | `model_equals_table`, `a_get_has_the_page_or_fails` |
//! | `get` of a frozen frame | `model_equals_table`, `a_frozen_page_is_its_freezers_alone` |
//! | `freeze` ignores an extra reference, or a transfer | `model_equals_table`, `a_crash_while_frozen` |
//! | `claim` or `release` is Relaxed | `a_frame_has_one_user_at_a_time_and_no_hint_is_lost` |
//! | `put` is Relaxed; `put` has no Acquire | `a_get_has_the_page_or_fails` |
//! | `get` is Relaxed | `a_frozen_page_is_its_freezers_alone` |
//! | `release` wakes nobody; either fence of idle-wait is missing | `a_waiter_for_idle_is_woken` |
//! | the last put leaves no owner | `model_equals_table`, `a_crash_while_dropping_the_last_reference` |
//! | the last put frees before the storage is handed back | `model_waiting_for_idle`, `a_waiter_for_idle_is_woken` |
//! | `put_in_transit` leaves the mark; `put` clears another's | `model_equals_table`, `transfers_in_and_out_keep_the_count`; `a_crash_while_frozen` |
//! | `begin_put` or `get_in_transit` ignores another's mark | `model_equals_table`, `transfers_in_and_out_keep_the_count` |
//! | `alloc` leaves no mark | `a_crash_while_evicting` |
//! | `recover` ignores `published`, either way | `model_equals_table`, `a_crash_while_evicting` |
//! | `recover` leaves a dead owner's freeze | `model_equals_table`, `a_crash_while_frozen` |
//! | `get` guesses 0; guesses Relaxed; `put` guesses Relaxed | `a_get_has_the_page_or_fails`; `a_frozen_page_is_its_freezers_alone`; both |
//! | a batch wakes nobody | `a_batch_wakes_who_waits` (`tests/loom_live.rs`) |
//! | a batch leaves a hint set | `a_batch_frees_in_one_pass` (`tests/pagemap.rs`) and five more |
//! | a run that meets a frame in use keeps what it took | `model_equals_pagemap` (`tests/pagemap_model.rs`), which then never ends |
//! | `alloc` or `alloc_run` goes beyond the ranges | `only_frames_of_the_ranges_exist` (`tests/pagemap.rs`) |
//! | `release` corrects the hint before the word | `a_frame_has_one_user_at_a_time_and_no_hint_is_lost` |
//! | the high mark is raised after the claim | `a_crash_while_evicting` |
//! | `format` finds nothing | `model_lost_hints_are_found_again` |
//! | no check for too many references | `model_counts_end_at_their_maximum` |
//! | the hint is set Relaxed | none: loom, like the hardware, gives a compare-exchange the newest value |
use std::fmt;
use std::ops::Range;
use std::time::Duration;

mod batch;
pub mod cuts;
pub mod ledger;
pub mod live;
mod look;
pub mod platform;

pub use batch::BATCH;
pub use look::Look;
use platform::{AtomicU32, AtomicU64, Ordering, fence};

/// A frame's number on its device.
pub type Pfn = u32;

/// A process slot of the domain, 1 to 4095; 0 is nobody.
pub type Owner = u16;

const COUNT_BITS: u32 = 19;
const COUNT_MASK: u32 = (1 << COUNT_BITS) - 1;
const FROZEN: u32 = 1 << COUNT_BITS;
const TRANSIT_SHIFT: u32 = COUNT_BITS + 1;
/// The largest [`Owner`].
pub const MAX_OWNER: Owner = 4095;

/// Why a reference could not be taken.
///
/// See the example of [`Pagemap`](crate::pagemap::Pagemap).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GetError {
    /// The count is 0: the frame is free, and only allocation may take it from there.
    #[error("frame is free")]
    Free,
    /// Someone has frozen the count to move or take away the page.
    #[error("frame is frozen")]
    Frozen,
    /// The count is at its maximum (2^19 − 1).
    #[error("frame has too many references")]
    Overflow,
    /// Another process is in the middle of a transfer on this frame; try again.
    #[error("frame is in transit")]
    Transit,
}

fn count(word: u32) -> u32 {
    word & COUNT_MASK
}
fn transit(word: u32) -> Owner {
    (word >> TRANSIT_SHIFT) as Owner
}
fn with_transit(word: u32, owner: Owner) -> u32 {
    (word & (COUNT_MASK | FROZEN)) | (u32::from(owner) << TRANSIT_SHIFT)
}

/// The counts of a device's frames, and a hint where free ones are.
///
/// The hint (one bit a frame, set = probably in use) is only a hint: the count alone says what is free. Zeroed memory
/// is a table of free frames, and memory of frames that were never used is never touched: tables are made for many
/// more frames than a device will have.
pub struct FrameTable {
    words: &'static [AtomicU32],
    frames: usize,
    hints: &'static [AtomicU64],
    cursor: &'static AtomicU32,
    waiters: &'static AtomicU32,
    /// Frames from 64 times this on were never allocated.
    high: &'static AtomicU32,
    /// The groups of 64 frames (from, to) that belong to this table; the others are nobody's and stay at 0.
    groups: Box<[(usize, usize)]>,
    /// See [`Self::look_only_at`].
    looks_at: Option<Box<LooksAt>>,
}

/// The first run of frames within these whose counts have memory.
type LooksAt = dyn Fn(Range<Pfn>) -> Option<Range<Pfn>> + Send + Sync;

impl FrameTable {
    /// Bytes of shared memory that a table of `frames` frames needs; see [`FrameTable::new`].
    pub fn shared_len(frames: usize) -> usize {
        64 + frames.next_multiple_of(64) * 4 + frames.div_ceil(64) * 8
    }

    /// A table over `words` (one a frame, a multiple of 64) and `hints` (one bit a frame), a search `cursor`, a count of
    /// idle `waiters` and a `high` water mark, all in zero-initialised memory that the domain shares. Panics if there
    /// are too few hints. For fewer frames than words see [`Self::limited_to`].
    pub fn new(
        words: &'static [AtomicU32],
        hints: &'static [AtomicU64],
        cursor: &'static AtomicU32,
        waiters: &'static AtomicU32,
        high: &'static AtomicU32,
    ) -> Self {
        assert!(hints.len() * 64 >= words.len() && words.len().is_multiple_of(64));
        let hints = &hints[..words.len().div_ceil(64)];
        let frames = words.len();
        let groups = Box::from([(0, hints.len())]);
        Self { words, frames, hints, cursor, waiters, high, groups, looks_at: None }
    }

    /// The same table with no frames but those of `ranges`, which begin and end at multiples of 64 or at the table's end.
    #[must_use]
    pub fn limited_to(self, ranges: &[Range<Pfn>]) -> Self {
        let groups = |r: &Range<Pfn>| (r.start as usize / 64, (r.end as usize).div_ceil(64));
        let end = ranges.iter().map(|r| r.end as usize).max().unwrap_or(0);
        Self { groups: ranges.iter().map(groups).collect(), frames: end.min(self.frames), ..self }
    }

    /// Who looks at the counts of many frames looks at those only that have memory, as `next` says: even a look at one
    /// that has none would take some. Frames without were never in use. Runs are of whole groups of 64.
    pub fn look_only_at(&mut self, next: impl Fn(Range<Pfn>) -> Option<Range<Pfn>> + Send + Sync + 'static) {
        self.looks_at = Some(Box::new(next));
    }

    /// The runs of frames within `[start, end)` to look at.
    fn runs(&self, start: Pfn, end: Pfn) -> impl Iterator<Item = Range<Pfn>> + '_ {
        let mut from = start;
        std::iter::from_fn(move || {
            let left = Some(from..end).filter(|left| !left.is_empty())?;
            let run = match &self.looks_at {
                None => left,
                Some(next) => next(left)?,
            };
            from = run.end;
            Some(run)
        })
    }

    fn has_group(&self, group: usize) -> bool {
        self.groups.iter().any(|&(start, end)| (start..end).contains(&group))
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.frames
    }

    /// Whether the table has no frames.
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Where a frame's word is among the words. The four cache lines of a group of 64 take turns, so that two threads on
    /// neighbouring frames do not disturb each other, and a whole group is four lines all the same.
    pub fn place(&self, pfn: Pfn) -> usize {
        let i = pfn as usize;
        (i & !63) | (i & 3) << 4 | (i >> 2 & 15)
    }

    /// The current count of a frame (a frame that is being freed counts as 0 already).
    pub fn count(&self, pfn: Pfn) -> u32 {
        count(self.word(pfn).load(Ordering::Acquire))
    }

    fn word(&self, pfn: Pfn) -> &AtomicU32 {
        &self.words[self.place(pfn)]
    }

    /// Takes a free frame from 0 to 1 with `owner` in transit, or says that there is none.
    /// The caller writes the page, publishes it in `owner`'s page entry and calls [`Self::settle`].
    pub fn alloc(&self, owner: Owner) -> Option<Pfn> {
        self.alloc_below(self.frames as Pfn, owner)
    }

    /// As [`Self::alloc`], a frame whose number is below `limit`.
    pub fn alloc_below(&self, limit: Pfn, owner: Owner) -> Option<Pfn> {
        let limit = self.frames.min(limit as usize);
        let groups = limit.div_ceil(64);
        let start = self.cursor.load(Ordering::Relaxed) as usize % groups.max(1);
        for i in 0..groups {
            let group = (start + i) % groups;
            if !self.has_group(group) {
                continue;
            }
            let frames = 64.min(limit - group * 64);
            let mut free = !self.hints[group].load(Ordering::Relaxed) & (u64::MAX >> (64 - frames));
            while free != 0 {
                let bit = free.trailing_zeros();
                free &= free - 1;
                // Before the claim: a frame that is in use is always below the mark.
                if self.high.load(Ordering::Relaxed) <= group as u32 {
                    self.high.fetch_max(group as u32 + 1, Ordering::Relaxed);
                }
                // Acquire pairs with the Release of the bit's clearing: the word is seen to be 0, so no bit of
                // a free frame stays set.
                self.hints[group].fetch_or(1 << bit, Ordering::Acquire);
                let pfn = (group * 64) as u32 + bit;
                if self.claim(pfn, owner) {
                    if i != 0 {
                        self.cursor.store(group as u32, Ordering::Relaxed);
                    }
                    return Some(pfn);
                }
            }
        }
        None
    }

    /// 0 → 1 with `owner` in transit; the only way up from 0. Pairs (Acquire) with the Release of
    /// [`Self::release`], so that what the last user did to the frame is over.
    fn claim(&self, pfn: Pfn, owner: Owner) -> bool {
        self.word(pfn)
            .compare_exchange(0, with_transit(1, owner), Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    /// One more reference to a frame that the caller knows to be in use.
    pub fn get(&self, pfn: Pfn) -> Result<(), GetError> {
        // Most frames have one reference. A right guess saves the load, which costs half as much as the exchange; a
        // wrong one tells the value. Acquire as in `update`.
        match self.word(pfn).compare_exchange(1, 2, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Ok(()),
            Err(now) => self.update_from(pfn, now, take),
        }
    }

    /// One more reference for `owner`, who is about to publish it in a page entry; ends with
    /// [`Self::settle`].
    pub fn get_in_transit(&self, pfn: Pfn, owner: Owner) -> Result<(), GetError> {
        self.update(pfn, |w| {
            if transit(w) != 0 { Err(GetError::Transit) } else { take(w).map(|w| with_transit(w, owner)) }
        })
    }

    fn update(&self, pfn: Pfn, f: impl Fn(u32) -> Result<u32, GetError>) -> Result<(), GetError> {
        platform::point();
        self.update_from(pfn, self.word(pfn).load(Ordering::Relaxed), f)
    }

    fn update_from(
        &self,
        pfn: Pfn,
        mut w: u32,
        f: impl Fn(u32) -> Result<u32, GetError>,
    ) -> Result<(), GetError> {
        let word = self.word(pfn);
        loop {
            let new = f(w)?;
            // Acquire pairs with the Release of `unfreeze`: what a freezer did to the page is seen by whoever takes
            // a reference after him.
            match word.compare_exchange_weak(w, new, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(now) => w = now,
            }
        }
    }

    /// Ends a transfer: the entry and the count agree again.
    pub fn settle(&self, pfn: Pfn) {
        platform::point();
        self.word(pfn).fetch_and(COUNT_MASK | FROZEN, Ordering::Release);
    }

    /// `owner` is about to clear its page entry and then [`Self::put_in_transit`]. [`GetError::Transit`]: another
    /// transfer or a freeze is under way on this frame.
    pub fn try_begin_put(&self, pfn: Pfn, owner: Owner) -> Result<(), GetError> {
        self.update(pfn, |w| match (transit(w), count(w)) {
            (0, 0) => Err(GetError::Free),
            (0, _) => Ok(with_transit(w, owner)),
            _ => Err(GetError::Transit),
        })
    }

    /// As [`Self::try_begin_put`], waiting while another transfer or a freeze is under way (a few instructions, or
    /// until a dead owner is recovered). The caller must not be in transit on another frame. Panics if the frame is
    /// free: then the caller's reference was none.
    pub fn begin_put(&self, pfn: Pfn, owner: Owner) {
        while let Err(e) = self.try_begin_put(pfn, owner) {
            assert!(e == GetError::Transit, "put of free frame {pfn}");
            platform::yield_now();
        }
    }

    /// Drops the reference of a transfer begun with [`Self::begin_put`] (or undoes one begun with
    /// [`Self::get_in_transit`] or [`Self::alloc`]). True: it was the last, the frame is now *being
    /// freed* by `owner`, who hands its storage back and calls [`Self::release`].
    #[must_use]
    pub fn put_in_transit(&self, pfn: Pfn, owner: Owner) -> bool {
        self.drop_ref(pfn, self.word(pfn).load(Ordering::Relaxed), owner, true)
    }

    /// Drops a reference that is in no page entry (a pin, a reader's, a dead process's). As
    /// [`Self::put_in_transit`], but others' transfers are left alone; waits while the frame is frozen.
    #[must_use]
    pub fn put(&self, pfn: Pfn, owner: Owner) -> bool {
        // A reader beside the page's entry: guessed as in `get`. Release: what he did to the page comes before the free.
        match self.word(pfn).compare_exchange(2, 1, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => false,
            Err(now) => self.drop_ref(pfn, now, owner, false),
        }
    }

    fn drop_ref(&self, pfn: Pfn, mut w: u32, owner: Owner, in_transit: bool) -> bool {
        platform::point();
        let word = self.word(pfn);
        loop {
            assert!(count(w) > 0, "put of free frame {pfn}");
            assert!(!in_transit || transit(w) == owner, "frame {pfn} is in transit of another");
            if w & FROZEN != 0 {
                platform::yield_now();
                w = word.load(Ordering::Relaxed);
                continue;
            }
            let last = count(w) == 1;
            let new = match (last, in_transit) {
                (true, _) => with_transit(FROZEN, owner),
                (false, true) => with_transit(w - 1, 0),
                (false, false) => w - 1,
            };
            // Release: what this user did to the page comes before the free; Acquire on the last put:
            // it sees what all the others did.
            match word.compare_exchange_weak(w, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return last,
                Err(now) => w = now,
            }
        }
    }

    fn check_release(&self, pfn: Pfn) {
        debug_assert!(count(self.word(pfn).load(Ordering::Relaxed)) == 0, "release of frame {pfn} in use");
    }

    /// The frame's storage is handed back: the word becomes 0, the frame is free, waiters are woken.
    pub fn release(&self, pfn: Pfn) {
        self.check_release(pfn);
        platform::point();
        // Release pairs with the Acquire of the next `claim`.
        self.word(pfn).store(0, Ordering::Release);
        self.hints[pfn as usize / 64].fetch_and(!(1 << (pfn % 64)), Ordering::Release);
        // With the fence in `wait_idle`: either he sees 0 or we see him.
        fence(Ordering::SeqCst);
        if self.waiters.load(Ordering::Relaxed) != 0 {
            platform::futex_wake(self.word(pfn), i32::MAX);
        }
    }

    /// Freezes a count at exactly `expected` (above 0), all of which `owner` holds or controls: nobody can take or
    /// drop a reference until [`Self::unfreeze`]. False (and nothing changed) if anyone holds one more, or is in
    /// transit.
    #[must_use]
    pub fn freeze(&self, pfn: Pfn, expected: u32, owner: Owner) -> bool {
        // Acquire pairs with the Release of every put: what former holders did to the page is over.
        expected > 0
            && expected <= COUNT_MASK
            && self
                .word(pfn)
                .compare_exchange(
                    expected,
                    with_transit(expected | FROZEN, owner),
                    Ordering::Acquire,
                    Ordering::Relaxed,
                )
                .is_ok()
    }

    /// Ends a freeze with `count` references (above 0). Panics if the frame is not frozen.
    pub fn unfreeze(&self, pfn: Pfn, new: u32) {
        let w = self.word(pfn).load(Ordering::Relaxed);
        assert!(w & FROZEN != 0 && count(w) > 0 && count(new) == new && new > 0, "unfreeze of frame {pfn}");
        // Nobody else changes a frozen word. Release: whoever takes a reference next sees what we did.
        self.word(pfn).store(new, Ordering::Release);
    }

    /// Waits until the frame is free; false after `timeout`. (If it is allocated again before the waiter looks, he
    /// waits for that user as well: keep new references away first.)
    pub fn wait_idle(&self, pfn: Pfn, timeout: Duration) -> bool {
        // Someone who dies between freeing and waking wakes nobody: look again from time to time.
        const AT_MOST: Duration = Duration::from_millis(50);
        // (None: further off than any clock goes.)
        let deadline = std::time::Instant::now().checked_add(timeout);
        self.waiters.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let idle = loop {
            // Acquire pairs with the Release of `release`: all use of the frame is over.
            let w = self.word(pfn).load(Ordering::Acquire);
            if w == 0 {
                break true;
            }
            let left = deadline.map_or(timeout, |d| d.saturating_duration_since(std::time::Instant::now()));
            if left.is_zero() {
                break false;
            }
            platform::futex_wait(self.word(pfn), w, Some(left.min(AT_MOST)));
        };
        self.waiters.fetch_sub(1, Ordering::Relaxed);
        idle
    }

    /// Corrects the hints of free frames, before saying "full": a process that died between freeing a frame and
    /// marking it loses a hint, never a frame.
    pub fn format(&self) {
        let groups = |run: Range<Pfn>| run.start as usize / 64..(run.end as usize).div_ceil(64);
        for group in self.runs(0, self.end_used()).flat_map(groups) {
            let hint = &self.hints[group];
            let mut free = 0;
            for pfn in group * 64..(group * 64 + 64).min(self.frames) {
                // Acquire: what `alloc` finds by this bit it finds to be 0.
                if self.word(pfn as Pfn).load(Ordering::Acquire) == 0 {
                    free |= 1 << (pfn % 64);
                }
            }
            hint.fetch_and(!free, Ordering::Release);
        }
    }

    /// Groups of 64 frames of which some may ever have been in use.
    fn groups_used(&self) -> usize {
        (self.high.load(Ordering::Acquire) as usize).min(self.hints.len())
    }

    /// Frames from this one on were never in use.
    pub fn end_used(&self) -> Pfn {
        (self.groups_used() * 64).min(self.frames) as Pfn
    }

    fn words_used(&self) -> impl Iterator<Item = (Pfn, &AtomicU32)> {
        self.runs(0, self.end_used()).flatten().map(|pfn| (pfn, self.word(pfn)))
    }

    /// The frames on which `owner`, who is dead, was in transit, for [`Self::recover`].
    pub fn in_transit(&self, owner: Owner) -> Vec<Pfn> {
        self.words_used()
            .filter(|(_, w)| transit(w.load(Ordering::Acquire)) == owner)
            .map(|(pfn, _)| pfn)
            .collect()
    }

    /// Settles a frame on which a dead `owner` was in transit. `published`: a page entry of his names the
    /// frame. True: the frame is being freed by this call's caller, as after a last put.
    #[must_use]
    pub fn recover(&self, pfn: Pfn, owner: Owner, published: bool) -> bool {
        let w = self.word(pfn).load(Ordering::Acquire);
        if transit(w) != owner {
            return false;
        }
        if w & FROZEN != 0 {
            if count(w) == 0 {
                return true; // he died while handing the storage back
            }
            self.unfreeze(pfn, count(w)); // he died with the frame frozen: its references are as they were
            return false;
        }
        if published {
            self.settle(pfn);
            return false;
        }
        self.put_in_transit(pfn, owner)
    }

    /// Frames whose count is not 0 or that are being freed.
    pub fn used(&self) -> usize {
        self.words_used().filter(|(_, w)| w.load(Ordering::Relaxed) != 0).count()
    }
}

fn take(w: u32) -> Result<u32, GetError> {
    match (w & FROZEN != 0, count(w)) {
        (_, 0) => Err(GetError::Free),
        (true, _) => Err(GetError::Frozen),
        (_, COUNT_MASK) => Err(GetError::Overflow),
        _ => Ok(w + 1),
    }
}

impl fmt::Debug for FrameTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameTable").field("frames", &self.len()).finish_non_exhaustive()
    }
}
